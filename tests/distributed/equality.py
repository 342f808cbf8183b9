"""Trainings that test_equality.py compares, and the processes that make them.

``python -m tests.distributed.equality FOLDER LOG SHOP COUNT...``: for each COUNT in turn as many real processes, which
exchange by gloo, make all trainings of this module. Each process leaves what it has in FOLDER.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deep_components import run_train, run_train2, run_train3
from deep_components.batch import CascadeBatch, Features, Targets
from deep_components.distributed.processes import Processes, joined
from deep_components.distributed.sharding import shard
from deep_components.errors import StoppedError
from deep_components.kernels import load_kernels
from deep_components.loss.selection import SELECTION_OPERATORS
from deep_components.models import build_models
from deep_components.schema import RECFLOW_IDS, Field, Schema, recflow_schema
from deep_components.tables import deferred_adam
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import build_stores
from deep_components.training.step import Shards, Trainer, pulled_tables
from tests.helpers import training_arguments
from tests.loss.methods import CASCADES, NUM_GROUPS, build
from tests.schemas import OWN, random_batch

CPU, TIMEOUT = torch.device("cpu"), 300.0
BATCH, ITEMS, LENGTH, STEPS = 25, 9, 3, 8
METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting")
TEMPERATURES = {"soft_sort": 5, "dftopk": 1, "lapsum": 1, "lml": 2, "sparse_topk": 4}
MANY = 7  # processes, which make no runs
SCHEMAS = {
    "recflow": recflow_schema({name: 15 + 9 * number for number, name in enumerate(RECFLOW_IDS)}),
    # Numbers, shared tables, a table with a row for unknown ids, and lists.
    "own": Schema(
        (
            *OWN.fields,
            Field("likes", "request", size=40, table="tag", length=2),
            Field("tags", "item", size=40, table="tag", length=3),
        )
    ),
}


@dataclass(frozen=True)
class Case:
    """A training of some steps, without a command around it."""

    setting: str
    flags: str
    schema: str = "recflow"
    optimizer: str = "deferred_adam"
    pull_from: int = 1  # rows from which a table is pulled, and thus shared out
    compacted: bool = False
    compiled: bool = True

    def __str__(self) -> str:
        kind = "compacted" if self.compacted else "whole", "compiled" if self.compiled else "pytorch"
        return " ".join([self.setting, self.flags, self.schema, self.optimizer, f"from {self.pull_from}", *kind])

    @property
    def method(self) -> str:
        return self.flags.split()[0]

    @property
    def steps(self) -> int:
        """ICC's cuts amplify rounding: it can be compared after a few steps."""
        return 3 if self.method == "icc" else STEPS


def _with_operators(method: str) -> list[str]:
    return [f"{method} --topk_op={name} --tau={TEMPERATURES[name]}" if name in TEMPERATURES else method
            for name in SELECTION_OPERATORS]  # fmt: skip


OPERATORS = tuple(
    f"{method} --topk_op={name} --tau={TEMPERATURES[name]}"
    for method in ("lcron", "arf_v2")
    for name in sorted(SELECTION_OPERATORS.keys() - {"neural_sort"})  # which is that of METHODS
)
EVERY_METHOD = (
    *(Case("two_stage", flags) for flags in METHODS),
    *(Case("four_stage", flags, "own", pull_from=10, compacted=True) for flags in METHODS),
)
CASES = (
    *EVERY_METHOD,
    *(Case("three_stage", flags, "own", compacted=True) for flags in METHODS),
    *(Case("two_stage" if flags.startswith("lcron") else "three_stage", flags, "own") for flags in OPERATORS),
    *(Case("two_stage", f"lcron {more}", "own") for more in ("--terms=end_to_end", "--weighting=paper")),
    *(Case("two_stage", "lcron", "own", "adam", compacted=compacted) for compacted in (False, True)),
    *(Case("two_stage", "fs_ranknet", "own", "sparse_adam", compacted=compacted) for compacted in (False, True)),
    Case("two_stage", "arf_v2", "own", compacted=True, compiled=False),
    Case("three_stage", "arf", "own", pull_from=1 << 20),  # nothing is shared out
)
CASES_OF = {2: EVERY_METHOD[:9], 3: CASES[9:], MANY: EVERY_METHOD[9::2]}  # by the number of processes
if "LCRON_EVERY_CASE" in os.environ:  # every case by every number of processes: some minutes
    CASES = (*CASES, *(Case("three_stage" if flags.startswith("lcron") else "two_stage", flags) for flags in OPERATORS))
    CASES_OF = dict.fromkeys((2, 3, MANY), CASES)
AGAIN = CASES[9:18:3]  # made once more by three processes

Found = dict[str, dict[str, Any]]


# ---- steps of a trainer ----------------------------------------------------------------------------------------------


def global_batch(case: Case, seed: int) -> CascadeBatch[Features]:
    """Requests of lengths of their own, of whose items 35 % are missing; one is empty."""
    batch = random_batch(SCHEMAS[case.schema], BATCH, ITEMS, LENGTH, seed)
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand((BATCH, ITEMS), generator=random) < 0.65
    mask &= torch.arange(ITEMS) < torch.randint(1, ITEMS + 1, (BATCH, 1), generator=random)
    mask[BATCH // 2] = False
    group = torch.randint(0, NUM_GROUPS[case.setting], (BATCH, ITEMS), generator=random).sort(dim=1).values
    # As in a log: a missing item names no row, so that it does not matter which process sees its slot.
    item = {
        field.name: values.where(mask[:, :, None] if field.length else mask, field.padding)
        for field in SCHEMAS[case.schema].side("item")
        for values in [batch.features.item[field.name]]
    }
    features = replace(batch.features, item=item)
    return replace(batch, features=features, targets=Targets(batch.targets.labels, mask, group))


def part_of(batch: CascadeBatch[Features], processes: Processes | None) -> CascadeBatch[Features]:
    """A process's requests, without the item slots that none of them uses, as a ragged log's days have them."""
    if processes is None:
        return batch
    part = batch.apply(lambda values: values[processes.slice_of(BATCH)])
    used = part.targets.mask.any(dim=0).nonzero()
    return part.first_items(int(used.max()) + 1 if len(used) else 0)


def known_ids(case: Case, batches: Sequence[CascadeBatch[Features]]) -> dict[str, IdSet]:
    """The ids of compacted tables: those that occur; of tables with a row for unknown ids those of the first batch."""
    schema, found = SCHEMAS[case.schema], {}
    for name, table in schema.tables.items() if case.compacted else ():
        seen = batches if table.unknown is None else batches[:1]
        uses = [getattr(b.features, f.side)[f.name].numpy() for b in seen for f in schema.fields if f.table == name]
        found[name] = IdSet.of([np.array([0, table.padding, table.unknown or 0]), *uses], table.size)
    return found


def run_case(case: Case, processes: Processes | None) -> dict[str, Any]:
    """The parameters of this process after the steps, what these logged, and how the tables are shared out."""
    schema, cascade = SCHEMAS[case.schema], CASCADES[case.setting]
    method, *flags = case.flags.split()
    loss = build(case.setting, f"--loss_type={method}", *flags).double()
    batches = [global_batch(case, seed) for seed in range(case.steps)]
    ids = known_ids(case, batches)
    rows = {name: len(ids[name]) if name in ids else table.size for name, table in schema.tables.items()}
    own, shards, pulled = ids, None, pulled_tables(rows, case.optimizer, case.pull_from)
    if processes is not None:
        shards = Shards(processes, ids, rows)
        own = ids | {name: shard(ids.get(name), schema.tables[name].size, processes) for name in pulled}
    models, stores = build_models(cascade, schema, 4, 16, seed=30), build_stores(cascade, schema, 4, 30, own)
    for stage, model in models.items():
        model.double()
        stores[stage].to(CPU, torch.float64)
    kernels = load_kernels(torch.float64) if case.compiled else None
    trainer = Trainer(models, stores, loss, 0.01, case.optimizer, case.pull_from, kernels, shards=shards)
    terms = [trainer.step(trainer.prepare(part_of(batch, processes))) for batch in batches]
    trainer.flush()
    state = trainer.state()
    return {
        "parameters": {name: values.detach().clone() for name, values in trainer.parameters.items()},
        "squares": {name: state[f"exp_avg_sq/{name}"] for name in trainer.parameters if f"exp_avg_sq/{name}" in state},
        "terms": [{name: float(value) for name, value in of_step.items()} for of_step in terms],
        "pulled": list(pulled),
    }


def run_cases(processes: Processes | None, cases: Sequence[Case]) -> Found:
    return {str(case): run_case(case, processes) for case in cases}


# ---- commands --------------------------------------------------------------------------------------------------------

FLOAT64 = ("--dtype=float64", "--batch_size=13")  # which neither two nor three processes divide
OWN_CASCADE = "--cascade={shop}/shop.toml"
# name -> the command, and its options; {shop} is a log of one's own.
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "two": (run_train2, ("--pull_from=20", "--compact_from=100", "--num_random_items=3", "--tensorboard")),
    "three": (run_train3, ("--pull_from=20", "--loss_type=arf_v2", "--optimizer=sparse_adam", "--save_minutes=1e-9")),
    "own": (run_train, ("--pull_from=10", "--loss_type=bce", "--num_random_items=4", "--seq_len=3", OWN_CASCADE)),
}
ELASTIC = ("--pull_from=20", "--compact_from=100", "--epochs=2", "--num_random_items=3", "--resume")
STOP_AFTER = {3: 5, 2: 5}  # W -> the steps that they make: one process gets a signal in the last but one


def arguments(name: str, folder: Path, log: Path, shop: Path) -> list[str]:
    """Those of one of COMMANDS."""
    flags = (flag.format(shop=shop) for flag in COMMANDS[name][1])
    return training_arguments(shop if name == "own" else log, folder / name, *FLOAT64, *flags)


def train_all(folder: Path, log: Path, shop: Path) -> None:
    """Make the runs of all commands in ``folder``; this is one of the processes."""
    for name, (command, _) in COMMANDS.items():
        command.main(arguments(name, folder, log, shop))


@contextmanager
def signal_after(steps: int, receives: bool) -> Iterator[None]:
    """A process that ``receives`` it gets SIGTERM, all others learn of it in their next step, the last of ``steps``."""
    original, made = Trainer.step, 0

    def step(self: Trainer, batch: Any) -> dict[str, Tensor]:
        nonlocal made
        made += 1
        if made == steps - 1 and receives:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    with mock.patch.object(Trainer, "step", step):
        yield


def train_elastic(folder: Path, log: Path, count: int, rank: int) -> None:
    """Go on with a run, until the last process gets a signal."""
    try:
        with signal_after(STOP_AFTER[count], rank == count - 1):
            run_train2.main(training_arguments(log, folder / "elastic", *FLOAT64, *ELASTIC))
    except StoppedError:
        return
    raise AssertionError("it did not stop")


# ---- processes -------------------------------------------------------------------------------------------------------


def work(folder: Path, log: Path, shop: Path, rank: int, count: int) -> None:
    """What one of ``count`` processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting.{count}", rank=rank, world_size=count)
    with joined(CPU, TIMEOUT) as processes:
        found = run_cases(processes, CASES_OF[count])
        again = run_cases(processes, AGAIN if count == 3 else ())
    torch.save({"once": found, "again": again}, folder / f"{count}.{rank}.pt")
    if count == 2:
        train_all(folder / str(count), log, shop)
    if count in STOP_AFTER:
        train_elastic(folder, log, count, rank)
    dist.destroy_process_group()


def main(folder: str, log: str, shop: str, *counts: str) -> int:
    torch.set_num_threads(1)
    deferred_adam._STEPS_AT_A_TIME = 64  # fitting more of its rules takes longer than a training here
    fork = multiprocessing.get_context("fork")  # what takes seconds to import is there already
    for count in map(int, counts):
        where = Path(folder), Path(log), Path(shop)
        workers = [fork.Process(target=work, args=(*where, rank, count)) for rank in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(*sys.argv[1:]))
