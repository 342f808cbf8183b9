"""Several processes train what one trains: parameters, logged terms, files; any number goes on with a saved state."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from deep_components import run_train2, run_train3
from deep_components.commands import report, table
from deep_components.files import read_json
from deep_components.runs.folder import STATE_FILE
from deep_components.runs.shards import SavedState
from deep_components.serving.export import export_run
from tests.distributed.equality import (
    AGAIN,
    CASES,
    CASES_OF,
    COMMANDS,
    ELASTIC,
    FLOAT64,
    MANY,
    STOP_AFTER,
    Case,
    Found,
    arguments,
    run_case,
    train_all,
)
from tests.helpers import contents, evaluate, logged_steps, training_arguments
from tests.test_own_cascade import write_log

ROOT = Path(__file__).parents[2]
# A parameter whose exact gradient is zero, as the last bias under a loss of differences, gets one of rounding errors,
# which Adam's 1e-8 makes steps of.
EXACT, ROUNDED, SMALLEST = 1e-10, 1e-8, 1e-12
ADAMS_SHARE = 1e-3  # of a squared gradient, in the running mean
TERMS = 1e-11
COUNTS = (3, 2, MANY)  # in this order
pytestmark = pytest.mark.usefixtures("short_rules")


@dataclass(frozen=True)
class Made:
    """What all processes left behind."""

    folder: Path
    log: Path
    shop: Path
    alone: Mapping[str, Any]  # case -> what one process has
    together: Mapping[int, list[dict[str, Found]]]  # number of processes -> what each has


def python(*words: str) -> "subprocess.Popen[str]":
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # bytes are those of a number of threads
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def torchrun(count: int, *words: str) -> "subprocess.Popen[str]":
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *words)


@pytest.fixture(scope="module")
def made(log: Path, tmp_path_factory: pytest.TempPathFactory, short_rules: None) -> Iterator[Made]:
    """Processes train while this one does."""
    folder, shop = tmp_path_factory.mktemp("equality"), write_log(tmp_path_factory.mktemp("shop"))
    words = *arguments("three", folder, log, shop), f"--output_dir={folder / 'torchrun'}"
    launched = torchrun(2, "-m", "deep_components.run_train3", *words)
    workers = python("-m", "tests.distributed.equality", *map(str, (folder, log, shop, *COUNTS)))
    try:
        alone = {str(case): run_case(case, None) for case in CASES}
        train_all(folder / "1", log, shop)
        for process in (workers, launched):
            _, error = process.communicate(timeout=1200)
            assert process.returncode == 0, error
    finally:
        for process in (workers, launched):
            process.kill()
    together = {c: [torch.load(folder / f"{c}.{rank}.pt", weights_only=True) for rank in range(c)] for c in COUNTS}
    yield Made(folder, log, shop, alone, together)


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def differences(alone: Mapping[str, Any], together: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """How much parameters with a gradient, those without one, and terms differ at the most."""
    with_gradient = without = 0.0
    pulled, count = set(together[0]["pulled"]), len(together)
    for name, whole in alone["parameters"].items():
        squares = alone["squares"].get(name, torch.zeros_like(whole))
        has_gradient = squares > ADAMS_SHARE * SMALLEST**2
        for rank, process in enumerate(together):
            _, is_table, of_table = name.partition("embedding.")
            rows = slice(rank, None, count) if is_table and of_table in pulled else ...
            difference = (process["parameters"][name] - whole[rows]).abs()
            with_gradient = max(with_gradient, largest(difference[has_gradient[rows]]))
            without = max(without, largest(difference))
    terms = 0.0
    for process in together:
        for expected, found in zip(alone["terms"], process["terms"], strict=True):
            assert expected.keys() == found.keys()
            terms = max(terms, *(abs(found[name] - value) / max(1, abs(value)) for name, value in expected.items()))
    return with_gradient, without, terms


@pytest.mark.parametrize(("count", "case"), [(c, case) for c in COUNTS for case in CASES_OF[c]], ids=str)
def test_processes_train_what_one_does(made: Made, case: Case, count: int) -> None:
    together = [process["once"][str(case)] for process in made.together[count]]
    with_gradient, without, terms = differences(made.alone[str(case)], together)
    assert with_gradient <= EXACT and without <= ROUNDED and terms <= TERMS


def test_what_processes_share_stays_alike_to_the_bit(made: Made) -> None:
    for processes in made.together.values():
        first, *others = (process["once"] for process in processes)
        for name, case in ((name, case) for other in others for name, case in other.items()):
            assert case["terms"] == first[name]["terms"]
            for parameter, values in case["parameters"].items():
                if parameter.partition("embedding.")[2] not in case["pulled"]:
                    assert torch.equal(values, first[name]["parameters"][parameter])


def test_as_many_processes_make_the_same_bytes_again(made: Made) -> None:
    for process in made.together[3]:
        for case in map(str, AGAIN):
            once, again = process["once"][case], process["again"][case]
            assert once["terms"] == again["terms"]
            for parameter, values in once["parameters"].items():
                assert torch.equal(values, again["parameters"][parameter])


# ---- runs ------------------------------------------------------------------------------------------------------------


def layout(file: Path) -> dict[str, Any]:
    """Where each array lies in a file, in the file's order, its shape and type; and what the file notes."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    noted = {name: value for name, value in header.pop("__metadata__").items() if "checksum" not in name}
    return {"arrays": list(header.items()), "noted": noted.keys()}


def assert_same_training(run: Path, alone: Path) -> None:
    """Models, saved states and logs."""
    ours, theirs = SavedState(run / STATE_FILE), SavedState(alone / STATE_FILE)
    assert set(ours) == set(theirs) and ours.position == theirs.position
    for name in theirs:
        if name.startswith(("ids/", "step/", "last/")):
            assert np.array_equal(ours[name], theirs[name])
    for path in sorted(alone.glob("*.safetensors")):
        stage = path.name.removesuffix(".safetensors")
        if path.name == STATE_FILE:
            continue
        assert layout(run / path.name) == layout(path)
        found, expected = load_file(run / path.name), load_file(path)
        for name, values in expected.items():
            if name.startswith("ids."):
                assert np.array_equal(found[name], values)
                continue
            difference = np.abs(found[name] - values)
            has_gradient = theirs[f"exp_avg_sq/{stage}/{name}"] > ADAMS_SHARE * SMALLEST**2
            assert difference[has_gradient].max(initial=0) <= EXACT and difference.max() <= ROUNDED
    steps = logged_steps(alone)
    assert len(logged_steps(run)) == len(steps)
    for found, expected in zip(logged_steps(run), steps, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=TERMS, abs=TERMS))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_several_processes_has_the_files_of_one(made: Made, name: str) -> None:
    alone, run = made.folder / "1" / name, made.folder / "2" / name
    assert_same_training(run, alone)
    shards = {path.name for path in run.glob(f"{STATE_FILE.removesuffix('safetensors')}*-of-*")}
    assert len(shards) == 2
    assert {path.name for path in run.iterdir()} - shards == {path.name for path in alone.iterdir()}
    noted, expected = (read_json(folder / "config.json") for folder in (run, alone))
    assert noted.pop("arguments").keys() == expected.pop("arguments").keys()
    about_code = ("commit", "checksum")  # an edit meanwhile is none of ours
    assert all(noted[key] == expected[key] for key in expected if key not in about_code)


def test_any_number_of_processes_goes_on(made: Made, tmp_path: Path) -> None:
    """Three stopped within a day, two within the next pass, and one ends what one would have trained."""
    arguments = training_arguments(made.log, made.folder / "elastic", *FLOAT64, *ELASTIC)
    assert SavedState(made.folder / "elastic" / STATE_FILE).position["step"] == sum(STOP_AFTER.values())
    run_train2.main(arguments)
    run_train2.main([*arguments, f"--output_dir={tmp_path}"])
    assert_same_training(made.folder / "elastic", tmp_path)
    assert not list((made.folder / "elastic").glob("*-of-*"))


def test_torchrun_makes_the_same_bytes_by_itself(made: Made) -> None:
    """In another folder, by another launcher."""
    assert_same_bytes(made.folder / "torchrun", made.folder / "2" / "three")


def test_one_process_of_torchrun_is_as_without_it(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.get(name, "0"))
    run_train3.main([*arguments("three", made.folder, made.log, made.shop), f"--output_dir={tmp_path}"])
    assert_same_bytes(tmp_path, made.folder / "1" / "three")


def assert_same_bytes(run: Path, other: Path) -> None:
    names = {path.name for path in other.glob("*.safetensors")}
    assert names == {path.name for path in run.glob("*.safetensors")}
    assert contents(run, *names) == contents(other, *names)
    assert logged_steps(run) == logged_steps(other)


def test_later_commands_take_such_a_run(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [evaluate(made.log, made.folder / count / "two") for count in ("1", "2")]
    numbers = [{name: of[name] for name in of if isinstance(of[name], float)} for of in metrics]
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-9)
    run = made.folder / "2" / "two"
    export_run(run, tmp_path / "bundle", data_dir=made.log)
    table.main([str(run)])
    assert "lcron" in capsys.readouterr().out
    report.main([str(run), f"--output={tmp_path / 'report.html'}"])
    assert (tmp_path / "report.html").stat().st_size
    assert list((run / "tensorboard").iterdir())
