"""Schemas: widths, tables, JSON and what is refused."""

import json
from typing import Any

import pytest

from deep_components.errors import InputError
from deep_components.schema import Field, Schema, Table
from tests.schemas import OWN, RECFLOW, SCHEMAS


def test_widths_and_slices() -> None:
    assert [RECFLOW.width(side, 8) for side in ("request", "history", "item")] == [64, 40, 64]
    assert [OWN.width(side, 8) for side in ("request", "history", "item")] == [17, 9, 25]  # numbers take one each
    assert OWN.slices("item", 8) == {
        "price": slice(0, 1),
        "shop": slice(1, 9),
        "product": slice(9, 17),
        "place": slice(17, 25),
    }


def test_fields_with_one_table_share_its_rows() -> None:
    assert OWN.tables == {"city": Table(7), "product": Table(12, 0, 1), "shop": Table(5, 2)}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_json_and_back(schema: Schema) -> None:
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())), "meta.json")
    assert again == schema and again.checksum == schema.checksum
    assert len({s.checksum for s in (*SCHEMAS.values(), Schema(schema.fields[:-1]))}) == 3


def test_a_list_field_is_as_wide_as_a_single_value() -> None:
    schema = Schema((Field("genre", "item", size=9, length=3), Field("shop", "item", size=5)))
    assert (schema.width("item", 8), schema.slices("item", 8)["shop"]) == (16, slice(8, 16))
    genre, shop = schema.to_json()["fields"]
    assert genre == shop | {"name": "genre", "table": "genre", "size": 9, "length": 3}  # only lists name a length
    assert "length" not in shop and Schema.from_json(schema.to_json(), "meta.json") == schema


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([Field("a b", "item", size=3)], "no identifier"),
        ([Field("mask", "item", size=3)], "reserved"),
        ([Field("a", "request", size=3)], "no field of side 'item'"),
        ([Field("a", "items", size=3)], "side is one of"),
        ([Field("a", "item", "text", size=3)], "kind one of"),
        ([Field("a", "item", size=3)] * 2, "there twice"),
        ([Field("a", "item", size=3, padding=3)], "0 <= padding < size"),
        ([Field("a", "item", size=3, unknown=3)], "unknown is an index below size"),
        ([Field("a", "item", "number", table="b")], "a number has no table"),
        ([Field("a", "item", "number", length=2)], "a list is of ids"),
        ([Field("a", "item", size=3, length=-1)], "length is 0 for a single value"),
        ([Field("a", "item", size=3, length=True)], "length is 0 for a single value"),
        ([Field("a", "item", size=3, length=1 << 17)], "1 to 65536 for a list"),
        ([Field("offset", "item", size=3)], "reserved"),
        ([Field("a", "item", size=3), Field("b", "history", size=4, table="a")], "another size"),
        ([Field("a", "item", size=3, table="../b")], "no identifier"),
    ],
)
def test_contradictions_are_refused(fields: list[Field], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Schema(tuple(fields))


@pytest.mark.parametrize(
    "content", [None, [], {}, {"fields": 3}, {"fields": [3]}, {"fields": [{"name": "a"}]}, {"fields": [{"nam": "a"}]}]
)
def test_what_is_no_schema_is_a_sentence(content: Any) -> None:
    with pytest.raises(InputError, match=r"meta\.json: not a schema"):
        Schema.from_json(content, "meta.json")
