"""LCRON: training and evaluating cascade rankers (retrieval -> prerank -> rank) as one network."""
