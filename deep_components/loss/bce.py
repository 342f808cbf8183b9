"""BCE for a cascade of three stages: every stage classifies the items that reach it when it serves."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.loss.functional import Targets, ground_truth_bce


class BCE(nn.Module):
    """Sum over stages of the binary cross-entropy of the logits, 1 on the ground truth, 0 elsewhere.

    Args:
        exposed_groups: stage -> it sees the items of its first so many groups (mean over these items).
    """

    def __init__(self, exposed_groups: Mapping[str, int]) -> None:
        super().__init__()
        self.exposed_groups = dict(exposed_groups)

    def forward(self, retrieval: Tensor, prerank: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of the stages -> ``loss`` and its detached terms, one a stage."""
        scores = {"retrieval": retrieval, "prerank": prerank, "rank": rank}
        terms = {
            stage: ground_truth_bce(scores[stage], targets, targets.mask & (targets.group < self.exposed_groups[stage]))
            for stage in scores
        }
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss} | {stage: term.detach() for stage, term in terms.items()}
