"""From a trained run to served lists: a bundle of models, encoding, corpus and index. Knows no training."""
