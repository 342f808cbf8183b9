"""ARF (Adaptive Neural Ranking Framework, Wang et al., WWW 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, masked_mean, num_ground_truth
from deep_components.loss.selection import (
    EPSILON,
    label_split,
    mean_of_rows,
    neural_sort,
    order_terms,
)


class ARF(nn.Module):
    """Sum over stages of log w + G / (2 w^2) + R, with a trainable w for each stage.

    With P the relaxed permutation of a stage, m its quota, Y the label matrix and gt = rows 1..K of Y summed:

    * G = mean over the n * n entries of -log(P + eps) Y: the whole order;
    * R = mean over items of -log((mean of rows 1..m of P) + eps) gt: the stage keeps the ground truth.

    Args:
        quotas: stage -> m, the items it keeps.
        num_relevant: upper limit of K, the request's ground-truth items.
        tau: temperature of NeuralSort.
    """

    def __init__(self, quotas: Mapping[str, int], num_relevant: int, tau: float = 200.0) -> None:
        super().__init__()
        self.quotas, self.num_relevant, self.tau = dict(quotas), num_relevant, tau
        self.weight = nn.ParameterDict([(stage, nn.Parameter(torch.ones(()))) for stage in quotas])

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms."""
        check_inputs(scores, targets, self.quotas)
        mask, dtype = targets.mask, next(iter(scores.values())).dtype
        truth = label_split(targets.labels, mask, num_ground_truth(targets, self.num_relevant), dtype)
        orders = order_terms(neural_sort, scores, targets, self.tau, self._shares)
        loss, terms = truth.top.new_zeros(()), dict[str, Tensor]()
        for stage, weight in self.weight.items():
            whole_order, (share,) = orders[stage]
            relaxed = masked_mean(-(share + EPSILON).log() * truth.top, mask)
            log_weight = masked_mean(weight.log().expand_as(mask), mask)  # 0 in a batch without items
            loss = loss + log_weight + whole_order / (2 * weight**2) + relaxed
            terms |= {f"order.{stage}": whole_order, f"top.{stage}": relaxed, f"weight.{stage}": weight}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _shares(self, stage: str, permutation: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (mean_of_rows(permutation, mask, self.quotas[stage]),)
