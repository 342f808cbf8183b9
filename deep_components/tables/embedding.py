"""One embedding table per field, owned by one stage: shared code, never shared weights."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_components.batch import HISTORY_FIELDS, ITEM_FIELDS, PADDING_INDEX, REQUEST_FIELDS, Features, table_ids
from deep_components.kernels import Kernels, TableUse
from deep_components.tables.id_set import IdSet

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
        ids: fields whose table is compacted: it has a row for each of these ids, in their order, and features name its
            rows.

    Attributes:
        gathered: for the time of a step, fields whose look-ups go to these rows [U, d] instead of the table: features
            name places in it, and row 0 is the padding.
        kernels: the compiled look-up, for tables on a CPU.
    """

    def __init__(self, vocabulary: Mapping[str, int], dim: int, ids: Mapping[str, IdSet] | None = None) -> None:
        super().__init__()
        self.dim, self.ids = dim, dict(ids or {})
        self.gathered: dict[str, Tensor] = {}
        self.kernels: Kernels | None = None
        self.rows = {field: vocabulary[field] + 2 for field in ID_FIELDS} | TIME_ROWS
        self.rows |= {field: len(known) for field, known in self.ids.items()}
        for field, rows in self.rows.items():
            self.register_parameter(field, nn.Parameter(torch.empty(rows, dim)))

    @torch.no_grad()
    def initialise(self, seed: int, stage: str) -> None:
        """Draw every row from N(0, 1) as a function of (seed, stage, field, id) alone; the padding row is zero."""
        for field, rows in self.rows.items():
            ids = self.ids[field].ids() if field in self.ids else np.arange(rows)
            fill_initial_rows(self.get_parameter(field), seed, f"{stage}.{field}", ids, PADDING_INDEX.get(field, 0))

    def padding_row(self, field: str) -> int:
        """The row that features name for padding."""
        padding = PADDING_INDEX.get(field, 0)
        if field in self.gathered:
            return 0
        return int(self.ids[field].rows(np.array([padding]))[0]) if field in self.ids else padding

    def forward(self, features: Features) -> Embedded:
        """Look up all fields."""
        tables = {field: self.gathered.get(field, self.get_parameter(field)) for field in self.rows}
        if self.kernels is not None:
            paddings = {field: self.padding_row(field) for field in self.rows}
            uses = list(_uses(features, paddings))
            (batch, length, _), num_items = features.history.shape, features.items.shape[1]
            user, history, items = _CompiledLookup.apply(self.kernels, uses, list(tables), *tables.values())
            return Embedded(user, history.view(batch, length, -1), items.view(batch, num_items, -1))
        return self._look_up(features, tables)

    def _look_up(self, features: Features, tables: Mapping[str, Tensor]) -> Embedded:
        """By PyTorch's operators; a table used by several inputs is read once."""
        (batch, length, _), num_items = features.history.shape, features.items.shape[1]
        looked_up = {
            field: F.embedding(table_ids(features, field), table, padding_idx=self.padding_row(field))
            for field, table in tables.items()
        }
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


class _Use(NamedTuple):
    """One use of a table: where its ids stand, and where the rows go."""

    field: str
    part: int  # 0 user side, 1 history, 2 items
    place: int  # of the field within the part
    ids: Tensor  # [n] int64, strided
    padding: int


_PARTS = (REQUEST_FIELDS, HISTORY_FIELDS, ITEM_FIELDS)


def _uses(features: Features, paddings: Mapping[str, int]) -> Iterator[_Use]:
    for place, field in enumerate(REQUEST_FIELDS):
        yield _Use(field, 0, place, getattr(features, field), paddings[field])
    for part, ids in ((1, features.history), (2, features.items)):
        columns = ids.reshape(-1, ids.shape[-1]).unbind(dim=1)
        for place, field in enumerate(_PARTS[part]):
            yield _Use(field, part, place, columns[place], paddings[field])


class _CompiledLookup(torch.autograd.Function):
    """All look-ups of a stage, written where they are used: user side [B, 8d], history [B L, 5d], items [B N, 8d]."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, uses: list[_Use], fields: list[str], *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.kernels, ctx.uses, ctx.fields = kernels, uses, fields
        ctx.shapes = [table.shape for table in tables]
        by_field, dim = dict(zip(fields, tables, strict=True)), tables[0].shape[1]
        outputs = tuple(
            tables[0].new_empty(next(len(use.ids) for use in uses if use.part == part), len(names) * dim)
            for part, names in enumerate(_PARTS)
        )
        kernels.gather([_table_use(use, by_field[use.field].detach(), outputs[use.part]) for use in uses])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Of every table; its uses are added up in their order, whatever the number of threads."""
        dense = [gradient.contiguous() for gradient in gradients]
        tables = {field: dense[0].new_zeros(shape) for field, shape in zip(ctx.fields, ctx.shapes, strict=True)}
        by_table = sorted(ctx.uses, key=lambda use: ctx.fields.index(use.field))  # stable: a table's stay in order
        ctx.kernels.scatter_add([_table_use(use, tables[use.field], dense[use.part]) for use in by_table])
        return (None, None, None, *tables.values())


def _table_use(use: _Use, table: Tensor, part: Tensor) -> TableUse:
    dim = table.shape[1]
    return TableUse(table, use.ids, part[:, use.place * dim : (use.place + 1) * dim], use.padding)


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


@torch.no_grad()
def fill_initial_rows(table: Tensor, seed: int, name: str, ids: np.ndarray, padding: int) -> None:
    """Write the initial value of each id to its row; zero for the padding id. ``name`` is "<stage>.<field>"."""
    for first in range(0, len(ids), _ROWS_PER_CHUNK):
        chunk = ids[first : first + _ROWS_PER_CHUNK]
        table[first : first + len(chunk)] = initial_rows(seed, name, chunk, table.shape[1])
    table[torch.from_numpy(np.flatnonzero(ids == padding))] = 0


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
