"""The multi-layer perceptron all models are built from."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def tower(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them and none after the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
