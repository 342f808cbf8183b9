"""Raw requests in any form become what the importer's encoding makes of the same columns."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deep_components.dataset.encoding import Encoding, FieldEncoding, keys_of
from deep_components.errors import InputError
from deep_components.serving.requests import EncodedRequests, RequestEncoder

LENGTH = 3
NOW = 1_705_140_000.0  # Saturday, 2024-01-13, 10 o'clock in UTC
ITEMS: dict[str, list[Any]] = {
    "product": ["p1", "p2", "p3", "p4"],
    "brand": [7, 8, None, 7],
    "price": [10.0, None, 14.0, 6.0],
    "tags": ["x|y", "", None, "y"],
    "title": ["One", "Two", "Three", None],
}


class Corpus:
    """Four items, by a loop."""

    table = pa.table(ITEMS)

    def __init__(self, encoding: Encoding) -> None:
        self.features = encoding.encode("item", dict(zip(self.table.column_names, self.table.columns, strict=True)))

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        try:
            keys_of(ids, "string")  # the errors of what is no text
        except ValueError as error:
            raise InputError(f"column product: {error}") from error
        rows = {name: row for row, name in enumerate(ITEMS["product"])}
        return np.array([rows.get(value, -1) for value in ids.to_pylist()], np.int64)

    def values(self, column: str, rows: np.ndarray) -> list[Any]:
        return [ITEMS[column][row] if row >= 0 else None for row in rows]


def vocabulary(values: Sequence[Any], kind: str) -> np.ndarray:
    return np.sort(keys_of(pa.array(values), kind))


def encoding_of(*history: FieldEncoding, time_unit: str | None = None, item: str = "product") -> Encoding:
    entries = [
        FieldEncoding("user", "request", "id", "customer", "string", "user"),
        FieldEncoding("when", "request", "time", "ts", time_unit=time_unit, parts=("weekday", "hour")),
        FieldEncoding("age", "request", "number", "age", mean=40.0, scale=10.0, has_missing=True),
        *history,
        FieldEncoding("item", "item", "id", "product", "string", "item"),
        FieldEncoding("brand", "item", "id", "brand", "integer", "brand"),
        FieldEncoding("price", "item", "number", "price", mean=10.0, scale=2.0, has_missing=True),
        FieldEncoding("tag", "item", "id", "tags", "string", "tag", length=2, separator="|"),
    ]
    tables = {
        "user": vocabulary(["ann", "bob"], "string"),
        "item": vocabulary([*ITEMS["product"], "old"], "string"),
        "brand": vocabulary([7, 8], "integer"),
        "tag": vocabulary(["x", "y"], "string"),
    }
    return Encoding(entries, tables, "UTC", LENGTH, item=item, user="customer", time="ts")


DERIVED = (
    FieldEncoding("item", "history", "id", "product", "string", "item"),
    FieldEncoding("brand", "history", "id", "brand", "integer", "brand"),
    FieldEncoding("price", "history", "number", "price", mean=10.0, scale=2.0, has_missing=True),
    FieldEncoding("tag", "history", "id", "tags", "string", "tag", length=2, separator="|"),
)
LISTED = (
    FieldEncoding("clicked", "history", "id", "clicks", "string", "item", separator=","),
    FieldEncoding("brand", "history", "id", "click_brands", "integer", "brand"),
)


def encoder_of(encoding: Encoding) -> RequestEncoder:
    return RequestEncoder(encoding, Corpus(encoding))  # type: ignore[arg-type]


@pytest.fixture
def encoder() -> RequestEncoder:
    return encoder_of(encoding_of(*DERIVED))


@pytest.fixture
def listed() -> RequestEncoder:
    """Of a log whose histories are lists of its own, under names of their own."""
    return encoder_of(encoding_of(*LISTED))


def encoded(encoder: RequestEncoder, *requests: Mapping[str, Any]) -> EncodedRequests:
    return encoder.encode(encoder.rows_of(requests), now=NOW)


def same(one: EncodedRequests, other: EncodedRequests) -> None:
    for ours, theirs in ((one.request, other.request), (one.history, other.history)):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert np.array_equal(values, theirs[name]) and values.dtype == theirs[name].dtype, name
    assert [rows.tolist() for rows in one.seen] == [rows.tolist() for rows in other.seen]


def of_columns(encoder: RequestEncoder, request: dict[str, list[Any]], history: dict[str, list[Any]]) -> dict[str, Any]:
    """What the encoding itself makes of whole columns."""
    sides = {"request": request, "history": history}
    return {
        side: encoder.encoding.encode(side, {name: pa.array(values) for name, values in columns.items()})
        for side, columns in sides.items()
    }


def check(made: EncodedRequests, expected: dict[str, Any]) -> None:
    for side in ("request", "history"):
        assert getattr(made, side).keys() == expected[side].keys()
        for name, values in expected[side].items():
            assert np.array_equal(getattr(made, side)[name], values), (side, name)


REQUESTS: tuple[dict[str, Any], ...] = (
    {"customer": "ann", "ts": "2024-01-15 13:30:00", "age": 31, "history": ["p1", "p3"]},
    {"customer": "bob", "ts": "2024-01-13T10:00:00", "age": None, "history": []},
    {"customer": "eve", "ts": "2024-01-13 10:00:00", "age": 2.5, "history": ["p2", "p1", "p4", "nowhere", "old"]},
)
COLUMNS: dict[str, list[Any]] = {
    "customer": ["ann", "bob", "eve"],
    "ts": ["2024-01-15 13:30:00", "2024-01-13T10:00:00", "2024-01-13 10:00:00"],
    "age": [31, None, 2.5],
}
HISTORIES: dict[str, list[Any]] = {
    "product": [["p1", "p3"], [], ["p4", "nowhere", "old"]],
    "brand": [[7, None], [], [7, None, None]],
    "price": [[10.0, 14.0], [], [6.0, None, None]],
    "tags": [["x|y", None], [], ["y", None, None]],
}


def test_bare_ids_are_filled_from_the_corpus(encoder: RequestEncoder) -> None:
    made = encoded(encoder, *REQUESTS)
    check(made, of_columns(encoder, COLUMNS, HISTORIES))
    assert [rows.tolist() for rows in made.seen] == [[0, 2], [], [0, 1, 3]]  # of the whole history, not of its end
    assert made.history["mask"].tolist() == [[False, True, True], [False] * 3, [True] * 3]


def test_events_may_be_dicts_that_lack_columns(encoder: RequestEncoder) -> None:
    whole = [{"product": "p1", "brand": 7, "price": 10.0, "tags": "x|y"}, {"product": "p3", "price": 14.0}]
    same(encoded(encoder, REQUESTS[0] | {"history": whole}), encoded(encoder, REQUESTS[0]))
    same(encoded(encoder, REQUESTS[0] | {"history": [whole[0], "p3"]}), encoded(encoder, REQUESTS[0]))
    own = encoded(encoder, REQUESTS[0] | {"history": [{"product": "p1", "brand": 8}, {"product": "p3", "brand": None}]})
    brands = of_columns(encoder, COLUMNS, HISTORIES | {"brand": [[8, None], [], []]})["history"]
    assert np.array_equal(own.history["brand"][0], brands["brand"][0])  # an event's own value wins


@pytest.mark.parametrize("form", ["table", "batch", "frame", "chunks", "one", "tuple"])
def test_any_form_gives_the_same(form: str, encoder: RequestEncoder) -> None:
    table = pa.Table.from_pylist(list(REQUESTS)).append_column("extra", pa.array([1, 2, 3]))
    given: dict[str, Any] = {
        "table": table,
        "batch": table.combine_chunks().to_batches()[0],
        "frame": table.to_pandas(),
        "chunks": pa.concat_tables([table.slice(0, 1), table.slice(1)]),
        "one": REQUESTS[0],
        "tuple": REQUESTS,
    }
    made = encoder.encode(encoder.rows_of(given[form]), now=NOW)
    same(made, encoded(encoder, *REQUESTS[: len(made)]))


def test_events_of_a_table_are_structs(encoder: RequestEncoder) -> None:
    events = [[{"product": "p1", "extra": 1}, {"product": "p3", "extra": None}], None, [None, {"product": "p2"}]]
    table = pa.table({"customer": ["ann", None, "bob"], "history": pa.array(events)})
    made = encoder.encode(encoder.rows_of(table), now=NOW)
    rows: list[dict[str, Any]] = [{"customer": "ann", "history": ["p1", "p3"]}, {}]
    rows.append({"customer": "bob", "history": [None, "p2"]})
    same(made, encoded(encoder, *rows))
    assert [seen.tolist() for seen in made.seen] == [[0, 2], [], [1]]


def test_a_table_may_have_none_of_the_columns(encoder: RequestEncoder) -> None:
    """An item's own columns, as the log's rows have them, are no histories."""
    for table in (pa.table({"other": [1, 2]}), pa.table({"product": ["p1", "p2"], "price": [1.0, None]})):
        coded = pa.table([column.dictionary_encode() for column in table.columns], names=table.column_names)
        for form in (table, table.to_pandas(), table.to_batches()[0], coded):
            same(encoder.encode(encoder.rows_of(form), now=NOW), encoded(encoder, {}, {}))
    assert encoder.rows_of(pa.table({})) == encoder.rows_of([]) == encoder.rows_of(pd.DataFrame()) == []


def test_what_is_missing_is_unknown(encoder: RequestEncoder) -> None:
    made = encoded(encoder, {}, {"customer": None, "age": None, "ts": None, "history": None})
    assert made.request["user"].tolist() == [1, 1]  # the unknown row
    assert made.request["age"].tolist() == [0, 0] and made.request["age_missing"].tolist() == [1, 1]
    assert not made.history["mask"].any()
    for name, values in made.history.items():
        assert not values.any(), name  # padding, as the importer writes it


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NaT, pd.NA, np.float64("nan")])
def test_every_kind_of_missing_value(missing: Any, encoder: RequestEncoder) -> None:
    given = encoded(encoder, {"customer": missing, "ts": missing, "age": missing, "history": ["p1", missing]})
    same(given, encoded(encoder, {"history": ["p1", None]}))


@pytest.mark.parametrize("unit", [None, "s", "ms", "us", "ns"])
def test_a_missing_time_is_now(unit: str | None) -> None:
    encoder = encoder_of(encoding_of(*DERIVED, time_unit=unit))
    made = encoded(encoder, {})
    assert made.request["when_weekday"].tolist() == [2 + 5] and made.request["when_hour"].tolist() == [2 + 10]


def test_requests_are_encoded_as_each_would_be_alone(encoder: RequestEncoder) -> None:
    """Where Arrow would make one type of several: clocks' times with zoned ones, integers with texts."""
    some: list[dict[str, Any]] = [
        {"customer": "ann", "ts": "2024-01-13 10:00:00"},
        {"customer": 5, "ts": "2024-01-13 10:00:00+08:00"},
        {"customer": "bob", "ts": datetime(2024, 1, 13, 10)},
        {"ts": datetime(2024, 1, 13, 10, tzinfo=UTC), "age": np.int64(30)},
        {"ts": pd.Timestamp("2024-01-13 10:00", tz="Asia/Shanghai"), "age": True},
        {"age": 30.0, "history": ("p1", None)},
        {"history": np.array(["p2"])},
        {},
    ]
    together = encoded(encoder, *some)
    for number, request in enumerate(some):
        alone = encoded(encoder, request)
        for side in ("request", "history"):
            for name, values in getattr(alone, side).items():
                assert np.array_equal(getattr(together, side)[name][number], values[0]), (number, name)
    assert together.request["when_hour"].tolist() == [2 + hour for hour in (10, 2, 10, 10, 2, 10, 10, 10)]


def test_duplicate_events_and_requests(encoder: RequestEncoder) -> None:
    request = {"customer": "ann", "history": ["p1", "p1", "p1", "p1"]}
    made = encoded(encoder, request, request)
    assert made.history["mask"].all() and len(np.unique(made.history["item"])) == 1
    assert [rows.tolist() for rows in made.seen] == [[0], [0]]


def test_lists_of_the_logs_own(listed: RequestEncoder) -> None:
    """As lists, as text with the log's separator, as events; what is not given is the items'."""
    top = encoded(listed, {"clicks": ["p1", "p4"], "click_brands": [8, 7]})
    same(encoded(listed, {"clicks": "p1,p4", "click_brands": [8, 7]}), top)
    same(encoded(listed, {"history": [{"clicks": "p1", "click_brands": 8}, {"product": "p4", "brand": 7}]}), top)
    same(encoded(listed, {"history": [{"clicks": "p1", "click_brands": 8}, "p4"]}), top)
    assert [rows.tolist() for rows in top.seen] == [[0, 3]]
    filled = encoded(listed, {"clicks": ["p1", "p4"]})
    same(filled, encoded(listed, {"clicks": ["p1", "p4"], "click_brands": [7, 7]}))
    empty: list[dict[str, Any]] = [{"clicks": ""}, {"clicks": [], "click_brands": []}, {"clicks": None, "history": []}]
    for nothing in empty:
        assert not encoded(listed, nothing).history["mask"].any()


def deep() -> list[Any]:
    """What a hostile client may send."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


def test_a_log_without_histories_still_knows_what_was_seen() -> None:
    encoder = encoder_of(encoding_of())
    made = encoded(encoder, {"history": ["p4", "p2"]}, {"history": [{"product": "p1"}]})
    assert [rows.tolist() for rows in made.seen] == [[1, 3], [0]]
    assert made.history["mask"].shape == (2, LENGTH) and not made.history["mask"].any()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"custmer": "ann"}, r"'custmer' is no column of its log \(did you mean customer\?\); it takes age, "),
        ({"age": "old"}, "column age: holds string, not numbers; give what the log has"),
        ({"age": float("inf")}, "column age: holds an infinite number"),
        ({"age": [1]}, "column age: holds list<item: int64>, not numbers"),
        ({"age": {"years": 1}}, "column age: holds dict, no value that a log can have"),
        ({"age": [[[1]]]}, "column age: holds lists of lists"),
        ({"age": 10**400}, "column age: "),
        ({"age": deep()}, "column age: holds lists of lists"),
        ({"age": [object()]}, "column age: holds object, no value that a log can have"),
        ({"age": range(3)}, "column age: holds range"),
        ({"customer": 1.5}, "column customer: holds double, not text"),
        ({"customer": b"ann"}, "column customer: holds bytes"),
        ({"customer": "\ud800"}, "column customer: 'utf-8' codec"),
        ({"ts": "yesterday"}, "column ts: "),
        ({"ts": 1_705_140_000}, r"column ts: holds int64, not times \(numbers need a time_unit\)"),
        ({"ts": "0001-01-01"}, "column ts: "),
        ({"ts": "2300-01-01"}, "column ts: "),
        ({"history": "p1"}, "column history: 'p1', not a list of events"),
        ({"history": {"product": "p1"}}, "column history: .*, not a list of events"),
        ({"history": deep()}, "column product: holds lists of lists"),
        ({"history": [deep(), {"price": deep()}]}, "column product: holds lists of lists"),
        ({"history": np.array(3)}, "column history: .*, not a list of events"),
        ({"history": [1.5]}, "column product: holds double, not text"),
        ({"history": ["p1", ["p2"]]}, "column product: holds values of several types"),
        ({"history": [{"prodct": "p1"}]}, r"history\[0\]: 'prodct' is no column of its log \(did you mean product\?\)"),
        ({"history": ["p1", {"product": "p2", "price": "dear"}]}, "column price: "),
        ({"product": ["p1"], "history": ["p1"]}, "column product: the events stand in history already; give them once"),
        ({"product": ["p1"], "brand": [1, 2]}, r"differ in length \(1 of product, 2 of brand\)"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_request_and_column(
    request_: dict[str, Any], sentence: str, encoder: RequestEncoder
) -> None:
    befores: list[list[dict[str, Any]]] = [[], [{}, REQUESTS[0], {"ts": "2024-01-13"}]]
    for before in befores:
        with pytest.raises(InputError, match=rf"^requests\[{len(before)}\]: .*{sentence}"):
            encoded(encoder, *before, request_)


@pytest.mark.parametrize("given", ["a text", 5, None, [None], [[1]], ["a"], iter([])])
def test_what_is_no_request_is_refused(given: Any, encoder: RequestEncoder) -> None:
    with pytest.raises(InputError, match=r"^requests"):
        encoder.rows_of(given)


def test_a_frame_or_table_with_a_mistake(encoder: RequestEncoder) -> None:
    with pytest.raises(InputError, match=r"requests\[1\]: column age: holds string, not numbers"):
        encoder.encode(encoder.rows_of(pd.DataFrame({"age": [1, "a"]})))
    with pytest.raises(InputError, match="requests: column age is there twice"):
        encoder.rows_of(pa.table([[1], [2]], names=["age", "age"]))
