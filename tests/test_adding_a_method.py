"""README's three steps of adding a method, taken from README's own text and run in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import small_log

ROOT = Path(__file__).parents[1]


def readme_steps() -> dict[str, str]:
    """The code blocks of README's section, dedented: the loss file, the branch, the script."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Adding a method")[1].split("\n## ")[0]
    blocks = [
        "\n".join(line.removeprefix("   ") for line in block.splitlines()) + "\n"
        for block in re.findall(r"```(?:python|bash)\n(.*?)\n   ```", section, re.DOTALL)
    ]
    assert len(blocks) == 3
    return dict(zip(("loss", "branch", "script"), blocks, strict=True))


def test_the_readmes_three_steps_add_a_method(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    log = small_log(tmp_path_factory)
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("deep_components", "two_stage"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.sh", "run_cascade.sh", "requirements.txt"):
        shutil.copy(ROOT / name, project / name)

    steps = readme_steps()
    (project / "deep_components/loss/mine.py").write_text(steps["loss"])
    command = project / "deep_components/run_train2.py"
    source = command.read_text()
    importing = "from deep_components.loss.lcron import LCRON\n"
    last_branch = "    else:\n        raise unknown_method"
    assert importing in source and last_branch in source
    source = source.replace(importing, importing + "from deep_components.loss.mine import Mine\n")
    command.write_text(source.replace(last_branch, steps["branch"] + last_branch))
    (project / "two_stage/mine.sh").write_text(steps["script"])

    small = ["--seeds=30", "--batch_size=16", "--emb_dim=4", "--nn_units=16", "--device=cpu"]
    environment = {**os.environ, "PYTHON": sys.executable}
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        environment.pop(name, None)

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "two_stage/mine.sh", f"--data_dir={log}", f"--output_dir={tmp_path / 'runs'}", *small, *flags]
        return subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)

    def numbers(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^(mine|untrained) +(0\.\d{4})", done.stdout, re.MULTILINE))

    first = numbers(run())
    assert first.keys() == {"mine", "untrained"}

    loss = project / "deep_components/loss/mine.py"  # the method is changed: its old number is not its number
    loss.write_text(loss.read_text().replace("return {", "loss = 3 * loss + total.square().mean()\n        return {"))
    refused = run()
    assert refused.returncode == 2 and not refused.stdout
    assert "holds a run with other code: deep_components/loss/mine.py; --force makes it again" in refused.stderr
    kept = run("--any_code")
    assert numbers(kept) == first and "Code: " in kept.stdout
