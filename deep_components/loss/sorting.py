"""Sorting alone for a cascade of three stages: NeuralSort or SoftSort on every stage (the paper's Table 7)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, sorting_cross_entropy
from deep_components.loss.sorting import label_permutation, neural_sort


class SortingCrossEntropy(nn.Module):
    """Sum over stages of the mean over the n * n entries of -log(P + eps) Y, P the stage's relaxed permutation, Y the
    label matrix.

    Args:
        tau: temperature of the sorting operator.
        sort: ``neural_sort`` or ``soft_sort``.
    """

    def __init__(self, tau: float = 50.0, sort: Callable[[Tensor, Tensor, float], Tensor] = neural_sort) -> None:
        super().__init__()
        self.tau, self.sort = tau, sort

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms, one a stage."""
        scores = {"retrieval": retrieval, "prerank": prerank, "rank": rank}
        label_rows = label_permutation(targets.labels, targets.mask, rank.dtype)
        terms = {
            stage: sorting_cross_entropy(self.sort(scores[stage], targets.mask, self.tau), label_rows, targets.mask)
            for stage in scores
        }
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {stage: term.detach() for stage, term in terms.items()}
