"""The command lcron: its names, its help, and what it imports."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from deep_components.commands import COMMANDS, main

PROJECT = Path(__file__).parents[2]
EARLIER = {  # names under which users know the commands
    "collect_metrics": "table",
    "collect_costs": "table",
    "collect_streaming": "table",
    "report": "report",
    "doctor": "doctor",
    "dataset.movielens": "import movielens",
    "import_checkpoint": "import checkpoint",
    "export_checkpoint": "export checkpoint",
}


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(listed) == len(COMMANDS)
    assert all(line.startswith(f"  {name} ") for line, name in zip(listed, COMMANDS, strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lcron"])
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: lcron {name} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["tabel", "runs"], "did you mean table?"),
        (["import", "movilens"], "did you mean import movielens?"),
        (["export", "checkpont"], "did you mean export checkpoint?"),
        (["xyz"], "choose one of train, test"),
        ([], "choose one of train, test"),
    ],
)
def test_an_unknown_command(arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert near in error and error.count("\n") == 1


def test_a_mistake_is_a_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'absent'}")


def test_only_what_is_run_is_imported() -> None:
    script = "import sys; from deep_components.commands import main; main(['--help']); main(['tabel'])\n"
    script += "sys.exit(bool({'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", EARLIER)
def test_the_earlier_names_work(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As the command, with ``python -m``; imported, they do nothing."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"deep_components.{module}", run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: python -m deep_components {EARLIER[module]} " in " ".join(capsys.readouterr().out.split())
    runpy.run_module(f"deep_components.{module}")
