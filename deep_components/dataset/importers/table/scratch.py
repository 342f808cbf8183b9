"""The scratch files of an import: every process appends to files of its own, and a task that its process did not end
can be undone and done again.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.dataset.importers.table.plan import Plan


@dataclass
class _Attempt:
    """A task under way that can be undone."""

    journal: Path
    noted: set[Path] = field(default_factory=set)
    unneeded: list[Path] = field(default_factory=list)


_attempt: ContextVar[_Attempt | None] = ContextVar("_attempt", default=None)


def append(plan: Plan, bucket: int, name: str, records: np.ndarray) -> None:
    """Add records to a scratch file that this process alone writes."""
    path = plan.scratch / str(bucket) / f"{name}.{_process()}"
    _note_size(path)
    with path.open("ab") as file:
        file.write(records.tobytes())


def load(plan: Plan, bucket: int, name: str, kind: np.dtype) -> np.ndarray:
    """The records of all processes under a name, in any order."""
    paths = (plan.scratch / str(bucket)).glob(f"{name}.*")
    return np.concatenate([np.zeros(0, kind), *(np.fromfile(path, kind) for path in paths)])


def remove(plan: Plan, bucket: int, name: str) -> None:
    """Remove the files under a name, which no other task needs; within :func:`once` when its caller does so."""
    paths = (plan.scratch / str(bucket)).glob(f"{name}.*")
    attempt = _attempt.get()
    if attempt is not None:
        attempt.unneeded += paths
        return
    for path in paths:
        path.unlink()


def once(function: Callable[..., Any], journal: Path, *task: Any) -> tuple[Any, list[Path]]:
    """``function(*task)``, as if an earlier attempt whose process was killed had not been, and the files that are not
    needed any more. The caller removes these, and then ``journal``, when it has the result: until then the process may
    be killed, and the task is done again."""
    _undo(journal)
    with _noting(_Attempt(journal)) as attempt:
        return function(*task), attempt.unneeded


@contextmanager
def _noting(attempt: _Attempt) -> Iterator[_Attempt]:
    token = _attempt.set(attempt)
    try:
        yield attempt
    finally:
        _attempt.reset(token)


def _note_size(path: Path) -> None:
    """Write the size of a file, to which the attempt is about to append for the first time, to its journal."""
    attempt = _attempt.get()
    if attempt is None or path in attempt.noted:
        return
    size = path.stat().st_size if path.exists() else 0
    with attempt.journal.open("a") as file:
        file.write(json.dumps([str(path), size]) + "\n")
    attempt.noted.add(path)


def _undo(journal: Path) -> None:
    """Give the files that an earlier attempt appended to their sizes before it."""
    if not journal.exists():
        return
    for line in journal.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it was killed in the middle of the line, and wrote nothing yet
            path, size = json.loads(line)
            if Path(path).exists():
                os.truncate(path, size)
    journal.unlink()


@cache
def _process() -> str:
    return uuid.uuid4().hex
