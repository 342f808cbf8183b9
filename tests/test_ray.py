"""What runs on Ray: runs, imports and one training, on a local cluster of two CPUs whose workers are killed.

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
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
from tests.helpers import SMALL, contents, wait_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (requirements-ray.txt)"
)
PROJECT = Path(__file__).parents[1]
TOKEN = uuid.uuid4().hex * 2
SECONDS = 600.0  # in which anything here ends on a busy machine


@dataclass
class Cluster:
    address: str
    pid: int  # of the process that started all others


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two CPUs, for one test after another."""
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
        yield Cluster(address.read_text().strip(), process.pid)
    finally:
        process.terminate()
        process.wait(SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def environment(address: str) -> dict[str, str]:
    """For a command that joins the cluster, or one that starts its own where there is no address."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # whatever the user's own clusters have
    return {**os.environ, "RAY_ADDRESS": address, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(PROJECT)} | token


def start(address: str, cwd: Path, *words: str) -> "subprocess.Popen[str]":
    """Python in a folder from which none may import: it holds a numpy.py."""
    (cwd / "numpy.py").write_text("raise SystemExit('executed')\n")
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=environment(address), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code, and what was said on standard error."""
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def descendants(pid: int) -> list[int]:
    """The processes that one has started, and theirs."""
    found = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in path.read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def command_line(pid: int) -> str:
    """The words of a process's command, each followed by a zero character; "" when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


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
    process = start("" if own else request.getfixturevalue("cluster").address, tmp_path, "-c", _RUNS, str(tmp_path))
    output, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert json.loads(output.splitlines()[-1]) == {"30": "finished", "31": "failed", "32": "finished"}
    runs = [fake_run(tmp_path, seed, lr=14 if seed == 31 else 0.01) for seed in (30, 31, 32)]
    assert [record(run)["status"] for run in runs] == ["finished", "failed", "finished"]
    again = {outcome.run.seed: outcome.status for some in run_locally(runs, [Slot()], Options()) for outcome in some}
    assert again == {30: "kept", 31: "failed", 32: "kept"}


def test_a_run_whose_worker_is_killed_ends_in_the_same_bytes(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    """The training is told by Linux that its worker ended, saves its state, and goes on in another worker."""

    def words(folder: Path, *more: str) -> list[str]:
        script = ["--setting=two_stage", "--train=deep_components.run_train2", "--evaluate=deep_components.run_test2"]
        users = [f"--data_dir={log}", f"--output_dir={folder}", "--seeds=30", "--epochs=60", "--device=cpu", *more]
        return [*script, "--no-untrained", "--method=lcron", *SMALL, "--print_freq=1", "--", *users]

    run_experiments.main(words(tmp_path / "local", "--threads=1"))
    folder = tmp_path / "ray"
    command = ["-m", "deep_components.run_experiments", *words(folder, "--threads=1", "--engine=ray")]
    process = start(cluster.address, tmp_path, *command)
    steps = folder / "seed30/train.jsonl"
    wait_for(lambda: process.poll() is not None or (steps.exists() and steps.stat().st_size > 0))
    assert process.poll() is None, process.communicate()
    (training,) = (p for p in descendants(cluster.pid) if "experiments.attached" in command_line(p))
    os.kill(parent(training), signal.SIGKILL)
    assert ended(process)[0] == 0
    attempts = json.loads((folder / "seed30/run.json").read_text())["attempts"]
    assert [attempt.get("status") for attempt in attempts][1:] == ["finished"]
    for name in ("retrieval.safetensors", "rank.safetensors"):
        assert (folder / "seed30" / name).read_bytes() == (tmp_path / "local/seed30" / name).read_bytes()


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


def test_an_import_whose_workers_are_killed_makes_the_same_log(cluster: Cluster, tmp_path: Path) -> None:
    """In each pass one in the middle of a task, and one that has done all of it but not said so."""
    path = tables.write(tmp_path / "in", tables.table(), files=4)
    import_table(path, tmp_path / "local")
    (marks := tmp_path / "marks").mkdir()
    words = [f"--mapping={path}", f"--output_dir={tmp_path / 'log'}", "--jobs=2", "--engine=ray"]
    process = start(cluster.address, tmp_path, "-c", _KILLING, str(marks), *words)
    assert ended(process)[0] == 0
    passes = {f"{name}.{when}" for name in ("scan", "clean") for when in ("within", "after")}
    assert {mark.name for mark in marks.iterdir()} >= passes | {"derive.after", "assemble.after"}
    assert tables.contents(tmp_path / "log") == tables.contents(tmp_path / "local")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "local", "log", "marks", "numpy.py"}


def test_a_problem_of_the_table_is_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    rows = tables.table(40)
    rows["left_at"] = "lost"
    path = tables.write(tmp_path / "in", rows)
    words = [f"--mapping={path}", f"--output_dir={tmp_path / 'log'}", "--engine=ray", "--jobs=2"]
    process = start(cluster.address, tmp_path, "-m", "deep_components", "import", *words)
    code, said = ended(process)
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: ") and "holds 'lost', which order of [groups] does not name" in said


def test_an_address_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(InputError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there; start one"),
        ray_cluster(),
    ):
        pass


# ---- one training ----------------------------------------------------------------------------------------------------

MODELS = ("retrieval.safetensors", "rank.safetensors")
TRAINING = [*SMALL, "--device=cpu", "--epochs=40", "--save_minutes=0", "--pull_from=50", "--print_freq=1"]


def train(cluster: Cluster, log: Path, folder: Path, *more: str) -> "subprocess.Popen[str]":
    words = ["deep_components.run_train2", *TRAINING, f"--data_dir={log}", f"--output_dir={folder}"]
    return start(cluster.address, folder.parent, "-m", *words, "--engine=ray", "--processes=2", *more)


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that torchrun's two processes make."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "deep_components.run_train2"]
    command += [*TRAINING, f"--data_dir={log}", f"--output_dir={folder}"]
    subprocess.run([sys.executable, *command], cwd=PROJECT, env=environment(""), check=True, timeout=SECONDS)
    return folder


def kill_one(cluster: Cluster, process: "subprocess.Popen[str]", folder: Path, last: float = 0.0) -> None:
    """Kill a process of the training when a state was saved later than the one of time ``last``."""
    state = folder / "training_state.safetensors"
    wait_for(lambda: process.poll() is not None or (state.exists() and state.stat().st_mtime > last))
    assert process.poll() is None, process.communicate()
    workers = [pid for pid in descendants(cluster.pid) if "RayTrainWorker" in command_line(pid)]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)


def test_a_training_whose_process_is_killed_ends_in_the_same_bytes(
    cluster: Cluster, log: Path, trained: Path, tmp_path: Path
) -> None:
    """Those of torchrun's. Without a restart left, a sentence says how to go on."""
    folder = tmp_path / "run"
    process = train(cluster, log, folder)
    kill_one(cluster, process, folder)
    code, said = ended(process)
    assert code == 2 and "was killed" in said.splitlines()[-1] and "--resume goes on" in said, said
    assert "Traceback" not in said
    state = folder / "training_state.safetensors"
    process = train(cluster, log, folder, "--resume", "--max_restarts=1")
    kill_one(cluster, process, folder, state.stat().st_mtime)
    code, said = ended(process)
    assert code == 0 and "160 steps" in said, said
    assert contents(folder, *MODELS) == contents(trained, *MODELS)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "numpy.py"}


def test_a_training_that_is_stopped_goes_on(cluster: Cluster, log: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(cluster, log, folder)
    state = folder / "training_state.safetensors"
    wait_for(lambda: process.poll() is not None or state.exists())
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143 and "the state is saved" in said.splitlines()[-1], said
    assert "Traceback" not in said
    code, said = ended(train(cluster, log, folder, "--resume"))
    assert code == 0, said
    assert contents(folder, *MODELS) == contents(trained, *MODELS)


def test_what_a_training_refuses_is_a_sentence(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    process = train(cluster, log, tmp_path / "run", "--train_days=2020-01-01", "--max_restarts=3")
    code, said = ended(process)
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: ") and "2020-01-01" in said
    assert {path.name for path in tmp_path.iterdir()} == {"numpy.py"}
