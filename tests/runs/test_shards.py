"""The state that several processes save: read by any number of them, committed at once, and never a mixture."""

import errno
import itertools
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components.errors import InputError
from deep_components.runs import checked
from deep_components.runs.folder import (
    STATE_FILE,
    remove_leftovers,
    remove_run,
    remove_shards,
    remove_state,
    shard_file,
)
from deep_components.runs.shards import SavedState, save_shard
from deep_components.runs.state import load_state, save, save_state

WHOLE, COMPACTED = "exp_avg/rank/embedding.user", "parameter/rank/embedding.video"
IDS = np.array([1, 4, 9, 11, 12])
NOTE = {"of_run": {"seed": 5}}
WORLDS = (1, 2, 3, 7)


def position(step: int) -> dict[str, int]:
    return {"epoch": 0, "day": 1, "batch": 2, "step": step, "skipped": 0}


def state_of(step: int, ids: np.ndarray = IDS) -> dict[str, np.ndarray]:
    """Row i is (i, step), of a whole table and of one with rows for ``ids``."""

    def rows(ids: np.ndarray, dtype: Any) -> np.ndarray:
        return np.stack([ids, np.full(len(ids), step)], axis=1).astype(dtype)

    return {
        WHOLE: rows(np.arange(10), np.float32), COMPACTED: rows(ids, float), "ids/video": ids,
        "last/rank/embedding.video": ids + step, "step/rank/embedding.video": np.array(float(step)),
        "parameter/rank/bias": np.full(3, step), "generator/cpu": np.full(4, 0, np.uint8),
    }  # fmt: skip


SHARDED = (WHOLE, COMPACTED, "ids/video", "last/rank/embedding.video")


def saved(run: Path, count: int, step: int, ids: np.ndarray = IDS) -> None:
    """Save as ``count`` processes do; each has its rank in the state of its generator."""
    state = state_of(step, ids)
    if count == 1:
        save_state(run / STATE_FILE, state, position(step), NOTE)
        return
    checksums = [
        save_shard(
            run, step, rank, count,
            {name: state[name][rank::count] for name in SHARDED} | {"generator/cpu": np.full(4, rank, np.uint8)}, NOTE,
        )
        for rank in range(count)
    ]  # fmt: skip
    shared = {name: values for name, values in state.items() if name not in (*SHARDED, "generator/cpu")}
    save_state(run / STATE_FILE, shared, position(step), NOTE, checksums)


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def files_of(count: int, step: int) -> set[str]:
    return {STATE_FILE, *(shard_file(step, rank, count) for rank in range(count) if count > 1)}


# ---- any number of processes reads what any number saved -------------------------------------------------------------


@pytest.mark.parametrize("count", WORLDS)
def test_as_one_process_would_have_saved_it(count: int, tmp_path: Path) -> None:
    saved(tmp_path, count, step=6)
    arrays, reached = load_state(tmp_path / STATE_FILE)
    assert reached == position(6)
    expected = state_of(6)
    assert list(arrays) == sorted(expected) == list(SavedState(tmp_path / STATE_FILE))
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype and np.array_equal(arrays[name], values), name
        assert np.array_equal(SavedState(tmp_path / STATE_FILE)[name], values)


def test_one_process_saves_one_file_as_ever(tmp_path: Path) -> None:
    save_state(tmp_path / STATE_FILE, state_of(6), position(6), NOTE)
    save(tmp_path / "file", state_of(6), {**NOTE, "position": position(6)})
    assert (tmp_path / STATE_FILE).read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(("before", "after"), [*itertools.product(WORLDS, WORLDS)])
def test_the_rows_that_a_process_holds(before: int, after: int, tmp_path: Path) -> None:
    """Also of a log that names more ids by now; rows of those that the state does not know stay as they are."""
    saved(tmp_path, before, step=6)
    grown = np.array([0, 1, 4, 7, 9, 11, 12, 20])
    for rank in range(after):
        state = SavedState(tmp_path / STATE_FILE, rank)
        ids = grown[rank::after]
        rows = np.full((len(ids), 2), -1.0)
        assert state.copy_rows(COMPACTED, ids, rows).tolist() == np.isin(ids, IDS).tolist()
        assert rows.tolist() == [[i, 6] if i in IDS else [-1, -1] for i in ids]
        last = np.full(len(ids), -1, np.int32)  # a number a row, of another type
        state.copy_rows("last/rank/embedding.video", ids, last)
        assert last.tolist() == [i + 6 if i in IDS else -1 for i in ids]
        whole = np.zeros((len(range(rank, 10, after)), 2), np.float32)
        assert state.copy_rows(WHOLE, np.arange(rank, 10, after), whole).all()
        assert whole.tolist() == [[i, 6] for i in range(rank, 10, after)]
        own = state.of_rank("generator/cpu", rank)
        assert own is None if rank >= before else own is not None and own.tolist() == [rank] * 4
        assert state.rows(COMPACTED) == len(IDS) and state.rows(WHOLE) == 10


def test_a_table_that_was_not_sharded_is_read_by_rows_too(tmp_path: Path) -> None:
    table = np.arange(8.0).reshape(4, 2)
    checksums = [save_shard(tmp_path, 6, rank, 2, {WHOLE: table[rank::2]}, NOTE) for rank in range(2)]
    small = "parameter/rank/embedding.small"
    save_state(tmp_path / STATE_FILE, {small: table}, position(6), NOTE, checksums)
    rows = np.zeros((2, 2))
    assert SavedState(tmp_path / STATE_FILE).copy_rows(small, np.array([1, 3]), rows).all()
    assert rows.tolist() == table[1::2].tolist()
    with pytest.raises(KeyError):
        SavedState(tmp_path / STATE_FILE).copy_rows("exp_avg/rank/embedding.small", np.array([1]), rows)


def test_a_process_with_all_its_rows_in_its_shard_reads_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 3, step=6)
    read, blocks = [], checked.CheckedFile.blocks

    def watched(file: checked.CheckedFile, name: str) -> Iterator[np.ndarray]:
        read.append(file.path.name)
        return blocks(file, name)

    monkeypatch.setattr(checked.CheckedFile, "blocks", watched)
    SavedState(tmp_path / STATE_FILE, rank=2).copy_rows(COMPACTED, IDS[2::3], np.zeros((1, 2)))
    assert read == [shard_file(6, 2, 3)]


def test_rows_are_read_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "_BLOCK_BYTES", 1 << 16)
    table = np.arange(1 << 20, dtype=float).reshape(-1, 8)  # 8 MB
    checksums = [save_shard(tmp_path, 6, rank, 2, {WHOLE: table[rank::2]}, NOTE) for rank in range(2)]
    save_state(tmp_path / STATE_FILE, {}, position(6), NOTE, checksums)
    ids = np.arange(0, len(table), 64)
    rows, state = np.zeros((len(ids), 8)), SavedState(tmp_path / STATE_FILE)
    tracemalloc.start()
    try:
        assert state.copy_rows(WHOLE, ids, rows).all()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert np.array_equal(rows, table[ids])


# ---- a save is committed at once -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a save at any point as SIGKILL would: nobody catches it."""


@contextmanager
def interrupted(error: BaseException, at: int) -> Iterator[None]:
    """The ``at``-th of the calls that change something on the disk fails."""
    calls, unlink = 0, Path.unlink

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return real(*args, **options)

        return call

    def failing_unlink(path: Path, missing_ok: bool = False) -> None:
        own = path.name.endswith(".tmp")  # the writer's, at its end
        (unlink if own else failing(unlink))(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (checked, "_write")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        patch.setattr(Path, "unlink", failing_unlink)
        yield


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("before", "after", "error", "raised"),
    [(2, 2, Killed(), Killed), (1, 2, Killed(), Killed), (2, 1, Killed(), Killed), (3, 2, FULL, (InputError, OSError))],
    ids=["killed", "killed, after one process", "killed, one process", "a full disk"],
)
def test_a_save_that_ends_anywhere(before: int, after: int, error: BaseException, raised: Any, tmp_path: Path) -> None:
    """Leaves the state before whole, or the new one; and the next save leaves no file of any other."""
    failed = []
    for at in itertools.count(1):
        run = tmp_path / str(at)
        saved(run, before, step=6)
        try:
            with interrupted(error, at):
                saved(run, after, step=8)
        except raised:
            failed.append(at)
        arrays, reached = load_state(run / STATE_FILE)
        assert reached["step"] in (6, 8)
        assert all(np.array_equal(arrays[name], values) for name, values in state_of(reached["step"]).items())
        assert files_of(before if reached["step"] == 6 else after, reached["step"]) <= names(run)
        remove_leftovers(run, [])
        saved(run, after, step=9)
        assert names(run) == files_of(after, 9)
        if len(failed) < at:
            break
    assert len(failed) > 10


def test_leftovers(tmp_path: Path) -> None:
    """Shards that no state names, and halves of shards; nothing that is not a state's."""
    mine = {"training_state.x.safetensors", "training_state.1.0-of-2.safetensors.bak", ".training_state.tmp"}
    half = {f".{shard_file(8, 1, 2)}.4711.tmp"}
    saved(tmp_path, 2, step=6)
    for name in (*mine, *half, shard_file(8, 0, 2)):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, [])
    assert names(tmp_path) == {*mine, *files_of(2, 6), shard_file(8, 0, 2)}
    remove_shards(tmp_path, SavedState(tmp_path / STATE_FILE).shards)
    assert names(tmp_path) == {*mine, *files_of(2, 6)}
    (tmp_path / STATE_FILE).unlink()
    remove_leftovers(tmp_path, [])
    assert names(tmp_path) == mine
    for remove in (remove_state, lambda run: remove_run(run, [])):
        saved(tmp_path, 2, step=6)
        remove(tmp_path)
        assert names(tmp_path) == mine


def test_the_state_is_removed_before_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2, step=6)
    removed, unlink = [], Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    remove_state(tmp_path)
    assert removed[0] == STATE_FILE and set(removed) == files_of(2, 6)


# ---- files that are not those of the state ---------------------------------------------------------------------------


def other_step(run: Path, other: Path) -> None:
    saved(other, 2, step=7)
    (other / shard_file(7, 1, 2)).rename(run / shard_file(6, 1, 2))


def other_rank(run: Path, other: Path) -> None:
    (run / shard_file(6, 1, 2)).write_bytes((run / shard_file(6, 0, 2)).read_bytes())


def other_count(run: Path, other: Path) -> None:
    saved(other, 3, step=6)
    (other / shard_file(6, 1, 3)).rename(run / shard_file(6, 1, 2))


def other_run(run: Path, other: Path) -> None:
    save_shard(run, 6, 1, 2, {name: state_of(6)[name][1::2] for name in SHARDED}, {"of_run": {"seed": 6}})


def missing(run: Path, other: Path) -> None:
    (run / shard_file(6, 1, 2)).unlink()


def cut(run: Path, other: Path) -> None:
    (run / shard_file(6, 1, 2)).write_bytes((run / shard_file(6, 1, 2)).read_bytes()[:-1])


def a_pipe(run: Path, other: Path) -> None:
    missing(run, other)
    os.mkfifo(run / shard_file(6, 1, 2))


@pytest.mark.parametrize("change", [other_step, other_rank, other_count, other_run, missing, cut, a_pipe])
def test_a_shard_that_is_not_the_state_s(change: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """Every process sees it, whichever rows it wants."""
    run = tmp_path / "run"
    saved(run, 2, step=6)
    change(run, tmp_path / "other")
    for rank in range(3):
        with pytest.raises(InputError, match=f"{shard_file(6, 1, 2)}: .*train again") as refusal:
            SavedState(run / STATE_FILE, rank)
        assert "\n" not in str(refusal.value)


def test_a_forged_list_of_shards(tmp_path: Path) -> None:
    for shards in ("x", [1], {"a": "b"}, [["x"]]):
        save(tmp_path / STATE_FILE, {}, {"position": position(6), "shards": shards})
        with pytest.raises(InputError, match=f"{STATE_FILE}: its list of shards is damaged; .*without --resume"):
            SavedState(tmp_path / STATE_FILE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ids/video": IDS[::-1]}, "ids/video is not a list of ascending ids"),
        ({"ids/video": IDS[:2]}, "ids/video lists 2 ids, but the table has 5 rows"),
        ({"ids/video": IDS.astype(float)}, "ids/video is not a list of ascending ids"),
        ({COMPACTED: np.zeros((5, 3))}, r"has rows of shape \(3,\), not \(2,\)"),
        ({COMPACTED: np.zeros(())}, f"{COMPACTED} has no rows"),
    ],
    ids=["unsorted", "too few", "fractions", "another shape", "no rows"],
)
def test_rows_that_do_not_fit(changed: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    save_state(tmp_path / STATE_FILE, state_of(6) | changed, position(6), NOTE)
    with pytest.raises(InputError, match=f"{STATE_FILE}: .*{said}.*without --resume"):
        SavedState(tmp_path / STATE_FILE).copy_rows(COMPACTED, IDS, np.zeros((5, 2)))


def test_ids_of_a_shard_that_are_elsewhere(tmp_path: Path) -> None:
    """Without its ids it would be taken for a part of a whole table."""
    checksums = [save_shard(tmp_path, 6, 0, 1, {COMPACTED: np.zeros((5, 2))}, NOTE)]
    save_state(tmp_path / STATE_FILE, {"ids/video": IDS}, position(6), NOTE, checksums)
    with pytest.raises(InputError, match=f"{shard_file(6, 0, 1)}: lacks ids/video"):
        SavedState(tmp_path / STATE_FILE)


def test_shards_of_unequal_parts(tmp_path: Path) -> None:
    """Rows of a whole table that no shard has, ids that are no list, and arrays that one of them lacks."""
    uneven = [save_shard(tmp_path, 6, rank, 2, {WHOLE: np.zeros((rows, 2))}, NOTE) for rank, rows in ((0, 2), (1, 5))]
    save_state(tmp_path / STATE_FILE, {}, position(6), NOTE, uneven)
    with pytest.raises(InputError, match=f"{WHOLE} lacks rows"):
        load_state(tmp_path / STATE_FILE)
    unlisted = [save_shard(tmp_path, 6, 0, 1, {COMPACTED: np.zeros((1, 2)), "ids/video": np.array(4)}, NOTE)]
    save_state(tmp_path / STATE_FILE, {}, position(6), NOTE, unlisted)
    with pytest.raises(InputError, match=f"{shard_file(6, 0, 1)}: ids/video is not a list of ascending ids"):
        load_state(tmp_path / STATE_FILE)
    lacking = [save_shard(tmp_path, 7, rank, 2, {WHOLE: np.zeros((2, 2))} if rank == 0 else {}, {}) for rank in (0, 1)]
    save_state(tmp_path / STATE_FILE, {}, position(7), NOTE, lacking)
    with pytest.raises(InputError, match=f"{shard_file(7, 1, 2)}: lacks {WHOLE}"):
        load_state(tmp_path / STATE_FILE)


def test_a_bit_flipped_anywhere(tmp_path: Path) -> None:
    """In a shard or in what names it: refused, and the file is named."""
    saved(tmp_path, 2, step=6)
    rng = np.random.default_rng(0)
    for name in sorted(files_of(2, 6)):
        path, original = tmp_path / name, (tmp_path / name).read_bytes()
        for bit in rng.integers(len(original) * 8, size=80):
            flipped = bytearray(original)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=name):
                every_rank_restores(tmp_path)
        path.write_bytes(original)
    every_rank_restores(tmp_path)


def every_rank_restores(run: Path) -> None:
    for rank in range(2):
        state, ids = SavedState(run / STATE_FILE, rank), IDS[rank::2]
        state.of_rank("generator/cpu", rank)
        _ = state["parameter/rank/bias"], state["step/rank/embedding.video"]
        state.copy_rows(COMPACTED, ids, np.zeros((len(ids), 2)))
        state.copy_rows("last/rank/embedding.video", ids, np.zeros(len(ids)))
        state.copy_rows(WHOLE, np.arange(rank, 10, 2), np.zeros((5, 2)))
