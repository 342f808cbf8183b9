"""The cache of encoded days: when it is used, when it is built anew, and what lies on disk meanwhile."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any
from unittest import mock

import numpy as np
import pytest

from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade, Group
from deep_components.dataset.cache import default_cache_dir
from deep_components.dataset.columnar import ColumnFiles, DayCache
from deep_components.dataset.importers import recflow as importer
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log
from deep_components.dataset.manifest import write_manifest
from deep_components.errors import InputError
from tests.dataset.synthetic import COUNTS, DAY, edit_pickle, random_log, write_log
from tests.helpers import PRINT_PEAK


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log")


def open_day(root: Path, day: str, cascade: Cascade, **options: Any) -> DayCache:
    return open_log(root).open_day(day, cascade, **options)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The days that are encoded during the test."""
    encoded: list[str] = []
    encode_day = importer.encode_day

    def counting(data_dir: Path, day: str, *rest: Any) -> None:
        encoded.append(day)
        encode_day(data_dir, day, *rest)

    monkeypatch.setattr(importer, "encode_day", counting)
    yield encoded


def folder_of(parent: Path, cascade: str = "two_stage") -> Path:
    """The one folder of the cascade's cache, with nothing beside it."""
    (folder,) = (parent / cascade).iterdir()
    return folder


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def everything(day: DayCache) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in day.columns.items()}


def check_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name, strict=True)


# ---------------------------------------------------------------------------------------------- contents


def test_columns_have_the_smallest_types(root: Path) -> None:
    day = open_day(root, DAY, THREE_STAGE)
    assert len(day) == 12 and day.day == DAY
    types = {  # the largest index is count + 1
        "user": np.uint8,  # 255
        "device": np.uint16,  # 256
        "gender": np.uint8,
        "age": np.uint8,
        "province": np.uint8,
        "video": np.uint32,  # 65536
        "author": np.uint16,  # 65535
        "category_two": np.uint16,
        "category_one": np.uint8,
        "upload_type": np.uint8,
        "weekday": np.uint8,
        "hour": np.uint8,
        "minute": np.uint8,
        "label": np.int16,
        "mask": np.bool_,
        "request_id": np.int64,
    }
    for name, column in day.columns.items():
        assert not column.flags.writeable, name
        assert column.dtype == types[name.rpartition(".")[2]], name
        sizes = {"request": (), "request_id": (), "history": (50,), "item": (50,)}[name.partition(".")[0]]
        assert column.shape == (12, *sizes), name
    assert day.group.tolist() == [group for group in range(5) for _ in range(10)]
    for field, count in (("user", "user_id"), ("device", "device_id")):
        assert day.columns[f"request.{field}"].max() == COUNTS[count] + 1
    assert day.columns["item.video"].max() == 65_536 and day.columns["item.author"].max() == 65_535


def test_a_batch_holds_copies_of_the_requests_asked_for(root: Path) -> None:
    day = open_day(root, DAY, TWO_STAGE)
    before = everything(day)
    whole = day.batch(np.arange(len(day))).tensors()
    order = np.array([11, 0, 5, 5])
    for tensor, all_of_it in zip(day.batch(order).tensors(), whole, strict=True):
        np.testing.assert_array_equal(tensor, all_of_it[order])
        tensor.contiguous().zero_()
    check_same(before, everything(day))
    assert all(len(tensor) == 0 for tensor in day.batch(np.zeros(0, np.int64)).tensors())


# ---------------------------------------------------------------------------------------------- reuse


def test_a_cache_is_used_again(root: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first = everything(open_day(root, DAY, TWO_STAGE))
    folder = folder_of(root / "cache")
    assert folder.name.startswith(f"{DAY}-")
    before = state(folder)
    check_same(first, everything(open_day(root, DAY, TWO_STAGE, history_length=3)))
    assert state(folder) == before and builds == [DAY]
    assert not caplog.records


def test_two_cascades_and_two_days_lie_side_by_side(root: Path, builds: list[str]) -> None:
    write_log(root, random_log(5, seed=1), "2024-01-16")
    for _ in range(2):
        assert len(open_day(root, DAY, TWO_STAGE)) == 12
        assert len(open_day(root, "2024-01-16", TWO_STAGE)) == 5
        assert open_day(root, DAY, THREE_STAGE).columns["item.label"].shape == (12, 50)
    assert builds == [DAY, "2024-01-16", DAY]
    assert len(list((root / "cache" / "two_stage").iterdir())) == 2


def changed_log(root: Path) -> None:
    write_log(root, random_log(12, seed=9))


def touched(number: int) -> Callable[[Path], None]:
    def touch(root: Path) -> None:
        path = recflow.day_paths(root, DAY)[number]
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    return touch


def more_users(root: Path) -> None:
    recflow.write_id_counts(root, COUNTS | {"user_id": 255})


@pytest.mark.parametrize(
    "change",
    [changed_log, touched(0), touched(1), touched(2), more_users],
    ids=["another log", "all_stage", "request_id_dict", "seq_effective_50_dict", "id_cnt"],
)
def test_a_changed_source_gives_a_new_cache_and_removes_the_old(
    root: Path, builds: list[str], change: Callable[[Path], None]
) -> None:
    old_day = open_day(root, DAY, TWO_STAGE)
    old = folder_of(root / "cache")
    old_columns = everything(old_day)
    change(root)
    new = everything(open_day(root, DAY, TWO_STAGE))
    assert folder_of(root / "cache") != old
    assert builds == [DAY, DAY]
    if change is changed_log:
        assert not np.array_equal(new["item.video"], old_columns["item.video"])
    if change is more_users:
        assert new["request.user"].dtype == np.uint16
    check_same(old_columns, everything(old_day))  # who has it open goes on reading the old one


def test_a_source_of_equal_size_and_time_is_another_by_its_manifest(root: Path, builds: list[str]) -> None:
    def turn(requests: dict[int, dict[str, np.ndarray]]) -> None:
        for groups in requests.values():
            groups["rank_neg"][:, 1] = groups["rank_neg"][::-1, 1].copy()

    path = recflow.request_path(root, DAY)
    edit_pickle(path, lambda requests: requests)
    write_manifest(root, open_log(root).files())
    old = everything(open_day(root, DAY, TWO_STAGE))
    before = path.stat()
    edit_pickle(path, turn)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(InputError, match=r"2024-01-15.pkl: .*damaged or was replaced"):
        open_day(root, DAY, THREE_STAGE)
    write_manifest(root, open_log(root).files())
    new = everything(open_day(root, DAY, TWO_STAGE))
    assert not np.array_equal(new["item.author"], old["item.author"])
    assert builds == [DAY, DAY]


def test_a_change_of_what_is_asked_for_gives_a_new_cache(root: Path, builds: list[str]) -> None:
    def hours(zone: str) -> list[int]:
        return open_day(root, DAY, TWO_STAGE, zone=zone).columns["request.hour"].tolist()

    assert hours("Asia/Shanghai") != hours("UTC")
    later = (*TWO_STAGE.groups[:3], Group("prerank_neg", position=26))
    labels = open_day(root, DAY, dataclasses.replace(TWO_STAGE, groups=later)).columns["item.label"]
    assert (labels[:, 30:] == 4).all()
    small = dataclasses.replace(
        TWO_STAGE, groups=tuple(dataclasses.replace(group, size=4) for group in TWO_STAGE.groups)
    )
    assert open_day(root, DAY, small).columns["item.label"].shape == (12, 16)
    assert len(builds) == 4
    zones = list((root / "cache" / "two_stage").iterdir())
    assert len(zones) == 2  # the last of each time zone: another zone is another reading of the log, not a stale one


# ---------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without(folder: Path, entry: str) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta[entry]
    path.write_text(json.dumps(meta))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda folder: flip(folder / "item.video.npy"),
    "a cut column": lambda folder: os.truncate(folder / "request.user.npy", 130),
    "a missing column": lambda folder: (folder / "item.label.npy").unlink(),
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "meta.json without the files": lambda folder: without(folder, "files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_anew(root: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    sound = everything(open_day(root, DAY, TWO_STAGE))
    folder = folder_of(root / "cache")
    DAMAGE[damage](folder)
    with caplog.at_level(logging.WARNING):
        check_same(sound, everything(open_day(root, DAY, TWO_STAGE)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder) in caplog.text and "built anew" in caplog.text
    assert folder_of(root / "cache") == folder
    caplog.clear()
    check_same(sound, everything(open_day(root, DAY, TWO_STAGE)))
    assert not caplog.records


def test_what_was_left_out_is_counted_and_logged_each_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = recflow.history_path(root, DAY)
    path.write_bytes(b"\x80\x02}.")  # an empty dict
    for _ in range(2):
        caplog.clear()
        day = open_day(root, DAY, TWO_STAGE)
        (message,) = caplog.messages
        assert message.startswith(DAY) and "seq_effective_50_dict" in message and message.endswith(": 12")
        assert sorted(day.repairs.values()) == [0, 0, 0, 0, 0, 0, 0, 12]
    assert not day.columns["history.mask"].any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_an_interrupted_build_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write = ColumnFiles.write

    def interrupted(files: ColumnFiles, name: str, *rest: Any) -> None:
        write(files, name, *rest)
        if name == "item.author":
            assert (files.folder / "item.video.npy").exists()
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(ColumnFiles, "write", interrupted)
        with pytest.raises(error):
            open_day(root, DAY, TWO_STAGE)
    assert list((root / "cache" / "two_stage").iterdir()) == []
    assert len(open_day(root, DAY, TWO_STAGE)) == 12


def test_a_build_that_was_killed_is_not_opened(root: Path, builds: list[str]) -> None:
    sound = everything(open_day(root, DAY, TWO_STAGE))
    folder = folder_of(root / "cache")
    killed = folder.with_name(f".{folder.name}.0123.tmp")
    folder.rename(killed)
    (killed / "meta.json").unlink()
    check_same(sound, everything(open_day(root, DAY, TWO_STAGE)))
    assert builds == [DAY, DAY]


# ---------------------------------------------------------------------------------------------- where it lies


def test_the_cache_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert default_cache_dir(root) == root / "cache"
    open_day(root, DAY, TWO_STAGE, cache_dir=tmp_path / "a" / "b")
    folder_of(tmp_path / "a" / "b")
    assert not (root / "cache").exists()

    root.chmod(0o555)
    try:
        elsewhere = default_cache_dir(root)
        assert elsewhere.is_relative_to(tmp_path / "user" / "lcron")
        other = write_log(tmp_path / "other")
        other.chmod(0o555)
        assert default_cache_dir(other) != elsewhere
        other.chmod(0o755)
        monkeypatch.chdir(tmp_path)
        assert default_cache_dir(Path("log")) == elsewhere
        open_day(root, DAY, TWO_STAGE)
        assert not (root / "cache").exists()
        folder_of(elsewhere)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_cache_dir(root) == tmp_path / "home" / ".cache" / "lcron" / elsewhere.name
    finally:
        root.chmod(0o755)


def test_a_cache_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/two_stage.*cannot be written.*--cache_dir"):
        open_day(root, DAY, TWO_STAGE, cache_dir=tmp_path / "file")


def test_a_wrong_time_zone_or_day(root: Path) -> None:
    with pytest.raises(InputError, match="--time_zone=Mars"):
        open_day(root, DAY, TWO_STAGE, zone="Mars")
    with pytest.raises(InputError, match=r"2024-01-17.feather: no such file"):
        open_day(root, "2024-01-17", TWO_STAGE)
    recflow.id_count_path(root).unlink()
    with pytest.raises(InputError, match=r"id_cnt.pkl: no such file"):
        open_day(root, DAY, TWO_STAGE)


# ---------------------------------------------------------------------------------------------- two processes


def build_slowly(root: Path, day: str) -> int:
    """Open the day as another process does that has begun to encode it, until ``root/go`` is there."""
    finish = ColumnFiles.finish

    def wait_and_finish(files: ColumnFiles, made_from: Any) -> None:
        (root / "encoding").touch()
        limit = time.monotonic() + 60
        while not (root / "go").exists():
            assert time.monotonic() < limit, "nobody says go"
            time.sleep(0.005)
        finish(files, made_from)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColumnFiles, "finish", wait_and_finish)
        return int(open_day(root, day, TWO_STAGE).columns["item.video"].sum())


@contextmanager
def another_process(root: Path, day: str = DAY) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to finish the cache of ``day``."""
    script = "import sys, pathlib; from tests.dataset.test_cache import build_slowly;"
    script += "print(build_slowly(pathlib.Path(sys.argv[1]), sys.argv[2]))"
    arguments = [sys.executable, "-c", script, str(root), day]
    with subprocess.Popen(arguments, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            while not (root / "encoding").exists():
                assert process.poll() is None
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


def test_a_second_process_waits_for_the_cache(root: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with another_process(root) as other, caplog.at_level(logging.INFO):
        Timer(0.3, (root / "go").touch).start()
        ours = open_day(root, DAY, TWO_STAGE)
        theirs, _ = other.communicate(timeout=60)
    assert other.returncode == 0 and builds == []
    assert int(ours.columns["item.video"].sum()) == int(theirs)
    assert "waiting for another process" in caplog.text
    folder_of(root / "cache")


def temporary_folders(root: Path) -> list[Path]:
    return list((root / "cache" / "two_stage").glob(".*.tmp"))


def test_what_a_killed_process_has_left_is_removed(root: Path, builds: list[str]) -> None:
    with another_process(root) as other:
        other.kill()
        other.wait()
    assert len(temporary_folders(root)) == 1
    assert len(open_day(root, DAY, TWO_STAGE)) == 12
    assert builds == [DAY] and not temporary_folders(root)


def test_what_a_process_at_work_has_is_left_alone(root: Path) -> None:
    write_log(root, random_log(5, seed=1), "2024-01-16")
    with another_process(root) as other:
        assert len(open_day(root, "2024-01-16", TWO_STAGE)) == 5
        assert len(temporary_folders(root)) == 1
        (root / "go").touch()
        other.communicate(timeout=60)
    assert other.returncode == 0
    assert len(list((root / "cache" / "two_stage").iterdir())) == 2


def test_a_prepared_cache_that_nobody_may_write_to(root: Path, builds: list[str]) -> None:
    open_day(root, DAY, TWO_STAGE)
    really_open = os.open

    def read_only(path: str, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", read_only)
        assert len(open_day(root, DAY, TWO_STAGE)) == 12
        with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
            open_day(root, DAY, THREE_STAGE)
    assert builds == [DAY]


def test_a_full_disk_is_a_sentence(root: Path) -> None:
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch("os.posix_fallocate", full), pytest.raises(InputError, match=r"No space left.*--cache_dir"):
        open_day(root, DAY, TWO_STAGE)
    assert list((root / "cache" / "two_stage").iterdir()) == []


# ---------------------------------------------------------------------------------------------- memory


def peak_of_preparing(root: Path) -> int:
    """The most memory in bytes that a process takes while it prepares the day."""
    script = "import sys, pathlib, tempfile; from deep_components.cascade import TWO_STAGE;"
    script += "from deep_components.dataset.log import open_log;"
    script += "folder = tempfile.mkdtemp(dir=sys.argv[1]);"
    script += f"open_log(pathlib.Path(sys.argv[1])).open_day({DAY!r}, TWO_STAGE, cache_dir=pathlib.Path(folder))"
    arguments = [sys.executable, "-c", script + PRINT_PEAK, str(root)]
    return int(subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, check=True).stdout)


def test_memory_does_not_grow_as_the_files_do(tmp_path: Path) -> None:
    """Beyond one piece, only by the requests' own fields, and by the columns, which are mapped: some 2 KB a request."""
    small, large = (write_log(tmp_path / str(size), random_log(size)) for size in (6_000, 12_000))
    files = [sum(path.stat().st_size for path in recflow.day_paths(root, DAY)) for root in (small, large)]
    assert files[1] - files[0] > 6_000 * 9_000
    assert peak_of_preparing(large) - peak_of_preparing(small) < 6_000 * 3_500


def test_a_read_only_log_of_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    tmp_path.chmod(0o555)
    try:
        with (
            mock.patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory.")),
            pytest.raises(InputError, match="is read-only, and there is no HOME; name a folder with --cache_dir"),
        ):
            default_cache_dir(tmp_path)
    finally:
        tmp_path.chmod(0o755)
