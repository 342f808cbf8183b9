"""A first log.toml guessed from a table: the roles of columns that are known here, and sound TOML for any table."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deep_components.dataset.importers.table.mapping import read_mapping
from deep_components.dataset.importers.table.suggest import SAMPLE_FILES, SAMPLE_ROWS, suggest
from deep_components.errors import InputError

PROJECT = Path(__file__).parents[4]
REQUESTS, ITEMS = 40, 10  # of the tables below


def base(**columns: Any) -> pd.DataFrame:
    """Requests of ten items each, of fifty there are; a column may be given as one value a request or one a row."""
    rng = np.random.default_rng(0)
    rows = REQUESTS * ITEMS
    item = np.concatenate([rng.choice(50, ITEMS, replace=False) for _ in range(REQUESTS)])
    table: dict[str, Any] = {"query_id": [f"q{number}" for number in range(REQUESTS)], "doc": item}
    table |= {
        "shown_at": pd.Timestamp("2025-01-01", tz="Asia/Shanghai") + pd.to_timedelta(np.arange(REQUESTS), unit="h")
    }
    table |= {"customer": rng.integers(5, size=REQUESTS), "weight": (item * 7 % 50) / 3 + 0.1}
    each = np.arange(rows) // ITEMS
    made = {n: v if len(v) == rows else pd.Series(v).iloc[each].to_numpy() for n, v in (table | columns).items()}
    return pd.DataFrame(made)


def written(folder: Path, table: pd.DataFrame) -> Path:
    path = folder / "rows.parquet"
    table.to_parquet(path)
    return path


def parsed(folder: Path, table: pd.DataFrame) -> dict[str, Any]:
    return tomllib.loads(suggest(written(folder, table)))


def fields(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {field["name"]: field for field in content["fields"]}


def problems(folder: Path, text: str) -> list[str]:
    (folder / "log.toml").write_text(text)
    return read_mapping(folder / "log.toml")[1]


def outcome(*names: str) -> np.ndarray:
    """The names in every request, in a random order: each twice as often as the one before."""
    counts = 2 ** np.arange(len(names))
    counts[-1] += ITEMS - counts.sum()
    rng = np.random.default_rng(1)
    return np.concatenate([rng.permutation(np.repeat(names, counts)) for _ in range(REQUESTS)])


def test_the_roles_of_columns(tmp_path: Path) -> None:
    table = base(fate=outcome("sold", "seen", "lost"))
    content = parsed(tmp_path, table)
    rows = content["rows"]
    assert Path(rows["path"]) == (tmp_path / "rows.parquet").resolve()
    assert (rows["request"], rows["item"], rows["time"], rows["user"]) == ("query_id", "doc", "shown_at", "customer")
    assert rows["time_zone"] == "Asia/Shanghai"
    assert content["groups"] == {"order": ["sold", "seen", "lost"], "column": "fate"}  # the rarest first
    assert content["history"]["derive"] == ["doc"]
    found = {name: (field["side"], field["kind"]) for name, field in fields(content).items()}
    assert found == {
        "when": ("request", "time"),
        "doc": ("item", "id"),
        "customer": ("request", "id"),
        "weight": ("item", "id" if table["weight"].nunique() == 1 else "number"),
    }
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_flags_are_groups_the_rarest_first(tmp_path: Path) -> None:
    fate = outcome("sold", "seen", "lost")
    table = base(wasSeen=fate != "lost", wasSold=(fate == "sold").astype(int))
    groups = parsed(tmp_path, table)["groups"]
    assert groups["flags"] == ["wasSold", "wasSeen"]
    assert groups["order"] == ["was_sold", "was_seen", "rest"]
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_a_position_is_the_last_resort(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    table = base(final_rank=np.concatenate([rng.permutation(ITEMS) + 1 for _ in range(REQUESTS)]))
    groups = parsed(tmp_path, table)["groups"]
    assert groups["position"] == "final_rank"
    assert len(groups["cuts"]) == len(groups["order"]) - 1
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_without_an_outcome_the_groups_are_to_be_filled_in(tmp_path: Path) -> None:
    text = suggest(written(tmp_path, base()))
    assert tomllib.loads(text)["groups"] == {}
    assert "# order = [" in text


def test_grades_order_the_groups_and_are_no_field(tmp_path: Path) -> None:
    """The best group is not the rarest here; what it has and others lack would tell the models the answer."""
    fate = outcome("seen", "liked", "lost")
    stars = np.select([fate == "liked", fate == "seen"], [5.0, 2.0], np.nan)
    table = base(fate=fate, stars=stars, paid=np.where(fate == "liked", 3.5, np.nan))
    content = parsed(tmp_path, table)
    assert content["groups"] == {"order": ["liked", "seen", "lost"], "column": "fate", "label": "stars"}
    assert not {"stars", "paid", "fate"} & set(fields(content))
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_numbers_say_how_they_are_scaled_and_what_is_missing(tmp_path: Path) -> None:
    of_item = np.random.default_rng(3).normal(size=50)
    doc = base()["doc"].to_numpy()
    price = pd.Series(np.exp(3 * of_item)[doc]).where(doc % 10 != 0)  # a fifth of the items or so have none
    text = suggest(written(tmp_path, base(fate=outcome("sold", "lost"), even=of_item[doc], price=price)))
    found = fields(tomllib.loads(text))
    assert found["even"]["scale"] == "standard"
    assert (found["price"]["scale"], found["price"]["buckets"]) == ("quantile", 16)
    assert f"missing in {price.isna().mean():.1%}" in text
    assert f"{len(set(doc))} different numbers in {REQUESTS * ITEMS} rows" in text


def test_lists_of_items_are_the_history(tmp_path: Path) -> None:
    seen = [list(range(length)) for length in range(REQUESTS)]
    table = base(fate=outcome("sold", "lost")).assign(seen=[seen[row // ITEMS] for row in range(REQUESTS * ITEMS)])
    content = parsed(tmp_path, table)
    assert content["history"] == {"length": REQUESTS - 1}
    entry = fields(content)["seen"]
    assert (entry["side"], entry["kind"], entry["table"]) == ("history", "id", "doc")
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_lists_of_an_item_in_arrow_and_in_text(tmp_path: Path) -> None:
    doc = base()["doc"].to_numpy()
    tags = [[f"tag{bit}" for bit in range(6) if number >> bit & 1] for number in doc]
    table = base(fate=outcome("sold", "lost")).assign(tags=tags, topics=["|".join(entry) or "none" for entry in tags])
    found = fields(parsed(tmp_path, table))
    longest = max(map(len, tags))
    assert (found["tags"]["length"], "separator" in found["tags"]) == (longest, False)
    assert (found["topics"]["length"], found["topics"]["separator"]) == (longest, "|")
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_csv_with_times_in_numbers_and_names_in_camel_case(tmp_path: Path) -> None:
    fate = outcome("liked", "rated", "random")
    renamed = base(Outcome=fate).rename(columns={"query_id": "RequestID", "doc": "MovieID", "customer": "UserID"})
    renamed["Timestamp"] = renamed.pop("shown_at").dt.as_unit("ms").astype("int64")
    for number, part in enumerate(np.array_split(np.arange(len(renamed)), 4)):
        renamed.iloc[part].to_csv(tmp_path / f"{number}.csv", index=False)
    content = tomllib.loads(suggest(tmp_path))
    rows = content["rows"]
    assert (rows["request"], rows["item"], rows["time"], rows["user"]) == (
        "RequestID",
        "MovieID",
        "Timestamp",
        "UserID",
    )
    assert rows["time_unit"] == "ms"
    assert {"movie_id", "user_id", "weight", "when"} == set(fields(content))


def test_csv_of_another_delimiter(tmp_path: Path) -> None:
    base(fate=outcome("sold", "lost")).to_csv(tmp_path / "rows.csv", sep=";", index=False)
    text = suggest(tmp_path / "rows.csv")
    assert tomllib.loads(text)["rows"]["delimiter"] == ";"
    assert {"doc", "customer", "weight"} <= set(fields(tomllib.loads(text)))
    assert problems(tmp_path, text) == []


def test_names_and_values_cannot_break_the_file(tmp_path: Path) -> None:
    evil = 'a"\n[rows]\npath = "b'
    fate = outcome(evil, "x\x7f\\", "lost")
    values = np.arange(REQUESTS)
    table = base(
        **{evil: fate, "\x00": values, "": values % 3, "'''": fate == "lost", "label": values % 4, "Label": values}
    )
    content = parsed(tmp_path, table)
    assert content["groups"]["order"] == [evil, "x\x7f\\", "lost"]
    columns = {field.get("column") for field in content["fields"]}
    assert {"\x00", "label", "Label"} <= columns and "" not in columns
    assert problems(tmp_path, suggest(tmp_path / "rows.parquet")) == []


def test_a_bounded_sample_of_a_large_table(tmp_path: Path) -> None:
    for number in range(SAMPLE_FILES + 2):
        table = base(fate=outcome("sold", "lost"))
        table["query_id"] = table["query_id"] + f"-{number}"
        pd.concat([table] * 10).to_parquet(tmp_path / f"{number}.parquet")
    text = suggest(tmp_path)
    assert f"{SAMPLE_ROWS:,} rows of {SAMPLE_FILES} of {SAMPLE_FILES + 2} files" in text


def test_a_column_that_is_there_twice_is_left_out(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1, 1]), pa.array([2, 3]), pa.array([2, 3])], names=["a", "b", "b"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "b" not in tomllib.loads(suggest(tmp_path / "rows.parquet"))["rows"].values()


def test_a_table_of_nothing_recognisable_is_all_comments(tmp_path: Path) -> None:
    table = pa.table({"a": pa.nulls(3), "b": [{"x": 1}] * 3, "c": [0.5, None, 0.5]})
    pq.write_table(table, tmp_path / "rows.parquet")
    content = tomllib.loads(suggest(tmp_path / "rows.parquet"))
    assert set(content["rows"]) == {"path"} and "fields" not in content


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.feather", "rows.txt", "folder", "nothing.csv"])
def test_what_is_no_table_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name != "nothing.csv":
        (tmp_path / name).write_bytes(b"" if name == "rows.csv" else b"no table")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        suggest(tmp_path / name)


def test_the_shop_s_table_needs_one_edit(tmp_path: Path) -> None:
    """The example's own log.toml has the same roles and fields; only the order of the groups is to be put right."""
    command = [sys.executable, str(PROJECT / "examples/shop/make_rows.py"), f"--output_dir={tmp_path / 'rows'}"]
    subprocess.run([*command, "--days=3", "--requests=60"], check=True)
    text = suggest(tmp_path / "rows")
    assert problems(tmp_path, text) == []
    guessed, own = (tomllib.loads(t) for t in (text, (PROJECT / "examples/shop/log.toml").read_text()))
    for key in ("request", "item", "time", "time_zone", "user"):
        assert guessed["rows"][key] == own["rows"][key]
    assert guessed["groups"]["column"] == own["groups"]["column"]
    assert set(guessed["groups"]["order"]) == set(own["groups"]["order"])
    assert guessed["groups"]["order"][0] == own["groups"]["order"][0]
    for name, field in fields(own).items():
        assert (fields(guessed)[name]["side"], fields(guessed)[name]["kind"]) == (field["side"], field["kind"])
