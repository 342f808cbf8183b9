"""The report as one HTML page that needs no network: template, style and script lie in ``page/`` and are put into it.

Everything that comes from files is escaped by the template engine; the page's own script is the only one that its
content security policy lets run.
"""

import base64
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deep_components.cli import printable
from deep_components.reporting.curves import streaming_curves
from deep_components.reporting.figures import PALETTE, Chart, bound, survival
from deep_components.reporting.frame import BOUND, method_arguments
from deep_components.reporting.paper import paper_name
from deep_components.reporting.results import Results, metric_title, notes_of
from deep_components.reporting.statistics import CONFIDENCE, SIGNIFICANCE
from deep_components.reporting.tables import (
    NOTHING,
    TEST_NAMES,
    Style,
    Table,
    comparison_table,
    corpus_table,
    costs,
    costs_table,
    fixed,
    json_table,
    mean_and_std,
    metrics_document,
    metrics_table,
    paper_table,
    streaming_table,
)

FOLDER = Path(__file__).with_name("page")

_KINDS = ("score", "differences", "survival", "bound", "streaming", "validation", "loss", "weights")
_IN_SCRIPT = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "<>&"})  # so that no JSON ends its element

_STYLE = Style(
    row=paper_name, metric=metric_title, plus_minus=" ± ", best=Markup("<b>{}</b>"), best_word="Bold",
    marks={
        "better": Markup(' <span class="lower" role="img" aria-label="significantly lower">↓</span>'),
        "worse": Markup(' <span class="higher" role="img" aria-label="significantly higher">↑</span>'),
    },
    number=Markup("{}"),
)  # fmt: skip


def render(results: Results, charts: list[Chart], problems: list[str]) -> str:
    """The page of the results and their charts; ``problems`` are sentences about what could not be read."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    by_kind = {kind: [chart for chart in charts if chart.kind == kind] for kind in _KINDS}
    colours = ";".join(f"--{name}:{colour}" for name, colour in PALETTE.items())
    return environment.get_template("report.html.j2").render(
        style=Markup(f":root{{{colours}}}\n" + (FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(json_table(partial(metrics_document, results)).translate(_IN_SCRIPT)),
        title=_title(results),
        summary=_summary(results),
        results=results,
        notes=_notes(results),
        several=len(results.rows) - results.runs[results.runs["untrained"]]["row"].nunique() > 1,
        tested=bool(results.compared["p"].notna().any()),
        ours=_STYLE.row(results.ours) if results.ours else None,
        untrained=[_STYLE.row(row) for row in results.runs[results.runs["untrained"]]["row"].unique()],
        runs=len(results.runs),
        charts={kind: [(chart, Markup(chart.svg())) for chart in found] for kind, found in by_kind.items()},
        tables=_tables(results),
        problems=[*results.left_out.values(), *problems],
        test=TEST_NAMES[results.test],
        level=f"{SIGNIFICANCE:.0%}",
        confidence=f"{CONFIDENCE:.0%}",
    )


def _title(results: Results) -> str:
    setting = str(results.about["setting"]).replace("_", "-").capitalize()
    trained = [row for row in results.rows if not results.of(results.headline).loc[row, "untrained"]]
    named = trained or results.rows
    return f"{setting} cascade: {_STYLE.row(named[0]) if len(named) == 1 else f'{len(named)} methods'}"


def _summary(results: Results) -> list[str]:
    """What the report says, in sentences: our method or the best one, what it is better than, and chance."""
    cells = results.of(results.headline)
    trained = cells[~cells["untrained"] & cells["mean"].notna()]
    if trained.empty:
        return []
    best = [str(row) for row in trained.index[trained["best"]]]
    first = results.ours if results.ours is not None and results.ours in trained.index else str(trained.index[0])
    title, seeds = metric_title(results.headline), cells.loc[first, "seeds"]
    reaches = f"has the best {title}," if first in best else f"reaches a {title} of"
    number = f"{mean_and_std(cells.loc[first])} ({'one seed' if seeds == 1 else f'{seeds} seeds'})"
    sentences = [f"{paper_name(first)} {reaches} {number}."]
    verdicts = list(cells["ours_is"].dropna())
    tested = [verdict for verdict in verdicts if verdict != "not tested"]
    if tested:
        sentences.append(f"It is {_verdicts(tested)}.")
    if len(tested) < len(verdicts):
        number = "No difference can" if not tested else f"{len(verdicts) - len(tested)} more cannot"
        sentences.append(f"{number} be tested: {', '.join(cells['no_test'].dropna().unique())}.")
    if best and first not in best:
        sentences.append(f"The best is {', '.join(map(paper_name, best))} with {mean_and_std(cells.loc[best[0]])}.")
    for row, cell in cells[cells["untrained"] & cells["mean"].notna()].iterrows():
        sentences.append(f"Chance, the {row} cascade, has {mean_and_std(cell)}.")
    return sentences


def _notes(results: Results) -> list[str]:
    made = results.compared.astype(object).where(results.compared.notna(), None)
    return notes_of(made.to_dict("records"), _STYLE.row) if len(made) else results.notes


def _verdicts(tested: list[str]) -> str:
    """Against how many baselines ours is what."""
    better, worse = tested.count("better"), tested.count("worse")
    if len(tested) == 1:
        return {"better": "significantly better than", "worse": "significantly worse than"}.get(
            tested[0], "not significantly different from"
        ) + " its one baseline"
    if better == len(tested):
        return f"significantly better than all {better} baselines"
    return f"significantly better than {better} of {len(tested)} baselines, worse than {worse}"


def _tables(results: Results) -> dict[str, Any]:
    """The tables by the part of the page that shows them; None or empty where there is nothing to show."""
    compared = results.metrics if len(results.compared) else ()
    cost, curves = costs(results.runs), streaming_curves(results.runs, results.headline, [])
    shares = survival(results)
    lost = [[paper_name(str(row)), *map("{:.1%}".format, values)] for row, *values in shares.itertuples()]
    tightness = [[paper_name(str(row)), *map(fixed, values)] for row, *values in bound(results).itertuples()]
    return {
        "metrics": metrics_table(results, _STYLE),
        "comparison": [(metric_title(metric), comparison_table(results, metric, _STYLE)) for metric in compared],
        "paper": paper_table(results, _STYLE) if len(results.with_paper) else None,
        "corpus": corpus_table(results.runs, _STYLE),
        "survival": Table("", ["method", *shares], lost),
        "bound": Table("", ["method", *(name.removeprefix("bound_").replace("_", " ") for name in BOUND)], tightness),
        "streaming": streaming_table(curves, _STYLE, results.remarks) if curves else None,
        "cost": None if cost.empty else costs_table(cost, _STYLE, results.remarks),
        **_configuration(results),
    }


def _configuration(results: Results) -> dict[str, Table | None]:
    """The arguments that all trained runs share, those in which methods differ, and where the runs come from."""
    runs = results.runs if results.runs["untrained"].all() else results.runs[~results.runs["untrained"]]
    firsts = runs.drop_duplicates("row").to_dict("records")
    arguments = pd.DataFrame([method_arguments(run) for run in firsts], [paper_name(run["row"]) for run in firsts])
    arguments = arguments.astype(object).map(_words).sort_index(axis=1)
    differ = arguments.nunique() > 1
    differing, shared = arguments.loc[:, differ], arguments.loc[:, ~differ].iloc[0]
    origins = results.runs[["row", "seed", "commit", "code", "device", "versions", "folder"]].astype(object).map(_words)
    origins["row"] = results.runs["row"].map(paper_name)
    return {
        "differing": Table("", ["method", *differing], differing.reset_index().to_numpy().tolist())
        if differ.any()
        else None,
        "shared": Table("", ["argument", "value"], shared.reset_index().to_numpy().tolist()),
        "runs": Table("", ["method", *origins.columns[1:]], origins.to_numpy().tolist()),
    }


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return NOTHING if pd.isna(value) else printable(str(value))
