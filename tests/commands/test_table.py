"""The command that prints the table; what it computes is tested in tests/reporting."""

import json
from functools import partial
from pathlib import Path

import pytest

from deep_components.cli import run_command
from deep_components.commands import table
from deep_components.reporting.frame import read_runs
from deep_components.reporting.results import build_results
from deep_components.reporting.tables import FORMATS, metrics_document
from tests.helpers import evaluate, leftovers, train
from tests.reporting.fake_runs import write_costs, write_run, write_runs, write_streaming


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, recalls in (("lcron", (0.80, 0.81, 0.805)), ("bce", (0.70, 0.71, 0.705))):
        write_runs(tmp_path / "runs" / name, recalls, name=name)
    return tmp_path / "runs"


def expected(folder: Path, form: str) -> str:
    return FORMATS[form](partial(metrics_document, build_results(read_runs([folder]))))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a refusal."""
    assert run_command(table.main, list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_it_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "with blanks", 0.8)
    assert run_command(table.main, [str(tmp_path / "with blanks")]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(tmp_path, "text")
    assert captured.err == ""


@pytest.mark.parametrize("form", FORMATS)
def test_flag_format(form: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(runs), f"--format={form}"])
    assert capsys.readouterr().out == expected(runs, form)


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.txt", "text"), ("a.md", "markdown"), ("a.csv", "csv"), ("a.tex", "latex"), ("deep/a.json", "json")],
)
def test_flag_output(name: str, form: str, runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table.main([str(runs), f"--output={tmp_path / name}"])
    assert capsys.readouterr().out == ""
    assert (tmp_path / name).read_text() == expected(runs, form)
    assert leftovers(tmp_path) == []


def test_flag_kind(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("lcron", "bce"):
        write_streaming(write_costs(runs / method / "seed30"), {"2024-01-14": 0.5})
    table.main([str(runs), "--kind=costs"])
    assert "requests/s" in capsys.readouterr().out
    table.main([str(runs), "--kind=streaming", "--format=markdown"])
    assert "| 2024-01-14 | 0.5000 | 0.5000 |" in capsys.readouterr().out


def test_format_wins_over_the_ending(runs: Path, tmp_path: Path) -> None:
    table.main([str(runs), f"--output={tmp_path / 'a.dat'}", "--format=json"])
    assert json.loads((tmp_path / "a.dat").read_text())["ours"] == "lcron"


def test_an_unknown_ending(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--format" in refused(capsys, str(runs), f"--output={tmp_path / 'a.xls'}")
    assert not (tmp_path / "a.xls").exists()


def test_flags_compare_and_test(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(runs), "--compare=bce", "--test=paired", "--format=json"])
    content = json.loads(capsys.readouterr().out)
    assert content["ours"] == "bce" and "paired" in content["test"]
    assert "--compare=nothing" in refused(capsys, str(runs), "--compare=nothing")


def test_mixed_runs_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write_run(runs / "odd", results={"data": "simulated"})
    assert str(odd) in refused(capsys, str(runs))


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluate the runs first" in refused(capsys, str(tmp_path / "nothing"))


def test_a_damaged_run_is_named_on_screen_and_in_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "bce" / "seed31" / "metrics.json").write_text("{")
    table.main([str(runs)])
    assert "left out: " in capsys.readouterr().out
    table.main([str(runs), "--format=json"])
    assert str(runs / "bce" / "seed31") in json.loads(capsys.readouterr().out)["left_out"]


def test_real_runs(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From training to a comparison with an interval over requests."""
    for method in ("lcron", "bce"):
        for seed in (30, 31):
            evaluate(log, train(log, tmp_path / method / str(seed), f"--loss_type={method}", f"--seed={seed}"))
    table.main([str(tmp_path), "--format=json"])
    content = json.loads(capsys.readouterr().out)
    assert content["notes"] == [] and content["left_out"] == {}
    assert len({record["code"] for record in content["results"]}) == 1  # though each method has files of its own
    for record in content["results"]:
        if record["method"] == "bce":
            assert record["interval_low"] <= record["difference"] <= record["interval_high"]
            assert 0 < record["p"] <= record["p_holm"] <= 1
