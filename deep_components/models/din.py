"""DIN, the ranking stage: attention of each item over the user's history (Zhou et al., KDD 2018)."""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deep_components.batch import EmbeddedFeatures
from deep_components.kernels import Kernels
from deep_components.models.tower import run_tower, tower
from deep_components.schema import SIDES, Schema

ATTENTION_UNITS = 80
PADDING_LOGIT = -(2.0**30) + 1.0

# Hidden activations alive at a time, in numbers: small enough for a core's cache, large enough to keep it busy. A GPU
# wants few large steps instead.
_CHUNK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 27}
# A training batch of more items in all is scored in blocks of so many, whose activations are not kept.
MOST_ITEMS, ITEMS_PER_BLOCK = 1 << 17, 1 << 13


class DIN(nn.Module):
    """score = tower(request, interest, item): interest is the attention-weighted sum of the history.

    The attention logit of history position l for an item is Linear(80 -> 1)(ReLU(Linear(-> 80)(history_l, the item's
    fields that the history has too))); padding positions get -2^30 + 1 before the softmax over all L positions. The
    tower is [input -> u -> u -> u/4 -> 1] with u = ``nn_units``. Arguments as those of
    :class:`deep_components.models.dssm.DSSM`.
    """

    def __init__(self, schema: Schema, emb_dim: int = 8, nn_units: int = 128) -> None:
        super().__init__()
        request, history, item = (schema.width(side, emb_dim) for side in SIDES)
        columns = schema.slices("item", emb_dim)
        shared = [columns[field.name] for field in schema.side("history") if field.name in columns]
        matched = [index for column in shared for index in range(column.start, column.stop)]
        self.history_width = history
        self.attention = tower([history + len(matched), ATTENTION_UNITS, 1])
        self.tower = tower([request + history + item, nn_units, nn_units, nn_units // 4, 1])
        # Where in an item's embedding the inputs of the attention lie; no state, so no part of checkpoints.
        self.register_buffer("matched", torch.tensor(matched, dtype=torch.long), persistent=False)
        self.matched: Tensor
        self.leading = matched == list(range(len(matched)))
        self.kernels: Kernels | None = None

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        """Scores [B, N]."""
        parts = features.request, features.history, features.history_mask, features.item
        requests, items, _ = features.item.shape
        if requests * items <= MOST_ITEMS or not torch.is_grad_enabled():
            return self._scores(*parts)
        size = max(1, ITEMS_PER_BLOCK // items)
        blocks = zip(*(part.split(size) for part in parts), strict=True)
        scores = [checkpoint(self._scores, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        return torch.cat(scores)

    def _scores(self, request: Tensor, history: Tensor, history_mask: Tensor, item: Tensor) -> Tensor:
        own = torch.cat([self.interest(history, history_mask, item), item], dim=-1)
        return run_tower(self.tower, own, self.kernels, shared=request).squeeze(-1)

    def interest(self, history: Tensor, history_mask: Tensor, items: Tensor) -> Tensor:
        """Attention-weighted history per item: [B, N, H] from history [B, L, H], its mask [B, L] and items [B, N, I],
        of which the fields that the history has too take part."""
        inner, outer = cast(nn.Linear, self.attention[0]), cast(nn.Linear, self.attention[2])
        width = self.history_width
        history_part = F.linear(history, inner.weight[:, :width], inner.bias)  # [B, L, 80]
        item_part = F.linear(items, self._over_items(inner.weight[:, width:], items.shape[-1]))  # [B, N, 80]
        weight = outer.weight.squeeze(0)
        history_part, item_part = history_part.to(weight.dtype), item_part.to(weight.dtype)  # autocast's may be shorter
        if self.kernels is not None:
            logits = _CompiledLogits.apply(self.kernels, history_part, item_part, weight, outer.bias, history_mask)
        else:
            logits = attention_logits(history_part, item_part, weight) + outer.bias  # [B, N, L]
            logits = logits.masked_fill(~history_mask.unsqueeze(1), PADDING_LOGIT)
        return logits.softmax(dim=-1) @ history

    def _over_items(self, weight: Tensor, width: int) -> Tensor:
        """The attention's weight [80, matched] as one for whole items [80, I], 0 for the other fields: slicing the
        items would cost more, most of it in the backward pass."""
        if self.leading:
            return F.pad(weight, (0, width - weight.shape[1]))
        return weight.new_zeros(len(weight), width).index_copy(1, self.matched, weight)


def attention_logits(history_part: Tensor, item_part: Tensor, weight: Tensor) -> Tensor:
    """logits[b, n, l] = sum_h weight[h] * ReLU(history_part[b, l, h] + item_part[b, n, h]).

    Linear(10d -> H) of a concatenation is the sum of its parts, so nothing of size B x N x L x 10d is made; the hidden
    B x N x L x H activations are made a few requests at a time and made again in the backward pass instead of stored.
    Shapes: history_part [B, L, H], item_part [B, N, H], weight [H]; the logits are [B, N, L].
    """
    if torch.compiler.is_exporting():  # a graph has no loop over requests, and needs no backward pass
        return (history_part.unsqueeze(1) + item_part.unsqueeze(2)).relu() @ weight
    return _AttentionLogits.apply(history_part, item_part, weight)


class _AttentionLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, history_part: Tensor, item_part: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(history_part, item_part, weight)
        logits = history_part.new_empty(item_part.shape[0], item_part.shape[1], history_part.shape[1])
        for chunk, hidden in _hidden_chunks(history_part, item_part):
            torch.matmul(hidden.relu_(), weight, out=logits[chunk])
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs; the hidden activations are made again, a few requests at a time."""
        history_part, item_part, weight = ctx.saved_tensors
        grad_history, grad_item = torch.empty_like(history_part), torch.empty_like(item_part)
        for chunk, hidden in _hidden_chunks(history_part, item_part):
            # Where a hidden unit is active, the logit's gradient passes; the factor weight[h] comes in at the end.
            # All in place and in the numbers' own type: on a CPU comparisons to bool are several times slower.
            passed = hidden.gt_(0).mul_(grad_logits[chunk].unsqueeze(-1))
            torch.sum(passed, dim=1, out=grad_history[chunk])
            torch.sum(passed, dim=2, out=grad_item[chunk])
        # ReLU(x) = x where active, and x is the sum of its parts: so is the gradient of the weight.
        grad_weight = (history_part * grad_history).sum(dim=(0, 1)) + (item_part * grad_item).sum(dim=(0, 1))
        return grad_history.mul_(weight), grad_item.mul_(weight), grad_weight


class _CompiledLogits(torch.autograd.Function):
    """The logits with bias and padding; the hidden activations are nowhere stored, and padding costs nothing."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, history_part: Tensor, item_part: Tensor, weight: Tensor, bias: Tensor, mask: Tensor
    ) -> Tensor:
        parts = history_part, item_part, weight, mask = tuple(
            part.contiguous() for part in (history_part, item_part, weight, mask)
        )
        ctx.kernels = kernels
        ctx.save_for_backward(*parts)
        return kernels.attention_forward(history_part, item_part, weight, bias, mask, PADDING_LOGIT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        history_part, item_part, weight, mask = ctx.saved_tensors
        grad_bias = (grad_logits.sum(dim=1) * mask).sum().view(1)
        grads = ctx.kernels.attention_backward(history_part, item_part, weight, mask, grad_logits.contiguous())
        return None, *grads, grad_bias, None


def _hidden_chunks(history_part: Tensor, item_part: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some requests at a time: which, and their pre-activations [b, N, L, H], in memory that the next ones reuse."""
    batch, length, units = history_part.shape
    num_items = item_part.shape[1]
    limit = _CHUNK_NUMBERS.get(history_part.device.type, _CHUNK_NUMBERS["cpu"])
    size = max(1, limit // max(num_items * length * units, 1))
    memory = history_part.new_empty(min(size, batch), num_items, length, units)
    for first in range(0, batch, size):
        chunk = slice(first, min(first + size, batch))
        hidden = memory[: chunk.stop - first]
        torch.add(history_part[chunk].unsqueeze(1), item_part[chunk].unsqueeze(2), out=hidden)
        yield chunk, hidden
