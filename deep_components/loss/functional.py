"""Kernels shared by the losses: masked reductions, clean inputs, ground truth, and selection probabilities.

Shapes: B requests, N items; ``mask`` is [B, N] bool, False where the item is missing. A missing item has no influence:
its score and label may be anything, NaN included, and its gradient is zero.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


class Targets(Protocol):
    """What a loss may know of a batch."""

    @property
    def labels(self) -> Tensor:
        """[B, N] int64, higher is better."""

    @property
    def mask(self) -> Tensor:
        """[B, N] bool."""

    @property
    def group(self) -> Tensor:
        """[N] int64, 0 = the ground-truth group."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0, with zero gradients, where the mask is empty. Shapes broadcast."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def present(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with every missing item's replaced by 0: no NaN or infinity of a missing item goes further."""
    return torch.where(mask, scores, 0)


def num_ground_truth(targets: Targets, limit: int) -> Tensor:
    """K of each request: min(limit, its ground-truth items). [B] int64."""
    return (targets.mask & (targets.group == 0)).sum(dim=-1).clamp(max=limit)


class Selection(NamedTuple):
    """How much of each item is among the first k places, and among the others. [B, N] each."""

    top: Tensor
    rest: Tensor


def split_rows(permutation: Tensor, k: Tensor) -> Selection:
    """Sums of the rows 1..k, and of the later rows, of matrices [B, N, N] (row j = which item is j-th); k is [B]."""
    rows = torch.arange(permutation.shape[-2], device=permutation.device)
    in_top = (rows < k.unsqueeze(-1)).to(permutation.dtype).unsqueeze(-2)  # [B, 1, N]
    return Selection((in_top @ permutation).squeeze(-2), ((1 - in_top) @ permutation).squeeze(-2))


def selection_probability(permutation: Tensor, k: Tensor) -> Selection:
    """Probabilities: top_k(P) = (rows 1..k summed) / (stopgrad(all rows summed) + eps), rest_k(P) likewise.

    Args:
        permutation: relaxed permutation matrices [B, N, N].
        k: [B] int64.
    """
    top, rest = split_rows(permutation, k)
    total = permutation.detach().sum(dim=-2) + EPSILON
    return Selection(top / total, rest / total)


def end_to_end_cross_entropy(chosen: Sequence[Selection], target: Selection) -> Tensor:
    """-log(prod_i top_i + eps) gt - log(1 - prod_i (1 - rest_i) + eps) clamp(1 - gt, 0, 1) for every item. [B, N].

    prod_i top_i is the lower bound of the probability that an item survives every stage i (LCRON, section 4).
    """
    survives, never_dropped = torch.ones_like(target.top), torch.ones_like(target.top)
    for stage in chosen:
        survives, never_dropped = survives * stage.top, never_dropped * (1 - stage.rest)
    negative = (1 - target.top).clamp(0, 1)
    return -(survives + EPSILON).log() * target.top - (1 - never_dropped + EPSILON).log() * negative


def mean_of_rows(permutation: Tensor, mask: Tensor, k: int) -> Tensor:
    """Mean of the rows 1..k of P, of all n rows where fewer than k items are present. [B, N]."""
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1, max=k)
    return permutation[:, :k].sum(dim=-2) / count


def selection_cross_entropy(predicted: Selection, target: Selection) -> Tensor:
    """-log(top + eps) gt - log(rest + eps) rest_gt for every item. [B, N]."""
    return -(predicted.top + EPSILON).log() * target.top - (predicted.rest + EPSILON).log() * target.rest


# ---- pointwise -------------------------------------------------------------------------------------------------------


def ground_truth_bce(scores: Tensor, targets: Targets, visible: Tensor) -> Tensor:
    """Binary cross-entropy of the logits with target 1 on the ground-truth group, 0 elsewhere; mean over ``visible``.

    Args:
        scores: [B, N].
        visible: [B, N] bool, the items that take part; must lie inside ``targets.mask``.
    """
    positive = (targets.group == 0).to(scores.dtype).expand_as(scores)
    return masked_mean(
        F.binary_cross_entropy_with_logits(present(scores, visible), positive, reduction="none"), visible
    )


def squared_error(scores: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Mean of (stopgrad(teacher) - scores)^2 over ``visible``; scores and teacher are [B, N]."""
    return masked_mean((present(teacher.detach(), visible) - present(scores, visible)) ** 2, visible)


# ---- selecting -------------------------------------------------------------------------------------------------------


def best(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k best candidates by score, all where there are fewer. [B, N] bool, without gradient."""
    order = scores.detach().masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(candidates).scatter(-1, order[:, :k], True) & candidates


def soft_top_k(scores: Tensor, mask: Tensor, k: int, temperature: float) -> Tensor:
    """I(s, k) = sigmoid((s - k-th largest of s) / temperature), the smallest where fewer than k items are present.

    Gradient flows through the threshold too. ``scores`` are those of :func:`present`; a caller that goes on with them
    lets their gradients add up in one place, which at a temperature of 1e-3 decides float32's last digits.

    Returns:
        [B, N], 0 for missing items.
    """
    ordered = scores.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).values
    place = mask.sum(dim=-1, keepdim=True).clamp(max=k) - 1
    threshold = ordered.gather(-1, place.clamp(min=0))
    threshold = torch.where(place >= 0, threshold, 0)
    return torch.where(mask, ((scores - threshold) / temperature).sigmoid(), 0)


def ranking_distillation(student: Tensor, teacher: Tensor, candidates: Tensor, num_best: int, num_worst: int) -> Tensor:
    """D = -log sigmoid(mean of the student's scores over the teacher's best - the same over the teacher's worst).

    Best and worst are ``num_best`` and ``num_worst`` of the candidates by the teacher (all where there are fewer).
    Mean over the requests that have candidates.
    """
    clean = present(student, candidates)
    upper = best(teacher, candidates, num_best)
    lower = best(-teacher, candidates, num_worst)
    margin = (clean * upper).sum(dim=-1) / upper.sum(dim=-1).clamp(min=1)
    margin = margin - (clean * lower).sum(dim=-1) / lower.sum(dim=-1).clamp(min=1)
    return masked_mean(-F.logsigmoid(margin), candidates.any(dim=-1))


# ---- pairwise --------------------------------------------------------------------------------------------------------


def pairs(mask: Tensor) -> Tensor:
    """Which pairs (m, n) are of two present items. [B, N, N] bool."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2)


def pairwise_bce(scores: Tensor, labels: Tensor) -> Tensor:
    """BCE of s_m - s_n with target [y_m > y_n]. [B, N, N]."""
    margin = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    target = (labels.unsqueeze(-1) > labels.unsqueeze(-2)).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(margin, target, reduction="none")


def groupwise_ranknet(scores: Tensor, targets: Targets) -> Tensor:
    """Sum over the groups but the last of the mean of softplus(-(s_m - s_n)), m in the group, n in any later group."""
    clean, group = present(scores, targets.mask), targets.group
    penalty = F.softplus(clean.unsqueeze(-2) - clean.unsqueeze(-1))  # [B, N, N], of m before n
    ordered = pairs(targets.mask) & (group.unsqueeze(-1) < group.unsqueeze(-2))
    # The mean over the pairs of an item's group stands at each of its places: their sum takes it once a group.
    same = (group.unsqueeze(-1) == group).to(penalty.dtype)  # [N, N]
    total = torch.where(ordered, penalty, 0).sum(dim=(0, 2)) @ same  # [N]
    count = ordered.sum(dim=(0, 2)).to(penalty.dtype) @ same
    return (total / count.clamp(min=1) / same.sum(dim=-1)).sum()


def lambda_loss(scores: Tensor, targets: Targets, cutoff: int) -> Tensor:
    """Sum over the ordered pairs of w * BCE(s_m - s_n, [y_m > y_n]), mean over the requests that have items.

    With r the ranks by s, from 1, D(x) = 1 / ln(x + 1), gain g = y / sum_j D(j) y_(j):
    w = |g_m - g_n| (0.2 u + 0.8 v), without gradient; u = |D(|r_m - r_n|) - D(|r_m - r_n| + 1)| where the ranks differ
    and the smaller is at most ``cutoff``, else 0 (LambdaLoss, Wang et al., CIKM 2018); v = |d_m - d_n| with d = D(r) up
    to ``cutoff``, else 0.
    """
    mask, clean = targets.mask, present(scores, targets.mask)
    labels = torch.where(mask, targets.labels, 0)
    both = pairs(mask)
    with torch.no_grad():
        rank = _ranks(clean, mask).to(clean.dtype)
        # Missing labels last: they are 0 and meet no discount of their own.
        ideal = labels.masked_fill(~mask, torch.iinfo(labels.dtype).min).sort(dim=-1, descending=True).values
        place = torch.arange(1, mask.shape[-1] + 1, device=mask.device).to(clean.dtype)
        in_place = place <= mask.sum(dim=-1, keepdim=True)
        ideal_dcg = (torch.where(in_place, ideal, 0) * _discount(place)).sum(dim=-1, keepdim=True)
        gain = labels / torch.where(ideal_dcg == 0, 1, ideal_dcg)
        distance = (rank.unsqueeze(-1) - rank.unsqueeze(-2)).abs()  # [B, N, N]
        near = (distance > 0) & (torch.minimum(rank.unsqueeze(-1), rank.unsqueeze(-2)) <= cutoff)
        step = (_discount(distance.clamp(min=1)) - _discount(distance.clamp(min=1) + 1)).abs()
        discount = torch.where(rank <= cutoff, _discount(rank), 0)
        weight = 0.2 * torch.where(near, step, 0) + 0.8 * (discount.unsqueeze(-1) - discount.unsqueeze(-2)).abs()
        weight = weight * (gain.unsqueeze(-1) - gain.unsqueeze(-2)).abs()
    per_request = torch.where(both, weight * pairwise_bce(clean, labels), 0).sum(dim=(-1, -2))
    return masked_mean(per_request, mask.any(dim=-1))


def _discount(place: Tensor) -> Tensor:
    """D(x) = 1 / ln(x + 1)."""
    return 1 / (place + 1).log()


def _ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Rank of each item by score, from 1; tied items in order of place; missing items last."""
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) + 1


# ---- sorting ---------------------------------------------------------------------------------------------------------


def sorting_cross_entropy(permutation: Tensor, label_rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over the n * n entries of present rows and items of -log(P + eps) Y; P and Y are [B, N, N]."""
    rows = torch.arange(mask.shape[-1], device=mask.device) < mask.sum(dim=-1, keepdim=True)
    entries = rows.unsqueeze(-1) & mask.unsqueeze(-2)
    return masked_mean(-(permutation + EPSILON).log() * label_rows, entries)
