"""The progress of many runs: a bar on a terminal that counts the steps of open runs, a line for each that ends."""

import io
import json
import logging
import sys
from contextlib import closing
from pathlib import Path

import pytest

from deep_components.experiments.execution import Outcome
from deep_components.experiments.plan import Run
from deep_components.experiments.progress import Progress
from tests.experiments.runs import fake_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test itself: pytest sets stderr anew after the fixtures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("COLUMNS", "200")
    return made


def train(run: Run, steps: int) -> None:
    """The step log of a run that has made so many of its three steps, and is writing the next line."""
    run.folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)]
    (run.folder / "train.jsonl").write_text("".join(lines) + '{"step": 9')


def test_the_bar_counts_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    runs = [fake_run(tmp_path, 30), fake_run(tmp_path, 31)]
    with closing(Progress(runs)) as progress:
        progress.look()
        assert "0.0/2 runs" in screen.getvalue()
        train(runs[1], 2)
        progress.look()
        last = screen.getvalue().rpartition("\r")[2]
        assert "33%" in last and "0.7/2 runs" in last and "mine, seed 31" in last
        progress.ended(Outcome(runs[1], "finished"))
        progress.look()
        assert "1.0/2 runs" in screen.getvalue().rpartition("\r")[2]


def test_steps_made_before_are_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    run = fake_run(tmp_path)
    train(run, 1)
    with closing(Progress([run])) as progress:
        progress.look()
        assert "33%" in screen.getvalue().rpartition("\r")[2]


def test_a_line_for_each_run_that_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [fake_run(tmp_path, seed) for seed in (30, 31, 32)]
    outcomes = [("finished", ""), ("kept", ""), ("failed", "lower --lr")]
    with caplog.at_level(logging.INFO), closing(Progress(runs)) as progress:
        for run, (status, error) in zip(runs, outcomes, strict=True):
            progress.ended(Outcome(run, status, error=error))
            progress.look()
    assert [message.partition(" ")[0] for message in caplog.messages] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "kept in" in caplog.messages[1]
    assert caplog.messages[2].endswith("failed: lower --lr")
    assert capsys.readouterr().err == ""  # no bar where there is no terminal
