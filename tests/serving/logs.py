"""Small logs with runs, and their requests as a caller would send them: raw values, read from the logs' own files."""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from deep_components import run_test, run_train
from deep_components.cascade import Cascade, named_cascade
from deep_components.dataset.encoding import keys_of
from deep_components.dataset.importers.recflow_files import HISTORY_COLUMNS, ITEM_COLUMNS, REQUEST_COLUMNS
from deep_components.dataset.importers.table import command
from tests.dataset.importers.tables import MAPPING, table, write
from tests.helpers import DAYS, SMALL, small_log

FOUR_STAGE = str(Path(__file__).parents[2] / "examples/four_stage.toml")
SIMULATED = {2: "two_stage", 3: "three_stage", 4: FOUR_STAGE}
MODELS = {2: ("dssm", "din"), 3: ("dssm", "mlp", "din"), 4: ("dssm", "mlp", "din", "din")}
KEEPS = {2: (6, 3), 3: (6, 4, 2), 4: (7, 5, 4, 2)}


@dataclass(frozen=True)
class Asked:
    """A request of the test day."""

    number: int  # in scores.npz
    request: Mapping[str, Any]
    items: pa.Table  # its candidates


@dataclass(frozen=True)
class Trained:
    """A run on a log, and the scores that run_test gives its test day."""

    log: Path
    run: Path
    cascade: Cascade
    corpus: Path | None  # all items, where the log does not have them
    scores: Mapping[str, np.ndarray]
    asked: tuple[Asked, ...]


def trained(factory: pytest.TempPathFactory, log: str, stages: int) -> Trained:
    """A run of two to four stages on the "simulated" or the "imported" log, made once a session."""
    top = factory.getbasetemp()
    if log == "simulated":
        return _simulated(small_log(factory), top / f"simulated-run-{stages}", stages)
    return _imported(_imported_log(top / "imported"), top / f"imported-run-{stages}", stages)


def _scores(log: Path, run: Path, cascade: str, *flags: str) -> dict[str, np.ndarray]:
    shared = ["--device=cpu", f"--data_dir={log}", f"--output_dir={run}"]
    run_train.main([*SMALL, "--loss_type=bce", *shared, f"--cascade={cascade}", *flags])
    run_test.main([*shared, "--save_scores"])
    with np.load(run / "scores.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@cache
def _simulated(log: Path, run: Path, stages: int) -> Trained:
    scores = _scores(log, run, SIMULATED[stages])
    cascade = named_cascade(SIMULATED[stages])
    return Trained(log, run, cascade, None, scores, tuple(_recflow_requests(log, cascade, scores["request_id"])))


def _recflow_requests(log: Path, cascade: Cascade, ids: np.ndarray) -> Iterator[Asked]:
    day = DAYS[-1]
    rows = pa.feather.read_table(log / f"all_stage/{day}.feather", columns=list(REQUEST_COLUMNS)).to_pandas()
    rows = rows.drop_duplicates("request_id").set_index("request_id")
    candidates = pickle.loads((log / f"request_id_dict/{day}.pkl").read_bytes())
    histories = pickle.loads((log / f"seq_effective_50_dict/{day}.pkl").read_bytes())
    for number, key in enumerate(ids.tolist()):
        events = [dict(zip(HISTORY_COLUMNS, event.tolist(), strict=False)) for event in histories[key][:, :5]]
        history = [event for event in events if any(event.values())]
        groups = [candidates[key][group.name][: group.slots] for group in cascade.groups]
        items = pd.DataFrame(np.concatenate(groups), columns=ITEM_COLUMNS).drop_duplicates("video_id")
        request = {name: int(value) for name, value in rows.loc[key].items()} | {"history": history}
        yield Asked(number, request, pa.Table.from_pandas(items, preserve_index=False))


def _cascade_file(folder: Path, stages: int) -> Path:
    """A cascade for the log that `_imported_log` makes."""
    path = folder / f"shop{stages}.toml"
    lines = [
        f'[[stages]]\nname = "stage{number}"\nmodel = "{model}"\nkeep = {keep}\n'
        for number, (model, keep) in enumerate(zip(MODELS[stages], KEEPS[stages], strict=True))
    ]
    lines += [f'[[groups]]\nname = "{name}"\n' for name in ("bought", "shown", "ranked", "retrieved")]
    path.write_text("\n".join(lines))
    return path


@cache
def _imported_log(folder: Path) -> Path:
    """A log made by lcron import, with its table."""
    command.main([f"--mapping={write(folder, table(), MAPPING)}", f"--output_dir={folder / 'log'}", "--jobs=1"])
    return folder


@cache
def _imported(folder: Path, run: Path, stages: int) -> Trained:
    """A run on the log of `_imported_log`."""
    cascade = _cascade_file(folder, stages)
    scores = _scores(folder / "log", run, str(cascade), "--seq_len=4", "--nn_units=64")
    rows = table()
    corpus = folder / "items.parquet"
    items = rows[ITEMS].drop_duplicates("product")
    pa.parquet.write_table(pa.Table.from_pandas(items, preserve_index=False), corpus)
    asked = tuple(_imported_requests(rows, scores["request_id"]))
    return Trained(folder / "log", run, Cascade.from_toml(cascade), corpus, scores, asked)


ITEMS = ["product", "brand", "genres", "price", "stock"]


def _imported_requests(rows: pd.DataFrame, ids: np.ndarray) -> Iterator[Asked]:
    queries = rows["query"].unique()
    names = dict(zip(keys_of(pa.array(queries), "string").view(np.int64).tolist(), queries, strict=True))
    bought = rows[rows["left_at"] == "bought"]
    order = [
        keys_of(pa.array(bought["product"]), "integer"),
        bought["gain"],
        keys_of(pa.array(bought["query"]), "string"),
    ]
    bought = bought.iloc[np.lexsort([*order, bought["ts"]])]  # as docs/own_log.md says of events of one time
    for number, key in enumerate(ids.tolist()):
        some = rows[rows["query"] == names[key]]
        customer, ts = some.iloc[0]["customer"], int(some.iloc[0]["ts"])
        events = bought[(bought["customer"] == customer) & (bought["ts"] < ts)]
        request = {"customer": customer, "ts": ts, "history": events[["product", "genres"]].to_dict("records")}
        items = some[ITEMS].drop_duplicates("product")
        yield Asked(number, request, pa.Table.from_pandas(items, preserve_index=False))
