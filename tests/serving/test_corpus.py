"""The corpus: tables of items of any format and size, as given and encoded, found by their ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from deep_components.dataset import rows as rows_module
from deep_components.dataset.encoding import FIRST, UNKNOWN, Encoding, FieldEncoding, keys_of
from deep_components.dataset.rows import open_rows
from deep_components.errors import InputError
from deep_components.serving import corpus as corpus_module
from deep_components.serving.corpus import Corpus, write_corpus

BRANDS = np.sort(keys_of(pa.array(["a", "b"]), "string"))
ENTRIES = [
    FieldEncoding("brand", "item", "id", "brand", "string", "brand"),
    FieldEncoding("price", "item", "number", "price", mean=10, scale=2, has_missing=True),
    FieldEncoding("tags", "item", "id", "tags", "string", "brand", length=2, separator="|"),
]
ITEMS = pd.DataFrame(
    {
        "sku": ["x1", "x2", "x3", "x1"],
        "brand": ["a", "b", "c", "b"],
        "price": [12.0, None, 10.0, 8.0],
        "tags": ["a|b", None, "b", "z"],
        "title": ["One", "Two", None, "One, again"],
    }
)


def encoding(item: str = "sku") -> Encoding:
    return Encoding(ENTRIES, {"brand": BRANDS}, item=item)


def written(folder: Path, table: Path, item: str = "sku") -> tuple[Corpus, dict[str, Any]]:
    folder.mkdir()
    made = encoding(item)
    about = write_corpus(folder, open_rows(table, "--corpus", made.columns("item")), made)
    return Corpus.load(folder, about["item"], about["id_type"], made.schema), about


def save(items: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        items.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        items.to_csv(path, index=False)
    else:
        pa.feather.write_feather(pa.Table.from_pandas(items, preserve_index=False), str(path), chunksize=2)
    return path


@pytest.mark.parametrize("name", ["items.parquet", "items.csv", "items.feather"])
def test_items_of_a_table(name: str, tmp_path: Path) -> None:
    """The last row of an id counts; items stand in the order of these rows."""
    corpus, about = written(tmp_path / "corpus", save(ITEMS, tmp_path / name))
    assert (len(corpus), about["items"], about["repeated"], about["id_type"]) == (3, 3, 1, "string")
    assert corpus.ids([0, 1, 2, -1]) == ["x2", "x3", "x1", None]
    assert corpus.values("title", [2, 1]) == ["One, again", None]
    assert corpus.rows_of(pa.array(["x1", "x2", "x4", None])).tolist() == [2, 0, -1, -1]
    b = FIRST + int(np.searchsorted(BRANDS, keys_of(pa.array(["b"]), "string"))[0])
    assert corpus.features["brand"].tolist() == [b, UNKNOWN, b]
    assert corpus.features["price"].tolist() == [0, 0, -1] and corpus.features["price_missing"].tolist() == [1, 0, 0]
    assert corpus.features["tags"].tolist() == [[0, 0], [b, 0], [UNKNOWN, 0]]
    assert corpus.fields(np.array([[2, 0]]))["brand"].tolist() == [[b, b]]


def test_integer_ids(tmp_path: Path) -> None:
    """Found whatever the type of the column that asks."""
    items = ITEMS.assign(sku=[7, 8, 9, 7])
    corpus, about = written(tmp_path / "corpus", save(items, tmp_path / "items.parquet"))
    assert about["id_type"] == "integer" and corpus.ids([0]) == [8]
    for ids in (pa.array([7, 10]), pa.array([7.0, 10.0]), pa.array(["7", "10"])):
        assert corpus.rows_of(ids).tolist() == [2, -1]
    with pytest.raises(InputError, match=r"column sku: .*; the ids of the corpus are of type integer"):
        corpus.rows_of(pa.array(["x"]))


def test_a_folder_of_files_in_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated ids over pieces and files; a column that a file has other numbers in."""
    monkeypatch.setattr(rows_module, "ROWS_PER_PIECE", 3)
    monkeypatch.setattr(corpus_module, "_WAITING", 5)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sku": rng.integers(40, size=100), "brand": "a", "price": 1.0, "tags": "b"})
    frame["stock"] = np.arange(100)
    (tmp_path / "items").mkdir()
    for number in range(4):
        part = frame.iloc[25 * number : 25 * number + 25]
        part = part.assign(stock=part["stock"].astype(float)) if number == 2 else part
        save(part, tmp_path / f"items/{number}.parquet")
    corpus, about = written(tmp_path / "corpus", tmp_path / "items")
    expected = frame.drop_duplicates("sku", keep="last")
    assert corpus.ids(range(len(corpus))) == expected["sku"].tolist() and about["repeated"] == 100 - len(expected)
    assert corpus.values("stock", range(len(corpus))) == expected["stock"].tolist()
    assert corpus.rows_of(pa.array(expected["sku"])).tolist() == list(range(len(corpus)))
    assert len(corpus.table.column("sku").chunks) > 1


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (ITEMS.drop(columns="brand"), "column brand is missing, which the items' fields are made of; add it"),
        (ITEMS.assign(sku=["x", None, "y", "z"]), "column sku has a missing value; give every item its id"),
        (ITEMS.assign(price="cheap"), "column price: holds large_string, not numbers"),
        (ITEMS.assign(sku=[1.5, 2, 3, 4]), "column sku: holds double, not text"),
        (ITEMS.iloc[:0], "holds no row"),
    ],
)
def test_tables_that_are_no_corpus(items: pd.DataFrame, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem) as error:
        written(tmp_path / "corpus", save(items, tmp_path / "items.parquet"))
    assert "items.parquet" in str(error.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--corpus=.*none.parquet: no such file; name a file of .parquet, .csv"):
        open_rows(tmp_path / "none.parquet", "--corpus")
    (tmp_path / "items.xlsx").touch()
    with pytest.raises(InputError, match=r"items.xlsx: its ending is none of .parquet, .csv"):
        open_rows(tmp_path / "items.xlsx", "--corpus")
    (tmp_path / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"items.parquet: not a readable parquet file"):
        open_rows(tmp_path / "items.parquet", "--corpus")
    save(ITEMS, tmp_path / "a.parquet")
    save(ITEMS.assign(sku=1), tmp_path / "b.parquet")
    (tmp_path / "items.xlsx").unlink()
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(InputError, match="write its columns with one type in all files"):
        list(open_rows(tmp_path, "--corpus").pieces())
