"""What the settings that sweeps have chosen reach on the test day: a table per sweep, one method against the others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from deep_components.errors import InputError
from deep_components.files import read_bytes, read_json
from deep_components.reporting.frame import ARGUMENT, read_runs
from deep_components.reporting.results import OUR_METHOD, Results, build_results, notes_of
from deep_components.reporting.statistics import CONFIDENCE, RESAMPLES, SIGNIFICANCE, Test, holm
from deep_components.reporting.tables import (
    NOTHING,
    TEST_NAMES,
    Document,
    Style,
    Table,
    fixed,
    mean_and_std,
    p_value,
)
from deep_components.runs.folder import METRICS_FILE, SWEEP_FILE, tested_folder

END = " (end)"  # after a chosen value that is the lowest or highest of those tried

_P_VALUES = ("p", "p_holm", "p_holm_all", "p_requests_holm_all")  # as the table shows them
_MAX_STEPS_FILE = 1 << 20  # bytes

Steps = Mapping[tuple[str, str, int], float]  # setting, loss_operator, random items -> seconds


def choices_document(
    paths: Sequence[Path], compare: str | None, test: Test, steps: Steps, style: Style, any_code: bool = False
) -> Document:
    """The tested choices of all sweeps at any depth in ``paths``, each method against ``compare``.

    ``p_holm`` is corrected over the comparisons of a sweep, ``p_holm_all`` and ``p_requests_holm_all`` over those of
    all sweeps of the document. ``verdict`` is "higher" or "lower" where the last two are at most 0.05.

    InputError when no sweep is there, none has a tested choice or one of ``compare``, or one's file is damaged.
    """
    sweeps, asked, compare = _sweeps(paths), compare, compare or OUR_METHOD
    found = {name: _of_sweep(folder, compare, test, steps, any_code) for folder, name in sweeps.items()}
    tables = [rows.assign(sweep=name) for name, (rows, _) in found.items() if len(rows)]
    if not tables:
        named = ", ".join(map(str, paths))
        raise InputError(f"{named}: no chosen setting is tested; give lcron sweep --test_seeds=30,31")
    data = pd.concat(tables, ignore_index=True)
    if asked and asked not in set(data["method"]):
        named = ", ".join(data["method"].unique())
        raise InputError(f"--compare={asked}: no such method is tested; those that are: {named}")
    counts = dict[str, int]()
    for name in ("p", "p_requests"):
        known = data[name].dropna()
        data[f"{name}_holm_all"] = pd.Series(holm(known.tolist()), known.index, dtype="float64")
        counts[name] = len(known)
    data["verdict"] = [_verdict(row) for row in data.to_dict("records")]
    about = "settings chosen on the validation day, then tested; mean +- standard deviation over seeds; differences to "
    pairs = " Paired are the seeds that both have." if test == "paired" else ""
    rule = (
        f"p: two-sided {TEST_NAMES[test]}, with Holm's correction over the comparisons of a table, and of all "
        f"{counts['p']}.{pairs} Requests: a t-test paired by request, with Holm's correction over all "
        f"{counts['p_requests']}. Interval: {CONFIDENCE:.0%} bootstrap over requests. Higher, lower: the last two p "
        f"are at most {SIGNIFICANCE}.{END} marks the lowest or highest value tried."
    )
    notes = [rule, *_notes({name: said for name, (_, said) in found.items()})]
    more = {"compare": compare, "test": TEST_NAMES[test], "resamples": RESAMPLES, "comparisons": counts["p"]}
    more["comparisons_over_requests"] = counts["p_requests"]
    shown = [_table(rows, style) for _, rows in data.groupby("sweep", sort=False)]
    return Document([style.escape(about + compare)], shown, [*map(style.escape, notes)], data, more)


def step_seconds(files: Sequence[Path]) -> dict[tuple[str, str, int], float]:
    """The seconds of a step in the results of ``python -m benchmarks.long_lists``; InputError for other files."""
    seconds: dict[tuple[str, str, int], float] = {}
    for path in files:
        try:
            content = json.loads(read_bytes(path, _MAX_STEPS_FILE))
            for method, lengths in content["results"].items():
                for one in lengths.values():
                    key = str(content["arguments"]["setting"]), str(method), int(one["random_items"])
                    seconds[key] = float(one["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not the --output of python -m benchmarks.long_lists; measure again") from error
    return seconds


def _sweeps(paths: Sequence[Path]) -> dict[Path, str]:
    """The folders of sweeps, and their names: without the path that the user gave, where it is one."""
    found = {file.parent.resolve(): (file.parent, path) for path in paths for file in sorted(path.rglob(SWEEP_FILE))}
    folders = dict(found.values())  # one that two paths lead to counts once
    if not folders:
        raise InputError(f"{', '.join(map(str, paths))}: no {SWEEP_FILE}; name folders of lcron sweep")
    if len(paths) > 1:
        return {folder: str(folder) for folder in folders}
    return {
        folder: str(folder.relative_to(path.parent if folder == path else path)) for folder, path in folders.items()
    }


def _notes(said: Mapping[str, Sequence[str]]) -> list[str]:
    """What is said of sweeps, each sentence once; with their names unless it is said of all."""
    names: dict[str, list[str]] = {}
    for name, sentences in said.items():
        for sentence in sentences:
            names.setdefault(sentence, []).append(name)
    return [s if len(found) == len(said) else f"{', '.join(found)}: {s}" for s, found in names.items()]


def _of_sweep(folder: Path, compare: str, test: Test, steps: Steps, any_code: bool) -> tuple[pd.DataFrame, list[str]]:
    """A row per method whose choice is tested, and what is missing."""
    content = _read(folder / SWEEP_FILE)
    trials = {tested_folder(folder) / name: trial for trial in content["trials"] for name in trial["tested"]}
    done = [path for path in trials if (path / METRICS_FILE).exists()]
    notes = [] if trials and len(done) == len(trials) else [f"{len(done)} of {len(trials)} tests are done."]
    if not done:
        return pd.DataFrame(), notes
    collected = read_runs(done)
    results = build_results(collected, compare, test, any_code, required=False)
    notes += [*results.left_out.values(), *results.warnings, *results.remarks.below_without_column]
    shown = results.compared[results.compared["metric"] == results.headline].astype(object)
    notes += notes_of(shown.where(shown.notna(), None).to_dict("records")) if results.ours else results.notes
    cells, rows = results.of(results.headline), []
    for run in results.runs.drop_duplicates("row").to_dict("records"):
        trial, cell = trials[run["folder"]], cells.loc[run["row"]]
        key = run["setting"], f"{run['loss_type']}_{run.get(f'{ARGUMENT}topk_op')}", _random_items(run)
        row = {"method": run["row"], "budget": content["budget"], "step_seconds": steps.get(key)}
        rows.append(_about(results, run) | row | _choice(trial, content) | _difference(cell))
    return pd.DataFrame(rows), notes


def _random_items(run: Mapping[Any, Any]) -> int:
    """Those of the training."""
    number = run.get(f"{ARGUMENT}num_random_items")
    return 0 if number is None or pd.isna(number) else int(number)


def _read(path: Path) -> dict[str, Any]:
    """A sweep.json. InputError when it is damaged, or names folders outside the sweep's."""
    try:
        content = read_json(path)
        trials = content["trials"]
        sound = isinstance(content["budget"], int)
        for trial in trials:
            trial.setdefault("tested", [])
            names = [*trial["tested"], trial["method"], *trial["arguments"], *trial["arguments"].values()]
            sound &= all(isinstance(name, str) for name in names) and isinstance(trial["chosen"], bool)
            sound &= not any(Path(name).is_absolute() or ".." in Path(name).parts for name in trial["tested"])
            sound &= isinstance(trial["mean"], float | int | None)
        if not sound:
            raise ValueError("a field of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a sweep's results; give the lcron sweep that made it again") from error
    return content


def _about(results: Results, run: Mapping[Any, Any]) -> dict[str, Any]:
    """What a table is about."""
    return {
        **{name: results.about[name] for name in ("setting", "data", "test_day", "num_requests", "test_random_items")},
        "num_random_items": _random_items(run),
        "loss": run["loss_type"], "metric": results.headline,
    }  # fmt: skip


def _choice(trial: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen value of every option, and which of them are at the end of what was tried."""
    others = [one["arguments"] for one in content["trials"] if one["method"] == trial["method"]]
    at_end = [name for name, value in trial["arguments"].items() if _at_end(value, [one[name] for one in others])]
    return {f"chosen.{n}": v for n, v in trial["arguments"].items()} | {
        "at_end": ",".join(at_end), "settings": len(others), "validation": trial["mean"]
    }  # fmt: skip


def _at_end(value: str, tried: Sequence[str]) -> bool:
    try:
        numbers = sorted({float(one) for one in tried})
    except ValueError:
        return False
    return len(numbers) > 1 and float(value) in (numbers[0], numbers[-1])


def _difference(cell: pd.Series) -> dict[str, Any]:
    """The cell's numbers, with the difference of this method minus the compared one."""
    return {name: cell[name] for name in ("mean", "std", "seeds", "p", "p_holm", "p_requests")} | {
        "difference": -cell["difference"],
        "interval_low": -cell["interval_high"],
        "interval_high": -cell["interval_low"],
        "no_test": cell["no_test"],
    }


def _verdict(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["p"]) or pd.isna(row["p_requests"]):
        return ""
    if max(row["p_holm_all"], row["p_requests_holm_all"]) > SIGNIFICANCE:
        return "not shown"
    return "higher" if row["difference"] > 0 else "lower"


def _table(group: pd.DataFrame, style: Style) -> Table:
    """The methods of one sweep."""
    first = group.iloc[0]
    options = [name for name in group if name.startswith("chosen.") and group[name].notna().any()]
    timed = group["step_seconds"].notna().any()
    rows = []
    for row in group.to_dict("records"):
        ends = row["at_end"].split(",")
        values = [
            NOTHING if pd.isna(row[name]) else f"{row[name]}{END if name.removeprefix('chosen.') in ends else ''}"
            for name in options
        ]
        low, high = (fixed(row[f"interval_{end}"], "+") for end in ("low", "high"))
        words = [*values, mean_and_std(row, style.plus_minus), fixed(row["difference"], "+")]
        words += [NOTHING if NOTHING in (low, high) else f"[{low}, {high}]"]
        words += [NOTHING if pd.isna(row[name]) else p_value(row[name]) for name in _P_VALUES]
        words += [row["verdict"] or NOTHING, str(row["seeds"])]
        words += ([NOTHING if pd.isna(row["step_seconds"]) else f"{1000 * row['step_seconds']:.1f}"]) if timed else []
        rows.append([style.name(row["method"]), *map(style.escape, words)])
    names = [name.removeprefix("chosen.") for name in options]
    header = [*names, *style.columns([first["metric"]]), "difference", f"{CONFIDENCE:.0%} interval", "p"]
    header += [
        "p (Holm)",
        "p (Holm, all)",
        "requests (Holm, all)",
        "verdict",
        "seeds",
        *(["ms a step"] if timed else []),
    ]
    losses, in_training = (", ".join(map(str, group[name].unique())) for name in ("loss", "num_random_items"))
    title = (
        f"{first['setting']}, data: {first['data']}, {losses}, random items: {in_training} in training, "
        f"{first['test_random_items']} in the test; {first['num_requests']} requests of {first['test_day']}; "
        f"{first['settings']} settings tried of each method"
    )
    return Table(style.escape(title), ["method", *map(style.escape, header)], rows)
