"""The page's text, its figures as data, and the command that writes them; test_browser.py looks at it in a browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deep_components.cli import run_command
from deep_components.commands import report
from deep_components.reporting import svg
from deep_components.reporting.charts import DotChart, LineChart, build_charts
from deep_components.reporting.page import render
from deep_components.reporting.results import Results, build_results
from deep_components.reporting.runs import read_runs
from deep_components.reporting.tables import json_table
from tests.helpers import evaluate, leftovers, train
from tests.reporting.fake_runs import write_run
from tests.reporting.report_runs import MARKUP, RECALLS, SCRIPT, write_all
from tests.reporting.test_paper import PAPER_ARGUMENTS, PAPER_CONFIG


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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return build_results(read_runs([write_all(tmp_path_factory.mktemp("runs"))]))


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return render(results, build_charts(results))


def test_what_comes_from_files_is_text(page: str) -> None:
    elements = Elements(page)
    for words in (SCRIPT, MARKUP):
        assert words in elements.text
    assert elements.named("img") == []
    assert len(elements.named("script")) == 2  # the data, and the page's own
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_it_needs_no_network(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "url(" not in page and "@import" not in page
    policy = next(meta["content"] for meta in Elements(page).named("meta") if "http-equiv" in meta)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_it_is_small(page: str) -> None:
    assert len(page.encode()) < 1_000_000


def test_the_embedded_data_are_the_results(page: str, results: Results) -> None:
    (data,) = [script for script in Elements(page).scripts if script.strip().startswith("{")]
    assert json.loads(data) == json.loads(json_table(results))


def test_every_part_is_there(page: str) -> None:
    titles = re.findall(r"<section id=\"(\w+)\"", page)
    assert titles == [
        *("results", "comparison", "survival", "streaming", "learning", "weights", "cost", "configuration")
    ]  # no "paper": the data are not those of the paper's runs
    links = {link["href"] for link in Elements(page).named("a")}
    assert {f"#{title}" for title in titles} <= links


def test_parts_without_content_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    alone = build_results(read_runs([tmp_path]))
    page = render(alone, build_charts(alone))
    assert re.findall(r"<section id=\"(\w+)\"", page) == ["results", "configuration"]
    assert "significant" not in page


def test_tables_are_accessible(page: str) -> None:
    elements = Elements(page)
    headers = [header for header in elements.named("th") if header.get("scope") == "col" and "aria-sort" in header]
    assert headers and all(header["aria-sort"] == "none" for header in headers)
    assert all(header.get("scope") for header in elements.named("th"))
    assert all(chart["role"] == "img" for chart in elements.named("svg") if chart["class"] == "chart")
    ids = {attributes["id"] for _, attributes in elements.tags if "id" in attributes}
    assert all(part["aria-labelledby"] in ids for part in elements.named("section"))
    assert len(ids) == len([attributes for _, attributes in elements.tags if "id" in attributes])


def test_the_paper_has_a_part_on_recflow(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0.88, arguments=PAPER_ARGUMENTS, config=PAPER_CONFIG)
    results = build_results(read_runs([tmp_path]))
    assert "0.8732 (+0.0068)" in Elements(render(results, build_charts(results))).text


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_charts_are_drawn_where_the_numbers_are(results: Results) -> None:
    """The dots of the SVG, put back onto its axis, are the means."""
    chart = build_charts(results).metric
    assert isinstance(chart, DotChart)
    root = ElementTree.fromstring(svg.draw(chart))
    ticks = [
        (float(text.get("x", "")), float(text.text or "")) for text in root.iter("text") if text.get("class") == "tick"
    ]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    drawn = [float(dot.get("cx", "")) for dot in root.iter("circle") if dot.get("class") == "dot"]
    means = [row.cells[results.headline].mean for row in results.rows if not row.untrained]
    assert [v0 + (x - x0) * (v1 - v0) / (x1 - x0) for x in drawn] == pytest.approx(means, abs=0.001)


def test_the_shares_of_the_ground_truth_add_up(results: Results) -> None:
    chart = build_charts(results).survival
    assert chart is not None
    assert chart.parts == ("survives", "lost at rank", "lost at retrieval")
    assert chart.shares[0] == pytest.approx((0.8, 0.1, 0.1))
    assert len(chart.names) == len(RECALLS) + 1


def test_runs_of_before_have_no_survival(tmp_path: Path) -> None:
    write_run(tmp_path / "a", results={"survival_after_rank": 0.5})
    write_run(tmp_path / "b", seed=31)
    assert build_charts(build_results(read_runs([tmp_path]))).survival is None


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.77, 0.78), (-3, 17), (0.5, 0.5), (0, 0), (-1e-9, 1e-9), (1e6, 7e8), (-0.01, 0.2)]
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float) -> None:
    marks = svg.ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1] and 2 <= len(marks) <= 5
    assert all(len(f"{mark:.12g}".lstrip("-0.").replace(".", "")) <= 9 for mark in marks)
    steps = {f"{(b - a):.6e}"[0] for a, b in pairwise(marks)}
    assert steps <= {"1", "2", "5"}


def test_a_few_high_losses_make_the_height_logarithmic(results: Results) -> None:
    (chart, *_) = build_charts(results).losses
    assert isinstance(chart, LineChart) and not chart.log
    spiked = replace(chart.curves[0], high=[1000.0, *chart.curves[0].high[1:]])
    assert replace(chart, curves=(spiked,)).log
    assert "log scale" in svg.draw(replace(chart, curves=(spiked,)))
    negative = replace(spiked, low=[-1.0, *spiked.low[1:]])
    assert not replace(chart, curves=(negative,)).log


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_on_real_runs(log: Path, tmp_path: Path) -> None:
    for method in ("lcron", "bce"):
        for seed in (30, 31):
            evaluate(log, train(log, tmp_path / "runs" / method / str(seed), f"--loss_type={method}", f"--seed={seed}"))
    output, figures = tmp_path / "deep" / "report.html", tmp_path / "figures"
    report.main([str(tmp_path / "runs"), f"--output={output}", f"--figures={figures}"])
    text = Elements(output.read_text()).text
    assert "Left out" not in text and "lcron against each baseline" in text
    parts = ("results", "comparison", "survival", "learning", "weights", "cost", "configuration")
    assert re.findall(r"<section id=\"(\w+)\"", output.read_text()) == list(parts)
    names = {path.name for path in figures.iterdir()}
    assert {"metric.png", "differences.png", "survival.png", "loss_0_bce.png", "weights_1_lcron.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in figures.iterdir())
    assert leftovers(tmp_path) == []


def test_figures_are_fit_for_print(tmp_path: Path) -> None:
    """1050 pixels are 3.5 inches at 300 dpi; names from files are no paths."""
    runs = write_all(tmp_path / "runs")
    report.main([str(runs), f"--output={tmp_path / 'r.html'}", f"--figures={tmp_path / 'figures'}"])
    for path in (tmp_path / "figures").iterdir():
        head = path.read_bytes()[16:24]
        assert int.from_bytes(head[:4]) == 1050
        assert re.fullmatch(r"[\w.=-]+\.png", path.name)
    assert (tmp_path / "figures" / "streaming.png").exists()


def test_damaged_parts_are_named_on_the_page(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "runs")
    (runs / "method0" / "30" / "train.jsonl").write_text("{")
    (runs / "method1" / "31" / "metrics.json").write_text("{")
    (runs / "method2" / "32" / "training.json").write_text('{"seconds": "x"}')
    report.main([str(runs), f"--output={tmp_path / 'r.html'}"])
    text = Elements((tmp_path / "r.html").read_text()).text
    for place in ("method0/30/train.jsonl", "method1/31/metrics.json", "method2/32/training.json"):
        assert place in text


@pytest.mark.parametrize("arguments", [["--compare=nothing"], []])
def test_refused_without_a_page(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", seed=31, results={} if arguments else {"test_day": "2024-01-01"})
    output = tmp_path / "report.html"
    assert run_command(report.main, [str(tmp_path / "runs"), f"--output={output}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not output.exists()


def test_the_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    report.main(["run"])
    assert (tmp_path / "report.html").exists()
