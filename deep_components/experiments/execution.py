"""Making one run: train and evaluate it in processes of its own, and keep its record."""

import datetime
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_components.errors import InputError
from deep_components.experiments import records
from deep_components.experiments.plan import Part, Run
from deep_components.runs import checkpoint

USERS_MISTAKE = 2  # the exit code of a command that refuses its input

_PROJECT = Path(__file__).parents[2]
_ERROR_LINES = 200  # of the end of a log are searched for the error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """What one run at a time may use. None: as the user's arguments and environment say."""

    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Options:
    """How to treat what the run folders hold.

    Args:
        force: make finished runs, and runs of other arguments, again.
        extend: a run of fewer days or passes goes on.
        discard_state: remove the saved state of a run when it is finished; it cannot be extended then.
    """

    force: bool = False
    extend: bool = False
    discard_state: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, kept (it was finished before), failed or interrupted."""

    run: Run
    status: str
    seconds: float = 0.0
    error: str = ""
    code: int = 0
    log: Path | None = None  # of the command that failed


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user stops all runs."""


class CommandFailed(Exception):  # noqa: N818 - carries the command's error
    """A command of a run ended with an error."""

    def __init__(self, error: str, code: int, log: Path) -> None:
        super().__init__(error)
        self.error, self.code, self.log = error, code, log


class Commands:
    """The processes of this runner, so that all can be stopped."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._said: set[str] = set()

    def run(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path, lock: int) -> None:
        """Run ``python -m command`` with its output appended to ``log``.

        Raises CommandFailed with the sentence the command ended with; Interrupted after :meth:`stop`.
        """
        attached = [sys.executable, "-m", "deep_components.experiments.attached", str(os.getpid()), *command]
        with log.open("ab") as output:
            start = output.tell()
            with self._guard:
                if self._stopping:
                    raise Interrupted
                process = subprocess.Popen(
                    attached,
                    cwd=cwd,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C reaches the runner, which stops its commands
                )
                self._running.add(process)
            code = process.wait()
        with self._guard:
            self._running.discard(process)
            if self._stopping and code:
                raise Interrupted
        text = log.read_bytes()[start:].decode(errors="replace")
        if code:
            raise CommandFailed(error_sentence(text, code), code, log)
        for line in text.splitlines():
            if line not in self._said:  # runs repeat the warnings about their data
                self._said.add(line)
                logger.info("%s", line)

    def stop(self) -> None:
        """Interrupt the running commands and start no other."""
        with self._guard:
            self._stopping = True
            for process in self._running:
                process.terminate()


def error_sentence(log: str, code: int) -> str:
    """The one sentence that says why a command failed, from the end of its output."""
    lines = [line.strip() for line in log.splitlines()[-_ERROR_LINES:] if line.strip()]
    for line in reversed(lines):
        before, marker, sentence = line.partition("error: ")
        if marker and (not before or before.endswith(": ")):  # ours, or argparse's "prog: error: "
            return sentence
    if code < 0:
        return f"ended by signal {-code}{'; was there enough memory?' if code == -9 else ''}"
    return lines[-1] if lines else f"ended with exit code {code}"


def execute(run: Run, slot: Slot, options: Options, commands: Commands) -> Outcome:
    """Make the run, or what is left of it. Errors end in the outcome, so that other runs go on."""
    started = time.monotonic()
    try:
        status = _make(run, slot, options, commands)
        return Outcome(run, status, time.monotonic() - started)
    except Interrupted:
        return Outcome(run, "interrupted", time.monotonic() - started)
    except CommandFailed as failure:
        return Outcome(run, "failed", time.monotonic() - started, failure.error, failure.code, failure.log)
    except InputError as error:
        return Outcome(run, "failed", time.monotonic() - started, str(error), USERS_MISTAKE)
    except Exception as error:  # a defect of ours in one run: it is logged whole, and the others go on
        logger.exception("%s", run.title)
        return Outcome(run, "failed", time.monotonic() - started, f"{type(error).__name__}: {error}", 1)


def _make(run: Run, slot: Slot, options: Options, commands: Commands) -> str:
    with records.locked(run.folder) as lock:
        if options.force:
            records.clear(run.folder)
        held = records.holding(run.folder)
        records.check_same_run(run, held, options.extend)
        left = [part for part in run.parts if not held.done(run, part)]
        if not left and held.record is not None and held.record.get("status") == "finished":
            return "kept"
        record = records.new_record(run, held)
        attempt: dict[str, Any] = {"started": _now(), "host": socket.gethostname(), "status": "running"}
        attempt |= {"device": slot.device, "threads": slot.threads}
        record["attempts"].append(attempt)
        checkpoint.write_json(run.folder / checkpoint.RUN_FILE, record)
        try:
            for part in left:
                _make_part(run, part, slot, commands, lock, record)
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            attempt |= {"error": str(error)} if status == "failed" else {}
            _end(run, record, attempt, status)
            raise
        if options.discard_state:
            (run.folder / checkpoint.STATE_FILE).unlink(missing_ok=True)
        _end(run, record, attempt, "finished")
        return "finished"


def _make_part(run: Run, part: Part, slot: Slot, commands: Commands, lock: int, record: dict[str, Any]) -> None:
    """Train and evaluate, as far as it is not done."""
    environment = _environment(slot)
    log = run.folder / records.LOG_FILE
    held = records.holding(run.folder)
    if not held.trained(run, part):
        command = run.train_command(part, held.can_resume(run, part))
        commands.run(_with_device(command, slot), run.cwd, environment, log, lock)
        records.add_cost(record, run.folder)
        checkpoint.write_json(run.folder / checkpoint.RUN_FILE, record)
    if not records.holding(run.folder).evaluated(run, part):
        commands.run(_with_device(run.test_command(part), slot), run.cwd, environment, log, lock)
    if run.streaming:
        records.add_streamed(run, part)


def _with_device(command: Sequence[str], slot: Slot) -> list[str]:
    return [*command, f"--device={slot.device}"] if slot.device else list(command)


def _environment(slot: Slot) -> dict[str, str]:
    paths = [str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return changes | ({"OMP_NUM_THREADS": str(slot.threads)} if slot.threads else {})


def _end(run: Run, record: dict[str, Any], attempt: dict[str, Any], status: str) -> None:
    attempt |= {"status": status, "ended": _now()}
    record["status"] = status
    config = records.read_json(run.folder / checkpoint.CONFIG_FILE) or {}
    record |= {name: config.get(name) for name in ("commit", "device", "device_name", "threads", "versions")}
    checkpoint.write_json(run.folder / checkpoint.RUN_FILE, record)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
