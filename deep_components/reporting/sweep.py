"""The table of a sweep: each method's settings with their metric on the validation day, and which one is chosen."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from deep_components.reporting.tables import NOTHING, Document, Style, Table, mean_and_std


def sweep_document(content: Mapping[str, Any], style: Style) -> Document:
    """The document of a sweep.json."""
    trials = pd.DataFrame(content["trials"])
    options = list(dict.fromkeys(name for trial in content["trials"] for name in trial["arguments"]))
    methods = list(dict.fromkeys(trial["method"] for trial in content["trials"]))  # rounds alternate between them
    ordered = sorted(content["trials"], key=lambda trial: methods.index(trial["method"]))
    rows = [_row(trial, options, style) for trial in ordered]
    header = ["method", *map(style.escape, options), *style.columns([content["metric"]]), "seeds"]
    about = f"{content['setting']}, data: {content['data']}, validation day {content['validation_day']}"
    numbers = "one run each" if len(content["seeds"]) == 1 else "mean +- standard deviation over seeds"
    tested = " for the choice" if content["test_seeds"] else ""
    heading = [f"{about}; {numbers}; the test day was not read{tested}", *content["warnings"]]
    below = (f"{style.best_word}: chosen, the best mean of its method.",)
    notes = [f"failed: {trial['error']}" for trial in content["trials"] if trial["error"]]
    notes += (
        ["", "The chosen settings on the test day:", content["command"]] if content["command"] and not tested else []
    )
    return Document(
        [style.escape(line) for line in heading], [Table("", header, rows, below)], [*map(style.escape, notes)], trials
    )


def _row(trial: Mapping[str, Any], options: list[str], style: Style) -> list[str]:
    number = NOTHING if trial["mean"] is None else style.number.format(mean_and_std(trial, style.plus_minus))
    words = [style.escape(trial["arguments"].get(name, NOTHING)) for name in options]
    shown = style.best.format(number) if trial["chosen"] else number
    return [style.name(trial["method"]), *words, shown, str(len(trial["values"]))]
