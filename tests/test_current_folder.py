"""Nothing in the current folder is executed: it may be that of a log. Each test stands in a folder that would tell."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deep_components import ray_cluster
from tests.helpers import DAYS, SMALL, small_log
from tests.reporting.fake_runs import write_run

PROJECT = Path(__file__).parents[1]
# What Python, the standard library's modules, the packages and this project would import.
MODULES = (
    *("pathlib", "tqdm", "json", "random", "typing", "queue", "runpy", "multiprocessing", "socket"),
    *("sitecustomize", "usercustomize", "readline", "numpy", "torch", "pandas", "pyarrow", "safetensors", "ray", "pip"),
    *("matplotlib", "jinja2", "tests", "benchmarks", "conftest", "my_method"),
)


def hostile(folder: Path) -> Path:
    """Put modules into the folder, half of them packages, that write a file when they are imported; and settings."""
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(MODULES):
        path = folder / f"{name}.py" if index % 2 else folder / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(folder / 'EXECUTED')!r}, 'a').write('{name} ')\n")
    (folder / "matplotlibrc").write_bytes(b"text.usetex: True\n\xff")
    (folder / "pyproject.toml").write_text("[")
    (folder / ".env").write_text("PYTHONSTARTUP=pathlib.py\n")
    return folder


def executed(folder: Path) -> str:
    path = folder / "EXECUTED"
    return path.read_text() if path.exists() else ""


def environment(**changes: str) -> Mapping[str, str]:
    """A user's who has set nothing."""
    ours = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | changes


def run(cwd: Path, *command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**changes), capture_output=True, text=True, check=False
    )


def test_the_folder_would_tell(tmp_path: Path) -> None:
    run(hostile(tmp_path), sys.executable, "-c", "import tqdm, pathlib")
    assert executed(tmp_path) == "tqdm pathlib "


@pytest.mark.parametrize("path", [None, ":", ".:relative:/nowhere:"])
def test_a_script_started_in_a_log(path: str | None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Training, evaluation and table once; the other values of PYTHONPATH up to the first command, which refuses."""
    log = tmp_path / "log"
    shutil.copytree(small_log(tmp_path_factory), log)
    sizes = [argument for argument in SMALL if not argument.startswith("--loss_type")]
    sizes += ["--seeds=30", "--device=cpu", "--test_day=" + (DAYS[-1] if path == ":" else "2000-01-01")]
    arguments = ["--methods=lcron", f"--data_dir={hostile(log)}", f"--output_dir={tmp_path / 'runs'}", *sizes]
    changes = {"UNTRAINED": "no"} | ({} if path is None else {"PYTHONPATH": path})
    done = run(log, "bash", PROJECT / "two_stage/all.sh", *arguments, **changes)
    assert executed(log) == ""
    if path == ":":
        assert done.returncode == 0 and "lcron " in done.stdout, done.stderr
    else:
        assert done.returncode == 2 and "2000-01-01" in done.stderr


def test_the_environment_is_checked_and_made_there(tmp_path: Path) -> None:
    """Python's own modules and pip, in the folder of a log."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(PROJECT / "setup.sh", project)
    (project / "requirements.txt").write_text("")
    (tmp_path / "python3.11").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(hostile(tmp_path / "log"), "bash", "-euc", f"source '{project}/setup.sh'", PYTHON="", PATH=path)
    assert done.returncode == 0, done.stderr
    assert (project / ".venv/bin/python").exists()
    assert executed(tmp_path / "log") == ""


def test_the_tests_start_in_the_project(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = - ] || echo "$PWD $PYTHONSAFEPATH $PYTHONPATH $*"\n')
    python.chmod(0o700)
    done = run(tmp_path, "bash", PROJECT / "test.sh", "-x", PYTHON=str(python))
    assert (
        done.stdout.splitlines()[-1] == f"{PROJECT} 1 {PROJECT} -m pytest -n auto --maxprocesses=4 --dist=loadfile -x"
    )


def test_a_command_typed_there(tmp_path: Path) -> None:
    """Python has put the folder first; the command takes it away before it imports anything."""
    one = write_run(tmp_path / "run")
    log = hostile(tmp_path / "log")
    command = ("report", one, f"--output={tmp_path / 'report.html'}", f"--figures={tmp_path / 'figures'}")
    done = run(log, sys.executable, "-m", "deep_components", *command, PYTHONPATH=str(PROJECT))
    assert done.returncode == 0 and (tmp_path / "report.html").exists(), done.stderr
    assert executed(log) == ""


def test_what_the_runner_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f":.:relative:{tmp_path}:{PROJECT}")
    expected = {"PYTHONPATH": f"{PROJECT}:{tmp_path}", "PYTHONSAFEPATH": "1"}
    assert expected.items() <= ray_cluster.environment().items()
