"""LCRON for a cascade of three stages (Learning Cascade Ranking as One Network, ICML 2025, section 4)."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import (
    Targets,
    end_to_end_cross_entropy,
    masked_mean,
    num_ground_truth,
    selection_cross_entropy,
    selection_probability,
)
from deep_components.loss.sorting import label_split, neural_sort

STAGES = ("retrieval", "prerank", "rank")


class LCRON(nn.Module):
    """L = E + sum_i S_i / (2 w_i^2) + log(prod_i w_i), means over the items present; w_i trainable, from 1.

    With P_i the relaxed permutation of stage i, Y the label matrix, K the request's ground-truth items, gt and rest =
    rows 1..K and the other rows of Y summed:

    * S_i = -log(top_K(P_i) + eps) gt - log(rest_K(P_i) + eps) rest: each stage ranks the ground truth first;
    * E = -log(prod_i top_K(P_i) + eps) gt - log(1 - prod_i (1 - rest_K(P_i)) + eps) clamp(1 - gt, 0, 1): a lower bound
      of the probability that a ground-truth item survives every stage.

    Args:
        num_relevant: upper limit of K.
        tau: temperature of the sorting operator.
        sort: ``neural_sort`` or ``soft_sort``.
        terms: "both", or "end_to_end" (L = E), or "single" (L without E).
        single_weight: c for L = E + c sum_i S_i instead of trainable weights.
        weighting: "original", or "paper" for Eq. 13: E / (2 alpha^2) + sum_i S_i / (2 w_i^2) + log2(alpha prod_i w_i).
        label_ties: "shared": tied items share their rows of Y; "repeated": Y > 1e-3 instead of Y, so that each of n
            tied items counts in each of its n rows.
        end_to_end_quotas: stage -> q_i that takes the place of K inside E.
    """

    def __init__(
        self,
        num_relevant: int,
        tau: float = 50.0,
        sort: Callable[[Tensor, Tensor, float], Tensor] = neural_sort,
        terms: str = "both",
        single_weight: float | None = None,
        weighting: str = "original",
        label_ties: str = "repeated",
        end_to_end_quotas: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_relevant, self.tau, self.sort = num_relevant, tau, sort
        self.terms, self.label_ties, self.end_to_end_quotas = terms, label_ties, end_to_end_quotas
        self.single_weight = single_weight
        trained = ["end_to_end"] if weighting == "paper" and terms != "single" else []
        trained += STAGES if single_weight is None and terms != "end_to_end" else []
        self.weight = nn.ParameterDict([(name, nn.Parameter(torch.ones(()))) for name in trained])
        self.log_base = 2.0 if weighting == "paper" else math.e

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms.

        A missing item (mask False) is as if it were not in its request.
        """
        mask, k = targets.mask, num_ground_truth(targets, self.num_relevant)
        scores = {"retrieval": retrieval, "prerank": prerank, "rank": rank}
        truth = label_split(targets.labels, mask, k, rank.dtype, self.label_ties == "repeated")
        permutation = {stage: self.sort(scores[stage], mask, self.tau) for stage in STAGES}
        chosen = {stage: selection_probability(permutation[stage], k) for stage in STAGES}
        per_item = {}  # [B, N] each
        if self.terms != "single":
            kept = [
                selection_probability(permutation[stage], torch.full_like(k, self.end_to_end_quotas[stage]))
                if self.end_to_end_quotas
                else chosen[stage]
                for stage in STAGES
            ]
            per_item["end_to_end"] = end_to_end_cross_entropy(kept, truth)
        if self.terms != "end_to_end":
            per_item |= {stage: selection_cross_entropy(chosen[stage], truth) for stage in STAGES}
        total = torch.stack([self._weighted(name, values) for name, values in per_item.items()]).sum(dim=0)
        terms = {name: masked_mean(values, mask) for name, values in per_item.items()}
        terms |= {f"weight.{name}": weight for name, weight in self.weight.items()}
        return {"loss": masked_mean(total, mask)} | {name: term.detach() for name, term in terms.items()}

    def _weighted(self, name: str, values: Tensor) -> Tensor:
        if name in self.weight:
            weight = self.weight[name]
            return values / (2 * weight**2) + weight.log() / math.log(self.log_base)
        return values if self.single_weight is None or name == "end_to_end" else values * self.single_weight
