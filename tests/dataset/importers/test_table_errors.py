"""What is wrong with a mapping or a table is said in one sentence that names file, column and remedy."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from deep_components.commands import main
from deep_components.dataset.importers.table import scan
from deep_components.dataset.importers.table.command import import_table
from deep_components.errors import InputError
from tests.dataset.importers import tables

MAPPINGS: list[tuple[str, str, str]] = [  # what stands there, what comes in its place, what is said
    ('request = "query"', 'reqest = "query"', r"\[rows\] has the key 'reqest'.*did you mean request\?"),
    ('item = "product"\n', "", r"\[rows\] has no item"),
    ('time_unit = "s"', 'time_unit = "sec"', r"time_unit of \[rows\] is 'sec'; choose one of s, ms, us, ns"),
    (tables.ZONE, "Mars/Olympus", "time_zone of .*Mars/Olympus.*use a name such as"),
    ('column = "left_at"', 'column = "left_at"\nposition = "stock"', "exactly one of column, flags"),
    ('column = "left_at"', 'flags = ["a"]', r"flags of \[groups\] are 1, not 3"),
    ('column = "left_at"', 'position = "p"\ncuts = [5, 2, 20]', "cuts of .*rising"),
    ('"ranked", "retrieved"]', '"ranked", "ranked"]', r"order of \[groups\] names ranked twice"),
    ('label = "gain"', 'label = "gain"\nrank = "stock"', "at most one of label, rating and rank"),
    ('kind = "number"\nscale', 'kind = "numbr"\nscale', "field stock: kind is 'numbr'; did you mean number"),
    ('scale = "quantile"', 'scale = "quantil"', "field stock: scale is 'quantil'; did you mean quantile"),
    ('column = "brand"\nside = "item"', 'column = "brand"\nside = "items"', "field brand: side is 'items'.*item"),
    ('column = "brand"', 'column = "left_at"', r"field brand: column left_at is in \[groups\].*leave the field out"),
    ('name = "brand"\ncolumn = "brand"', 'name = "brand"\ncolumn = "product"', "column product is named twice"),
    ('name = "brand"', 'name = "item"', "two fields of side item have the name item"),
    ('user = "customer"', 'user = "query"', r"column query is request and user of \[rows\]"),
    ('user = "customer"\n', "", r"derive of \[history\] needs the column user"),
    ('["item", "genres"]', '["item", "genre"]', "derive of .* names 'genre'.*did you mean genres"),
    ('parts = ["weekday", "hour"]', 'parts = ["weekday", "hours"]', "parts names 'hours'; did you mean hour"),
    ("buckets = 4", 'buckets = "four"', "buckets of field stock is 'four', not a whole number"),
    ("min_count = 4", "min_cout = 4", "field item has the key 'min_cout'.*did you mean min_count"),
    ("[history]", "[histry]", "the file has the key 'histry'.*did you mean history"),
    ("[rows]", "[rows", "not a TOML file"),
]


@pytest.mark.parametrize(("there", "instead", "said"), MAPPINGS)
def test_a_mapping_that_contradicts_itself(there: str, instead: str, said: str, tmp_path: Path) -> None:
    assert there in tables.MAPPING
    path = tables.write(tmp_path, tables.table(20), tables.MAPPING.replace(there, instead, 1))
    with pytest.raises(InputError, match=f"log.toml: .*{said}"):
        import_table(path, tmp_path / "log")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.toml", "rows"]


def with_values(column: str, values: Any, where: int = 5) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        changed = rows.astype({column: object})
        changed.loc[where, column] = values
        return changed.convert_dtypes(dtype_backend="pyarrow") if values is None else changed.infer_objects()

    return change


def conflicting(rows: pd.DataFrame) -> pd.DataFrame:
    bought = rows[rows["left_at"] == "bought"].iloc[:1]
    return pd.concat([rows, bought.assign(gain=bought["gain"] + 1)])


TABLES: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    (lambda rows: rows.drop(columns="brand"), "part-0.parquet: column brand, of field brand, is missing; "),
    (lambda rows: rows.rename(columns={"left_at": "left"}), r"column left_at, of \[groups\], is missing; did you mean"),
    (with_values("left_at", "boght"), "part-0.parquet: column left_at holds 'boght'.*did you mean bought"),
    (with_values("left_at", None), "part-0.parquet: column left_at has missing values; it is the group.*fill"),
    (with_values("query", None), "part-0.parquet: column query has missing values; it is the request id"),
    (with_values("product", None), "column product has missing values; it is the item id"),
    (with_values("ts", None), "column ts has missing values; it is the time of the request"),
    (lambda rows: rows.assign(gain=np.nan), "column gain has missing values; it is the order of the ground truth"),
    (with_values("ts", tables.FIRST_SECOND // 1000), "column ts holds 1970-01-20, before 1990; check time_unit"),
    (with_values("ts", tables.FIRST_SECOND * 1000), "column ts holds a time outside the years 1900 to 2200; check"),
    (lambda rows: rows.assign(ts=rows["ts"] + np.arange(len(rows))), "column ts differs between rows of the request"),
    (lambda rows: rows.assign(customer=[f"c{n}" for n in range(len(rows))]), "column customer differs between rows"),
    (lambda rows: rows.assign(price="cheap"), "column price holds .*string, not numbers; check kind.* field price"),
    (lambda rows: rows.assign(price=np.inf), "column price holds an infinite number"),
    (lambda rows: rows.assign(brand=1.5), "column brand Float value 1.5.*; check kind and type of field brand|brand"),
    (
        conflicting,
        "part-0.parquet: column gain has two values for one ground-truth item of the request 'q0'; leave one",
    ),
    (lambda rows: rows.assign(left_at="shown"), "rows: no request has ground truth and two items; check"),
    (lambda rows: rows.assign(ts=tables.FIRST_SECOND), "leaves no day to train or none to test on"),
    (lambda rows: rows.iloc[:0], "rows: holds no row"),
]


@pytest.mark.parametrize(("change", "said"), TABLES, ids=[said[:40] for _, said in TABLES])
def test_a_table_that_is_not_sound(
    change: Callable[[pd.DataFrame], pd.DataFrame], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tables.write(tmp_path, change(tables.table(60)))
    flags = [f"--mapping={path}", "--jobs=1"]
    with pytest.raises(InputError, match=said):
        import_table(path, tmp_path / "log")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.toml", "rows"]
    # The same by the command, and found by a check that goes on.
    assert main(["import", *flags, "--check"]) == 2
    said_too = capsys.readouterr()
    assert said_too.err.startswith("error: ") and len(said_too.err.splitlines()) == 1
    assert "problem 1: " in said_too.out


def two_files(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    rows = tables.table(60)
    path = tables.write(folder, rows.iloc[:100])
    pa.parquet.write_table(pa.Table.from_pandas(change(rows.iloc[100:])), folder / "rows/part-1.parquet")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.assign(product=rows["product"].astype(str)), "column product holds .*string, but int64 in"),
        (lambda rows: rows.assign(ts=pd.to_datetime(rows["ts"], unit="s")), "column ts holds timestamp.*, but int64"),
        (lambda rows: rows.drop(columns="stock"), "column stock, of field stock, is missing"),
    ],
)
def test_files_whose_columns_differ(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"part-1.parquet: {said}"):
        import_table(two_files(tmp_path, change), tmp_path / "log")


def test_integers_of_other_widths_and_gaps_are_the_same_column(tmp_path: Path) -> None:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(product=rows["product"].astype("int16"), stock=rows["stock"].astype(float))

    import_table(two_files(tmp_path, change), tmp_path / "log")


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = bytes(40)
    path.write_bytes(content)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_outside(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere.parquet")
    path.symlink_to(path.parents[1] / "elsewhere.parquet")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damaged, "part-0.parquet: not a readable parquet file"),
        (fifo, "part-0.parquet: not a readable parquet file .not a regular file"),
        (link_outside, "part-0.parquet: a link out of the folder"),
        (lambda path: path.rename(path.with_suffix(".txt")), "part-0.txt: its ending is none of"),
        (lambda path: path.with_suffix(".csv").touch(), "not of the format of part-0"),
        (lambda path: path.unlink(), "rows: holds no table"),
    ],
)
def test_files_that_cannot_be_read(harm: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = tables.write(tmp_path, tables.table(20))
    harm(tmp_path / "rows/part-0.parquet")
    with pytest.raises(InputError, match=said):
        import_table(path, tmp_path / "log")


@pytest.mark.parametrize("kind", ["parquet", "feather", "csv"])
def test_damaged_content_is_a_refusal_or_other_data(kind: str, tmp_path: Path) -> None:
    """Whatever bytes are there, nothing but a refusal or a log comes of it."""
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / str(number)
        path = tables.write(folder, tables.table(30), kind=kind)
        file = folder / f"rows/part-0.{kind}"
        content = bytearray(file.read_bytes())
        for position in rng.integers(0, len(content), 4):
            content[position] = rng.integers(0, 256)
        file.write_bytes(content)
        try:
            import_table(path, folder / "log")
        except InputError as error:
            assert str(folder) in str(error)
            assert not (folder / "log").exists()


def test_a_bad_value_in_csv_names_its_column(tmp_path: Path) -> None:
    rows = tables.table(20).assign(price="cheap")
    with pytest.raises(InputError, match=r"part-0.csv: not a readable csv file .*column price: .*cheap"):
        import_table(tables.write(tmp_path, rows, kind="csv"), tmp_path / "log")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tables.write(tmp_path, tables.table(20))
    (tmp_path / "log").mkdir()
    (tmp_path / "log/mine").touch()
    with pytest.raises(InputError, match="is there already; remove it or name another folder"):
        import_table(path, tmp_path / "log")
    assert [entry.name for entry in (tmp_path / "log").iterdir()] == ["mine"]


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tables.write(tmp_path, tables.table(60))
    monkeypatch.setattr(scan, "append", full)
    with pytest.raises(InputError, match=r"log: cannot be written .No space left on device.; free the space"):
        import_table(path, tmp_path / "log")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.toml", "rows"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_leaves_nothing(jobs: int, tmp_path: Path) -> None:
    path = tables.write(tmp_path / "in", tables.table(12_000), files=2)  # long enough for the signal to come in time
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "deep_components", "import", f"--mapping={path}", f"--jobs={jobs}"]
    with subprocess.Popen([*command, f"--output_dir={tmp_path / 'out/log'}"], stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list((tmp_path / "out").glob(".log.*/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said.endswith(b"stopped; nothing was written\n") and b"Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_import_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tables.write(tmp_path, tables.table(60))
    leftover = tmp_path / f".log.{'0' * 32}.tmp"
    (leftover / "0").mkdir(parents=True)
    (leftover / "lock").touch()
    import_table(path, tmp_path / "log")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log", "log.toml", "rows"]


# ---- check -----------------------------------------------------------------------------------------------------------


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["import", f"--mapping={path}", "--check", "--jobs=1"])
    return code, *capsys.readouterr()


def test_check_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables.table()
    wanted = tables.requests_of(rows)
    code, report, said = check(tables.write(tmp_path, rows), capsys)
    assert (code, said) == (0, "")
    assert f"{len(rows)} rows" in report
    for day in {request.day for request in wanted.values()}:
        here = [request for request in wanted.values() if request.day == day]
        use = "test" if day == "2024-01-05" else "training"
        assert f"day {day}, {use}: {len(here)} requests, {sum(len(r.items) for r in here)} candidates" in report
    without = sum(not (some == "bought").any() for _, some in rows.groupby("query")["left_at"])
    assert f"{without} requests without ground truth, left out" in report
    lengths = sorted(len(request.items) for request in wanted.values())
    assert f"candidates of a request: {lengths[0]} to {lengths[-1]}, median" in report
    items = [entry for request in wanted.values() for entry in request.items.values()]
    assert f"group bought: {sum(e['group'] == 0 for e in items)} candidates" in report
    prices = [entry["price"] for entry in items if entry["price"] == entry["price"]]
    assert f"{1 - len(prices) / len(items):.1%} missing, {min(prices):g} to {max(prices):g}" in report
    train = [request for request in wanted.values() if request.day != "2024-01-05"]
    test = [request for request in wanted.values() if request.day == "2024-01-05"]
    known = {product for request in train for product in request.items}
    tested = [product for request in test for product in request.items]
    new = {product for product in tested if product not in known}
    occurrences = sum(product in new for product in tested) / len(tested)
    share = f"of {len(set(tested))} ids of the test days {len(new) / len(set(tested)):.1%} were never seen"
    assert f"{share} in training, in {occurrences:.1%} of occurrences" in report
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.toml", "rows"]


def test_check_finds_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = conflicting(tables.table(60)).reset_index(drop=True)
    rows.loc[3, "left_at"] = "boght"
    rows["product"] = rows["product"].astype("Int64")
    rows.loc[4, "product"] = pd.NA
    rows.loc[rows["query"] == "q1", "customer"] = [f"c{n}" for n in range((rows["query"] == "q1").sum())]
    path = tables.write(tmp_path, rows)
    (tmp_path / "rows/part-1.parquet").write_bytes(b"PAR1 no more")
    code, report, said = check(path, capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "part-1.parquet: not a readable parquet file" in report
    (tmp_path / "rows/part-1.parquet").unlink()
    code, report, said = check(path, capsys)
    assert code == 2 and "4 problems" in said
    for what in ("holds 'boght'", "product has missing values", "gain has two values", "customer differs between"):
        assert what in report


def test_check_finds_all_problems_of_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = tables.MAPPING.replace('item = "product"\n', "").replace("buckets = 4", 'buckets = "four"')
    code, report, said = check(tables.write(tmp_path, tables.table(20), mapping), capsys)
    assert code == 2 and "2 problems" in said
    assert "[rows] has no item" in report and "buckets of field stock is 'four'" in report


@pytest.mark.parametrize(("there", "instead", "said"), MAPPINGS)
def test_check_goes_on_without_what_is_wrong_in_the_mapping(
    there: str, instead: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = with_values("left_at", "boght")(tables.table(60)).assign(price=np.inf).drop(columns="genres")
    code, report, _ = check(tables.write(tmp_path, rows, tables.MAPPING.replace(there, instead, 1)), capsys)
    assert code == 2 and re.search(f"log.toml: .*{said}", report)
    if instead == "[rows":
        return  # not a TOML file
    assert "part-0.parquet: column genres, of field genres, is missing" in report
    assert "part-0.parquet: column price holds an infinite number" in report
    assert ("holds 'boght'" in report) == (there != 'column = "left_at"')
    assert "no request has ground truth" not in report and "no day to train" not in report


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_check_goes_on_without_columns_that_are_wrong(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One problem for each of the seven changes, of log.toml, of columns, and of rows."""
    rows = conflicting(tables.table(60)).reset_index(drop=True)
    rows.loc[3, "left_at"] = "boght"
    rows.loc[4, "product"] = None
    rows["product"] = rows["product"].astype("Int64")
    rows.loc[rows["query"] == "q1", "customer"] = [f"c{n}" for n in range((rows["query"] == "q1").sum())]
    rows = rows.assign(price=["cheap", *["1.5"] * (len(rows) - 1)]).drop(columns="brand")
    mapping = tables.MAPPING.replace('"quantile"', '"quantil"')
    code, report, said = check(tables.write(tmp_path, rows, mapping, kind=kind), capsys)
    problems = [line for line in report.splitlines() if line.startswith("problem ")]
    assert code == 2 and "7 problems, listed above" in said and len(problems) == 7, report
    for what in (
        "field stock: scale is 'quantil'",
        "column brand, of field brand, is missing",
        "column price ",
        "column left_at holds 'boght', which order",
        "column product has missing values",
        "column customer differs between rows of the request 'q1' (",
        "column gain has two values for one ground-truth item of the request 'q0';",
    ):
        assert sum(what in line for line in problems) == 1, what


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ({"ts": 1_700_000}, "column ts holds 1970-01-20, before 1990"),
        ({"ts": "soon"}, "column ts holds .*string, not numbers"),
        ({"left_at": "left"}, "column left_at holds 'left'"),
        ({"left_at": None}, "column left_at has missing values"),
        ({"product": None}, "column product has missing values"),
        ({"query": 1.5}, "column query holds double, not text|column query Float value"),
        ({"gain": "much"}, "column gain holds .*string, not numbers"),
    ],
)
def test_check_goes_on_without_a_column_of_rows_or_groups(
    spoilt: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tables.table(60).assign(price=np.inf, **spoilt)
    rows.loc[:, "customer"] = [f"c{n}" for n in range(len(rows))]
    _, report, _ = check(tables.write(tmp_path, rows), capsys)
    problems = [line for line in report.splitlines() if line.startswith("problem ")]
    assert re.search(said, report) and "column price holds an infinite number" in report
    assert ("column customer differs between rows" in report) == ("query" not in spoilt)
    assert len(problems) == (2 if "query" in spoilt else 3), report


def test_a_problem_of_many_files_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables.table(60)
    rows.loc[::10, "left_at"] = "boght"
    _, report, _ = check(tables.write(tmp_path, rows, files=3), capsys)
    problems = [line for line in report.splitlines() if line.startswith("problem ")]
    assert len(problems) == 1 and "part-0.parquet: column left_at holds 'boght'" in problems[0]
    assert f"does not name ({len(rows.index[::10])} rows); did you mean bought?" in problems[0]


@pytest.mark.parametrize("number", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_request_is_named_by_its_id_and_file(
    kind: str, number: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tables.table(60)
    wanted = rows["query"] == "q41"
    rows.loc[wanted, "ts"] += np.arange(wanted.sum())
    if number:
        rows["query"] = rows["query"].str[1:].astype(int)
    path = tables.write(tmp_path, rows, files=3, kind=kind)
    file = f"part-{next(n for n, part in enumerate(np.array_split(rows.index, 3)) if wanted[part].any())}.{kind}"
    called = "41" if number and kind == "parquet" else "'41'" if number else "'q41'"
    sentence = f"{file}: column ts differs between rows of the request {called}"
    with pytest.raises(InputError, match=re.escape(sentence)):
        import_table(path, tmp_path / "log")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.toml", "rows"]
    assert sentence in check(path, capsys)[1]


SUSPICIOUS: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    (lambda rows: rows.assign(brand="b"), "field brand of side item, column brand, has the same value everywhere"),
    (lambda rows: rows.assign(brand=rows["left_at"]), "field brand of side item, column brand, alone tells the ground"),
    (lambda rows: rows.assign(price=(rows["left_at"] == "bought") + 1.5), "column price, alone tells the ground truth"),
    (lambda rows: rows.assign(stock=np.arange(len(rows)) * 7), "column stock, is a number of many whole values"),
    (lambda rows: rows.assign(brand=[f"b{n}" for n in range(len(rows))]), "table brand has .* ids in .* values"),
]


@pytest.mark.parametrize(("change", "said"), SUSPICIOUS, ids=[said[:40] for _, said in SUSPICIOUS])
def test_check_names_what_is_suspicious(
    change: Callable[[pd.DataFrame], pd.DataFrame], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report, _ = check(tables.write(tmp_path, change(tables.table(700))), capsys)
    assert code == 0
    assert re.search(f"suspicious: .*{said}", report), report
    _, sound, _ = check(tables.write(tmp_path / "sound", tables.table(700)), capsys)
    assert "suspicious" not in sound


def test_a_file_of_another_day_is_suspicious(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tables.write(tmp_path, tables.table(60))
    (tmp_path / "rows/day=2024-01-03").mkdir()
    (tmp_path / "rows/part-0.parquet").rename(tmp_path / "rows/day=2024-01-03/part-0.parquet")
    code, report, _ = check(path, capsys)
    assert code == 0
    assert "part-0.parquet: " in report and "rows are of another day than its name says; check time_zone" in report
