"""docs/cascades.md: its steps, run as they stand there in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deep_components import run_experiments
from deep_components.files import read_json

PROJECT = Path(__file__).parents[1]
SMALL = "--batch_size=16 --emb_dim=4 --nn_units=16 --device=cpu"


def steps(heading: str) -> list[str]:
    """The code blocks of a section, in order."""
    section = (PROJECT / "docs/cascades.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [textwrap.dedent(block) for block in re.findall(r" *```\w+\n(.*?) *```\n", section, re.DOTALL)]


@pytest.fixture
def project(tmp_path: Path, log: Path) -> Path:
    """A copy that may be changed, with the log as its data and a command lcron."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "deep_components", tmp_path / "deep_components", ignore=ignored)
    (tmp_path / "data").symlink_to(log)
    command = tmp_path / "bin/lcron"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nname=$1; shift; case $name in train | experiments) set -- "$@" {SMALL};; esac\n'
                       f'exec "{sys.executable}" -m deep_components "$name" "$@"\n')  # fmt: skip
    command.chmod(0o755)
    return tmp_path


def bash(project: Path, script: str) -> str:
    environment = os.environ | {"PATH": f"{project / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-euc", script], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_quotas(project: Path) -> None:
    file, training, table = steps("Changing quotas")
    (project / "narrow.toml").write_text(file)
    bash(project, training)
    printed = bash(project, table)
    assert "narrow" in printed and "joint_recall@10@10" in printed and "retrieval_recall@10@20" in printed


def test_all_methods(project: Path) -> None:
    """With one seed and one method, to save time; the other command is parsed."""
    command, stated = steps("All methods on a cascade")
    (project / "narrow.toml").write_text(steps("Changing quotas")[0])
    printed = bash(project, command.replace("lcron,arf_v2", "lcron").replace("30,31", "30"))
    assert "joint_recall@10@10" in printed and "untrained" in printed
    assert len([*project.glob("runs/narrow/lcron/*/seed30/metrics.json")]) == 1
    words = shlex.split(stated.replace("narrow.toml", str(project / "narrow.toml")))
    args, methods, training = run_experiments.parse_args(words[2:])
    assert [method.name for method in methods] == ["lcron", "lcron_tau_20"]
    assert (args.data_dir, training) == (Path("data"), ["--batch_size=64"])


def test_another_model(project: Path) -> None:
    file, naming = steps("Changing a model")
    models = project / "deep_components/models"
    (models / "bilinear.py").write_text(file)
    importing, entry = naming.strip().split("\n\n")
    source = (models / "__init__.py").read_text()
    known = "from deep_components.models.din import DIN\n"
    assert known in source
    source = re.sub(r"^MODELS: .*$", entry, source.replace(known, f"{importing}\n{known}"), flags=re.MULTILINE)
    (models / "__init__.py").write_text(source)
    cascade, training, _ = steps("Changing quotas")
    (project / "narrow.toml").write_text(cascade.replace('model = "dssm"', 'model = "bilinear"'))
    bash(project, training.replace("30 31", "30"))
    assert 0 < read_json(project / "runs/narrow/seed30/metrics.json")["retrieval_recall@10@20"] < 1


def test_another_operator(project: Path) -> None:
    function, naming, training = steps("Changing the selection operator")
    with (project / "deep_components/loss/selection.py").open("a") as file:
        file.write(f"\n\n{function}\n\n{naming}")
    bash(project, training)
    assert read_json(project / "runs/gate/config.json")["arguments"]["sort"] == "gate"
