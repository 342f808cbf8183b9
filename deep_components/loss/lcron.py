"""LCRON (Learning Cascade Ranking as One Network, ICML 2025, section 4)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, masked_means, num_ground_truth
from deep_components.loss.selection import (
    SELECTION_OPERATORS,
    Selection,
    end_to_end_cross_entropy,
    label_split,
    select,
    selection_cross_entropy,
)


class LCRON(nn.Module):
    """L = E + sum_i S_i / (2 w_i^2) + log(prod_i w_i), means over the items present; w_i trainable, from 1.

    With top_k, rest_k the Selection of stage i at k, Y the label matrix, K the request's ground-truth items, gt and
    rest = rows 1..K and the other rows of Y summed:

    * S_i = -log(top_K + eps) gt - log(rest_K + eps) rest: each stage ranks the ground truth first;
    * E = -log(prod_i top_K + eps) gt - log(1 - prod_i (1 - rest_K) + eps) clamp(1 - gt, 0, 1): a lower bound of the
      probability that a ground-truth item survives every stage.

    Args:
        stages: their names, in serving order.
        num_relevant: upper limit of K.
        tau: temperature of the operator.
        topk_op: one of ``SELECTION_OPERATORS``. Those that know log top and log rest exactly need no eps.
        terms: "both", or "end_to_end" (L = E), or "single" (L without E).
        single_weight: c for L = E + c sum_i S_i instead of trainable weights.
        weighting: "original", or "paper" for Eq. 13: E / (2 alpha^2) + sum_i S_i / (2 w_i^2) + log2(alpha prod_i w_i).
        label_ties: "shared", the original with two stages: tied items share their rows of Y; or "repeated", the
            original with three: Y > 1e-3 instead of Y, so that each of n tied items counts in each of its n rows.
        end_to_end_quotas: stage -> q_i that replaces K inside E: gt stays the K ground-truth items.
        single_quotas: stage -> q_i that replaces K inside S_i in the same way.
    """

    single_quotas: Mapping[str, int] | None = None  # an attribute only where given: earlier runs stay the same

    def __init__(
        self,
        stages: Iterable[str],
        num_relevant: int,
        tau: float = 50.0,
        topk_op: str = "neural_sort",
        terms: str = "both",
        single_weight: float | None = None,
        weighting: str = "original",
        label_ties: str = "shared",
        end_to_end_quotas: Mapping[str, int] | None = None,
        single_quotas: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._stages = tuple(stages)
        self.num_relevant, self.tau, self.topk_op = num_relevant, tau, topk_op
        self.terms, self.weighting, self.single_weight = terms, weighting, single_weight
        self.label_ties, self.end_to_end_quotas = label_ties, end_to_end_quotas
        if single_quotas is not None:
            self.single_quotas = single_quotas
        trained = ["end_to_end"] if weighting == "paper" and terms != "single" else []
        trained += self._stages if single_weight is None and terms != "end_to_end" else []
        self.weight = nn.ParameterDict([(name, nn.Parameter(torch.ones(()))) for name in trained])

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms.

        A missing item (mask False) is as if it were not in its request.
        """
        check_inputs(scores, targets, self._stages)
        mask, dtype = targets.mask, next(iter(scores.values())).dtype
        k = num_ground_truth(targets, self.num_relevant)
        truth = label_split(targets.labels, mask, k, dtype, self.label_ties == "repeated")
        single, end_to_end = {}, {}
        for stage, s in scores.items():
            single[stage], end_to_end[stage] = self._select(stage, s, mask, k)
        per_item = {}  # [B, N] each
        if self.terms != "single":
            per_item["end_to_end"] = end_to_end_cross_entropy(list(end_to_end.values()), truth)
        if self.terms != "end_to_end":
            per_item |= {stage: selection_cross_entropy(chosen, truth) for stage, chosen in single.items()}
        total = torch.stack([self._weighted(name, values) for name, values in per_item.items()]).sum(dim=0)
        terms = masked_means({"loss": total} | {name: values.detach() for name, values in per_item.items()}, mask)
        return terms | {f"weight.{name}": weight.detach() for name, weight in self.weight.items()}

    def _select(self, stage: str, scores: Tensor, mask: Tensor, k: Tensor) -> tuple[Selection, Selection]:
        """The stage's Selection at the cut of S, and at that of E."""
        quotas = self.single_quotas, self.end_to_end_quotas
        cuts = [k if quota is None else torch.full_like(k, quota[stage]) for quota in quotas]
        if quotas[0] == quotas[1]:
            chosen = SELECTION_OPERATORS[self.topk_op](scores, mask, cuts[0], self.tau)
            return chosen, chosen
        of_single, of_end_to_end = select(self.topk_op, scores, mask, cuts, self.tau)
        return of_single, of_end_to_end

    def _weighted(self, name: str, values: Tensor) -> Tensor:
        if name in self.weight:
            weight, base = self.weight[name], 2.0 if self.weighting == "paper" else math.e
            return values / (2 * weight**2) + weight.log() / math.log(base)
        return values if self.single_weight is None or name == "end_to_end" else values * self.single_weight
