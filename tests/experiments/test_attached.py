"""Commands that end with what started them."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
ATTACHED = '"$INTERPRETER" -m deep_components.experiments.attached "$PARENT" command one two'


def run(folder: Path, script: str, code: str) -> "subprocess.CompletedProcess[str]":
    """A script of bash that starts Python code as a module."""
    (folder / "command.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{PROJECT}:{folder}", "INTERPRETER": sys.executable}
    return subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_arguments_and_exit_code(tmp_path: Path) -> None:
    code = "import sys\nprint(__name__, *sys.argv[1:])\nraise SystemExit(7)"
    made = run(tmp_path, f"PARENT=$$; {ATTACHED}; exit $?", code)
    assert (made.returncode, made.stdout, made.stderr) == (7, "__main__ one two\n", "")


def test_an_interpreter_that_a_script_starts(tmp_path: Path) -> None:
    """PYTHON may name a script that starts the interpreter and waits for it."""
    made = run(tmp_path, f"export PARENT=$$; bash -c '{ATTACHED}; exit $?'; exit $?", "print('made')")
    assert (made.returncode, made.stdout, made.stderr) == (0, "made\n", "")


def test_one_whose_parent_has_ended(tmp_path: Path) -> None:
    made = run(tmp_path, f"PARENT=$(bash -c 'echo $$'); {ATTACHED}; exit $?", "print('made')")
    assert (made.returncode, made.stdout) == (130, "")


def test_an_interruption_while_it_imports(tmp_path: Path) -> None:
    """Before the module can take charge of it: no traceback."""
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    made = run(tmp_path, f"PARENT=$$; {ATTACHED}; exit $?", code)
    assert (made.returncode, made.stdout, made.stderr) == (130, "", "")
