"""ICC: the cascade's expected score, trained pairwise (Gallagher et al., WSDM 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import (
    Targets,
    batch_totals,
    check_inputs,
    in_blocks,
    masked_sum,
    pairs,
    pairwise_bce,
    soft_top_k,
    without_missing,
)


class ICC(nn.Module):
    """Pairwise BCE of e_m - e_n with target [y_m > y_n] over m < n, averaged over all n * n positions.

    e = sum over the stages but the last of w_i r_i (1 - a_i) s_i, and w_T r_T a_T s_T of the last stage T, with
    a_i = I(s_i, q_i), I(s, q) = sigmoid((s - q-th largest of s) / temperature), and r_i the product of the a of the
    stages before i: how much of an item reaches stage i.

    Args:
        cuts: stage -> q, in serving order. The original cuts the last stage where the one before it cuts.
        weights: stage -> w; by default 1, 2, 4, ..., as in the original with three stages; with two it has 1 and 1.
        temperature: width of the cut, in the scores' unit.
    """

    def __init__(
        self, cuts: Mapping[str, int], weights: Mapping[str, float] | None = None, temperature: float = 1e-3
    ) -> None:
        super().__init__()
        self.cuts, self.temperature = dict(cuts), temperature
        self.weights = dict(weights or {stage: 2.0**i for i, stage in enumerate(cuts)})

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss``. Tied labels are ordered by the items' index."""
        check_inputs(scores, targets, self.cuts)
        mask, last = targets.mask, list(self.cuts)[-1]
        expected, reaches = torch.zeros_like(scores[last]), torch.ones_like(scores[last])
        for stage, cut in self.cuts.items():
            clean = without_missing(scores[stage], mask)
            kept = soft_top_k(clean, mask, cut, self.temperature)
            decided = kept if stage == last else 1 - kept
            expected = expected + self.weights[stage] * reaches * decided * clean
            reaches = reaches * kept
        total, count = batch_totals(*in_blocks(_upper_pairs, expected, targets.labels, mask))
        return {"loss": total / count.clamp(min=1)}


def _upper_pairs(expected: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the pairwise BCE over m < n, and the number of all positions."""
    penalty = pairwise_bce(expected, torch.where(mask, labels, 0))
    upper = torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool, device=mask.device).triu(diagonal=1)
    return masked_sum(torch.where(upper, penalty, 0), pairs(mask))
