"""Where a training is started is no part of the run; several processes that nothing starts are refused."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from deep_components import run_train, run_train2, run_train3
from deep_components.distributed.launch import launch_options
from deep_components.errors import InputError
from deep_components.training.signals import ask_to_stop, stop_signals
from tests.helpers import config, train, training_arguments


def test_the_training_gets_its_own_arguments() -> None:
    options, rest = launch_options(["--lr=1", "--processes=3", "--engine", "ray", "--resume", "--max_restarts=2"])
    assert vars(options) == {"engine": "ray", "processes": 3, "max_restarts": 2}
    assert rest == ["--lr=1", "--resume"]


@pytest.mark.parametrize("word", ["--engine=slurm", "--processes=0", "--max_restarts=-1"])
def test_mistakes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch_options([word])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word.partition("=")[0] in said


def test_a_run_does_not_know_where_it_was_made(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--epochs=0", "--engine=local", "--processes=1", "--max_restarts=0")
    assert not {"engine", "processes", "max_restarts"} & set(config(run)["arguments"])


@pytest.mark.parametrize("command", [run_train, run_train2, run_train3])
def test_several_processes_that_nothing_starts(command: ModuleType, log: Path, tmp_path: Path) -> None:
    cascade = ["--cascade=two_stage"] if command is run_train else []
    with pytest.raises(InputError, match=rf"--processes=2 .*torchrun --nproc_per_node=2 .*-m {command.__name__}, or"):
        command.main([*training_arguments(log, tmp_path / "run"), *cascade, "--processes=2"])
    assert list(tmp_path.iterdir()) == []


def test_without_ray_a_sentence(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"lacks ray; run: .* -m pip install -r requirements-ray.txt"):
        train(log, tmp_path / "run", "--engine=ray", "--processes=2")
    assert list(tmp_path.iterdir()) == []


def test_a_stop_that_is_asked_for() -> None:
    with stop_signals() as outer, stop_signals() as inner:
        ask_to_stop(15)
    assert (outer, inner) == ([15], [15])
    ask_to_stop(2)
    assert outer == [15]
