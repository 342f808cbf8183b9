"""RankFlow: each stage trains on what the stage before it passes on, and teaches it (Qin et al., SIGIR 2022)."""

from collections.abc import Mapping

from torch import Tensor, nn

from deep_components.loss.functional import (
    Targets,
    check_inputs,
    ground_truth_bce,
    ranking_distillation,
    squared_error,
    sum_of_terms,
    top_k_mask,
)


class RankFlow(nn.Module):
    """Sum over stages of BCE(s_i; R_i), and over those but the last of MSE(stopgrad s_{i+1}, s_i; R_{i+1}) and
    D(i+1 -> i; R_{i+1}).

    R_1 = all items, R_{i+1} = stage i's best of R_i. D(teacher -> student; S) = -log sigmoid(mean of the student's
    scores over the teacher's best of S, as many as the teacher keeps - their mean over the teacher's worst
    ``num_worst``).

    Args:
        quotas: stage -> the items it keeps, in serving order.
        order_distillation: with D, as in the original with three stages; with two it has none.
        num_worst: items of the lower end in D.
    """

    def __init__(self, quotas: Mapping[str, int], order_distillation: bool = True, num_worst: int = 10) -> None:
        super().__init__()
        self.quotas, self.order_distillation, self.num_worst = dict(quotas), order_distillation, num_worst

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Scores, stage -> [B, N] -> ``loss`` and its detached terms."""
        check_inputs(scores, targets, self.quotas)
        classify, distill, order = {}, {}, {}
        reached, candidates = {}, targets.mask
        for stage, quota in self.quotas.items():
            reached[stage] = candidates
            classify[f"bce.{stage}"] = ground_truth_bce(scores[stage], targets, candidates)
            candidates = top_k_mask(scores[stage], candidates, quota)
        stages = list(self.quotas)
        for index, later in enumerate(stages[1:]):
            stage = stages[index]
            student, teacher, common = scores[stage], scores[later], reached[later]
            distill[f"distill.{stage}"] = squared_error(student, teacher, common)
            if self.order_distillation:
                best, worst = self.quotas[later], self.num_worst
                order[f"order.{stage}"] = ranking_distillation(student, teacher, common, best, worst)
        return sum_of_terms(classify | distill | order)
