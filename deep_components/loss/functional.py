"""Kernels shared by the losses: masked reductions, clean inputs, ground truth, and selection probabilities.

Shapes: B requests, N items; ``mask`` is [B, N] bool, False where the item is missing. A missing item has no influence:
its score and label may be anything, NaN included, and its gradient is zero.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EPSILON = 1e-6


class Targets(Protocol):
    """What a loss may know of a batch."""

    @property
    def labels(self) -> Tensor:
        """[B, N] int64, higher is better."""

    @property
    def mask(self) -> Tensor:
        """[B, N] bool."""

    @property
    def group(self) -> Tensor:
        """[N] int64, 0 = the ground-truth group."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0, with zero gradients, where the mask is empty. Shapes broadcast."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def present(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with every missing item's replaced by 0: no NaN or infinity of a missing item goes further."""
    return torch.where(mask, scores, 0)


def num_ground_truth(targets: Targets, limit: int) -> Tensor:
    """K of each request: min(limit, its ground-truth items). [B] int64."""
    return (targets.mask & (targets.group == 0)).sum(dim=-1).clamp(max=limit)


class Selection(NamedTuple):
    """How much of each item is among the first k places, and among the others. [B, N] each."""

    top: Tensor
    rest: Tensor


def split_rows(permutation: Tensor, k: Tensor) -> Selection:
    """Sums of the rows 1..k, and of the later rows, of matrices [B, N, N] (row j = which item is j-th); k is [B]."""
    rows = torch.arange(permutation.shape[-2], device=permutation.device)
    in_top = (rows < k.unsqueeze(-1)).to(permutation.dtype).unsqueeze(-2)  # [B, 1, N]
    return Selection((in_top @ permutation).squeeze(-2), ((1 - in_top) @ permutation).squeeze(-2))


def selection_probability(permutation: Tensor, k: Tensor) -> Selection:
    """Probabilities: top_k(P) = (rows 1..k summed) / (stopgrad(all rows summed) + eps), rest_k(P) likewise.

    Args:
        permutation: relaxed permutation matrices [B, N, N].
        k: [B] int64.
    """
    top, rest = split_rows(permutation, k)
    total = permutation.detach().sum(dim=-2) + EPSILON
    return Selection(top / total, rest / total)


def selection_cross_entropy(predicted: Selection, target: Selection) -> Tensor:
    """-log(top + eps) gt - log(rest + eps) rest_gt for every item. [B, N]."""
    return -(predicted.top + EPSILON).log() * target.top - (predicted.rest + EPSILON).log() * target.rest
