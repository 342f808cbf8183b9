"""Logs without a learnt encoding: raw values of RecFlow's files, and indices, become what their days have."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from deep_components.cascade import TWO_STAGE, Cascade
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.encoding import Encoding, FieldEncoding, IndexEncoding, RawEncoding
from deep_components.dataset.importers import recflow_files
from deep_components.dataset.importers.recflow import LOG_COLUMN, RecFlowEncoding
from deep_components.dataset.log import encoding_of, load_encoding, open_log, with_item
from deep_components.dataset.rows import items_of_log
from deep_components.errors import InputError
from deep_components.files import read_json, write_json
from deep_components.schema import Field, Schema
from tests.helpers import DAYS
from tests.schemas import OWN
from tests.test_own_cascade import write_log

ZONE = "Asia/Shanghai"


@pytest.fixture
def day(log: Path) -> DayCache:
    return open_log(log).open_day(DAYS[-1], TWO_STAGE)


@pytest.fixture
def encoding(log: Path) -> RecFlowEncoding:
    made = encoding_of(open_log(log), ZONE, 50)
    assert isinstance(made, RecFlowEncoding)
    return made


def assert_columns(day: DayCache, side: str, made: dict[str, np.ndarray]) -> None:
    names = [field.name for field in day.schema.side(side)] + (["mask"] if side == "history" else [])
    assert made.keys() == set(names)
    for name in names:
        assert np.array_equal(made[name], day.columns[f"{side}.{name}"]), name


def test_requests_of_recflow(log: Path, day: DayCache, encoding: RecFlowEncoding) -> None:
    raw = recflow_files.read_requests(recflow_files.feather_path(log, DAYS[-1]), "rank_pos", None).fields
    assert np.array_equal(raw["request_id"], day.columns["request_id"])
    columns = {name: pa.array(values) for name, values in raw.items()}
    assert set(encoding.columns("request")) == {name for name in columns if name != "request_id"}
    assert_columns(day, "request", encoding.encode("request", columns))


def test_histories_of_recflow(log: Path, day: DayCache, encoding: RecFlowEncoding) -> None:
    """Where there is no event stands 0, in category_one too, whose padding index is another."""
    path = recflow_files.history_path(log, DAYS[-1])
    found = {key: rows.to_numpy() for piece in recflow_files.read_history_dict(path) for key, rows in piece}
    stamp = recflow_files.HISTORY_COLUMNS.index("request_timestamp")
    events = [found[key][found[key][:, stamp] != 0] for key in day.columns["request_id"].tolist()]
    columns = {
        name: pa.array([rows[:, number] for rows in events])
        for number, name in enumerate(recflow_files.HISTORY_COLUMNS)
    }
    made = encoding.encode("history", columns)
    assert_columns(day, "history", made)
    assert not made["mask"].all() and (made["category_one"][~made["mask"]] == 0).all()
    encoding.history_length = 3
    assert np.array_equal(encoding.encode("history", columns)["video"], day.columns["history.video"][:, -3:])


def test_items_of_recflow(log: Path, day: DayCache, encoding: RecFlowEncoding) -> None:
    """As the log's own items, distinct, are encoded, so is each item of the day."""
    pieces = items_of_log(open_log(log), TWO_STAGE).pieces()
    raw = pa.Table.from_batches(list(pieces))
    made = encoding.encode("item", {name: raw.column(name) for name in raw.schema.names})
    row_of = dict(zip(made["video"].tolist(), range(len(raw)), strict=True))  # the last row of a video
    there = day.columns["item.mask"]
    rows = np.array([row_of[video] for video in day.columns["item.video"][there].tolist()])
    for field in day.schema.side("item"):
        assert np.array_equal(made[field.name][rows], day.columns[f"item.{field.name}"][there]), field.name


def test_ids_beyond_the_tables_are_padding(encoding: RecFlowEncoding) -> None:
    count = encoding.schema.tables["video"].size - 2
    ones = encoding.schema.tables["category_one"].size - 2
    raw: dict[str, pa.Array] = {name: pa.nulls(5) for name in encoding.columns("item")}
    raw |= {"video_id": pa.array([0, count, count + 1, -1, None])}
    raw |= {"category_level_one": pa.array([0, ones, ones + 1, -1, None])}
    raw |= {"upload_timestamp": pa.array([0, 60, None, 3600, 86_400])}
    made = encoding.encode("item", raw)
    assert made["video"].tolist() == [1, count + 1, 0, 0, 0]
    assert made["category_one"].tolist() == [0, ones, 2, 2, 2]  # not shifted; 2 is its padding
    assert made["author"].tolist() == [0] * 5
    assert made["minute"].tolist() == [1, 2, 0, 1, 1] and made["hour"].tolist() == [9, 9, 0, 10, 9]  # Shanghai: UTC+8


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("video_id", ["a"], "column video_id: .*; give what the log has"),
        ("upload_timestamp", [1_700_000_000_000], "column upload_timestamp: .*1900 to 2200"),
        ("video_id", None, "column video_id: missing; field video of side item needs it"),
    ],
)
def test_what_a_column_cannot_hold(
    column: str, values: list[int] | None, problem: str, encoding: RecFlowEncoding
) -> None:
    raw: dict[str, pa.Array] = {name: pa.nulls(1) for name in encoding.columns("item") if name != column}
    raw |= {} if values is None else {column: pa.array(values)}
    with pytest.raises(InputError, match=problem):
        encoding.encode("item", raw)


def test_indices(tmp_path: Path) -> None:
    """A log of indices: its items and requests are encoded as they stand."""
    log = open_log(write_log(tmp_path / "log"))
    cascade = Cascade.from_toml(tmp_path / "log/shop.toml")
    day = log.open_day(log.days()[0], cascade)
    encoding = encoding_of(log, ZONE, day.history_length)
    assert (encoding.item, encoding.user) == ("product", "city")
    columns = {field.name: pa.array(day.columns[f"request.{field.name}"]) for field in OWN.side("request")}
    assert_columns(day, "request", encoding.encode("request", columns))
    mask = day.columns["history.mask"]
    events = {
        field.name: pa.array(
            [row[there] for row, there in zip(day.columns[f"history.{field.name}"], mask, strict=True)]
        )
        for field in OWN.side("history")
    }
    assert_columns(day, "history", encoding.encode("history", events))
    pieces = list(items_of_log(log, cascade).pieces())
    assert sum(len(piece) for piece in pieces) == sum(
        int(log.open_day(name, cascade).columns["item.mask"].sum()) for name in log.days()
    )
    first = encoding.encode("item", dict(zip(pieces[0].schema.names, pieces[0].columns, strict=True)))
    for field in OWN.side("item"):
        expected = day.columns[f"item.{field.name}"][day.columns["item.mask"]]
        assert np.array_equal(first[field.name], expected.astype(first[field.name].dtype)), field.name


def test_indices_beyond_the_tables() -> None:
    fields = (
        Field("id", "item", size=5),
        Field("tag", "item", size=4, unknown=1, length=2),
        Field("price", "item", "number"),
    )
    encoding = IndexEncoding(Schema(fields))
    raw = {
        "id": pa.array([4, 5, -1, None]),
        "tag": pa.array([[3, 9, 2], [], None, [2]]),
        "price": pa.array([1.5, None, 0, 2]),
    }
    made = encoding.encode("item", raw)
    assert made["id"].tolist() == [4, 0, 0, 0]
    assert made["tag"].tolist() == [[3, 1], [0, 0], [0, 0], [2, 0]]
    assert made["price"].tolist() == [1.5, 0, 0, 2] and made["price"].dtype == np.float32


def test_no_event_is_padding_in_every_field() -> None:
    """As the importer writes it: not the bucket, or the flag, of a missing number."""
    entries = [
        FieldEncoding("price", "history", "number", "price", has_missing=True),
        FieldEncoding("level", "history", "number", "price", edges=(1.0,), table="level"),
        FieldEncoding("when", "history", "time", "when", time_unit="s", parts=("hour",)),
    ]
    made = Encoding(entries, {}, history_length=2).encode(
        "history", {"price": pa.array([[3.0], [None]]), "when": pa.array([[0], [None]])}
    )
    assert made["mask"].tolist() == [[False, True], [False, True]]
    assert made["price"].tolist() == [[0, 3], [0, 0]] and made["price_missing"].tolist() == [[0, 0], [0, 1]]
    assert made["level"].tolist() == [[0, 3], [0, 1]] and made["when_hour"].tolist() == [[0, 2], [0, 1]]


def test_any_kind_is_saved_and_loaded(tmp_path: Path, encoding: RecFlowEncoding) -> None:
    learnt = Encoding([FieldEncoding("a", "item", "id", "A", "string", "a")], {"a": np.arange(3, dtype=np.uint64)},
                      "UTC", 4, "A", "U", "T")  # fmt: skip
    index = IndexEncoding(OWN, 3, "shop")
    kinds: list[RawEncoding] = [encoding, learnt, index]
    for number, made in enumerate(kinds):
        made.save(tmp_path / str(number))
        loaded = load_encoding(tmp_path / str(number))
        assert type(loaded) is type(made) and loaded.schema == made.schema
        for name in ("item", "user", "time", "history_length"):
            assert getattr(loaded, name) == getattr(made, name)
        for side in ("request", "history", "item"):
            assert loaded.columns(side) == made.columns(side)
    assert {LOG_COLUMN["video"], "upload_timestamp"} <= set(encoding.columns("item"))


def test_an_encoding_of_an_earlier_version_names_no_columns(tmp_path: Path) -> None:
    made = Encoding(
        [FieldEncoding("a", "item", "id", "A", "string", "a")], {"a": np.arange(3, dtype=np.uint64)}, item="A"
    )
    made.save(tmp_path)
    content = read_json(tmp_path / "encoding.json")
    write_json(tmp_path / "encoding.json", {k: v for k, v in content.items() if k not in ("item", "user", "time")})
    loaded = Encoding.load(tmp_path)
    assert (loaded.item, loaded.user, loaded.time) == ("", "", "") and loaded.schema == made.schema
    write_json(tmp_path / "encoding.json", content | {"item": 3})
    with pytest.raises(InputError, match="item, user or time is no column's name"):
        Encoding.load(tmp_path)


@pytest.mark.parametrize("kind", ["recflow", "index"])
def test_damage_is_seen(kind: str, tmp_path: Path, encoding: RecFlowEncoding) -> None:
    (encoding if kind == "recflow" else IndexEncoding(OWN)).save(tmp_path)
    path = tmp_path / "encoding.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match=r"encoding.json: not a readable encoding"):
        load_encoding(tmp_path)


def test_the_column_of_items(tmp_path: Path, log: Path) -> None:
    assert encoding_of(open_log(log), ZONE, 5, "video_id").item == "video_id"
    with pytest.raises(InputError, match="--item=author_id: the column that names an item is video_id"):
        encoding_of(open_log(log), ZONE, 5, "author_id")
    shop = open_log(write_log(tmp_path / "log"))
    assert encoding_of(shop, ZONE, 5, "shop").item == "shop"
    with pytest.raises(InputError, match="--item=sku: no field of the items"):
        encoding_of(shop, ZONE, 5, "sku")
    old = Encoding([FieldEncoding("a", "item", "id", "A", "string", "a")], {"a": np.zeros(0, np.uint64)})
    with pytest.raises(InputError, match="no column is known to name an item; give it with --item"):
        with_item(old, 5, None)
    assert with_item(old, 5, "A").item == "A"
