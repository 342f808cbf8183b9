"""A table of one's own becomes the log that loops over its rows would make."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from pandas.util import hash_array

from deep_components.cascade import Cascade
from deep_components.dataset.importers.table import plan as plan_module
from deep_components.dataset.importers.table.command import import_table
from deep_components.dataset.log import open_log
from tests.dataset.importers import tables

DAYS = ("2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05")
TRAINING = DAYS[:-1]


def key(value: Any) -> int:
    return int(hash_array(np.array([value], object if isinstance(value, str) else np.int64))[0])


class Vocabulary:
    """Value -> row: 2 + the number of smaller keys; 1 for unknown and missing values."""

    def __init__(self, values: list[Any], minimum: int = 1) -> None:
        counts = Counter(value for value in values if value is not None)
        self.keys = sorted(key(value) for value, count in counts.items() if count >= minimum)

    def __call__(self, value: Any) -> int:
        return 2 + self.keys.index(key(value)) if value is not None and key(value) in self.keys else 1


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return tables.table()


@pytest.fixture(scope="module")
def log(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    import_table(tables.write(folder, rows), folder / "log")
    return folder / "log"


def test_every_value_is_what_loops_make(rows: pd.DataFrame, log: Path) -> None:
    wanted = tables.requests_of(rows)
    train = [request for request in wanted.values() if request.day in TRAINING]
    items = [item | {"item": number} for request in train for number, item in request.items.items()]
    item = Vocabulary([entry["item"] for entry in items], minimum=4)
    brand = Vocabulary([entry["brand"] for entry in items])
    genre = Vocabulary([value for entry in items for value in entry["genres"]])
    user = Vocabulary([request.user for request in train])
    prices = np.array([entry["price"] for entry in items if entry["price"] == entry["price"]])
    numbers = {np.array([key(query)], np.uint64).view(np.int64)[0]: query for query in wanted}
    assert len(wanted) > 80

    seen, buckets = set(), set[tuple[int, int]]()
    for day in DAYS:
        columns = tables.columns(log, day)
        for row, number in enumerate(columns["request_id"]):
            seen.add(query := numbers[number])
            request = wanted[query]
            assert request.day == day
            assert columns["request.user"][row] == user(request.user)
            assert columns["request.when_weekday"][row] == 2 + request.weekday
            assert columns["request.when_hour"][row] == 2 + request.hour
            part = slice(columns["item.offset"][row], columns["item.offset"][row + 1])
            here = {name: values[part] for name, values in columns.items() if name.startswith("item.")}
            expected = sorted(request.items.items(), key=lambda entry: key(entry[0]))
            assert here["item.item"].tolist() == [item(product) for product, _ in expected]
            fields = [entry for _, entry in expected]
            assert here["item.group"].tolist() == [entry["group"] for entry in fields]
            assert here["item.label"].tolist() == [entry["label"] for entry in fields]
            assert here["item.brand"].tolist() == [brand(entry["brand"]) for entry in fields]
            for indices, entry in zip(here["item.genres"].tolist(), fields, strict=True):
                known = [genre(value) for value in entry["genres"]]
                assert indices == known + [0] * (tables.GENRES - len(known))
            price = np.array([entry["price"] for entry in fields], float)
            scaled = np.nan_to_num((price - prices.mean()) / prices.std())
            np.testing.assert_allclose(here["item.price"], scaled, rtol=1e-5, atol=1e-6)
            assert here["item.price_missing"].tolist() == np.isnan(price).astype(float).tolist()
            buckets |= set(zip((entry["stock"] for entry in fields), here["item.stock"].tolist(), strict=True))
            _check_history(columns, row, request, item, genre)
    assert seen == set(wanted)
    bucket = dict(buckets)
    assert len(bucket) == len(buckets) and list(dict(sorted(buckets)).values()) == sorted(bucket.values())
    filled = Counter(bucket[entry["stock"]] for entry in items)
    assert filled.keys() == {2, 3, 4, 5} and min(filled.values()) > 0.15 * len(items)


def _check_history(columns: dict[str, Any], row: int, request: Any, item: Vocabulary, genre: Vocabulary) -> None:
    """Ground truth of earlier seconds, the latest last; of equal seconds in any order."""
    length = min(len(request.history), tables.LENGTH)
    mask = columns["history.mask"][row]
    assert mask.tolist() == [False] * (tables.LENGTH - length) + [True] * length
    products = columns["history.item"][row]
    assert not products[~mask].any() and not columns["history.genres"][row][~mask].any()
    possible = Counter((item(product), *(genre(g) for g in genres)) for product, genres in request.history)
    found = Counter(
        (int(product), *(int(value) for value in values if value))
        for product, values in zip(products[mask], columns["history.genres"][row][mask], strict=True)
    )
    assert not found - possible


def test_the_latest_events_come_last(tmp_path: Path) -> None:
    """Of one user who buys one item an hour, the histories are the items in their order, without the request's own."""
    hours = range(30)
    listed = [
        {"query": f"q{hour}", "ts": tables.FIRST_SECOND + 3600 * hour, "customer": "c", "product": 2 * hour + other}
        | {"brand": "b", "genres": "", "price": 1.0, "stock": 1, "left_at": tables.ORDER[other], "gain": 1}
        for hour in hours
        for other in (0, 1)
    ]
    mapping = tables.MAPPING.replace("min_count = 4", "min_count = 1")
    import_table(tables.write(tmp_path, pd.DataFrame(listed), mapping), tmp_path / "log")
    keys = np.load(tmp_path / "log/encoding/item.npy").tolist()
    for day in ("2024-01-01", "2024-01-02"):
        columns = tables.columns(tmp_path / "log", day)
        for row in range(len(columns["request_id"])):
            part = slice(columns["item.offset"][row], columns["item.offset"][row + 1])
            bought = columns["item.item"][part][columns["item.group"][part] == 0][0]
            known = {keys.index(key(2 * hour)) + 2: hour for hour in hours if key(2 * hour) in keys}
            if bought in known:
                before = range(max(0, known[bought] - tables.LENGTH), known[bought])
                found = columns["history.item"][row][columns["history.mask"][row]]
                assert [known[index] for index in found] == list(before)


def test_nothing_is_learnt_from_the_test_day(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    """Other ids and numbers on the last day change neither vocabularies nor scales."""
    late = rows["ts"] >= tables.FIRST_SECOND + 3 * 86_400 + 57_600
    changed = rows.assign(price=rows.price.where(~late, 1e6), stock=rows.stock.where(~late, 999))
    changed = changed.assign(brand=changed.brand.where(~late, "new"), genres=changed.genres.where(~late, "new"))
    import_table(tables.write(tmp_path, changed), tmp_path / "log")
    for path in (log / "encoding").iterdir():
        assert (tmp_path / "log/encoding" / path.name).read_bytes() == path.read_bytes()
    assert (tables.columns(tmp_path / "log", DAYS[-1])["item.brand"] == 1).all()


@pytest.mark.parametrize("kind", ["parquet", "csv", "feather"])
def test_the_log_is_the_same_however_the_table_is_written(
    kind: str, rows: pd.DataFrame, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format, the files, the order of rows, the size of batches and buckets."""
    monkeypatch.setattr(plan_module, "_ROWS_PER_BATCH", range(10, 30))
    monkeypatch.setattr(plan_module, "BYTES_PER_BUCKET", 1 << 12)
    shuffled = rows.sample(frac=1, random_state=1)
    import_table(tables.write(tmp_path, shuffled, files=3, kind=kind), tmp_path / "log")
    assert tables.contents(tmp_path / "log") == tables.contents(log)


def test_the_log_is_the_same_with_several_processes(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    import_table(tables.write(tmp_path, rows, files=4), tmp_path / "log", jobs=2)
    assert tables.contents(tmp_path / "log") == tables.contents(log)


def days_of(log: Path) -> dict[str, bytes]:
    """Without what the encoding says of the raw columns."""
    return {name: content for name, content in tables.contents(log).items() if name != "encoding/encoding.json"}


def test_lists_timestamps_dictionaries_and_partitions(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    """The same table, of Arrow's richer types, in folders by a column's value."""
    mapping = tables.MAPPING.replace('time_unit = "s"\n', "").replace('separator = "|"\n', "")
    path = tables.write(tmp_path, rows.iloc[:0], mapping)
    (tmp_path / "rows/part-0.parquet").unlink()
    for brand, some in rows.groupby("brand", dropna=False):
        folder = tmp_path / "rows" / f"brand={'__HIVE_DEFAULT_PARTITION__' if brand != brand else brand}"
        folder.mkdir()
        columns = {
            "query": pa.array(some["query"]).dictionary_encode(),
            "ts": pa.array(some["ts"]).cast(pa.timestamp("s", "UTC")),
            "customer": pa.array(some["customer"], pa.large_string()),
            "product": pa.array(some["product"], pa.int16()),
            "genres": pa.array([text.split("|") if text else None for text in some["genres"]]),
            "price": pa.array(some["price"]),
            "stock": pa.array(some["stock"], pa.uint8()),
            "left_at": pa.array(some["left_at"]).dictionary_encode(),
            "gain": pa.array(some["gain"], pa.int8()),
        }
        pa.parquet.write_table(pa.table(columns), folder / "0.parquet")
    import_table(path, tmp_path / "log")
    assert days_of(tmp_path / "log") == days_of(log)


def test_wall_clock_times_are_of_the_zone(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    """Text and timestamps without an offset are what clocks of time_zone show."""
    local = pd.to_datetime(rows["ts"], unit="s", utc=True).dt.tz_convert(tables.ZONE).dt.tz_localize(None)
    mapping = tables.MAPPING.replace('time_unit = "s"\n', "")
    for name, times in (("stamp", local), ("text", local.dt.strftime("%Y-%m-%d %H:%M:%S"))):
        import_table(tables.write(tmp_path / name, rows.assign(ts=times), mapping), tmp_path / name / "log")
        assert days_of(tmp_path / name / "log") == days_of(log)


def flags(rows: pd.DataFrame) -> pd.DataFrame:
    number = rows["left_at"].map(tables.ORDER.index)
    return rows.assign(**{f"is_{name}": number <= group for group, name in enumerate(tables.ORDER[:-1])})


def positions(rows: pd.DataFrame) -> pd.DataFrame:
    """The last positions of groups are 10, 20 and 30."""
    return rows.assign(final=rows["left_at"].map(tables.ORDER.index) * 10 + 1 + np.arange(len(rows)) % 10)


@pytest.mark.parametrize(
    ("change", "told_by"),
    [
        (flags, 'flags = ["is_bought", "is_shown", "is_ranked"]'),
        (positions, 'position = "final"\ncuts = [10, 20, 30]'),
    ],
)
def test_groups_by_flags_and_by_position(
    change: Any, told_by: str, rows: pd.DataFrame, log: Path, tmp_path: Path
) -> None:
    mapping = tables.MAPPING.replace('column = "left_at"', told_by)
    import_table(tables.write(tmp_path, change(rows).drop(columns="left_at"), mapping), tmp_path / "log")
    assert tables.contents(tmp_path / "log") == tables.contents(log)


def test_a_low_rank_is_a_high_label(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    mapping = tables.MAPPING.replace('label = "gain"', 'rank = "gain"')
    import_table(tables.write(tmp_path, rows.assign(gain=-rows["gain"]), mapping), tmp_path / "log")
    assert tables.contents(tmp_path / "log") == tables.contents(log)


def test_without_an_order_all_ground_truth_is_equal(rows: pd.DataFrame, tmp_path: Path) -> None:
    import_table(tables.write(tmp_path, rows, tables.MAPPING.replace('label = "gain"', "")), tmp_path / "log")
    columns = tables.columns(tmp_path / "log", DAYS[0])
    assert (columns["item.label"] == 3 - columns["item.group"].astype(int)).all()


def test_the_best_of_equal_rows_is_kept_and_counted(rows: pd.DataFrame, log: Path, tmp_path: Path) -> None:
    worse = rows[rows["left_at"] != "retrieved"].assign(left_at="retrieved").iloc[::3]
    both = pd.concat([worse, rows, rows.iloc[:7]])
    import_table(tables.write(tmp_path, both), tmp_path / "log")
    for day in DAYS:
        ours, theirs = tables.columns(tmp_path / "log", day), tables.columns(log, day)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    repairs = Counter[str]()
    for day in DAYS:
        repairs.update(open_log(tmp_path / "log").open_day(day, cascade()).repairs)
    assert repairs["rows of an item that its request has already, left out"] == len(worse) + 7
    sizes = rows.groupby("query")["left_at"].agg(["size", lambda left: (left == "bought").any()])
    sizes.columns = pd.Index(["size", "truth"])
    assert repairs["requests without ground truth, left out"] == (~sizes["truth"]).sum()
    assert repairs["requests with fewer than two items, left out"] == (sizes["truth"] & (sizes["size"] < 2)).sum()


def cascade() -> Cascade:
    stages = [{"name": "retrieval", "keep": 3, "model": "dssm"}, {"name": "rank", "keep": 2, "model": "mlp"}]
    return Cascade.from_json({"stages": stages, "groups": [{"name": name} for name in tables.ORDER]}, "test")


def test_the_log_says_what_it_is(log: Path) -> None:
    opened = open_log(log)
    assert opened.days() == list(DAYS)
    day = opened.open_day(DAYS[0], cascade())
    batch = day.batch(np.arange(5))
    assert batch.features.item["genres"].shape[2] == tables.GENRES
    assert batch.features.history["genres"].shape == (5, tables.LENGTH, tables.GENRES)


HISTORIES = """
[history]
length = 3

[[fields]]
name = "item"
column = "seen"
side = "history"
kind = "id"

[[fields]]
name = "age"
column = "ages"
side = "history"
kind = "number"
"""


def test_histories_that_the_table_has(rows: pd.DataFrame, tmp_path: Path) -> None:
    """The latest three events of each request, whose rows all hold the same list."""
    rng = np.random.default_rng(1)
    lengths = {query: int(rng.integers(0, 6)) for query in rows["query"].unique()}
    lists = {query: [(int(rng.integers(0, 60)), float(n)) for n in range(count)] for query, count in lengths.items()}
    listed = rows.assign(
        seen=[[product for product, _ in lists[query]] for query in rows["query"]],
        ages=[[age for _, age in lists[query]] for query in rows["query"]],
    )
    mapping = tables.MAPPING.replace(f'[history]\nlength = {tables.LENGTH}\nderive = ["item", "genres"]\n', "")
    mapping = mapping.replace("min_count = 4", "min_count = 1").replace("[[fields]]", HISTORIES + "\n[[fields]]", 1)
    import_table(tables.write(tmp_path, listed, mapping), tmp_path / "log")
    keys = np.load(tmp_path / "log/encoding/item.npy").tolist()
    number = {np.array([key(query)], np.uint64).view(np.int64)[0]: query for query in lists}
    scale = next(f for f in tables.encoding(tmp_path / "log")["fields"] if f["name"] == "age")
    for day in DAYS:
        columns = tables.columns(tmp_path / "log", day)
        for row, request in enumerate(columns["request_id"]):
            wanted = lists[number[request]][-3:]
            assert columns["history.mask"][row].tolist() == [False] * (3 - len(wanted)) + [True] * len(wanted)
            found = columns["history.item"][row][3 - len(wanted) :]
            rows_of = [keys.index(key(p)) + 2 if key(p) in keys else 1 for p, _ in wanted]
            assert found.tolist() == rows_of
            ages = columns["history.age"][row][3 - len(wanted) :] * scale["scale"] + scale["mean"]
            np.testing.assert_allclose(ages, [age for _, age in wanted], rtol=1e-5, atol=1e-5)
