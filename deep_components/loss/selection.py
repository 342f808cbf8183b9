"""Relaxed sorting operators: differentiable permutation matrices, row j = a distribution over which item is j-th.

Missing items (mask False) are as if removed: with n items present the rows 1..n describe the order of these n, rows
beyond n and columns of missing items are zero. All matrices are [B, N, N], rows first.
"""

import torch
from torch import Tensor

from deep_components.loss.functional import Selection, present


def neural_sort(scores: Tensor, mask: Tensor, tau: float) -> Tensor:
    """NeuralSort (Grover et al., ICLR 2019): P[j,:] = softmax(((n+1-2j) s - A) / tau), A[a] = sum_b |s_a - s_b|.

    Args:
        scores: [B, N].
        mask: [B, N] bool.
        tau: temperature, in the scores' unit; P tends to the permutation matrix as tau tends to 0.

    Returns:
        [B, N, N].
    """
    scores = present(scores, mask) / tau
    count = mask.sum(dim=-1, keepdim=True)  # [B, 1]
    distance = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs()  # [B, N, N]
    spread = (distance @ mask.to(scores.dtype).unsqueeze(-1)).squeeze(-1)  # A, [B, N]
    # A missing item has hopeless logits, by numbers [B, N] instead of a pass over [B, N, N]; finite ones, so that a row
    # without items gives no NaN.
    spread = torch.where(mask, spread, torch.finfo(scores.dtype).max / 2)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    scaling = (count + 1 - 2 * rank).to(scores.dtype)  # [B, N]
    logits = scaling.unsqueeze(-1) * scores.unsqueeze(-2) - spread.unsqueeze(-2)  # [B, N, N]
    return logits.softmax(dim=-1) * (rank <= count).to(scores.dtype).unsqueeze(-1)


def soft_sort(scores: Tensor, mask: Tensor, tau: float) -> Tensor:
    """SoftSort (Prillo and Eisenschlos, ICML 2020): P[j,:] = softmax(-|s_(j) - s| / tau), s_(j) the j-th largest.

    Arguments and result as in :func:`neural_sort`.
    """
    scores = present(scores, mask)
    # Missing items sort last, whatever stands in their place; their rows are masked below.
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ordered = scores.gather(-1, order)
    logits = -(ordered.unsqueeze(-1) - scores.unsqueeze(-2)).abs()
    return _masked_softmax(logits / tau, mask)


SORTING_OPERATORS = {"neural_sort": neural_sort, "soft_sort": soft_sort}


def label_permutation(labels: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The label matrix Y: row j = the item that is j-th by label; tied items share their block of rows equally.

    It equals neural_sort(labels, tau -> 0) on integer labels, written as counts so that it is exact for any N.

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
    """Sums of the label matrix's rows 1..k, and of its later rows, without the matrix: how much of each item belongs to
    the first k places, and how much to the others.

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


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the present items (columns) of the first n rows; zero elsewhere."""
    columns = mask.unsqueeze(-2)
    row = torch.arange(mask.shape[-1], device=mask.device)
    rows = (row < mask.sum(dim=-1, keepdim=True)).unsqueeze(-1)
    lowest = torch.finfo(logits.dtype).min  # finite, so that a row without items gives no NaN
    return torch.where(rows & columns, logits.masked_fill(~columns, lowest).softmax(dim=-1), 0)
