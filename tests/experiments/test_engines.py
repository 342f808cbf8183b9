"""Many runs: several at a time, a failing one among them, a pool that is killed, and Ray."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deep_components.errors import InputError
from deep_components.experiments.engines import run_locally, run_on_ray, slots
from deep_components.experiments.execution import Options, Outcome, Slot
from deep_components.experiments.plan import Run
from tests.experiments.runs import calls, fake_run, record
from tests.helpers import wait_for

PROJECT = Path(__file__).parents[2]


def ended(engine: Iterator[list[Outcome]]) -> dict[int, str]:
    """How the run of each seed ended."""
    return {outcome.run.seed: outcome.status for outcomes in engine for outcome in outcomes}


def test_one_run_at_a_time_is_left_alone() -> None:
    assert slots(1, devices=4, cores=16) == [Slot()]
    assert slots(1, devices=0, cores=16, threads=3) == [Slot(threads=3)]
    assert slots(1, devices=0, cores=16, processes=2) == [Slot(processes=2)]  # they share the cores themselves


def test_a_run_of_several_processes_counts_as_several() -> None:
    assert slots(2, devices=4, cores=16, processes=4) == [Slot(None, 2, 4)] * 2
    assert slots(2, devices=0, cores=4, processes=4) == [Slot(None, 1, 4)] * 2


def test_runs_are_spread_over_the_devices() -> None:
    assert [slot.device for slot in slots(5, devices=2, cores=8)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert {slot.device for slot in slots(5, devices=2, cores=8, device_named=True)} == {None}
    assert {slot.device for slot in slots(5, devices=0, cores=8)} == {None}


@pytest.mark.parametrize(("jobs", "cores", "threads"), [(2, 8, 4), (3, 8, 2), (8, 2, 1)])
def test_the_cores_are_shared_out(jobs: int, cores: int, threads: int) -> None:
    assert [slot.threads for slot in slots(jobs, 0, cores)] == [threads] * jobs


def test_one_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, seed, lr=13 if seed == 31 else 0.01) for seed in (30, 31, 32)]
    two = [Slot("cuda:0", 1), Slot("cuda:1", 1)]
    assert ended(run_locally(runs, two, Options())) == {30: "finished", 31: "failed", 32: "finished"}
    assert {calls(run)[0][-2] for run in runs} <= {"--device=cuda:0", "--device=cuda:1"}
    assert ended(run_locally(runs, two, Options())) == {30: "kept", 31: "failed", 32: "kept"}


def test_a_device_has_no_more_runs_than_its_slots(tmp_path: Path) -> None:
    """Two runs that wait for a file take both slots; the third one starts when it is there."""
    runs = [fake_run(tmp_path, seed, lr=15) for seed in (30, 31, 32)]
    engine = run_locally(runs, [Slot("cuda:0", 1), Slot("cuda:1", 1)], Options())
    while not all((run.folder / "pid").exists() for run in runs[:2]):
        assert next(engine) == []
    assert {calls(run)[0][-2] for run in runs[:2]} == {"--device=cuda:0", "--device=cuda:1"}
    assert calls(runs[2]) == []
    (tmp_path / "go").touch()
    assert ended(engine) == dict.fromkeys((30, 31, 32), "finished")


_POOL = """
import sys
from pathlib import Path
from deep_components.experiments.engines import run_locally
from deep_components.experiments.execution import Options, Slot
from tests.experiments.runs import fake_run

runs = [fake_run(Path(sys.argv[1]), seed, lr=15 if seed == 31 else 0.01) for seed in (30, 31, 32)]
for outcomes in run_locally(runs, [Slot(), Slot()], Options()):
    pass
"""


def pool(folder: Path) -> tuple["subprocess.Popen[bytes]", list[Run], int]:
    """A pool in a process of its own whose second run waits; the others are finished. And that run's process."""
    process = subprocess.Popen([sys.executable, "-c", _POOL, str(folder)], cwd=PROJECT, stderr=subprocess.DEVNULL)
    runs = [fake_run(folder, seed, lr=15 if seed == 31 else 0.01) for seed in (30, 31, 32)]
    done = [run.folder / "run.json" for run in (runs[0], runs[2])]
    wait_for(lambda: all(path.exists() and '"status": "finished"' in path.read_text() for path in done))
    pid = runs[1].folder / "pid"
    wait_for(lambda: pid.exists() and pid.read_text() != "")
    return process, runs, int(pid.read_text())


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which waits for nobody but init, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def check_it_goes_on(folder: Path, runs: list[Run]) -> None:
    (folder / "go").touch()
    assert ended(run_locally(runs, [Slot(), Slot()], Options())) == {30: "kept", 31: "finished", 32: "kept"}
    assert ["--resume" in call for call in calls(runs[1])] == [False, True]
    assert [len(calls(run)) for run in runs] == [1, 2, 1]


def test_a_killed_pool_goes_on_where_it_was(tmp_path: Path) -> None:
    process, runs, training = pool(tmp_path)
    assert alive(training)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(training))  # nothing goes on training behind the user's back
    assert record(runs[1])["status"] == "running"
    check_it_goes_on(tmp_path, runs)


def test_an_interrupted_pool_stops_its_runs(tmp_path: Path) -> None:
    process, runs, training = pool(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert not alive(training)
    assert record(runs[1])["status"] == "interrupted"
    check_it_goes_on(tmp_path, runs)
    assert [attempt["status"] for attempt in record(runs[1])["attempts"]] == ["interrupted", "finished"]


def test_without_ray_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"lacks ray; run: .* -m pip install -r requirements-ray.txt"):
        next(run_on_ray([fake_run(tmp_path)], Slot(threads=1), False, Options()))
