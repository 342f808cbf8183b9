"""FS-LambdaLoss: every stage learns the full order, pairs weighted by what a swap costs (LambdaLoss, Wang et al., CIKM
2018)."""

from collections.abc import Mapping

from torch import Tensor, nn

from deep_components.loss.functional import Targets, check_inputs, lambda_loss, sum_of_terms


class FSLambdaLoss(nn.Module):
    """Sum over stages of the pairwise logistic loss weighted by :func:`lambda_loss`'s rank and gain differences.

    Args:
        cutoff: ranks beyond it have no discount.
    """

    def __init__(self, cutoff: int = 30) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms, one a stage."""
        check_inputs(scores, targets)
        return sum_of_terms({stage: lambda_loss(s, targets, self.cutoff) for stage, s in scores.items()})
