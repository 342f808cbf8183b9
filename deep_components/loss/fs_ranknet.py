"""FS-RankNet: every stage learns the full order of the groups (Burges et al., 2005)."""

from collections.abc import Mapping

from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, groupwise_ranknet, sum_of_terms


class FSRankNet(nn.Module):
    """Sum over stages, and over the groups but the last, of the mean of softplus(-(s_m - s_n)), m in the group, n in
    any later group."""

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms, one a stage."""
        check_inputs(scores, targets)
        return sum_of_terms({stage: groupwise_ranknet(s, targets) for stage, s in scores.items()})
