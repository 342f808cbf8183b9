"""Tables of many runs (metrics, costs, streams) as text, Markdown, LaTeX, CSV and JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from deep_components.cli import printable
from deep_components.errors import InputError
from deep_components.reporting.curves import streaming_curves
from deep_components.reporting.frame import CORPUS, Collected, by_table, comparable_rows, differing
from deep_components.reporting.paper import paper_name
from deep_components.reporting.remarks import Remarks, Row, remarks_of
from deep_components.reporting.results import DECIMALS, Results, metric_title
from deep_components.reporting.statistics import CONFIDENCE, RESAMPLES, SIGNIFICANCE

TEST_NAMES = {"welch": "Welch's t-test over seeds", "paired": "t-test paired by seed"}
NOTHING = "-"  # in a cell that has no value


@dataclass(frozen=True)
class Style:
    """How a format writes names, numbers and marks. ``escape`` makes text from files harmless, and one line; an HTML
    style's other strings are of markupsafe's type, so that what is put into them is escaped.

    Args:
        number, best: templates of a number, and of the best of a column.
        marks: what follows a number that our method is significantly "better" or "worse" than.
        best_word: what the legend calls ``best``.
    """

    escape: Callable[[str], str] = printable
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


def fixed(value: float, sign: str = "") -> str:
    """The number to the decimals of the paper; with ``sign`` "+" always with one."""
    return NOTHING if pd.isna(value) else f"{value:{sign}.{DECIMALS}f}"


def p_value(value: float) -> str:
    least = 10**-DECIMALS
    return f"<{fixed(least)}" if value < least else fixed(value)


def mean_and_std(cell: Mapping[Any, Any] | pd.Series, plus_minus: str = " ± ") -> str:
    """A cell's number; "undefined" where a run has none."""
    if pd.isna(cell["mean"]):
        return "undefined"
    return fixed(cell["mean"]) + ("" if pd.isna(cell["std"]) else plus_minus + fixed(cell["std"]))


def metrics_document(results: Results, style: Style) -> Document:
    """The metrics of the methods, our method against the others, and the paper's numbers where they belong."""
    about, numbers = results.about, "one run each" if results.one_seed else "mean +- standard deviation over seeds"
    head = f"{about['setting']}, data: {about['data']}, test day {about['test_day']}, {about['num_requests']} requests"
    head += f" with up to {about['test_random_items']} random items each" if about["test_random_items"] else ""
    tables = [metrics_table(results, style)]
    tables += [comparison_table(results, results.metrics[0], style)] if len(results.compared) else []
    tables += [paper_table(results, style)] if len(results.with_paper) else []
    tables += [made] if (made := corpus_table(results.runs, style)) else []
    data = results.cells.copy()
    for index, name in enumerate(("setting", "data", "test_day", "num_requests")):
        data.insert(index, name, about[name])
    data["code"] = [results.remarks.codes[name, about["setting"], about["data"]] for name in data["method"]]
    heading = [style.escape(line) for line in (f"{head}; {numbers}", *results.warnings)]
    notes = [style.escape(line) for line in (*results.notes, *_left_out(results.left_out))]
    return Document(heading, tables, notes, data, _more(results))


def _left_out(reasons: Mapping[Any, str]) -> list[str]:
    return [f"left out: {reason}" for reason in reasons.values()]


def _legend(results: Results, style: Style) -> tuple[str, ...]:
    """What the marks in the table mean; nothing for marks that are not there."""
    words = []
    if results.cells["best"].any():
        words.append(f"{style.best_word}: {'best' if results.one_seed else 'best mean'}.")
    tested = results.compared[results.compared["p"].notna()]["method"].nunique()
    if tested:
        baselines = f"{tested} {'baseline' if tested == 1 else 'baselines'}"
        rest = (
            f" significantly higher than {style.row(str(results.ours))} at the {SIGNIFICANCE:.0%} level (two-sided "
            f"{TEST_NAMES[results.test]}, Holm's correction over {baselines})."
        )
        lower, higher = (style.number.format(style.marks[verdict]).strip() for verdict in ("better", "worse"))
        words.append(lower + " significantly lower, " + higher + style.escape(rest))
    return tuple(words)


def metrics_table(results: Results, style: Style) -> Table:
    """A row per method, a column per metric."""
    cells, remarks = [results.of(metric) for metric in results.metrics], results.remarks
    seeds = results.runs["row"].value_counts()
    rows = []
    for name in results.rows:
        row = (name, results.about["setting"], results.about["data"])
        rows.append([style.name(name), *(_number(c.loc[name], style) for c in cells)])
        rows[-1] += _seeds_and_code(int(seeds[name]), row, remarks, style)
    header = ["method", *style.columns(results.metrics), "seeds", *([] if remarks.alike else ["code"])]
    return Table("", header, rows, (*_legend(results, style), *map(style.escape, remarks.below)))


def _seeds_and_code(seeds: int, row: Row, remarks: Remarks, style: Style) -> list[str]:
    """The number of seeds with the row's marks, and where codes differ the row's."""
    cells = [f"{seeds}{remarks.marks.get(row, '')}"]
    return [style.escape(cell) for cell in (*cells, *([] if remarks.alike else [remarks.codes[row]]))]


def _number(cell: pd.Series, style: Style) -> str:
    number = mean_and_std(cell, style.plus_minus)
    if number == "undefined":
        return number
    return style.number.format(
        (style.best.format(number) if cell["best"] else number) + style.marks.get(cell["ours_is"], "")
    )


def comparison_table(results: Results, metric: str, style: Style) -> Table:
    """Our method against each baseline in one metric."""
    ours, rows = style.row(str(results.ours)), []
    title = f"{style.metric(metric)}, {ours} minus each baseline; {CONFIDENCE:.0%} bootstrap interval over requests"
    for made in results.compared[results.compared["metric"] == metric].to_dict("records"):
        low, high = (fixed(made[f"interval_{end}"], "+") for end in ("low", "high"))
        interval = low if low == NOTHING else f"[{low}, {high}]"
        numbers = [fixed(made["difference"], "+"), interval, p_value(made["p"]), p_value(made["p_holm"])]
        rows.append([style.name(made["method"]), *map(style.escape, numbers), made["ours_is"]])
    header = ["baseline", "difference", f"{CONFIDENCE:.0%} interval", "p", "p (Holm)", f"{ours} is"]
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
    difference = "undefined" if pd.isna(cell["mean"]) else fixed(cell["difference_to_paper"], "+")
    return f"{fixed(cell['paper_mean'])} ({difference})"


def corpus_table(runs: pd.DataFrame, style: Style) -> Table | None:
    """What the served cascade finds over whole corpora, a row per method and corpus; None where no run has been
    evaluated on one."""
    metrics = [name for name in runs if name.startswith(CORPUS) and "@" in name]
    if not metrics:
        return None
    rows = []
    about = [f"{CORPUS}{name}" for name in ("items", "checksum", "filter_seen")]
    for (row, items, checksum, filtered), seeds in runs.groupby(["row", *about], sort=False):
        numbers = [{"mean": seeds[name].mean(skipna=False), "std": seeds[name].std(skipna=False)} for name in metrics]
        shown = [style.number.format(mean_and_std(cell, style.plus_minus)) for cell in numbers]
        corpus = f"{items:,} ({checksum[:8]}){', seen ones left out' if filtered else ''}"
        rows.append([style.name(str(row)), *shown, style.escape(corpus), str(len(seeds))])
    header = ["method", *style.columns([name.removeprefix(CORPUS) for name in metrics])]
    title = "Over a whole corpus: the share of the ground truth that is served, and that is left after each stage"
    return Table(title, [*header, "items", "seeds"], rows)


def _more(results: Results) -> dict[str, Any]:
    """What the JSON says beside the table, with the value of every run."""
    corpus = [name for name in results.runs if name.startswith(CORPUS)]
    runs = results.runs[["row", "folder", "seed", "commit", "code", "skipped_steps", *results.metrics, *corpus]]
    return {
        **results.about,
        "ours": results.ours,
        "test": f"two-sided {TEST_NAMES[results.test]}, Holm's correction over the baselines of a metric",
        "interval": f"{CONFIDENCE:.0%} percentile bootstrap over requests, paired, {RESAMPLES} resamples",
        "test_over_requests": "p_requests: two-sided t-test paired by request, of the means over seeds, not corrected",
        "warnings": results.warnings,
        "notes": [*results.notes, *results.remarks.lines],
        "left_out": results.left_out,
        "runs": _records(runs.assign(folder=[printable(str(folder)) for folder in runs["folder"]])),
    }


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
    table[["memory", "gpu_memory"]] /= 1 << 30
    table.insert(8, "requests_per_second", table["requests"] / table["seconds"].clip(lower=1e-9))
    return table.sort_values("method", key=lambda names: pd.Series(pd.factorize(names)[0], names.index))


def costs_table(table: pd.DataFrame, style: Style, remarks: Remarks = Remarks()) -> Table:  # noqa: B008 - frozen
    rows = []
    for row in table.to_dict("records"):
        memory = [NOTHING if pd.isna(row[name]) else f"{row[name]:.2f} GiB" for name in ("memory", "gpu_memory")]
        numbers = [f"{row['requests']:.0f}", f"{row['seconds']:.1f}", f"{row['requests_per_second']:.0f}", *memory]
        device = "unknown" if pd.isna(row["device"]) else str(row["device"])
        device += "" if pd.isna(row["threads"]) else f", threads: {row['threads']}"
        seeds, *code = _seeds_and_code(row["seeds"], (row["method"], row["setting"], row["data"]), remarks, style)
        words = [style.name(row["method"]), style.escape(row["setting"]), seeds]
        rows.append([*words, *numbers, style.escape(device), *code])
    header = ["method", "setting", "seeds", "requests", "seconds", "requests/s", "memory", "GPU memory", "device"]
    return Table("", [*header, *([] if remarks.alike else ["code"])], rows, tuple(map(style.escape, remarks.below)))


def costs_document(runs: pd.DataFrame, style: Style, any_code: bool = False) -> Document:
    """Time and memory of the methods' trainings. Runs of other settings, logs and test days stand in rows of their own;
    of those of one, the same may stand in one row as in a table of metrics."""
    groups = [comparable_rows(group, any_code) for group in by_table(runs)]
    labelled = pd.concat([_told_apart(group, groups) for group in groups])
    table = costs(labelled)
    if table.empty:
        raise InputError(
            f"{', '.join(map(str, runs['folder']))}: no training.json says what training took; train again"
        )
    head = f"training time and peak memory, data: {', '.join(sorted(runs['data'].unique()))}; means over seeds"
    remarks = remarks_of(labelled[labelled["row"].isin(table["method"]) & ~labelled["untrained"]])
    return Document([style.escape(head)], [costs_table(table, style, remarks)], [], table)


def _told_apart(group: pd.DataFrame, groups: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The group with what tells its rows from rows of the same name, setting and log in other groups."""
    same = [other for other in groups if _where(other) & _where(group)]
    details = ", ".join(f"{name}={group.iloc[0][name]}" for name in differing(same))
    return group.assign(row=group["row"] + (f" ({details})" if details else ""))


def _where(runs: pd.DataFrame) -> set[Row]:
    return set(runs[["row", "setting", "data"]].itertuples(index=False, name=None))


def streaming_document(collected: Collected, style: Style, any_code: bool = False) -> Document:
    """Joint recall day by day, a column per method; InputError when no run was made as a stream."""
    runs, problems = comparable_rows(collected.runs, any_code), list[str]()
    metric = runs["metrics"].iloc[0][0]
    curves = streaming_curves(runs, metric, problems)
    if not curves:
        folders = ", ".join(map(str, runs["folder"]))
        raise InputError("; ".join(problems) or f"{folders}: no streaming.json; make the runs with --streaming")
    first = runs.iloc[0]
    head = f"{first['setting']}, data: {first['data']}, {metric} of each day after training on all before it; "
    data = pd.concat([curve.assign(method=name, metric=metric) for name, curve in curves.items()])
    data = data.reset_index(names="test_day")[["method", "metric", "test_day", "mean", "low", "high"]]
    notes = [style.escape(note) for note in (*problems, *_left_out(collected.left_out))]
    table = streaming_table(curves, style, remarks_of(runs[runs["row"].isin(curves)]))
    return Document([style.escape(head + "means over seeds")], [table], notes, data)


def streaming_table(curves: Mapping[str, pd.DataFrame], style: Style, remarks: Remarks = Remarks()) -> Table:  # noqa: B008
    """A row per test day, a column per method."""
    means = pd.DataFrame({name: curve["mean"] for name, curve in curves.items()}).sort_index()
    rows = [[style.escape(str(day)), *map(fixed, values)] for day, *values in means.reset_index().to_numpy()]
    marks = {name: style.escape(mark) for (name, *_), mark in remarks.marks.items()}
    header = ["test day", *(style.name(name) + marks.get(name, "") for name in means)]
    return Table("", header, rows, tuple(map(style.escape, remarks.below_without_column)))


def text(make: Maker) -> str:
    """Aligned columns for a terminal, the header underlined."""
    document = make(Style())
    lines = list(document.heading)
    for table in document.tables:
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        rows = [table.header, ["-" * width for width in widths], *table.rows]
        lines += ["", table.title] if table.title else []
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        lines += ["", " ".join(table.below)] if table.below else []
    lines += ["", *document.notes] if document.notes else []
    return "\n".join([*lines, ""])


_MARKDOWN_LETTERS = re.compile(r"([\\`*_{}\[\]<>|#~&!$]|:(?=//)|(?<=www)\.)")  # the last two make links of addresses
_MARKDOWN = Style(
    escape=lambda words: _MARKDOWN_LETTERS.sub(r"\\\1", printable(words)), metric=metric_title, plus_minus=" ± ",
    best="**{}**", best_word="Bold", marks={"better": " ↓", "worse": " ↑"},
)  # fmt: skip


def markdown(make: Maker) -> str:
    document = make(_MARKDOWN)
    parts = [document.heading[0].replace("+-", "±"), *(f"**{line}**" for line in document.heading[1:])]
    for table in document.tables:
        lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        parts += filter(None, [table.title, "\n".join(lines), " ".join(table.below)])
    return "\n\n".join([*parts, *document.notes]) + "\n"


_LATEX_LETTERS: dict[str, str | int | None] = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after the end of a row they would be its options
}  # fmt: skip
_LATEX = Style(
    escape=lambda words: printable(words).translate(str.maketrans(_LATEX_LETTERS)), row=paper_name, metric=metric_title,
    plus_minus=r" \pm ", number="${}$", best=r"\mathbf{{{}}}", best_word="Bold",
    marks={"better": r"^{\downarrow}", "worse": r"^{\uparrow}"},
)  # fmt: skip


def latex(make: Maker) -> str:
    """Tables as they stand in a paper, with booktabs."""
    document = make(_LATEX)
    about, *warnings = document.heading
    first = " ".join([*(rf"\textbf{{{line}.}}" for line in warnings), about.replace("+-", r"$\pm$") + "."])
    tables = ["% needs \\usepackage{booktabs}"]
    for index, table in enumerate(document.tables):
        words = pd.DataFrame(table.rows, columns=table.header, dtype=object)
        columns, caption = (
            "l" + "c" * (len(table.header) - 1),
            " ".join([table.title if index else first, *table.below]),
        )
        made = words.to_latex(index=False, escape=False, column_format=columns, position="t", caption=caption)
        tables.append(made.replace("[t]", "[t]\n\\centering", 1))
    return "\n".join([*tables, *(f"% {note}" for note in document.notes), ""])


_FORMULA = re.compile("((?:^|[;,|]) *)([=+@\uff1d\uff0b\uff0d\uff20-])")  # the same four in full width too


def csv(make: Maker) -> str:
    """A line per record. What a spreadsheet would take for a formula gets an apostrophe before it: at the beginning of
    a name, and after a sign that separates cells in some countries."""
    return make(Style()).data.map(_no_formula).to_csv(index=False, lineterminator="\n")


def _no_formula(value: Any) -> Any:
    return _FORMULA.sub(r"\1'\2", printable(value)) if isinstance(value, str) else value


def json_table(make: Maker) -> str:
    """Everything there is."""
    document = make(Style())
    return json.dumps({**document.more, "results": _records(document.data)}, indent=2, allow_nan=False) + "\n"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON has them; null for what is missing."""

    def plain(value: Any) -> Any:
        return None if pd.isna(value) else value.item() if hasattr(value, "item") else value

    return [{str(name): plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


FORMATS: dict[str, Callable[[Maker], str]] = {
    "text": text, "markdown": markdown, "csv": csv, "latex": latex, "json": json_table
}  # fmt: skip
SUFFIXES = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}
