"""The tables in every format: the same numbers and marks, each format's own rules kept."""

import csv
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deep_components.errors import InputError
from deep_components.reporting.frame import frame, read_runs
from deep_components.reporting.results import build_results
from deep_components.reporting.tables import FORMATS, Style, costs_document, metrics_document, streaming_document
from tests.reporting.fake_runs import add_requests, corpus, write_costs, write_run, write_runs, write_streaming
from tests.reporting.test_paper import PAPER_ARGUMENTS, PAPER_CONFIG

JOINT = "joint_recall@10@20"
NASTY = r"a_b|c*d<e>&f%g$h#i{j}k~l^m\n"


def shown(folder: Path, form: str = "text") -> str:
    return FORMATS[form](partial(metrics_document, build_results(read_runs([folder]))))


def rows(table: str) -> dict[str, list[str]]:
    """The first table's rows by their first cell; cells are separated by two blanks or more."""
    lines = [*table.splitlines(), ""]
    start = next(index for index, line in enumerate(lines) if line.startswith("---"))
    split = [re.split(r" {2,}", line) for line in lines[start - 1 : lines.index("", start)]]
    return {cells[0]: cells[1:] for cells in split if not cells[0].startswith("---")}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """lcron, which is worse than the best, and better than the lowest, row; and an untrained cascade."""
    write_runs(tmp_path / "best", (0.90, 0.91, 0.905), name="best")
    write_runs(tmp_path / "lcron", (0.80, 0.81, 0.805), name="lcron")
    write_runs(tmp_path / "low", (0.70, 0.71, 0.705), name="low")
    write_runs(tmp_path / "untrained", (0.50, 0.51, 0.505), epochs=0)
    return tmp_path


def test_text(three: Path) -> None:
    table = rows(shown(three))
    assert table["method"] == [JOINT, "rank_ndcg@10", "seeds"]
    assert table["best"][0] == "0.9050 +- 0.0050 * >"
    assert table["lcron"][0] == "0.8050 +- 0.0050"
    assert table["low"][0] == "0.7050 +- 0.0050 <"
    assert table["untrained"] == ["0.5050 +- 0.0050", "0.2500 +- 0.0000", "3"]
    assert "over 2 baselines" in shown(three)
    assert re.search(r"^low +\+0\.1000 +.* better$", shown(three), re.MULTILINE)
    assert re.search(r"^best +-0\.1000 +.* worse$", shown(three), re.MULTILINE)


def test_columns_are_aligned(three: Path) -> None:
    lines = shown(three).splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("---"))
    starts = [match.start() for match in re.finditer("-+", lines[rule])]
    for line in (lines[rule - 1], *lines[rule + 1 : rule + 5]):
        assert all(line[start] != " " and (start == 0 or line[start - 1] == " ") for start in starts)


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30", 0.875, results={"data": "simulated", "warning": "SIMULATED DATA: means nothing"})
    table = shown(tmp_path)
    assert rows(table)["lcron"] == ["0.8750", "0.2500", "1"]
    assert table.splitlines()[0] == "two_stage, data: simulated, test day 2024-02-04, 40 requests; one run each"
    assert table.splitlines()[1] == "SIMULATED DATA: means nothing"
    assert "*" not in table and "significant" not in table  # nothing is explained that is not there
    assert "SIMULATED DATA" in shown(tmp_path, "markdown") and "SIMULATED DATA" in shown(tmp_path, "latex")


def test_an_undefined_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "one", None)
    write_run(tmp_path / "two", 0.5, seed=31)
    assert rows(shown(tmp_path))["lcron"][0] == "undefined"
    assert json.loads(shown(tmp_path, "json"))["results"][0]["mean"] is None


def test_intervals_are_shown(tmp_path: Path) -> None:
    for name, low, high in (("lcron", 0.5, 0.7), ("bce", 0.4, 0.4)):
        add_requests(write_run(tmp_path / name, name=name), [low, high] * 20)
    assert re.search(r"^bce +\+0\.2000 +\[\+0\.1\d+, \+0\.2\d+\] +- +- +not tested$", shown(tmp_path), re.MULTILINE)


def test_markdown(three: Path) -> None:
    table = [line for line in shown(three, "markdown").splitlines() if line.startswith("|")]
    assert table[0] == "| method | Joint Recall@10@20 | Rank NDCG@10 | seeds |"
    assert "| best | **0.9050 ± 0.0050** ↑ |" in table[2]
    assert "| low | 0.7050 ± 0.0050 ↓ |" in table[4]


def test_latex(three: Path) -> None:
    table = shown(three, "latex")
    assert "\\usepackage{booktabs}" in table.splitlines()[0]
    assert [table.count(f"\\{rule}") for rule in ("toprule", "bottomrule", "begin{", "end{")] == [2, 2, 4, 4]
    assert "best & $\\mathbf{0.9050 \\pm 0.0050}^{\\uparrow}$ &" in table
    assert "low & $0.7050 \\pm 0.0050^{\\downarrow}$ &" in table
    assert "LCRON & $0.8050 \\pm 0.0050$ &" in table  # the paper's name


def test_names_that_would_be_markup_or_formulas(tmp_path: Path) -> None:
    write_run(tmp_path / "one", name=NASTY)
    (line,) = [line for line in shown(tmp_path, "markdown").splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5  # the columns' borders alone
    assert r"\<e\>" in line
    (line,) = [line for line in shown(tmp_path, "latex").splitlines() if line.startswith("a")]
    escaped = r"a\_b\textbar{}c{*}d\textless{}e\textgreater{}\&f\%g\$h\#i\{j\}k\textasciitilde{}l\textasciicircum{}m"
    assert line.partition(" & ")[0] == escaped + r"\textbackslash{}n"


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_a_metric_s_name_is_escaped_too(form: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one", results={"rank_{x}|@5": 0.5})
    assert "Rank {x}" not in shown(tmp_path, form) and r"Rank \{X\}".lower() in shown(tmp_path, form).lower()


def test_a_name_is_no_formula_of_a_spreadsheet(tmp_path: Path) -> None:
    write_run(tmp_path / "one", name='=HYPERLINK("http://x")')
    (first, *_) = csv.DictReader(io.StringIO(shown(tmp_path, "csv")))
    assert first["method"] == '\'=HYPERLINK("http://x")'


def test_csv(three: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(shown(three, "csv"))))
    assert len(lines) == 4 * 2  # methods times metrics
    by_method = {line["method"]: line for line in lines if line["metric"] == JOINT}
    assert float(by_method["low"]["mean"]) == pytest.approx(0.705)
    assert float(by_method["low"]["difference"]) == pytest.approx(0.1)
    assert (by_method["low"]["ours"], by_method["low"]["ours_is"]) == ("lcron", "better")
    assert by_method["best"]["ours_is"] == "worse" and by_method["best"]["best"] == "True"
    assert by_method["lcron"]["ours"] == by_method["untrained"]["ours"] == by_method["lcron"]["p"] == ""


def test_json(three: Path) -> None:
    content = json.loads(shown(three, "json"))
    assert content["ours"] == "lcron" and content["test_day"] == "2024-02-04"
    (low,) = [r for r in content["results"] if (r["method"], r["metric"]) == ("low", JOINT)]
    assert low["p_holm"] >= low["p"] > 0
    assert [(run["seed"], run[JOINT]) for run in content["runs"] if run["row"] == "low"] == [
        *((30, 0.7), (31, 0.71), (32, 0.705))
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_the_paper_stands_beside_runs_on_recflow_alone(form: str, tmp_path: Path) -> None:
    for seed, recall in ((30, 0.87), (31, 0.88)):
        made_like = {"arguments": PAPER_ARGUMENTS, "config": PAPER_CONFIG}
        write_run(tmp_path / "recflow" / str(seed), recall, seed=seed, **made_like)  # type: ignore[arg-type]
        write_run(tmp_path / "other" / str(seed), recall, seed=seed, results={"data": "movielens"})
    table = shown(tmp_path / "recflow", form)
    assert "0.8732" in table  # the paper's
    assert re.search(r"0\.001(80?|79\d+)", table)  # 0.875 - 0.8732
    assert "0.8732" not in shown(tmp_path / "other", form)


def test_costs(tmp_path: Path) -> None:
    for seed, seconds in ((30, 4.0), (31, 6.0)):
        write_costs(write_run(tmp_path / f"two{seed}", seed=seed), seconds=seconds, peak_memory_bytes=seed << 30)
        other = write_run(
            tmp_path / f"three{seed}", seed=seed, results={"setting": "three_stage"}, arguments={"lr": 0.1}
        )
        write_costs(other)
    write_run(tmp_path / "untrained", epochs=0)
    table = partial(costs_document, frame(tmp_path))
    found = [line.split() for line in FORMATS["text"](table).splitlines() if line.startswith("lcron")]
    numbers = ["2", "960", "5.0", "192", "31.00", "GiB", "-", "unknown"]
    assert found[1] == ["lcron", "two_stage", *numbers]
    assert found[0][:6] == ["lcron", "three_stage", "2", "960", "4.0", "240"]
    with pytest.raises(InputError, match="train again"):
        costs_document(frame(tmp_path / "untrained"), None)  # type: ignore[arg-type]


def test_costs_of_other_trainings_are_not_averaged(tmp_path: Path) -> None:
    """Other learning rates under one name, each with a test day of its own; other logs of one origin are refused."""
    for rate, day in ((0.01, "2024-02-03"), (0.1, "2024-02-04")):
        run = write_run(tmp_path / day, arguments={"lr": rate}, results={"test_day": day})
        write_costs(run, seconds=rate * 1000)
    table = FORMATS["text"](partial(costs_document, frame(tmp_path)))
    assert {name: cells[3] for name, cells in rows(table).items() if name != "method"} == {
        "lcron (test_day=2024-02-03)": "10.0", "lcron (test_day=2024-02-04)": "100.0"
    }  # fmt: skip
    for seed, content in ((32, "a"), (33, "b")):
        write_costs(write_run(tmp_path / content, seed=seed, config={"data_checksums": {"2024-01-13": content}}))
    with pytest.raises(InputError, match="the checksum of training day 2024-01-13"):
        costs_document(frame(tmp_path), Style())


def with_code(folder: Path, loss: str = "5", shared: str = "t", commit: str = "abcdef0123456", **others: Any) -> Path:
    code = {"total": shared, "files": {"a.py": shared}, "method": {"deep_components/loss/lcron.py": loss}}
    return write_streaming(write_costs(write_run(folder, config={"code": code, "commit": commit}, **others)), STREAM)


STREAM = {"2024-01-14": 0.5}
DOCUMENTS: dict[str, Callable[..., Any]] = {
    "metrics": lambda path, any_code: partial(
        metrics_document, build_results(read_runs([path]), any_code=any_code)
    ),
    "costs": lambda path, any_code: partial(costs_document, frame(path), any_code=any_code),
    "streaming": lambda path, any_code: partial(streaming_document, read_runs([path]), any_code=any_code),
}  # fmt: skip


def of_kind(kind: str, folder: Path, any_code: bool = False) -> str:
    return FORMATS["text"](DOCUMENTS[kind](folder, any_code))


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_table_says_which_code_ran(kind: str, tmp_path: Path) -> None:
    with_code(tmp_path / "one")
    with_code(tmp_path / "two", seed=31)
    assert "Code: t (commit abcdef012)." in of_kind(kind, tmp_path)
    write_streaming(write_costs(write_run(tmp_path / "earlier", name="earlier", loss_type="bce")), STREAM)
    shown = of_kind(kind, tmp_path)
    if kind == "streaming":
        assert "Code of earlier: unknown (commit unknown)." in shown and "Code of lcron: t (commit" in shown
    else:
        assert rows(shown)["method"][-1] == "code"
        assert (rows(shown)["earlier"][-1], rows(shown)["lcron"][-1]) == (
            "unknown (commit unknown)", "t (commit abcdef012)"
        )  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_no_table_averages_seeds_of_other_code(kind: str, tmp_path: Path) -> None:
    with_code(tmp_path / "one")
    with_code(tmp_path / "two", seed=31, loss="6", commit="abcdef0-modified")
    with pytest.raises(InputError, match=r"lcron: its seeds ran different code: deep_components/loss/lcron\.py"):
        of_kind(kind, tmp_path)
    shown = of_kind(kind, tmp_path, any_code=True)
    assert "[1] lcron: the seeds ran different code: deep_components/loss/lcron.py." in shown
    assert "lcron [1]" in shown if kind == "streaming" else "2 [1]" in " ".join(rows(shown)["lcron"])
    assert "t (commit abcdef012, abcdef0-modified), loss/lcron.py 5, loss/lcron.py 6" in shown


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_steps_that_were_left_out_are_marked(kind: str, tmp_path: Path) -> None:
    """And what was trained or evaluated by two codes."""
    with_code(tmp_path / "one", results={"skipped_steps": 2})
    with_code(tmp_path / "two", seed=31)
    shown = of_kind(kind, tmp_path)
    assert "[1] lcron: 2 of 120 training steps were left out, because they were not finite." in shown
    run = with_code(tmp_path / "three", seed=32, name="lcron")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"code": config["code"] | {"before": {"a.py": "0"}}}))
    assert "[2] lcron: trained or evaluated by other code than it began with: a.py." in of_kind(kind, tmp_path)


def test_one_code_in_several_commits(tmp_path: Path) -> None:
    """As when only docs have changed."""
    with_code(tmp_path / "one")
    with_code(tmp_path / "two", name="bce", loss="5", commit="f00")
    assert "Code: t (commit abcdef012, f00)." in shown(tmp_path)


def test_the_code_is_in_the_data_too(tmp_path: Path) -> None:
    with_code(tmp_path / "one", results={"skipped_steps": 2})
    content = json.loads(shown(tmp_path, "json"))
    assert content["runs"][0]["code"] == "t" and content["runs"][0]["skipped_steps"] == 2
    assert {record["code"] for record in content["results"]} == {"t (commit abcdef012)"}
    assert content["notes"] == ["[1] lcron: 2 of 60 training steps were left out, because they were not finite."]


def test_a_stream(tmp_path: Path) -> None:
    for name, shift in (("bce", 0.0), ("lcron", 0.2)):
        for seed in (30, 31):
            run = write_run(tmp_path / name / str(seed), seed=seed, name=name)
            write_streaming(run, {"2024-01-14": 0.5 + shift, "2024-01-15": 0.5 + shift + (seed - 30) / 10})
    table = partial(streaming_document, read_runs([tmp_path]))
    expected = {"test day": ["bce", "lcron"], "2024-01-14": ["0.5000", "0.7000"], "2024-01-15": ["0.5500", "0.7500"]}
    assert rows(FORMATS["text"](table)) == expected
    assert len(list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))) == 4
    write_run(tmp_path / "alone" / "run")
    with pytest.raises(InputError, match="--streaming"):
        FORMATS["text"](partial(streaming_document, read_runs([tmp_path / "alone"])))


def test_what_is_served_of_a_corpus(tmp_path: Path) -> None:
    """A row per method and corpus, apart from the metrics on logged candidates; runs without one have none."""
    write_run(tmp_path / "without", name="without")
    for seed, recall in ((30, 0.25), (31, 0.75)):
        write_run(tmp_path / f"with{seed}", seed=seed, name="with", results={"corpus": corpus(recall)})
    filtered = corpus(None, checksum="b" * 64, filter_seen=True)
    write_run(tmp_path / "other", seed=32, name="with", results={"corpus": filtered})
    table = shown(tmp_path)
    assert rows(table)["method"] == [JOINT, "rank_ndcg@10", "seeds"]
    lines = rows(table[table.index("Over a whole corpus") :])
    assert lines["method"] == ["corpus_recall@10@20", "corpus_recall_after_retrieval@10@30", "items", "seeds"]
    assert lines["with"] == ["undefined", "undefined", "12,345 (bbbbbbbb), seen ones left out", "1"]
    assert "with    0.5000 +- 0.3536" in table and "12,345 (aaaaaaaa)  " in table
    assert "without" not in lines
    found = {run["row"]: run["corpus.items"] for run in json.loads(shown(tmp_path, "json"))["runs"]}
    assert found == {"with": 12345, "without": None}
    for form in ("markdown", "latex", "csv"):
        assert shown(tmp_path, form)
