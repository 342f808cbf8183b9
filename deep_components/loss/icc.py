"""ICC for a cascade of three stages: the cascade's expected score, trained pairwise (Gallagher et al., WSDM 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, masked_mean, pairs, pairwise_bce, present, soft_top_k


class ICC(nn.Module):
    """Pairwise BCE of e_m - e_n with target [y_m > y_n] over m < n, averaged over all n * n positions.

    e = (1 - a) s_retrieval + 2 a (1 - b) s_prerank + 4 a b c s_rank, a = I(s_retrieval, q), b = I(s_prerank, q),
    c = I(s_rank, q),
    with I(s, q) = sigmoid((s - q-th largest of s) / temperature).

    Args:
        cuts: stage -> q. The original cuts the last stage where the one before it cuts.
        temperature: width of the cut, in the scores' unit.
    """

    def __init__(self, cuts: Mapping[str, int], temperature: float = 1e-3) -> None:
        super().__init__()
        self.cuts, self.temperature = dict(cuts), temperature

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss``. Tied labels are ordered by the items' places."""
        mask = targets.mask
        retrieval, prerank, rank = present(retrieval, mask), present(prerank, mask), present(rank, mask)
        a = soft_top_k(retrieval, mask, self.cuts["retrieval"], self.temperature)
        b = soft_top_k(prerank, mask, self.cuts["prerank"], self.temperature)
        c = soft_top_k(rank, mask, self.cuts["rank"], self.temperature)
        expected = (1 - a) * retrieval + 2 * a * (1 - b) * prerank + 4 * a * b * c * rank
        penalty = pairwise_bce(expected, torch.where(mask, targets.labels, 0))
        upper = torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool, device=mask.device).triu(diagonal=1)
        return {"loss": masked_mean(torch.where(upper, penalty, 0), pairs(mask))}
