"""What a model sees and what a loss sees of a batch of requests.

Shapes: B requests, N items a request, L history positions. All ids are encoded (spec: index 0 is padding, 2 for
category_one); B may be any size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

REQUEST_FIELDS = ("weekday", "hour", "minute", "user", "device", "gender", "age", "province")
HISTORY_FIELDS = ("video", "author", "category_two", "category_one", "upload_type")
ITEM_FIELDS = (*HISTORY_FIELDS, "weekday", "hour", "minute")

PADDING_INDEX = {"category_one": 2}  # every other field pads with 0


@dataclass(frozen=True)
class Features:
    """Encoded inputs of the models. No labels."""

    weekday: Tensor  # [B] of the request, Monday = 1
    hour: Tensor  # [B] 1..24
    minute: Tensor  # [B] 1..60
    user: Tensor  # [B]
    device: Tensor  # [B]
    gender: Tensor  # [B]
    age: Tensor  # [B]
    province: Tensor  # [B]
    history: Tensor  # [B, L, 5] last dimension in the order of HISTORY_FIELDS
    history_mask: Tensor  # [B, L] bool, True where there is an event
    items: Tensor  # [B, N, 8] last dimension in the order of ITEM_FIELDS


@dataclass(frozen=True)
class Targets:
    """What the losses and metrics know of a batch. The label of a masked item is arbitrary."""

    labels: Tensor  # [B, N] int64, higher is better
    mask: Tensor  # [B, N] bool, False where the item is missing
    group: Tensor  # [N] int64, 0 = the ground-truth group


@dataclass(frozen=True)
class CascadeBatch:
    """B requests with all their items.

    ``distinct`` holds, for some fields, the distinct rows [U] of the field's table that the batch names; its ids in
    ``features`` are then places among them, and place 0 is the padding row.
    """

    request_id: Tensor  # [B] int64
    features: Features
    targets: Targets
    distinct: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "CascadeBatch":
        """The same batch with ``function`` applied to every tensor."""
        return CascadeBatch(
            request_id=function(self.request_id),
            features=Features(**{f.name: function(getattr(self.features, f.name)) for f in fields(Features)}),
            targets=Targets(**{f.name: function(getattr(self.targets, f.name)) for f in fields(Targets)}),
            distinct={name: function(rows) for name, rows in self.distinct.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which :meth:`apply` takes them."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.apply(note)
        return found

    def to(self, device: torch.device) -> "CascadeBatch":
        """The batch on ``device``, but for ``distinct``; from pinned memory the copy does not wait."""
        moved = self.apply(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, distinct=self.distinct)

    def pin_memory(self) -> "CascadeBatch":
        return self.apply(Tensor.pin_memory)


def table_ids(features: Features, name: str) -> Tensor:
    """All ids of a field in the features: of the requests, then the histories, then the items. [n]."""
    parts = [getattr(features, name)] if name in REQUEST_FIELDS else []
    if name in HISTORY_FIELDS:
        parts.append(features.history[..., HISTORY_FIELDS.index(name)].flatten())
    if name in ITEM_FIELDS:
        parts.append(features.items[..., ITEM_FIELDS.index(name)].flatten())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def with_table_ids(features: Features, new: Mapping[str, Tensor]) -> Features:
    """The features with other ids in some fields, given in the order of :func:`table_ids`."""
    history, items = features.history.clone(), features.items.clone()
    requests = {}
    for name, ids in new.items():
        sizes = (
            len(features.weekday) if name in REQUEST_FIELDS else 0,
            history[..., 0].numel() if name in HISTORY_FIELDS else 0,
            items[..., 0].numel() if name in ITEM_FIELDS else 0,
        )
        request, event, item = ids.split(sizes)
        if name in REQUEST_FIELDS:
            requests[name] = request
        if name in HISTORY_FIELDS:
            history[..., HISTORY_FIELDS.index(name)] = event.view(history.shape[:-1])
        if name in ITEM_FIELDS:
            items[..., ITEM_FIELDS.index(name)] = item.view(items.shape[:-1])
    return replace(features, **requests, history=history, items=items)
