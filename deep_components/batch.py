"""What a batch of requests holds on its way from the log to a loss.

Shapes: B requests, N items a request, L history positions, d embedding dimension. B may be any size; N too, and where
requests have lists of varying length it is that of the batch's longest. A list field has one more axis, its values.

The ids of a batch pass through three types, so that none is taken for another: :class:`Features` has the indices of the
log's cache, :class:`RowFeatures` the rows of the embedding tables, :class:`SlotFeatures` the slots among the values
that a step has pulled. Only the loader and ``tables/`` translate. Models get :class:`EmbeddedFeatures`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """A batch as the log's cache has it. Ids and times are int64 indices, numbers are float32."""

    request: Mapping[str, Tensor]  # field -> [B]
    history: Mapping[str, Tensor]  # field -> [B, L]
    item: Mapping[str, Tensor]  # field -> [B, N]
    history_mask: Tensor  # [B, L] bool, True where there is an event


@dataclass(frozen=True)
class RowFeatures:
    """The same with rows of the embedding tables in place of the log's indices."""

    request: Mapping[str, Tensor]
    history: Mapping[str, Tensor]
    item: Mapping[str, Tensor]
    history_mask: Tensor


@dataclass(frozen=True)
class SlotFeatures:
    """The same with slots in place of rows, for the tables that ``rows`` lists: slot u of such a table stands for its
    row ``rows[table][u]``, and slot 0 is the padding row. The fields of other tables still hold rows."""

    request: Mapping[str, Tensor]
    history: Mapping[str, Tensor]
    item: Mapping[str, Tensor]
    history_mask: Tensor
    rows: Mapping[str, Any]  # table -> [U] int64, distinct; of shards how they are fetched (distributed/sharding.py)


@dataclass(frozen=True)
class EmbeddedFeatures:
    """What a model sees: fields side by side in the schema's order, ids embedded in d numbers, numbers as they are."""

    request: Tensor  # [B, schema.width("request", d)]
    history: Tensor  # [B, L, schema.width("history", d)]
    item: Tensor  # [B, N, schema.width("item", d)]
    history_mask: Tensor  # [B, L] bool


@dataclass(frozen=True)
class Targets:
    """What the losses and metrics know of a batch. Label and group of a masked item are arbitrary."""

    labels: Tensor  # [B, N] int64, higher is better
    mask: Tensor  # [B, N] bool, False where the item is missing
    group: Tensor  # [B, N] int64, 0 = the ground truth, then from better to worse


F = TypeVar("F", Features, RowFeatures, SlotFeatures)


@dataclass(frozen=True)
class CascadeBatch(Generic[F]):
    """B requests with all their items."""

    request_id: Tensor  # [B] int64
    features: F
    targets: Targets

    def apply(self, function: Callable[[Tensor], Tensor]) -> "CascadeBatch[F]":
        """The same batch with ``function`` applied to every tensor."""
        mapped: CascadeBatch[F] = _map(self, function)
        return mapped

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which :meth:`apply` takes them."""
        found: list[Tensor] = []
        self.apply(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def first_items(self, count: int) -> "CascadeBatch[F]":
        """The same batch with the first ``count`` items of each request."""
        cut: Callable[[Tensor], Tensor] = lambda values: values[:, :count]  # noqa: E731
        features: Any = replace(self.features, item=_map(self.features.item, cut))
        return replace(self, features=features, targets=_map(self.targets, cut))

    def to(self, device: torch.device) -> "CascadeBatch[F]":
        """The batch on ``device``, but for ``rows``, which belong to the tables; from pinned memory the copy does not
        wait."""
        moved = self.apply(lambda tensor: tensor.to(device, non_blocking=True))
        if not isinstance(self.features, SlotFeatures):
            return moved
        features: Any = replace(moved.features, rows=self.features.rows)  # type: ignore[call-arg]
        return replace(moved, features=features)

    def pin_memory(self) -> "CascadeBatch[F]":
        return self.apply(lambda tensor: tensor.contiguous().pin_memory())  # the groups may be an expanded view


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of a tensor; of every tensor in a mapping or a dataclass."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _map(part, function) for name, part in value.items()}
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return replace(value, **{f.name: _map(getattr(value, f.name), function) for f in fields(value)})
