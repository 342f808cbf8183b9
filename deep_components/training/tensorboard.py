"""Watching a training in TensorBoard: scalars of every step, written when the step log is (--tensorboard)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deep_components.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
GRADIENT_NORM = "gradient_norm"
VALIDATION = "validation"  # begins the names of a validation's metrics

_NO_TERMS = ("step", "day", "data", "seconds", "loss", "skipped")
_GROUPS = ("weight", GRADIENT_NORM, VALIDATION)


class ScalarLog:
    """The loss, its terms, weights, gradient norms, speed and the metrics of validations as scalars over steps."""

    def __init__(self, writer: "SummaryWriter", batch_size: int) -> None:
        self._writer, self._batch_size = writer, batch_size

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line of train.jsonl; a value that was not finite, null there, is left out."""
        scalars = {"loss": record["loss"], "requests_per_second": self._batch_size / max(record["seconds"], 1e-9)}
        scalars |= {_tag(name): value for name, value in record.items() if name not in _NO_TERMS}
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()


def _tag(name: str) -> str:
    """weight.rank as weight/rank, so that TensorBoard shows a group's charts together; a term as term/<name>."""
    group, _, rest = name.partition(".")
    return f"{group}/{rest}" if group in _GROUPS and rest else f"term/{name}"


def check_installed(wanted: bool) -> None:
    """InputError when TensorBoard is ``wanted`` and its package is missing: to be known before anything is written."""
    if wanted:
        _summary_writer()


def _summary_writer() -> type["SummaryWriter"]:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here
    except ImportError as error:
        raise InputError("--tensorboard: the package tensorboard is missing; install it (pip install tensorboard), "
                         "or leave it out") from error  # fmt: skip
    return SummaryWriter


@contextmanager
def scalar_log(run: Path, wanted: bool, batch_size: int, steps_made: int) -> Iterator[ScalarLog | None]:
    """The run's scalars in ``run/tensorboard``, closed after the block; None when they are not ``wanted``.

    A training that goes on after ``steps_made`` steps continues its curves: TensorBoard drops what earlier files hold
    of later steps, which are made again. Files of an earlier training are removed.
    """
    folder = run / FOLDER
    if not steps_made:
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
    if not wanted:
        yield None
        return
    with _summary_writer()(str(folder), purge_step=steps_made + 1) as writer:
        yield ScalarLog(writer, batch_size)
