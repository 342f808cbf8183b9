"""TableLookup against numpy.unique, for random batches with and without compacted tables."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.errors import InputError
from deep_components.schema import SIDES, Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup, distinct, table_uses
from tests.schemas import OWN, RECFLOW, random_batch

some = settings(max_examples=30, deadline=None, derandomize=True, database=None)
batches = st.tuples(
    st.sampled_from([RECFLOW, OWN]),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([1, 3]),
).map(lambda drawn: (drawn[0], random_batch(drawn[0], *drawn[2:], seed=drawn[1])))
Drawn = tuple[Schema, CascadeBatch[Features]]
# One for all batches of a schema: a batch must not see the one before.
listing = {id(schema): TableLookup(schema, {}, {t: table.size for t, table in schema.tables.items()})
           for schema in (RECFLOW, OWN)}  # fmt: skip


def all_ids(schema: Schema, features: Features | RowFeatures | SlotFeatures, table: str) -> Tensor:
    """The ids of a table's fields: of the requests, then the histories, then the items."""
    fields = [(side, field.name) for side in SIDES for field in schema.side(side) if field.table == table]
    return torch.cat([getattr(features, side)[name].flatten() for side, name in fields])


def slots_of(lookup: TableLookup, batch: CascadeBatch[Features]) -> SlotFeatures:
    features = lookup(batch).features
    assert isinstance(features, SlotFeatures)
    return features


@some
@given(drawn=batches)
def test_slots_count_the_distinct_rows_padding_first_then_by_first_use(drawn: Drawn) -> None:
    schema, batch = drawn
    found = slots_of(listing[id(schema)], batch)
    assert set(found.rows) == set(schema.tables)
    for table, rows in found.rows.items():
        slots, before = all_ids(schema, found, table), all_ids(schema, batch.features, table)
        assert slots.dtype == rows.dtype == torch.int64
        assert torch.equal(rows[slots], before)
        assert rows.tolist() == list(dict.fromkeys([schema.tables[table].padding, *before.tolist()]))


@some
@given(drawn=batches)
def test_all_else_stays_as_it_was(drawn: Drawn) -> None:
    schema, batch = drawn
    copied = [tensor.clone() for tensor in batch.tensors()]
    table = next(iter(schema.tables))
    found = TableLookup(schema, {}, {table: schema.tables[table].size})(batch)
    assert all(torch.equal(one, other) for one, other in zip(batch.tensors(), copied, strict=True))
    for field in schema.fields:
        if field.table != table:
            assert torch.equal(
                getattr(found.features, field.side)[field.name], getattr(batch.features, field.side)[field.name]
            )
    assert found.request_id is batch.request_id and found.targets is batch.targets
    assert torch.equal(found.features.history_mask, batch.features.history_mask)


@some
@given(drawn=batches)
def test_sorting_on_the_device_gives_the_same_but_for_the_order(drawn: Drawn) -> None:
    schema, batch = drawn
    for table in schema.tables:
        ids, lookup = all_ids(schema, batch.features, table), listing[id(schema)]
        rows, slots = lookup._distinct_sorted(table, ids)  # what a CUDA tensor takes; runs on any device
        assert torch.equal(rows[slots], ids) and rows[0] == schema.tables[table].padding
        assert sorted(rows.tolist()) == sorted(lookup._distinct(table, ids)[0].tolist())


@some
@given(drawn=batches, parts=st.integers(2, 5))
def test_rows_by_part(drawn: Drawn, parts: int) -> None:
    """Each part's rows stand together, from the padding row's part on, whatever row that is."""
    schema, batch = drawn
    sizes = {table: schema.tables[table].size for table in schema.tables}
    found = slots_of(TableLookup(schema, {}, sizes, parts), batch)
    for table in schema.tables:
        rows, ids = found.rows[table], all_ids(schema, batch.features, table)
        assert torch.equal(rows[all_ids(schema, found, table)], ids)
        padding = schema.tables[table].padding
        assert set(rows.tolist()) == {padding, *ids.tolist()} and len(rows) == len(rows.unique())
        part = (rows - padding) % parts
        assert rows[0] == padding and torch.equal(part, part.sort()[0])


@given(keys=st.lists(st.integers(0, 12) | st.integers(0, 1 << 40), max_size=30))
def test_distinct_keys(keys: list[int]) -> None:
    first, which = distinct(np.array(keys, np.int64))
    assert [keys[i] for i in first] == sorted(set(keys))
    assert [keys.index(keys[i]) for i in range(len(keys))] == [int(first[k]) for k in which]


@some
@given(drawn=batches, data=st.data())
def test_rows_of_compacted_tables(drawn: Drawn, data: st.DataObject) -> None:
    schema, batch = drawn
    compacted = data.draw(st.sets(st.sampled_from(sorted(schema.tables))))
    ids = {}
    for table in compacted:
        own, size = schema.tables[table], schema.tables[table].size
        ids[table] = IdSet.of([all_ids(schema, batch.features, table).numpy(), np.array([own.padding, size - 1])], size)
    sizes = {table: len(ids[table]) if table in ids else schema.tables[table].size for table in schema.tables}
    found = slots_of(TableLookup(schema, ids, sizes), batch)
    rows_only = TableLookup(schema, ids, {}).rows(batch).features
    for table in schema.tables:
        rows = found.rows[table][all_ids(schema, found, table)].numpy()
        assert rows.tolist() == all_ids(schema, rows_only, table).tolist()
        back = ids[table].ids()[rows] if table in ids else rows
        assert back.tolist() == all_ids(schema, batch.features, table).tolist()


def test_an_id_never_seen_takes_the_unknown_row_where_there_is_one() -> None:
    batch = random_batch(OWN)
    product, city = OWN.tables["product"], OWN.tables["city"]
    assert (product.unknown, city.unknown) == (1, None)
    rows = TableLookup(OWN, {"product": IdSet.of([np.array([0, 1, 5])], product.size)}, {}).rows(batch).features
    expected = {0: 0, 1: 1, 5: 2}
    for side, name in table_uses(OWN)["product"]:
        before, found = (getattr(features, side)[name] for features in (batch.features, rows))
        assert found.tolist() == [[expected.get(i, 1) for i in row] for row in before.tolist()]
    with pytest.raises(InputError, match="lacks an id that the day uses"):
        TableLookup(OWN, {"city": IdSet.of([np.array([0])], city.size)}, {}).rows(batch)


@pytest.mark.parametrize("bad", [22, -1, -20, 2**40])
def test_a_row_that_the_table_lacks(bad: int) -> None:
    batch = random_batch(RECFLOW)
    batch.features.item["video"][1, 2] = bad
    with pytest.raises(IndexError):
        listing[id(RECFLOW)](batch)
