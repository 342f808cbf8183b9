"""Sorting alone: NeuralSort or SoftSort on every stage (the paper's Table 7)."""

from collections.abc import Mapping

from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, sum_of_terms
from deep_components.loss.selection import PERMUTATION_OPERATORS, order_terms


class SortingCrossEntropy(nn.Module):
    """Sum over stages of the mean over the n * n entries of -log(P + eps) Y, P the stage's relaxed permutation, Y the
    label matrix.

    Args:
        tau: temperature of the sorting operator.
        topk_op: one of ``PERMUTATION_OPERATORS``.
    """

    def __init__(self, tau: float = 50.0, topk_op: str = "neural_sort") -> None:
        super().__init__()
        self.tau, self.topk_op = tau, topk_op

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms, one a stage."""
        check_inputs(scores, targets)
        orders = order_terms(PERMUTATION_OPERATORS[self.topk_op], scores, targets, self.tau)
        return sum_of_terms({stage: order for stage, (order, _) in orders.items()})
