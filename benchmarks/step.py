"""A training step: requests/s, seconds per part, and the share of the machine's ceiling, beside the plain baseline.

    python -m benchmarks.step [--setting=two_stage] [--loss_type=lcron] [--videos=4000] [--output=step.json]
    python -m benchmarks.step --modes=compiled,plain,torch_compile,bfloat16 [--no-baseline]

    python -m benchmarks.step --batch_size=128 --busy=0,1,2,4 [--spins=0,10000,300000]

All train on the same simulated log, data path included, and take turns. Their first losses must be the same to
rounding. "ours" is the training command as it is; "compiled" and "plain" are it with --compile and --no-compile,
"bfloat16" is it with --autocast=bfloat16, and "torch_compile" has Inductor compile every model of "plain":
``seconds_of_first_step`` has the time this takes. With TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 nothing is taken from
Inductor's cache. With --busy the training competes with so many processes that only compute, once for each number; the
contestants are ways to wait, GOMP_SPINCOUNT (0 is OMP_WAIT_POLICY=PASSIVE, 300000 libgomp's default), and one thread.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.baseline import BaselineReader, BaselineTrainer
from deep_components.batch import CascadeBatch, Features, SlotFeatures
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.loader import batches
from deep_components.errors import InputError
from deep_components.models import build_models, din
from deep_components.tables.store import build_stores
from deep_components.threads import SPINS
from deep_components.training.loop import Run, prepare
from deep_components.training.step import Trainer

MODES = {  # name -> arguments of the training command
    "ours": (),
    "compiled": ("--compile",),
    "plain": ("--no-compile",),
    "torch_compile": ("--no-compile",),
    "bfloat16": ("--autocast=bfloat16",),
}
BFLOAT16_TOLERANCE = 1e-2  # of the first loss, relative


def build_run(args: argparse.Namespace, data_dir: Path, mode: str = "ours") -> Run:
    """The training command's run before its first step."""
    namespace = common.training_arguments(args, data_dir, *MODES[mode])
    run = prepare(SETTINGS[args.setting], namespace, common.COMMANDS[args.setting].build_loss(namespace))
    if mode == "torch_compile":
        din.attention_logits = attention_logits
        for model in run.trainer.models.values():
            model.compile()
    return run


def attention_logits(history_part: Tensor, item_part: Tensor, weight: Tensor) -> Tensor:
    """As :func:`din.attention_logits`, in one formula whose loops Inductor fuses; by itself it would need B x N x L x H
    numbers."""
    return ((history_part.unsqueeze(1) + item_part.unsqueeze(2)).relu() * weight).sum(dim=-1)


def ours(mode: str, args: argparse.Namespace, data_dir: Path) -> common.Work:
    """Steps on a day that is gone through again and again."""
    run = build_run(args, data_dir, mode)
    order = np.arange(run.steps[0] * args.batch_size)

    def endless() -> Iterator[CascadeBatch[SlotFeatures]]:
        while True:
            yield from batches(run.days[0], order, args.batch_size, run.device, run.trainer.prepare)

    source = endless()
    return lambda: run.trainer.step(next(source))["loss"]


def build_baseline(args: argparse.Namespace, data_dir: Path) -> tuple[BaselineTrainer, BaselineReader]:
    """The baseline at its start, with the same initial parameters; its tables are whole."""
    cascade, namespace = SETTINGS[args.setting], common.training_arguments(args, data_dir)
    reader = BaselineReader(cascade, data_dir, common.DAY)
    models = build_models(cascade, reader.schema, namespace.emb_dim, namespace.nn_units, namespace.seed)
    stores = build_stores(cascade, reader.schema, namespace.emb_dim, namespace.seed)
    loss = common.COMMANDS[args.setting].build_loss(namespace)
    for part in (*models.values(), *stores.values(), loss):
        part.to(torch.device(args.device), torch.float32)
    return BaselineTrainer(cascade, models, stores, loss, lr=namespace.lr), reader


def baseline(args: argparse.Namespace, data_dir: Path) -> common.Work:
    """The same steps, the plain way."""
    trainer, reader = build_baseline(args, data_dir)

    def endless() -> Iterator[CascadeBatch[Features]]:
        while True:
            yield from reader.batches(args.batch_size, whole=True)

    source = endless()
    return lambda: trainer.step(next(source).to(torch.device(args.device)))


def roofline(args: argparse.Namespace, data_dir: Path, seconds: float) -> dict[str, Any]:
    """What a step must compute and move, and which share of the machine's ceiling it reaches in ``seconds``."""
    run = build_run(args, data_dir)
    trainer, requests = run.trainer, np.arange(args.batch_size)
    batch = trainer.prepare(run.days[0].batch(requests)).to(run.device)
    with FlopCounterMode(display=False) as counter:
        trainer.step(batch)
    flops = counter.get_total_flops() + sum(attention_flops(batch, model) for model in trainer.models.values())
    moved = sum(bytes_moved(batch, trainer, stage) for stage in trainer.models)
    ceiling = common.ceilings(args.device)
    bound = flops / ceiling["gflops"] / 1e9 + moved / ceiling["gigabytes_per_second"] / 1e9
    return {
        "gigaflops_a_step": flops / 1e9,
        "gigabytes_a_step": moved / 1e9,
        "ceiling": ceiling,
        "seconds_at_the_ceiling": bound,
        "share_of_the_ceiling": bound / seconds,
    }


def attention_flops(batch: CascadeBatch[SlotFeatures], model: nn.Module) -> int:
    """Of DIN's own loops, which PyTorch does not count: add, max, multiply and add for every item, history position and
    unit; three times the forward pass."""
    if not isinstance(model, din.DIN):
        return 0
    return 3 * 4 * batch.features.history_mask.numel() * batch.targets.labels.shape[1] * din.ATTENTION_UNITS


def bytes_moved(batch: CascadeBatch[SlotFeatures], trainer: Trainer, stage: str) -> int:
    """The least that a step must move for a stage: every layer's activations written and read in both passes, and for
    every embedding that is looked up its row read, and its gradient, moments and value written."""
    (requests, items), store = batch.targets.labels.shape, trainer.stores[stage]
    activations = sum(
        layer.out_features * (1 if name.startswith("user_tower") else items)
        for name, layer in trainer.models[stage].named_modules()
        if isinstance(layer, nn.Linear)
    )
    elements = {"request": 1, "history": batch.features.history_mask.shape[1], "item": items}
    looked_up = sum(count * store.schema.width(side, store.dim) for side, count in elements.items())
    return 4 * requests * (4 * activations + 8 * looked_up)


@contextmanager
def burning(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def beside_busy_processes(args: argparse.Namespace, data_dir: Path) -> dict[str, Any]:
    """Number of busy processes -> way to wait -> requests/s, and ``share``: the requests/s, relative to a quiet
    machine's, that the training would have if every thread and process had the same share of the cores."""
    waits = {f"spins_{spins}": {"GOMP_SPINCOUNT": str(spins)} for spins in args.spins}
    waits |= {"one_thread": {"OMP_NUM_THREADS": "1"}}
    cores, result = len(os.sched_getaffinity(0)), {}
    for busy in args.busy:
        with burning(busy):
            measured = common.compete(dict.fromkeys(waits, partial(ours, "ours")), args, data_dir, environments=waits)
        speeds = {name: args.batch_size / one.seconds for name, one in measured.items()}
        result[str(busy)] = {"share": min(1.0, cores / (torch.get_num_threads() + busy)), "requests_per_second": speeds}
    return result


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _modes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= MODES.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(MODES)}")
    return names


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--modes", type=_modes, default=["ours"], help=f"compared ways: {', '.join(MODES)}")
    parser.add_argument("--busy", type=_counts, help="numbers of busy processes beside the training")
    parser.add_argument("--spins", type=_counts, default=[0, SPINS, 300_000], help="with --busy: values compared")
    args = parser.parse_args(argv)
    if args.requests < args.batch_size:
        raise InputError(f"--requests={args.requests}: fewer than --batch_size={args.batch_size}")
    with common.simulated_log(args) as data_dir:
        day = common.open_day(args, data_dir)  # the cache is there before anybody's turn
        if args.busy is not None:
            common.report(args, {"busy": beside_busy_processes(args, data_dir)})
            return
        builders = {mode: partial(ours, mode) for mode in args.modes} | {"baseline": baseline}
        measured = common.compete(builders, args, data_dir, profiled=2)
        common.check_same(measured, "first losses", 1e-5, bfloat16=BFLOAT16_TOLERANCE)
        results = common.compared(measured, args.batch_size) | {
            "seconds_of_first_step": {name: one.first_seconds for name, one in measured.items()},
            "first_loss": {name: one.first_result for name, one in measured.items()},
            "seconds_per_part": {name: one.parts for name, one in measured.items()},
            "distinct_ids": {table: len(day.ids(table)) for table in ("video", "author")},
            "roofline": roofline(args, data_dir, measured[args.modes[0]].seconds),
        }
    common.report(args, results)


if __name__ == "__main__":
    sys.exit(run_command(main))
