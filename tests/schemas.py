"""Schemas and random batches that several test modules share."""

from typing import Any

import torch
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, Targets
from deep_components.schema import RECFLOW_IDS, SIDES, Field, Schema, recflow_schema

RECFLOW = recflow_schema(dict.fromkeys(RECFLOW_IDS, 20))

# A log of one's own: numbers on every side, two request fields that share a table with items, a table with an unknown
# row, and history fields that are not the items' leading ones.
OWN = Schema(
    (
        Field("city", "request", size=7),
        Field("home", "request", size=7, table="city"),
        Field("spent", "request", "number"),
        Field("weight", "history", "number"),
        Field("product", "history", size=12, unknown=1),
        Field("price", "item", "number"),
        Field("shop", "item", size=5, padding=2),
        Field("product", "item", size=12, unknown=1),
        Field("place", "item", size=7, table="city"),
    )
)
SCHEMAS = {"recflow": RECFLOW, "own": OWN}


def random_batch(
    schema: Schema, requests: int = 3, num_items: int = 5, length: int = 4, seed: int = 0, limit: int | None = None
) -> CascadeBatch[Features]:
    """Indices of all rows of the tables, or below ``limit``; histories are padded with 0 on the left."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"request": (requests,), "history": (requests, length), "item": (requests, num_items)}
    events = torch.randint(0, length + 1, (requests, 1), generator=generator)
    history_mask = torch.arange(length) >= length - events

    def column(field: Field) -> Tensor:
        shape: tuple[int, ...] = (*shapes[field.side], field.length) if field.length else shapes[field.side]
        if field.kind == "number":
            values: Tensor = torch.randn(shape, generator=generator)
        else:
            values = torch.randint(0, min(field.size, limit or field.size), shape, generator=generator)
        there = history_mask.unsqueeze(-1) if field.length else history_mask
        return values * there if field.side == "history" else values

    sides: dict[str, Any] = {side: {field.name: column(field) for field in schema.side(side)} for side in SIDES}
    shape = (requests, num_items)
    return CascadeBatch(
        request_id=torch.arange(requests),
        features=Features(**sides, history_mask=history_mask),
        targets=Targets(
            labels=torch.randint(0, 30, shape, generator=generator),
            mask=torch.rand(shape, generator=generator) < 0.9,
            group=torch.arange(num_items).mul(4).div(num_items, rounding_mode="floor").expand(shape),
        ),
    )
