"""Embedding tables apart from the models that look them up: their rows, initial values, and how rows train."""
