"""The paper's numbers (Tables 2-4, 6-12 and Appendix E.1; RecFlow), and which rows of ours they stand beside."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

TABLES = Path(__file__).with_name("paper_tables.csv")

_PERIOD_1 = [str(day.date()) for day in pd.date_range("2024-01-13", "2024-02-04")]  # the last day tests

# What every run of the paper has in common.
_PROTOCOL = {"epochs": 1, "emb_dim": 8, "nn_units": 128, "seq_len": 50, "init_from": None, "num_random_items": None}
_NAMES = {
    "bce": "BCE", "icc": "ICC", "rankflow": "RankFlow", "fs_ranknet": "FS-RankNet",
    "fs_lambdaloss": "FS-LambdaLoss", "arf": "ARF", "arf_v2": "ARF-v2", "lcron": "LCRON",
    "softsort": "SoftSort", "neuralsort": "NeuralSort",
}  # fmt: skip


@dataclass(frozen=True)
class PaperNumber:
    """Mean and standard deviation over five seeds; some tables give no deviation."""

    table: str
    mean: float
    std: float | None


@cache
def _tables() -> list[dict[str, str]]:
    return list(csv.DictReader(TABLES.read_text(encoding="utf-8").splitlines()))


def paper_name(row: str) -> str:
    """A row's name with the method written as in the paper: "lcron_tau_1" is "LCRON tau 1"."""
    name, bracket, details = row.partition(" (")
    known = max((key for key in _NAMES if name == key or name.startswith(f"{key}_")), key=len, default=None)
    if known is None:
        return row
    return _NAMES[known] + name.removeprefix(known).replace("_", " ") + bracket + details


def follows_protocol(run: Mapping[Any, Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a run is made as the paper's: RecFlow's Period 1, its last day to test on, one pass, no random items.

    Args:
        run: has ``data``, ``train_days``, ``test_day`` and maybe ``test_random_items``, as a row of
            :func:`~deep_components.reporting.frame.frame`.
    """
    days = [*(run["train_days"] or ()), run["test_day"]] == _PERIOD_1
    alike = all(arguments.get(name) == value for name, value in _PROTOCOL.items())
    alike = alike and not run.get("test_random_items") and arguments.get("optimizer") != "sparse_adam"
    return run["data"] == "recflow" and days and alike


def paper_number(setting: str, name: str, arguments: Mapping[str, Any], metric: str) -> PaperNumber | None:
    """The paper's number for a row of this name and these arguments, from the first table that has it.

    The name alone does not do: with another learning rate a row keeps its name.
    """
    for row in _tables():
        if (row["setting"], row["method"], row["metric"]) != (setting, name, metric):
            continue
        wanted = dict(pair.split("=") for pair in row["arguments"].split())
        if all(_text(arguments.get(key)) == value for key, value in wanted.items()):
            return PaperNumber(row["table"], float(row["mean"]), float(row["std"]) if row["std"] else None)
    return None


def _text(value: Any) -> str:
    """An argument as the tables' file writes it."""
    if isinstance(value, list | tuple):
        return ",".join(_text(part) for part in value)
    return (
        "none"
        if value is None
        else f"{value:g}"
        if isinstance(value, int | float) and abs(value) < 1e300
        else str(value)
    )
