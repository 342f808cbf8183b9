"""Selection: differentiable sorting and top-k operators, what the labels say, and cross-entropies between the two.

A loss that needs the share of each item among the first k asks for a :class:`Selection` (``SELECTION_OPERATORS``); one
that needs the order asks for a relaxed permutation (``PERMUTATION_OPERATORS``): matrices [B, N, N] whose row j is a
distribution over which item is j-th. Missing items (mask False) are as if removed: with n items present the rows 1..n
of a permutation describe the order of these n; rows beyond n and columns of missing items are zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deep_components.loss.functional import masked_mean, without_missing

EPSILON = 1e-6


@dataclass(frozen=True)
class Selection:
    """How much of each item is among the first k, and how much is not. [B, N] each."""

    top: Tensor
    rest: Tensor


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
    scores = without_missing(scores, mask) / temperature
    count = mask.sum(dim=-1, keepdim=True)  # [B, 1]
    distance = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs()  # [B, N, N]
    total_distance = (distance @ mask.to(scores.dtype).unsqueeze(-1)).squeeze(-1)  # A, [B, N]
    # A missing item has hopeless logits, by numbers [B, N] instead of a pass over [B, N, N]; finite ones, so that a row
    # without items gives no NaN.
    total_distance = torch.where(mask, total_distance, torch.finfo(scores.dtype).max / 2)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    scaling = (count + 1 - 2 * rank).to(scores.dtype)  # [B, N]
    logits = scaling.unsqueeze(-1) * scores.unsqueeze(-2) - total_distance.unsqueeze(-2)  # [B, N, N]
    return logits.softmax(dim=-1) * (rank <= count).to(scores.dtype).unsqueeze(-1)


def soft_sort(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """SoftSort (Prillo and Eisenschlos, ICML 2020): P[j,:] = softmax(-|s_(j) - s| / t), s_(j) the j-th largest.

    Arguments and result as in :func:`neural_sort`.
    """
    scores, columns = without_missing(scores, mask), mask.unsqueeze(-2)
    # Missing items sort last; the rows that they then have are set to 0 below.
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    logits = -(scores.gather(-1, order).unsqueeze(-1) - scores.unsqueeze(-2)).abs() / temperature
    lowest = torch.finfo(logits.dtype).min  # finite, so that a row without items gives no NaN
    rows = _rows(mask).unsqueeze(-1)
    return torch.where(rows & columns, logits.masked_fill(~columns, lowest).softmax(dim=-1), 0)


def _rows(mask: Tensor) -> Tensor:
    """Which rows of a permutation there are: the first n. [B, N] bool."""
    return torch.arange(mask.shape[-1], device=mask.device) < mask.sum(dim=-1, keepdim=True)


def split(permutation: Tensor, k: Tensor) -> Selection:
    """top_k(P) = (rows 1..k summed) / (stopgrad(all rows summed) + eps), rest_k(P) = (the later rows) / the same.

    Args:
        permutation: P, relaxed permutation matrices [B, N, N].
        k: [B] int64.
    """
    rows = torch.arange(permutation.shape[-2], device=permutation.device)
    in_top = (rows < k.unsqueeze(-1)).to(permutation.dtype).unsqueeze(-2)  # [B, 1, N]
    total = permutation.detach().sum(dim=-2) + EPSILON
    top, rest = ((chosen @ permutation).squeeze(-2) for chosen in (in_top, 1 - in_top))
    return Selection(top / total, rest / total)


def _by_sorting(operator: PermutationOperator) -> SelectionOperator:
    def selection(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
        return split(operator(scores, mask, temperature), k)

    return selection


# name -> operator(scores [B, N], mask [B, N], temperature) -> permutation [B, N, N]
PERMUTATION_OPERATORS: dict[str, PermutationOperator] = {"neural_sort": neural_sort, "soft_sort": soft_sort}
# name -> operator(scores [B, N], mask [B, N], k [B] int64, temperature) -> Selection
SELECTION_OPERATORS: dict[str, SelectionOperator] = {
    name: _by_sorting(operator) for name, operator in PERMUTATION_OPERATORS.items()
}


def select(
    operator: str, scores: Tensor, mask: Tensor, cuts: Sequence[Tensor], temperature: float
) -> tuple[Selection, ...]:
    """The named operator's Selection at each of several cuts k [B]; one that sorts does so once."""
    if operator in PERMUTATION_OPERATORS:
        permutation = PERMUTATION_OPERATORS[operator](scores, mask, temperature)
        return tuple(split(permutation, k) for k in cuts)
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
    row = torch.arange(labels.shape[-1], device=labels.device).unsqueeze(-1)  # [N, 1]
    inside = (row >= better.unsqueeze(-2)) & (row < (better + tied).unsqueeze(-2)) & mask.unsqueeze(-2)
    return torch.where(inside, 1 / tied.unsqueeze(-2).to(dtype), 0)


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
    """-log(top + eps) gt - log(rest + eps) rest_gt for every item. [B, N]."""
    return -(predicted.top + EPSILON).log() * target.top - (predicted.rest + EPSILON).log() * target.rest


def end_to_end_cross_entropy(predicted: Sequence[Selection], target: Selection) -> Tensor:
    """-log(prod_i top_i + eps) gt - log(1 - prod_i (1 - rest_i) + eps) clamp(1 - gt, 0, 1) for every item. [B, N].

    prod_i top_i is the lower bound of the probability that an item survives every stage i (LCRON, section 4).
    """
    survives, never_dropped = torch.ones_like(target.top), torch.ones_like(target.top)
    for stage in predicted:
        survives, never_dropped = survives * stage.top, never_dropped * (1 - stage.rest)
    negative = (1 - target.top).clamp(0, 1)
    return -(survives + EPSILON).log() * target.top - (1 - never_dropped + EPSILON).log() * negative


def mean_of_rows(permutation: Tensor, mask: Tensor, k: int) -> Tensor:
    """Mean of the rows 1..k of P, of all n rows where fewer than k items are present. [B, N]."""
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1, max=k)
    return permutation[:, :k].sum(dim=-2) / count


def sorting_cross_entropy(permutation: Tensor, label_rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over the n * n entries of present rows and items of -log(P + eps) Y; P and Y are [B, N, N]."""
    entries = _rows(mask).unsqueeze(-1) & mask.unsqueeze(-2)
    return masked_mean(-(permutation + EPSILON).log() * label_rows, entries)
