"""List fields: the mean of their values' rows, its gradient and Adam's steps, against torch.nn.EmbeddingBag."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_components.batch import CascadeBatch, Features
from deep_components.kernels import load_kernels
from deep_components.schema import SIDES, Field, Schema
from deep_components.tables.deferred_adam import DeferredAdam
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore
from tests.schemas import random_batch

# Lists on every side, one of them of one value, and single values that share the lists' tables.
LISTS = Schema(
    (
        Field("likes", "request", size=9, table="genre", length=3, padding=4),
        Field("spent", "request", "number"),
        Field("tags", "history", size=40, table="tag", length=5),
        Field("genre", "history", size=9, padding=4),
        Field("genres", "item", size=9, table="genre", length=2, padding=4),
        Field("price", "item", "number"),
        Field("tags", "item", size=40, table="tag", length=4),
        Field("tag", "item", size=40),
        Field("brands", "item", size=7, table="brand", length=1, unknown=1),
    )
)
CPU = torch.device("cpu")
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}
both_look_ups = pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
pytestmark = pytest.mark.usefixtures("short_rules")


def batch_of_lists(seed: int = 0, requests: int = 4) -> CascadeBatch[Features]:
    """Lists of 0 to all of their values, not always the first ones."""
    batch = random_batch(LISTS, requests, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for field in LISTS.fields:
        side = getattr(batch.features, field.side)
        if field.length:
            there = torch.rand(side[field.name].shape, generator=generator) < 0.6
            side[field.name] = torch.where(there, side[field.name], field.padding)
    return batch


def store_of(dim: int, dtype: torch.dtype, compiled: bool, ids: Mapping[str, IdSet] | None = None) -> EmbeddingStore:
    store = EmbeddingStore("rank", LISTS, dim, ids).to(CPU, dtype)
    store.initialise(7)
    store.kernels = load_kernels(dtype) if compiled else None
    return store


def expected(batch: CascadeBatch[Features], tables: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Every side by nn.functional.embedding_bag: a single value is a bag of one."""
    sides = {}
    for side in SIDES:
        parts = []
        for field in LISTS.side(side):
            values = getattr(batch.features, side)[field.name]
            if not field.table:
                parts.append(values.to(tables["tag"].dtype).unsqueeze(-1))
                continue
            bags = values if field.length else values.unsqueeze(-1)
            mean = nn.functional.embedding_bag(
                bags.reshape(-1, bags.shape[-1]), tables[field.table], mode="mean", padding_idx=field.padding
            )
            parts.append(mean.view(*bags.shape[:-1], dim))
        sides[side] = torch.cat(parts, dim=-1)
    return sides


def leaves(store: EmbeddingStore) -> dict[str, Tensor]:
    return {name: table.detach().clone().requires_grad_() for name, table in store.tables.items()}


@both_look_ups
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [3, 8])
def test_a_list_is_the_mean_of_its_values_and_so_is_its_gradient(dim: int, dtype: torch.dtype, compiled: bool) -> None:
    store, batch = store_of(dim, dtype, compiled), batch_of_lists()
    wanted_tables = leaves(store)
    wanted = expected(batch, wanted_tables, dim)
    found = store.embed(TableLookup(LISTS, {}, {}).rows(batch).features)
    upstream = {side: torch.randn_like(wanted[side]) for side in SIDES}
    for side in SIDES:
        torch.testing.assert_close(getattr(found, side), wanted[side], **TOLERANCE[dtype])
    for sides in (vars(found), wanted):
        torch.stack([(sides[side] * upstream[side]).sum() for side in SIDES]).sum().backward()
    for name, table in store.tables.items():
        torch.testing.assert_close(table.grad, wanted_tables[name].grad, **TOLERANCE[dtype])
        assert table.grad is not None and not table.grad[LISTS.tables[name].padding].any()


def test_the_mean_written_out() -> None:
    """Also of a list without a value, and of one that names a value twice."""
    store, batch = store_of(3, torch.float64, compiled=False), random_batch(LISTS, 1, num_items=3)
    tag = store.tables["tag"].detach()
    batch.features.item["tags"][:] = torch.tensor([[[7, 0, 7, 9], [0, 0, 0, 0], [0, 0, 0, 3]]])
    mine = [(tag[7] + tag[7] + tag[9]) / 3, tag[7] * 0, tag[3]]
    for compiled in (False, True):
        store.kernels = load_kernels(torch.float64) if compiled else None
        items = store.embed(TableLookup(LISTS, {}, {}).rows(batch).features).item[0].detach()
        torch.testing.assert_close(items[:, LISTS.slices("item", 3)["tags"]], torch.stack(mine))


@both_look_ups
def test_gradients_are_numerical_derivatives(compiled: bool) -> None:
    store, batch = store_of(3, torch.float64, compiled), batch_of_lists(seed=3)
    features = TableLookup(LISTS, {}, {}).rows(batch).features
    for name, table in list(store.tables.items()):
        free = torch.ones(len(table), 1, dtype=torch.float64)
        free[LISTS.tables[name].padding] = 0  # which stays zero

        def looked_up(values: Tensor, name: str = name, free: Tensor = free) -> tuple[Tensor, ...]:
            store.tables[name] = values * free  # type: ignore[assignment]
            found = store.embed(features)
            return found.request, found.history, found.item

        torch.autograd.gradcheck(looked_up, (table.detach().clone().requires_grad_(),))
        store.tables[name] = table


@both_look_ups
def test_deferred_adam_trains_lists_as_dense_adam_does(compiled: bool) -> None:
    """The pulled rows of compacted tables, where rows and slots are other numbers than the log's ids."""
    dim, lr = 4, 0.05
    batches = [batch_of_lists(seed) for seed in range(6)]
    known = {"tag": IdSet.of([torch.arange(40).numpy()], 40)}
    store = store_of(dim, torch.float64, compiled, known)
    lookup = TableLookup(LISTS, known, {"tag": 40, "genre": 9})
    for table in ("tag", "genre"):
        store.optimizers[table] = DeferredAdam(store.tables[table], lr=lr, kernels=store.kernels)
    dense = leaves(store)
    adam = torch.optim.Adam([dense["tag"], dense["genre"]], lr=lr)
    for batch in batches:
        features = lookup(batch).features
        pulled = {table: store.pull(table, rows).requires_grad_() for table, rows in features.rows.items()}
        found, wanted = store.embed(features, pulled), expected(batch, dense, dim)
        adam.zero_grad()
        for sides in (vars(found), wanted):
            torch.stack([(sides[side] ** 2).sum() + sides[side].sum() for side in SIDES]).sum().backward()
        for table, rows in features.rows.items():
            gradient = pulled[table].grad
            assert gradient is not None
            store.push(table, rows, gradient)
        adam.step()
    store.flush()
    for table in ("tag", "genre"):
        torch.testing.assert_close(store.tables[table].detach(), dense[table].detach(), rtol=0, atol=1e-6)
        assert not store.tables[table][LISTS.tables[table].padding].any()


@both_look_ups
def test_a_value_beyond_its_table(compiled: bool) -> None:
    for bad in (9, -1, 2**40):
        store, batch = store_of(3, torch.float64, compiled), batch_of_lists()
        batch.features.item["genres"][1, 2, 1] = bad
        with pytest.raises(IndexError):
            store.embed(TableLookup(LISTS, {}, {}).rows(batch).features)


def test_values_never_seen_take_the_unknown_row() -> None:
    batch = random_batch(LISTS)
    batch.features.item["brands"][:] = torch.arange(7).repeat(3)[:15].view(3, 5, 1)
    rows = TableLookup(LISTS, {"brand": IdSet.of([torch.tensor([0, 1, 5]).numpy()], 7)}, {}).rows(batch).features
    assert rows.item["brands"].flatten()[:7].tolist() == [0, 1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    store, batch = store_of(8, torch.float32, compiled=True), batch_of_lists(requests=33)
    before, found = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            embedded = store.embed(TableLookup(LISTS, {}, {}).rows(batch).features)
            (embedded.item.sin().sum() + embedded.history.sin().sum() + embedded.request.sum()).backward()
        finally:
            torch.set_num_threads(before)
        found.append([embedded.item.detach(), *(table.grad for table in store.tables.values())])
        for table in store.tables.values():
            table.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
