"""The table in every format: the same numbers and marks, each format's own rules kept."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deep_components.reporting.results import Results, build_results
from deep_components.reporting.runs import read_runs
from deep_components.reporting.tables import FORMATS, csv_table, json_table, latex, markdown, text
from tests.reporting.fake_runs import add_requests, write_run, write_runs
from tests.reporting.test_paper import PAPER_ARGUMENTS, PAPER_CONFIG

JOINT = "joint_recall@10@20"
NASTY = r"a_b|c*d<e>&f%g$h#i{j}k~l^m\n"


def results_of(folder: Path, **options: Any) -> Results:
    return build_results(read_runs([folder]), **options)


def rows(table: str) -> dict[str, list[str]]:
    """The first table's rows by method, cells separated by two blanks or more."""
    lines = [*table.splitlines(), ""]
    start = next(place for place, line in enumerate(lines) if line.startswith("method"))
    split = [re.split(r" {2,}", line) for line in lines[start : lines.index("", start)]]
    return {cells[0]: cells[1:] for cells in split if not cells[0].startswith("---")}


@pytest.fixture
def three(tmp_path: Path) -> Results:
    """lcron, which is worse than the best, and better than the lowest, row; and an untrained cascade."""
    write_runs(tmp_path / "best", (0.90, 0.91, 0.905), name="best")
    write_runs(tmp_path / "lcron", (0.80, 0.81, 0.805), name="lcron")
    write_runs(tmp_path / "low", (0.70, 0.71, 0.705), name="low")
    write_runs(tmp_path / "untrained", (0.50, 0.51, 0.505), epochs=0)
    return results_of(tmp_path)


def test_text(three: Results) -> None:
    table = rows(text(three))
    assert table["method"] == [JOINT, "rank_ndcg@10", "seeds"]
    assert table["best"][0] == "0.9050 +- 0.0050 * >"
    assert table["lcron"][0] == "0.8050 +- 0.0050"
    assert table["low"][0] == "0.7050 +- 0.0050 <"
    assert table["untrained"] == ["0.5050 +- 0.0050", "0.2500 +- 0.0000", "3"]
    assert "over 2 baselines" in text(three)
    assert re.search(r"^low +\+0\.1000 +.* better$", text(three), re.MULTILINE)
    assert re.search(r"^best +-0\.1000 +.* worse$", text(three), re.MULTILINE)


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30", 0.875)
    table = text(results_of(tmp_path))
    assert rows(table)["lcron"] == ["0.8750", "0.2500", "1"]
    assert "*" not in table and "significant" not in table  # nothing is explained that is not there


def test_the_head_says_what_the_numbers_are(tmp_path: Path) -> None:
    write_run(tmp_path / "a", results={"data": "simulated", "warning": "SIMULATED DATA: means nothing"})
    head = text(results_of(tmp_path)).splitlines()
    assert head[0].startswith("two_stage, data: simulated, test day 2024-02-04, 40 requests")
    assert head[1] == "SIMULATED DATA: means nothing"
    assert "SIMULATED DATA" in markdown(results_of(tmp_path))
    assert "SIMULATED DATA" in latex(results_of(tmp_path))


def test_an_undefined_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "one", None)
    write_run(tmp_path / "two", 0.5, seed=31)
    results = results_of(tmp_path)
    assert rows(text(results))["lcron"][0] == "undefined"
    assert "& -- &" in latex(results)
    assert json.loads(json_table(results))["results"][0]["mean"] is None


def test_intervals_are_shown(tmp_path: Path) -> None:
    for name, low, high in (("lcron", 0.5, 0.7), ("bce", 0.4, 0.4)):
        add_requests(write_run(tmp_path / name, name=name), [low, high] * 20)
    table = text(results_of(tmp_path))
    (found,) = re.findall(r"^bce +\+0\.2000 +\[\+0\.1(\d+), \+0\.2(\d+)\] +not tested$", table, re.MULTILINE)
    assert found


def test_markdown(three: Results) -> None:
    lines = markdown(three).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| method | Joint Recall@10@20 | Rank NDCG@10 | seeds |"
    assert "| best | **0.9050 ± 0.0050** ↑ |" in table[2]
    assert "| low | 0.7050 ± 0.0050 ↓ |" in table[4]
    assert all(line.startswith("|") and line.endswith("|") for line in table)


def test_markdown_of_names_that_would_be_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "one", name=NASTY)
    (line,) = [line for line in markdown(results_of(tmp_path)).splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5  # the columns' borders alone
    assert r"\<e\>" in line


def test_latex(three: Results) -> None:
    table = latex(three)
    assert "\\usepackage{booktabs}" in table.splitlines()[0]
    assert [table.count(f"\\{rule}") for rule in ("toprule", "bottomrule", "begin{", "end{")] == [1, 1, 2, 2]
    assert "best & $\\mathbf{0.9050} \\pm 0.0050^{\\uparrow}$ &" in table
    assert "low & $0.7050 \\pm 0.0050^{\\downarrow}$ &" in table
    assert table.index("\\midrule\nuntrained") > table.index("low &")
    assert "Two-stage cascade" in table and "5\\% level" in table
    header = next(line for line in table.splitlines() if line.startswith("Method"))
    assert header.count("&") == 2 and "{lcc}" in table


def test_latex_of_names_that_would_be_commands(tmp_path: Path) -> None:
    write_run(tmp_path / "one", name=NASTY)
    (line,) = [line for line in latex(results_of(tmp_path)).splitlines() if line.startswith("a")]
    name = line.partition(" & ")[0]
    expected = r"a\_b\textbar{}c*d\textless{}e\textgreater{}\&f\%g\$h\#i\{j\}k\textasciitilde{}l\textasciicircum{}m"
    assert name == expected + r"\textbackslash{}n"


def test_csv(three: Results) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(three))))
    assert len(lines) == 4 * 2  # methods times metrics
    by_method = {line["method"]: line for line in lines if line["metric"] == JOINT}
    assert float(by_method["low"]["mean"]) == pytest.approx(0.705)
    assert float(by_method["low"]["difference"]) == pytest.approx(0.1)
    assert (by_method["low"]["ours"], by_method["low"]["ours_is"]) == ("lcron", "better")
    assert by_method["best"]["ours_is"] == "worse" and by_method["best"]["best"] == "True"
    assert by_method["lcron"]["ours"] == by_method["untrained"]["ours"] == by_method["lcron"]["p"] == ""


def test_json(three: Results) -> None:
    content = json.loads(json_table(three))
    assert content["ours"] == "lcron" and content["test_day"] == "2024-02-04"
    (low,) = [r for r in content["results"] if (r["method"], r["metric"]) == ("low", JOINT)]
    assert low["values"] == [0.7, 0.71, 0.705] and low["p_holm"] >= low["p"] > 0
    assert [run["seed"] for run in content["runs"]["low"]] == [30, 31, 32]


@pytest.mark.parametrize("form", FORMATS)
def test_the_paper_stands_beside_runs_on_recflow(form: str, tmp_path: Path) -> None:
    for seed, recall in ((30, 0.87), (31, 0.88)):
        write_run(tmp_path / str(seed), recall, seed=seed, arguments=PAPER_ARGUMENTS, config=PAPER_CONFIG)
    shown = FORMATS[form](results_of(tmp_path))
    assert "0.8732" in shown  # the paper's
    assert "0.0018" in shown or "0.00180" in shown or "0.00179" in shown  # 0.875 - 0.8732


@pytest.mark.parametrize("form", FORMATS)
def test_without_the_paper_it_is_not_mentioned(form: str, three: Results) -> None:
    assert "The paper's" not in FORMATS[form](three)
    assert "0.87" not in FORMATS[form](three)
