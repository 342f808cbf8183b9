"""lcron recommend: many requests from a file to a file."""

import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from deep_components import commands
from deep_components.commands.recommend import main
from deep_components.dataset.rows import RawRows
from deep_components.errors import InputError
from deep_components.serving.batch import recommend_table
from deep_components.serving.export import export_run
from deep_components.serving.recommender import Recommender
from tests.helpers import leftovers
from tests.serving.logs import trained

REQUESTS: list[dict[str, Any]] = [
    {"customer": "c1", "ts": 1_704_200_000, "history": [1, 2], "session": "a", "note": "x"},
    {"customer": None, "ts": 1_704_200_000, "history": None, "session": "b", "note": None},
    {"customer": "c9", "ts": 1_704_300_000, "history": [7, 8, 9, 10, 11, 12, 99_999], "session": "c", "note": "y"},
    {"customer": "nobody", "ts": 1_704_400_000, "history": [], "session": None, "note": "z"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages that keep 6, 4 and 2 products."""
    case, folder = trained(tmp_path_factory, "imported", 3), tmp_path_factory.mktemp("shop") / "bundle"
    export_run(case.run, folder, case.corpus)
    return folder


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "r.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(REQUESTS), path)
    return path


def run(bundle: Path, requests: Path, output: Path, *flags: str) -> None:
    main([f"--bundle={bundle}", f"--requests={requests}", f"--output={output}", *flags])


def columns(output: Path) -> dict[str, list[Any]]:
    """What a file holds, lists of CSV files as lists."""
    if output.suffix == ".parquet":
        return dict(pa.parquet.read_table(output).to_pydict())
    if output.suffix != ".csv":
        return dict(pa.feather.read_table(output).to_pydict())
    found = dict(pa.csv.read_csv(output).to_pydict())
    return {name: [json.loads(v) for v in values] if name in MADE else values for name, values in found.items()}


MADE = ("items", "scores", "candidates")


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".csv"])
def test_the_file_holds_what_the_library_says(suffix: str, bundle: Path, requests: Path, tmp_path: Path) -> None:
    output = tmp_path / f"o{suffix}"
    run(bundle, requests, output, "--k=2", "--explain", "--id=session", "--batch_size=3")
    found = columns(output)
    asked = [{name: row[name] for name in ("customer", "ts", "history")} for row in REQUESTS]
    answers = Recommender.load(bundle).recommend(asked, k=2, explain=True)
    assert list(found) == ["customer", "session", *MADE]
    assert found["customer"] == [row["customer"] or ("" if suffix == ".csv" else None) for row in REQUESTS]
    assert found["items"] == [answer.items for answer in answers]
    for scores, candidates, answer in zip(found["scores"], found["candidates"], answers, strict=True):
        assert scores == pytest.approx(answer.scores, rel=1e-6)
        assert answer.candidates is not None and len(candidates) == 6
        for one, other in zip(candidates, answer.candidates, strict=True):
            assert (one["item"], one["left_at"]) == (other.item, other.left_at)
            assert {name: rank for name, rank in one["ranks"].items() if rank is not None} == other.ranks
            assert {n: s for n, s in one["scores"].items() if s is not None} == pytest.approx(other.scores, rel=1e-6)
    assert not leftovers(tmp_path)


def test_plain_output_and_seen_items(bundle: Path, requests: Path, tmp_path: Path) -> None:
    run(bundle, requests, tmp_path / "o.parquet", "--k=1000")
    found = columns(tmp_path / "o.parquet")
    assert list(found) == ["customer", "items", "scores"]
    assert all(len(items) == 2 for items in found["items"])
    assert all(set(items).isdisjoint(row["history"] or ()) for items, row in zip(found["items"], REQUESTS, strict=True))
    seen = [found["items"][0] * 1] * 3
    table = pa.table({"customer": ["c1"] * 3, "ts": [1_704_200_000] * 3, "history": seen})
    pa.parquet.write_table(table, requests)
    run(bundle, requests, tmp_path / "o.parquet", "--no-filter_seen")
    kept = columns(tmp_path / "o.parquet")["items"]
    run(bundle, requests, tmp_path / "o.parquet")
    filtered = columns(tmp_path / "o.parquet")["items"]
    assert kept[0] == kept[1] == kept[2] and filtered[0] == filtered[1] == filtered[2]
    assert set(filtered[0]).isdisjoint(seen[0])


@pytest.mark.parametrize("suffix", [".csv", ".feather"])
def test_requests_in_other_formats(suffix: str, bundle: Path, requests: Path, tmp_path: Path) -> None:
    """In CSV a history is a JSON list."""
    run(bundle, requests, tmp_path / "expected.parquet")
    table = pa.Table.from_pylist(REQUESTS)
    other = requests.with_suffix(suffix)
    if suffix == ".csv":
        texts = [None if row["history"] is None else json.dumps(row["history"]) for row in REQUESTS]
        table = table.set_column(2, "history", pa.array(texts))
        pa.csv.write_csv(table, other)
    else:
        pa.feather.write_feather(table, other)
    run(bundle, other, tmp_path / "o.parquet")
    expected = columns(tmp_path / "expected.parquet")
    assert columns(tmp_path / "o.parquet") == expected | {"scores": columns(tmp_path / "o.parquet")["scores"]}


def test_memory_does_not_grow_with_the_requests(bundle: Path, tmp_path: Path) -> None:
    """A piece is gone when the next but one is read."""
    schema = pa.schema([("customer", pa.string()), ("ts", pa.int64())])
    pieces: list[weakref.ref[pa.Array]] = []

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for number in range(20):
            assert sum(piece() is not None for piece in pieces) <= 1
            customer = pa.array([f"c{number}"] * 3)
            pieces.append(weakref.ref(customer))
            yield pa.record_batch([customer, pa.array([1_704_200_000] * 3)], schema=schema).select(names)
            del customer

    rows = RawRows("made", schema, read)
    done = recommend_table(Recommender.load(bundle), rows, tmp_path / "o.csv", batch_size=2)
    assert done == 60 and len(columns(tmp_path / "o.csv")["customer"]) == 60


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--k=0"], "--k=0: is 1 or more"),
        (["--batch_size=-1"], "--batch_size=-1: is 1 or more"),
        (["--id=sesion"], "--id=sesion: .* has no such column; it has customer, ts, history, session, note"),
        (["--device=tpu"], "--device=tpu: unknown device"),
        (["--bundle=nowhere"], "nowhere/current.json: no such file"),
        (["--output=o.xlsx"], "--output=o.xlsx: its ending is none of .parquet, .csv, .feather, .arrow"),
        (["--requests=nowhere.parquet"], "nowhere.parquet: no such file"),
    ],
)
def test_wrong_arguments(flags: list[str], sentence: str, bundle: Path, requests: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        run(bundle, requests, tmp_path / "o.parquet", *flags)
    assert not (tmp_path / "o.parquet").exists() and not leftovers(tmp_path)


def test_a_wrong_request_leaves_the_output_as_it_was(bundle: Path, requests: Path, tmp_path: Path) -> None:
    """It is named by its number in the whole file."""
    output = tmp_path / "o.parquet"
    output.write_bytes(b"before")
    wrong = [dict(row) for row in REQUESTS * 3]
    wrong[9]["history"] = [2**62, -(2**62)]
    pa.parquet.write_table(pa.Table.from_pylist(wrong), requests)
    run(bundle, requests, tmp_path / "other.parquet")  # ids that nobody has are no mistake
    wrong = [row | {"ts": 10**17 if number == 9 else 1_704_200_000} for number, row in enumerate(wrong)]
    pa.parquet.write_table(pa.Table.from_pylist(wrong), requests)
    with pytest.raises(InputError, match=r"r.parquet: requests\[9\]: column ts: holds a time outside the years"):
        run(bundle, requests, output, "--batch_size=4")
    assert output.read_bytes() == b"before" and not leftovers(tmp_path)


def test_a_file_without_rows_is_refused(bundle: Path, requests: Path, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"customer": pa.array([], pa.string())}), requests)
    with pytest.raises(InputError, match=r"r\.parquet: holds no row"):
        run(bundle, requests, tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


def test_a_column_may_not_be_called_as_one_of_the_output(bundle: Path, requests: Path, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"customer": ["a"], "items": [1]}), requests)
    with pytest.raises(InputError, match="column items has the name of a column of the output; rename it"):
        run(bundle, requests, tmp_path / "o.parquet", "--id=items")


def test_the_command_is_known() -> None:
    assert commands.COMMANDS["recommend"][0] == "commands.recommend"


def test_scores_are_float32_and_items_have_the_corpus_type(bundle: Path, requests: Path, tmp_path: Path) -> None:
    run(bundle, requests, tmp_path / "o.parquet", "--id=ts")
    schema = pa.parquet.read_schema(tmp_path / "o.parquet")
    assert schema.field("items").type.value_type == pa.int64() and schema.field("ts").type == pa.int64()
    assert schema.field("scores").type.value_type == pa.float32()
    assert np.isfinite(np.concatenate(columns(tmp_path / "o.parquet")["scores"])).all()
