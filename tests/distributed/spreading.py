"""One of two processes that the tests of test_spread.py start: it does all of their scenarios, and notes what it saw.

python -m tests.distributed.spreading FOLDER LOG SHOP RUN
"""

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from deep_components import run_test2, run_train, run_train2
from deep_components.cascade import TWO_STAGE
from deep_components.dataset import columnar
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.log import open_log
from deep_components.distributed import spread
from deep_components.distributed.processes import Processes, joined
from deep_components.distributed.spread import open_days, share_of
from deep_components.errors import InputError
from deep_components.evaluation import day as evaluation
from deep_components.tables import deferred_adam
from deep_components.training import validation
from tests.helpers import DAYS, evaluation_arguments, training_arguments
from tests.test_own_cascade import arguments

BATCH = 8  # requests that a validation or evaluation scores at a time here: several batches a day
SHOP = ("--emb_dim=4", "--nn_units=8", "--batch_size=20", "--epochs=2", "--loss_type=bce", "--dtype=float64",
        "--validate_every=1", "--pull_from=1", "--compact_from=6")  # fmt: skip
EVALUATIONS = {"plain": (), "random items": ("--test_random_items=3",)}


def main() -> None:
    folder, log, shop, run = map(Path, sys.argv[1:])
    rank = int(os.environ["RANK"])
    deferred_adam._STEPS_AT_A_TIME, validation.BATCH_SIZE, evaluation.COMPACT_FROM = 64, BATCH, 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with joined(torch.device("cpu"), 100) as processes:
        assert processes is not None
        seen = {
            "days": days(folder, log, processes),
            "refusal": refusal(processes),
            "meetings": meetings(folder, processes),
            "gathered": gathered(processes),
        }
    seen["measured"] = train_shop(folder, shop)
    run_train2.main(training_arguments(log, folder / "started", "--epochs=0", f"--init_from={run}", *STARTED))
    seen["rows"] = evaluate(folder, log)
    seen["scores"] = refused_scores(folder, log, rank)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


STARTED = ("--compact_from=1", "--pull_from=1", "--dtype=float64")


def days(folder: Path, log: Path, processes: Processes) -> dict[str, Any]:
    """Opens all days, which must be built, and once more, which must be verified; which days this process did so."""
    built, verified = _Built(), Counter[str]()
    logging.getLogger("deep_components").addHandler(built)
    logging.getLogger("deep_components").setLevel(logging.INFO)
    before = columnar._check_values

    def counted(folder: Path, name: str, *rest: Any) -> str:
        verified[folder.name[:10]] += name == "request_id"
        return before(folder, name, *rest)

    def opening(day: str) -> DayCache:
        return open_log(log).open_day(day, TWO_STAGE, folder / "cache")

    opened = open_days(DAYS, opening, processes)
    time.sleep(2 * columnar._JUST_WRITTEN / 1e9)  # younger files are always read
    processes.wait()
    os.environ.pop(columnar.VERIFIED, None)
    with patch.object(columnar, "_check_values", counted):
        open_days(DAYS, opening, processes)
    logging.getLogger("deep_components").removeHandler(built)
    return {"opened": [*opened], "requests": [len(day) for day in opened.values()], "built": built.days,
            "verified": verified}  # fmt: skip


class _Built(logging.Handler):
    """Which days this process builds."""

    def __init__(self) -> None:
        super().__init__()
        self.days = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if "encoding into the columnar cache" in record.getMessage():
            self.days.append(record.getMessage()[:10])


def refusal(processes: Processes) -> str:
    """What a process says when another one cannot open a day."""

    def opening(day: str) -> Any:
        if processes.rank == 1:
            raise InputError(f"{day} is damaged here")

    try:
        open_days(DAYS, opening, processes)
    except InputError as error:
        return str(error)
    return ""


def meetings(folder: Path, processes: Processes) -> int:
    """How often the second process has met the first while this one was at work."""
    met, gather = 0, processes.gather

    def counting(value: Any) -> list[Any]:
        nonlocal met
        met += 1
        (folder / f"met-{met}").touch()
        return gather(value)

    def work() -> int:
        if processes.is_first:
            while not (folder / "met-4").exists():
                time.sleep(0.01)
        return met

    if not processes.is_first:
        with patch.object(processes, "gather", counting):
            return spread.patiently(processes, work)
    return spread.patiently(processes, work)


def gathered(processes: Processes) -> dict[str, Any]:
    """Rows of unlike width, of which the first process has none at first; some are for the first alone."""
    share, first = share_of(processes), processes.is_first
    own = {"mask": torch.tensor([[True, False]]), "id": torch.tensor([7]), "score": torch.tensor([[0.5, -0.0]])}
    other = {"mask": torch.tensor([[True]] * 2), "id": torch.tensor([8, 9]), "score": torch.tensor([[1e-40], [3.0]])}
    found = {
        "one": share.gathered({} if first else own),
        "both": share.gathered(own if first else other),
        "first": share.gathered(own if first else other, only_first=True),
        "none": share.gathered({}),
    }
    return {name: {column: values.tolist() for column, values in made.items()} for name, made in found.items()}


def train_shop(folder: Path, shop: Path) -> list[Any]:
    """What this process measured on the validation day, of which it scored a part."""
    measured, measure = list[Any](), validation.Validation.measure

    def noting(*args: Any) -> Any:
        measured.append(measure(*args))
        return measured[-1]

    with patch.object(validation.Validation, "measure", noting):
        run_train.main(arguments(shop, folder / "shop", *SHOP, f"--cascade={shop / 'shop.toml'}"))
    return measured


def evaluate(folder: Path, log: Path) -> dict[str, dict[str, int]]:
    """The rows that this process loaded of each table."""
    loaded: dict[str, dict[str, int]] = {}
    needed: Callable[..., Any] = evaluation._needed_ids
    for name, flags in EVALUATIONS.items():

        def noting(*args: Any, name: str = name) -> Any:
            ids = needed(*args)
            loaded[name] = {table: len(known) for table, known in ids.items()}
            return ids

        all_flags = (f"--batch_size={BATCH}", "--save_scores", *flags)
        with patch.object(evaluation, "_needed_ids", noting):
            run_test2.main(evaluation_arguments(log, folder / name, *all_flags))
    return loaded


def refused_scores(folder: Path, log: Path, rank: int) -> str:
    """What a process says when another one's scores are not finite."""

    def measuring(cascade: Any, batch: dict[str, torch.Tensor], relevant: Any) -> Any:
        broken = {"rank": torch.full_like(batch["rank"], float("nan"))} if rank == 1 else {}
        return measured(cascade, batch | broken, relevant)

    measured = evaluation._metrics
    try:
        with patch.object(evaluation, "_metrics", measuring):
            run_test2.main(evaluation_arguments(log, folder / "refused", f"--batch_size={BATCH}"))
    except InputError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
