"""Starting several processes: what is refused before one is started, and what each of them gets."""

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deep_components import run_train2
from deep_components.arguments import choose_device
from deep_components.distributed import refusals
from deep_components.distributed.launch import launch
from deep_components.distributed.refusals import check_alike, check_models
from deep_components.errors import InputError
from deep_components.files import read_json
from deep_components.runs.folder import COST_FILE
from deep_components.training.signals import ask_to_stop, stop_signals
from tests.helpers import config, logged_steps, train, training_arguments

PROJECT = Path(__file__).parents[2]
MODULE = "deep_components.run_train2"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def started_as(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count), ("LOCAL_WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def arguments(*flags: str) -> argparse.Namespace:
    return run_train2.parse_args(training_arguments(Path("log"), Path("run"), *flags))


@pytest.mark.parametrize("flags", [(), ("--processes=1",), ("--processes=2", "--epochs=0")])
def test_a_command_that_is_alone_trains_itself(flags: tuple[str, ...]) -> None:
    assert not launch(arguments(*flags), MODULE, [])


def test_one_of_several_trains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, 1, 2)
    assert not launch(arguments(), MODULE, [])
    assert not launch(arguments("--processes=2"), MODULE, [])
    with pytest.raises(InputError, match="--processes=3, but the launcher has started 2; leave it out"):
        launch(arguments("--processes=3"), MODULE, [])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--processes=17",), "--batch_size=16: 17 processes cannot share a batch of fewer requests"),
        (("--processes=2", "--day_on_device"), "--day_on_device: 2 processes"),
        (("--processes=2", "--device=tpu"), "--device=tpu: unknown device"),
    ],
)
def test_what_the_processes_would_refuse_is_refused_before(flags: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        launch(arguments(*flags), MODULE, [])


def test_each_process_has_a_cuda_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = argparse.Namespace(device=None, cuda=None, processes=None)
    assert choose_device(free) == torch.device("cuda")
    with pytest.raises(InputError, match="3 processes, but there are 2 CUDA devices here; start at most one for each"):
        choose_device(argparse.Namespace(device=None, cuda=None, processes=3))
    started_as(monkeypatch, 1, 2)
    assert choose_device(free) == torch.device("cuda:1")
    assert choose_device(argparse.Namespace(device="cuda", cuda=None)) == torch.device("cuda:1")
    assert choose_device(argparse.Namespace(device="cpu", cuda=None)) == torch.device("cpu")
    with pytest.raises(InputError, match="cuda:1: 2 processes cannot share a CUDA device"):
        choose_device(argparse.Namespace(device=None, cuda=1))


def test_statistics_over_the_batch_are_refused() -> None:
    check_models({"rank": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2))})
    with pytest.raises(InputError, match=r"stage rank: layer 0\.1 is a BatchNorm1d, .* use LayerNorm"):
        check_models({"rank": nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))})
    with pytest.raises(InputError, match="SyncBatchNorm"):
        check_models({"rank": nn.SyncBatchNorm(2)})


class Gathers:
    """Processes, the others of which told ``others``."""

    count = 3

    def __init__(self, *others: dict[str, Any]) -> None:
        self.others = others

    def gather(self, own: Any) -> list[Any]:
        return [own, *(list(refusals._facts(other)) for other in self.others)]


KNOWN: dict[str, Any] = {
    "arguments": {"lr": 0.01, "data_dir": "/a", "seed": 30},
    "data_checksums": {"2024-01-13": "0a"},
    "train_days": ["2024-01-13"],
    "init_from_checksums": {},
    "code": {"files": {"deep_components/batch.py": "1b"}, "method": {"deep_components/loss/lcron.py": "2c"}},
    "versions": {"torch": "2.13.0"},
    "device": "cuda:0",
    "kernels": "compiled",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("arguments", "lr", 0.5), r"--lr \(0.5, not 0.01\)"),
        (("data_checksums", "2024-01-13", "0b"), "the data of day 2024-01-13"),
        (("code", "files", {"deep_components/batch.py": "9"}), "the code of deep_components/batch.py"),
        (("versions", "torch", "2.12.0"), r"the version of torch \(2.12.0, not 2.13.0\)"),
    ],
)
def test_processes_that_differ_are_refused(changes: tuple[str, str, Any], said: str) -> None:
    other = copy.deepcopy(KNOWN)
    other[changes[0]][changes[1]] = changes[2]
    for others, who in (((KNOWN, other), "process 2"), ((other, other), "processes 1, 2")):
        processes: Any = Gathers(*others)
        with pytest.raises(InputError, match=f"{who} of 3 and process 0 differ in {said}; start all with the same"):
            check_alike(KNOWN, processes)


def test_folders_and_devices_may_differ() -> None:
    other = {**copy.deepcopy(KNOWN), "device": "cuda:1"}
    other["arguments"]["data_dir"] = "/b"
    processes: Any = Gathers(other, KNOWN)
    check_alike(KNOWN, processes)


def test_the_command_starts_its_processes(log: Path, tmp_path: Path) -> None:
    """As users type it; and its run is that of one process, to rounding."""
    command = [sys.executable, "-m", "deep_components", "train", "--cascade=two_stage", "--processes=2"]
    done = subprocess.run(
        [*command, *training_arguments(log, tmp_path / "two", "--print_freq=1")], cwd=PROJECT, capture_output=True,
        text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SIMULATED DATA") == 1 and "Traceback" not in done.stderr and done.stdout == ""
    train(log, tmp_path / "one", "--print_freq=1")
    for one, two in zip(logged_steps(tmp_path / "one"), logged_steps(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert config(tmp_path / "two")["threads"] == 1
    assert read_json(tmp_path / "two" / COST_FILE)["steps"] == 4


@pytest.mark.parametrize("word", ["--engine=slurm", "--processes=0", "--max_restarts=-1", "--timeout=0"])
def test_mistakes(word: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train(log, tmp_path / "run", word)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word.partition("=")[0] in said
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
