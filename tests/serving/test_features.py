"""The feature store: one behaviour for SQLite and a real Redis, and what each refuses."""

import datetime
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components.errors import InputError
from deep_components.serving.features import FeatureStore, FeaturesUnavailableError, merged, open_features

SECRET = "s3cret:word"
URL_SECRET = "s3cret%3Aword"
ROOT = Path(__file__).parents[2]


@contextmanager
def redis_server(folder: Path, port: int = 0) -> Iterator[int]:
    """A Redis of the tests' own, by default on a free port, that keeps nothing."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server on this machine")
    pytest.importorskip("redis")
    port = port or free_port()
    arguments = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    arguments += ["--dir", str(folder), "--requirepass", SECRET]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of an empty store."""
    if request.param == "sqlite":
        return str(tmp_path / "bundle" / "features.sqlite")
    port = request.getfixturevalue("redis_port")
    return f"redis://:{URL_SECRET}@127.0.0.1:{port}/1?prefix={tmp_path.name}"


@pytest.fixture
def store(where: str) -> Iterator[FeatureStore]:
    opened = open_features(where, create=True)
    yield opened
    opened.close()


def events(*numbers: int) -> list[Any]:
    return [{"video_id": number} for number in numbers]


def test_what_was_put_comes_back(store: FeatureStore) -> None:
    store.put({7: {"age": 3, "city": "Zürich\n", "history": events(1, 2)}, "7": {"age": None}})
    assert store.get([7, "7", 8, None, 7]) == [
        {"age": 3, "city": "Zürich\n", "history": events(1, 2)},
        {"age": None, "history": []},
        None,
        None,
        {"age": 3, "city": "Zürich\n", "history": events(1, 2)},
    ]
    assert store.get([]) == []
    store.put({})
    store.put({7: {"age": 4}})  # replaced, not merged
    assert store.get([np.int64(7)]) == [{"age": 4, "history": []}]  # type: ignore[list-item]


def test_append_keeps_the_latest(store: FeatureStore) -> None:
    store.put({7: {"age": 3, "history": events(1, 2)}})
    store.append(7, events(3), keep=3)
    store.append(7, [4, "five"], keep=3)  # an event may be an item's raw id
    store.append("new", events(1, 2, 3), keep=2)
    store.append("new", [], keep=1)
    assert store.get([7, "new"]) == [{"age": 3, "history": [*events(3), 4, "five"]}, {"history": events(3)}]
    with pytest.raises(InputError, match="keep is 0"):
        store.append(7, events(1), keep=0)


def test_users_by_prefix(store: FeatureStore) -> None:
    store.put({user: {} for user in (7, 71, -7, 8, "7", "7b", "ada", "ä", "")})
    store.append("7c", [1], keep=5)
    assert store.users("7") == [7, 71, "7", "7b", "7c"]
    assert store.users("7", limit=3) == [7, 71, "7"] and store.users("7", limit=0) == []
    assert store.users("%") == store.users("*") == store.users("70") == []
    assert store.users("ä") == ["ä"]
    assert store.users(limit=100) == [-7, 7, 71, 8, "", "7", "7b", "7c", "ada", "ä"]


def test_values_of_arrow_and_numpy(store: FeatureStore) -> None:
    day, at = datetime.date(2024, 2, 4), datetime.datetime(2024, 2, 4, 12, 30, tzinfo=datetime.UTC)
    store.put({1: {"day": day, "at": at, "price": Decimal("1.5"), "count": np.int32(3), "tags": ["a", None]}})
    texts = {"day": "2024-02-04", "at": "2024-02-04T12:30:00+00:00"}
    assert store.get([1]) == [{**texts, "price": 1.5, "count": 3, "tags": ["a", None], "history": []}]
    big = 2**63 - 1  # which a float would round
    store.put({1: {"id": big, "history": [big]}})
    store.append(1, [big - 1], keep=5)
    assert store.get([1]) == [{"id": big, "history": [big, big - 1]}]


@pytest.mark.parametrize(
    ("user", "record", "sentence"),
    [
        (True, {}, "user 'bool'"),
        (7.0, {}, "user 'float': a user is a whole number"),
        (2**63, {}, "64 bits"),
        ("x" * 600, {}, "511 bytes"),
        ("\ud800", {}, "not text that UTF-8 can hold"),
        (1, {"price": float("nan")}, "user 1: cannot be stored"),
        (1, {"raw": b"bytes"}, "a bytes"),
        (1, {"history": "1,2"}, "no list of events"),
    ],
)
def test_what_cannot_be_stored(store: FeatureStore, user: Any, record: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        store.put({2: {"age": 1}, user: record})
    assert store.get([2]) == [None]  # all of them or none


_APPEND_MANY = """
import sys
from deep_components.serving.features import open_features
store = open_features(sys.argv[1])
for number in range(25):
    store.append("shared", [[int(sys.argv[2]), number]], keep=1000)
store.close()
"""


def test_processes_lose_nothing(store: FeatureStore, where: str) -> None:
    command = [sys.executable, "-c", _APPEND_MANY, where]
    writers = [subprocess.Popen([*command, str(writer)], cwd=ROOT) for writer in range(3)]
    assert [process.wait() for process in writers] == [0, 0, 0]
    (record,) = store.get(["shared"])
    assert record is not None and len(record["history"]) == 75
    for writer in range(3):  # each writer's events in its order
        assert [event for event in record["history"] if event[0] == writer] == [[writer, n] for n in range(25)]


def test_threads(store: FeatureStore) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                store.append(1, [number], keep=100)
                store.get([1])
        except InputError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (record,) = store.get([1])
    assert not failed and record is not None and len(record["history"]) == 40


def test_a_request_s_own_fields_win() -> None:
    stored = {"age": 3, "city": "Ulm", "history": events(1)}
    assert merged({"age": 4, "history": []}, stored) == {"age": 4, "city": "Ulm", "history": []}
    assert merged({"age": 4}, stored)["history"] == events(1)
    assert merged({"age": 4}, None) == {"age": 4}
    assert merged({"clicks": [7]}, stored, ["clicks"]) == {"age": 3, "city": "Ulm", "clicks": [7]}
    assert merged({"clicks": None}, stored, ["clicks"])["history"] == events(1)


def test_the_page_s_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/serving.md").read_text().split("\n## User histories\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, {})
    assert f"```\n{capsys.readouterr().out}```" in section


# ---- SQLite ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with one record, closed."""
    path = tmp_path / "store" / "features.sqlite"
    store = open_features(path, create=True)
    store.put({1: {"age": 3}})
    store.close()
    return path


def edit(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_file_is_made_only_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.sqlite: no such file; lcron features fills one"):
        open_features(tmp_path / "none.sqlite")
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder(file: Path) -> None:
    file.parent.chmod(0o555)
    try:
        store = open_features(file)
        assert store.get([1]) == [{"age": 3, "history": []}]
        with pytest.raises(InputError, match=r"features\.sqlite: cannot be written"):
            store.append(1, [2], keep=5)
        store.close()
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        file.with_name("features.sqlite-wal").write_bytes(b"changes")
        with pytest.raises(InputError, match="only read where the folder can be written"):
            open_features(file)
    finally:
        file.parent.chmod(0o755)


def overwrite_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)  # the records'
    path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("user,age\n" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "page": overwrite_page,
    "another database": lambda path: edit(path, "DROP TABLE records", "CREATE TABLE t (a)"),
    "trigger": lambda path: edit(path, "CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM records; END"),
    "view": lambda path: edit(
        path, "DROP TABLE records", "CREATE VIEW records AS SELECT 1 AS user, load_extension('x') AS record"
    ),
    "later": lambda path: edit(path, "PRAGMA user_version = 2"),
    "pipe": lambda path: os.mkfifo(path.rename(path.with_name("x")).with_name(path.name)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_no_store(file: Path, how: str) -> None:
    BROKEN[how](file)
    with pytest.raises(InputError, match=str(file)) as refused, closing(open_features(file)) as store:
        store.get([1])
    assert "\n" not in str(refused.value)
    assert ("version 2" in str(refused.value)) == (how == "later")


def test_a_damaged_record(file: Path) -> None:
    texts = [f"'{text}'" for text in ("[1]", "{", '{"a": 1}\n[', "[" * 100_000)]
    for text in (*texts, "x'7b22ff22'", "12", "4.5", "''"):
        edit(file, f"UPDATE records SET record = {text}")
        store = open_features(file)
        with pytest.raises(InputError, match="the record of user 1 is damaged"):
            store.get([1])
        store.close()


def test_a_damaged_key(file: Path) -> None:
    edit(file, "UPDATE records SET user = x'6978'")  # i, as of a whole number, and an x
    store = open_features(file)
    with pytest.raises(InputError, match="a user's key is damaged"):
        store.users()
    store.close()


def test_a_file_that_another_process_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_components.serving.features._SECONDS_TO_WAIT", 0.05)
    store, other = open_features(file), sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.get([1]) == [{"age": 3, "history": []}]  # readers do not wait
    with pytest.raises(FeaturesUnavailableError, match="another process has been writing"):
        store.append(1, [2], keep=5)
    other.rollback()
    other.close()
    store.append(1, [2], keep=5)
    store.close()


# ---- Redis -----------------------------------------------------------------------------------------------------------


def test_a_redis_that_is_away() -> None:
    pytest.importorskip("redis")
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(FeaturesUnavailableError, match=f"redis://127.0.0.1:{port}/0: does not answer") as refused:
            open_features(f"redis://me:{URL_SECRET}@127.0.0.1:{port}")
    assert "s3cret" not in str(refused.value) and refused.value.__cause__ is None


def test_a_redis_that_comes_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as port:
        store = open_features(f"redis://:{URL_SECRET}@127.0.0.1:{port}")
        store.put({1: {"age": 3}})
    with pytest.raises(FeaturesUnavailableError, match="does not answer"):
        store.get([1])
    with redis_server(tmp_path, port):
        assert store.get([1]) == [None]  # as that one keeps nothing
    store.close()


def test_passwords(redis_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in ("", ":s3cret-wrong@"):
        with pytest.raises(InputError, match="refuses the user or password") as refused:
            open_features(f"redis://{secret}127.0.0.1:{redis_port}")
        assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("LCRON_REDIS_PASSWORD", SECRET)
    open_features(f"redis://127.0.0.1:{redis_port}").close()


@pytest.mark.parametrize(
    "url",
    ["redis://:s3cret@host:port", "redis://:s3cret@host/one", "redis://:s3cret@host/?timeot=1", "redis://h/1#s3cret"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="not redis://") as refused:
        open_features(url)
    assert "s3cret" not in str(refused.value)


def test_another_kind_of_store() -> None:
    with pytest.raises(InputError, match=r"mysql://\.\.\.: no such kind of store"):
        open_features("mysql://me:s3cret@host")
