"""Cascade metrics, vectorised over requests.

Arrays: scores and labels [R, N], mask [R, N] bool (False = missing item, which is as if it were not there), relevant
[R, N] bool (the ground-truth items). Every metric is per request, [R]; NaN where it is not defined.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_REQUESTS_PER_CHUNK, _PAIRS_PER_CHUNK = 1024, 1 << 22  # bound the [R, N, N] pairs of Kendall's tau


def survival(scores: Tensor, alive: Tensor, quota: int) -> Tensor:
    """How much of each item a stage keeps that keeps its ``quota`` best by score: 1, 0, or a share where scores tie.

    Items that tie at the cut share what is left of the quota, each in proportion to what reached the stage of it, as in
    the mean over all orders of the tied items: a constant score gives chance, and neither the items' order in the
    request nor their labels matter.

    ``alive`` [R, N] float64 is how much of each item reaches the stage, 0 for a missing item. Returns [R, N] float64,
    which sums to min(quota, what is alive).
    """
    ordered, order = torch.where(alive > 0, scores, -torch.inf).sort(dim=-1, descending=True)
    weight = alive.gather(-1, order)
    block = _tied_blocks(ordered, weight > 0)
    total = torch.zeros_like(weight).scatter_add(-1, block, weight)  # of each block
    before = (total.cumsum(dim=-1) - total).gather(-1, block)
    total = total.gather(-1, block)
    share = ((quota - before) / torch.where(total > 0, total, 1)).clamp(0, 1)
    return torch.zeros_like(weight).scatter(-1, order, weight * share)


def recall(scores: Tensor, mask: Tensor, relevant: Tensor, quota: int) -> Tensor:
    """Recall@K@quota of one stage over all items present: the share of the K ground-truth items it keeps. [R]."""
    return joint_recall([scores], mask, relevant, [quota])


def joint_recall(scores: Sequence[Tensor], mask: Tensor, relevant: Tensor, quotas: Sequence[int]) -> Tensor:
    """Recall of the whole cascade, [R]: the share of the K ground-truth items that survive every stage, where each
    keeps its best ``quotas[i]`` of what the stages before it kept, by its ``scores[i]`` [R, N], in serving order."""
    return cascade_survival(scores, mask, relevant, quotas)[-1]


def cascade_survival(scores: Sequence[Tensor], mask: Tensor, relevant: Tensor, quotas: Sequence[int]) -> list[Tensor]:
    """The share of the ground-truth items that is left after each stage: one [R] per stage, arguments as in
    :func:`joint_recall`, which is the last of them."""
    relevant = relevant & mask
    alive, left = mask.double(), []
    for stage_scores, quota in zip(scores, quotas, strict=True):
        alive = survival(stage_scores, alive, quota)
        left.append((alive * relevant).sum(dim=-1) / relevant.sum(dim=-1))
    return left


def ndcg(scores: Tensor, labels: Tensor, mask: Tensor, k: int) -> Tensor:
    """NDCG@k with linear gain: DCG = sum over ranks r <= k of label / log2(r + 1), divided by the ideal DCG. [R].

    Tied scores share the mean gain of their ranks (McSherry and Najork, ECIR 2008; scikit-learn's ndcg_score).
    A request whose ideal DCG is 0 gets 0; one without items is not defined (NaN).
    """
    num_items = scores.shape[-1]
    gains = torch.where(mask, labels, 0).double()
    discount = 1 / torch.log2(torch.arange(2, num_items + 2, device=scores.device, dtype=torch.float64))
    discount[k:] = 0
    ordered, order = torch.where(mask, scores, -torch.inf).sort(dim=-1, descending=True)
    block = _tied_blocks(ordered, mask.gather(-1, order))  # missing items, last, have no gain
    zeros = torch.zeros_like(gains)
    sizes = zeros.scatter_add(-1, block, torch.ones_like(gains))
    mean_gain = zeros.scatter_add(-1, block, gains.gather(-1, order)) / sizes.clamp(min=1)
    dcg = (mean_gain.gather(-1, block) * discount).sum(dim=-1)
    lowest_last = torch.where(mask, labels.double(), -torch.inf).sort(dim=-1, descending=True).values
    ideal = (torch.where(lowest_last.isfinite(), lowest_last, 0) * discount).sum(dim=-1)
    value = torch.where(ideal == 0, 0, dcg / torch.where(ideal == 0, 1, ideal))
    return value.masked_fill(~mask.any(dim=-1), torch.nan)


def kendall_tau(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Kendall's tau-b of scores and labels: (C - D) / sqrt((pairs untied in scores) (pairs untied in labels)). [R].

    NaN where all scores, or all labels, of a request are equal.
    """
    parts, most = [], min(_REQUESTS_PER_CHUNK, max(1, _PAIRS_PER_CHUNK // max(scores.shape[-1], 1) ** 2))
    for first in range(0, len(scores), most):
        chunk = slice(first, first + most)
        present = mask[chunk].float()
        by_score, by_label = (_signs(values[chunk], mask[chunk]) for values in (scores, labels))
        agreement = _sum_of_pairs(by_score * by_label, present)
        untied = _sum_of_pairs(by_score.abs_(), present) * _sum_of_pairs(by_label.abs_(), present)
        parts.append(agreement / untied.sqrt())  # each unordered pair counts twice in all three sums
    return torch.cat(parts) if parts else scores.new_zeros(0, dtype=torch.float64)


def cascade_metrics(
    scores: Mapping[str, Tensor],
    labels: Tensor,
    mask: Tensor,
    relevant: Tensor,
    quotas: Mapping[str, int],
    num_relevant: int,
) -> dict[str, Tensor]:
    """All metrics of a cascade per request, under the names of the paper's tables.

    ``scores``: stage -> [R, N], in serving order; ``quotas``: stage -> items it keeps; ``num_relevant``: the K in the
    names and the cut of NDCG. Returns ``joint_recall@K@q``, and per stage ``<stage>_recall@K@q``, ``<stage>_ndcg@K``,
    ``<stage>_kendall_tau``, and ``survival_after_<stage>``: the share of the ground truth left after it; [R] each.
    """
    left = cascade_survival([scores[stage] for stage in quotas], mask, relevant, list(quotas.values()))
    metrics = {f"joint_recall@{num_relevant}@{list(quotas.values())[-1]}": left[-1]}
    for stage, quota in quotas.items():
        metrics[f"{stage}_recall@{num_relevant}@{quota}"] = recall(scores[stage], mask, relevant, quota)
        metrics[f"{stage}_ndcg@{num_relevant}"] = ndcg(scores[stage], labels, mask, num_relevant)
        metrics[f"{stage}_kendall_tau"] = kendall_tau(scores[stage], labels, mask)
    return metrics | {f"survival_after_{stage}": share for stage, share in zip(quotas, left, strict=True)}


def _tied_blocks(ordered: Tensor, present: Tensor) -> Tensor:
    """Number of the block of equal scores that each rank belongs to, from 0; a missing item is a block of its own.

    Both arguments are [R, N] in descending order of score."""
    starts = torch.ones_like(present)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | ~present[:, 1:]
    return starts.long().cumsum(dim=-1) - 1


def _signs(values: Tensor, mask: Tensor) -> Tensor:
    """sign(v_m - v_n) for all pairs, [R, N, N] float32; anything for a missing item."""
    known = torch.where(mask, values, 0)
    if not known.is_floating_point():
        known = known.double()
    return (known.unsqueeze(-1) - known.unsqueeze(-2)).sgn_().float()  # a difference is 0 of equal numbers alone


def _sum_of_pairs(pairs: Tensor, present: Tensor) -> Tensor:
    """Sum over the pairs of two present items, [R] float64: exact, as the numbers are small and whole."""
    return ((pairs @ present.unsqueeze(-1)).squeeze(-1) * present).double().sum(dim=-1)
