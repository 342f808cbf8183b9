"""BCE: every stage classifies the items that reach it when it serves."""

from collections.abc import Mapping

from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, ground_truth_bce, sum_of_terms


class BCE(nn.Module):
    """Sum over stages of the binary cross-entropy of the logits, 1 on the ground truth, 0 elsewhere.

    Args:
        exposed_groups: stage -> it sees the items of its first so many groups (mean over these items).
    """

    def __init__(self, exposed_groups: Mapping[str, int]) -> None:
        super().__init__()
        self.exposed_groups = dict(exposed_groups)

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms, one a stage."""
        check_inputs(scores, targets, self.exposed_groups)
        seen = {stage: targets.mask & (targets.group < groups) for stage, groups in self.exposed_groups.items()}
        return sum_of_terms({stage: ground_truth_bce(s, targets, seen[stage]) for stage, s in scores.items()})
