"""A corpus of damaged logs: how each is damaged, and what is to be said or done about it.

Every case spoils a copy of one small sound log. An error's sentence must hold all of the case's texts, the file and the
field among them; a repair must be counted under its name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deep_components.cascade import TWO_STAGE
from deep_components.dataset.importers import recflow_files as recflow
from tests.dataset.synthetic import COUNTS, DAY, edit_pickle, edit_table, with_column

Spoil = Callable[[Path], Any]

GROUPS = tuple(group.name for group in TWO_STAGE.groups)
COLUMNS = (*recflow.REQUEST_COLUMNS, "video_id", "rank_pos", "rank_index")
ITEM_INDEX = {"video_id": 0, "author_id": 1, "category_level_two": 3, "upload_type": 4, "category_level_one": 6}
HISTORY_INDEX = {"video_id": 0, "author_id": 1, "category_level_two": 2, "category_level_one": 3, "upload_type": 4}
REQUEST_FIELDS = ("user_id", "device_id", "age", "gender", "province")
FEATHER, REQUESTS, HISTORIES = (str(path) for path in recflow.day_paths(Path(), DAY))
COUNTS_FILE = str(recflow.id_count_path(Path()))


@dataclass(frozen=True)
class Damaged:
    """A log that must be refused with a sentence that holds ``texts``; ``flags`` are further arguments."""

    name: str
    spoil: Spoil
    texts: tuple[str, ...]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repaired:
    """A log that is read by the rules of data/README.md; ``repairs``: beginning of a count's name -> the count."""

    name: str
    spoil: Spoil
    repairs: dict[str, int]


class _Program:
    """Pickles as a call, here of os.mkdir with a name that cannot be overlooked."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


# ---- ways to spoil ---------------------------------------------------------------------------------------------------


def edit_pickle_by(file: str, edit: Callable[[Any], Any]) -> Spoil:
    return lambda root: edit_pickle(root / file, edit)


def edit_first(file: str, edit: Callable[[Any], Any]) -> Spoil:
    """Change the value of the file's first request."""

    def change(content: dict[int, Any]) -> None:
        key = next(iter(content))
        changed = edit(content[key])
        content[key] = content[key] if changed is None else changed

    return lambda root: edit_pickle(root / file, change)


def edit_group(group: str, edit: Callable[[np.ndarray], Any]) -> Spoil:
    """Change one group of the first request."""

    def change(groups: dict[str, Any]) -> None:
        changed = edit(groups[group])
        groups[group] = groups[group] if changed is None else changed

    return edit_first(REQUESTS, change)


def put(row: int, column: int, value: float, kind: str = "i8") -> Callable[[np.ndarray], np.ndarray]:
    """One number of an array, which becomes one of ``kind``."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(kind)
        rows[row, column] = value
        return rows

    return change


def event(column: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    """One number of a history's last event, which is made a valid one."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[-1, 7] = 1
        rows[-1, column] = value
        return rows

    return change


def edit_column(name: str, edit: Callable[[np.ndarray], Any]) -> Spoil:
    """Change a column of all_stage."""
    return lambda root: edit_table(
        root / FEATHER, lambda table: with_column(table, name, edit(table[name].to_numpy().copy()))
    )


def at(row: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[row] = value
        return values

    return change


def at_truth(name: str, value: int) -> Spoil:
    """A column's value in the first ground-truth row."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_numpy().copy()
        values[np.flatnonzero(table["rank_pos"].to_numpy() == 1)[0]] = value
        return with_column(table, name, values)

    return lambda root: edit_table(root / FEATHER, change)


def edit_key(file: str, key: Any) -> Spoil:
    def change(content: dict[Any, Any]) -> None:
        content[key] = content.pop(next(iter(content)))

    return lambda root: edit_pickle(root / file, change)


def replace_content(file: str, content: Any) -> Spoil:
    return lambda root: edit_pickle(root / file, lambda _: content)


def edit_counts(**changes: Any) -> Spoil:
    def change(counts: dict[str, Any]) -> dict[str, Any]:
        return {field: count for field, count in (counts | changes).items() if count is not ...}

    return lambda root: edit_pickle(root / COUNTS_FILE, change)


def cut(file: str, share: float) -> Spoil:
    return lambda root: os.truncate(root / file, int((root / file).stat().st_size * share))


def overwrite(file: str, content: bytes | None = None) -> Spoil:
    def change(root: Path) -> None:
        path = root / file
        path.write_bytes(b"\xff" * path.stat().st_size if content is None else content)

    return change


def remove(file: str) -> Spoil:
    return lambda root: (root / file).unlink()


def drop_column(column: str) -> Spoil:
    return lambda root: edit_table(root / FEATHER, lambda table: table.drop_columns([column]))


def repeat_column(column: str) -> Spoil:
    return lambda root: edit_table(root / FEATHER, lambda table: table.append_column(column, table[column]))


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def make_program(file: str, edit: Callable[[Any, Any], Any]) -> Spoil:
    """Put a pickled call into the file's content."""
    return lambda root: edit_pickle(root / file, lambda content: edit(content, _Program(root / "canary")))


def copy_to(file: str, other: str) -> Spoil:
    return lambda root: shutil.copyfile(root / file, root / other)


def write_origin(content: str) -> Spoil:
    return lambda root: (root / recflow.ORIGIN_FILE).write_text(content)


def make_folder(file: str) -> Spoil:
    def change(root: Path) -> None:
        (root / file).unlink()
        (root / file).mkdir()

    return change


def make_fifo(file: str) -> Spoil:
    def change(root: Path) -> None:
        (root / file).unlink()
        os.mkfifo(root / file)

    return change


# ---- damaged ---------------------------------------------------------------------------------------------------------


def damaged() -> Iterator[Damaged]:
    """All cases that must be refused."""
    yield from _files()
    yield from _columns()
    yield from _request_values()
    yield from _items()
    yield from _histories()
    yield from _pickles_of_another_form()
    yield from _counts()
    yield from _days()


def _files() -> Iterator[Damaged]:
    for file in (FEATHER, REQUESTS, HISTORIES, COUNTS_FILE):
        for share in (0.01, 0.1, 0.5, 0.9, 0.999):
            yield Damaged(f"{file} cut to {share}", cut(file, share), (file, "fetch the file again"))
        yield Damaged(f"{file} empty", cut(file, 0), (file, "fetch the file again"))
        yield Damaged(f"{file} garbage", overwrite(file), (file, "fetch the file again"))
        yield Damaged(f"{file} text", overwrite(file, b"<html>404</html>\n" * 9), (file, "fetch the file again"))
        texts = ("no such file",) if file == COUNTS_FILE else ("no day has its files", file.split("/")[0])
        yield Damaged(f"{file} missing", remove(file), texts)
        yield Damaged(f"{file} is a folder", make_folder(file), (file,))
        yield Damaged(f"{file} is a FIFO", make_fifo(file), (file, "not a regular file"))


def _columns() -> Iterator[Damaged]:
    kinds: dict[str, Callable[[np.ndarray], Any]] = {
        "of floats": lambda values: values.astype(float),
        "with NaN": lambda values: np.where(np.arange(len(values)) == 3, np.nan, values),
        "of texts": lambda values: [str(value) for value in values],
        "of truth values": lambda values: values > 0,
        "of lists": lambda values: [[int(value)] for value in values],
        "of dates": lambda values: pa.array(values % (1 << 40), pa.timestamp("ms")),
        "with a missing value": lambda values: pa.array(values, mask=np.arange(len(values)) == 5),
        "beyond 64 bits": lambda values: values.astype(np.uint64) | np.uint64(1 << 63),
    }
    for column in COLUMNS:
        texts = (FEATHER, f"column {column}")
        yield Damaged(f"no column {column}", drop_column(column), (*texts, "missing"))
        yield Damaged(f"column {column} twice", repeat_column(column), (*texts, "twice"))
        for kind, edit in kinds.items():
            yield Damaged(f"column {column} {kind}", edit_column(column, edit), texts)
    for flag in (-1, 2, 1 << 40):
        yield Damaged(f"rank_pos {flag}", edit_column("rank_pos", at(7, flag)), (FEATHER, "rank_pos", str(flag)))


def _request_values() -> Iterator[Damaged]:
    for field in REQUEST_FIELDS:
        for value in (-1, COUNTS[field] + 1, (1 << 63) - 1):
            texts = (FEATHER, "request ", f"{field} is {value}", "id_cnt.pkl")
            yield Damaged(f"{field} {value}", edit_column(field, at(0, value)), texts)
    clocks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "seconds": lambda times: times // 1000,
        "microseconds": lambda times: times * 1000,
        "nanoseconds": lambda times: times * 1_000_000,
        "negative": lambda times: -times,
        "zero": lambda times: times * 0,
    }
    for unit, edit in clocks.items():
        spoil = edit_column("request_timestamp", edit)
        yield Damaged(f"request_timestamp in {unit}", spoil, (FEATHER, "request_timestamp", "unit"))
    for index in (1 << 15, 1 << 40):
        yield Damaged(f"rank_index {index}", at_truth("rank_index", index), (FEATHER, f"rank_index is {index}"))
    for video in (-1, 1 << 32):
        yield Damaged(f"true video_id {video}", at_truth("video_id", video), (FEATHER, f"video_id is {video}"))


SHAPES: dict[str, Callable[[np.ndarray], Any]] = {
    "of one dimension": lambda rows: rows[0],
    "of three dimensions": lambda rows: rows[None],
    "of no dimension": lambda rows: np.array(7),
    "of 6 columns": lambda rows: rows[:, :6],
    "of 65 columns": lambda rows: np.zeros((len(rows), 65), np.int64),
}
VALUES: dict[str, Callable[[np.ndarray], Any]] = {
    "with NaN": put(3, 1, np.nan, "f8"),
    "with an infinity": put(3, 1, np.inf, "f8"),
    "with a fraction": put(3, 1, 0.5, "f8"),
    "with 2^63": put(3, 1, 2.0**63, "f8"),
    "with an unsigned 2^64 - 1": lambda rows: np.full(rows.shape, (1 << 64) - 1, np.uint64),
}
NO_NUMBERS: dict[str, Callable[[np.ndarray], Any]] = {
    "of objects": lambda rows: rows.astype(object),
    "of texts": lambda rows: rows.astype(str),
    "of complex numbers": lambda rows: rows.astype(complex),
    "of dates": lambda rows: rows.astype("M8[s]"),
}
NO_ARRAYS: dict[str, Any] = {"a list": [[1]], "a dict": {"a": 1}, "a number": 5, "a text": "x", "nothing": ()}


def _items() -> Iterator[Damaged]:
    for group in GROUPS:
        what = (REQUESTS, "request ", group)
        texts: tuple[str, ...]
        for field, number in ITEM_INDEX.items():
            for value in (-1, COUNTS[field] + 1):
                texts = (*what, f"{field} is {value}", "id_cnt.pkl")
                if group == "rank_pos" and field == "video_id":
                    continue  # no true position is known of such a video: it is left out, and counted
                yield Damaged(f"{group} {field} {value}", edit_group(group, put(3, number, value)), texts)
        for unit, factor in (("milliseconds", 1000), ("microseconds", 1_000_000)):
            edit = put(3, 5, 1_700_000_000 * factor)
            texts = (REQUESTS, "request ", "upload_timestamp", "unit")
            yield Damaged(f"{group} uploaded in {unit}", edit_group(group, edit), texts)
        for kind, change in SHAPES.items():
            yield Damaged(f"{group} {kind}", edit_group(group, change), (*what, "shape"))
        for kind, change in VALUES.items():
            yield Damaged(f"{group} {kind}", edit_group(group, change), (*what, "not an integer"))
        for kind, change in NO_NUMBERS.items():
            yield Damaged(f"{group} {kind}", edit_group(group, change), (REQUESTS, "fetch the file again"))
        for kind, value in NO_ARRAYS.items():
            texts = (REQUESTS, "request ", "dict of arrays by group")
            yield Damaged(f"{group} is {kind}", edit_group(group, always(value)), texts)


def _histories() -> Iterator[Damaged]:
    for field, number in HISTORY_INDEX.items():
        for value in (-1, COUNTS[field] + 1):
            texts = (HISTORIES, "request ", "history", f"{field} is {value}")
            yield Damaged(f"history {field} {value}", edit_first(HISTORIES, event(number, value)), texts)
    shapes = SHAPES | {
        "of no rows": lambda rows: rows[:0],
        "of 49 rows": lambda rows: rows[1:],
        "of 51 rows": lambda rows: np.concatenate([rows[:1], rows]),
        "of 7 columns": lambda rows: rows[:, :7],
    }
    for kind, change in shapes.items():
        yield Damaged(f"history {kind}", edit_first(HISTORIES, change), (HISTORIES, "request ", "shape"))
    for kind, change in VALUES.items():
        yield Damaged(f"history {kind}", edit_first(HISTORIES, change), (HISTORIES, "request ", "not an integer"))
    for kind, change in NO_NUMBERS.items():
        yield Damaged(f"history {kind}", edit_first(HISTORIES, change), (HISTORIES, "fetch the file again"))
    for kind, value in NO_ARRAYS.items():
        yield Damaged(f"history is {kind}", edit_first(HISTORIES, always(value)), (HISTORIES, "not an array"))


def _pickles_of_another_form() -> Iterator[Damaged]:
    for file in (REQUESTS, HISTORIES):
        for key in ("a", 1.5, None, b"x"):
            yield Damaged(f"{file} with the key {key!r}", edit_key(file, key), (file, "keyed by request ids"))
        yield Damaged(f"{file} with a tuple as key", edit_key(file, (1, 2)), (file, "key"))
        yield Damaged(f"{file} with a key of 71 bits", edit_key(file, 1 << 70), (file, "key", "64 bits"))
        contents: tuple[Any, ...] = ([1], 5, "text", np.arange(3), ({1: {}},))
        for content in contents:
            yield Damaged(f"{file} is {content!r}", replace_content(file, content), (file, "fetch the file again"))
    yield Damaged("no items", replace_content(REQUESTS, {}), (REQUESTS, FEATHER))
    yield Damaged("an unknown request's items", replace_content(REQUESTS, {5: {}}), (REQUESTS, FEATHER))
    values: tuple[Any, ...] = ([], 5, "x", np.arange(3))
    for value in values:
        texts = (REQUESTS, "request ", "dict of arrays by group")
        yield Damaged(f"a request is {value!r}", edit_first(REQUESTS, always(value)), texts)
    for file in (REQUESTS, HISTORIES, COUNTS_FILE):
        refusal = (file, "which a data file has no use for")
        yield Damaged(f"{file} is a program", make_program(file, lambda _, program: program), refusal)
        yield Damaged(f"{file} has a program", make_program(file, lambda old, program: old | {1: program}), refusal)


def _counts() -> Iterator[Damaged]:
    for field, count in COUNTS.items():
        texts = (COUNTS_FILE, f"field {field}")
        yield Damaged(f"no count of {field}", edit_counts(**{field: ...}), texts)
        for value in (0, -1, 1.5, "5", True, None, 1 << 40, [count], np.nan):
            yield Damaged(f"{value!r} {field}", edit_counts(**{field: value}), (*texts, "not a count"))
        yield Damaged(f"too few {field}", edit_counts(**{field: 1}), (f"{field} is ", "0 .. 1 that", "id_cnt.pkl"))
    yield Damaged("two counts of videos", edit_counts(photo_id=9), (COUNTS_FILE, "field video_id", "twice"))
    contents: tuple[Any, ...] = ([1], 5, "text", np.arange(3))
    for content in contents:
        yield Damaged(f"counts are {content!r}", replace_content(COUNTS_FILE, content), (COUNTS_FILE, "not a dict"))


def _days() -> Iterator[Damaged]:
    for file in (FEATHER, REQUESTS, HISTORIES):
        other = file.replace(DAY, "2024-02-31")
        yield Damaged(f"{other} is no day", copy_to(file, other), (other, "no date"))
    for days in ("2024-01-17", f"{DAY},2024-01-17", "tomorrow", ","):
        yield Damaged(f"--train_days={days}", lambda root: None, ("--train_days", DAY), (f"--train_days={days}",))
    for content in ("", "{", "[]", "{}", '{"data": 5}', '{"data": ""}', '{"data": "a\\nb"}', '{"data": null}'):
        texts = (recflow.ORIGIN_FILE, "make the log again")
        yield Damaged(f"origin.json is {content!r}", write_origin(content), texts)


# ---- repaired --------------------------------------------------------------------------------------------------------

NOT_IN_REQUESTS = "requests of all_stage without items"
NOT_IN_FEATHER = "requests of request_id_dict without rows"
NO_INDEX = "items of rank_pos without rank_index"
NO_HISTORY = "requests without a history"
DISAGREE = "requests whose rows disagree"
SEVERAL = "items with several rank_index"


def cast(kind: pa.DataType) -> Callable[[np.ndarray], pa.Array]:
    return lambda values: pa.array(values).cast(kind)


def _without_first(file: str) -> Spoil:
    def change(content: dict[int, Any]) -> None:
        del content[next(iter(content))]

    return lambda root: edit_pickle(root / file, change)


def _rows(edit: Callable[[pa.Table], pa.Table]) -> Spoil:
    return lambda root: edit_table(root / FEATHER, edit, chunksize=50)


def _again(change: str | None) -> Callable[[pa.Table], pa.Table]:
    """All rows of the first request once more, at the end, where ``change`` is another by one."""

    def edit(table: pa.Table) -> pa.Table:
        ids = table["request_id"].to_numpy()
        rows = table.filter(pa.array(ids == ids[0]))
        if change is not None:
            rows = with_column(rows, change, rows[change].to_numpy() ^ 1)
        return pa.concat_tables([table, rows])

    return edit


def repaired() -> Iterator[Repaired]:
    """All cases that are read, by which rule."""
    forms: dict[str, Callable[[np.ndarray], Any]] = {
        "empty": lambda rows: rows[:0],
        "empty and of no width": lambda rows: np.array([]),
        "one row": lambda rows: rows[:1],
        "nine rows": lambda rows: rows[:9],
        "twelve rows": lambda rows: np.concatenate([rows, rows[:2]]),
        "of 7 columns": lambda rows: rows[:, :7],
        "of 64 columns": lambda rows: np.pad(rows, ((0, 0), (0, 64 - rows.shape[1]))),
        "of int32": lambda rows: rows.astype(np.int32),
        "of whole floats": lambda rows: rows.astype(float),
        "of another byte order": lambda rows: rows.astype(">i8"),
        "in Fortran's order": np.asfortranarray,
        "unsigned": lambda rows: np.abs(rows).astype(np.uint64),
    }
    for group in GROUPS:
        for form, edit in forms.items():
            yield Repaired(f"{group} {form}", edit_group(group, edit), {})

        def drop(groups: dict[str, Any], group: str = group) -> None:
            del groups[group]

        yield Repaired(f"no {group}", edit_first(REQUESTS, drop), {})
    yield Repaired("no group at all", edit_first(REQUESTS, lambda groups: groups.clear()), {})
    for form in ("of 64 columns", "of int32", "of whole floats", "of another byte order", "in Fortran's order"):
        yield Repaired(f"history {form}", edit_first(HISTORIES, forms[form]), {})
    yield Repaired("history of 8 columns", edit_first(HISTORIES, lambda rows: rows[:, :8]), {})
    yield Repaired("history of padding", edit_first(HISTORIES, lambda rows: rows * 0), {})
    yield Repaired("no history of one request", _without_first(HISTORIES), {NO_HISTORY: 1})
    yield Repaired("no history", replace_content(HISTORIES, {}), {NO_HISTORY: 4})
    yield Repaired("an unknown history", replace_content(HISTORIES, {5: np.zeros((50, 10), int)}), {NO_HISTORY: 4})
    yield Repaired("no items of one request", _without_first(REQUESTS), {NOT_IN_REQUESTS: 1})
    yield Repaired(
        "an unknown request", lambda root: edit_pickle(root / REQUESTS, lambda old: old | {5: {}}), {NOT_IN_FEATHER: 1}
    )
    for index in (-1, -(1 << 40)):
        yield Repaired(f"rank_index {index}", at_truth("rank_index", index), {NO_INDEX: 1})
    yield Repaired("one true item is not flagged", at_truth("rank_pos", 0), {NO_INDEX: 1})
    yield Repaired("no item is flagged", edit_column("rank_pos", lambda flags: flags * 0), {NO_INDEX: 40})
    for video in (-1, COUNTS["video_id"] + 1, 1 << 40):
        yield Repaired(f"true item {video}", edit_group("rank_pos", put(3, 0, video)), {NO_INDEX: 1})
    yield Repaired("a request's rows twice", _rows(_again(None)), {})
    for field in (*REQUEST_FIELDS, "request_timestamp"):
        yield Repaired(f"a request's rows twice, with another {field}", _rows(_again(field)), {DISAGREE: 1})
        first = edit_column(field, lambda values: np.concatenate([values[:1], values[1:2] ^ 1, values[2:]]))
        yield Repaired(f"two rows in succession with another {field}", first, {DISAGREE: 1})
    yield Repaired("a request's rows twice, with another rank_index", _rows(_again("rank_index")), {SEVERAL: 10})
    yield Repaired("rows in reverse", _rows(lambda table: table.take(pa.array(range(table.num_rows)[::-1]))), {})
    for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        yield Repaired(f"flags of {kind}", edit_column("rank_pos", cast(kind)), {})
    yield Repaired("photo_id", edit_counts(video_id=..., photo_id=COUNTS["video_id"]), {})
    for name in (" category_level_two", "category_level_two\n", "\tcategory_level_two "):
        counts = {"category_level_two": ..., name: COUNTS["category_level_two"]}
        yield Repaired(f"a count of {name!r}", edit_counts(**counts), {})
    yield Repaired("a count of something else", edit_counts(tag="?"), {})
    yield Repaired("a count of numpy's", edit_counts(user_id=np.int64(COUNTS["user_id"])), {})
