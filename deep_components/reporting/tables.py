"""Results as text, Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deep_components.reporting.results import DECIMALS, Cell, Comparison, Results, Row, metric_title
from deep_components.reporting.runs import Run
from deep_components.reporting.statistics import CONFIDENCE, RESAMPLES, SIGNIFICANCE
from deep_components.text import aligned

TEST_NAMES = {"welch": "Welch's t-test over seeds", "paired": "t-test paired by seed"}


@dataclass(frozen=True)
class _Style:
    """How a format writes a number and its marks."""

    plus_minus: str
    best: Callable[[str], str]
    below: str
    above: str
    escape: Callable[[str], str]
    metric: Callable[[str], str]


@dataclass(frozen=True)
class _Block:
    """A table: a line above it, its header, its rows, and lines below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    below: list[str]


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return "" if value is None else f"{value:+.{DECIMALS}f}"


def p_value(value: float | None) -> str:
    """A p-value to the decimals of the tables."""
    least = 10**-DECIMALS
    return "" if value is None else f"<{least:.{DECIMALS}f}" if value < least else f"{value:.{DECIMALS}f}"


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]"


def legend(results: Results) -> str:
    """What the marks for significance mean, without the marks themselves."""
    tested = {made.baseline for made in results.comparisons if made.p is not None}
    return (
        f"than {results.ours} at the {SIGNIFICANCE:.0%} level (two-sided {TEST_NAMES[results.test]}, Holm's correction "
        f"over {len(tested)} {'baseline' if len(tested) == 1 else 'baselines'})"
    )


def heading(results: Results) -> str:
    """What the numbers are, in a line."""
    about = results.about
    return (
        f"{about['setting']}, data: {about['data']}, test day {about['test_day']}, {about['num_requests']} requests; "
        "mean +- standard deviation over seeds"
    )


# ---- text and Markdown -----------------------------------------------------------------------------------------------


def text(results: Results) -> str:
    """Aligned columns for a terminal."""
    style = _Style(" +- ", lambda number: f"{number} *", " <", " >", str, str)
    blocks = _blocks(results, style, "*", "<", ">")
    lines = [heading(results), *results.warnings]
    for block in blocks:
        lines += ["", *([block.title, ""] if block.title else []), *aligned([block.header, *block.rows])]
        lines += ["", *block.below] if block.below else []
    lines += ["", *results.notes] if results.notes else []
    lines += _left_out(results)
    return "\n".join([*lines, ""])


def markdown(results: Results) -> str:
    """Tables of Markdown."""
    style = _Style(" ± ", lambda number: f"**{number}**", " ↓", " ↑", _escape_markdown, metric_title)
    lines = [_escape_markdown(heading(results).replace("+-", "±")), ""]
    lines += [f"**{_escape_markdown(warning)}**\n" for warning in results.warnings]
    for block in _blocks(results, style, "Bold", "↓", "↑"):
        lines += [f"{block.title}\n"] if block.title else []
        lines += [_markdown_row(block.header), _markdown_row(["---"] * len(block.header))]
        lines += [*map(_markdown_row, block.rows), ""]
        lines += [f"{line}\n" for line in block.below]
    lines += [f"{_escape_markdown(note)}\n" for note in (*results.notes, *_left_out(results)) if note]
    return "\n".join(lines).rstrip() + "\n"


def _blocks(results: Results, style: _Style, best: str, below: str, above: str) -> list[_Block]:
    """The table of the metrics, our method against the others, and the paper beside; ``best``, ``below`` and ``above``
    are the marks as the legend names them."""
    explained = []
    if any(cell.best for row in results.rows for cell in row.cells.values()):
        explained.append(f"{best}: best mean.")
    if any(comparison.p is not None for comparison in results.comparisons):
        explained.append(style.escape(f"{below} significantly lower, {above} significantly higher {legend(results)}."))
    header = ["method", *map(style.metric, results.metrics), "seeds"]
    body = []
    for row in results.rows:
        numbers = [_number(results, row, metric, style) for metric in results.metrics]
        body.append([style.escape(row.name), *numbers, str(len(row.runs))])
    blocks = [_Block("", header, body, [" ".join(explained)] if explained else [])]
    if results.comparisons:
        blocks.append(_comparison_block(results, style))
    if results.has_paper:
        blocks.append(_paper_block(results, style))
    return blocks


def _number(results: Results, row: Row, metric: str, style: _Style) -> str:
    """A cell with its marks."""
    cell = row.cells[metric]
    number = mean_and_std(cell, style.plus_minus)
    if cell.best:
        number = style.best(number)
    comparison = results.comparison(row.name, metric)
    verdict = comparison.verdict if comparison else ""
    return number + {"better": style.below, "worse": style.above}.get(verdict, "")


def mean_and_std(cell: Cell, plus_minus: str = " +- ") -> str:
    """A cell's number; "undefined" where a run has none."""
    if cell.mean is None:
        return "undefined"
    std = "" if cell.std is None else f"{plus_minus}{cell.std:.{DECIMALS}f}"
    return f"{cell.mean:.{DECIMALS}f}{std}"


def _comparison_block(results: Results, style: _Style) -> _Block:
    title = (
        f"{style.metric(results.headline)}, {style.escape(str(results.ours))} less each baseline; "
        f"{CONFIDENCE:.0%} bootstrap interval over requests"
    )
    verdict = style.escape(f"{results.ours} is")
    header = ["baseline", "difference", f"{CONFIDENCE:.0%} interval", "p", "p (Holm)", verdict]
    body = [
        [style.escape(cell) for cell in comparison_cells(comparison)]
        for comparison in results.compared(results.headline)
    ]
    return _Block(title, header, body, [])


def comparison_cells(comparison: Comparison) -> list[str]:
    """A comparison in words and numbers: baseline, difference, interval, p, corrected p, verdict."""
    return [
        *(comparison.baseline, signed(comparison.difference), interval_text(comparison.interval)),
        *(p_value(comparison.p), p_value(comparison.p_holm), comparison.verdict),
    ]


def _paper_block(results: Results, style: _Style) -> _Block:
    """The paper's number, and ours less it."""
    body = []
    for row in results.rows:
        cells = [row.cells[metric] for metric in results.metrics]
        if any(cell.paper for cell in cells):
            body.append([style.escape(row.name), *map(paper_cell, cells)])
    header = ["method", *map(style.metric, results.metrics)]
    return _Block("The paper's mean, and in brackets ours less it", header, body, [])


def paper_cell(cell: Cell) -> str:
    if cell.paper is None:
        return ""
    return f"{cell.paper.mean:.{DECIMALS}f} ({signed(cell.paper_difference) or 'undefined'})"


def _left_out(results: Results) -> list[str]:
    return ["", *(f"left out: {reason}" for reason in results.left_out.values())] if results.left_out else []


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(words: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", words)


# ---- LaTeX -----------------------------------------------------------------------------------------------------------

_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def latex(results: Results) -> str:
    """Tables as they stand in a paper, with booktabs."""
    explained = []
    if any(cell.best for row in results.rows for cell in row.cells.values()):
        explained.append("Bold: best mean.")
    if any(comparison.p is not None for comparison in results.comparisons):
        words = _escape_latex(legend(results))
        explained.append(f"$^{{\\downarrow}}$ and $^{{\\uparrow}}$: significantly lower and higher {words}.")
    about = {name: _escape_latex(str(value)) for name, value in results.about.items()}
    caption = (
        f"{_setting_title(results)} cascade on the {about['data']} log, test day {about['test_day']} "
        f"({about['num_requests']} requests): mean and standard deviation over seeds. {' '.join(explained)}"
    )
    caption = " ".join([*(f"\\textbf{{{_escape_latex(warning)}.}}" for warning in results.warnings), caption])
    trained, untrained = ([row for row in results.rows if row.untrained is flag] for flag in (False, True))
    groups = [[_latex_row(results, row) for row in part] for part in (trained, untrained) if part]
    setting = str(results.about["setting"])
    tables = [_latex_table(results, caption, f"tab:{setting}", groups)]
    if results.has_paper:
        block = _paper_block(results, _Style("", str, "", "", _escape_latex, metric_title))
        caption = f"{block.title}. {_setting_title(results)} cascade."
        tables.append(_latex_table(results, caption, f"tab:{setting}_paper", [block.rows]))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(tables)


def _setting_title(results: Results) -> str:
    return _escape_latex(str(results.about["setting"]).replace("_", "-").capitalize())


def _latex_table(results: Results, caption: str, label: str, groups: Sequence[Sequence[Sequence[str]]]) -> str:
    bodies = ["\n".join(f"{' & '.join(row)} \\\\" for row in group) for group in groups]
    return "\n".join(
        [
            *("\\begin{table}[t]", "\\centering", f"\\caption{{{caption.strip()}}}", f"\\label{{{label}}}"),
            f"\\begin{{tabular}}{{l{'c' * len(results.metrics)}}}",
            *("\\toprule", f"Method & {' & '.join(map(metric_title, results.metrics))} \\\\", "\\midrule"),
            "\n\\midrule\n".join(bodies),
            *("\\bottomrule", "\\end{tabular}", "\\end{table}", ""),
        ]
    )


def _latex_row(results: Results, row: Row) -> list[str]:
    return [_escape_latex(row.name), *(_latex_number(results, row, metric) for metric in results.metrics)]


def _latex_number(results: Results, row: Row, metric: str) -> str:
    cell = row.cells[metric]
    if cell.mean is None:
        return "--"
    number = f"{cell.mean:.{DECIMALS}f}"
    number = f"\\mathbf{{{number}}}" if cell.best else number
    std = "" if cell.std is None else f" \\pm {cell.std:.{DECIMALS}f}"
    comparison = results.comparison(row.name, metric)
    mark = {"better": "^{\\downarrow}", "worse": "^{\\uparrow}"}.get(comparison.verdict if comparison else "", "")
    return f"${number}{std}{mark}$"


def _escape_latex(words: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in words)


# ---- for programs ----------------------------------------------------------------------------------------------------


def records(results: Results) -> list[dict[str, Any]]:
    """A record for each method and metric; the same fields in all."""
    about = {name: results.about[name] for name in ("setting", "data", "test_day", "num_requests")}
    return [
        about | {"method": row.name, "metric": metric} | _cell_record(cell) | _comparison_record(results, row, metric)
        for row in results.rows
        for metric, cell in row.cells.items()
    ]


def _cell_record(cell: Cell) -> dict[str, Any]:
    return {
        "mean": cell.mean,
        "std": cell.std,
        "seeds": len(cell.values),
        "best": cell.best,
        "paper_mean": cell.paper and cell.paper.mean,
        "paper_std": cell.paper and cell.paper.std,
        "paper_table": cell.paper and cell.paper.table,
        "difference_to_paper": cell.paper_difference,
    }


def _comparison_record(results: Results, row: Row, metric: str) -> dict[str, Any]:
    """Our method less this row; empty for our own row and untrained ones."""
    found = results.comparison(row.name, metric)
    compared = found is not None
    found = found or Comparison(row.name, metric, None)
    low, high = found.interval or (None, None)
    return {
        "ours": results.ours if compared else None,
        "difference": found.difference,
        "interval_low": low,
        "interval_high": high,
        "p": found.p,
        "p_holm": found.p_holm,
        "ours_is": found.verdict if compared else None,
    }


def csv_table(results: Results) -> str:
    """A line for each method and metric."""
    lines = records(results)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def json_table(results: Results) -> str:
    """Everything, with the value of every run."""
    cells = [cell for row in results.rows for cell in row.cells.values()]
    content = {
        **results.about,
        "ours": results.ours,
        "test": f"two-sided {TEST_NAMES[results.test]}, Holm's correction over the baselines of a metric",
        "interval": f"{CONFIDENCE:.0%} percentile bootstrap over requests, paired, {RESAMPLES} resamples",
        "warnings": results.warnings,
        "notes": results.notes,
        "left_out": results.left_out,
        "runs": {row.name: [_run_record(run) for run in row.runs] for row in results.rows},
        "results": [
            record | {"values": list(cell.values)} for record, cell in zip(records(results), cells, strict=True)
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _run_record(run: Run) -> dict[str, Any]:
    return {"folder": str(run.folder), "seed": run.seed, "commit": run.results.get("commit")}


FORMATS: dict[str, Callable[[Results], str]] = {
    "text": text,
    "markdown": markdown,
    "csv": csv_table,
    "latex": latex,
    "json": json_table,
}
SUFFIXES = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}
