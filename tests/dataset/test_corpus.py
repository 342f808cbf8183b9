"""A corpus of damaged logs: each is refused in one sentence, or read by a rule and counted.

Every case spoils a copy of one small sound log. An error's sentence must hold all of the case's texts, the file and the
field among them; a repair must be counted under its name.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from deep_components import run_train2
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.dataset.days import training_days
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log
from tests.dataset.importers.test_recflow import compare
from tests.dataset.synthetic import COUNTS, DAY, edit_pickle, edit_table, random_log, with_column, write_log
from tests.helpers import leftovers

Spoil = Callable[[Path], Any]
Edit = Callable[[Any], Any]

GROUPS = tuple(group.name for group in TWO_STAGE.groups)
COLUMNS = (*recflow.REQUEST_COLUMNS, "video_id", "rank_pos", "rank_index")
ID_FIELDS = ("video_id", "author_id", "category_level_two", "upload_type", "category_level_one")
REQUEST_FIELDS = ("user_id", "device_id", "age", "gender", "province")
FEATHER, REQUESTS, HISTORIES = (str(path) for path in recflow.day_paths(Path(), DAY))
COUNTS_FILE = str(recflow.id_count_path(Path()))
AGAIN = "fetch the file again"


# ---- ways to spoil ---------------------------------------------------------------------------------------------------


def whole(file: str, edit: Edit) -> Spoil:
    """Change what is in a pickle."""
    return lambda root: edit_pickle(root / file, edit)


def first(file: str, edit: Edit) -> Spoil:
    """Change the value of the file's first request."""
    return whole(file, lambda content: content | {next(iter(content)): edit(content[next(iter(content))])})


def group(name: str, edit: Edit) -> Spoil:
    """Change one group of the first request."""
    return first(REQUESTS, lambda groups: groups | {name: edit(groups[name])})


def counts(**changes: Any) -> Spoil:
    """Change the counts of ids; ... takes one away."""
    return whole(COUNTS_FILE, lambda old: {name: count for name, count in (old | changes).items() if count is not ...})


def table(edit: Callable[[pa.Table], pa.Table]) -> Spoil:
    return lambda root: edit_table(root / FEATHER, edit, chunksize=50)


def column(name: str, edit: Edit) -> Spoil:
    """Change a column of all_stage."""
    return table(lambda rows: with_column(rows, name, edit(rows[name].to_numpy().copy())))


def true_item(name: str, value: int) -> Spoil:
    """A column's value in the first ground-truth row."""

    def change(rows: pa.Table) -> pa.Table:
        row = rows["rank_pos"].to_numpy().argmax()
        return with_column(rows, name, put(row, value)(rows[name].to_numpy()))

    return table(change)


def put(where: Any, value: float, kind: str = "i8") -> Edit:
    """One number of an array, which becomes one of ``kind``."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(kind)
        rows[where] = value
        return rows

    return change


def event(name: str, value: int) -> Edit:
    """One number of a history's last event, which is made a valid one."""
    time, field = (recflow.HISTORY_COLUMNS.index(name) for name in ("request_timestamp", name))
    return lambda rows: put((-1, field), value)(put((-1, time), 1)(rows))


def always(value: Any) -> Edit:
    return lambda _: value


def overwrite(file: str, content: bytes) -> Spoil:
    return lambda root: (root / file).write_bytes(content)


def cut(file: str, share: float) -> Spoil:
    return lambda root: os.truncate(root / file, int((root / file).stat().st_size * share))


def remove(file: str) -> Spoil:
    return lambda root: (root / file).unlink()


def copy(file: str, other: str) -> Spoil:
    return lambda root: shutil.copyfile(root / file, root / other)


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


def drop_column(name: str) -> Spoil:
    return table(lambda rows: rows.drop_columns([name]))


def repeat_column(name: str) -> Spoil:
    return table(lambda rows: rows.append_column(name, rows[name]))


def change_key(file: str, key: Any) -> Spoil:
    """Change the first request's id."""
    return whole(file, lambda old: {key: old.pop(next(iter(old)))} | old)


def drop_group(name: str) -> Spoil:
    return first(REQUESTS, lambda groups: {key: groups[key] for key in groups if key != name})


def change_second(field: str) -> Spoil:
    return column(field, lambda values: put(1, values[1] ^ 1)(values))


def cast_flags(kind: pa.DataType) -> Spoil:
    return column("rank_pos", lambda flags: pa.array(flags).cast(kind))


class Program:
    """Pickles as a call, here of os.mkdir with a name that cannot be overlooked."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.root / "canary"),)


def program(file: str, edit: Callable[[Any, Program], Any]) -> Spoil:
    """Put a pickled call into the file's content."""
    return lambda root: edit_pickle(root / file, lambda content: edit(content, Program(root)))


# ---- damaged ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, Edit] = {
    "of floats": lambda values: values.astype(float),
    "with NaN": lambda values: np.where(np.arange(len(values)) == 3, np.nan, values),
    "of texts": lambda values: [str(value) for value in values],
    "of truth values": lambda values: values > 0,
    "of lists": lambda values: [[int(value)] for value in values],
    "of dates": lambda values: pa.array(values % (1 << 40), pa.timestamp("ms")),
    "with a missing value": lambda values: pa.array(values, mask=np.arange(len(values)) == 5),
    "beyond 64 bits": lambda values: values.astype(np.uint64) | np.uint64(1 << 63),
}
CLOCKS: dict[str, Edit] = {
    "in seconds": lambda times: times // 1000,
    "in microseconds": lambda times: times * 1000,
    "in nanoseconds": lambda times: times * 1_000_000,
    "negative": lambda times: -times,
    "zero": lambda times: times * 0,
}
SHAPES: dict[str, Edit] = {
    "of one dimension": lambda rows: rows[0],
    "of three dimensions": lambda rows: rows[None],
    "of no dimension": always(np.array(7)),
    "of 6 columns": lambda rows: rows[:, :6],
    "of 65 columns": lambda rows: np.zeros((len(rows), 65), np.int64),
}
HISTORY_SHAPES: dict[str, Edit] = {
    "of no rows": lambda rows: rows[:0],
    "of 49 rows": lambda rows: rows[1:],
    "of 51 rows": lambda rows: np.concatenate([rows[:1], rows]),
    "of 7 columns": lambda rows: rows[:, :7],
}
VALUES: dict[str, Edit] = {
    "with NaN": put((3, 1), np.nan, "f8"),
    "with an infinity": put((3, 1), np.inf, "f8"),
    "with a fraction": put((3, 1), 0.5, "f8"),
    "with 2^63": put((3, 1), 2.0**63, "f8"),
    "with an unsigned 2^64 - 1": lambda rows: np.full(rows.shape, (1 << 64) - 1, np.uint64),
}
NO_NUMBERS: dict[str, Edit] = {
    "of objects": lambda rows: rows.astype(object),
    "of texts": lambda rows: rows.astype(str),
    "of complex numbers": lambda rows: rows.astype(complex),
    "of dates": lambda rows: rows.astype("M8[s]"),
}
NO_ARRAYS: tuple[Any, ...] = ([[1]], {"a": 1}, 5, "x", ())

Damaged = tuple[str, Spoil, tuple[str, ...]]


def damaged() -> Iterator[Damaged]:
    """Name, way to spoil, and what the sentence of refusal must hold."""
    texts: tuple[str, ...]
    for file in (FEATHER, REQUESTS, HISTORIES, COUNTS_FILE):
        for share in (0, 0.01, 0.5, 0.999):
            yield f"{file} cut to {share}", cut(file, share), (file, AGAIN)
        yield f"{file} garbage", overwrite(file, b"\xff" * 5000), (file, AGAIN)
        yield f"{file} text", overwrite(file, b"<html>404</html>\n" * 9), (file, AGAIN)
        texts = ("no such file",) if file == COUNTS_FILE else ("no day has its files", file.split("/")[0])
        yield f"{file} missing", remove(file), texts
        yield f"{file} is a folder", make_folder(file), (file,)
        yield f"{file} is a FIFO", make_fifo(file), (file, "not a regular file")
    yield from damaged_columns()
    yield from damaged_items()
    yield from damaged_histories()
    yield from pickles_of_another_form()
    yield from damaged_counts()
    for file in (FEATHER, REQUESTS, HISTORIES):
        other = file.replace(DAY, "2024-02-31")
        yield f"{other} is no day", copy(file, other), (other, "date")
    for content in ("", "{", "[]", "{}", '{"data": 5}', '{"data": ""}', '{"data": "a\\nb"}', '{"data": null}'):
        spoil = overwrite(recflow.ORIGIN_FILE, content.encode())
        yield f"origin.json is {content!r}", spoil, (recflow.ORIGIN_FILE, "make the log again")


def damaged_columns() -> Iterator[Damaged]:
    texts: tuple[str, ...]
    for name in COLUMNS:
        texts = (FEATHER, f"column {name}")
        yield f"no column {name}", drop_column(name), (*texts, "missing")
        yield f"column {name} twice", repeat_column(name), (*texts, "twice")
        for kind, edit in KINDS.items():
            yield f"column {name} {kind}", column(name, edit), texts
    for flag in (-1, 2, 1 << 40):
        yield f"rank_pos {flag}", column("rank_pos", put(7, flag)), (FEATHER, "rank_pos", str(flag))
    for name in REQUEST_FIELDS:
        for value in (-1, COUNTS[name] + 1, (1 << 63) - 1):
            texts = (FEATHER, "request ", f"{name} is {value}", "id_cnt.pkl")
            yield f"{name} {value}", column(name, put(0, value)), texts
    for unit, edit in CLOCKS.items():
        texts = (FEATHER, "request_timestamp", "unit")
        yield f"request_timestamp {unit}", column("request_timestamp", edit), texts
    for name, value in (("rank_index", 1 << 15), ("rank_index", 1 << 40), ("video_id", -1), ("video_id", 1 << 32)):
        yield f"true {name} {value}", true_item(name, value), (FEATHER, f"{name} is {value}")


def damaged_items() -> Iterator[Damaged]:
    texts: tuple[str, ...]
    for name in GROUPS:
        what = (REQUESTS, "request ", name)
        for field in ID_FIELDS:
            for value in (-1, COUNTS[field] + 1):
                if name == "rank_pos" and field == "video_id":
                    continue  # no true position is known of such a video: it is left out, and counted
                edit = put((3, recflow.ITEM_COLUMNS.index(field)), value)
                yield f"{name} {field} {value}", group(name, edit), (*what, f"{field} is {value}", "id_cnt.pkl")
        for factor in (1000, 1_000_000):
            edit = put((3, recflow.ITEM_COLUMNS.index("upload_timestamp")), 1_700_000_000 * factor)
            texts = (REQUESTS, "request ", "upload_timestamp", "unit")
            yield f"{name} uploaded in seconds / {factor}", group(name, edit), texts
        for edits, complaint in ((SHAPES, "shape"), (VALUES, "not an integer"), (NO_NUMBERS, AGAIN)):
            for kind, edit in edits.items():
                texts = what if edits is not NO_NUMBERS else (REQUESTS,)
                yield f"{name} {kind}", group(name, edit), (*texts, complaint)
        for value in NO_ARRAYS:
            texts = (REQUESTS, "request ", "dict of arrays by group")
            yield f"{name} is {value!r}", group(name, always(value)), texts


def damaged_histories() -> Iterator[Damaged]:
    texts: tuple[str, ...]
    for field in ID_FIELDS:
        for value in (-1, COUNTS[field] + 1):
            texts = (HISTORIES, "request ", "history", f"{field} is {value}")
            yield f"history {field} {value}", first(HISTORIES, event(field, value)), texts
    for edits, complaint in ((SHAPES | HISTORY_SHAPES, "shape"), (VALUES, "not an integer"), (NO_NUMBERS, AGAIN)):
        for kind, edit in edits.items():
            yield f"history {kind}", first(HISTORIES, edit), (HISTORIES, complaint)
    for value in NO_ARRAYS:
        yield f"history is {value!r}", first(HISTORIES, always(value)), (HISTORIES, "not an array")


def pickles_of_another_form() -> Iterator[Damaged]:
    texts: tuple[str, ...]
    contents: tuple[Any, ...] = ([1], 5, "text", np.arange(3), ({1: {}},))
    for file in (REQUESTS, HISTORIES):
        for key, text in (*((key, AGAIN) for key in ("a", 1.5, None, b"x")), (1 << 70, "64 bits"), ((1, 2), "key")):
            yield f"{file} with the key {key!r}", change_key(file, key), (file, text)
        for content in contents:
            yield f"{file} is {content!r}", whole(file, always(content)), (file, AGAIN)
    for content in contents[:-1]:
        yield f"{COUNTS_FILE} is {content!r}", whole(COUNTS_FILE, always(content)), (COUNTS_FILE, "not a dict")
        texts = (REQUESTS, "request ", "dict of arrays by group")
        yield f"a request is {content!r}", first(REQUESTS, always(content)), texts
    for content in ({}, {5: {}}):
        yield f"items are {content}", whole(REQUESTS, always(content)), (REQUESTS, FEATHER)
    for file in (REQUESTS, HISTORIES, COUNTS_FILE):
        refusal = (file, "which a data file has no use for")
        yield f"{file} is a program", program(file, lambda _, call: call), refusal
        yield f"{file} has a program", program(file, lambda old, call: old | {1: call}), refusal


def damaged_counts() -> Iterator[Damaged]:
    for field, count in COUNTS.items():
        texts = (COUNTS_FILE, f"field {field}")
        yield f"no count of {field}", counts(**{field: ...}), texts
        for value in (0, -1, 1.5, "5", True, None, 1 << 40, [count], np.nan):
            yield f"{value!r} {field}", counts(**{field: value}), (*texts, "not a count")
        yield f"too few {field}", counts(**{field: 1}), (f"{field} is ", "0 .. 1 that", "id_cnt.pkl")
    yield "two counts of videos", counts(photo_id=9), (COUNTS_FILE, "field video_id", "twice")


# ---- repaired --------------------------------------------------------------------------------------------------------

NOT_IN_REQUESTS = "requests of all_stage without items"
NOT_IN_FEATHER = "requests of request_id_dict without rows"
NO_INDEX = "items of rank_pos without rank_index"
NO_HISTORY = "requests without a history"
DISAGREE = "requests whose rows disagree"
BEYOND = "items of rank_pos with rank_index above 30, given label 0"
TWICE = "items that their request has already"
SEVERAL = "items with several rank_index"

FORMS: dict[str, Edit] = {  # the last five of a history, too
    "empty": lambda rows: rows[:0],
    "empty and of no width": always(np.array([])),
    "one row": lambda rows: rows[:1],
    "nine rows": lambda rows: rows[:9],
    "twelve rows": lambda rows: np.concatenate([rows, rows[:2]]),
    "of 7 columns": lambda rows: rows[:, :7],
    "unsigned": lambda rows: np.abs(rows).astype(np.uint64),
    "of 64 columns": lambda rows: np.pad(rows, ((0, 0), (0, 64 - rows.shape[1]))),
    "of int32": lambda rows: rows.astype(np.int32),
    "of whole floats": lambda rows: rows.astype(float),
    "of another byte order": lambda rows: rows.astype(">i8"),
    "in Fortran's order": np.asfortranarray,
}


def without_first(content: dict[Any, Any]) -> dict[Any, Any]:
    return dict(list(content.items())[1:])


def shared_items(better: str, worse: str) -> Edit:
    """A request's group gets three items of another one."""

    def change(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return groups | {worse: np.concatenate([groups[better][4:7], groups[worse][3:]])}

    return change


def repeated(change: str | None) -> Callable[[pa.Table], pa.Table]:
    """All rows of the first request once more, at the end, where ``change`` is another by one."""

    def edit(old: pa.Table) -> pa.Table:
        ids = old["request_id"].to_numpy()
        rows = old.filter(pa.array(ids == ids[0]))
        if change is not None:
            rows = with_column(rows, change, rows[change].to_numpy() ^ 1)
        return pa.concat_tables([old, rows])

    return edit


def repaired() -> Iterator[tuple[str, Spoil, dict[str, int]]]:
    """Name, way to spoil, and the repairs: beginning of a count's name -> the count."""
    for name in GROUPS:
        for form, edit in FORMS.items():
            yield f"{name} {form}", group(name, edit), {}
        yield f"no {name}", drop_group(name), {}
    yield "no group at all", first(REQUESTS, always({})), {}
    for form in list(FORMS)[-5:]:
        yield f"history {form}", first(HISTORIES, FORMS[form]), {}
    yield "history of 8 columns", first(HISTORIES, lambda rows: rows[:, :8]), {}
    yield "history of padding", first(HISTORIES, lambda rows: rows * 0), {}
    yield "no history of one request", whole(HISTORIES, without_first), {NO_HISTORY: 1}
    yield "no history", whole(HISTORIES, always({})), {NO_HISTORY: 4}
    yield "another's history", whole(HISTORIES, always({5: np.zeros((50, 10), int)})), {NO_HISTORY: 4}
    yield "no items of one request", whole(REQUESTS, without_first), {NOT_IN_REQUESTS: 1}
    yield "items of another", whole(REQUESTS, lambda old: old | {5: {}}), {NOT_IN_FEATHER: 1}
    for index in (-1, -(1 << 40)):
        yield f"rank_index {index}", true_item("rank_index", index), {NO_INDEX: 1}
    for index in (31, 1000):
        yield f"rank_index {index}", true_item("rank_index", index), {BEYOND: 1}
    for name in GROUPS:
        yield f"an item of {name} twice", group(name, lambda rows: rows[[0, 1, 2, 1, 4, 5, 6, 7, 8, 2]]), {TWICE: 2}
    for better, worse in itertools.combinations(GROUPS, 2):
        yield f"items of {better} in {worse} too", first(REQUESTS, shared_items(better, worse)), {TWICE: 3}
    yield "one true item is not flagged", true_item("rank_pos", 0), {NO_INDEX: 1}
    yield "no item is flagged", column("rank_pos", lambda flags: flags * 0), {NO_INDEX: 40}
    for video in (-1, COUNTS["video_id"] + 1, 1 << 40):
        yield f"true item {video}", group("rank_pos", put((3, 0), video)), {NO_INDEX: 1}
    yield "a request's rows twice", table(repeated(None)), {}
    yield "a request's rows twice, with another rank_index", table(repeated("rank_index")), {SEVERAL: 10}
    for field in (*REQUEST_FIELDS, "request_timestamp"):
        yield f"a request's rows twice, with another {field}", table(repeated(field)), {DISAGREE: 1}
        yield f"two rows in succession with another {field}", change_second(field), {DISAGREE: 1}
    yield "rows in reverse", table(lambda rows: rows.take(pa.array(range(rows.num_rows)[::-1]))), {}
    for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        yield f"flags of {kind}", cast_flags(kind), {}
    yield "photo_id", counts(video_id=..., photo_id=COUNTS["video_id"]), {}
    for name in (" category_level_two", "category_level_two\n", "\tcategory_level_two "):
        yield f"a count of {name!r}", counts(category_level_two=..., **{name: COUNTS["category_level_two"]}), {}
    yield "a count of something else", counts(tag="?"), {}
    yield "a count of numpy's", counts(user_id=np.int64(COUNTS["user_id"])), {}


# ---- the tests -------------------------------------------------------------------------------------------------------

DAMAGED = {name: (spoil, texts) for name, spoil, texts in damaged()}
REPAIRED = {name: (spoil, repairs) for name, spoil, repairs in repaired()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_log(tmp_path_factory.mktemp("corpus") / "log", random_log(4))
    recflow.write_origin(root, {"data": "corpus"})
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "log", copy_function=shutil.copyfile))


def train(root: Path, days: str = DAY) -> int:
    """The real command, as far as a log takes it."""
    sizes = ("--loss_type=bce", "--emb_dim=1", "--nn_units=4", "--batch_size=4", "--device=cpu")
    arguments = [f"--data_dir={root}", f"--output_dir={root.parent / 'run'}", f"--train_days={days}", *sizes]
    return run_command(run_train2.main, arguments)


def prepare(root: Path) -> int:
    """What the command does with a log, without building models, which would take most of the time."""

    def command(argv: list[str]) -> None:
        log = open_log(root)
        for day in training_days(log, [DAY]):
            log.open_day(day, TWO_STAGE)

    return run_command(command, [])


def test_the_sound_log_trains(root: Path) -> None:
    assert train(root) == 0
    assert not any(open_log(root).open_day(DAY, TWO_STAGE).repairs.values())
    assert len(DAMAGED) == len(list(damaged())) > 400 and len(REPAIRED) == len(list(repaired()))


@pytest.mark.parametrize("days", ["2024-01-17", f"{DAY},2024-01-17", "tomorrow", ","])
def test_days_that_are_not_there_are_refused(root: Path, capsys: pytest.CaptureFixture[str], days: str) -> None:
    assert train(root, days) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--train_days" in message and DAY in message


@pytest.mark.parametrize("name", DAMAGED)
def test_refused_in_one_sentence(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    spoil, texts = DAMAGED[name]
    spoil(root)
    whole_command = list(DAMAGED).index(name) % 12 == 0
    assert (train if whole_command else prepare)(root) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 1000
    for text in texts:
        assert text in message, message
    assert not (root / "canary").exists()
    assert leftovers(root) == [] and not list((root.parent / "run").glob("*.safetensors"))


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired_by_a_rule(root: Path, name: str) -> None:
    """The reference follows the rules one item at a time, on the spoiled files."""
    spoil, repairs = REPAIRED[name]
    spoil(root)
    compare(root, TWO_STAGE)
    counted = {text: count for text, count in open_log(root).open_day(DAY, TWO_STAGE).repairs.items() if count}
    found = {rule: counted.pop(text) for rule in repairs for text in list(counted) if text.startswith(rule)}
    assert found == repairs and not counted
