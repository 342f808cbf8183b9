"""Kernels shared by the losses: masked reductions, and pointwise and pairwise terms.

Shapes: B requests, N items; ``mask`` is [B, N] bool, False where the item is missing. A missing item has no influence:
its score, label and group may be anything, NaN included, and its gradient is zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# A batch whose matrices N x N have at most so many numbers is computed at once, as those of the paper's settings are;
# a larger one in blocks, whose memory of 4 MB a matrix in float32 is used again (kernels.keep_freed_memory).
MATRIX_NUMBERS, NUMBERS_PER_BLOCK = 1 << 24, 1 << 20


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
        """[B, N] int64, from 0; 0 = the ground-truth group."""


def check_inputs(scores: Mapping[str, Tensor], targets: Targets, stages: Iterable[str] | None = None) -> None:
    """TypeError or ValueError, in one sentence, unless ``scores`` has a floating-point tensor [B, N] for each of the
    loss's ``stages`` (None = any) and ``targets`` fits them. Values are not read, so that no device is waited for."""
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores is a {type(scores).__name__}, not a mapping of stages to tensors [B, N]")
    if not scores:
        raise ValueError("scores has no stage")
    if stages is not None and scores.keys() != set(stages):
        raise ValueError(f"scores is of the stages {', '.join(scores)}; the loss is of {', '.join(stages)}")
    tensors = {f"scores[{stage!r}]": (s, "floating-point numbers") for stage, s in scores.items()}
    kinds = {"mask": "bool", "labels": "integers", "group": "integers"}
    tensors = {f"targets.{name}": (getattr(targets, name), kind) for name, kind in kinds.items()} | tensors
    for name, (values, kind) in tensors.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}, not a tensor [B, N]")
        if kind != _kind(values):
            raise TypeError(f"{name} holds {values.dtype}, not {kind}")
        if values.dim() != 2 or values.shape != targets.mask.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, not [B, N] = {tuple(targets.mask.shape)}")


def _kind(values: Tensor) -> str:
    if values.is_floating_point():
        return "floating-point numbers"
    return "bool" if values.dtype == torch.bool else "complex numbers" if values.is_complex() else "integers"


# ---- reductions ------------------------------------------------------------------------------------------------------

# (*sums, by_number=...) -> the sums over the whole batch; None where this process has it all.
_reduce: ContextVar[Callable[..., tuple[Tensor, ...]] | None] = ContextVar("reduce", default=None)


@contextmanager
def totals_by(reduce: Callable[..., tuple[Tensor, ...]] | None) -> Iterator[None]:
    """Inside, :func:`batch_totals` is ``reduce``; None for sums that are those of the whole batch already."""
    token = _reduce.set(reduce)
    try:
        yield
    finally:
        _reduce.reset(token)


def batch_totals(*sums: Tensor, by_number: bool = False) -> tuple[Tensor, ...]:
    """Sums over the requests at hand -> the same over the whole batch, with gradients; the very same tensors unless
    several processes share the batch.

    A sum over requests goes through here before anything but sums is made of it, above all before it is divided;
    :func:`masked_mean` does so. What is made of totals that have a gradient is made of them and of parameters alone,
    so that all processes find the same. Not to be called in a function of :func:`in_blocks`.

    Args:
        sums: of any shapes, the same in all processes; counts, as integers or in float64, have no gradient.
        by_number: the sums are vectors by a number, as a group's, and may end earlier in other processes.
    """
    reduce = _reduce.get()
    return sums if reduce is None else reduce(*sums, by_number=by_number)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0, with zero gradients, where the mask is empty. Shapes broadcast.

    Of a batch that several processes share it is the mean over the whole batch."""
    total, count = batch_totals(*masked_sum(values, mask))
    return total / count.clamp(min=1)


def masked_means(values: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """:func:`masked_mean` of each of the values, of the mask's shape, whose sums several processes exchange at once."""
    *totals, count = batch_totals(*(torch.where(mask, part, 0).sum() for part in values.values()), mask.sum())
    return {name: total / count.clamp(min=1) for name, total in zip(values, totals, strict=True)}


def masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` where ``mask``, and how many these are, of the requests at hand. Shapes broadcast."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0).sum(), mask.sum()


def in_blocks(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """``function(*inputs)``, whose matrices [B, N, N] are never kept: of a few requests at a time, and made again in
    the backward pass.

    Where all matrices of a batch have at most ``MATRIX_NUMBERS`` numbers it is a plain call.

    Args:
        function: of tensors [b, N], for any b of the B requests; results [b, ...] with two axes or more are joined,
            those with fewer are sums over the requests and added.
        inputs: [B, N] each.
    """
    requests, items = inputs[0].shape
    if requests * items**2 <= MATRIX_NUMBERS:
        return function(*inputs)
    size = max(1, NUMBERS_PER_BLOCK // items**2)
    blocks = zip(*(values.split(size) for values in inputs), strict=True)
    parts = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return tuple(
        torch.cat(part) if part[0].dim() > 1 else torch.stack(part).sum(0) for part in zip(*parts, strict=True)
    )


def without_missing(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with every missing item's replaced by 0: no NaN or infinity of a missing item goes further."""
    return torch.where(mask, scores, 0)


def num_ground_truth(targets: Targets, limit: int) -> Tensor:
    """K of each request: min(limit, its ground-truth items). [B] int64."""
    return (targets.mask & (targets.group == 0)).sum(dim=-1).clamp(max=limit)


def sum_of_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``loss``, the sum of the terms, and the terms themselves, detached."""
    loss = torch.stack(list(terms.values())).sum()
    return {"loss": loss} | {name: term.detach() for name, term in terms.items()}


# ---- pointwise -------------------------------------------------------------------------------------------------------


def ground_truth_bce(scores: Tensor, targets: Targets, visible: Tensor) -> Tensor:
    """Binary cross-entropy of the logits with target 1 on the ground-truth group, 0 elsewhere; mean over ``visible``.

    Args:
        scores: [B, N].
        visible: [B, N] bool, the items that take part; must lie inside ``targets.mask``.
    """
    logits, positive = without_missing(scores, visible), (targets.group == 0).to(scores.dtype)
    return masked_mean(F.binary_cross_entropy_with_logits(logits, positive, reduction="none"), visible)


def squared_error(scores: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Mean of (stopgrad(teacher) - scores)^2 over ``visible``; scores and teacher are [B, N]."""
    difference = without_missing(teacher.detach(), visible) - without_missing(scores, visible)
    return masked_mean(difference**2, visible)


# ---- top k of the scores ---------------------------------------------------------------------------------------------


def top_k_mask(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Which items are the k best candidates by score; all where there are fewer. [B, N] bool, without gradient."""
    return torch.zeros_like(candidates).scatter(-1, _descending(scores, candidates)[:, :k], True) & candidates


def _descending(scores: Tensor, mask: Tensor) -> Tensor:
    """Indices that sort the items by score, best first; tied items in the order of their index, missing ones last."""
    return scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def soft_top_k(scores: Tensor, mask: Tensor, k: int, temperature: float) -> Tensor:
    """I(s, k) = sigmoid((s - k-th largest of s) / temperature), the smallest where fewer than k items are present.

    Gradient flows through the threshold too. ``scores`` are those of :func:`without_missing`; a caller that goes on
    with them has all their gradients summed before the mask, which at a temperature of 1e-3 decides float32's last
    digits.

    Returns:
        [B, N], 0 for missing items.
    """
    ordered = scores.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).values
    index = mask.sum(dim=-1, keepdim=True).clamp(max=k) - 1
    threshold = torch.where(index >= 0, ordered.gather(-1, index.clamp(min=0)), 0)
    return torch.where(mask, ((scores - threshold) / temperature).sigmoid(), 0)


def ranking_distillation(student: Tensor, teacher: Tensor, candidates: Tensor, num_best: int, num_worst: int) -> Tensor:
    """D = -log sigmoid(mean of the student's scores over the teacher's best - the same over the teacher's worst).

    Best and worst are ``num_best`` and ``num_worst`` of the candidates by the teacher (all where there are fewer).
    Mean over the requests that have candidates.
    """
    clean = without_missing(student, candidates)
    upper = top_k_mask(teacher, candidates, num_best)
    lower = top_k_mask(-teacher, candidates, num_worst)
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
    """Sum over the groups but the last of the mean of softplus(-(s_m - s_n)), m in the group, n in any later group.

    Each mean is over the group's pairs in the whole batch. Where all requests share one row of groups (a stride of
    0, as :meth:`Tensor.expand` gives it and which is known without reading a value), the sums are taken slot by slot:
    float32 then rounds as it always has in the paper's settings. The mathematics is the same.
    """
    shared = len(targets.group) > 1 and targets.group.stride(0) == 0

    def sums(scores: Tensor, group: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        penalty, ordered = _group_pairs(scores, group, mask)
        return (penalty.sum(dim=(0, 2)), ordered.sum(dim=(0, 2))) if shared else (penalty.sum(-1), ordered.sum(-1))

    total, num_pairs = in_blocks(sums, scores, targets.group, targets.mask)
    row, there = targets.group[:1], targets.mask.any(dim=0)
    group = torch.where(there, row[0], 0) if shared else torch.where(targets.mask, targets.group, 0)
    # float64 counts exactly what float32 does not, beyond 2^24 pairs.
    counts = torch.bincount(group.flatten(), weights=num_pairs.to(torch.float64).flatten())
    (group_pairs,) = batch_totals(counts, by_number=True)
    pairs_of_group = group_pairs[group].to(total.dtype).clamp(min=1)
    if shared:
        same = row.mT == row  # [N, N]
        pairs_of_group = torch.where(same & there, pairs_of_group, 1).amax(dim=-1)  # also of a slot that nobody has
        same = same.to(total.dtype)
        means = total @ same / pairs_of_group / same.sum(dim=-1)  # each mean is in it once a slot
    else:
        means = total / pairs_of_group
    (loss,) = batch_totals(means.sum())
    return loss


def _group_pairs(scores: Tensor, group: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(-(s_m - s_n)) where n is of a later group than m, else 0; and where that is. [B, N, N] each."""
    clean, group = without_missing(scores, mask), torch.where(mask, group, 0)
    penalty = F.softplus(clean.unsqueeze(-2) - clean.unsqueeze(-1))  # of m before n
    ordered = pairs(mask) & (group.unsqueeze(-1) < group.unsqueeze(-2))
    return torch.where(ordered, penalty, 0), ordered


def lambda_loss(scores: Tensor, targets: Targets, cutoff: int) -> Tensor:
    """Sum over the ordered pairs of w * BCE(s_m - s_n, [y_m > y_n]), mean over the requests that have items.

    With r the ranks by s, from 1, D(x) = 1 / ln(x + 1), y+ = max(y, 0), gain g = y+ / sum_j D(j) y+_(j):
    w = |g_m - g_n| (0.2 u + 0.8 v), without gradient; u = |D(|r_m - r_n|) - D(|r_m - r_n| + 1)| where the ranks differ
    and the smaller is at most ``cutoff``, else 0 (LambdaLoss, Wang et al., CIKM 2018); v = |d_m - d_n| with d = D(r) up
    to ``cutoff``, else 0.
    """

    def sums(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor]:
        clean, labels = without_missing(scores, mask), torch.where(mask, labels, 0)
        weighted = _lambda_weights(clean, labels, mask, cutoff) * pairwise_bce(clean, labels)
        return (torch.where(pairs(mask), weighted, 0).sum(dim=(-1, -2)).unsqueeze(-1),)

    (per_request,) = in_blocks(sums, scores, targets.labels, targets.mask)
    return masked_mean(per_request.squeeze(-1), targets.mask.any(dim=-1))


@torch.no_grad()
def _lambda_weights(scores: Tensor, labels: Tensor, mask: Tensor, cutoff: int) -> Tensor:
    """w of :func:`lambda_loss`, for all pairs. [B, N, N]."""
    rank = (_descending(scores, mask).argsort(dim=-1) + 1).to(scores.dtype)
    gain = labels.clamp(min=0) / _ideal_dcg(labels.clamp(min=0), scores.dtype)
    distance = (rank.unsqueeze(-1) - rank.unsqueeze(-2)).abs()  # [B, N, N]
    near = (distance > 0) & (torch.minimum(rank.unsqueeze(-1), rank.unsqueeze(-2)) <= cutoff)
    step = (_discount(distance.clamp(min=1)) - _discount(distance.clamp(min=1) + 1)).abs()
    discount = torch.where(rank <= cutoff, _discount(rank), 0)
    weight = 0.2 * torch.where(near, step, 0) + 0.8 * (discount.unsqueeze(-1) - discount.unsqueeze(-2)).abs()
    return weight * (gain.unsqueeze(-1) - gain.unsqueeze(-2)).abs()


def _ideal_dcg(gains: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_j D(j) g_(j), 1 where that is 0. Gains are 0 or more. [B, 1]."""
    rank = torch.arange(1, gains.shape[-1] + 1, device=gains.device).to(dtype)
    total = (gains.sort(dim=-1, descending=True).values * _discount(rank)).sum(dim=-1, keepdim=True)
    return torch.where(total == 0, 1, total)


def _discount(rank: Tensor) -> Tensor:
    """D(x) = 1 / ln(x + 1)."""
    return 1 / (rank + 1).log()
