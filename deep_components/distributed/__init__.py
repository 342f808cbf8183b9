"""One training on several processes: what they share, and how a global batch is divided among them."""
