"""The columnar format: days that are written come back, and what does not fit its schema is refused."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components.cascade import Cascade, Group, Stage
from deep_components.dataset import columnar
from deep_components.dataset.columnar import (
    REPEATED,
    VERIFIED,
    DayCache,
    columns_of,
    read_day,
    repeated_items,
    write_day,
)
from deep_components.dataset.days import test_day as default_test_day
from deep_components.dataset.days import training_days
from deep_components.dataset.log import open_log, write_log_file
from deep_components.errors import InputError
from deep_components.schema import Field, Schema

DAY = "2024-01-13"
SCHEMA = Schema(
    (
        Field("user", "request", size=257),
        Field("hour", "request", "time", size=26),
        Field("age", "request", "number"),
        Field("video", "history", size=1001, padding=3, unknown=5),
        Field("watched", "history", "number"),
        Field("video", "item", size=1001, padding=3, unknown=5),
        Field("price", "item", "number"),
        Field("hour", "item", "time", size=26),
    )
)
CASCADE = Cascade((Stage("retrieval", 4, "dssm"), Stage("rank", 2, "din")), (Group("good", 2), Group("bad", 3)))
R, L, N = 7, 4, 5


def values(requests: int = R) -> dict[str, np.ndarray]:
    """A day's columns in the types that the format wants."""
    rng = np.random.default_rng(0)
    shapes = {"request": (requests,), "history": (requests, L), "item": (requests, N)}
    found = {}
    for name, column in columns_of(SCHEMA).items():
        kind, shape = column.dtypes[0], shapes[column.side]
        limit = 2 if kind.kind == "b" else column.limit or 100
        drawn = rng.random(shape) if kind.kind == "f" else rng.integers(0, limit, shape)
        found[name] = drawn.astype(kind)
    found["item.group"] = np.tile(np.array([1, 0, 1, 0, 1], np.uint8), (requests, 1))
    return found


def write(folder: Path, columns: dict[str, np.ndarray] | None = None, schema: Schema = SCHEMA) -> Path:
    columns = values() if columns is None else columns
    with write_day(folder, schema, len(columns["request_id"])) as day:
        for name, column in columns.items():
            day.write(name, column)
    return folder


def read(folder: Path, cascade: Cascade = CASCADE, **options: Any) -> DayCache:
    return read_day(folder, DAY, cascade, **options)


def seal(folder: Path, **changes: Any) -> None:
    """Make meta.json fit the folder's files again, as a forger would."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    meta["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.npy")
    }
    meta |= changes
    meta["checksum"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


# ---------------------------------------------------------------------------------------------- written and read


def test_a_day_reads_back(tmp_path: Path) -> None:
    columns = values()
    day = read(write(tmp_path / DAY, columns))
    assert set(day.columns) == set(columns) and len(day) == R and day.schema == SCHEMA
    for name, column in columns.items():
        np.testing.assert_array_equal(day.columns[name], column, strict=True)
        assert not day.columns[name].flags.writeable
    requests = np.array([5, 0, 0])
    batch = day.batch(requests)
    for side in ("request", "history", "item"):
        fields = getattr(batch.features, side)
        assert list(fields) == [field.name for field in SCHEMA.side(side)]
        for name, tensor in fields.items():
            expected = columns[f"{side}.{name}"][requests]
            wanted = expected if expected.dtype == np.float32 else expected.astype(np.int64)
            np.testing.assert_array_equal(tensor.numpy(), wanted, strict=True)
    np.testing.assert_array_equal(batch.features.history_mask, columns["history.mask"][requests])
    np.testing.assert_array_equal(batch.targets.labels, columns["item.label"][requests])
    np.testing.assert_array_equal(batch.targets.mask, columns["item.mask"][requests])
    np.testing.assert_array_equal(batch.targets.group, columns["item.group"][requests])
    np.testing.assert_array_equal(batch.request_id, columns["request_id"][requests])


def test_without_a_column_of_groups_the_cascade_s_hold(tmp_path: Path) -> None:
    columns = values()
    del columns["item.group"]
    targets = read(write(tmp_path / DAY, columns)).batch(np.arange(3)).targets
    assert targets.group.tolist() == [[0, 0, 1, 1, 1]] * 3


@pytest.mark.parametrize("length", [0, 1, L, None])
def test_the_last_history_positions_are_handed_out(tmp_path: Path, length: int | None) -> None:
    columns = values()
    day = read(write(tmp_path / DAY, columns)).with_history(length)
    first = 0 if length is None else L - length
    batch = day.batch(np.arange(R))
    np.testing.assert_array_equal(batch.features.history["video"], columns["history.video"][:, first:])
    np.testing.assert_array_equal(batch.features.history_mask, columns["history.mask"][:, first:])
    with pytest.raises(InputError, match=r"--seq_len=5: the histories of the log have 4 positions"):
        day.with_history(5)


def test_pieces_and_other_types_give_the_same_day(tmp_path: Path) -> None:
    columns = values()
    whole = read(write(tmp_path / DAY, columns))
    with write_day(tmp_path / "pieces", SCHEMA, R) as day:
        for rows in (np.array([6, 1, 0]), np.array([2, 3, 4, 5])):
            for name, column in columns.items():
                wide = np.float64 if column.dtype == np.float32 else np.int64
                day.write(name, column[rows].astype(wide if name != "item.label" else column.dtype), rows)
    assert read(tmp_path / "pieces").checksum == whole.checksum


def test_the_ids_of_a_table(tmp_path: Path) -> None:
    columns = values()
    day = read(write(tmp_path / DAY, columns))
    videos = np.union1d(columns["history.video"], columns["item.video"])
    assert day.ids("video").ids().tolist() == np.union1d(videos, [0, 3, 5]).tolist()
    assert day.ids("hour").ids().tolist() == np.union1d(columns["request.hour"], columns["item.hour"]).tolist()
    (tmp_path / DAY / "ids.video.npy").unlink()  # a user's own script need not write them
    seal(tmp_path / DAY)
    assert read(tmp_path / DAY).ids("video") == day.ids("video")


@pytest.mark.parametrize("name", [b"b\xff", "\u00fc \u6f22".encode()], ids=["no UTF-8", "UTF-8"])
def test_a_folder_of_any_name(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    assert len(read(write(folder / DAY))) > 0


def test_an_open_day_keeps_no_file_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    write(tmp_path / DAY)
    read(tmp_path / DAY)
    before = opened()
    days = [read(tmp_path / DAY) for _ in range(3)]
    assert opened() == before and len(days) == 3


def test_repairs_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with write_day(tmp_path / DAY, SCHEMA, R) as day:
        for name, column in values().items():
            day.write(name, column)
        day.repairs = {"prices unknown, given 0": 3, "nothing": 0}
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / DAY).repairs == {"prices unknown, given 0": 3, "nothing": 0}
    assert caplog.messages == [f"{DAY}: prices unknown, given 0: 3"]


# ---------------------------------------------------------------------------------------------- refused when written


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("item.price", lambda v: np.where(v > 2, v, np.nan), "no finite number"),
        ("request.age", lambda v: v + np.float32(np.inf), "no finite number"),
        ("request.user", lambda v: v + 257, "holds .*outside the 0 .. 256"),
        ("request.user", lambda v: v.astype(np.int64) - 1000, "outside the 0 .. 65535"),
        ("request.user", lambda v: v.astype(np.float32), "type float32, not uint16"),
        ("item.hour", lambda v: v.astype(np.int64) * 0 + 256, "holds 256, outside the 0 .. 255"),
        ("item.mask", lambda v: v.astype(np.int64) + 2, "outside the 0 .. 1"),
        ("item.label", lambda v: v.astype(str), "not int64"),
        ("item.label", lambda v: v - 1000, "holds -[0-9]+; labels are gains"),
        ("item.label", lambda v: v.astype(np.int64) + 1_700_000_000, "labels are whole numbers from 0 to 16777216"),
        ("item.video", lambda v: v[:, :4], r"shape \(7, 4\), not \(7, 5\)"),
        ("history.watched", lambda v: v[:, :, None], r"shape \(7, 4, 1\), not \(7, 4\)"),
    ],
)
def test_what_does_not_fit_is_not_written(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], text: str
) -> None:
    columns = values()
    columns[name] = change(columns[name])
    with pytest.raises(InputError, match=rf"{name}.*{text}"):
        write(tmp_path / DAY, columns)
    assert list(tmp_path.iterdir()) == []


def test_items_that_equal_another_of_their_request_are_counted(tmp_path: Path) -> None:
    columns = values()
    for name in ("item.video", "item.price", "item.hour"):
        columns[name][2, 3] = columns[name][2, 0]  # one item twice
        columns[name][4, [1, 2, 3]] = columns[name][4, 0]  # one item four times, of which one is missing
        columns[name][5] = columns[name][6]  # in another request
    columns["item.price"][1] = columns["item.price"][1, 0]  # in one field alone
    columns["item.mask"][:] = True
    columns["item.mask"][4, 2] = False
    day = read(write(tmp_path / DAY, columns))
    assert repeated_items(SCHEMA, columns) == 3
    assert dict(day.repairs) == {REPEATED: 3}


def test_other_columns_are_not_written(tmp_path: Path) -> None:
    columns = values()
    with pytest.raises(InputError, match=r"column item.colour: not in the schema"):
        write(tmp_path / DAY, columns | {"item.colour": columns["item.hour"]})
    del columns["history.video"]
    with pytest.raises(InputError, match=r"column history.video: not written"):
        write(tmp_path / DAY, columns)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / DAY)
    with pytest.raises(InputError, match=rf"{DAY}: is there already"):
        write(tmp_path / DAY)
    with pytest.raises(InputError, match="holds no request"):
        write(tmp_path / "empty", values(0))
    huge = Schema((*SCHEMA.fields, Field("tag", "item", size=(1 << 32) + 1)))
    with pytest.raises(InputError, match="field tag of side item: size 4294967297 is above"):
        write(tmp_path / "huge", schema=huge)


# ---------------------------------------------------------------------------------------------- refused when read


def save(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    """Change a column, and make meta.json fit."""

    def spoil(folder: Path) -> None:
        path = folder / f"{name}.npy"
        np.save(path, change(np.load(path)))
        seal(folder)

    return spoil


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        seal(folder)

    return spoil


def schema_with(**changes: Any) -> dict[str, Any]:
    """The schema with the first field changed."""
    content = SCHEMA.to_json()
    content["fields"][0] |= changes
    return content


def flip(folder: Path) -> None:
    path = folder / "item.video.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def add_column(folder: Path) -> None:
    np.save(folder / "item.tag.npy", np.zeros(3))
    seal(folder)


def remove_column(folder: Path) -> None:
    (folder / "item.video.npy").unlink()
    seal(folder)


def replace_by_fifo(folder: Path) -> None:
    (folder / "item.video.npy").unlink()
    os.mkfifo(folder / "item.video.npy")


POISONED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an index of its table's size": (save("item.video", lambda v: np.where(v == v[0, 0], 1001, v).astype(v.dtype)),
                                     "item.video.npy: holds 1001, outside the 0 .. 1000"),
    "the type's largest index": (save("request.user", lambda v: v * 0 + 65535), "outside the 0 .. 256"),
    "a wider type": (save("item.video", lambda v: v.astype(np.uint32)), "type uint32, not uint16"),
    "a signed type": (save("item.video", lambda v: v.astype(np.int16)), "type int16, not uint16"),
    "another byte order": (save("item.video", lambda v: v.astype(">u2")), "type >u2, not uint16"),
    "indices as floats": (save("item.video", lambda v: v.astype(np.float32)), "type float32, not uint16"),
    "numbers as doubles": (save("item.price", lambda v: v.astype(float)), "type float64, not float32"),
    "a negative label": (save("item.label", lambda v: v * 0 - 5), "item.label.npy: holds -5; labels are gains"),
    "NaN": (save("item.price", lambda v: v * np.float32(np.nan)), "no finite number"),
    "a mask of 255": (overwrite("item.mask.npy", lambda c: c[:-1] + b"\xff"), "holds 255, outside the 0 .. 1"),
    "a group that the cascade lacks": (save("item.group", lambda v: v + 1), "holds 2, and the cascade custom has 2 gr"),
    "fewer rows": (save("item.video", lambda v: v[:-1]), r"shape \(6, 5\), not \(7, 5\)"),
    "fewer requests": (save("request_id", lambda v: v[:-1]), r"not \(6"),
    "fewer items": (save("item.video", lambda v: v[:, :-1]), r"shape \(7, 4\), not \(7, 5\)"),
    "another length": (save("history.mask", lambda v: v[:, :-1]), r"not \(7, 3\)"),
    "a mask of one axis": (save("history.mask", lambda v: v[:, 0]), "history"),
    "a number for a column": (save("request_id", lambda v: v[0]), "request_id"),
    "Fortran's order": (save("item.video", np.asfortranarray), "item.video.npy: not a readable .npy file"),
    "objects": (save("item.video", lambda v: v.astype(object)), "item.video.npy: not a readable .npy file"),
    "bytes behind the array": (overwrite("item.video.npy", lambda c: c + b"1"), "not a readable .npy file"),
    "a cut array": (overwrite("item.video.npy", lambda c: c[:-1]), "not a readable .npy file"),
    "a cut header": (overwrite("item.video.npy", lambda c: c[:20]), "not a readable .npy file"),
    "no .npy file": (overwrite("item.video.npy", lambda c: b"a,b\n1,2\n"), "not a readable .npy file"),
    "a header of many signs": (
        overwrite("item.video.npy", lambda c: c[:10] + b"-" * 900 + b"1" + c[128:]), "not a readable .npy file"
    ),
    "many axes": (overwrite("item.video.npy", lambda c: c.replace(b"(7, 5), }" + b" " * 6, b"(1, 1, 7, 5), }")),
                  "not a readable .npy file"),
    "a huge shape": (overwrite("item.video.npy", lambda c: c.replace(b"(7, 5), ", b"(1<<9,) ")), "not a readable"),
    "a set of ids that is short": (save("ids.video", lambda v: v[:-1]), "ids.video.npy: not a set of ids below 1001"),
    "ids beyond the table": (save("ids.video", lambda v: v | np.uint64(1 << 63)), "not a set of ids below 1001"),
    "a set of ids of another type": (save("ids.video", lambda v: v.view(np.int64)), "not a set of ids below 1001"),
    "a column too many": (add_column, "item.tag.npy: not a file"),
    "a file that is not listed": (lambda f: (f / "notes").touch(), "notes: not a file that meta.json"),
    "a column too few": (remove_column, "item.video.npy: no such file"),
    "a listed file too few": (lambda f: (f / "ids.video.npy").unlink(), "ids.video.npy: no such file"),
    "a FIFO": (replace_by_fifo, "item.video.npy: not a readable .npy file \\(not a regular file"),
    "a flipped bit": (flip, "item.video.npy: does not match its checksum"),
    "another size in the schema": (lambda f: seal(f, schema=schema_with(size=99)), "type uint16, not uint8"),
    "a smaller size in the schema": (lambda f: seal(f, schema=schema_with(size=257 - 40)), "not uint8"),
    "a size beyond all": (lambda f: seal(f, schema=schema_with(size=1 << 70)), "is above"),
    "a name with a slash": (lambda f: seal(f, schema=schema_with(name="../a")), "not a schema"),
    "no fields": (lambda f: seal(f, schema=[]), "not a schema"),
    "another format": (lambda f: seal(f, format=2), "format 2, not 3"),
    "no repairs": (lambda f: seal(f, repairs=None), "meta.json: not readable"),
    "sizes that are texts": (lambda f: seal(f, files={"a": {"size": "1", "sha256": "1"}}), "meta.json: not readable"),
    "no checksum": (lambda f: (f / "meta.json").write_text("{}"), "meta.json: not readable"),
    "a list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json: not readable"),
    "nesting without end": (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json: not readable"),
    "no meta.json": (lambda f: (f / "meta.json").unlink(), "meta.json: not readable"),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISONED)
def test_a_poisoned_day_is_refused(tmp_path: Path, poison: str) -> None:
    folder = write(tmp_path / DAY)
    read(folder)
    spoil, text = POISONED[poison]
    spoil(folder)
    with pytest.raises(InputError, match=text) as caught:
        read(folder)
    assert str(folder) in str(caught.value) or "field user" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cascade_of_another_size_is_refused(tmp_path: Path) -> None:
    other = Cascade(CASCADE.stages, (Group("good", 2), Group("bad", 4)), name="other")
    with pytest.raises(InputError, match=r"have 5 items, the cascade other has 6"):
        read(write(tmp_path / DAY), other)


# ---------------------------------------------------------------------------------------------- verified once


def child(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that opens the day and prints the last video of the last request."""
    script = "from tests.dataset.test_columnar import *;"
    script += "print(read(Path(sys.argv[1])).columns['item.video'][-1, -1])"
    variables = {key: value for key, value in os.environ.items() if key != VERIFIED} | environment
    arguments = [sys.executable, "-c", script, str(folder)]
    root = Path(__file__).parents[2]
    return subprocess.run(arguments, cwd=root, env=variables, capture_output=True, text=True, check=False)


def test_a_child_does_not_read_what_its_parent_has_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERIFIED, raising=False)
    folder = write(tmp_path / DAY)
    read(folder)
    assert VERIFIED not in os.environ  # its files are so young that another change might not be seen
    long_ago = time.time_ns() - 60 * 10**9
    for path in folder.iterdir():
        os.utime(path, ns=(long_ago, long_ago))
    value = int(read(folder).columns["item.video"][-1, -1])
    status = (folder / "item.video.npy").stat()
    flip(folder)
    os.utime(folder / "item.video.npy", ns=(status.st_atime_ns, status.st_mtime_ns))

    trusting = child(folder, **{VERIFIED: os.environ[VERIFIED]})
    assert (trusting.returncode, int(trusting.stdout)) == (0, value ^ 1), trusting.stderr
    reading = child(folder)
    assert reading.returncode and "does not match its checksum" in reading.stderr
    os.utime(folder / "item.video.npy")
    changed = child(folder, **{VERIFIED: os.environ[VERIFIED]})
    assert changed.returncode and "does not match its checksum" in changed.stderr


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "_JUST_WRITTEN", -(10**18))
    monkeypatch.delenv(VERIFIED, raising=False)
    hashed: list[str] = []
    check_values = columnar._check_values

    def counting(folder: Path, name: str, *rest: Any) -> str:
        hashed.append(name)
        return check_values(folder, name, *rest)

    monkeypatch.setattr(columnar, "_check_values", counting)
    folder = write(tmp_path / DAY)
    for _ in range(3):
        read(folder)
    assert sorted(hashed) == sorted(values())


# ---------------------------------------------------------------------------------------------- logs and docs


def examples(language: str) -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(
        [sys.executable, "-c", examples("python")[number]],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    (tmp_path / "shop.toml").write_text(examples("toml")[0])
    cascade = Cascade.from_toml(tmp_path / "shop.toml")
    log = open_log(tmp_path / "my_log")
    assert (log.origin, log.days(), log.history_length) == ("my shop", ["2024-01-13", "2024-01-14"], 3)
    assert (training_days(log, None), default_test_day(log, None)) == (["2024-01-13"], "2024-01-14")
    for day in log.days():
        batch = log.open_day(day, cascade, history_length=2).batch(np.arange(100))
        assert batch.features.history["video"].shape == (100, 2) and batch.features.item["price"].shape == (100, 4)
        assert batch.targets.group[99].tolist() == [0, 0, 1, 1]
    assert log.schema.tables["video"].size == 301


def test_a_log_s_days_have_one_schema_and_one_history_length(tmp_path: Path) -> None:
    write(tmp_path / DAY)
    fields = [Field(f.name, f.side, f.kind, f.size, f.padding, f.unknown, f.table) for f in SCHEMA.fields]
    fields[0] = Field("user", "request", size=258)
    write(tmp_path / "2024-01-14", schema=Schema(tuple(fields)))
    write_log_file(tmp_path, "test")
    log = open_log(tmp_path)
    assert len(log.open_day(DAY, CASCADE)) == R
    with pytest.raises(InputError, match=r"2024-01-14/meta.json: another schema or history length"):
        log.open_day("2024-01-14", CASCADE)
    shorter = {name: v[:, 1:] if name.startswith("history.") else v for name, v in values().items()}
    write(tmp_path / "2024-01-15", shorter)
    with pytest.raises(InputError, match=r"2024-01-15/meta.json: another schema or history length"):
        log.open_day("2024-01-15", CASCADE)


def test_a_folder_that_is_no_log(tmp_path: Path) -> None:
    write_log_file(tmp_path, "test")
    with pytest.raises(InputError, match=r"has log.json but no day in it"):
        open_log(tmp_path)
    write(tmp_path / "day 1")
    with pytest.raises(InputError, match=r"day 1 is no date"):
        open_log(tmp_path)
    (tmp_path / "day 1").rename(tmp_path / DAY)
    facts = ['"test_days": 0', '"test_days": "1"', '"test_days": true', '"time_zone": "Mars"', '"time_zone": null']
    facts += ['"time_zone": "../UTC"', '"time_zone": ["UTC"]']
    for content in (
        "",
        "[]",
        '{"origin": 5}',
        '{"origin": "a\\nb"}',
        *(f'{{"origin": "a", {fact}}}' for fact in facts),
    ):
        (tmp_path / "log.json").write_text(content)
        with pytest.raises(InputError, match=r"log.json: .*make the log again"):
            open_log(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        open_log(tmp_path / "nowhere")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / DAY)
    assert list(tmp_path.iterdir()) == []
