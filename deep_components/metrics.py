"""Cascade metrics, vectorised over requests.

Arrays: scores and labels [R, N], mask [R, N] bool (False = missing item, which is as if it were not there), relevant
[R, N] bool (the ground-truth items). Every metric is per request, [R]; NaN where it is not defined. What has another
type or shape is a TypeError or ValueError, and so is a score that is NaN; scores may be infinite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_ITEMS, EXACT_OUTCOMES = 64, 4096  # of a request, up to which ties at several stages' cuts are followed exactly

_REQUESTS_PER_CHUNK, _PAIRS_PER_CHUNK = 1024, 1 << 22  # bound the pairs of Kendall's tau that exist at a time
_TIED_REQUESTS_PER_CHUNK = 128


def survival(scores: Tensor, alive: Tensor, quota: int) -> Tensor:
    """How much of each item a stage keeps that keeps its ``quota`` best by score: 1, 0, or a share where scores tie.

    Items that tie at the cut share what is left of the quota, each in proportion to what reached the stage of it. Where
    items are alive wholly or not at all, this is the mean over all orders of the tied: a constant score gives chance,
    and neither the items' order in the request nor their labels matter.

    ``alive`` [R, N] float64 is how much of each item reaches the stage, 0 for a missing item. Returns [R, N] float64,
    which sums to min(quota, what is alive).
    """
    ordered, order = _descending(scores, alive > 0)
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
    _check(mask, quotas, relevant=relevant, **{f"scores[{stage}]": values for stage, values in enumerate(scores)})
    return _shares_left(survival_by_stage(scores, mask, quotas), (relevant & mask).double())


def _shares_left(left: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Of the ground truth, which counts by ``weight`` [R, N], what is ``left`` of it. [R] each."""
    return [(alive * weight).sum(dim=-1) / weight.sum(dim=-1) for alive in left]


def survival_by_stage(scores: Sequence[Tensor], mask: Tensor, quotas: Sequence[int]) -> list[Tensor]:
    """The probability of each item to be left after each stage: one [R, N] float64 per stage, in serving order.

    Where scores tie at a cut, each stage draws by lot, independently of the others, which of the tied it keeps; without
    ties the probabilities are 0 and 1. They are exact, the mean over all draws, where no stage but the last has ties at
    its cut, and else in requests of up to ``EXACT_ITEMS`` items whose draws have up to ``EXACT_OUTCOMES`` outcomes that
    matter later; in others each stage divides its quota in proportion (:func:`survival`).
    """
    alive, left = mask.double(), list[Tensor]()
    for stage_scores, quota in zip(scores, quotas, strict=True):
        alive = survival(stage_scores, alive, quota)
        left.append(alive)
    undecided = torch.zeros_like(mask)  # by a stage whose choice others find
    for alive in left[:-1]:
        undecided |= (alive > 0) & (alive < 1)
    drawn = undecided.any(dim=-1) & (mask.sum(dim=-1) <= EXACT_ITEMS)
    if not drawn.any():
        return left
    for rows in drawn.nonzero().squeeze(-1).split(_TIED_REQUESTS_PER_CHUNK):
        exact, known = _exact_survival([s[rows] for s in scores], mask[rows], quotas)
        for alive, values in zip(left[1:], exact[1:], strict=True):
            alive[rows[known]] = values[known]
    return left


def ndcg(scores: Tensor, labels: Tensor, mask: Tensor, k: int) -> Tensor:
    """NDCG@k with linear gain: DCG = sum over ranks r <= k of label / log2(r + 1), divided by the ideal DCG. [R].

    Tied scores share the mean gain of their ranks (McSherry and Najork, ECIR 2008; scikit-learn's ndcg_score).
    A request whose ideal DCG is 0 gets 0; one without items is not defined (NaN). ValueError for a negative label,
    with which the worst order can have the largest value.
    """
    _check(mask, [k], scores=scores, labels=labels)
    if (mask & (labels < 0)).any():
        raise ValueError(f"labels are gains, 0 or more, and hold {labels[mask].min()}; add a constant to all of them")
    num_items = scores.shape[-1]
    gains = torch.where(mask, labels, 0).double()
    discount = 1 / torch.log2(torch.arange(2, num_items + 2, device=scores.device, dtype=torch.float64))
    discount[k:] = 0
    ordered, order = _descending(scores, mask)
    block = _tied_blocks(ordered, mask.gather(-1, order))  # missing items, last, have no gain
    zeros = torch.zeros_like(gains)
    sizes = zeros.scatter_add(-1, block, torch.ones_like(gains))
    mean_gain = zeros.scatter_add(-1, block, gains.gather(-1, order)) / sizes.clamp(min=1)
    dcg = (mean_gain.gather(-1, block) * discount).sum(dim=-1)
    ideal = (gains.sort(dim=-1, descending=True).values * discount).sum(dim=-1)
    value = torch.where(ideal == 0, 0, dcg / torch.where(ideal == 0, 1, ideal))
    return value.masked_fill(~mask.any(dim=-1), torch.nan)


def kendall_tau(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Kendall's tau-b of scores and labels: (C - D) / sqrt((pairs untied in scores) (pairs untied in labels)). [R].

    NaN where all scores, or all labels, of a request are equal.
    """
    _check(mask, scores=scores, labels=labels)
    by_score, by_label = (_ranks(values, mask) for values in (scores, labels))
    agreement, items = list[Tensor](), max(scores.shape[-1], 1)
    most, rows = min(_REQUESTS_PER_CHUNK, max(1, _PAIRS_PER_CHUNK // items**2)), max(1, _PAIRS_PER_CHUNK // items)
    for first in range(0, len(scores), most):
        ranks = by_score[first : first + most].float(), by_label[first : first + most].float()
        present = mask[first : first + most].float()
        parts = [_agreement(*ranks, present, slice(row, row + rows)) for row in range(0, items, rows)]
        agreement.append(torch.stack(parts).sum(dim=0))
    if not agreement:
        return scores.new_zeros(0, dtype=torch.float64)
    # Each unordered pair counts twice in all three.
    return torch.cat(agreement) / (_untied(by_score, mask) * _untied(by_label, mask)).sqrt()


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
    names and the cut of NDCG. Of the ground truth the K best by label count; those that tie there count in part, so
    that recalls are the mean over their orders. Returns ``joint_recall@K@q``, and per stage ``<stage>_recall@K@q``,
    ``<stage>_ndcg@K``, ``<stage>_kendall_tau``, and ``survival_after_<stage>``: the share of these K left after it; [R]
    each.
    """
    if missing := [stage for stage in quotas if stage not in scores]:
        raise ValueError(f"scores lacks stage {missing[0]!r} of quotas")
    keeps = list(quotas.values())
    stages = {f"scores[{stage}]": scores[stage] for stage in quotas}
    _check(mask, [*keeps, num_relevant], relevant=relevant, labels=labels, **stages)
    counted = survival(labels.double(), (relevant & mask).double(), num_relevant)
    left = _shares_left(survival_by_stage([scores[stage] for stage in quotas], mask, keeps), counted)
    metrics = {f"joint_recall@{num_relevant}@{list(quotas.values())[-1]}": left[-1]}
    for stage, quota in quotas.items():
        (alone,) = _shares_left(survival_by_stage([scores[stage]], mask, [quota]), counted)
        metrics[f"{stage}_recall@{num_relevant}@{quota}"] = alone
        metrics[f"{stage}_ndcg@{num_relevant}"] = ndcg(scores[stage], labels, mask, num_relevant)
        metrics[f"{stage}_kendall_tau"] = kendall_tau(scores[stage], labels, mask)
    return metrics | {f"survival_after_{stage}": share for stage, share in zip(quotas, left, strict=True)}


def _check(mask: Tensor, cuts: Sequence[int] = (), **arrays: Tensor) -> None:
    """TypeError or ValueError, in one sentence, unless the mask and the arrays are tensors [R, N] that fit, scores are
    floats of which none of an item that is there is NaN, and the cuts are whole numbers above 0."""
    for cut in cuts:
        if isinstance(cut, bool) or not isinstance(cut, int) or cut < 1:
            raise ValueError(f"a cut is {cut!r}, not a whole number above 0")
    for name, values in {"mask": mask, **arrays}.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}, not a tensor [R, N]")
        if name in ("mask", "relevant") and values.dtype != torch.bool:
            raise TypeError(f"{name} holds {values.dtype}, not bool")
        if name.startswith("scores") and not values.is_floating_point():
            raise TypeError(f"{name} holds {values.dtype}, not a floating type")
        if values.dim() != 2 or values.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, not [R, N] = {tuple(mask.shape)}")
        if (values.isnan() & mask).any():
            raise ValueError(f"{name} holds NaN where mask is True")


def _descending(scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Scores sorted from the best, and the items in this order; missing ones last, after those with -inf too."""
    ordered, order = torch.where(present, scores, -torch.inf).sort(dim=-1, descending=True)
    if (present & (scores == -torch.inf)).any():
        last = present.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
        ordered, order = ordered.gather(-1, last), order.gather(-1, last)
    return ordered, order


def _tied_blocks(ordered: Tensor, present: Tensor) -> Tensor:
    """Number of the block of equal scores that each rank belongs to, from 0; a missing item is a block of its own.

    Both arguments are [R, N] in descending order of score."""
    starts = torch.ones_like(present)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | ~present[:, 1:]
    return starts.long().cumsum(dim=-1) - 1


def _ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Dense ranks from 0, in ascending order: equal values have the same; anything for a missing item. [R, N] int64."""
    ordered, order = torch.where(mask, values, 0).sort(dim=-1)
    steps = torch.zeros_like(order)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(order).scatter_(-1, order, steps.cumsum(dim=-1))


def _untied(ranks: Tensor, mask: Tensor) -> Tensor:
    """Number of ordered pairs of present items whose ranks differ. [R] float64."""
    tied = torch.zeros(ranks.shape, dtype=torch.float64, device=ranks.device).scatter_add_(-1, ranks, mask.double())
    return mask.sum(dim=-1).double().square() - tied.square().sum(dim=-1)


def _agreement(by_score: Tensor, by_label: Tensor, present: Tensor, rows: slice) -> Tensor:
    """Of the pairs of an item m in ``rows`` with any item n, both present: how many more scores and labels order alike
    than differently. [R] float64, exact: ranks in float32, and all sums, are whole numbers."""
    pairs, other = (
        (ranks[:, rows].unsqueeze(-1) - ranks.unsqueeze(-2)).clamp_(-1, 1) for ranks in (by_score, by_label)
    )
    sums = (pairs.mul_(other) @ present.unsqueeze(-1)).squeeze(-1) * present[:, rows]
    return sums.double().sum(dim=-1)


# ---- ties at the cuts of several stages ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """What may be left of requests, an outcome a row: with probability ``weight`` [M], these are ``drawn[k]`` [M, K]
    items of each part k, drawn by lot and independently of the other parts.

    ``request`` [M] is the outcome's request, ``part`` [M, N] the part that each of its items belongs to. ``too_many``
    [R] is set for requests that have more than EXACT_OUTCOMES, and whose outcomes are incomplete.
    """

    request: Tensor
    weight: Tensor
    part: Tensor
    drawn: Tensor
    too_many: Tensor

    def take(self, rows: Tensor) -> "_Draws":
        return _Draws(self.request[rows], self.weight[rows], self.part[rows], self.drawn[rows], self.too_many)

    def count(self, items: Tensor) -> Tensor:
        """How many of ``items`` [M, N] bool each part has. [M, K]."""
        return torch.zeros_like(self.drawn).scatter_add(-1, self.part, items.long())

    def bounds(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most of ``items`` that can be among those drawn of each part. [M, K] each."""
        return (self.drawn - self.count(~items)).clamp(min=0), self.drawn.minimum(self.count(items))


def _exact_survival(scores: Sequence[Tensor], mask: Tensor, quotas: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """:func:`survival_by_stage`, from all that the draws of the stages before can have left; and whether it is known,
    [R] bool: not where there are too many outcomes."""
    present = mask.sum(dim=-1, keepdim=True)
    draws = _Draws(
        request=torch.arange(len(mask), device=mask.device),
        weight=torch.ones(len(mask), dtype=torch.float64, device=mask.device),
        part=mask.long(),
        drawn=torch.cat([torch.zeros_like(present), present], dim=-1),
        too_many=torch.zeros_like(present.squeeze(-1), dtype=torch.bool),
    )
    left = []
    for stage_scores, quota in zip(scores, quotas, strict=True):
        ordered, order = _descending(stage_scores, mask)
        level = torch.zeros_like(order).scatter(-1, order, _tied_blocks(ordered, mask.gather(-1, order)))
        draws = _cut(draws, level, quota)
        share = draws.drawn.double() / draws.count(draws.part >= 0).clamp(min=1)
        probability = draws.weight.unsqueeze(-1) * share.gather(-1, draws.part)
        left.append(torch.zeros_like(mask, dtype=torch.float64).index_add(0, draws.request, probability).clamp(max=1))
    return left, ~draws.too_many


def _cut(draws: _Draws, level: Tensor, quota: int) -> _Draws:
    """What is left after a stage that keeps its ``quota`` best. ``level`` [R, N] is 0 for its best items, and common to
    tied ones. Outcomes tell at which level the stage cuts, and of each part how many are above, and kept at it."""
    cuts = draws.drawn.sum(dim=-1) > quota
    outcomes, draws = [draws.take(~cuts)], draws.take(cuts)
    levels = level[draws.request]
    for number in range(int(level.max()) + 1):
        fewest, most = draws.bounds(levels < number)[0], draws.bounds(levels <= number)[1]
        here = draws.take((fewest.sum(dim=-1) < quota) & (most.sum(dim=-1) >= quota))
        here = _split(here, level[here.request] <= number, quota, level.shape[1])
        here.drawn[:, here.drawn.shape[1] // 2 :] = 0  # below the cut
        here = _split(here, level[here.request] < number, 0, quota - 1)
        outcomes.append(_merged(_drop(here, quota)))
    parts = max(rows.drawn.shape[1] for rows in outcomes)
    drawn = [torch.nn.functional.pad(rows.drawn, (0, parts - rows.drawn.shape[1])) for rows in outcomes]
    request, weight, part = (
        torch.cat([getattr(rows, name) for rows in outcomes]) for name in ("request", "weight", "part")
    )
    draws = _Draws(request, weight, part, torch.cat(drawn), draws.too_many)
    return draws.take(_followed(draws, torch.ones_like(weight)))


def _split(draws: _Draws, inside: Tensor, least: int, most: int) -> _Draws:
    """Part k in two: k has what is ``inside`` [M, N], K + k the others, with ``least`` to ``most`` drawn inside."""
    low, high = draws.bounds(inside)
    rows, x = _vectors(draws, low, high, torch.full_like(draws.request, least), torch.full_like(draws.request, most))
    within, without, parts = draws.count(inside)[rows], draws.count(~inside)[rows], draws.drawn.shape[1]
    draws, inside = draws.take(rows), inside[rows]
    chance = _log_choose(within, x) + _log_choose(without, draws.drawn - x) - _log_choose(within + without, draws.drawn)
    part, drawn = torch.where(inside, draws.part, draws.part + parts), torch.cat([x, draws.drawn - x], dim=-1)
    return _Draws(draws.request, draws.weight * chance.sum(dim=-1).exp(), part, drawn, draws.too_many)


def _drop(draws: _Draws, quota: int) -> _Draws:
    """Those drawn of the second half of the parts reduced by lot to what the first half leaves of the quota."""
    above, at = draws.drawn.chunk(2, dim=-1)
    room = quota - above.sum(dim=-1)
    rows, kept = _vectors(draws, torch.zeros_like(at), at, room, room)
    above, at, room, draws = above[rows], at[rows], room[rows], draws.take(rows)
    chance = _log_choose(at, kept).sum(dim=-1) - _log_choose(at.sum(dim=-1), room)
    kept = torch.cat([above, kept], dim=-1)
    return _Draws(draws.request, draws.weight * chance.exp(), draws.part, kept, draws.too_many)


def _merged(draws: _Draws) -> _Draws:
    """All items that are gone in part 0, all that are left for certain in part 1, and no part without items."""
    drawn, size = draws.drawn, draws.count(draws.part >= 0)
    by_lot = (drawn > 0) & (drawn < size)
    number = torch.where(by_lot, 1 + by_lot.cumsum(dim=-1), (drawn > 0).long())
    parts = 2 + (int(by_lot.sum(dim=-1).max()) if len(by_lot) else 0)
    merged = drawn.new_zeros(len(drawn), parts).scatter_add(-1, number, drawn)
    return _Draws(draws.request, draws.weight, number.gather(-1, draws.part), merged, draws.too_many)


def _followed(draws: _Draws, outcomes: Tensor) -> Tensor:
    """Which rows are of requests without too many outcomes, each row being about to have so many. [M] bool."""
    total = torch.zeros_like(draws.too_many, dtype=torch.float64).index_add(0, draws.request, outcomes)
    draws.too_many.logical_or_(total > EXACT_OUTCOMES)
    return ~draws.too_many[draws.request]


def _vectors(draws: _Draws, low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """All whole vectors x from ``low`` to ``high`` [M, K] whose sum is ``least`` to ``most`` [M]: (row of each, x), for
    those rows of ``draws`` that are followed."""
    rows = _followed(draws, (high - low + 1).double().prod(dim=-1)).nonzero().squeeze(-1)
    x = low[rows]
    for column, options in enumerate((high - low + 1).unbind(dim=-1)):
        choices = options[rows]
        index = torch.arange(len(rows), device=low.device).repeat_interleave(choices)
        first = choices.cumsum(dim=0) - choices
        rows, x = rows[index], x[index]
        x[:, column] += torch.arange(len(index), device=low.device) - first[index]
    total = x.sum(dim=-1)
    fitting = (total >= least[rows]) & (total <= most[rows])
    return rows[fitting], x[fitting]


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the number of ways to choose k of n, float64."""
    n, k = n.double(), k.double()
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
