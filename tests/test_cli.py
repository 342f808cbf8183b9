"""Exit codes and sentences of the commands."""

import os
import subprocess
import sys

import pytest

from deep_components.cli import progress, run_command
from deep_components.errors import InputError


def test_success_gives_0_and_the_arguments_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []
    assert run_command(seen.append, ["--a=1", "b"]) == 0
    assert seen == [["--a=1", "b"]]
    assert capsys.readouterr() == ("", "")


def test_by_default_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--flag"])
    seen: list[list[str]] = []
    run_command(seen.append)
    assert seen == [["--flag"]]


def test_a_mistake_is_one_sentence_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken(_: list[str]) -> None:
        raise InputError("data: no such folder; make it")

    assert run_command(mistaken, []) == 2
    assert capsys.readouterr() == ("", "error: data: no such folder; make it\n")


def test_a_sentence_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken(_: list[str]) -> None:
        raise InputError("data: holds 'forged\nlines\r\u2028here'; make it")

    assert run_command(mistaken, []) == 2
    assert capsys.readouterr().err.splitlines() == ["error: data: holds 'forged lines  here'; make it"]


def test_what_a_terminal_would_obey_is_written_out() -> None:
    """In refusals, messages and tracebacks, through the command itself."""
    script = """if True:
        import logging, sys
        from deep_components.cli import run_command
        from deep_components.errors import InputError
        nasty = "day '\\x1b[2J\\x9b\\x07\\u202e\\ud800' \\u00e9"
        def command(_):
            logging.warning("%s\\nerror: forged", nasty)
            try:
                raise ValueError(nasty)
            except ValueError:
                logging.exception("a defect")
            raise InputError(nasty)
        sys.exit(run_command(command, []))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 2
    shown = r"day '\x1b[2J\x9b\x07\u202e\ud800' é"
    first, second, *_, last, error = done.stderr.decode().splitlines()
    assert (first, second, last, error) == (
        *(rf"{shown}\nerror: forged", "a defect", f"ValueError: {shown}", f"error: {shown}"),
    )  # fmt: skip


def test_a_reader_that_has_seen_enough() -> None:
    script = "import sys\nfrom deep_components.cli import run_command\n"
    script += "sys.exit(run_command(lambda _: [print('line', flush=True) for _ in range(100_000)], []))"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_an_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted, []) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError, AssertionError, OSError])
def test_our_own_defects_keep_their_traceback(error: type[Exception]) -> None:
    def broken(_: list[str]) -> None:
        raise error("defect")

    with pytest.raises(error, match="defect"):
        run_command(broken, [])


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting", "number")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
