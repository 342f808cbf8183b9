"""The page's text, its charts, and the command that writes them; test_browser.py looks at it in a browser."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from deep_components.cli import run_command
from deep_components.commands import report, table
from deep_components.files import write_json
from deep_components.reporting import frame
from deep_components.reporting.figures import Chart, charts_of, line_style, survival
from deep_components.reporting.frame import read_runs
from deep_components.reporting.page import render
from deep_components.reporting.results import Results, build_results
from tests.helpers import evaluate, leftovers, train
from tests.reporting.fake_runs import corpus, write_costs, write_run, write_runs, write_steps, write_streaming
from tests.reporting.report_runs import MARKUP, RECALLS, SCRIPT, TIGHTNESS, write_all
from tests.reporting.test_paper import PAPER_ARGUMENTS, PAPER_CONFIG

ROOT = Path(__file__).parents[2]


class Elements(HTMLParser):
    """All start tags with their attributes, the text outside of scripts and styles, and what scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [""], ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def results_of(folder: Path) -> Results:
    return build_results(read_runs([folder])).by_score()


def page_of(folder: Path) -> str:
    results = results_of(folder)
    return render(results, charts_of(results, []), [])


def charts_by_key(folder: Path) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts_of(results_of(folder), [])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return page_of(runs)


def test_what_comes_from_files_is_text(page: str) -> None:
    elements = Elements(page)
    assert SCRIPT in elements.text and MARKUP in elements.text
    assert elements.named("img") == []
    assert len(elements.named("script")) == 2  # the data, and the page's own
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_it_needs_no_network(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert not re.findall(r"url\((?!#)", page) and "@import" not in page
    policy = next(meta["content"] for meta in Elements(page).named("meta") if "http-equiv" in meta)
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert len(page.encode()) < 1_000_000


def test_the_same_runs_give_the_same_bytes(runs: Path, page: str) -> None:
    assert page_of(runs) == page


def test_the_embedded_data_are_the_results(page: str) -> None:
    (data,) = [script for script in Elements(page).scripts if script.strip().startswith("{")]
    assert [record["method"] for record in json.loads(data)["results"]][::2] == [
        *sorted(RECALLS, key=lambda name: -RECALLS[name]),
        "untrained",
    ]


def test_every_part_that_has_content_is_there(page: str, tmp_path: Path) -> None:
    parts = ["results", "comparison", "survival", "bound", "streaming", "learning", "weights", "cost", "configuration"]
    assert re.findall(r"<section id=\"(\w+)\"", page) == parts
    run = write_run(tmp_path / "run")
    alone = page_of(tmp_path)
    assert re.findall(r"<section id=\"(\w+)\"", alone) == ["results", "configuration"]
    write_json(run / "metrics.json", json.loads((run / "metrics.json").read_text()) | {"corpus": corpus(0.125)})
    assert re.findall(r"<section id=\"(\w+)\"", page_of(tmp_path)) == ["results", "corpus", "configuration"]
    assert "12,345" in page_of(tmp_path) and "0.1250" in page_of(tmp_path)
    assert "significant" not in Elements(alone).text


def test_the_headline(page: str, tmp_path: Path) -> None:
    assert Elements(page).text.count("LCRON has the best Joint Recall@10@20,") == 1
    assert "significantly better than 2 of 3 baselines, worse than 0." in page
    write_runs(tmp_path / "arf", [0.7, 0.8], name="arf")
    write_runs(tmp_path / "untrained", [0.5], epochs=0)
    text = Elements(page_of(tmp_path)).text
    assert "Two-stage cascade: ARF" in text
    assert (
        "ARF reaches a Joint Recall@10@20 of 0.7500 ± 0.0707 (2 seeds). Chance, the untrained cascade, has 0.5000."
        in text
    )
    write_run(tmp_path / "lcron", 0.6)
    text = Elements(page_of(tmp_path)).text
    assert (
        "LCRON reaches a Joint Recall@10@20 of 0.6000 (one seed). No difference can be tested: fewer than two" in text
    )
    assert "The best is ARF with 0.7500 ± 0.0707." in text


def test_the_first_command_s_report(tmp_path: Path) -> None:
    """One method and the untrained cascade; no sentence twice."""
    for name, epochs in (("lcron", 1), ("untrained", 0)):
        write_runs(tmp_path / name, [0.5, 0.6], name=name, epochs=epochs)
    text = Elements(page_of(tmp_path)).text
    assert "LCRON reaches a Joint Recall@10@20 of 0.5500" in text and "Chance, the untrained cascade, has" in text
    assert text.count("standard deviation") == 1
    assert "The rings are the seeds. The dashed line is chance" in text


def test_one_seed_is_no_mean(tmp_path: Path) -> None:
    for name, recall in (("lcron", 0.7), ("bce", 0.6)):
        write_costs(write_steps(write_run(tmp_path / name, recall, name=name), [2.0, 1.0]))
    text = Elements(page_of(tmp_path)).text
    for word in ("rings", "mean over", "of means", "lowest to the highest", "Holm's method with", "standard deviation"):
        assert word not in text, word
    assert "One run each; higher is better." in text


def test_only_an_untrained_cascade(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=0)
    assert "Two-stage cascade: untrained" in Elements(page_of(tmp_path)).text


def test_better_than_all(tmp_path: Path) -> None:
    write_runs(tmp_path / "lcron", [0.80, 0.81, 0.82])
    write_runs(tmp_path / "bce", [0.50, 0.51, 0.52], name="bce")
    assert "It is significantly better than its one baseline." in Elements(page_of(tmp_path)).text
    write_runs(tmp_path / "softsort", [0.40, 0.41, 0.42], name="softsort")
    text = Elements(page_of(tmp_path)).text
    assert "It is significantly better than all 2 baselines." in text
    assert "No t-test of some metrics against BCE, SoftSort: the values do not vary" in text


def test_folders_with_names_that_are_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write_run(folder, name="lcron")
    report.main([str(folder), f"--output={tmp_path / 'r.html'}"])
    for form in ("text", "markdown", "csv", "latex", "json"):
        table.main([str(folder), f"--format={form}", f"--output={tmp_path / form}"])
        assert (tmp_path / form).read_text()


def test_in_an_ascii_locale(tmp_path: Path) -> None:
    write_run(tmp_path / "é", name="lcron")
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["table"], ["report", f"--output={tmp_path / 'ü.html'}"]):
        command = [sys.executable, "-m", "deep_components", *words, str(tmp_path / "é")]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert "Joint Recall@10@20 of" in (tmp_path / "ü.html").read_text(encoding="utf-8")


def test_pipes_and_bombs_in_a_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step log that is a pipe has no curve; metrics of which a small file unpacks to more than any log has none."""
    monkeypatch.setattr(frame, "_MAX_ARRAY", 1 << 10)
    os.mkfifo(write_run(tmp_path / "runs/a", name="lcron") / "train.jsonl")
    bomb = write_run(tmp_path / "runs/b", name="bce")
    np.savez_compressed(bomb / "per_request.npz", request_id=np.zeros(1000))
    report.main([str(tmp_path / "runs"), f"--output={tmp_path / 'r.html'}"])
    text = Elements((tmp_path / "r.html").read_text()).text
    assert "train.jsonl: not readable" in text and "per_request.npz: not readable (an array of more than" in text


def test_which_code_ran_and_what_was_left_out(tmp_path: Path) -> None:
    """A name from a file is text here too."""
    code = {"total": "t", "files": {"a.py": "1"}, "method": {f"{MARKUP}.py": "5"}, "before": {f"{MARKUP}.py": "4"}}
    write_run(tmp_path / "run", config={"code": code, "commit": "abc"}, results={"skipped_steps": 3})
    elements = Elements(page_of(tmp_path))
    assert "[1] lcron: 3 training steps were left out, because they were not finite." in elements.text
    assert f"[2] lcron: trained or evaluated by other code than it began with: {MARKUP}.py." in elements.text
    assert "Code: t (commit abc)." in elements.text
    assert elements.named("img") == []


def test_tables_are_accessible(page: str) -> None:
    elements = Elements(page)
    assert all(header.get("scope") for header in elements.named("th"))
    assert all(chart["role"] == "img" for chart in elements.named("svg"))
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert all(part["aria-labelledby"] in ids for part in elements.named("section"))
    assert len(set(ids)) == len(ids)


def test_the_paper_has_a_part_on_recflow(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0.88, arguments=PAPER_ARGUMENTS, config=PAPER_CONFIG)
    assert "0.8732 (+0.0068)" in Elements(page_of(tmp_path)).text


def test_charts_are_drawn_where_the_numbers_are(runs: Path) -> None:
    means = results_of(runs).of("joint_recall@10@20")["mean"]
    with charts_by_key(runs)["metric"].figure() as figure:
        lines = figure.axes[0].get_lines()
        drawn = [float(np.asarray(line.get_xdata())[0]) for line in lines if line.get_markersize() == 4]
        assert drawn == pytest.approx(means.drop("untrained").to_list())
        assert lines[0].get_xdata() == pytest.approx([means["untrained"]] * 2)  # chance
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["LCRON", "ARF", "BCE", SCRIPT]


def test_an_svg_is_a_small_element_in_the_page_s_colours(runs: Path) -> None:
    for chart in charts_by_key(runs).values():
        drawn = chart.svg()
        root = ElementTree.fromstring(drawn)
        assert root.tag.endswith("svg") and root.get("viewBox") is not None and root.get("width") is None
        assert "var(--ink)" in drawn and not re.search(r"#[0-9a-f]{6}\b", drawn) and len(drawn) < 30_000


def test_32_lines_are_told_apart() -> None:
    styles = [tuple(map(str, line_style(index).values())) for index in range(32)]
    assert len({(colour, dashes) for colour, dashes, _ in styles}) == 32
    assert all(one[1] != other[1] for one, other in pairwise(styles[:8]))


def test_nine_methods_are_nine_lines(tmp_path: Path) -> None:
    for index in range(9):
        run = write_run(tmp_path / str(index), name=f"method{index}")
        write_streaming(run, {"2024-01-14": index / 10, "2024-01-15": index / 9})
    with charts_by_key(tmp_path)["streaming"].figure() as figure:
        lines = figure.axes[0].get_lines()
        looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines}
        assert len(lines) == len(looks) == 9
        assert len(figure.legends[0].get_texts()) == 9


def test_the_shares_of_the_ground_truth_add_up(runs: Path, tmp_path: Path) -> None:
    shares = survival(results_of(runs))
    assert shares.loc["lcron"].to_dict() == pytest.approx(
        {"survives": 0.8, "lost at rank": 0.1, "lost at retrieval": 0.1}
    )
    assert len(shares) == len(RECALLS) + 1
    write_run(tmp_path / "a", results={"survival_after_rank": 0.5})
    write_run(tmp_path / "b", seed=31)  # an evaluation that does not say it
    assert "survival" not in charts_by_key(tmp_path)


def test_the_bound_is_drawn_for_the_methods_that_have_one(runs: Path, page: str, tmp_path: Path) -> None:
    chart = charts_by_key(runs)["bound"]
    with chart.figure() as figure:
        (axes,) = figure.axes
        drawn = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()}
        assert [label.get_text() for label in axes.get_yticklabels()] == ["LCRON", SCRIPT]
    marks = {"product of shares": 0.2, "product at the quotas": 0.6, "survival with noise": 0.7, "survival": 0.8}
    assert drawn == {label: pytest.approx([value] * 2) for label, value in marks.items()}
    assert "LCRON: product of shares 0.2000, product at the quotas 0.6000" in chart.description
    assert "0.2000" in Elements(page).text and "violated at quotas" in Elements(page).text
    write_run(tmp_path / "a", results=TIGHTNESS)
    write_run(tmp_path / "b", seed=31)  # an evaluation that does not say it
    assert "bound" not in charts_by_key(tmp_path)


@pytest.mark.parametrize(
    "losses", [[0.5] * 3, [0.0], [1e308] * 3, [-1e308, 1e308], [1e-300, 1e-300, 1e300], [1, 1, 1, 1e9]], ids=str
)
def test_any_curve_is_drawn(losses: list[float], tmp_path: Path) -> None:
    for seed in (30, 31):
        write_steps(write_run(tmp_path / str(seed), seed=seed, name="$_x^"), losses)
    (chart,) = [chart for key, chart in charts_by_key(tmp_path).items() if key.startswith("loss")]
    chart.png(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 5000
    assert ("log scale" in chart.svg()) == (losses[-1] in (1e300, 1e9))


def test_the_command_on_real_runs(log: Path, tmp_path: Path) -> None:
    for method in ("lcron", "bce"):
        evaluate(log, train(log, tmp_path / "runs" / method, f"--loss_type={method}"))
    output, figures = tmp_path / "deep" / "report.html", tmp_path / "figures"
    report.main([str(tmp_path / "runs"), f"--output={output}", f"--figures={figures}"])
    text = Elements(output.read_text()).text
    assert "Left out" not in text and "LCRON against each baseline" in text
    parts = ["results", "comparison", "survival", "bound", "learning", "weights", "cost", "configuration"]
    assert re.findall(r"<section id=\"(\w+)\"", output.read_text()) == parts
    names = {path.name for path in figures.iterdir()}
    assert {"metric.png", "differences.png", "survival.png", "bound.png"} < names and any(
        "LCRON" in name for name in names
    )
    assert leftovers(tmp_path) == []


def test_figures_are_fit_for_print(runs: Path, tmp_path: Path) -> None:
    """1050 pixels are 3.5 inches at 300 dpi; names from files are no paths."""
    report.main([str(runs), f"--output={tmp_path / 'r.html'}", f"--figures={tmp_path / 'figures'}"])
    assert len(list((tmp_path / "figures").iterdir())) == 5 + 2 * len(RECALLS)
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
        assert int.from_bytes(path.read_bytes()[16:20]) == 1050
        assert re.fullmatch(r"[\w.=-]+\.png", path.name)


def test_damaged_parts_are_named_on_the_page(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "runs")
    (runs / "method0" / "30" / "train.jsonl").write_text("{")
    (runs / "method1" / "31" / "metrics.json").write_text("{")
    (runs / "method2" / "32" / "training.json").write_text('{"seconds": "x"}')
    report.main([str(runs), f"--output={tmp_path / 'r.html'}"])
    text = Elements((tmp_path / "r.html").read_text()).text
    for damaged in ("method0/30/train.jsonl", "method1/31/metrics.json", "method2/32/training.json"):
        assert damaged in text


@pytest.mark.parametrize("arguments", [["--compare=nothing"], []])
def test_refused_without_a_page(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    report.main(["runs"])
    assert (tmp_path / "report.html").exists()
    write_run(tmp_path / "runs" / "b", seed=31, results={} if arguments else {"test_day": "2024-01-01"})
    capsys.readouterr()
    assert run_command(report.main, ["runs", "--output=other.html", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error)
    assert not (tmp_path / "other.html").exists()
