"""FS-RankNet for a cascade of three stages: every stage learns the full order of the groups (Burges et al., 2005)."""

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, groupwise_ranknet


class FSRankNet(nn.Module):
    """Sum over stages, and over the groups but the last, of the mean of softplus(-(s_m - s_n)), m in the group, n in
    any later group."""

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms, one a stage."""
        scores = {"retrieval": retrieval, "prerank": prerank, "rank": rank}
        terms = {stage: groupwise_ranknet(scores[stage], targets) for stage in scores}
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {stage: term.detach() for stage, term in terms.items()}
