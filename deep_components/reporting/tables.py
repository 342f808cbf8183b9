"""Tables of many runs (metrics, costs, streams) as text, Markdown, LaTeX, CSV and JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from deep_components.errors import InputError
from deep_components.reporting.curves import streaming_curves
from deep_components.reporting.frame import Collected, label_rows
from deep_components.reporting.paper import paper_name
from deep_components.reporting.results import DECIMALS, Results, metric_title
from deep_components.reporting.statistics import CONFIDENCE, RESAMPLES, SIGNIFICANCE

TEST_NAMES = {"welch": "Welch's t-test over seeds", "paired": "t-test paired by seed"}
NOTHING = "-"  # in a cell that has no value

_GIB = 1 << 30


@dataclass(frozen=True)
class Style:
    """How a format writes names, numbers and marks. ``escape`` makes text from files harmless; an HTML style's other
    strings are of markupsafe's type, so that what is put into them is escaped.

    Args:
        number, best: templates of a number, and of the best of a column.
        marks: what follows a number that our method is significantly "better" or "worse" than.
        best_word: what the legend calls ``best``.
    """

    escape: Callable[[str], str] = str
    row: Callable[[str], str] = str
    metric: Callable[[str], str] = str
    plus_minus: str = " +- "
    number: str = "{}"
    best: str = "{} *"
    best_word: str = "*"
    marks: Mapping[str, str] = field(default_factory=lambda: {"better": " <", "worse": " >"})

    def name(self, row: str) -> str:
        return self.escape(self.row(row))

    def columns(self, metrics: Sequence[str]) -> list[str]:
        return [self.escape(self.metric(metric)) for metric in metrics]


@dataclass(frozen=True)
class Table:
    """Words and numbers as they are shown: a line above them, a header, rows, and lines below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """Lines, tables, lines, in the style of a format; for programs the ``data``, and for JSON ``more``."""

    heading: list[str]
    tables: list[Table]
    notes: list[str]
    data: pd.DataFrame
    more: Mapping[str, Any] = field(default_factory=dict)


Maker = Callable[[Style], Document]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def fixed(value: float) -> str:
    return NOTHING if pd.isna(value) else f"{value:.{DECIMALS}f}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return NOTHING if pd.isna(value) else f"{value:+.{DECIMALS}f}"


def p_value(value: float) -> str:
    """A p-value to the decimals of the tables."""
    least = 10**-DECIMALS
    return f"<{least:.{DECIMALS}f}" if value < least else fixed(value)


def mean_and_std(mean: float, std: float, plus_minus: str = " ± ") -> str:
    """A cell's number; "undefined" where a run has none."""
    if pd.isna(mean):
        return "undefined"
    return fixed(mean) + ("" if pd.isna(std) else plus_minus + fixed(std))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics_document(results: Results, style: Style) -> Document:
    """The metrics of the methods, our method against the others, and the paper's numbers where they belong."""
    tables = [metrics_table(results, style)]
    tables += [comparison_table(results, results.headline, style)] if len(results.compared) else []
    tables += [paper_table(results, style)] if len(results.with_paper) else []
    head = [style.escape(line) for line in (heading(results), *results.warnings)]
    notes = [style.escape(line) for line in (*results.notes, *_left_out(results.left_out))]
    about = {name: results.about[name] for name in ("setting", "data", "test_day", "num_requests")}
    data = pd.DataFrame([about | record for record in results.cells.to_dict("records")])
    return Document(head, tables, notes, data, _more(results))


def _left_out(reasons: Mapping[Any, str]) -> list[str]:
    return [f"left out: {reason}" for reason in reasons.values()]


def heading(results: Results) -> str:
    """What the numbers are, in a line."""
    about = results.about
    numbers = "one run each" if results.one_seed else "mean +- standard deviation over seeds"
    return (
        f"{about['setting']}, data: {about['data']}, test day {about['test_day']}, {about['num_requests']} requests; "
        f"{numbers}"
    )


def legend(results: Results, style: Style) -> tuple[str, ...]:
    """What the marks in the table mean; nothing for marks that are not there."""
    words = []
    if results.cells["best"].any():
        words.append(f"{style.best_word}: {'best' if results.one_seed else 'best mean'}.")
    tested = results.compared[results.compared["p"].notna()]["method"].nunique()
    if tested:
        ours = style.row(str(results.ours))
        rest = (
            f" significantly higher than {ours} at the {SIGNIFICANCE:.0%} level (two-sided {TEST_NAMES[results.test]}, "
            f"Holm's correction over {tested} {'baseline' if tested == 1 else 'baselines'})."
        )
        lower, higher = (style.number.format(style.marks[verdict]) for verdict in ("better", "worse"))
        words.append(lower.strip() + " significantly lower, " + higher.strip() + style.escape(rest))
    return tuple(words)


def metrics_table(results: Results, style: Style) -> Table:
    """A row per method, a column per metric."""
    cells = {metric: results.of(metric) for metric in results.metrics}
    seeds = results.runs["row"].value_counts()
    rows = [
        [style.name(name), *(_number(cells[metric].loc[name], style) for metric in cells), str(seeds[name])]
        for name in results.rows
    ]
    return Table("", ["method", *style.columns(results.metrics), "seeds"], rows, legend(results, style))


def _number(cell: pd.Series, style: Style) -> str:
    number = mean_and_std(cell["mean"], cell["std"], style.plus_minus)
    if number == "undefined":
        return number
    mark = style.marks.get(cell["ours_is"], "")
    return style.number.format((style.best.format(number) if cell["best"] else number) + mark)


def comparison_table(results: Results, metric: str, style: Style) -> Table:
    """Our method against each baseline in one metric."""
    title = (
        f"{style.metric(metric)}, {style.row(str(results.ours))} minus each baseline; "
        f"{CONFIDENCE:.0%} bootstrap interval over requests"
    )
    rows = []
    for made in results.compared[results.compared["metric"] == metric].to_dict("records"):
        low, high = made["interval_low"], made["interval_high"]
        interval = NOTHING if pd.isna(low) else f"[{signed(low)}, {signed(high)}]"
        numbers = [signed(made["difference"]), interval, p_value(made["p"]), p_value(made["p_holm"])]
        rows.append([style.name(made["method"]), *map(style.escape, numbers), made["ours_is"]])
    header = ["baseline", "difference", f"{CONFIDENCE:.0%} interval", "p", "p (Holm)"]
    header.append(f"{style.row(str(results.ours))} is")
    return Table(style.escape(title), [*map(style.escape, header)], rows)


def paper_table(results: Results, style: Style) -> Table:
    """The paper's number, and ours minus it."""
    rows = []
    for name in results.with_paper["method"].unique():
        cells = [results.of(metric).loc[name] for metric in results.metrics]
        rows.append([style.name(name), *(style.escape(_paper_cell(cell)) for cell in cells)])
    header = ["method", *style.columns(results.metrics)]
    return Table("The paper's mean, and in brackets ours minus it", header, rows)


def _paper_cell(cell: pd.Series) -> str:
    if pd.isna(cell["paper_mean"]):
        return NOTHING
    difference = "undefined" if pd.isna(cell["mean"]) else signed(cell["difference_to_paper"])
    return f"{fixed(cell['paper_mean'])} ({difference})"


def _more(results: Results) -> dict[str, Any]:
    """What the JSON says beside the table, with the value of every run."""
    runs = [
        {"row": run["row"], "folder": str(run["folder"]), "seed": run["seed"], "commit": run["commit"]}
        | {metric: run[metric] for metric in results.metrics}
        for run in results.runs.to_dict("records")
    ]
    return {
        **results.about,
        "ours": results.ours,
        "test": f"two-sided {TEST_NAMES[results.test]}, Holm's correction over the baselines of a metric",
        "interval": f"{CONFIDENCE:.0%} percentile bootstrap over requests, paired, {RESAMPLES} resamples",
        "warnings": results.warnings,
        "notes": results.notes,
        "left_out": results.left_out,
        "runs": [{name: _plain(value) for name, value in run.items()} for run in runs],
    }


# ---- costs and streams -----------------------------------------------------------------------------------------------


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per method, setting, log and device: time and memory of its training, of rows that have a ``row``.

    ``requests`` and ``seconds`` are means over the ``seeds``; memory, in GiB, is the highest.
    """
    trained = runs[runs["seconds"].notna() & ~runs["untrained"]]
    grouped = trained.groupby(["row", "setting", "data", "device", "threads"], sort=False, dropna=False)
    table = grouped.agg(
        seeds=("seconds", "size"),
        requests=("requests", "mean"),
        seconds=("seconds", "mean"),
        memory=("peak_memory_bytes", "max"),
        gpu_memory=("peak_gpu_memory_bytes", "max"),
    ).reset_index(names=["method", "setting", "data", "device", "threads"])
    table[["memory", "gpu_memory"]] /= _GIB
    table.insert(8, "requests_per_second", table["requests"] / table["seconds"].clip(lower=1e-9))
    return table.sort_values("method", key=lambda names: names.map({m: i for i, m in enumerate(names.unique())}))


def costs_table(table: pd.DataFrame, style: Style) -> Table:
    header = ["method", "setting", "seeds", "requests", "seconds", "requests/s", "memory", "GPU memory", "device"]
    rows = []
    for row in table.to_dict("records"):
        memory = [NOTHING if pd.isna(row[name]) else f"{row[name]:.2f} GiB" for name in ("memory", "gpu_memory")]
        numbers = [f"{row['requests']:.0f}", f"{row['seconds']:.1f}", f"{row['requests_per_second']:.0f}", *memory]
        device = "unknown" if pd.isna(row["device"]) else str(row["device"])
        device += "" if pd.isna(row["threads"]) else f", threads: {row['threads']}"
        words = [style.name(row["method"]), style.escape(row["setting"]), str(row["seeds"])]
        rows.append([*words, *numbers, style.escape(device)])
    return Table("", header, rows)


def costs_document(runs: pd.DataFrame, style: Style) -> Document:
    """Time and memory of the methods' trainings; runs of other settings and data stand in rows of their own."""
    groups = runs.groupby(["setting", "data", "test_day", "num_requests"], sort=False)
    table = costs(pd.concat([label_rows(group) for _, group in groups]))
    if table.empty:
        raise InputError(
            f"{', '.join(map(str, runs['folder']))}: no training.json says what training took; train again"
        )
    head = f"training time and peak memory, data: {', '.join(sorted(runs['data'].unique()))}; means over seeds"
    return Document([style.escape(head)], [costs_table(table, style)], [], table)


def streaming_document(collected: Collected, style: Style) -> Document:
    """Joint recall day by day, a column per method; InputError when no run was made as a stream."""
    runs, metric, problems = label_rows(collected.runs), collected.runs["metrics"].iloc[0][0], list[str]()
    curves = streaming_curves(runs, metric, problems)
    if not curves:
        folders = ", ".join(map(str, runs["folder"]))
        raise InputError("; ".join(problems) or f"{folders}: no streaming.json; make the runs with --streaming")
    first = runs.iloc[0]
    head = f"{first['setting']}, data: {first['data']}, {metric} of each day after training on all before it; "
    head += "means over seeds"
    data = pd.concat([curve.assign(method=name, metric=metric) for name, curve in curves.items()])
    data = data.reset_index(names="test_day")[["method", "metric", "test_day", "mean", "low", "high"]]
    notes = [style.escape(note) for note in (*problems, *_left_out(collected.left_out))]
    return Document([style.escape(head)], [streaming_table(curves, style)], notes, data)


def streaming_table(curves: Mapping[str, pd.DataFrame], style: Style) -> Table:
    """A row per test day, a column per method."""
    means = pd.DataFrame({name: curve["mean"] for name, curve in curves.items()}).sort_index()
    rows = [[style.escape(str(day)), *map(fixed, values)] for day, *values in means.reset_index().to_numpy()]
    return Table("", ["test day", *map(style.name, means)], rows)


# ---- formats ---------------------------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines that hold the rows in columns, the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def text(make: Maker) -> str:
    """Aligned columns for a terminal."""
    document = make(Style())
    lines = list(document.heading)
    for table in document.tables:
        lines += ["", *([table.title, ""] if table.title else []), *aligned([table.header, *table.rows])]
        lines += ["", " ".join(table.below)] if table.below else []
    lines += ["", *document.notes] if document.notes else []
    return "\n".join([*lines, ""])


def _escape_markdown(words: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", words)


_MARKDOWN = Style(
    escape=_escape_markdown, metric=metric_title, plus_minus=" ± ", best="**{}**", best_word="Bold",
    marks={"better": " ↓", "worse": " ↑"},
)  # fmt: skip


def markdown(make: Maker) -> str:
    document = make(_MARKDOWN)
    parts = [document.heading[0].replace("+-", "±"), *(f"**{line}**" for line in document.heading[1:])]
    for table in document.tables:
        lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        parts += [
            *([table.title] if table.title else []),
            "\n".join(lines),
            *([" ".join(table.below)] if table.below else []),
        ]
    return "\n\n".join([*parts, *document.notes]) + "\n"


_LATEX_LETTERS = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def _escape_latex(words: str) -> str:
    return "".join(_LATEX_LETTERS.get(letter, letter) for letter in words)


_LATEX = Style(
    escape=_escape_latex, row=paper_name, metric=metric_title, plus_minus=r" \pm ", number="${}$",
    best=r"\mathbf{{{}}}", best_word="Bold", marks={"better": r"^{\downarrow}", "worse": r"^{\uparrow}"},
)  # fmt: skip


def latex(make: Maker) -> str:
    """Tables as they stand in a paper, with booktabs."""
    document = make(_LATEX)
    tables = ["% needs \\usepackage{booktabs}"]
    for index, table in enumerate(document.tables):
        about = document.heading[0].replace("+-", r"$\pm$")
        first = [*(rf"\textbf{{{line}.}}" for line in document.heading[1:]), f"{about}."]
        caption = " ".join([*(first if index == 0 else [table.title]), *table.below])
        words = pd.DataFrame(table.rows, columns=table.header, dtype=object)
        columns = "l" + "c" * (len(table.header) - 1)
        made = words.to_latex(index=False, escape=False, column_format=columns, position="t", caption=caption)
        tables.append(made.replace("[t]", "[t]\n\\centering", 1))
    return "\n".join([*tables, *(f"% {note}" for note in document.notes), ""])


def csv(make: Maker) -> str:
    """A line per record. A name that a spreadsheet would take for a formula gets an apostrophe before it."""
    return make(Style()).data.map(_no_formula).to_csv(index=False, lineterminator="\n")


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def json_table(make: Maker) -> str:
    """Everything there is."""
    document = make(Style())
    records = [{name: _plain(value) for name, value in row.items()} for row in document.data.to_dict("records")]
    return json.dumps({**document.more, "results": records}, indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value as JSON has it; null for one that is missing."""
    return None if pd.isna(value) else value.item() if hasattr(value, "item") else value


FORMATS: dict[str, Callable[[Maker], str]] = {
    "text": text,
    "markdown": markdown,
    "csv": csv,
    "latex": latex,
    "json": json_table,
}
SUFFIXES = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}
