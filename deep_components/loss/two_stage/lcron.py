"""LCRON for a cascade of two stages (Learning Cascade Ranking as One Network, ICML 2025, section 4)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deep_components.loss.functional import (
    EPSILON,
    Targets,
    masked_mean,
    num_ground_truth,
    selection_cross_entropy,
    selection_probability,
    split_rows,
)
from deep_components.loss.sorting import label_permutation, neural_sort


class LCRON(nn.Module):
    """L = E + sum_i S_i / (2 w_i^2) + log(prod_i w_i), means over the items present; w_i trainable.

    With P_i the relaxed permutation of stage i, Y the label matrix and K the request's ground-truth items:

    * S_i = -log(top_K(P_i) + eps) gt - log(rest_K(P_i) + eps) rest: each stage ranks the ground truth first;
    * E = -log(prod_i top_K(P_i) + eps) gt - log(1 - prod_i (1 - rest_K(P_i)) + eps) clamp(1 - gt, 0, 1): a lower bound
      of the probability that a ground-truth item survives every stage;
    * gt, rest = rows 1..K, and the other rows, of Y summed.

    Args:
        num_relevant: upper limit of K.
        tau: temperature of the sorting operator.
        sort: ``neural_sort`` or ``soft_sort``.
    """

    def __init__(
        self,
        num_relevant: int,
        tau: float = 50.0,
        sort: Callable[[Tensor, Tensor, float], Tensor] = neural_sort,
    ) -> None:
        super().__init__()
        self.num_relevant, self.tau, self.sort = num_relevant, tau, sort
        self.weight = nn.ParameterDict([(stage, nn.Parameter(torch.ones(()))) for stage in ("retrieval", "rank")])

    def forward(self, retrieval: Tensor, rank: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores [B, N] of both stages -> ``loss`` and its detached terms.

        A missing item (mask False) is as if it were not in its request.
        """
        mask, k = targets.mask, num_ground_truth(targets, self.num_relevant)
        truth = split_rows(label_permutation(targets.labels, mask, rank.dtype), k)
        chosen = {
            "retrieval": selection_probability(self.sort(retrieval, mask, self.tau), k),
            "rank": selection_probability(self.sort(rank, mask, self.tau), k),
        }
        survives = chosen["retrieval"].top * chosen["rank"].top  # [B, N]
        dropped = 1 - (1 - chosen["retrieval"].rest) * (1 - chosen["rank"].rest)
        negative = (1 - truth.top).clamp(0, 1)
        end_to_end = -(survives + EPSILON).log() * truth.top - (dropped + EPSILON).log() * negative
        per_item = end_to_end
        terms = {"end_to_end": masked_mean(end_to_end, mask)}
        for stage, weight in self.weight.items():
            single = selection_cross_entropy(chosen[stage], truth)
            per_item = per_item + single / (2 * weight**2) + weight.log()
            terms |= {f"single.{stage}": masked_mean(single, mask), f"weight.{stage}": weight}
        return {"loss": masked_mean(per_item, mask)} | {name: term.detach() for name, term in terms.items()}
