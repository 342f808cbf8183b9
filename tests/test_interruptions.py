"""Trainings that are killed, stopped, or hindered: what was saved stays usable, and the end is the same to the byte."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import results
from deep_components import run_train2
from deep_components.batch import CascadeBatch
from deep_components.cli import run_command
from deep_components.runs.folder import STATE_FILE
from deep_components.runs.state import load_state
from deep_components.training.step import Trainer
from tests.helpers import leftovers, logged_steps, train, training_arguments

pytestmark = pytest.mark.usefixtures("short_rules")
KILLS, VARIANT = 12, "compacted and deferred"
FLAGS = ("--epochs=2", "--save_minutes=1e-9")  # the state is saved after every step
WITHOUT_STATE = ("--epochs=2", "--save_minutes=0")
STEPS = 8


@pytest.fixture(scope="session")
def undisturbed(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training that nothing disturbs leaves."""
    return results(train(log, tmp_path_factory.mktemp("undisturbed"), *FLAGS))


@pytest.fixture
def during_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen at the beginning of a step, counted from 1; once."""
    step, made = Trainer.step, 0

    def plan(number: int, action: Callable[[], None]) -> None:
        nonlocal made
        made = 0

        def counted(self: Trainer, batch: CascadeBatch) -> dict[str, Any]:
            nonlocal made
            made += 1
            if made == number:
                action()
            return step(self, batch)

        monkeypatch.setattr(Trainer, "step", counted)

    return plan


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_killed_trainings_end_in_the_same_bytes() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", f"--kills={KILLS}", "--seed=3", f"--variant={VARIANT}"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    report = json.loads(ended.stdout)
    assert report["different"] == []
    assert report["kills"] >= KILLS and report["resumed"] > 0 and report["runs"] > 1
    assert report["killed"]["at a random time"] > 0 and len(report["killed"]) > 2


def test_what_a_killed_write_left_is_removed(log: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    tmp_path.joinpath(f".{STATE_FILE}.4711.tmp").write_bytes(b"half")
    tmp_path.joinpath(".rank.safetensors.4711.tmp").write_bytes(b"half")
    tmp_path.joinpath(f".{STATE_FILE}.abc.tmp").mkdir()
    tmp_path.joinpath(f".{STATE_FILE}.abc.tmp", ".tmpAbCdEf").write_bytes(b"half")
    tmp_path.joinpath(".notes.tmp").write_bytes(b"mine")
    train(log, tmp_path, *FLAGS, "--resume")
    assert leftovers(tmp_path) == [tmp_path / ".notes.tmp"]
    tmp_path.joinpath(".notes.tmp").unlink()
    assert results(tmp_path) == undisturbed


# ---- SIGINT and SIGTERM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [FLAGS, WITHOUT_STATE], ids=["saved before", "not saved before"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, flags: tuple[str, ...], log: Path, tmp_path: Path, undisturbed: dict[str, Any],
    during_step: Any, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments, handlers = training_arguments(log, tmp_path, *flags), [signal.getsignal(s) for s in (2, 15)]
    during_step(3, lambda: os.kill(os.getpid(), number))
    assert run_command(run_train2.main, arguments) == code
    said = capsys.readouterr().err
    assert "stopped at step 3, day 2024-01-14; the state is saved" in said and "the same command and --resume" in said
    assert "Traceback" not in said
    assert load_state(tmp_path / STATE_FILE)[1] == {"epoch": 0, "day": 1, "batch": 1, "step": 3, "skipped": 0}
    assert len(logged_steps(tmp_path)) == 3 and leftovers(tmp_path) == []
    assert [signal.getsignal(s) for s in (2, 15)] == handlers
    during_step(0, lambda: None)
    assert run_command(run_train2.main, [*arguments, "--resume"]) == 0
    assert results(tmp_path) == undisturbed


@pytest.mark.parametrize("step", [2, STEPS], ids=["the last of a day", "the last of all"])
def test_a_signal_in_a_last_step(
    step: int, log: Path, tmp_path: Path, undisturbed: dict[str, Any], during_step: Any
) -> None:
    arguments = training_arguments(log, tmp_path, *WITHOUT_STATE)
    during_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_command(run_train2.main, arguments) == 143
    during_step(0, lambda: None)
    assert run_command(run_train2.main, [*arguments, "--resume"]) == 0
    assert results(tmp_path) == undisturbed


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(
    second: signal.Signals, log: Path, tmp_path: Path, undisturbed: dict[str, Any], during_step: Any
) -> None:
    """Whichever comes first: the step is not even finished."""

    class AtOnceError(Exception):
        pass

    def at_once(number: int, frame: object) -> None:
        raise AtOnceError

    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)

    before = [signal.signal(number, at_once) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        during_step(3, both)
        with pytest.raises(AtOnceError):
            run_train2.main(training_arguments(log, tmp_path, *FLAGS))
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert load_state(tmp_path / STATE_FILE)[1]["step"] == 2
    during_step(0, lambda: None)
    train(log, tmp_path, *FLAGS, "--resume")
    assert results(tmp_path) == undisturbed


def test_a_signal_that_is_ignored_stays_ignored(
    log: Path, tmp_path: Path, undisturbed: dict[str, Any], during_step: Any
) -> None:
    """A script's shell starts background processes that way, lest Ctrl-C in the foreground stop them."""
    during_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(log, tmp_path, *FLAGS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert results(tmp_path) == undisturbed


# ---- disks and folders -----------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends."""
    capsys.readouterr()
    assert run_command(run_train2.main, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("room", "name"), [(50_000, STATE_FILE), (1_500, "config.json")], ids=["state", "config"]
)  # fmt: skip
def test_a_full_disk_leaves_the_checkpoint_before(
    room: int, name: str, log: Path, tmp_path: Path, undisturbed: dict[str, Any], during_step: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = training_arguments(log, tmp_path, *FLAGS)
    during_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_command(run_train2.main, arguments) == 143
    during_step(0, lambda: None)
    saved = (tmp_path / STATE_FILE).read_bytes()
    with files_of_at_most(room):
        said = refused([*arguments, "--resume"], capsys)
    assert name in said and "cannot be written" in said and "free the space" in said
    assert leftovers(tmp_path) == [] and (tmp_path / STATE_FILE).read_bytes() == saved
    train(log, tmp_path, *FLAGS, "--resume")
    assert results(tmp_path) == undisturbed


def test_no_space_for_the_step_log(
    log: Path, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fsync = os.fsync

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "train.jsonl" and len(path.read_text().splitlines()) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    said = refused(training_arguments(log, tmp_path, *FLAGS, "--print_freq=1"), capsys)
    assert str(tmp_path) in said and "No space left on device" in said
    monkeypatch.undo()
    assert load_state(tmp_path / STATE_FILE)[1]["step"] == 2
    train(log, tmp_path, *FLAGS, "--print_freq=1", "--resume")
    assert results(tmp_path) == undisturbed


def test_a_folder_that_cannot_be_written(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(log, tmp_path, *FLAGS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path_open = Path.open

    def read_only(path: Path, mode: str = "r", **rest: Any) -> Any:  # for root, a folder's permissions do not matter
        if path.is_relative_to(tmp_path) and mode != "rb" and mode != "r":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return path_open(path, mode, **rest)

    os_open = os.open

    def read_only_too(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and Path(path).is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return os_open(path, flags, *rest, **named)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "open", read_only_too)
    for flags in ((), ("--resume",)):
        said = refused(training_arguments(log, tmp_path, *FLAGS, *flags), capsys)
        assert str(tmp_path) in said and "Read-only file system" in said and "--output_dir" in said
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- two at once -----------------------------------------------------------------------------------------------------

_WAITS_IN_STEP_3 = """
import sys, time
from pathlib import Path
import torch
from deep_components import run_train2
from deep_components.cli import run_command
from deep_components.training.step import Trainer

torch.set_num_threads(1)
step, made, signs = Trainer.step, 0, Path(sys.argv[1])

def waiting(self, batch):
    global made
    made += 1
    if made == 3:
        (signs / "waits").touch()
        while not (signs / "go").exists():
            time.sleep(0.01)
    return step(self, batch)

Trainer.step = waiting
sys.exit(run_command(run_train2.main, sys.argv[2:]))
"""


def test_a_second_training_in_the_folder_is_refused(
    log: Path, tmp_path: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = tmp_path / "run", training_arguments(log, tmp_path / "run", *FLAGS)
    command = [sys.executable, "-c", _WAITS_IN_STEP_3, str(tmp_path), *arguments]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 120
        while not (tmp_path / "waits").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        for flags in ((), ("--resume",), ("--seed=31",)):
            assert "another process is training in this folder" in refused([*arguments, *flags], capsys)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        (tmp_path / "go").touch()
        said = first.communicate(timeout=120)[1]
    assert first.returncode == 0, said
    assert results(run) == undisturbed


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_keeps_the_last_good_state(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leaving such steps out may be chosen afterwards: up to there the two are one."""
    skipped = tmp_path / "skipped"
    with monkeypatch.context() as patch:
        break_rank_in_step(4, patch)
        train(log, skipped, *FLAGS, "--on_nonfinite=skip")
    with monkeypatch.context() as patch:
        break_rank_in_step(4, patch)
        said = refused(training_arguments(log, tmp_path / "run", *FLAGS), capsys)
    assert "lcron, step 4, day 2024-01-14" in said and "gradient_norm.rank" in said
    assert "gradient_norm.retrieval" not in said  # the other stage is sound
    assert load_state(tmp_path / "run" / STATE_FILE)[1]["step"] == 3
    with monkeypatch.context() as patch:
        break_rank_in_step(1, patch)
        train(log, tmp_path / "run", *FLAGS, "--resume", "--on_nonfinite=skip")
    assert results(tmp_path / "run") == results(skipped)


def break_rank_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """Give one of the ranking stage's gradients a NaN in the ``number``-th step from now."""
    norm, made = Trainer._gradient_norm, 0

    def broken(self: Trainer, stage: str, pulled: Any) -> Any:
        nonlocal made
        made += stage == "rank"
        if stage == "rank" and made == number:
            gradient = next(p.grad for p in self.models[stage].parameters() if p.grad is not None)
            gradient.view(-1)[0] = float("nan")
        return norm(self, stage, pulled)

    patch.setattr(Trainer, "_gradient_norm", broken)


def test_the_deferred_tables_skip_too(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step left out counts for nothing: the other steps are those of a training without it."""
    with monkeypatch.context() as patch:
        break_rank_in_step(STEPS, patch)
        skipped = results(train(log, tmp_path / "skipped", *FLAGS, "--pull_from=1", "--on_nonfinite=skip"))
    whole = results(train(log, tmp_path / "whole", *FLAGS, "--pull_from=1"))
    assert skipped["step log"][:-1] == whole["step log"][:-1] and skipped["step log"][-1]["skipped"]
    assert skipped["rank.safetensors"] != whole["rank.safetensors"]


def test_helpers_see_differences(log: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The comparison of these tests is one that can fail."""
    other = results(train(log, tmp_path, *FLAGS, "--seed=31"))
    assert other.keys() == undisturbed.keys()
    assert {name for name in other if other[name] != undisturbed[name]} == {
        *("retrieval.safetensors", "rank.safetensors", STATE_FILE, "step log"),
    }
