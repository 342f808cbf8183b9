"""The report as one HTML page that needs no network: template, style and script lie in ``page/`` and are put into it.

Everything that comes from files is escaped by the template engine; the page's own script is the only one that its
content security policy lets run.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deep_components.files import read_json
from deep_components.reporting import svg
from deep_components.reporting.charts import Charts, left_after, stages
from deep_components.reporting.results import DECIMALS, Comparison, Results, Row, metric_title
from deep_components.reporting.runs import Run, printable
from deep_components.reporting.statistics import CONFIDENCE, SIGNIFICANCE
from deep_components.reporting.tables import (
    TEST_NAMES,
    comparison_cells,
    interval_text,
    json_table,
    legend,
    mean_and_std,
    p_value,
    paper_cell,
    signed,
)
from deep_components.runs import checkpoint

FOLDER = Path(__file__).with_name("page")
NOTHING = "\N{EN DASH}"  # in a cell that has no value

_MARKS = {"better": ("↓", "significantly lower"), "worse": ("↑", "significantly higher")}


def render(results: Results, charts: Charts) -> str:
    """The page of the results and their charts."""
    problems = [*results.left_out.values(), *charts.problems]
    script = (FOLDER / "sort.js").read_text()
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"title": metric_title, "svg": lambda chart: Markup(svg.draw(chart)), "share": _share}
    environment.globals["swatch"] = lambda place: Markup(svg.swatch(place))
    return environment.get_template("report.html.j2").render(
        style=Markup((FOLDER / "style.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(_in_script(json_table(results))),
        title=_title(results),
        summary=_summary(results),
        results=results,
        charts=charts,
        legend=legend(results) if any(made.p is not None for made in results.comparisons) else "",
        test=TEST_NAMES[results.test],
        level=f"{SIGNIFICANCE:.0%}",
        confidence=f"{CONFIDENCE:.0%}",
        table=_table(results),
        comparisons=[(metric, _comparisons(results, metric)) for metric in results.metrics if results.comparisons],
        paper=_paper(results),
        survival=_survival(results),
        survival_stages=stages(results),
        cost=_cost(results, problems),
        streaming=_streaming(charts),
        configuration=_configuration(results),
        problems=problems,
    )


def _in_script(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(results: Results) -> str:
    trained = sum(not row.untrained for row in results.rows)
    setting = str(results.about["setting"]).replace("_", "-").capitalize()
    return f"{setting} cascade, {trained} {'method' if trained == 1 else 'methods'}"


def _summary(results: Results) -> list[str]:
    """What the report says, in sentences."""
    metric = results.headline
    sentences = []
    for row in results.rows:
        if row.cells[metric].best:
            sentences.append(f"The best mean {metric_title(metric)} is {_mean(row, metric)}, by {row.name}.")
    made = results.compared(metric)
    if results.ours is not None and made:
        ours = next(row for row in results.rows if row.name == results.ours)
        verdicts = [comparison.verdict for comparison in made]
        sentences.append(
            f"{results.ours} reaches {_mean(ours, metric)}: significantly better than {verdicts.count('better')} of "
            f"{len(made)} baselines, significantly worse than {verdicts.count('worse')}."
        )
        if "not tested" in verdicts:
            sentences.append(f"{verdicts.count('not tested')} could not be tested.")
    return sentences


def _mean(row: Row, metric: str) -> str:
    return mean_and_std(row.cells[metric], " ± ")


def _share(value: float) -> str:
    return f"{value:.1%}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(results: Results) -> list[dict[str, Any]]:
    """Rows of the main table; a cell has its value to sort by, what is shown, its mark and its error bar."""
    limits = {metric: _limits(results, metric) for metric in results.metrics}
    return [
        {
            "name": row.name,
            "ours": row.name == results.ours,
            "untrained": row.untrained,
            "seeds": len(row.runs),
            "cells": [_table_cell(results, row, metric, limits[metric]) for metric in results.metrics],
        }
        for row in results.rows
    ]


def _limits(results: Results, metric: str) -> tuple[float, float] | None:
    """From the lowest to the highest end of the trained rows' error bars."""
    cells = [row.cells[metric] for row in results.rows if not row.untrained]
    ends = [cell.mean + sign * (cell.std or 0) for cell in cells if cell.mean is not None for sign in (-1, 1)]
    return (min(ends), max(ends)) if ends else None


def _table_cell(results: Results, row: Row, metric: str, limits: tuple[float, float] | None) -> dict[str, Any]:
    cell = row.cells[metric]
    comparison = results.comparison(row.name, metric)
    mark, meaning = _MARKS.get(comparison.verdict if comparison else "", ("", ""))
    bar = ""
    if limits is not None and cell.mean is not None and not row.untrained:
        std = cell.std or 0
        bar = Markup(svg.error_bar(cell.mean, cell.mean - std, cell.mean + std, limits))
    return {
        "value": "" if cell.mean is None else repr(cell.mean),
        "mean": "undefined" if cell.mean is None else f"{cell.mean:.{DECIMALS}f}",
        "std": "" if cell.mean is None or cell.std is None else f"± {cell.std:.{DECIMALS}f}",
        "best": cell.best,
        "mark": mark,
        "meaning": f"{meaning} than {results.ours}" if mark else "",
        "bar": bar,
    }


def _comparisons(results: Results, metric: str) -> list[dict[str, Any]]:
    rows = []
    for made in results.compared(metric):
        baseline, *_, verdict = comparison_cells(made)
        rows.append({"baseline": baseline, "verdict": verdict, "cells": _comparison_values(made), "why": made.no_test})
    return rows


def _comparison_values(made: Comparison) -> list[tuple[str, str]]:
    """What is shown and what it sorts by: difference, interval, p, corrected p."""
    low = None if made.interval is None else made.interval[0]
    shown = (signed(made.difference), interval_text(made.interval), p_value(made.p), p_value(made.p_holm))
    values = (made.difference, low, made.p, made.p_holm)
    return [(text or NOTHING, "" if value is None else repr(value)) for text, value in zip(shown, values, strict=True)]


def _paper(results: Results) -> list[tuple[str, list[str]]]:
    """Row name and the paper's number with our difference, per metric."""
    rows = []
    for row in results.rows:
        cells = [row.cells[metric] for metric in results.metrics]
        if any(cell.paper for cell in cells):
            rows.append((row.name, [paper_cell(cell) or NOTHING for cell in cells]))
    return rows


def _survival(results: Results) -> list[dict[str, Any]]:
    """Per method and stage: what it loses in the cascade, what is left after it there, and its recall alone."""
    names = stages(results)
    rows = []
    for row in results.rows if names else []:
        before, cells = 1.0, []
        for stage in names:
            alone = next((m for m in results.metrics if m.startswith(f"{stage}_recall@")), None)
            left = left_after(row, stage)
            cells += [before - left, left, row.cells[alone].mean if alone else None]
            before = left
        rows.append({"name": row.name, "cells": cells})
    return rows


def _streaming(charts: Charts) -> list[tuple[str, list[str]]]:
    """The numbers of the streaming chart: day and a cell per method."""
    if charts.streaming is None:
        return []
    at = [dict(zip(curve.x, curve.mean, strict=True)) for curve in charts.streaming.curves]
    rows = []
    for place, day in enumerate(charts.streaming.places):
        values = [curve.get(float(place)) for curve in at]
        rows.append((day, [NOTHING if value is None else f"{value:.{DECIMALS}f}" for value in values]))
    return rows


def _cost(results: Results, problems: list[str]) -> list[dict[str, Any]]:
    """Per trained method, means over its seeds: seconds, requests a second, highest memory, device."""
    rows = []
    for row in results.rows:
        costs = [cost for cost in (_read_cost(run, problems) for run in row.runs) if cost]
        if not row.untrained and costs:
            seconds = mean(cost["seconds"] for cost in costs)
            speed = sum(cost["requests"] for cost in costs) / max(sum(cost["seconds"] for cost in costs), 1e-9)
            memory = [max((cost.get(name) or 0 for cost in costs), default=0) for name in _MEMORY]
            devices = ", ".join(sorted({printable(str(cost.get("device"))) for cost in costs}))
            rows.append({"name": row.name, "seconds": seconds, "speed": speed, "memory": memory, "device": devices})
    return rows


_MEMORY = ("peak_memory_bytes", "peak_gpu_memory_bytes")


def _read_cost(run: Run, problems: list[str]) -> dict[str, Any] | None:
    path = run.folder / checkpoint.COST_FILE
    try:
        cost: Any = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: not readable ({error}); what this run took is left out")
        return None
    wanted = {"requests": int, "seconds": float | int, **dict.fromkeys(_MEMORY, int | None)}
    if not isinstance(cost, dict) or not all(isinstance(cost.get(name), kind) for name, kind in wanted.items()):
        problems.append(f"{path}: a number is missing or damaged; what this run took is left out")
        return None
    return cost


# ---- configuration ---------------------------------------------------------------------------------------------------


def _configuration(results: Results) -> dict[str, Any]:
    """The arguments that all trained runs share, those in which methods differ, and where the runs come from."""
    trained = [row for row in results.rows if not row.untrained] or results.rows
    arguments = {row.name: row.runs[0].arguments for row in trained}
    names = sorted({name for found in arguments.values() for name in found})
    shared = {name: _values(arguments, name)[0] for name in names if len(set(_values(arguments, name))) == 1}
    differing = [name for name in names if name not in shared]
    return {
        "shared": {printable(name): value for name, value in shared.items()},
        "differing": [printable(name) for name in differing],
        "methods": [(row.name, [_text(arguments[row.name].get(name)) for name in differing]) for row in trained],
        "runs": [
            (row.name, run.seed, printable(str(run.folder)), _origin(run)) for row in results.rows for run in row.runs
        ],
    }


def _values(arguments: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    return [_text(found.get(name)) for found in arguments.values()]


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return printable(", ".join(str(part) for part in value))
    return NOTHING if value is None else printable(str(value))


def _origin(run: Run) -> str:
    """Commit, device and versions of a run, as far as it says."""
    commit, versions = run.config.get("commit"), run.config.get("versions")
    named = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    where = [f"commit {str(commit)[:12]}{'-modified' if str(commit).endswith('-modified') else ''}"] if commit else []
    return printable(", ".join([*where, str(run.config.get("device") or "device unknown"), *named]))
