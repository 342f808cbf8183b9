"""EmbeddingStore: look-ups against indexing written out, pull and push, initial values, and ids of the wrong kind."""

from typing import Any

import numpy as np
import pytest
import torch

from deep_components.batch import RowFeatures, SlotFeatures
from deep_components.cascade import THREE_STAGE
from deep_components.kernels import load_kernels
from deep_components.schema import SIDES, Schema
from deep_components.tables.deferred_adam import DeferredAdam
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore, build_stores
from tests.schemas import OWN, RECFLOW, SCHEMAS, random_batch

DIM = 3
CPU = torch.device("cpu")
every_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
both_look_ups = pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])


def made(schema: Schema, compiled: bool = False, ids: dict[str, IdSet] | None = None) -> EmbeddingStore:
    store = EmbeddingStore("rank", schema, DIM, ids).to(CPU, torch.float64)
    store.initialise(7)
    store.kernels = load_kernels(torch.float64) if compiled else None
    return store


@every_schema
@both_look_ups
def test_rows_and_slots_look_up_what_indexing_gives(schema: Schema, compiled: bool) -> None:
    store, batch = made(schema, compiled), random_batch(schema)
    lookup = TableLookup(schema, {}, store.rows)
    slots = lookup(batch).features
    pulled = {table: store.pull(table, rows) for table, rows in slots.rows.items()}
    for found in (store.embed(lookup.rows(batch).features), store.embed(slots, pulled)):
        for side in SIDES:
            parts = [
                store.tables[f.table].detach()[getattr(batch.features, side)[f.name]]
                if f.table
                else getattr(batch.features, side)[f.name].double().unsqueeze(-1)
                for f in schema.side(side)
            ]
            assert torch.equal(getattr(found, side).detach(), torch.cat(parts, dim=-1)), side


@every_schema
@both_look_ups
def test_gradients_add_up_over_all_uses_and_leave_the_padding_out(schema: Schema, compiled: bool) -> None:
    store, batch = made(schema, compiled), random_batch(schema)
    found = store.embed(TableLookup(schema, {}, {}).rows(batch).features)
    upstream = {side: torch.randn_like(getattr(found, side)) for side in SIDES}
    sum((getattr(found, side) * upstream[side]).sum() for side in SIDES).backward()
    for name, table in schema.tables.items():
        expected = torch.zeros(table.size, DIM, dtype=torch.float64)
        for field in schema.fields:
            if field.table == name:
                ids = getattr(batch.features, field.side)[field.name].flatten()
                columns = schema.slices(field.side, DIM)[field.name]
                expected.index_add_(0, ids, upstream[field.side][..., columns].reshape(-1, DIM))
        expected[table.padding] = 0
        torch.testing.assert_close(store.tables[name].grad, expected)


def test_tables_have_the_rows_of_the_specification() -> None:
    sizes = {name: tuple(table.shape) for name, table in made(RECFLOW).tables.items()}
    times = {"weekday": 9, "hour": 26, "minute": 62}
    assert sizes == {name: (times.get(name, 22), DIM) for name in RECFLOW.tables}
    assert len(sizes) == 13


def test_ids_of_another_kind_are_refused() -> None:
    store, batch = made(RECFLOW), random_batch(RECFLOW)
    with pytest.raises(TypeError, match="Features holds other ids than rows or slots"):
        store.embed(batch.features)  # type: ignore[arg-type]
    slots: Any = TableLookup(RECFLOW, {}, store.rows)(batch).features
    with pytest.raises(TypeError, match="slots need the values"):
        store.embed(slots)
    assert isinstance(slots, SlotFeatures) and not isinstance(slots, RowFeatures)


@both_look_ups
def test_an_id_beyond_its_table(compiled: bool) -> None:
    store, batch = made(OWN, compiled), random_batch(OWN)
    batch.features.item["shop"][0, 0] = 5
    with pytest.raises(IndexError):
        store.embed(TableLookup(OWN, {}, {}).rows(batch).features)


def test_pull_and_push_train_the_rows_as_dense_adam_does() -> None:
    store, dense = made(OWN), made(OWN)
    store.optimizers["product"] = DeferredAdam(store.tables["product"], lr=0.1)
    adam = torch.optim.Adam([dense.tables["product"]], lr=0.1)
    for step in range(4):
        rows = torch.tensor([[0, 3], [5, 7], [3, 11], [2, 5]][step])
        gradient = torch.randn(2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        assert torch.allclose(store.pull("product", rows), dense.tables["product"].detach()[rows])
        store.push("product", rows, gradient)
        dense.tables["product"].grad = torch.zeros_like(dense.tables["product"]).index_copy(0, rows, gradient)
        adam.step()
    store.flush()
    torch.testing.assert_close(store.tables["product"], dense.tables["product"], rtol=0, atol=1e-7)


def test_compacted_tables_have_the_values_of_whole_ones() -> None:
    known = IdSet.of([np.array([0, 4, 11])], OWN.tables["product"].size)
    whole, compacted = made(OWN), made(OWN, ids={"product": known})
    assert torch.equal(compacted.tables["product"], whole.tables["product"][[0, 4, 11]])
    ids = np.array([11, 0, 2])
    assert torch.equal(compacted.initial_values("product", ids, 7), whole.tables["product"].detach()[ids])


def test_stages_start_from_different_values() -> None:
    stores = build_stores(THREE_STAGE, RECFLOW, DIM, seed=30)
    assert list(stores) == ["retrieval", "prerank", "rank"]
    videos = [store.tables["video"] for store in stores.values()]
    assert not torch.equal(videos[0], videos[1]) and not torch.equal(videos[1], videos[2])
