"""RankFlow for a cascade of two stages: each stage trains on what the stage before it passes on, and teaches it
(Qin et al., SIGIR 2022)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, best, ground_truth_bce, squared_error


class RankFlow(nn.Module):
    """BCE(s_retrieval; all) + BCE(s_rank; R) + MSE(stopgrad s_rank, s_retrieval; R), R = retrieval's best ``quota``.

    Args:
        quotas: stage -> the items it keeps.
    """

    def __init__(self, quotas: Mapping[str, int]) -> None:
        super().__init__()
        self.quotas = dict(quotas)

    def forward(self, retrieval: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms."""
        retrieved = best(retrieval, targets.mask, self.quotas["retrieval"])
        terms = {
            "bce.retrieval": ground_truth_bce(retrieval, targets, targets.mask),
            "bce.rank": ground_truth_bce(rank, targets, retrieved),
            "distill.retrieval": squared_error(retrieval, rank, retrieved),
        }
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}
