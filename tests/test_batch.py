"""Ids of a field in the features, and features with other ids."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deep_components.batch import (
    HISTORY_FIELDS,
    ITEM_FIELDS,
    REQUEST_FIELDS,
    CascadeBatch,
    Features,
    table_ids,
    with_table_ids,
)
from tests.tables.test_rows import batches, random_batch

FIELDS = sorted({*REQUEST_FIELDS, *HISTORY_FIELDS, *ITEM_FIELDS})
some = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def same(one: Features, other: Features) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


@pytest.mark.parametrize("field", FIELDS)
def test_all_ids_of_a_field_in_their_order(field: str) -> None:
    features = random_batch(0, requests=3, num_items=4, length=2, rows=100).features
    expected = getattr(features, field).tolist() if field in REQUEST_FIELDS else []
    if field in HISTORY_FIELDS:
        expected += [event[HISTORY_FIELDS.index(field)] for request in features.history.tolist() for event in request]
    if field in ITEM_FIELDS:
        expected += [item[ITEM_FIELDS.index(field)] for request in features.items.tolist() for item in request]
    assert table_ids(features, field).tolist() == expected


@some
@given(batch=batches, fields=st.sets(st.sampled_from(FIELDS)))
def test_what_is_put_in_comes_out_and_nothing_else_changes(batch: CascadeBatch, fields: set[str]) -> None:
    before = {field: table_ids(batch.features, field).clone() for field in FIELDS}
    new = {field: torch.arange(len(before[field])) + 1000 for field in fields}
    changed = with_table_ids(batch.features, new)
    for field in FIELDS:
        assert torch.equal(table_ids(changed, field), new.get(field, before[field]))
        assert torch.equal(table_ids(batch.features, field), before[field])
    assert same(with_table_ids(changed, before), batch.features)


def test_the_number_of_ids_must_fit() -> None:
    features = random_batch(0, requests=3, num_items=4, length=2, rows=9).features
    for field in ("user", "video", "hour"):
        with pytest.raises(RuntimeError):
            with_table_ids(features, {field: table_ids(features, field)[:-1]})


def test_apply_and_tensors_see_every_tensor_in_one_order() -> None:
    batch = replace(random_batch(0, 2, 3, 1, 9), distinct={"video": torch.arange(4), "user": torch.arange(2)})
    doubled = batch.apply(lambda tensor: tensor.long() * 2)
    assert len(batch.tensors()) == 1 + 11 + 3 + 2
    for one, two in zip(batch.tensors(), doubled.tensors(), strict=True):
        assert torch.equal(one.long() * 2, two)
    assert list(doubled.distinct) == ["video", "user"]


def test_the_distinct_rows_stay_where_they_are() -> None:
    """The tables may lie elsewhere than the batch."""
    batch = replace(random_batch(0, 2, 3, 1, 9), distinct={"video": torch.arange(4)})
    moved = batch.to(torch.device("meta"))
    assert moved.distinct["video"].device.type == "cpu"
    assert {t.device.type for t in (moved.request_id, moved.features.items, moved.targets.mask)} == {"meta"}
