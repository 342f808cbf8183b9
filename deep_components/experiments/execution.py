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
from deep_components.experiments.plan import Part, Run
from deep_components.files import read_bytes, regular
from deep_components.ray_cluster import environment
from deep_components.runs.folder import LOG_FILE, RUNNER_LOCK_FILE, only_user, remove_run, remove_state
from deep_components.runs.records import (
    FolderContents,
    add_cost,
    add_streamed_day,
    check_same_run,
    end_record,
    read_folder,
    start_record,
)

REFUSED = 2  # the exit code of a command that refuses its input
SECONDS_TO_END = 60.0  # that the commands of a killed runner may need to save a large state

_ERROR_LINES = 200  # of the end of a log are searched for the error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """What one run at a time may use. None: as the user's arguments and environment say."""

    device: str | None = None
    threads: int | None = None  # of each process
    processes: int = 1  # of the training


@dataclass(frozen=True)
class Options:
    """How to treat what the run folders hold."""

    force: bool = False  # make finished runs, and runs of other arguments, again
    extend: bool = False  # a run of fewer days or passes goes on
    any_code: bool = False  # runs of other code are kept and go on
    discard_state: bool = False  # remove the saved state of a finished run, which cannot be extended then


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, kept (it was finished before), failed or interrupted."""

    run: Run
    status: str
    seconds: float = 0.0
    error: str = ""
    code: int = 0
    log: Path | None = None  # of the command that failed

    @property
    def done(self) -> bool:
        return self.status in ("finished", "kept")


class Ended(Exception):  # noqa: N818 - not always an error
    """How a run ended, raised where a command did not succeed; ``how``: fields of :class:`Outcome`."""

    def __init__(self, status: str, **how: Any) -> None:
        super().__init__(how.get("error", ""))
        self.status, self.how = status, how


class Commands:
    """The processes of this runner, so that all can be stopped."""

    def __init__(self) -> None:
        self._guard, self._stopping = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._said: set[str] = set()

    def run(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path, lock: int) -> None:
        """Run ``python -m command`` with its output appended to ``log``; it holds the lock too.

        Raises Ended: failed, with the sentence the command ended with, or after :meth:`stop` interrupted.
        """
        attached = [sys.executable, "-m", "deep_components.experiments.attached", str(os.getpid()), *command]
        with open(log, "ab", opener=regular) as output:
            start = output.tell()
            with self._guard:
                if self._stopping:
                    raise Ended("interrupted")
                process = subprocess.Popen(  # in a new session: Ctrl-C reaches the runner, which stops its commands
                    attached, cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, pass_fds=(lock,), start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            code = process.wait()
        with self._guard:
            self._running.discard(process)
            if self._stopping and code:
                raise Ended("interrupted")
        text = read_bytes(log)[start:].decode(errors="replace")
        if code:
            raise Ended("failed", error=error_sentence(text, code), code=code, log=log)
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


def execute(run: Run, slot: Slot, options: Options, commands: Commands | None = None) -> Outcome:
    """Make the run, or what is left of it. Errors end in the outcome, so that other runs go on."""
    started = time.monotonic()
    try:
        ended = Ended(_make(run, slot, options, commands or Commands()))
    except Ended as otherwise:
        ended = otherwise
    except InputError as refusal:
        ended = Ended("failed", error=str(refusal), code=REFUSED)
    except Exception as defect:  # of ours, in one run: it is logged whole, and the others go on
        logger.exception("%s", run.title)
        ended = Ended("failed", error=f"{type(defect).__name__}: {defect}", code=1)
    return Outcome(run, ended.status, time.monotonic() - started, **ended.how)


def _make(run: Run, slot: Slot, options: Options, commands: Commands) -> str:
    with only_user(run.folder, RUNNER_LOCK_FILE, "making this run", SECONDS_TO_END) as lock:
        if options.force:
            remove_run(run.folder, [])
        held = read_folder(run.folder)
        check_same_run(held, run.config, run.streaming, options.extend, options.any_code, run.test_random_items)
        left = [part for part in run.parts if not _done(held, run, part, options.any_code)]
        if not left and held.record.get("status") == "finished":
            return "kept"
        attempt = {"started": _now(), "host": socket.gethostname(), "device": slot.device, "threads": slot.threads}
        record = start_record(held, _about(run), attempt)
        status, said = "finished", ""
        try:
            for part in left:
                _make_part(run, part, slot, commands, lock, record, options.any_code)
        except BaseException as error:
            status, said = error.status if isinstance(error, Ended) else "failed", str(error)
            raise
        finally:
            end_record(run.folder, record, ({"error": said} if said else {}) | {"ended": _now()}, status)
        if options.discard_state:
            remove_state(run.folder)
        return "finished"


def _done(held: FolderContents, run: Run, part: Part, any_code: bool) -> bool:
    if run.streaming:
        return held.streamed_day(part.test_day, run.checksums[part.test_day], run.test_random_items)
    return held.trained(run.trained_days(part), run.epochs) and _evaluated(held, run, part, any_code)


def _evaluated(held: FolderContents, run: Run, part: Part, any_code: bool) -> bool:
    scores = "--save_scores" in run.evaluation
    return held.evaluated(part.test_day, run.checksums[part.test_day], scores, any_code, run.test_random_items)


def _make_part(
    run: Run, part: Part, slot: Slot, commands: Commands, lock: int, record: dict[str, Any], any_code: bool
) -> None:
    """Train and evaluate, as far as it is not done."""

    def command(words: Sequence[str]) -> None:
        more = [f"--device={slot.device}"] if slot.device else []
        more += ["--any_code"] if any_code else []
        commands.run([*words, *more], run.cwd, environment(slot.threads), run.folder / LOG_FILE, lock)

    held = read_folder(run.folder)
    days = run.trained_days(part)
    if not held.trained(days, run.epochs):
        command(run.train_command(part, resume=bool(run.epochs) and held.resumable(days)))
        add_cost(run.folder, record)
    if not _evaluated(read_folder(run.folder), run, part, any_code):
        command(run.test_command(part))
    if run.streaming:
        add_streamed_day(run.folder, record, len(part.train_days))


def _about(run: Run) -> dict[str, Any]:
    """What a run's record says of it."""
    last = run.parts[-1]
    return {
        "name": run.name, "variant": run.variant, "setting": run.config["setting"], "seed": run.seed,
        "streaming": run.streaming, "data": run.config["data"], "data_dir": str(run.data_dir),
        "train_days": list(run.trained_days(last)), "test_day": last.test_day, "data_checksums": dict(run.checksums),
        "identity": dict(run.config["arguments"]),
    }  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
