"""Evaluated runs as a DataFrame, one row a run; which of them may be compared, and which are seeds of one method.

>>> from deep_components.reporting.frame import frame
>>> runs = frame("runs/two_stage")
>>> runs.groupby(["method", "arguments.lr"])["joint_recall@10@20"].agg(["mean", "std", "count"])
"""

import json
import logging
import lzma
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deep_components.cli import printable
from deep_components.errors import InputError
from deep_components.files import npy_header, regular
from deep_components.reporting.remarks import check_one_code
from deep_components.runs import identity
from deep_components.runs.code import code_of
from deep_components.runs.folder import (
    CONFIG_FILE,
    COST_FILE,
    METRICS_FILE,
    PER_REQUEST_FILE,
    RUN_FILE,
    STEP_LOG_FILE,
    STREAMING_FILE,
    read_config,
    read_json,
)

UNTRAINED = "untrained"
ARGUMENT = "arguments."  # before the names of columns that hold a training's arguments
DATA_CHECKSUM = "data_checksums."  # before the names of columns that hold the checksum of a training day
# Shares of the ground truth that say how tight the loss's bound is, in runs whose loss has one (evaluation/bound.py).
BOUND = (
    *("bound_product", "bound_product_at_quotas", "bound_sampled_product", "bound_sampled", "bound_sampled_error"),
    *("bound_hard", "bound_violated", "bound_violated_at_quotas"),
)
STREAMED_CHECKSUM = "streamed_checksums."  # of a test day of a stream
CORPUS = "corpus."  # before the names of columns of an evaluation over a whole corpus

# What all runs of a table have in common, and what those of them that know it.
_OF_A_TABLE = ("setting", "data", "test_day", "test_day_checksum", "test_random_items", "num_requests")
_KNOWN_OF_A_TABLE = ("cascade", "schema")

_REQUIRED = dict.fromkeys(("setting", "data", "test_day", "loss_type"), str) | {
    "seed": int | None, "epochs": int | None, "num_requests": int
}  # fmt: skip
_OF_CONFIG = {"commit": str | None, "device": str | None, "threads": int | None}
_COSTS = {
    "steps": int, "requests": int, "seconds": float | int,
    "peak_memory_bytes": int | None, "peak_gpu_memory_bytes": int | None,
}  # fmt: skip
_INTEGERS = ("seed", "epochs", "num_requests", "test_random_items", "steps", "requests", "skipped_steps")

_MAX_METRIC = 1e6  # far above any metric; what is larger would overflow in means and charts
_MAX_ARRAY = 1 << 28  # bytes of a metric per request: of 33 million requests

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """The runs that could be read, a row each as :func:`frame` has them, and folder -> why another was left out."""

    runs: pd.DataFrame
    left_out: dict[Path, str]


def frame(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """The evaluated runs in the folders, at any depth, one row a run. Damaged ones are named in a warning and left out.

    Columns: ``folder``; ``method`` (the script's name, else the loss; "untrained" for 0 epochs), ``loss_type``,
    ``setting``, ``data``, ``seed`` (<NA> for imported models), ``epochs``, ``untrained``, ``train_days``, ``test_day``,
    ``test_day_checksum``, ``test_random_items`` (0 where there were none), ``num_requests``; ``cascade`` (as JSON),
    ``schema`` (its checksum), ``loss`` (the values it was built with, as JSON), ``init_from`` (the checksums of these
    models, as JSON); ``code`` (the fingerprint of what all methods share; None where it is not known), ``run_code``
    (runs/code.py); ``commit``, ``device``, ``threads``,
    ``versions``; ``warnings``; what the training took: ``steps``, ``skipped_steps``, ``requests``, ``seconds``,
    ``peak_memory_bytes``, ``peak_gpu_memory_bytes``; ``metrics`` (the names of the table's), every metric (NaN where
    undefined); ``arguments.<name>`` for every argument of the training, ``data_checksums.<day>``, of a stream
    ``streamed_checksums.<day>``, and of an evaluation over a corpus ``corpus.<name>``.

    Runs of different settings, data and code may stand in it: see :func:`comparable_rows`.

    Raises InputError when a folder holds no evaluated run, or none is left.
    """
    return _read([Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]).runs


def read_runs(folders: Sequence[Path]) -> Collected:
    """As :func:`frame`, with the reasons for what is left out."""
    return _read(folders)


def comparable_rows(runs: pd.DataFrame, any_code: bool = False) -> pd.DataFrame:
    """What every table and the report are made of: the runs of one table, with a column ``row`` as of
    :func:`label_rows`.

    Raises InputError unless the runs have one setting, cascade, log, test day and set of metrics, and the days that
    they share, of training and of a stream, are alike; and unless the seeds of a row, those of one method with the same
    arguments and training days, have the same values of the loss, the same --init_from, and the same code, which
    ``any_code`` allows to differ.
    """
    _check_table(runs)
    rows = label_rows(runs)
    for name, seeds in rows.groupby("row", sort=False):
        _check_known(f"the models of --init_from of {name}", seeds, "init_from")
        _check_known(f"the values of the loss of {name}", seeds[~seeds["untrained"]], "loss")
        check_one_code(str(name), seeds, any_code)
    return rows


def by_table(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs that may stand in one table, apart from those of other settings, logs and test days."""
    return [group for _, group in runs.groupby(list(_OF_A_TABLE), sort=False, dropna=False)]


def differing(groups: Sequence[pd.DataFrame]) -> list[str]:
    """In which of the things that a table has in common, but setting and log, :func:`by_table`'s groups differ."""
    firsts = [group.iloc[0] for group in groups]
    names = [name for name in _OF_A_TABLE if name not in ("setting", "data")]
    return [name for name in names if len({str(first[name]) for first in firsts}) > 1]


def _check_table(runs: pd.DataFrame) -> None:
    for name in _OF_A_TABLE:
        _check_equal(name, runs["folder"], runs[name])
    for name in _KNOWN_OF_A_TABLE:
        _check_known(name, runs, name)
    _check_equal("metrics", runs["folder"], [", ".join(names) for names in runs["metrics"]])
    trained = runs[~runs["untrained"]]
    for beginning, kind in ((DATA_CHECKSUM, "training day"), (STREAMED_CHECKSUM, "day of the stream")):
        for column in sorted(name for name in trained if name.startswith(beginning)):
            _check_known(f"the checksum of {kind} {column.removeprefix(beginning)}", trained, column)


def _check_known(what: str, runs: pd.DataFrame, column: str) -> None:
    """InputError unless all values of the column that are known are equal."""
    known = runs[runs[column].notna()]
    _check_equal(what, known["folder"], known[column])


def label_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column ``row``, the name of their table's row, by which they are grouped; in order of seeds.

    Runs of one method whose arguments differ are told apart by those in ``row``, and those of all methods by training
    days where these differ. Untrained cascades come last; one that was evaluated beside several methods counts once.

    Raises InputError when a row has a seed twice.
    """
    everywhere = {json.dumps(days) for days in runs.loc[~runs["untrained"], "train_days"]}
    named = []
    for method, group in sorted(runs.groupby("method", sort=False), key=lambda item: item[0] == UNTRAINED):
        identities = [method_arguments(run) for run in group.to_dict("records")]
        names = sorted({name for identity in identities for name in identity})
        apart = [name for name in names if len({json.dumps(identity.get(name)) for identity in identities}) > 1]
        if len(everywhere) > 1 and "train_days" in names:
            apart = sorted({*apart, "train_days"})
        details = [", ".join(f"{name}={_detail(identity.get(name))}" for name in apart) for identity in identities]
        named.append(group.assign(row=[f"{method} ({detail})" if detail else method for detail in details]))
    rows = pd.concat(named).groupby("row", sort=False)
    return pd.concat([_by_seed(str(name), group) for name, group in rows], ignore_index=True)


def _detail(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _by_seed(name: str, group: pd.DataFrame) -> pd.DataFrame:
    """The runs of a row in order of seeds."""
    if group["untrained"].all():
        group = group[group["seed"].isna() | ~group.duplicated("seed")]  # one cascade, evaluated beside several methods
    if group["seed"].dropna().duplicated().any():
        folders = ", ".join(map(str, group["folder"]))
        raise InputError(f"{name}: two runs in {folders} have the same seed; name each run once")
    return group.sort_values("seed", na_position="first", kind="stable")


def arguments_of(run: Mapping[Any, Any]) -> dict[str, Any]:
    """All arguments of a run's training, from its row."""
    found = {str(name).removeprefix(ARGUMENT): v for name, v in run.items() if str(name).startswith(ARGUMENT)}
    earlier = found.pop("sort", None)  # its name in earlier versions
    return found if earlier is None else {**found, "topk_op": earlier}


def method_arguments(run: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments that make the method, all but the seed and how it is executed, and the days trained on."""
    return identity.method_arguments(arguments_of(run) | {"train_days": run["train_days"]})


def per_request(folder: Path, name: str) -> np.ndarray | None:
    """A run's metric per request [R], or its "request_id"; None where the evaluation did not write it.

    OSError, ValueError or zipfile.BadZipFile when the file is damaged."""
    try:
        with (
            open(folder / PER_REQUEST_FILE, "rb", opener=regular) as file,
            zipfile.ZipFile(file) as archive,
        ):
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if any(size > _MAX_ARRAY for size in sizes.values()):  # a few bytes could unpack to it
                raise ValueError(f"an array of more than {_MAX_ARRAY} bytes")
            if f"{name}.npy" not in sizes:
                return None
            content = archive.read(f"{name}.npy")
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:  # of encrypted and damaged members
        raise ValueError(str(error)) from error
    dtype, shape, start = npy_header(content, len(content))
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def is_number(value: Any) -> bool:
    """A number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read(paths: Sequence[Path]) -> Collected:
    folders: dict[str, Path] = {}  # by real path, so that a folder named twice counts once
    for path in paths:
        inside = _run_folders(path)
        if not any((folder / METRICS_FILE).exists() for folder in inside.values()):
            raise InputError(f"{path}: no {METRICS_FILE}; evaluate the runs first")
        folders |= {real: folder for real, folder in inside.items() if real not in folders}
    records, left_out = [], {}
    for folder in folders.values():
        try:
            records.append(_read_run(folder))
        except InputError as error:
            left_out[folder] = printable(str(error))
            logger.warning("left out: %s", left_out[folder])
    if not records:
        raise InputError("; ".join(left_out.values()))
    return Collected(_frame(records), left_out)


def _run_folders(path: Path) -> dict[str, Path]:
    """Real path -> path of the folders of runs in ``path``, at any depth, through links too."""
    found, seen = {}, set()
    for root, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        if CONFIG_FILE in files or METRICS_FILE in files:
            found[real] = Path(root)
    return found


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    runs = pd.DataFrame(records, dtype=object)  # so that arguments stay what they are: 1 is not 1.0, None is not NaN
    runs = runs.where(runs.notna(), None)
    floats = ["seconds", *(name for name in _COSTS if "bytes" in name), *filter(_is_metric, runs)]
    typed = runs.astype(dict.fromkeys(floats, "float64") | dict.fromkeys(_INTEGERS, "Int64") | {"untrained": bool})
    return typed.copy()  # as few blocks: of 100, one a column, pandas warns when another column is added


def _read_run(folder: Path) -> dict[str, Any]:
    """A row of the frame."""
    path = folder / METRICS_FILE
    results, config = read_json(path), read_config(folder)
    if results is None:
        raise InputError(f"{folder}: not evaluated (no {path.name}); finish the run or remove it")
    _check_results(path, results, config)
    metrics = tuple(name for name in results if "@" in name)
    _check_per_request(folder, results, metrics)
    warnings = [str(value) for name, value in results.items() if name.startswith("warning")]
    costs, untrained = _costs(folder, warnings), results["epochs"] == 0
    code = code_of(_clean(config.get("code")), _clean(results.get("code")), method=not untrained)
    both = (config.get(name) for name in ("versions", "data_checksums"))
    versions, checksums = (value if isinstance(value, dict) else {} for value in both)
    row = {
        "method": UNTRAINED if untrained else _given_name(folder, results["loss_type"]),
        **{name: results[name] for name in ("loss_type", "setting", "data", "seed", "epochs")},
        "untrained": untrained,
        "train_days": config.get("train_days"),
        **{name: results.get(name) for name in ("test_day", "test_day_checksum", "num_requests")},
        "test_random_items": results.get("test_random_items", 0),
        "cascade": _as_json(config.get("cascade")),
        "schema": config.get("schema_checksum"),
        "loss": _as_json(config.get("loss")),
        "init_from": _as_json(config.get("init_from_checksums")),
        "code": code.total,
        "run_code": code,
        "commit": config.get("commit") or results.get("commit"),
        **{name: config.get(name) for name in ("device", "threads")},
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "warnings": warnings,
        "skipped_steps": _skipped_steps(folder, results),
        **{name: costs.get(name) for name in _COSTS},
        "metrics": metrics,
        **{name: value for name, value in results.items() if _is_metric(name)},
        **{f"{ARGUMENT}{name}": value for name, value in config["arguments"].items()},
        **{f"{DATA_CHECKSUM}{day}": value for day, value in checksums.items()},
        **{f"{STREAMED_CHECKSUM}{day}": value for day, value in _streamed(folder).items()},
        **{f"{CORPUS}{name}": value for name, value in (results.get("corpus") or {}).items() if name != "index"},
    }
    return {"folder": folder} | _clean(row)


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _streamed(folder: Path) -> dict[str, Any]:
    """Test day -> checksum, of a run's stream; a damaged streaming.json is named where its curve is drawn."""
    try:
        days = (read_json(folder / STREAMING_FILE) or {}).get("days")
    except InputError:
        return {}
    known = [day for day in days if isinstance(day, dict)] if isinstance(days, list) else []
    return {str(day.get("test_day")): day.get("test_day_checksum") for day in known}


def _is_metric(name: str) -> bool:
    return not name.startswith(ARGUMENT) and (
        "@" in name or name.startswith("survival_after_") or "kendall_tau" in name or name in BOUND
    )


def _clean(value: Any) -> Any:
    """The value with printable text only."""
    if isinstance(value, dict):
        return {printable(name): _clean(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_clean(part) for part in value)
    return printable(value) if isinstance(value, str) else value


def _check_results(path: Path, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    wrong = [name for name, kind in _REQUIRED.items() if name not in results or not _is_a(results[name], kind)]
    wrong += [name for name in filter(_is_metric, results) if not (results[name] is None or _is_a_score(results[name]))]
    wrong += [] if _is_a(results.get("test_random_items", 0), int) else ["test_random_items"]
    wrong += [] if isinstance(config.get("arguments"), dict) else [f"arguments of {CONFIG_FILE}"]
    wrong += [f"{name} of {CONFIG_FILE}" for name, kind in _OF_CONFIG.items() if not _is_a(config.get(name), kind)]
    wrong += [] if _is_days(config.get("train_days")) else [f"train_days of {CONFIG_FILE}"]
    checksums = config.get("data_checksums")
    sums = [results.get("test_day_checksum"), *(checksums.values() if isinstance(checksums, dict) else ())]
    wrong += [] if all(isinstance(value, str | None) for value in sums) else ["checksum"]
    wrong += [] if any("@" in name for name in results) else ["joint_recall"]
    wrong += [] if _is_of_a_corpus(results.get("corpus")) else ["corpus"]
    if wrong:
        raise InputError(f"{path}: field {wrong[0]} is missing or damaged; evaluate the run again")


def _is_days(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(day, str) for day in value))


def _is_of_a_corpus(value: Any) -> bool:
    """Nothing, or what an evaluation over a corpus found."""
    if value is None:
        return True
    about = {"items": int, "checksum": str, "filter_seen": bool}
    known = isinstance(value, dict) and all(_is_a(value.get(name), kind) for name, kind in about.items())
    scores = [part for name, part in value.items() if "@" in name] if known else []
    return bool(scores) and all(part is None or _is_a_score(part) for part in scores)


def _is_a_score(value: Any) -> bool:
    return is_number(value) and abs(value) <= _MAX_METRIC


def _is_a(value: Any, kind: Any) -> bool:
    """Of this type, and an integer only if 64 bits hold it."""
    return isinstance(value, kind) and (not isinstance(value, int) or -(1 << 63) <= value < 1 << 63)


def _given_name(folder: Path, loss_type: str) -> str:
    """The script's name for the run, else the loss. InputError when the folder was trained with another loss since."""
    path = folder / RUN_FILE
    content = read_json(path)
    if content is None:
        return loss_type
    name, arguments = content.get("name"), content.get("identity")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: field name is missing or damaged; make the run again")
    made = arguments.get("loss_type", loss_type) if isinstance(arguments, dict) else loss_type
    if made != loss_type:
        raise InputError(
            f"{path}: is of a run of {made}, but the folder was trained with {loss_type}; remove this file"
        )
    return name


def _costs(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """What the training took; damage is named in ``warnings``."""
    try:
        cost = read_json(folder / COST_FILE)
        if cost is None or all(_is_a(cost.get(name), kind) for name, kind in _COSTS.items()):
            return cost or {}
        problem = f"{folder / COST_FILE}: a number is missing or damaged"
    except InputError as error:
        problem = str(error)
    warnings.append(f"{problem}; what this run took is left out")
    return {}


def _skipped_steps(folder: Path, results: Mapping[str, Any]) -> int | None:
    """How many steps were left out; where the results do not say, those in whose line of the log a value is null."""
    if type(said := results.get("skipped_steps")) is int and _is_a(said, int):
        return said
    try:
        with open(folder / STEP_LOG_FILE, "rb", opener=regular) as file:
            return sum(b": null" in line for line in file)
    except OSError:
        return None


def _check_per_request(folder: Path, results: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """InputError when per_request.npz is damaged or says other things than metrics.json."""
    path = folder / PER_REQUEST_FILE
    if not path.exists():
        return
    try:
        for name in ("request_id", *metrics):
            values = per_request(folder, name)
            if values is None or values.shape != (results["num_requests"],) or values.dtype.kind not in "if":
                raise ValueError(f"{name} is no number per request")
            found = pd.Series(values, dtype="float64").mean()  # NaN where no request has a value
            mean = math.nan if results.get(name) is None else results[name]
            if name in metrics and not np.isclose(found, mean, rtol=1e-9, atol=1e-6, equal_nan=True):
                raise ValueError(f"{name} has the mean {found:.6f}, not {mean:.6f} as in {METRICS_FILE}")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not readable ({error}); evaluate the run again") from error


def _check_equal(name: str, folders: Iterable[Path], values: Iterable[Any]) -> None:
    """InputError that names the folders by their value, the rarest first, unless all values are equal."""
    by_value: dict[str, list[str]] = {}
    for folder, value in zip(folders, values, strict=True):
        by_value.setdefault(str(value), []).append(str(folder))
    if len(by_value) < 2:
        return
    parts = []
    for value, group in sorted(by_value.items(), key=lambda item: len(item[1])):
        parts.append(f"{value} in {', '.join(group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}")
    raise InputError(
        f"the runs differ in {name}, so their numbers cannot stand in one table: {'; '.join(parts)}; leave out those "
        "that do not belong"
    )
