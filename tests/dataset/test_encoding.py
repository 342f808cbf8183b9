"""Raw values to indices and numbers, as an importer and a service do it."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from deep_components.dataset.clock import local_seconds, utc_seconds
from deep_components.dataset.encoding import MISSING, NO_TIME, Encoding, FieldEncoding, keys_of, times_of
from deep_components.errors import InputError

MASK = 2**64 - 1


def split_mix(value: int) -> int:
    """SplitMix64's finalizer."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def text_key(text: str) -> int:
    return split_mix(sip_hash(text))


def sip_hash(text: str, key: bytes = b"0123456789123456") -> int:
    """SipHash-2-4 of the UTF-8 bytes (Aumasson and Bernstein, 2012)."""
    k0, k1 = (int.from_bytes(key[part : part + 8], "little") for part in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & MASK

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0], v[2] = (v[0] + v[1]) & MASK, (v[2] + v[3]) & MASK
            v[1], v[3] = rotate(v[1], 13) ^ v[0], rotate(v[3], 16) ^ v[2]
            v[0] = rotate(v[0], 32)
            v[2], v[0] = (v[2] + v[1]) & MASK, (v[0] + v[3]) & MASK
            v[1], v[3] = rotate(v[1], 17) ^ v[2], rotate(v[3], 21) ^ v[0]
            v[2] = rotate(v[2], 32)

    data = text.encode()
    data += bytes(-(len(data) + 1) % 8) + bytes([len(data) % 256])
    for part in range(0, len(data), 8):
        block = int.from_bytes(data[part : part + 8], "little")
        v[3] ^= block
        rounds(2)
        v[0] ^= block
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_keys_are_those_of_the_definition() -> None:
    texts = ["", "a", "shop-17", "eight..b", "Zürich", "京都市", "x" * 100]
    assert keys_of(pa.array(texts), "string").tolist() == [text_key(text) for text in texts]
    numbers = [0, 1, -1, 2**62, -(2**63)]
    assert keys_of(pa.array(numbers), "integer").tolist() == [split_mix(number) for number in numbers]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, None, 7]),
        pa.array([3, None, 7], pa.uint8()),
        pa.array([3.0, np.nan, 7.0]),
        pa.array(["3", None, "7"]),
    ],
)
def test_one_integer_has_one_key_whatever_its_column(column: pa.Array) -> None:
    assert keys_of(column, "integer").tolist() == [split_mix(3), MISSING, split_mix(7)]


def test_one_text_has_one_key_whatever_its_column() -> None:
    plain = keys_of(pa.array(["b", None, "a", "b"]), "string")
    assert plain.tolist() == [text_key("b"), MISSING, text_key("a"), text_key("b")]
    assert np.array_equal(keys_of(pa.array(["b", None, "a", "b"], pa.large_string()), "string"), plain)
    assert np.array_equal(keys_of(pa.array([12]), "string"), keys_of(pa.array(["12"]), "string"))


def test_local_time_and_back() -> None:
    zone = ZoneInfo("Europe/Berlin")
    seconds = np.arange(1_711_800_000, 1_711_900_000, 599)  # clocks go forward on 2024-03-31
    local = local_seconds(seconds, zone)
    clocks = [datetime.fromtimestamp(int(s), UTC).astimezone(zone).replace(tzinfo=UTC).timestamp() for s in seconds]
    assert local.tolist() == clocks
    assert np.array_equal(utc_seconds(local, zone), seconds)
    twice = int(datetime(2024, 10, 27, 2, 30, tzinfo=UTC).timestamp())  # shown twice: the first is meant
    assert utc_seconds(np.array([twice]), zone).tolist() == [twice - 7200]


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([1_705_140_000, None]), "s"),
        (pa.array([1_705_140_000.0, None]), "s"),
        (pa.array([1_705_140_000_000, None]), "ms"),
        (pa.array([1_705_140_000_000_000_000, None]), "ns"),
        (pa.array([1_705_140_000, None]).cast(pa.timestamp("s", "UTC")), None),
        (pa.array(["2024-01-13T10:00:00Z", None]), None),
        (pa.array(["2024-01-13 18:00:00+08:00", None]), None),
        (pa.array(["2024-01-13 18:00:00", None]), None),
        (pa.array([datetime(2024, 1, 13, 18), None]), None),
    ],
)
def test_one_time_in_any_form(column: pa.Array, unit: str | None) -> None:
    assert times_of(column, unit, "Asia/Shanghai").tolist() == [1_705_140_000_000_000, NO_TIME]


def test_a_date_is_its_midnight() -> None:
    midnight = datetime(2024, 1, 13, tzinfo=ZoneInfo("America/New_York")).timestamp() * 1_000_000
    assert times_of(pa.array([date(2024, 1, 13)]), None, "America/New_York").tolist() == [midnight]


def vocabulary(*values: Any) -> np.ndarray:
    return np.array(sorted(text_key(value) for value in values), np.uint64)


@pytest.fixture
def encoding() -> Encoding:
    entries = [
        FieldEncoding("user", "request", "id", "customer", "string", "user"),
        FieldEncoding("when", "request", "time", "ts", time_unit="s", parts=("month", "day", "weekday", "hour")),
        FieldEncoding("tag", "history", "id", "tags", "string", "tag", length=2, separator="|"),
        FieldEncoding("tag", "item", "id", "tags", "string", "tag", length=2, separator="|"),
        FieldEncoding("price", "item", "number", "price", mean=10.0, scale=2.0, has_missing=True),
        FieldEncoding("stock", "item", "number", "stock", table="stock", edges=(1.0, 5.0)),
    ]
    tables = {"user": vocabulary("ann", "bob"), "tag": vocabulary("x", "y", "z")}
    return Encoding(entries, tables, "Asia/Shanghai", history_length=3)


def row(value: str, *known: str) -> int:
    return 2 + sorted(known, key=text_key).index(value)


def test_values_become_indices_and_numbers(encoding: Encoding) -> None:
    request = encoding.encode(
        "request", {"customer": pa.array(["bob", "eve", None]), "ts": pa.array([1_705_140_000] * 3)}
    )
    assert request["user"].tolist() == [row("bob", "ann", "bob"), 1, 1]
    # Saturday, 2024-01-13, 18 o'clock in Shanghai: every part counts from 2
    assert [request[f"when_{part}"][0] for part in ("month", "day", "weekday", "hour")] == [2, 14, 7, 20]
    columns = {
        "tags": pa.array(["x|y|z", "", None, "w"]),
        "price": pa.array([12.0, None, 6.0, np.nan]),
        "stock": pa.array([0, 1, 5, None]),
    }
    item = encoding.encode("item", columns)
    x, y = (row(value, "x", "y", "z") for value in "xy")
    assert item["tag"].tolist() == [[x, y], [0, 0], [0, 0], [1, 0]]
    assert item["price"].tolist() == [1, 0, -2, 0] and item["price_missing"].tolist() == [0, 1, 0, 1]
    assert item["stock"].tolist() == [2, 3, 4, 1]
    history = encoding.encode("history", {"tags": pa.array([[["x"], ["y", "x", "z"]], [], [["y"]] * 5])})
    assert history["mask"].tolist() == [[False, True, True], [False] * 3, [True] * 3]
    assert history["tag"].tolist() == [[[0, 0], [x, 0], [y, x]], [[0, 0]] * 3, [[y, 0]] * 3]


def test_the_schema_says_what_models_see(encoding: Encoding) -> None:
    found = {(field.side, field.name): field for field in encoding.schema.fields}
    assert found["request", "user"].size == 4 and found["request", "user"].unknown == 1
    assert found["item", "tag"].length == found["history", "tag"].length == 2
    assert found["item", "stock"].size == 5 and found["request", "when_hour"].size == 26
    assert found["item", "price_missing"].kind == "number"


def test_saved_and_loaded_it_is_the_same(encoding: Encoding, tmp_path: Path) -> None:
    encoding.save(tmp_path / "encoding")
    again = Encoding.load(tmp_path / "encoding")
    assert again.entries == encoding.entries and again.schema == encoding.schema
    columns = {"tags": pa.array(["x|y"]), "price": pa.array([1]), "stock": pa.array([3])}
    for name, values in again.encode("item", columns).items():
        assert np.array_equal(values, encoding.encode("item", columns)[name])


@pytest.mark.parametrize("name", ["encoding.json", "user.npy"])
def test_damage_is_refused(name: str, encoding: Encoding, tmp_path: Path) -> None:
    encoding.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(InputError, match=rf"{name}: not a readable .*; import the log again"):
            Encoding.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: not a readable"):
        Encoding.load(tmp_path)


def test_a_column_that_is_missing_or_of_another_kind(encoding: Encoding) -> None:
    with pytest.raises(InputError, match="column ts: missing; field when of side request needs it"):
        encoding.encode("request", {"customer": pa.array(["ann"])})
    columns = {"tags": pa.array(["x"]), "price": pa.array(["dear"]), "stock": pa.array([1])}
    with pytest.raises(InputError, match="column price: holds string, not numbers"):
        encoding.encode("item", columns)
