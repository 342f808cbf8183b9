"""One training on several processes and machines: their groups, the shards of the tables, and the sums of a batch."""
