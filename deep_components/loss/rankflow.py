"""RankFlow for a cascade of three stages: each stage trains on what the stage before it passes on, and teaches it
(Qin et al., SIGIR 2022)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, best, ground_truth_bce, ranking_distillation, squared_error


class RankFlow(nn.Module):
    """BCE(s_retrieval; all) + BCE(s_prerank; R) + MSE(stopgrad s_prerank, s_retrieval; R) + D(prerank -> retrieval; R)
    + BCE(s_rank; Q) + MSE(stopgrad s_rank, s_prerank; Q) + D(rank -> prerank; Q).

    R = retrieval's best, Q = prerank's best of R. D(teacher -> student; S) = -log sigmoid(mean of the student's scores
    over the teacher's best of S, as many as the teacher keeps - their mean over the teacher's worst ``num_worst``).

    Args:
        quotas: stage -> the items it keeps.
        num_worst: items of the lower end in D.
    """

    def __init__(self, quotas: Mapping[str, int], num_worst: int = 10) -> None:
        super().__init__()
        self.quotas, self.num_worst = dict(quotas), num_worst

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms."""
        quotas, worst = self.quotas, self.num_worst
        retrieved = best(retrieval, targets.mask, quotas["retrieval"])
        preranked = best(prerank, retrieved, quotas["prerank"])
        terms = {
            "bce.retrieval": ground_truth_bce(retrieval, targets, targets.mask),
            "bce.prerank": ground_truth_bce(prerank, targets, retrieved),
            "bce.rank": ground_truth_bce(rank, targets, preranked),
            "distill.retrieval": squared_error(retrieval, prerank, retrieved),
            "distill.prerank": squared_error(prerank, rank, preranked),
            "order.retrieval": ranking_distillation(retrieval, prerank, retrieved, quotas["prerank"], worst),
            "order.prerank": ranking_distillation(prerank, rank, preranked, quotas["rank"], worst),
        }
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}
