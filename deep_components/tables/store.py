"""The embedding tables of a stage: looked up whole, or pulled and pushed row by row.

A small table is a parameter like any other. A large one costs what a step touches of it: :meth:`EmbeddingStore.pull`
gives the current values of a batch's distinct rows, the models compute with these, and :meth:`EmbeddingStore.push`
takes their gradients back. Where a row lies, and how it trains, is known here alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures, RowFeatures, SlotFeatures
from deep_components.cascade import Cascade
from deep_components.kernels import Kernels, TableUse
from deep_components.schema import SIDES, Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.initial import fill_initial_rows
from deep_components.tables.lookup import padding_row, table_uses


class RowOptimizer(Protocol):
    """Trains the rows of one table that a step touches."""

    def gather(self, rows: Tensor) -> Tensor:
        """The current values [U, d] of distinct rows [U] int64."""

    def peek(self, rows: Tensor) -> Tensor:
        """As :meth:`gather`, to the bit, but it changes nothing."""

    def values(self) -> Tensor:
        """The current values [rows, d] of the whole table, to be read only; nothing is changed."""

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One optimizer step of the table; ``gradient`` [U, d] belongs to rows that :meth:`gather` gave."""

    def flush(self) -> None:
        """Bring every row up to date."""

    def state(self) -> dict[str, Tensor]:
        """What the optimizer keeps of the table, by name."""

    def restore(self, state: Mapping[str, Tensor], rows: Tensor | None) -> None:
        """The reverse; ``rows`` are those of the saved ones in this table, None when they are all, in order."""


class EmbeddingStore:
    """The tables of one stage: shared code, never shared weights.

    ``stage`` says whose tables these are; with a seed it determines the initial values. ``dim`` is the embedding
    dimension d. ``ids``: the compacted tables, a row for each of these indices of the log, in their order.

    Attributes: ``tables``, name -> parameter [rows, d], whose padding row is zero and gets no gradient; ``optimizers``
    of the tables that are pulled and pushed; ``kernels``, the compiled look-up, for tables on a CPU.
    """

    def __init__(self, stage: str, schema: Schema, dim: int, ids: Mapping[str, IdSet] | None = None) -> None:
        self.stage, self.schema, self.dim, self.ids = stage, schema, dim, dict(ids or {})
        self.rows = {
            name: len(self.ids[name]) if name in self.ids else table.size for name, table in schema.tables.items()
        }
        self.tables = {name: nn.Parameter(torch.empty(rows, dim)) for name, rows in self.rows.items()}
        self.dtype = torch.get_default_dtype()
        self.optimizers: dict[str, RowOptimizer] = {}
        self.kernels: Kernels | None = None
        self._uses = table_uses(schema)
        self._slices = {side: schema.slices(side, dim) for side in SIDES}
        self._widths = {side: schema.width(side, dim) for side in SIDES}
        self._lists = {(field.side, field.name) for field in schema.fields if field.length}
        self._numbers = [(field.side, field.name) for field in schema.fields if not field.table]
        self._padding = {name: padding_row(schema, self.ids, name) for name in self.rows}

    def pull(self, table: str, rows: Tensor) -> Tensor:
        """The current values [U, d], without gradient, of distinct rows [U] int64 of a table."""
        if table in self.optimizers:
            return self.optimizers[table].gather(rows)
        values = self.tables[table].detach()
        return values[rows.to(values.device)]

    def peek(self, table: str, rows: Tensor) -> Tensor:
        """As :meth:`pull`, but for those who only look: no later step changes by it."""
        if table in self.optimizers:
            return self.optimizers[table].peek(rows)
        values = self.tables[table].detach()
        return values[rows.to(values.device)]

    def values(self, table: str) -> Tensor:
        """The current values [rows, d] of a whole table, to be read only; no later step changes by it."""
        return self.optimizers[table].values() if table in self.optimizers else self.tables[table].detach()

    def push(self, table: str, rows: Tensor, gradients: Tensor) -> None:
        """One optimizer step of a table with an optimizer, with the gradients [U, d] of rows that were pulled; all
        other rows of the table have none."""
        self.optimizers[table].step(rows, gradients)

    def flush(self) -> None:
        """Bring all rows up to date: tables are then those of a dense optimizer."""
        for optimizer in self.optimizers.values():
            optimizer.flush()

    def embed(
        self, features: RowFeatures | SlotFeatures, pulled: Mapping[str, Tensor] | None = None
    ) -> EmbeddedFeatures:
        """Look up all fields of ``features``, which hold rows, or slots of the tables in ``pulled``: table -> values
        [U, d] of the distinct rows that ``features.rows`` lists. A list field gives the mean of its values' rows,
        padding left out, and 0 where it has no value. TypeError for another kind of id; IndexError for an id that is
        not one of its table's rows."""
        if not isinstance(features, RowFeatures | SlotFeatures):
            raise TypeError(f"{type(features).__name__} holds other ids than rows or slots; use TableLookup first")
        pulled = pulled or {}
        if isinstance(features, SlotFeatures) and features.rows.keys() != pulled.keys():
            raise TypeError("slots need the values of the rows that they count")
        tables = {name: pulled.get(name, table) for name, table in self.tables.items()}
        padding = {name: 0 if name in pulled else row for name, row in self._padding.items()}
        look_up = self._compiled if self.kernels is not None and tables else self._plain
        return EmbeddedFeatures(**look_up(features, tables, padding), history_mask=features.history_mask)

    def _plain(
        self, features: RowFeatures | SlotFeatures, tables: Mapping[str, Tensor], padding: Mapping[str, int]
    ) -> dict[str, Tensor]:
        columns: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
        for name, uses in self._uses.items():
            ids = [getattr(features, side)[field] for side, field in uses]
            rows = F.embedding(torch.cat([part.flatten() for part in ids]), tables[name], padding_idx=padding[name])
            for (side, field), part, values in zip(uses, ids, rows.split([part.numel() for part in ids]), strict=True):
                columns[side][field] = values.view(*part.shape, self.dim)
                if (side, field) in self._lists:
                    there = (part != padding[name]).sum(dim=-1, keepdim=True).clamp(min=1)
                    columns[side][field] = columns[side][field].sum(dim=-2) / there  # the padding row is zero
        for side, field in self._numbers:
            columns[side][field] = getattr(features, side)[field].to(self.dtype).unsqueeze(-1)
        return {
            side: torch.cat([columns[side][name] for name in self._slices[side]], dim=-1)
            if columns[side]
            else features.history_mask.new_empty(self._shape(features, side), dtype=self.dtype)
            for side in SIDES
        }

    def _compiled(
        self, features: RowFeatures | SlotFeatures, tables: Mapping[str, Tensor], padding: Mapping[str, int]
    ) -> dict[str, Tensor]:
        def ids(side: str, field: str) -> Tensor:
            whole: Tensor = getattr(features, side)[field]
            return whole.reshape(-1, whole.shape[-1]) if (side, field) in self._lists else whole.reshape(-1)

        uses = [
            _Use(name, SIDES.index(side), self._slices[side][field], ids(side, field), padding[name])
            for name, listed in self._uses.items()
            for side, field in listed
        ]
        shapes = [self._shape(features, side) for side in SIDES]
        looked_up = _CompiledLookup.apply(self.kernels, uses, shapes, list(tables), *tables.values())
        outputs = dict(zip(SIDES, looked_up, strict=True))
        for side, field in self._numbers:
            outputs[side].detach()[..., self._slices[side][field]] = getattr(features, side)[field].unsqueeze(-1)
        return outputs

    def _shape(self, features: RowFeatures | SlotFeatures, side: str) -> tuple[int, ...]:
        """Of a side's embeddings."""
        batch, length = features.history_mask.shape
        items = next((ids.shape[1] for ids in features.item.values()), 0)
        return {"request": (batch,), "history": (batch, length), "item": (batch, items)}[side] + (self._widths[side],)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every row from N(0, 1) as a function of (seed, stage, table, id) alone; the padding row is zero."""
        for name, rows in self.rows.items():
            ids = self.ids[name].ids() if name in self.ids else np.arange(rows)
            fill_initial_rows(self.tables[name], seed, f"{self.stage}.{name}", ids, self.schema.tables[name].padding)

    def initial_values(self, table: str, ids: np.ndarray, seed: int) -> Tensor:
        """The initial values [n, d] of the log's indices ``ids`` [n] in a table, in the tables' type, on the CPU."""
        values = torch.empty(len(ids), self.dim, dtype=self.tables[table].dtype)
        fill_initial_rows(values, seed, f"{self.stage}.{table}", ids, self.schema.tables[table].padding)
        return values

    def to(self, device: torch.device, dtype: torch.dtype, host: Sequence[str] = ()) -> "EmbeddingStore":
        """Move the tables, but leave those of ``host`` in host memory; before an optimizer knows them."""
        for name, table in self.tables.items():
            moved = table.detach().to(device=torch.device("cpu") if name in host else device, dtype=dtype)
            self.tables[name] = nn.Parameter(moved)
        self.dtype = dtype
        return self


def build_stores(
    cascade: Cascade, schema: Schema, dim: int, seed: int | None, ids: Mapping[str, IdSet] | None = None
) -> dict[str, EmbeddingStore]:
    """A store for every stage, in serving order. With ``seed=None`` tables are left without values, for those that are
    about to be loaded."""
    stores = {stage: EmbeddingStore(stage, schema, dim, ids) for stage in cascade.stage_names}
    if seed is not None:
        for store in stores.values():
            store.initialise(seed)
    return stores


class _Use(NamedTuple):
    """One use of a table: its ids, and where the rows go."""

    table: str
    side: int
    columns: slice  # of the side's embeddings
    ids: Tensor  # [n], of a list field [n, G], int64
    padding: int


class _CompiledLookup(torch.autograd.Function):
    """All look-ups of a stage, written where they are used: one output a side, of the shapes given."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, uses: list[_Use], shapes: list[tuple[int, ...]], names: list[str], *tables: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.kernels, ctx.uses, ctx.names = kernels, uses, names
        ctx.shapes = [table.shape for table in tables]
        by_name = dict(zip(names, tables, strict=True))
        outputs = tuple(tables[0].new_empty(shape) for shape in shapes)
        kernels.gather([_table_use(use, by_name[use.table].detach(), outputs[use.side]) for use in uses])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Of every table; its uses are added up in their order, whatever the number of threads."""
        dense = [gradient.contiguous() for gradient in gradients]
        tables = {name: dense[0].new_zeros(shape) for name, shape in zip(ctx.names, ctx.shapes, strict=True)}
        ctx.kernels.scatter_add([_table_use(use, tables[use.table], dense[use.side]) for use in ctx.uses])
        return (None, None, None, None, *tables.values())


def _table_use(use: _Use, table: Tensor, side: Tensor) -> TableUse:
    return TableUse(table, use.ids, side.view(-1, side.shape[-1])[:, use.columns], use.padding)
