"""BatchRows against numpy.unique, for random batches with and without compacted tables."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deep_components.batch import (
    HISTORY_FIELDS,
    ITEM_FIELDS,
    PADDING_INDEX,
    REQUEST_FIELDS,
    CascadeBatch,
    Features,
    Targets,
    table_ids,
)
from deep_components.tables.id_set import IdSet
from deep_components.tables.rows import BatchRows

FIELDS = ("video", "author", "category_one", "user", "hour")
some = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def random_batch(seed: int, requests: int, num_items: int, length: int, rows: int) -> CascadeBatch:
    """Ids from 0 .. rows - 1 in every field."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, rows, shape, generator=generator)

    return CascadeBatch(
        request_id=torch.arange(requests),
        features=Features(
            **{field: ids(requests) for field in REQUEST_FIELDS},
            history=ids(requests, length, len(HISTORY_FIELDS)),
            history_mask=ids(requests, length) > 0,
            items=ids(requests, num_items, len(ITEM_FIELDS)),
        ),
        targets=Targets(ids(requests, num_items), ids(requests, num_items) > 0, torch.zeros(num_items).long()),
    )


batches = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    requests=st.integers(1, 5),
    num_items=st.sampled_from([1, 2, 7]),
    length=st.sampled_from([1, 3]),
    rows=st.sampled_from([3, 4, 9, 200]),
)
paddings = {field: PADDING_INDEX.get(field, 0) for field in FIELDS}
listing = BatchRows({}, dict.fromkeys(FIELDS, 200), paddings)  # one for all: a batch must not see the one before


@some
@given(batch=batches)
def test_places_point_to_the_same_rows(batch: CascadeBatch) -> None:
    found = listing(batch)
    assert set(found.distinct) == set(FIELDS)
    for field, rows in found.distinct.items():
        places, before = table_ids(found.features, field), table_ids(batch.features, field)
        assert places.dtype == rows.dtype == torch.int64
        assert torch.equal(rows[places], before)
        assert set(rows.tolist()) == set(np.unique(before)) | {paddings[field]}
        assert len(set(rows.tolist())) == len(rows)


@some
@given(batch=batches)
def test_place_0_is_the_padding_and_the_others_stand_in_the_order_of_their_first_use(batch: CascadeBatch) -> None:
    for field, rows in listing(batch).distinct.items():
        assert rows.tolist() == list(dict.fromkeys([paddings[field], *table_ids(batch.features, field).tolist()]))


@some
@given(batch=batches)
def test_all_else_stays_as_it_was(batch: CascadeBatch) -> None:
    copied = [tensor.clone() for tensor in batch.tensors()]
    found = listing(batch)
    assert all(torch.equal(one, other) for one, other in zip(batch.tensors(), copied, strict=True))
    for field in {*REQUEST_FIELDS, *HISTORY_FIELDS, *ITEM_FIELDS} - set(FIELDS):
        assert torch.equal(table_ids(found.features, field), table_ids(batch.features, field)), field
    assert found.request_id is batch.request_id and found.targets is batch.targets
    assert torch.equal(found.features.history_mask, batch.features.history_mask)


@some
@given(batch=batches)
def test_sorting_on_the_device_gives_the_same_but_for_the_order(batch: CascadeBatch) -> None:
    for field in FIELDS:
        ids = table_ids(batch.features, field)
        rows, places = listing._distinct_there(field, ids)  # what a CUDA tensor takes; runs on any device
        assert torch.equal(rows[places], ids) and rows[0] == paddings[field]
        assert sorted(rows.tolist()) == sorted(listing._distinct(field, ids)[0].tolist())


@some
@given(batch=batches, compacted=st.sets(st.sampled_from(FIELDS)), both=st.booleans())
def test_rows_of_compacted_tables(batch: CascadeBatch, compacted: set[str], both: bool) -> None:
    ids = {
        field: IdSet.of([table_ids(batch.features, field).numpy(), np.array([0, paddings[field], 199])], 200)
        for field in compacted - {"hour"}
    }
    padding_rows = {f: int(ids[f].rows(np.array([paddings[f]]))[0]) if f in ids else paddings[f] for f in FIELDS}
    sizes = {field: len(ids[field]) if field in ids else 200 for field in FIELDS}
    found = BatchRows(ids, sizes if both else {}, padding_rows)(batch)
    for field in FIELDS:
        rows = table_ids(found.features, field).numpy()
        if both:
            assert found.distinct[field][0] == padding_rows[field]
            rows = found.distinct[field].numpy()[rows]
        back = ids[field].ids()[rows] if field in ids else rows
        assert np.array_equal(back, table_ids(batch.features, field))


def test_an_id_that_the_table_lacks() -> None:
    batch = random_batch(0, requests=4, num_items=5, length=3, rows=9)
    known = IdSet.of([table_ids(batch.features, "video").numpy()], 64)
    missing = next(i for i in range(9, 64))
    batch.features.items[0, 0, 0] = missing
    with pytest.raises(KeyError):
        BatchRows({"video": known}, {}, paddings)(batch)


@pytest.mark.parametrize("bad", [200, -1, -200, 2**40])
def test_a_row_that_the_table_lacks(bad: int) -> None:
    batch = random_batch(0, requests=4, num_items=5, length=3, rows=9)
    batch.features.items[1, 2, 0] = bad
    with pytest.raises(IndexError):
        listing(batch)


def test_without_tables_to_rewrite_the_batch_is_handed_on() -> None:
    batch = random_batch(0, requests=2, num_items=3, length=1, rows=9)
    nothing: dict[str, Any] = {}
    assert BatchRows(nothing, nothing, paddings)(batch) is batch
