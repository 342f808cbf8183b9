"""train.jsonl: an object for each step of a training."""

import io
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deep_components.errors import InputError
from deep_components.files import read_bytes, write_atomically
from deep_components.training.tensorboard import VALIDATION, ScalarLog

logger = logging.getLogger(__name__)


class StepLog:
    """Writes the steps. Terms stay on the device until :meth:`flush`: a step waits for nothing.

    ``kept_steps`` have been made before: of the file at ``path`` their lines stay, but for damaged ones, which are
    dropped with a warning, as nothing but curves and times is taken from them. ``origin`` says what the data are,
    ``method`` names the loss, and ``scalars`` also gets every step. ``may_skip`` of all steps may be left out because
    they were not finite; more are an error. ``skipped`` have been, ``seconds`` are those of all steps. Without a path
    nothing is written, as by all processes of a training but the first.
    """

    def __init__(
        self, path: Path | None, origin: str, method: str, kept_steps: int, may_skip: int = 0, skipped: int = 0,
        scalars: ScalarLog | None = None,
    ) -> None:  # fmt: skip
        self.path, self.origin, self.method, self.scalars = path, origin, method, scalars
        self.may_skip, self.skipped = may_skip, skipped
        kept = _sound_lines(path, kept_steps) if kept_steps and path is not None else {}
        if len(kept) < kept_steps and path is not None:
            missing = kept_steps - len(kept)
            logger.warning("%s: %d of %d steps are damaged or missing; curves lack them", path, missing, kept_steps)
        self.seconds = sum((seconds for _, seconds in kept.values()), start=0.0)
        if path is not None:
            write_atomically(path, lambda file: file.write(b"".join(line for line, _ in kept.values())))
        self._waiting: list[tuple[int, str, float, dict[str, Tensor]]] = []
        self._validated: dict[int, Mapping[str, float]] = {}

    def add(self, step: int, day: str, seconds: float, terms: dict[str, Tensor]) -> None:
        """Note a step, its time and the detached terms of its loss."""
        self._waiting.append((step, day, seconds, terms))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of the validation after a step that still waits."""
        self._validated[step] = metrics

    def flush(self) -> float:
        """Write what waits and return the last loss. InputError when more steps than may be left out are not finite."""
        if not self._waiting:
            return math.nan
        names = list(self._waiting[0][3])
        values = torch.stack([torch.stack([terms[name].double() for name in names]) for *_, terms in self._waiting])
        with self.path.open("a", encoding="utf-8") if self.path is not None else io.StringIO() as file:
            for (step, day, seconds, _), row in zip(self._waiting, values.tolist(), strict=True):
                terms = dict(zip(names, row, strict=True))
                record = {"step": step, "day": day} | {n: v if math.isfinite(v) else None for n, v in terms.items()}
                broken = [name for name, value in terms.items() if not math.isfinite(value)]
                if broken:
                    what = f"{self.method}, step {step}, day {day}: the loss is {terms['loss']}"
                    self._not_finite(f"{what}, and not finite are {', '.join(broken)}")
                    record["skipped"] = True
                self.seconds += round(seconds, 6)
                record |= {f"{VALIDATION}.{name}": value for name, value in self._validated.pop(step, {}).items()}
                record |= {"seconds": round(seconds, 6), "data": self.origin}
                file.write(json.dumps(record) + "\n")
                if self.scalars is not None:
                    self.scalars.add(record)
            file.flush()
            if self.path is not None:
                os.fsync(file.fileno())  # a state that is saved next must not outlive these lines when the power fails
        if self.scalars is not None:
            self.scalars.flush()
        self._waiting.clear()
        return float(values[-1, names.index("loss")])

    def _not_finite(self, what: str) -> None:
        self.skipped += 1
        if not self.may_skip:
            raise InputError(f"{what}; lower --lr, or leave such steps out with --on_nonfinite=skip")
        if self.skipped > self.may_skip:
            raise InputError(
                f"{what}; --on_nonfinite=skip has left out {self.may_skip} already, and 1 % of all steps is its limit; "
                "lower --lr"
            )
        logger.warning("%s; the step is left out", what)


def _lines(path: Path) -> list[bytes]:
    try:
        return read_bytes(path).splitlines(keepends=True)
    except OSError:  # none, or no file
        return []


def _sound_lines(path: Path, steps: int) -> dict[int, tuple[bytes, float]]:
    """The first ``steps`` steps of a log that can be read: step -> its line and its seconds."""
    found: dict[int, tuple[bytes, float]] = {}
    for line in _lines(path):
        try:
            record = json.loads(line)
            step, seconds = record["step"], float(record["seconds"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if type(step) is int and len(found) < step <= steps and math.isfinite(seconds) and line.endswith(b"\n"):
            found[step] = line, seconds
    return found
