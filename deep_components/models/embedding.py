"""One embedding table per field, owned by one stage: shared code, never shared weights."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_components.batch import HISTORY_FIELDS, ITEM_FIELDS, PADDING_INDEX, REQUEST_FIELDS, Features

ID_FIELDS = tuple(field for field in (*REQUEST_FIELDS, *HISTORY_FIELDS) if field not in ("weekday", "hour", "minute"))
TIME_ROWS = {"weekday": 9, "hour": 26, "minute": 62}  # shared by request time and upload time

_ROWS_PER_CHUNK = 1 << 18  # bounds the temporary memory of the initialisation


class Embedded(NamedTuple):
    """Looked-up features; d is the embedding dimension."""

    user: Tensor  # [B, 8d] in the order of REQUEST_FIELDS
    history: Tensor  # [B, L, 5d] in the order of HISTORY_FIELDS
    items: Tensor  # [B, N, 8d] in the order of ITEM_FIELDS


class FieldEmbedding(nn.Module):
    """Embedding tables of all fields: ``vocabulary[field] + 2`` rows each, TIME_ROWS for the time fields.

    A field's padding row is zero and gets no gradient. Rows start from N(0, 1).

    Args:
        vocabulary: number of distinct ids of every field of ID_FIELDS.
        dim: embedding dimension d.
    """

    def __init__(self, vocabulary: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.sparse: frozenset[str] = frozenset()  # fields whose table gets a sparse gradient
        self.rows = {field: vocabulary[field] + 2 for field in ID_FIELDS} | TIME_ROWS
        for field, rows in self.rows.items():
            self.register_parameter(field, nn.Parameter(torch.empty(rows, dim)))

    @torch.no_grad()
    def initialise(self, seed: int, stage: str) -> None:
        """Draw every row from N(0, 1) as a function of (seed, stage, field, row) alone; the padding row is zero."""
        for field, rows in self.rows.items():
            table = self.get_parameter(field)
            for first in range(0, rows, _ROWS_PER_CHUNK):
                ids = np.arange(first, min(first + _ROWS_PER_CHUNK, rows))
                table[first : first + len(ids)] = initial_rows(seed, f"{stage}.{field}", ids, self.dim)
            table[PADDING_INDEX.get(field, 0)] = 0

    def forward(self, features: Features) -> Embedded:
        """Look up all fields; a table used by several inputs is read once."""
        batch, length, _ = features.history.shape
        looked_up = {
            field: F.embedding(
                table_ids(features, field),
                self.get_parameter(field),
                padding_idx=PADDING_INDEX.get(field, 0),
                sparse=field in self.sparse,
            )
            for field in self.rows
        }
        num_items = features.items.shape[1]
        return Embedded(
            user=torch.cat([looked_up[field][:batch] for field in REQUEST_FIELDS], dim=-1),
            history=torch.cat(
                [looked_up[field][: batch * length].view(batch, length, self.dim) for field in HISTORY_FIELDS], dim=-1
            ),
            items=torch.cat(
                [looked_up[field][-batch * num_items :].view(batch, num_items, self.dim) for field in ITEM_FIELDS],
                dim=-1,
            ),
        )


def table_ids(features: Features, field: str) -> Tensor:
    """All rows of a field's table that the features name: of the requests, then the histories, then the items. [n]."""
    parts = [getattr(features, field)] if field in REQUEST_FIELDS else []
    if field in HISTORY_FIELDS:
        parts.append(features.history[..., HISTORY_FIELDS.index(field)].flatten())
    if field in ITEM_FIELDS:
        parts.append(features.items[..., ITEM_FIELDS.index(field)].flatten())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def mean_history(history: Tensor, history_mask: Tensor) -> Tensor:
    """Sum of all L history embeddings divided by max(number of events, 1).

    Padding positions take part in the sum: they look up row 0, which is zero in every table but category_one's.

    Args:
        history: [B, L, 5d].
        history_mask: [B, L] bool.

    Returns:
        [B, 5d].
    """
    events = history_mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [B, 1]
    return history.sum(dim=1) / events.to(history.dtype)


def initial_rows(seed: int, table: str, ids: np.ndarray, dim: int) -> Tensor:
    """Rows of a table's initial value, N(0, 1), each a function of (seed, table, id) alone.

    A counter-based generator (splitmix64 of the key and the counter, then Box-Muller) instead of a stream: adding or
    leaving out ids never changes another id's row.

    Returns:
        float64 [len(ids), dim].
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{table}".encode()).digest()[:8], np.uint64)
    counters = (ids.astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)) * np.uint64(2)
    first = _uniform(key ^ _splitmix64(counters))
    second = _uniform(key ^ _splitmix64(counters + np.uint64(1)))
    return torch.from_numpy(np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that mixes all bits."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _uniform(words: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1] from 64-bit words, which are mixed once more."""
    return ((_splitmix64(words) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
