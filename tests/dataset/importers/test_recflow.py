"""Encoded batches against the golden ones, and against the specification followed one item at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import torch

from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade, Group
from deep_components.dataset import columnar
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from tests.dataset.synthetic import COUNTS, DAY, edit_pickle, edit_table, random_log, read_plain, with_column, write_log

REQUEST_FIELDS = ("weekday", "hour", "minute", "user", "device", "gender", "age", "province")
CASCADES = (TWO_STAGE, THREE_STAGE)
MISSING = [0, 0, 0, 2, 0, 0, 0, 0]  # the item that is not there: category_one pads with 2


def arrays_of(day: DayCache) -> dict[str, np.ndarray]:
    """The whole day as one batch, in file order."""
    batch = day.batch(np.arange(len(day)))
    features, targets = batch.features, batch.targets
    tensors = dict(features.request)
    tensors |= {"request_id": batch.request_id, "history_mask": features.history_mask}
    tensors |= {"history": torch.stack(list(features.history.values()), dim=-1)}
    tensors |= {"items": torch.stack(list(features.item.values()), dim=-1)}
    tensors |= {"labels": targets.labels, "mask": targets.mask}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------- golden

GOLDEN_NAMES = {
    "request_id": "request_id",
    "weekday": "request_wday",
    "hour": "request_hour",
    "minute": "request_min",
    "user": "user_id",
    "device": "device_id",
    "gender": "gender",
    "age": "age",
    "province": "province",
    "history": "history",
    "history_mask": "history_mask",
}


@pytest.mark.parametrize("day", ["2024-01-13", "2024-01-14", "2024-01-15", "2024-02-04"])
@pytest.mark.parametrize("cascade", CASCADES, ids=lambda cascade: cascade.name)
def test_golden_batches(golden: Path, tmp_path: Path, cascade: Cascade, day: str) -> None:
    cache = open_log(golden / "recflow_mini").open_day(day, cascade, cache_dir=tmp_path)
    ours = arrays_of(cache)
    with np.load(golden / f"batches_{cascade.name}.npz") as file:
        theirs = {key.removeprefix(f"{day}/"): file[key] for key in file.files if key.startswith(f"{day}/")}
    for name, golden_name in GOLDEN_NAMES.items():
        np.testing.assert_array_equal(ours[name], theirs.pop(golden_name), err_msg=name)
    length = np.maximum(ours["history_mask"].sum(axis=1), 1)
    np.testing.assert_array_equal(length, theirs.pop("history_len"))
    for number, group in enumerate(cascade.groups):
        columns = slice(10 * number, 10 * number + 10)
        mask = theirs.pop(f"mask/{group.name}")
        np.testing.assert_array_equal(ours["mask"][:, columns], mask, err_msg=group.name)
        np.testing.assert_array_equal(ours["items"][:, columns], theirs.pop(f"items/{group.name}"), err_msg=group.name)
        labels = theirs.pop(f"label/{group.name}")
        np.testing.assert_array_equal(ours["labels"][:, columns][mask == 1], labels[mask == 1], err_msg=group.name)
    assert not theirs, "golden arrays that nothing was compared with"
    assert (day == "2024-01-15") == (not ours["mask"].all())
    assert not (golden / "recflow_mini" / "cache").exists()


# ---------------------------------------------------------------------------------------------- one item at a time


def clock_fields(seconds: int, zone: ZoneInfo) -> list[int]:
    local = datetime.fromtimestamp(seconds, zone)
    return [local.isoweekday(), local.hour + 1, local.minute + 1]


def expected_arrays(root: Path, cascade: Cascade, zone: ZoneInfo) -> dict[str, np.ndarray]:
    """Section 2 of the specification, word by word."""
    rows = pyarrow.feather.read_table(recflow.feather_path(root, DAY), memory_map=False).to_pylist()
    groups_of = read_plain(recflow.request_path(root, DAY))
    history_of = read_plain(recflow.history_path(root, DAY))
    truth = {"two_stage": ("rank_pos", "rank_index"), "three_stage": ("rerank_pos", "rerank_index")}[cascade.name]
    names = {
        "two_stage": ["rank_pos", "rank_neg", "coarse_neg", "prerank_neg"],
        "three_stage": ["rerank_pos", "rerank_neg", "rank_neg", "coarse_neg", "prerank_neg"],
    }[cascade.name]
    common_label = {"rerank_neg": 30 - 22, "rank_neg": 30 - 23, "coarse_neg": 30 - 24, "prerank_neg": 30 - 25}

    first_row: dict[int, dict[str, int]] = {}
    index: dict[tuple[int, int], int] = {}
    for row in rows:
        first_row.setdefault(row["request_id"], row)
        if row[truth[0]] == 1 and row[truth[1]] >= 0:
            index.setdefault((row["request_id"], row["video_id"]), row[truth[1]])

    found: dict[str, list[Any]] = {name: [] for name in (*REQUEST_FIELDS, *ARRAYS)}
    for request, row in first_row.items():
        if request not in groups_of:
            continue
        found["request_id"].append(request)
        request_time = clock_fields(row["request_timestamp"] // 1000, zone)
        for name, value in zip(("weekday", "hour", "minute"), request_time, strict=True):
            found[name].append(value)
        for name, column in (("user", "user_id"), ("device", "device_id")):
            found[name].append(row[column] + 1)
        for name in ("gender", "age", "province"):
            found[name].append(row[name] + 1)

        history, valid = [], []
        for event in history_of.get(request, np.zeros((50, 10), np.int64)).tolist():
            valid.append(event[7] != 0)
            history.append([event[0] + 1, event[1] + 1, event[2] + 1, event[3], event[4] + 1] if valid[-1] else [0] * 5)
        found["history"].append(history)
        found["history_mask"].append(valid)

        items, labels, mask, seen = [], [], [], set()
        for name in names:
            group = groups_of[request].get(name)
            listed = [] if group is None else [[int(value) for value in item] for item in group]
            for number in range(10):
                item = listed[number] if number < len(listed) else None
                if item is not None and name == truth[0] and (request, item[0]) not in index:
                    item = None  # its label is unknown
                if item is not None and item[0] in seen:
                    item = None  # the request has it already
                mask.append(item is not None)
                if item is None:
                    items.append(MISSING)
                    labels.append(0)
                    continue
                seen.add(item[0])
                ids = [item[0] + 1, item[1] + 1, item[3] + 1, item[6], item[4] + 1]
                items.append(ids + clock_fields(item[5], zone))
                labels.append(max(0, 30 - index[request, item[0]]) if name == truth[0] else common_label[name])
        found["items"].append(items)
        found["labels"].append(labels)
        found["mask"].append(mask)
    return {name: np.array(values) for name, values in found.items()}


ARRAYS = ("request_id", "history", "history_mask", "items", "labels", "mask")


def compare(root: Path, cascade: Cascade, zone: str = "Asia/Shanghai") -> dict[str, np.ndarray]:
    """Assert that the day is encoded as the specification says, and return it."""
    ours = arrays_of(open_log(root).open_day(DAY, cascade, zone=zone))
    expected = expected_arrays(root, cascade, ZoneInfo(zone))
    mask = expected["mask"]
    np.testing.assert_array_equal(ours["mask"], mask)
    np.testing.assert_array_equal(ours.pop("labels")[mask], expected.pop("labels")[mask])
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert set(ours) == set(expected)
    return ours


def ragged(root: Path, seed: int) -> None:
    """Spoil a sound log in every way that the specification allows."""
    rng = np.random.default_rng(seed)

    def forms(rows: np.ndarray, more: np.ndarray) -> Sequence[np.ndarray]:
        return (
            np.zeros((0, 8), np.int64),
            np.array([]),
            rows[: rng.integers(1, 10)],
            np.concatenate([rows, more]),
            rows[:, :7],
            np.concatenate([rows, rows[:, :3]], axis=1),
            rows[:7].astype(np.int32),
            rows.astype(">i8"),
            np.asfortranarray(rows[:9]),
            rows[::-1].astype(np.float64),
            rows,
        )

    def spoil_groups(requests: dict[int, dict[str, np.ndarray]]) -> None:
        for number, groups in enumerate(requests.values()):
            sound = dict(groups)
            for name, rows in sound.items():
                choices = forms(rows, sound["coarse_neg" if name == "rank_neg" else "rank_neg"][:4])
                chosen = int(rng.integers(len(choices) + 1))
                if chosen == len(choices):
                    del groups[name]
                else:
                    groups[name] = choices[chosen]
            if number == 3:
                groups.clear()
        known = list(requests)
        requests[123] = requests[known[0]]  # stands in no row
        del requests[known[5]], requests[known[0]]

    def spoil_rows(table: pa.Table) -> pa.Table:
        table = table.take(pa.array(rng.permutation(table.num_rows)))  # a request's rows stand apart
        for flag in ("rank_pos", "rerank_pos"):
            table = with_column(table, flag, table[flag].to_numpy() * (rng.random(table.num_rows) < 0.8))
        for name in ("rank_pos", "rerank_pos", "rank_index", "user_id", "request_timestamp"):
            narrow = pa.uint8() if name in ("rank_pos", "user_id") else pa.int64()
            table = with_column(table, name, pa.array(table[name].to_numpy().astype(np.int64)).cast(narrow))
        return table

    def spoil_histories(histories: dict[int, np.ndarray]) -> None:
        known = list(histories)
        del histories[known[2]]
        histories[known[4]] = histories[known[4]][:, :8]
        histories[known[6]] = np.asfortranarray(histories[known[6]].astype(np.int64))
        histories[known[8]][10:13, 7] = 0  # events without a time amid others
        histories[456] = histories[known[1]]

    edit_pickle(recflow.request_path(root, DAY), spoil_groups)
    edit_pickle(recflow.history_path(root, DAY), spoil_histories)
    edit_table(recflow.feather_path(root, DAY), spoil_rows, chunksize=37)


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "America/New_York"])
@pytest.mark.parametrize("cascade", CASCADES, ids=lambda cascade: cascade.name)
def test_a_complete_log(tmp_path: Path, cascade: Cascade, zone: str) -> None:
    ours = compare(write_log(tmp_path), cascade, zone)
    assert ours["mask"].all() and len(ours["mask"]) == 12
    for number, field in enumerate(("video_id", "author_id", "category_level_two")):
        assert ours["items"][..., number].max() == COUNTS[field] + 1  # the largest id keeps its row
    assert ours["items"][..., 3].min() == 0  # not shifted


@pytest.mark.parametrize("group", ["rank_pos", "prerank_neg"])
@pytest.mark.parametrize("absent", ["missing", "empty", "7 columns", "9 columns"])
def test_one_group_of_all_requests_is_absent_or_of_another_width(tmp_path: Path, group: str, absent: str) -> None:
    def spoil(requests: dict[int, dict[str, np.ndarray]]) -> None:
        for groups in requests.values():
            rows = groups.pop(group)
            if absent != "missing":
                wide = np.concatenate([rows, rows], axis=1)
                groups[group] = rows[:0] if absent == "empty" else wide[:, : int(absent[0])]

    write_log(tmp_path)
    edit_pickle(recflow.request_path(tmp_path, DAY), spoil)
    assert compare(tmp_path, TWO_STAGE)["mask"].all() == ("columns" in absent)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cascade", CASCADES, ids=lambda cascade: cascade.name)
def test_a_ragged_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cascade: Cascade, seed: int) -> None:
    monkeypatch.setattr(columnar, "_ROWS_PER_PIECE", 7)  # of 18: whole copies and a part
    write_log(tmp_path, random_log(20, seed))
    ragged(tmp_path, seed)
    zone = ("Asia/Shanghai", "Europe/Berlin")[seed % 2]
    ours = compare(tmp_path, cascade, zone)
    assert len(ours["mask"]) == 18
    assert not ours["mask"].all() and ours["mask"].any()
    assert (ours["items"][~ours["mask"]] == MISSING).all()
    repairs = open_log(tmp_path).open_day(DAY, cascade, zone=zone).repairs
    assert sorted(count for text, count in repairs.items() if not text.startswith(("items of", "items that"))) == [
        0,
        0,
        1,
        1,
        2,
    ]


def truth_rows(table: pa.Table, flag: str) -> np.ndarray:
    return np.flatnonzero(table[flag].to_numpy() == 1)


def test_a_ground_truth_video_without_index_is_left_out_and_counted(tmp_path: Path) -> None:
    write_log(tmp_path)
    lost = [3, 14, 15]  # the 4th item of the first request, the 5th and 6th of the second

    def drop_flags(table: pa.Table) -> pa.Table:
        flags = table["rank_pos"].to_numpy().copy()
        flags[truth_rows(table, "rank_pos")[lost]] = 0
        return with_column(table, "rank_pos", flags)

    edit_table(recflow.feather_path(tmp_path, DAY), drop_flags)
    ours = compare(tmp_path, TWO_STAGE)
    holes = np.argwhere(~ours["mask"])
    assert holes.tolist() == [[0, 3], [1, 4], [1, 5]]
    repairs = {text: count for text, count in open_log(tmp_path).open_day(DAY, TWO_STAGE).repairs.items() if count}
    assert repairs == {"items of rank_pos without rank_index in all_stage, left out": 3}


def test_an_index_belongs_to_a_request_and_a_video(tmp_path: Path) -> None:
    """The same ten videos in all requests, in other orders of truth."""
    log = random_log(5)
    log.groups["rank_pos"][:, :, 0] = np.arange(COUNTS["video_id"], COUNTS["video_id"] - 10, -1)
    write_log(tmp_path, log)
    labels = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE))["labels"]
    np.testing.assert_array_equal(labels[:, :10], 30 - log.rank_index)
    compare(tmp_path, TWO_STAGE)


def test_groups_of_other_sizes(tmp_path: Path) -> None:
    """As many of each group's items, from its first, as the cascade says."""
    write_log(tmp_path)
    sizes = (3, 10, 1, 12)
    groups = tuple(replace(group, size=size) for group, size in zip(TWO_STAGE.groups, sizes, strict=True))
    whole = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE))
    cut = arrays_of(open_log(tmp_path).open_day(DAY, replace(TWO_STAGE, groups=groups)))
    there = [*range(3), *range(10, 20), 20, *range(30, 40)]
    for name in ("items", "labels", "mask"):
        np.testing.assert_array_equal(cut[name][:, :24], whole[name][:, there], err_msg=name)
    assert cut["items"].shape == (12, 26, 8) and not cut["mask"][:, 24:].any()
    assert (cut["items"][:, 24:] == MISSING).all()


def test_a_first_group_with_one_position(tmp_path: Path) -> None:
    write_log(tmp_path)
    groups = (Group("coarse_neg", size=2, position=7), Group("prerank_neg", size=3, position=9))
    day = open_log(tmp_path).open_day(DAY, replace(TWO_STAGE, groups=groups))
    ours = arrays_of(day)
    assert ours["labels"].tolist() == [[23, 23, 21, 21, 21]] * 12 and ours["mask"].all()
    np.testing.assert_array_equal(ours["items"][:, :2], arrays_of(open_day_two_stage(tmp_path))["items"][:, 20:22])
    assert not any(day.repairs.values())


def open_day_two_stage(root: Path) -> DayCache:
    return open_log(root).open_day(DAY, TWO_STAGE)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (Group("clicked", position=5), "group clicked is not in a log of RecFlow's layout, which has rank_pos"),
        (Group("rank_neg"), "group rank_neg has no position"),
        (Group("rank_neg", index_field="rank_index"), "group rank_neg has no position"),
        (Group("rank_neg", position=1 << 15), "group rank_neg: position is 32768, outside the 0 .. 32767"),
    ],
)
def test_a_group_that_the_log_lacks(tmp_path: Path, group: Group, text: str) -> None:
    write_log(tmp_path)
    cascade = replace(TWO_STAGE, groups=(TWO_STAGE.groups[0], group))
    check_refused(tmp_path, f"cascade two_stage: {text}", cascade=cascade)
    first = replace(TWO_STAGE, groups=(Group("rank_pos"), *TWO_STAGE.groups[1:]))
    check_refused(tmp_path, "group rank_pos has neither position nor index_field", cascade=first)
    other = replace(TWO_STAGE, groups=(Group("rank_pos", index_field="number"), *TWO_STAGE.groups[1:]))
    check_refused(tmp_path, "2024-01-15.feather: column number is missing", cascade=other)


def test_the_history_length_takes_the_last_events(tmp_path: Path) -> None:
    write_log(tmp_path)
    whole = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE))
    short = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE, history_length=7))
    np.testing.assert_array_equal(short.pop("history"), whole.pop("history")[:, -7:])
    np.testing.assert_array_equal(short.pop("history_mask"), whole.pop("history_mask")[:, -7:])
    for name, values in whole.items():
        np.testing.assert_array_equal(short[name], values, err_msg=name)


# ---------------------------------------------------------------------------------------------- bad input


def first_request(root: Path) -> int:
    return next(iter(read_plain(recflow.request_path(root, DAY))))


def check_refused(root: Path, *texts: str, cascade: Cascade = TWO_STAGE) -> None:
    with pytest.raises(InputError) as caught:
        open_log(root).open_day(DAY, cascade)
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    assert "--cache_dir" not in message, message  # the cache is not to blame


def edit_group(root: Path, group: str, edit: Callable[[np.ndarray], Any]) -> None:
    def change(requests: dict[int, dict[str, Any]]) -> None:
        groups = requests[first_request(root)]
        changed = edit(groups[group])
        groups[group] = groups[group] if changed is None else changed

    edit_pickle(recflow.request_path(root, DAY), change)


def edit_history(root: Path, edit: Callable[[np.ndarray], Any]) -> None:
    def change(histories: dict[int, Any]) -> None:
        request = first_request(root)
        changed = edit(histories[request])
        histories[request] = histories[request] if changed is None else changed

    edit_pickle(recflow.history_path(root, DAY), change)


def test_ids_where_nothing_is_read_do_not_matter(tmp_path: Path) -> None:
    """Rows beyond the tenth, columns that are not used, padding events, groups of the other cascade."""
    write_log(tmp_path)
    before = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE))

    def spoil_group(rows: np.ndarray) -> np.ndarray:
        rows[:, 2] = rows[:, 7] = -1
        return np.concatenate([rows, np.full((3, 8), -1)])

    def spoil_history(rows: np.ndarray) -> None:
        rows[:5, :7] = -1
        rows[:5, 7] = 0
        rows[:, 8:] = -1

    edit_group(tmp_path, "rank_pos", spoil_group)
    edit_group(tmp_path, "rerank_neg", lambda rows: np.full_like(rows, -1))
    edit_history(tmp_path, spoil_history)
    after = arrays_of(open_log(tmp_path).open_day(DAY, TWO_STAGE))
    before["history"][0, :5] = 0
    before["history_mask"][0, :5] = False
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


def test_an_array_without_its_state(tmp_path: Path) -> None:
    write_log(tmp_path, random_log(1))
    path = recflow.request_path(tmp_path, DAY)
    content = path.read_bytes()
    number = content.rindex(b"t\x94b") + 2  # TUPLE, MEMOIZE, BUILD
    path.write_bytes(content[:number] + b"0" + content[number + 1 :])
    check_refused(tmp_path, str(path), cascade=THREE_STAGE)  # it has rerank_neg, the file's last array
