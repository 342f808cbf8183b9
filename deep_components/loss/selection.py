"""Selection: differentiable sorting and top-k operators, what the labels say, and cross-entropies between the two.

A loss that needs the share of each item among the first k asks for a :class:`Selection` (``SELECTION_OPERATORS``); one
that needs the order asks for a relaxed permutation (``PERMUTATION_OPERATORS``): matrices [B, N, N] whose row j is a
distribution over which item is j-th. Missing items (mask False) are as if removed: with n items present the rows 1..n
of a permutation describe the order of these n; rows beyond n and columns of missing items are zero.

The operators that select without sorting are p = F((s - b) / t) for an F that rises from 0 to 1, and differ in F and in
the threshold b. They need memory for O(N) numbers, and so do their gradients.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deep_components.loss.functional import Targets, batch_totals, in_blocks, without_missing

EPSILON = 1e-6


class Selection:
    """How much of each item is among the first k, ``top``, and how much is not, ``rest``. [B, N] each.

    Args:
        top, rest: the tensors, or functions of no argument that compute them when they are first asked for.
        exact_logs: gives log top and log rest where the operator knows them without a rounded top or rest in between;
            -inf where a share is 0 because its request has no cut.
    """

    def __init__(
        self,
        top: Tensor | Callable[[], Tensor],
        rest: Tensor | Callable[[], Tensor],
        exact_logs: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._top, self._rest, self.exact_logs = top, rest, exact_logs

    # Not functools.cached_property, whose lock torch.compile does not enter.
    @property
    def top(self) -> Tensor:
        if not isinstance(self._top, Tensor):
            self._top = self._top()
        return self._top

    @property
    def rest(self) -> Tensor:
        if not isinstance(self._rest, Tensor):
            self._rest = self._rest()
        return self._rest

    def logs(self) -> tuple[Tensor, Tensor]:
        """log top and log rest; of top + eps and rest + eps where the exact ones are not known. log eps for log 0."""
        if self.exact_logs is None:
            return (self.top + EPSILON).log(), (self.rest + EPSILON).log()
        log_top, log_rest = self.exact_logs()
        return _finite(log_top), _finite(log_rest)


def _finite(log: Tensor) -> Tensor:
    """With log eps, without gradient, for log 0."""
    return log.masked_fill(log == -torch.inf, math.log(EPSILON))


PermutationOperator = Callable[[Tensor, Tensor, float], Tensor]
SelectionOperator = Callable[[Tensor, Tensor, Tensor, float], Selection]


# ---- operators -------------------------------------------------------------------------------------------------------


def neural_sort(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """NeuralSort (Grover et al., ICLR 2019): P[j,:] = softmax(((n+1-2j) s - A) / t), A[a] = sum_b |s_a - s_b|.

    Args:
        scores: [B, N].
        mask: [B, N] bool.
        temperature: t, in the scores' unit; P tends to the permutation matrix as t tends to 0.

    Returns:
        [B, N, N].
    """
    logits = _NeuralSortLogits.apply(without_missing(scores, mask) / temperature, mask)
    return _without_later_rows(logits.softmax(dim=-1), mask)


class _NeuralSortLogits(torch.autograd.Function):
    """(n+1-2j) s_a - A[a] of :func:`neural_sort` at t = 1, [B, N, N]: one pass over its numbers, and one in the
    backward pass.

    A[a] takes no pairs of items but a sort: it is the sum of the gaps between neighbours in ascending order, each times
    the number of items on its other side from a. Of A[b], of all items b, the gradient with respect to s_a is the sign
    of s_a - s_b, 0 for ties; of A[a] it is the sum of these.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        count, position = mask.sum(dim=-1, keepdim=True), torch.arange(1, scores.shape[-1] + 1, device=scores.device)
        ordered, order = scores.masked_fill(~mask, torch.inf).sort(dim=-1)
        below = position[:-1]  # of each gap; those beyond the last present item are none
        gap = torch.where(below < count, ordered.diff(dim=-1), 0)
        to_lower = F.pad((below * gap).cumsum(dim=-1), (1, 0))
        to_higher = F.pad(((count - below) * gap).flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
        distance = torch.empty_like(scores).scatter_(-1, order, to_lower + to_higher)
        # A missing item has hopeless logits; finite ones, so that a row without items gives no NaN.
        distance = torch.where(mask, distance, torch.finfo(scores.dtype).max / 2)
        scaling = (count + 1 - 2 * position).to(scores.dtype)
        ctx.save_for_backward(scores, mask, count, ordered, order, scaling)
        return torch.addcmul(-distance.unsqueeze(-2), scaling.unsqueeze(-1), scores.unsqueeze(-2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scores, mask, count, ordered, order, scaling = ctx.saved_tensors
        to_scores, to_distance = (torch.stack([scaling, -torch.ones_like(scaling)], dim=-2) @ gradient).unbind(dim=-2)
        to_distance = torch.where(mask, to_distance, 0)
        sums = F.pad(to_distance.gather(-1, order).cumsum(dim=-1), (1, 0))  # of the 0, 1, ... N lowest
        below, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))  # ties: neither
        others = sums.gather(-1, below) + sums.gather(-1, up_to) - sums[:, -1:]
        return torch.where(mask, to_scores + to_distance * (below + up_to - count) + others, 0), None


def soft_sort(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """SoftSort (Prillo and Eisenschlos, ICML 2020): P[j,:] = softmax(-|s_(j) - s| / t), s_(j) the j-th largest.

    Arguments and result as in :func:`neural_sort`.
    """
    # Missing items sort last, and nothing is near them; finite, so that a row without items gives no NaN.
    scores = torch.where(mask, scores, torch.finfo(scores.dtype).min / 2)
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    distance = (scores.gather(-1, order).unsqueeze(-1) - scores.unsqueeze(-2)).abs()  # [B, N, N]
    return _without_later_rows((distance * (-1 / temperature)).softmax(dim=-1), mask)


def _rows(mask: Tensor) -> Tensor:
    """Which rows of a permutation there are: the first n. [B, N] bool."""
    return torch.arange(mask.shape[-1], device=mask.device) < mask.sum(dim=-1, keepdim=True)


def _without_later_rows(permutation: Tensor, mask: Tensor) -> Tensor:
    """With rows n + 1 .. N, of the items that are missing, set to 0."""
    if mask.device.type == "cpu" and _complete(mask):  # a GPU is not waited for
        return permutation
    return permutation * _rows(mask).to(permutation.dtype).unsqueeze(-1)


def _complete(mask: Tensor) -> bool:
    if torch.compiler.is_compiling():  # no values are known there
        return False
    return not mask.numel() or bool(mask.amin())  # all() is many times slower on a CPU


def split(permutation: Tensor, k: Tensor) -> Selection:
    """top_k(P) = (rows 1..k summed) / (stopgrad(all rows summed) + eps), rest_k(P) = (the later rows) / the same.

    Args:
        permutation: P, relaxed permutation matrices [B, N, N].
        k: [B] int64.
    """
    rows = torch.arange(permutation.shape[-2], device=permutation.device)
    in_top = (rows < k.unsqueeze(-1)).to(permutation.dtype)
    top, rest = (torch.stack([in_top, 1 - in_top], dim=-2) @ permutation).unbind(dim=-2)  # one pass over P
    total = (top + rest).detach() + EPSILON
    return Selection(top / total, rest / total)


def _by_sorting(operator: PermutationOperator) -> SelectionOperator:
    def selection(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
        return _select_by_sorting(operator, scores, mask, (k,), temperature)[0]

    return selection


def _select_by_sorting(
    operator: PermutationOperator, scores: Tensor, mask: Tensor, cuts: Sequence[Tensor], temperature: float
) -> tuple[Selection, ...]:
    """The Selection at each of the cuts k [B], from one permutation."""

    def shares(scores: Tensor, mask: Tensor, cuts: Tensor) -> tuple[Tensor, ...]:
        permutation = operator(scores, mask, temperature)
        chosen = [split(permutation, k) for k in cuts.unbind(dim=-1)]
        return tuple(part for one in chosen for part in (one.top, one.rest))

    parts = in_blocks(shares, scores, mask, torch.stack(tuple(cuts), dim=-1))
    return tuple(Selection(top, rest) for top, rest in zip(parts[::2], parts[1::2], strict=True))


# ---- operators that do not sort --------------------------------------------------------------------------------------


def dftopk(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
    """DFTopK (Zhu et al., arXiv 2510.11472): p = sigmoid((s - b) / t), b = (s_(k) + s_(k+1)) / 2.

    The gradient goes through b too, half to each of the two items. sum p is about k.

    Args:
        scores: [B, N].
        mask: [B, N] bool.
        k: [B] int64. Where n <= k every present item is selected, where k = 0 none, both without gradient.
        temperature: t, in the scores' unit; p tends to the k best as t tends to 0.
    """
    cut = _Cut(scores, mask, k)
    share = None
    if cut.tied:  # which of equal scores is the k-th says nothing: they take equal parts
        equal = [(scores.detach() == score) & mask for score in cut.scores.split(1, dim=-1)]
        parts = ((items.sum(dim=-1, keepdim=True), items.to(scores.dtype)) for items in equal)
        share = sum(items / (2 * number.clamp(min=1)) for number, items in parts)
    return _thresholded(_LOGISTIC, cut, _Margin.apply(scores, None, share, cut, temperature))


def lapsum(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
    """LapSum (Struski et al., ICML 2025): p = F((s - b) / t), F(x) = exp(x) / 2 up to 0, 1 - exp(-x) / 2 above; b such
    that sum p = k. Arguments as in :func:`dftopk`."""
    return _with_fixed_sum(_LAPLACE, scores, _Cut(scores, mask, k), temperature)


def lml(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
    """Limited multi-label projection (Amos, Koltun and Kolter, 2019): p = sigmoid((s - b) / t), b such that sum p = k.
    Arguments as in :func:`dftopk`."""
    return _with_fixed_sum(_LOGISTIC, scores, _Cut(scores, mask, k), temperature)


def sparse_topk(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
    """Sparse top-k (Sander et al., ICML 2023, p = 2): p = clip(s / t - b, 0, 1), b such that sum p = k; the Euclidean
    projection of s / t on {0 <= p <= 1, sum p = k}. Arguments as in :func:`dftopk`."""
    cut = _Cut(scores, mask, k)
    x = cut.centred(scores, temperature)
    b = _sparse_shift(x, cut)
    inside = _inside(x - b).to(scores.dtype)
    share = inside / inside.sum(dim=-1, keepdim=True).clamp(min=1)
    margin = _Margin.apply(scores, b, share, cut, temperature)
    return Selection(lambda: _clipped(margin), lambda: cut.without_missing(_clipped(1 - margin)))


def _inside(margin: Tensor) -> Tensor:
    return (margin > 0) & (margin < 1)


def _clipped(margin: Tensor) -> Tensor:
    """clip(margin, 0, 1); clamp's gradient is 1 on the bounds too, where items lie whose share does not move."""
    return torch.where(_inside(margin), margin, (margin > 0).to(margin.dtype))


class _Cut:
    """Where requests of scores [B, N], of which ``mask`` are present, are cut: between their k-th and next best item.

    A request with n <= k, or k = 0, has no cut: all its items are selected, or none.

    Attributes, without gradient: ``is_cut`` [B, 1] bool; ``k`` [B, 1], 1 where there is no cut; ``neighbours`` [B, 2],
    the indices of the two items; ``scores`` [B, 2], theirs, and ``threshold`` [B, 1], the mean of these, 0 where there
    is no cut; ``tied``: whether other items may have the same scores.
    """

    def __init__(self, scores: Tensor, mask: Tensor, k: Tensor) -> None:
        # Most batches are complete and cut everywhere; a pass over [B, N] costs as much as finding the k best.
        self.complete = _complete(mask)
        k = k.unsqueeze(-1)
        count = mask.shape[-1] if self.complete else mask.sum(dim=-1, keepdim=True)
        self.mask, self.is_cut, self.all_in = mask, (k > 0) & (k < count), k >= count
        compiling = torch.compiler.is_compiling()
        self.everywhere = not compiling and bool(self.is_cut.all())
        self.k = k if self.everywhere else torch.where(self.is_cut, k, 1)
        if compiling:
            least, most = 1, scores.shape[-1]
        else:
            least, most = map(int, torch.aminmax(self.k)) if self.k.numel() else (1, 1)
        width = min(most + 2, scores.shape[-1])
        present = scores.detach() if self.complete else scores.detach().masked_fill(~mask, -torch.inf)
        best = present.topk(width, dim=-1)
        if self.everywhere and least == most:  # the same columns in all requests: views
            around, neighbours = best.values[:, max(most - 2, 0) : most + 2], slice(most - 1, most + 1)
            same = around[:, 1:] == around[:, :-1]
            self.neighbours, self.scores = best.indices[:, neighbours], best.values[:, neighbours]
        else:
            # The (k-1)-th to (k+2)-th best; beyond an end the last one stands again, and is no other item.
            index = (self.k + torch.arange(-2, 2, device=k.device)).clamp_(0, width - 1)
            around = best.values.gather(-1, index)
            same = (around[:, 1:] == around[:, :-1]) & (index[:, 1:] != index[:, :-1]) & self.is_cut
            self.neighbours = best.indices.gather(-1, index[:, 1:3])
            self.scores = around[:, 1:3] if self.everywhere else torch.where(self.is_cut, around[:, 1:3], 0)
        self.tied = compiling or bool(same.any())
        self.threshold = self.scores.mean(dim=-1, keepdim=True)

    def centred(self, scores: Tensor, temperature: float) -> Tensor:
        """(s - threshold) / t without gradient, -inf for missing items."""
        centred = (scores.detach() - self.threshold) / temperature
        return centred if self.complete else centred.masked_fill_(~self.mask, -torch.inf)

    def without_missing(self, values: Tensor, constant: float = 0.0) -> Tensor:
        return values if self.complete else values.masked_fill(~self.mask, constant)


class _Margin(torch.autograd.Function):
    """(s - threshold) / t - b; the gradient of threshold / t + b is ``share`` [B, N] / t, with None a half of 1 / t at
    each of the cut's neighbours. -inf for missing items, and +-inf for requests without a cut."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, b: Tensor | None, share: Tensor | None, cut: _Cut, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(share)
        ctx.cut, ctx.temperature = cut, temperature
        margin = (scores - cut.threshold).div_(temperature)
        if b is not None:  # apart from the threshold: their sum would be rounded where scores are large
            margin.sub_(b)
        if not cut.everywhere:
            margin = torch.where(cut.is_cut, margin, torch.where(cut.all_in, torch.inf, -torch.inf).to(margin.dtype))
        return margin if cut.complete else margin.masked_fill_(~cut.mask, -torch.inf)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (share,) = ctx.saved_tensors
        if not (ctx.cut.complete and ctx.cut.everywhere):
            gradient = gradient.masked_fill(~(ctx.cut.mask & ctx.cut.is_cut), 0)
        total, neighbours = gradient.sum(dim=-1, keepdim=True), ctx.cut.neighbours
        if share is None:
            gradient = gradient / ctx.temperature
            of_both = gradient.gather(-1, neighbours) - total / (2 * ctx.temperature)
            gradient.scatter_(-1, neighbours, of_both)  # two items, but where there is no cut: there both values are 0
        else:
            gradient = torch.addcmul(gradient, share, total, value=-1).div_(ctx.temperature)
        return gradient, None, None, None, None


@dataclass(frozen=True)
class _Distribution:
    """A distribution with F(-x) = 1 - F(x)."""

    value: Callable[[Tensor], Tensor]  # F
    log: Callable[[Tensor], Tensor]  # log F
    log_density: Callable[[Tensor], Tensor]  # up to a constant
    # e^h F(x) and e^h F'(x) from y = e^(x+h) and epsilon = e^-h
    scaled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _logistic_scaled(y: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    rest = torch.addcmul(y.new_ones(()), y, epsilon).reciprocal_()  # 1 - F(x)
    share = y * rest
    return share, rest.mul_(share)


def _laplace(x: Tensor) -> Tensor:
    # clamp and not abs: its gradient at 0, where scores are tied, is 1 on the side that torch.where takes.
    return torch.where(x <= 0, x.clamp(max=0).exp() / 2, 1 - (-x.clamp(min=0)).exp() / 2)


def _log_laplace(x: Tensor) -> Tensor:
    return torch.where(x <= 0, x.clamp(max=0) - math.log(2), (-(-x.clamp(min=0)).exp() / 2).log1p())


def _laplace_scaled(y: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    # Above 0 F = 1 - density. There e^x > 1, and elsewhere it is small enough for a minimum to tell the two apart.
    density = torch.minimum(y, (y * epsilon * epsilon).reciprocal_()).div_(2)
    return torch.where(y * epsilon <= 1, density, 1 / epsilon - density), density


_LOGISTIC = _Distribution(
    torch.sigmoid, F.logsigmoid, lambda x: -x.abs() - 2 * (-x.abs()).exp().log1p(), _logistic_scaled
)
_LAPLACE = _Distribution(_laplace, _log_laplace, lambda x: -x.abs(), _laplace_scaled)


def _thresholded(distribution: _Distribution, cut: _Cut, margin: Tensor) -> Selection:
    """F(margin) and F(-margin), and their exact logarithms."""

    def logs() -> tuple[Tensor, Tensor]:
        return cut.without_missing(distribution.log(margin)), cut.without_missing(distribution.log(-margin))

    return Selection(lambda: distribution.value(margin), lambda: cut.without_missing(distribution.value(-margin)), logs)


def _with_fixed_sum(distribution: _Distribution, scores: Tensor, cut: _Cut, temperature: float) -> Selection:
    """The Selection F((s - b) / t) with sum p = k.

    By the implicit function theorem db / ds_j = q_j / sum q with q the density at each item, so that
    ds_i = q_i (g_i - sum_j q_j g_j / sum_j q_j) / t for an incoming gradient g.
    """
    x = cut.centred(scores, temperature)
    b = _balancing_shift(distribution, x, cut)
    share = torch.where(cut.is_cut, distribution.log_density(x - b).softmax(dim=-1), 0)
    return _thresholded(distribution, cut, _Margin.apply(scores, b, share, cut, temperature))


_NEWTON_STEPS = 6
_NEGLIGIBLE = 60.0  # e^-60 is nothing beside 1, and no subnormal number, with which a CPU is slow


def _balancing_shift(distribution: _Distribution, x: Tensor, cut: _Cut) -> Tensor:
    """b with sum F(x - b) = k for x whose cut lies at 0, 0 for requests without a cut. [B, 1].

    The share that the k best lack, sum F(b - x), equals the share that the others have, sum F(x - b). The logarithm of
    the one over the other rises in b with a slope between 1 and 2 whatever the scores, so that Newton converges from 0
    in a few steps. Both sums are scaled by e^h, h = the smallest |x|, so that they are not 0 where scores are far
    apart: of e^(x+h) = e^(+-b) e^(h-|x|) the second factor is the same in all steps. Items tied at the cut count in
    both sums, as two columns beside the others.
    """
    best, distance = (x > 0).to(x.dtype), x.abs()
    others = (x < 0).to(x.dtype)
    tied_best = cut.k - best.sum(dim=-1, keepdim=True)
    tied_others = (x == 0).sum(dim=-1, keepdim=True) - tied_best
    zero = x.new_zeros(len(x), 1)
    best = torch.cat([best, tied_best, zero], dim=-1)
    others = torch.cat([others, zero, tied_others], dim=-1)
    nearest = distance.amin(dim=-1, keepdim=True)
    decay = (nearest - distance).clamp_(min=-_NEGLIGIBLE).exp_()  # e^(h-|x|)
    decay = torch.cat([cut.without_missing(decay), x.new_ones(len(x), 2)], dim=-1)
    decay_of_best = torch.where(best > 0, decay, 0)
    decay_of_others = decay - decay_of_best
    epsilon = (-nearest.clamp(max=_NEGLIGIBLE)).exp()
    b = zero
    for _ in range(_NEWTON_STEPS):
        # Each side by itself: where k is near n one of them is thousands of times the other, and would swallow it.
        y = torch.addcmul((-b).exp() * decay_of_others, b.exp(), decay_of_best)
        both = distribution.scaled(y, epsilon)
        lacking, lacking_slope = ((values * best).sum(dim=-1, keepdim=True) for values in both)
        having, having_slope = ((values * others).sum(dim=-1, keepdim=True) for values in both)
        b = b - (lacking / having).log() / (lacking_slope / lacking + having_slope / having)
    return torch.where(cut.is_cut, b, 0)


def _sparse_shift(x: Tensor, cut: _Cut) -> Tensor:
    """b with sum clip(x - b, 0, 1) = k for x whose cut lies at 0: it is in [-3/2, 1/2]. [B, 1]."""
    low, high = (x.new_full((len(x), 1), end) for end in (-1.5, 0.5))
    for _ in range(2 - round(math.log2(torch.finfo(x.dtype).eps))):
        middle = (low + high) / 2
        too_much = (x - middle).clamp_(0, 1).sum(dim=-1, keepdim=True) > cut.k
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    # The sum is linear between two items' values: one more step takes it to k.
    share = (x - high).clamp(0, 1)
    number = ((share > 0) & (share < 1)).sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(cut.is_cut, high + (share.sum(dim=-1, keepdim=True) - cut.k) / number, 0)


# name -> operator(scores [B, N], mask [B, N], temperature) -> permutation [B, N, N]
PERMUTATION_OPERATORS: dict[str, PermutationOperator] = {"neural_sort": neural_sort, "soft_sort": soft_sort}
# Default temperatures of the operators that do not sort (docs/methods.md says how they were chosen). The others' are
# those of the methods: the original's.
TEMPERATURES = {"dftopk": 6.0, "lapsum": 10.0, "lml": 3.0, "sparse_topk": 30.0}
# name -> operator(scores [B, N], mask [B, N], k [B] int64, temperature) -> Selection
SELECTION_OPERATORS: dict[str, SelectionOperator] = {
    name: _by_sorting(operator) for name, operator in PERMUTATION_OPERATORS.items()
} | {"dftopk": dftopk, "lapsum": lapsum, "lml": lml, "sparse_topk": sparse_topk}


def select(
    operator: str, scores: Tensor, mask: Tensor, cuts: Sequence[Tensor], temperature: float
) -> tuple[Selection, ...]:
    """The named operator's Selection at each of several cuts k [B]; one that sorts does so once."""
    if operator in PERMUTATION_OPERATORS:
        return _select_by_sorting(PERMUTATION_OPERATORS[operator], scores, mask, cuts, temperature)
    return tuple(SELECTION_OPERATORS[operator](scores, mask, k, temperature) for k in cuts)


# ---- labels ----------------------------------------------------------------------------------------------------------


def label_permutation(labels: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The label matrix Y: row j = the item that is j-th by label; tied items share their block of rows equally.

    It equals neural_sort(labels, t -> 0) on integer labels, written as counts so that it is exact for any N.

    Args:
        labels: [B, N] int64, higher is better.
        mask: [B, N] bool.
        dtype: floating type of the result.

    Returns:
        [B, N, N] without gradient.
    """
    better, tied = _label_blocks(labels, mask)
    row = torch.arange(labels.shape[-1], device=labels.device, dtype=torch.int32).unsqueeze(-1)  # [N, 1]
    first, end = (torch.where(mask, index, 0).int().unsqueeze(-2) for index in (better, better + tied))
    return torch.where((row >= first) & (row < end), 1 / tied.unsqueeze(-2).to(dtype), 0)


def label_split(labels: Tensor, mask: Tensor, k: Tensor, dtype: torch.dtype, repeated: bool = False) -> Selection:
    """Sums of the label matrix's rows 1..k, and of its later rows, without the matrix: the target of a Selection.

    Args:
        labels: [B, N] int64, higher is better.
        mask: [B, N] bool.
        k: [B] int64.
        dtype: floating type of the result.
        repeated: count each of n tied items once in each of their n rows, instead of 1/n.
    """
    better, tied = _label_blocks(labels, mask)
    first = (k.unsqueeze(-1) - better).clamp(min=0).minimum(tied)  # of the item's rows, those among the first k
    share = mask.to(dtype) if repeated else mask.to(dtype) / tied
    return Selection(first * share, (tied - first) * share)


def _label_blocks(labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each present item, the number of items with a better label, and with the same one, itself included; [B, N]."""
    labels = torch.where(mask, labels, torch.iinfo(labels.dtype).min)
    ordered = labels.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    return labels.shape[-1] - up_to, up_to - below


# ---- cross-entropies -------------------------------------------------------------------------------------------------


def selection_cross_entropy(predicted: Selection, target: Selection) -> Tensor:
    """-log(top + eps) gt - log(rest + eps) rest_gt for every item, without eps where logs are exact. [B, N]."""
    log_top, log_rest = predicted.logs()
    return -log_top * target.top - log_rest * target.rest


def end_to_end_cross_entropy(predicted: Sequence[Selection], target: Selection) -> Tensor:
    """-log(prod_i top_i + eps) gt - log(1 - prod_i (1 - rest_i) + eps) clamp(1 - gt, 0, 1) for every item. [B, N].

    prod_i top_i is the lower bound of the probability that an item survives every stage i (LCRON, section 4). Where an
    operator knows its logarithms there is no eps, and 1 - prod_i top_i is summed up in logarithms: stage by stage, to
    what was dropped before comes what survived until here and is dropped now. log eps stands for log 0, where no stage
    cuts a request.
    """
    exact = [stage.exact_logs() for stage in predicted if stage.exact_logs]
    if len(exact) == len(predicted):
        return _exact_end_to_end(exact, target)
    survives, never_dropped = torch.ones_like(target.top), torch.ones_like(target.top)
    for stage in predicted:
        survives, never_dropped = survives * stage.top, never_dropped * (1 - stage.rest)
    negative = (1 - target.top).clamp(0, 1)
    return -(survives + EPSILON).log() * target.top - (1 - never_dropped + EPSILON).log() * negative


def _exact_end_to_end(logs: Sequence[tuple[Tensor, Tensor]], target: Selection) -> Tensor:
    """From log top and log rest of each stage."""
    log_survives, log_dropped = logs[0]
    for log_top, log_rest in logs[1:]:
        here, none_dropped = log_survives + log_rest, log_dropped == -torch.inf
        sums = torch.logaddexp(log_dropped.masked_fill(none_dropped, 0), here)  # its gradient at two -inf is NaN
        log_dropped = torch.where(none_dropped, here, sums)
        log_survives = log_survives + log_top
    return -_finite(log_survives) * target.top - _finite(log_dropped) * (1 - target.top).clamp(0, 1)


def mean_of_rows(permutation: Tensor, mask: Tensor, k: int) -> Tensor:
    """Mean of the rows 1..k of P, of all n rows where fewer than k items are present. [B, N]."""
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1, max=k)
    return permutation[:, :k].sum(dim=-2) / count


def sorting_cross_entropy(permutation: Tensor, label_rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the n * n entries of present rows and items of -log(P + eps) Y, and their number; P and Y are
    [B, N, N], Y 0 in the other entries."""
    return -((permutation + EPSILON).log() * label_rows).sum(), mask.sum(dim=-1).square().sum()


def order_terms(
    operator: PermutationOperator,
    scores: Mapping[str, Tensor],
    targets: Targets,
    temperature: float,
    shares: Callable[[str, Tensor, Tensor], Iterable[Tensor]] = lambda *_: (),
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Stage -> (G, its shares): G = mean over the n * n entries of -log(P + eps) Y, P the stage's permutation; and
    what ``shares(stage, P, mask)`` makes of P and mask, any number of tensors [B, N].

    Arguments otherwise as :func:`neural_sort`'s. The matrices are made a few requests at a time.
    """

    def parts(labels: Tensor, mask: Tensor, *stages: Tensor) -> tuple[Tensor, ...]:
        label_rows = label_permutation(labels, mask, stages[0].dtype)
        totals, found = list[Tensor](), list[Tensor]()
        for stage, values in zip(scores, stages, strict=True):
            permutation = operator(values, mask, temperature)
            total, count = sorting_cross_entropy(permutation, label_rows, mask)
            totals.append(total)
            found += shares(stage, permutation, mask)
        return count, torch.stack(totals), *found

    count, totals, *found = in_blocks(parts, targets.labels, targets.mask, *scores.values())
    totals, count = batch_totals(totals, count)
    orders, each = (totals / count.clamp(min=1)).unbind(), len(found) // len(scores)
    return {stage: (orders[i], found[each * i : each * (i + 1)]) for i, stage in enumerate(scores)}
