"""FS-LambdaLoss for a cascade of three stages: every stage learns the full order, pairs weighted by what a swap costs
(LambdaLoss, Wang et al., CIKM 2018)."""

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, lambda_loss


class FSLambdaLoss(nn.Module):
    """Sum over stages of the pairwise logistic loss weighted by :func:`lambda_loss`'s rank and gain differences.

    Args:
        cutoff: ranks beyond it have no discount.
    """

    def __init__(self, cutoff: int = 30) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms, one a stage."""
        scores = {"retrieval": retrieval, "prerank": prerank, "rank": rank}
        terms = {stage: lambda_loss(scores[stage], targets, self.cutoff) for stage in scores}
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {stage: term.detach() for stage, term in terms.items()}
