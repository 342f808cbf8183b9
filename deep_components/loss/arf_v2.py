"""ARF-v2 (Adaptive Neural Ranking Framework, Wang et al., WWW 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, masked_mean, num_ground_truth
from deep_components.loss.selection import (
    PERMUTATION_OPERATORS,
    SELECTION_OPERATORS,
    Selection,
    label_split,
    order_terms,
    selection_cross_entropy,
    split,
)

ORDER = ("neural_sort", 200.0)  # of the order term beside an operator that gives no order


class ARFv2(nn.Module):
    """Sum over stages of log w + G / (2 w^2) + R, with a trainable w for each stage.

    With P the relaxed permutation of a stage, top_m, rest_m its Selection at its quota m, Y the label matrix and gt,
    rest = rows 1..K and the other rows of Y summed:

    * G = mean over the n * n entries of -log(P + eps) Y: the whole order;
    * R = mean over items of -log(top_m + eps) gt - log(rest_m + eps) rest.

    Args:
        quotas: stage -> m, the items it keeps.
        num_relevant: upper limit of K, the request's ground-truth items.
        tau: temperature of the operator.
        topk_op: one of ``SELECTION_OPERATORS``. Beside one that selects without sorting, P is NeuralSort's at 200.
    """

    def __init__(
        self, quotas: Mapping[str, int], num_relevant: int, tau: float = 200.0, topk_op: str = "neural_sort"
    ) -> None:
        super().__init__()
        self.quotas, self.num_relevant, self.tau, self.topk_op = dict(quotas), num_relevant, tau, topk_op
        self.weight = nn.ParameterDict([(stage, nn.Parameter(torch.ones(()))) for stage in quotas])

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms."""
        check_inputs(scores, targets, self.quotas)
        mask, dtype = targets.mask, next(iter(scores.values())).dtype
        k = num_ground_truth(targets, self.num_relevant)
        truth = label_split(targets.labels, mask, k, dtype)
        sorts = self.topk_op in PERMUTATION_OPERATORS
        order, tau = (self.topk_op, self.tau) if sorts else ORDER
        orders = order_terms(PERMUTATION_OPERATORS[order], scores, targets, tau, *([self._shares] if sorts else []))
        loss, terms = truth.top.new_zeros(()), dict[str, Tensor]()
        for stage, weight in self.weight.items():
            whole_order, shares = orders[stage]
            if sorts:
                top, rest = shares
                chosen = Selection(top, rest)
            else:
                quota = torch.full_like(k, self.quotas[stage])
                chosen = SELECTION_OPERATORS[self.topk_op](scores[stage], mask, quota, self.tau)
            relaxed = masked_mean(selection_cross_entropy(chosen, truth), mask)
            log_weight = masked_mean(weight.log().expand_as(mask), mask)  # 0 in a batch without items
            loss = loss + log_weight + whole_order / (2 * weight**2) + relaxed
            terms |= {f"order.{stage}": whole_order, f"top.{stage}": relaxed, f"weight.{stage}": weight}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _shares(self, stage: str, permutation: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        chosen = split(permutation, mask.new_full(mask.shape[:1], self.quotas[stage], dtype=torch.long))
        return chosen.top, chosen.rest
