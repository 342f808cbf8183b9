"""What a model sees and what a loss sees of a batch of requests.

Shapes: B requests, N items a request, L history positions. All ids are encoded (spec: index 0 is padding, 2 for
category_one); B may be any size.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

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
    """B requests with all their items."""

    request_id: Tensor  # [B] int64
    features: Features
    targets: Targets

    def apply(self, function: Callable[[Tensor], Tensor]) -> "CascadeBatch":
        """The same batch with ``function`` applied to every tensor."""
        return CascadeBatch(
            request_id=function(self.request_id),
            features=Features(**{f.name: function(getattr(self.features, f.name)) for f in fields(Features)}),
            targets=Targets(**{f.name: function(getattr(self.targets, f.name)) for f in fields(Targets)}),
        )

    def to(self, device: torch.device) -> "CascadeBatch":
        """The batch on ``device``; from pinned memory the copy does not wait."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CascadeBatch":
        return self.apply(Tensor.pin_memory)
