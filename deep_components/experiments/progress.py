"""What the user sees of many runs: one progress bar on a terminal, and a line for each run that ends."""

import json
import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm

from deep_components.cli import printable
from deep_components.experiments.execution import Outcome
from deep_components.experiments.plan import Run
from deep_components.files import regular
from deep_components.runs.folder import STEP_LOG_FILE

_BAR = "{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}{postfix}]"
_TAIL = 4096  # bytes at the end of a step log that hold its last line

logger = logging.getLogger(__name__)


class Progress:
    """The share of all runs that is done, a run in training counting by its steps."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._open = {run.folder: run for run in runs}
        self._before = {run.folder: _share(run) for run in runs}
        shown, done = sys.stderr.isatty(), sum(self._before.values())
        self._bar = tqdm(total=len(runs), initial=done, bar_format=_BAR, disable=not shown, leave=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def look(self) -> None:
        """Read how far the open runs are."""
        if self._bar.disable:
            return
        shares = {folder: _share(run) for folder, run in self._open.items()}
        training = [run.title for folder, run in self._open.items() if shares[folder] > self._before[folder]]
        self._bar.n = len(self._before) - len(self._open) + sum(shares.values())
        self._bar.set_postfix_str(printable("; ".join(training)))

    def ended(self, outcome: Outcome) -> None:
        """Report a run that ended."""
        folder, total = outcome.run.folder, len(self._before)
        if outcome.status == "kept" and not self._bar.disable:  # no time of this session went into it
            self._bar.initial += 1 - self._before[folder]
        self._open.pop(folder, None)
        logger.info("[%d/%d] %s: %s", total - len(self._open), total, outcome.run.title, _sentence(outcome))


def _sentence(outcome: Outcome) -> str:
    if outcome.status == "kept":
        return f"finished before, kept in {outcome.run.folder}"
    if outcome.status == "failed":
        return f"failed: {outcome.error}"
    return f"{outcome.status} after {outcome.seconds:.0f} s -> {outcome.run.folder}"


def _share(run: Run) -> float:
    """How much of its training a run has done, by the last whole line of its step log."""
    try:
        with open(run.folder / STEP_LOG_FILE, "rb", opener=regular) as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().split(b"\n")
        return min(1.0, json.loads(lines[-2])["step"] / run.steps)
    except (OSError, ValueError, IndexError, KeyError, TypeError, ZeroDivisionError):  # not there yet, or damaged
        return 0.0
