"""What ``pip install .`` gives: the command, the whole package, and the pinned packages as dependencies."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SMALL, small_log

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the project is installed into, without network and without its dependencies."""
    if not {"pip", "setuptools"} <= {found.name for found in importlib.metadata.distributions()}:
        pytest.skip("setuptools and pip are not installed, and a test does not fetch them")
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(PROJECT / "deep_components", source / "deep_components", ignore=shutil.ignore_patterns("__pyc*"))
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements.txt",
        "requirements-optuna.txt",
        "requirements-ray.txt",
        "requirements-serve.txt",
    ):
        shutil.copy(PROJECT / name, source)
    (source / "tests").mkdir()
    (source / "tests/__init__.py").touch()
    flags = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, f"--target={folder / 'target'}", str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "target"


def lcron(installed: Path, cwd: Path, *arguments: str) -> str:
    """Its output, run in another folder, where the project's own files are not."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(installed / "bin/lcron"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_complete_and_alone(installed: Path) -> None:
    ours = PROJECT / "deep_components"
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    there = installed / "deep_components"
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file() and path.suffix != ".pyc"} == files
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "deep_components", "bin"
    }  # fmt: skip


def test_the_dependencies_are_the_pins(installed: Path) -> None:
    metadata = next(installed.glob("lcron-*.dist-info")).joinpath("METADATA").read_text()
    required = re.findall(r"^Requires-Dist: ([^;\n]+)(; .*)?$", metadata, re.MULTILINE)
    pins = [line for line in (PROJECT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [name for name, extra in required if not extra] == pins
    assert [name for name, extra in required if "ray" in extra] == ["ray[train]==2.60.0"]


def test_the_installed_command_trains(
    installed: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert "import movielens" in lcron(installed, tmp_path, "--help")
    where = [f"--data_dir={small_log(tmp_path_factory)}", "--output_dir=run", "--device=cpu"]
    lcron(installed, tmp_path, "train", "--cascade=two_stage", *SMALL, *where)
    lcron(installed, tmp_path, "test", *where)
    assert "lcron" in lcron(installed, tmp_path, "table", "run")
