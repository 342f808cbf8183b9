"""Ragged days, whose requests have lists of items of varying length, and list fields: written, batched, refused."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deep_components.batch import CascadeBatch, Features
from deep_components.cascade import Cascade, Group, Stage
from deep_components.dataset import loader
from deep_components.dataset.columnar import DayCache, columns_of, read_day, write_day
from deep_components.dataset.loader import batches
from deep_components.dataset.log import open_log, write_log_file
from deep_components.errors import InputError
from deep_components.schema import Field, Schema
from deep_components.tables.lookup import TableLookup

DAY = "2024-01-13"
SCHEMA = Schema(
    (
        Field("user", "request", size=30),
        Field("likes", "request", size=9, table="genre", length=2, padding=4),
        Field("video", "history", size=300),
        Field("genres", "history", size=9, table="genre", length=3, padding=4),
        Field("video", "item", size=300),
        Field("genres", "item", size=9, table="genre", length=3, padding=4),
        Field("price", "item", "number"),
    )
)
STAGES = (Stage("retrieval", 2, "dssm"), Stage("rank", 1, "din"))
CASCADE = Cascade(STAGES, (Group("good"), Group("bad")))
COUNTS = np.array([3, 0, 5, 1, 4, 2])
R, L = len(COUNTS), 4
Spoil = Callable[[np.ndarray], Any]


def offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def values(counts: np.ndarray = COUNTS) -> dict[str, np.ndarray]:
    """The columns of a ragged day, but for its offsets."""
    rng = np.random.default_rng(0)
    shapes = {"request": (R,), "history": (R, L), "item": (counts.sum(),)}
    found = {}
    for name, column in columns_of(SCHEMA, ragged=True).items():
        if name == "item.offset":
            continue
        shape = (*shapes[column.side], column.length) if column.length else shapes[column.side]
        kind = column.dtypes[0]
        limit = 2 if kind.kind == "b" else column.limit or 90
        drawn = rng.random(shape) if kind.kind == "f" else rng.integers(0, limit, shape)
        found[name] = drawn.astype(kind)
    found["item.group"] %= 2
    return found


def write(folder: Path, columns: Mapping[str, np.ndarray] | None = None, counts: np.ndarray = COUNTS) -> Path:
    columns = values(counts) if columns is None else columns
    with write_day(folder, SCHEMA, R, offset=offsets(counts)) as day:
        for name, column in columns.items():
            day.write(name, column)
    return folder


def read(folder: Path, cascade: Cascade = CASCADE) -> DayCache:
    return read_day(folder, DAY, cascade)


def same(one: CascadeBatch[Features], other: CascadeBatch[Features]) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in pairs)


# ---------------------------------------------------------------------------------------------- written and read


@pytest.mark.parametrize("requests", [[0, 1, 2, 3, 4, 5], [5, 3, 5], [1], [4, 0]])
def test_a_batch_is_padded_to_its_longest_list(tmp_path: Path, requests: list[int]) -> None:
    columns, first = values(), offsets(COUNTS)
    day = read(write(tmp_path / DAY, columns))
    batch = day.batch(np.array(requests))
    longest = max(1, max(COUNTS[requests]))
    assert batch.targets.mask.tolist() == [[n < COUNTS[r] for n in range(longest)] for r in requests]
    for name, padding in {"video": 0, "genres": 4, "price": 0}.items():
        found = batch.features.item[name]
        for row, r in zip(found, requests, strict=True):
            np.testing.assert_array_equal(row[: COUNTS[r]], columns[f"item.{name}"][first[r] : first[r + 1]])
            assert (row[COUNTS[r] :] == padding).all()
        assert found.shape == (len(requests), longest, *([3] if name == "genres" else []))
    for r, labels, group in zip(requests, batch.targets.labels, batch.targets.group, strict=True):
        np.testing.assert_array_equal(labels[: COUNTS[r]], columns["item.label"][first[r] : first[r + 1]])
        np.testing.assert_array_equal(group[: COUNTS[r]], columns["item.group"][first[r] : first[r + 1]])
    for side, name in (("request", "likes"), ("history", "genres"), ("history", "video")):
        np.testing.assert_array_equal(getattr(batch.features, side)[name], columns[f"{side}.{name}"][requests])
    np.testing.assert_array_equal(batch.request_id, columns["request_id"][requests])
    assert day.num_items == 5 and day.longest(np.array(requests)) == longest


def test_lists_of_one_length_are_a_day_without_offsets(tmp_path: Path) -> None:
    counts = np.full(R, 4)
    columns = values(counts)
    ragged = read(write(tmp_path / "ragged", columns, counts))
    with write_day(tmp_path / "plain", SCHEMA, R) as files:
        for name, column in columns.items():
            files.write(name, column.reshape(R, 4, *column.shape[1:]) if name.startswith("item.") else column)
        files.write("item.mask", np.ones((R, 4), bool))
    plain = read(tmp_path / "plain", Cascade(STAGES, (Group("good", 1), Group("bad", 3))))
    requests = np.array([5, 0, 0, 3])
    assert same(ragged.batch(requests), plain.batch(requests))
    assert ragged.num_items == plain.num_items == 4
    for table in SCHEMA.tables:
        assert ragged.ids(table) == plain.ids(table)


def test_pieces_give_the_same_day(tmp_path: Path) -> None:
    columns = values()
    with write_day(tmp_path / "pieces", SCHEMA, R, offset=offsets(COUNTS).astype(np.uint16)) as day:
        for name, column in columns.items():
            for rows in (slice(len(column) // 2, None), slice(0, len(column) // 2)):
                day.write(name, column[rows], rows)
    assert read(tmp_path / "pieces").checksum == read(write(tmp_path / DAY, columns)).checksum


def test_requests_are_left_out_with_their_items(tmp_path: Path) -> None:
    columns, kept = values(), np.array([0, 2, 5])
    with write_day(tmp_path / "some", SCHEMA, R, offset=offsets(COUNTS)) as day:
        for name, column in columns.items():
            day.write(name, column)
        day.keep(kept)
    whole = read(write(tmp_path / DAY, columns))
    assert same(read(tmp_path / "some").batch(np.arange(3)), whole.batch(kept))


def test_the_length_of_the_history_is_cut_from_list_fields_too(tmp_path: Path) -> None:
    columns = values()
    batch = read(write(tmp_path / DAY, columns)).with_history(2).batch(np.arange(R))
    np.testing.assert_array_equal(batch.features.history["genres"], columns["history.genres"][:, L - 2 :])


@pytest.mark.parametrize("rows_at_a_time", [2, 100])
def test_a_resident_day_gives_the_same_batches(
    tmp_path: Path, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_REQUESTS_PER_COPY", rows_at_a_time)
    day, order, cpu = read(write(tmp_path / DAY)), np.array([3, 5, 1, 2, 0, 4]), torch.device("cpu")
    prepare = TableLookup(SCHEMA, {}, {"video": 300})
    streamed, resident = (list(batches(day, order, 2, cpu, prepare, on_device)) for on_device in (False, True))
    assert [batch.targets.mask.shape[1] for batch in streamed] == [2, 5, 4]
    assert all(same(one, other) for one, other in zip(streamed, resident, strict=True))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- the cascade


def test_sizes_are_the_most_that_a_request_may_have(tmp_path: Path) -> None:
    folder = write(tmp_path / DAY)
    read(folder, Cascade(STAGES, (Group("good", 2), Group("bad", 3))))
    with pytest.raises(InputError, match=r"have up to 5 items, the cascade shop has 4; give .* sizes, or none"):
        read(folder, Cascade(STAGES, (Group("good", 2), Group("bad", 2)), name="shop"))
    with pytest.raises(InputError, match=r"item.group.npy: holds 1, and the cascade custom has 1 groups"):
        read(folder, Cascade(STAGES, (Group("good"),)))


def test_without_sizes_a_rectangular_log_has_its_own(tmp_path: Path) -> None:
    counts = np.full(R, 4)
    with write_day(tmp_path / DAY, SCHEMA, R) as files:
        for name, column in values(counts).items():
            files.write(name, column.reshape(R, 4, *column.shape[1:]) if name.startswith("item.") else column)
        files.write("item.mask", np.ones((R, 4), bool))
    assert read(tmp_path / DAY).num_items == 4
    with pytest.raises(InputError, match=r"have 4 items, and stage retrieval of the cascade custom keeps 5; give it a"):
        read(tmp_path / DAY, Cascade((Stage("retrieval", 5, "dssm"), STAGES[1]), CASCADE.groups))


def test_a_log_s_groups_are_the_cascade_s(tmp_path: Path) -> None:
    write(tmp_path / DAY)
    write_log_file(tmp_path, "a shop", groups=("good", "bad"))
    assert json.loads((tmp_path / "log.json").read_text()) == {"origin": "a shop", "groups": ["good", "bad"]}
    log = open_log(tmp_path)
    assert len(log.open_day(DAY, CASCADE)) == R
    for groups in ((Group("bad"), Group("good")), (Group("good"), Group("bad"), Group("worse"))):
        with pytest.raises(InputError, match=r"log.json: its groups are good, bad, those of the cascade custom"):
            log.open_day(DAY, Cascade(STAGES, groups))
    for wrong in ('"good"', "[1]", "[]", "{}"):
        (tmp_path / "log.json").write_text(f'{{"origin": "a shop", "groups": {wrong}}}')
        with pytest.raises(InputError, match=r"log.json: field groups is .*, not a list of names"):
            open_log(tmp_path)


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2], {})
    log = open_log(tmp_path / "my_ragged_log")
    cascade = Cascade(STAGES, (Group("bought"), Group("shown")))
    for day in log.days():
        batch = log.open_day(day, cascade).batch(np.arange(100))
        assert batch.features.item["genres"].shape == (*batch.targets.mask.shape, 3)
        assert ((batch.targets.group == 0) & batch.targets.mask).sum(dim=1).tolist() == [1] * 100


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        ([0, 3, 3, 8, 9, 13], r"shape \(6,\), not \(7,\)"),
        ([[0, 3, 3, 8, 9, 13, 15]], r"shape \(1, 7\), not \(7,\)"),
        ([1, 3, 3, 8, 9, 13, 15], "does not rise from 0"),
        ([0, 3, 2, 8, 9, 13, 15], "does not rise from 0"),
        ([0, -3, 3, 8, 9, 13, 15], "does not rise from 0"),
        ([0] * 7, "no request has an item"),
        ([0.0, 3, 3, 8, 9, 13, 15], "type float64, not int64"),
    ],
)
def test_offsets_that_divide_nothing_are_not_written(tmp_path: Path, offset: list[Any], text: str) -> None:
    with pytest.raises(InputError, match=f"item.offset.*{text}"), write_day(tmp_path / DAY, SCHEMA, R, offset=offset):  # type: ignore[arg-type]
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    columns = values()
    for name, column, text in (
        ("item.mask", np.ones(15, bool), "not in the schema"),
        ("item.genres", columns["item.genres"][:, :2], r"shape \(15, 2\), not \(15, 3\)"),
        ("item.genres", columns["item.genres"][:, 0], r"shape \(15,\), not \(15, 3\)"),
        ("item.video", np.stack([columns["item.video"]] * 2, axis=1), r"shape \(15, 2\), not \(15,\)"),
        ("request.likes", columns["request.likes"] + 9, "outside the 0 .. 8"),
    ):
        with pytest.raises(InputError, match=text):
            write(tmp_path / DAY, columns | {name: column})
    del columns["item.group"]
    with pytest.raises(InputError, match=r"column item.group: not written"):
        write(tmp_path / DAY, columns)
    assert list(tmp_path.iterdir()) == []


def save(name: str, change: Spoil) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{name}.npy").unlink()


def add(name: str, column: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / f"{name}.npy", column)


POISONED: dict[str, tuple[Callable[[Path], None], str]] = {
    "one offset too few": (save("item.offset", lambda v: v[:-1]), r"item.offset.npy: shape \(6,\), not \(7,\)"),
    "offsets of another type": (save("item.offset", lambda v: v.astype(np.uint64)), "type uint64, not int64"),
    "offsets of two axes": (save("item.offset", lambda v: v[None]), r"shape \(1, 7\)"),
    "offsets that fall": (save("item.offset", lambda v: v[[0, 2, 3, 1, 4, 5, 6]]), "does not rise from 0"),
    "offsets below 0": (save("item.offset", lambda v: v - 1), "does not rise from 0"),
    "offsets that overflow": (
        save("item.offset", lambda v: np.where(np.arange(7) == 1, np.iinfo(np.int64).min, v)), "does not rise from 0"
    ),
    "offsets beyond the rows": (save("item.offset", lambda v: v + (v == 15)), "ends at 16, but item.label has 15 rows"),
    "offsets before the rows' end": (save("item.offset", lambda v: v - (v == 15)), "ends at 14, but item.label has 15"),
    "a column of fewer rows": (save("item.video", lambda v: v[:-1]), r"item.video.npy: shape \(14,\), not \(15,\)"),
    "a rectangular column": (save("item.video", lambda v: v.reshape(3, 5)), r"shape \(3, 5\), not \(15,\)"),
    "a mask beside": (add("item.mask", np.ones(15, bool)), "item.mask.npy: not a file that meta.json and its schema"),
    "no groups": (remove("item.group"), "item.group.npy: no such file"),
    "no offsets": (remove("item.offset"), "item.mask.npy: no such file"),
    "longer lists": (save("item.genres", lambda v: np.concatenate([v, v], axis=1)), r"shape \(15, 6\), not \(15, 3\)"),
    "a value beyond the table": (save("item.genres", lambda v: v * 0 + 9), "holds 9, outside the 0 .. 8"),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISONED)
def test_a_poisoned_day_is_refused(tmp_path: Path, poison: str) -> None:
    folder = write(tmp_path / DAY)
    read(folder)
    spoil, text = POISONED[poison]
    spoil(folder)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    meta["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.npy")
    }
    meta["checksum"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=text) as caught:
        read(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_offset_is_refused(tmp_path: Path) -> None:
    """One that still divides the rows among the requests, so that only the checksum shows it."""
    folder = write(tmp_path / DAY)
    save("item.offset", lambda v: np.where(np.arange(7) == 1, 2, v))(folder)
    with pytest.raises(InputError, match=r"item.offset.npy: does not match its checksum"):
        read(folder)
