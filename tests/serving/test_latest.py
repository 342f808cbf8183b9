"""lcron features: each user's latest request, from tables and from logs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from deep_components import commands
from deep_components.dataset.encoding import Encoding, FieldEncoding, IndexEncoding, RawEncoding
from deep_components.dataset.importers.recflow import RecFlowEncoding
from deep_components.dataset.log import encoding_of, open_log
from deep_components.dataset.rows import open_rows, requests_of_log
from deep_components.errors import InputError
from deep_components.schema import Field, Schema
from deep_components.serving.bundle import Bundle
from deep_components.serving.features import Record, User, open_features
from deep_components.serving.latest import latest_of_rows, latest_requests
from tests.serving.conftest import Trained

ENCODING = Encoding(
    [
        FieldEncoding("user", "request", "id", "member", type="string", table="user"),
        FieldEncoding("age", "request", "number", "age"),
        FieldEncoding("hour", "request", "time", "at", parts=("hour",)),
        FieldEncoding("item", "item", "id", "sku", type="string", table="item"),
        FieldEncoding("item", "history", "id", "seen", type="string", table="item", separator="|"),
        FieldEncoding("price", "history", "number", "paid"),
    ],
    {"user": np.zeros(0, np.uint64), "item": np.zeros(0, np.uint64)},
    history_length=4,
    user="member",
    time="at",
)


def latest(path: Path, encoding: RawEncoding = ENCODING, user: str = "") -> dict[User, Record]:
    found: dict[User, Record] = {}
    for records in latest_of_rows(open_rows(path, "--requests", encoding.columns("request")), encoding, user):
        assert not found.keys() & records.keys()
        found |= records
    return found


def times(*minutes: int | None) -> list[pd.Timestamp | None]:
    return [None if m is None else pd.Timestamp("2024-02-04", tz="UTC") + pd.Timedelta(minutes=m) for m in minutes]


def write(path: Path, row_group: int = 2, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


EVENTS = [[{"seen": "a", "paid": 1.0}], [], [{"seen": "b", "paid": float("nan")}], None, ["c"]]


def test_the_latest_of_each_user(tmp_path: Path) -> None:
    history = pa.array([[{"seen": "a", "paid": 1.0}], [], [{"seen": "b", "paid": float("nan")}], None, []])
    path = write(
        tmp_path / "r.parquet",
        member=["ann", "bob", "ann", "ann", None],
        age=[1.0, float("nan"), 3.0, 4.0, 5.0],
        at=times(5, 1, 9, 7, 99),
        history=history,
        left=[1, 2, 3, 4, 5],  # no column of the models'
    )
    assert latest(path) == {
        "bob": {"member": "bob", "age": None, "history": []},
        "ann": {"member": "ann", "age": 3.0, "history": [{"seen": "b", "paid": None}]},
    }


def test_without_times_the_last_row_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", member=[7, 8, 7, 7], age=[1, 2, 3, 4])
    assert latest(path) == {8: {"member": 8, "age": 2, "history": []}, 7: {"member": 7, "age": 4, "history": []}}
    path = write(tmp_path / "t.parquet", member=[7, 7, 7], age=[1, 2, 3], at=times(5, None, 5))
    assert latest(path)[7]["age"] == 3  # of two at one time the last, and any before one without a time
    assert latest(write(tmp_path / "u.parquet", id=[1, 2], age=[1, 2]), user="id")[2] == {
        "id": 2, "age": 2, "history": [],
    }  # fmt: skip


def test_lists_of_events_become_events(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.parquet", member=["a", "b", "c"], seen=["x|y", "", None], paid=[[1.0, float("nan")], [], None]
    )
    events = [{"seen": "x", "paid": 1.0}, {"seen": "y", "paid": None}]
    assert [record["history"] for record in latest(path).values()] == [events, [], []]
    path = write(tmp_path / "w.parquet", member=["a"], seen=["x|y"], paid=[[1.0]])
    with pytest.raises(InputError, match=r"w\.parquet: the lists of events of .* differ in length \(2 of seen, 1 of"):
        latest(path)


@pytest.mark.parametrize(
    ("columns", "user", "sentence"),
    [
        ({"membr": [1]}, "", r"has no column member, which names a user \(did you mean membr\?\); give it with --user"),
        ({"member": [1]}, "id", "has no column id"),
        ({"member": [[1]]}, "", "column member"),
    ],
)
def test_no_such_user(tmp_path: Path, columns: dict[str, Any], user: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        latest(write(tmp_path / "r.parquet", **columns), user=user)


def test_no_column_is_known_to_name_a_user(tmp_path: Path) -> None:
    encoding = IndexEncoding(Schema((Field("video", "item", size=9),)))
    with pytest.raises(InputError, match="no column is known to name a user; give it with --user"):
        latest(write(tmp_path / "r.parquet", id=[1]), encoding)


def test_csv_and_feather(tmp_path: Path) -> None:
    frame = pd.DataFrame({"member": ["007", "8"], "age": [1.5, 2.0], "seen": ["x|y", ""], "paid": [None, None]})
    frame[["member", "age"]].to_csv(tmp_path / "r.csv", index=False)
    assert latest(tmp_path / "r.csv")["007"] == {"member": "007", "age": 1.5, "history": []}
    feather.write_feather(frame[["member", "seen"]], tmp_path / "r.feather")
    assert latest(tmp_path / "r.feather")["007"]["history"] == [{"seen": "x"}, {"seen": "y"}]


# ---- logs ------------------------------------------------------------------------------------------------------------


def columns_of(records: dict[User, Record], encoding: RawEncoding) -> dict[str, dict[str, pa.Array]]:
    """Raw columns of stored requests, for an encoding."""
    rows = list(records.values())
    request = {name: pa.array([row.get(name) for row in rows]) for name in encoding.columns("request")}
    request |= {encoding.time: pa.nulls(len(rows))} if encoding.time else {}
    names = list(encoding.columns("history"))
    history = {name: pa.array([[event[name] for event in row["history"]] for row in rows]) for name in names}
    return {"request": request, "history": history}


def test_requests_of_a_log_encode_to_its_indices(recflow: Trained, recflow_bundle: Path) -> None:
    bundle, log = Bundle.load(recflow_bundle), open_log(recflow.log)
    zone = bundle.manifest["zone"]
    encoding = encoding_of(log, zone, log.history_length)
    assert isinstance(encoding, RecFlowEncoding)
    expected: dict[int, dict[str, np.ndarray]] = {}
    for name in log.days():
        day = log.open_day(name, bundle.cascade, None, zone)
        for row in np.lexsort((np.arange(len(day)), day.columns["request.minute"], day.columns["request.hour"])):
            user = int(day.columns["request.user"][row]) - 1
            expected[user] = {column: day.columns[column][row] for column in day.columns}
    records: dict[User, Record] = {}
    for some in latest_of_rows(requests_of_log(log, bundle.cascade, None, zone), encoding):
        records |= some
    assert records.keys() == expected.keys()
    raw = columns_of(records, encoding)
    for side in ("request", "history"):
        for name, values in encoding.encode(side, raw[side]).items():
            if name not in ("weekday", "hour", "minute"):
                wanted = np.array([expected[int(user)][f"{side}.{name}"] for user in records])
                np.testing.assert_array_equal(values, wanted, err_msg=f"{side}.{name}")


def test_the_command(recflow: Trained, recflow_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "features.sqlite"
    with caplog.at_level("INFO"):
        arguments = [f"--bundle={recflow_bundle}", f"--data_dir={recflow.log}", f"--features={path}"]
        assert commands.main(["features", *arguments]) == 0
    store = open_features(path)
    users = store.users(limit=1000)
    assert f"{path}: {len(users)} users" in caplog.text
    (record,) = store.get(users[:1])
    store.close()
    assert record is not None and record["user_id"] == users[0] and "request_timestamp" not in record
    columns = ["video_id", "author_id", "category_level_two", "category_level_one", "upload_type"]
    assert record["history"] and list(record["history"][-1]) == columns


def test_nothing_is_made_of_what_cannot_be_used(
    shop: Trained, shop_bundle: Path, recflow: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "features.sqlite"
    for source, sentence in (
        (f"--requests={tmp_path / 'none.parquet'}", "no such file"),
        (f"--data_dir={recflow.log}", "differ from those of the bundle"),
        (f"--data_dir={shop.log}", "holds indices that were made of raw values; give a table of the requests"),
    ):
        assert commands.main(["features", f"--bundle={shop_bundle}", source, f"--features={path}"]) == 2
        assert sentence in capsys.readouterr().err
    assert not path.exists()


def test_a_table_of_candidates_will_do(shop: Trained, shop_bundle: Path) -> None:
    """The one that a log was imported from: the fields of a user's latest request are in any of its rows."""
    assert shop.corpus is not None
    records: dict[User, Record] = {}
    for some in latest_requests(shop_bundle, requests=shop.corpus):
        records |= some
    frame = pd.read_parquet(shop.corpus).sort_values("time", kind="stable").drop_duplicates("user", keep="last")
    assert {user: record["device"] for user, record in records.items()} == dict(
        zip(frame["user"], frame["device"], strict=True)
    )
    assert all("time" not in record for record in records.values())
