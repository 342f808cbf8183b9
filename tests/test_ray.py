"""What runs on Ray: runs and imports on a local cluster of two CPUs whose workers are killed.

pip install -r requirements-ray.txt && pytest tests/test_ray.py
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deep_components import run_experiments
from deep_components.dataset.importers.table.command import import_table
from deep_components.errors import InputError
from deep_components.experiments.engines import run_locally
from deep_components.experiments.execution import Options, Slot
from deep_components.ray_cluster import ray_cluster
from tests.dataset.importers import tables
from tests.experiments.runs import fake_run, record
from tests.helpers import SMALL

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (requirements-ray.txt)"
)
PROJECT = Path(__file__).parents[1]
TOKEN = uuid.uuid4().hex * 2
SECONDS = 180.0  # in which anything here ends on a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs, for one test after another."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a short path: that of a socket has 107 letters at most
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--port=0"]
    command += ["--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(""))
    try:
        address = folder / "ray_current_cluster"
        wait_for(lambda: process.poll() is not None or (address.exists() and bool(address.read_text())))
        assert process.poll() is None, (folder / "log").read_text()
        yield address.read_text().strip()
    finally:
        process.terminate()
        process.wait(SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def environment(address: str) -> dict[str, str]:
    """For a command that joins the cluster, or one that starts its own where there is no address."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # whatever the user's own clusters have
    return {**os.environ, "RAY_ADDRESS": address, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(PROJECT)} | token


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(address: str, cwd: Path, *words: str) -> "subprocess.Popen[str]":
    """Python in a folder from which none may import: it holds a numpy.py."""
    (cwd / "numpy.py").write_text("raise SystemExit('executed')\n")
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=environment(address), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


_RUNS = """
import json, sys
from pathlib import Path
from deep_components.experiments.engines import run_on_ray
from deep_components.experiments.execution import Options, Slot
from tests.experiments.runs import fake_run

runs = [fake_run(Path(sys.argv[1]), seed, lr=14 if seed == 31 else 0.01) for seed in (30, 31, 32)]
engine = run_on_ray(runs, Slot(threads=1), False, Options())
print(json.dumps({outcome.run.seed: outcome.status for outcomes in engine for outcome in outcomes}))
"""


@pytest.mark.parametrize("own", [True, False], ids=["started", "joined"])
def test_ray_makes_the_same_records(own: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """On a cluster that the runner starts, and on one that is there; one run fails, and the others do not."""
    process = start("" if own else request.getfixturevalue("cluster"), tmp_path, "-c", _RUNS, str(tmp_path))
    output, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert json.loads(output.splitlines()[-1]) == {"30": "finished", "31": "failed", "32": "finished"}
    runs = [fake_run(tmp_path, seed, lr=14 if seed == 31 else 0.01) for seed in (30, 31, 32)]
    assert [record(run)["status"] for run in runs] == ["finished", "failed", "finished"]
    again = {outcome.run.seed: outcome.status for some in run_locally(runs, [Slot()], Options()) for outcome in some}
    assert again == {30: "kept", 31: "failed", 32: "kept"}


def test_a_run_whose_worker_is_killed_ends_in_the_same_bytes(cluster: str, log: Path, tmp_path: Path) -> None:
    """The training is told by Linux that its worker ended, saves its state, and goes on in another worker."""

    def words(folder: Path, *more: str) -> list[str]:
        script = ["--setting=two_stage", "--train=deep_components.run_train2", "--evaluate=deep_components.run_test2"]
        users = [f"--data_dir={log}", f"--output_dir={folder}", "--seeds=30", "--epochs=60", "--device=cpu", *more]
        return [*script, "--no-untrained", "--method=lcron", *SMALL, "--print_freq=1", "--", *users]

    run_experiments.main(words(tmp_path / "local", "--threads=1"))
    folder = tmp_path / "ray"
    command = ["-m", "deep_components.run_experiments", *words(folder, "--threads=1", "--engine=ray")]
    process = start(cluster, tmp_path, *command)
    steps = folder / "seed30/train.jsonl"
    wait_for(lambda: process.poll() is not None or (steps.exists() and steps.stat().st_size > 0))
    assert process.poll() is None, process.communicate()
    training = next(int(path.name) for path in Path("/proc").glob("[0-9]*") if _trains_in(path, folder))
    os.kill(parent(training), signal.SIGKILL)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    attempts = json.loads((folder / "seed30/run.json").read_text())["attempts"]
    assert [attempt.get("status") for attempt in attempts][1:] == ["finished"]
    for name in ("retrieval.safetensors", "rank.safetensors"):
        assert (folder / "seed30" / name).read_bytes() == (tmp_path / "local/seed30" / name).read_bytes()


def _trains_in(process: Path, folder: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "deep_components.experiments.attached" in words and f"--output_dir={folder / 'seed30'}" in words


_KILLING = """
import os, signal, sys
from pathlib import Path
from deep_components.dataset.importers.table import assemble, clean, command, history, scan, scratch, tasks
from deep_components.cli import run_command

once, marks = scratch.once, Path(sys.argv[1])

def killed_once(function, journal, *task):
    append, appended = scratch.append, []
    def end_first(mark):
        try:
            (marks / f"{function.__name__}.{mark}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
    def counted(*arguments):
        append(*arguments)
        appended.append(1)
        if len(appended) == 2:
            end_first("within")
    for module in (scan, clean, history):
        module.append = counted
    result = once(function, journal, *task)
    end_first("after")
    for module in (scan, clean, history):
        module.append = append
    return result

tasks.once = killed_once
sys.exit(run_command(command.main, sys.argv[2:]))
"""


def test_an_import_whose_workers_are_killed_makes_the_same_log(cluster: str, tmp_path: Path) -> None:
    """In each pass one in the middle of a task, and one that has done all of it but not said so."""
    path = tables.write(tmp_path / "in", tables.table(), files=4)
    import_table(path, tmp_path / "local")
    (marks := tmp_path / "marks").mkdir()
    words = [f"--mapping={path}", f"--output_dir={tmp_path / 'log'}", "--jobs=2", "--engine=ray"]
    process = start(cluster, tmp_path, "-c", _KILLING, str(marks), *words)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    passes = {f"{name}.{when}" for name in ("scan", "clean") for when in ("within", "after")}
    assert {mark.name for mark in marks.iterdir()} >= passes | {"derive.after", "assemble.after"}
    assert tables.contents(tmp_path / "log") == tables.contents(tmp_path / "local")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "local", "log", "marks", "numpy.py"}


def test_a_problem_of_the_table_is_a_sentence(cluster: str, tmp_path: Path) -> None:
    rows = tables.table(40)
    rows["left_at"] = "lost"
    path = tables.write(tmp_path / "in", rows)
    words = [f"--mapping={path}", f"--output_dir={tmp_path / 'log'}", "--engine=ray", "--jobs=2"]
    process = start(cluster, tmp_path, "-m", "deep_components", "import", *words)
    _, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, said.count("\n")) == (2, 1), said
    assert said.startswith("error: ") and "holds 'lost', which order of [groups] does not name" in said


def test_an_address_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(InputError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there; start one"),
        ray_cluster(),
    ):
        pass
