"""A training step: requests/s, seconds per part, and the share of the machine's ceiling, beside the plain baseline.

    python -m benchmarks.step [--setting=two_stage] [--loss_type=lcron] [--videos=4000] [--output=step.json]

Both train on the same simulated log, data path included, and take turns in one process. The first loss of both must be
the same to rounding.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.profiler import record_function

from benchmarks import common
from benchmarks.baseline import BaselineReader, BaselineTrainer
from deep_components.batch import CascadeBatch
from deep_components.cascade import SETTINGS, Cascade
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache, open_day
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.dataset.importers.recflow_files import read_id_counts
from deep_components.dataset.loader import batches
from deep_components.errors import InputError
from deep_components.kernels import keep_freed_memory, load_kernels
from deep_components.models import build_models
from deep_components.tables.embedding import ID_FIELDS
from deep_components.training import loop as training
from deep_components.training.step import Trainer


def flops_of_step(cascade: Cascade, batch_size: int, models: dict[str, nn.Module], length: int) -> float:
    """Floating-point operations of the matrix products and the attention of a step: two for a multiplication and an
    addition, three times the forward pass; what does not depend on the item counts once a request."""
    total = 0.0
    for model in models.values():
        dim = model.get_submodule("embedding").get_parameter("user").shape[1]
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2 or name.startswith("embedding."):
                continue
            outputs, inputs = parameter.shape
            per_item, per_request = cascade.num_items * inputs * outputs, 0
            if name.startswith("user_tower"):
                per_item, per_request = 0, inputs * outputs
            elif name == "attention.0.weight":
                per_item, per_request = cascade.num_items * inputs // 2 * outputs, length * inputs // 2 * outputs
            elif name == "attention.2.weight":  # add, max, multiply and add, for every item and history position
                per_item = 2 * cascade.num_items * length * inputs
            elif name == "tower.0.weight":  # the user's part once a request
                shared = inputs - (13 if "attention.0.weight" in dict(model.named_parameters()) else 8) * dim
                per_item, per_request = cascade.num_items * (inputs - shared) * outputs, shared * outputs
            total += per_item + per_request
            if name == "attention.0.weight":
                total += cascade.num_items * length * 5 * dim  # the weighted sum
    return 3 * 2 * total * batch_size


def bytes_of_step(batch_size: int, cascade: Cascade, models: dict[str, nn.Module], itemsize: int = 4) -> float:
    """Bytes that a step must move at least: every layer's activations written and read in both passes, and for every
    embedding that is looked up its row read, and its gradient, moments and value written."""
    total = 0.0
    for model in models.values():
        embedding = model.get_submodule("embedding")
        dim = embedding.get_parameter("user").shape[1]
        total += 4 * sum(
            (1 if name.startswith("user_tower") else cascade.num_items) * len(parameter)
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and not name.startswith("embedding.")
        )
        total += 8 * dim * (8 + 5 * 50 + 8 * cascade.num_items)
    return total * batch_size * itemsize


def build_trainer(args: argparse.Namespace, data_dir: Path, day: DayCache) -> Trainer:
    """The training command's trainer at its start."""
    namespace, counts = common.training_namespace(args, data_dir), read_id_counts(data_dir)
    device = torch.device(args.device)
    models, _ = training.initial_models(SETTINGS[args.setting], namespace, counts, [day], device)
    loss = common.COMMANDS[args.setting].build_loss(namespace).to(device)
    keep_freed_memory()
    return Trainer(models, loss, lr=namespace.lr, kernels=load_kernels(torch.float32))


def ours(args: argparse.Namespace, data_dir: Path) -> Callable[[], torch.Tensor]:
    """Steps on a day that is gone through again and again."""
    day = open_day(data_dir, common.DAY, SETTINGS[args.setting])
    trainer, device = build_trainer(args, data_dir, day), torch.device(args.device)
    order = np.arange(len(day) // args.batch_size * args.batch_size)

    def endless() -> Iterator[CascadeBatch]:
        while True:
            yield from batches(day, order, args.batch_size, device, trainer.prepare)

    source = endless()
    return lambda: trainer.step(next(source))["loss"]


def build_baseline(args: argparse.Namespace, data_dir: Path) -> BaselineTrainer:
    """The baseline's trainer at its start, with the same initial parameters; its tables are whole."""
    cascade, namespace, counts = (
        SETTINGS[args.setting],
        common.training_namespace(args, data_dir),
        read_id_counts(data_dir),
    )
    vocabulary = {field: counts[column] for field, column in LOG_COLUMN.items()}
    models = build_models(cascade, vocabulary, namespace.emb_dim, namespace.nn_units, namespace.seed)
    loss = common.COMMANDS[args.setting].build_loss(namespace)
    for module in (*models.values(), loss):
        module.to(torch.device(args.device))
    return BaselineTrainer(cascade, models, loss, lr=namespace.lr)


def baseline(args: argparse.Namespace, data_dir: Path) -> Callable[[], torch.Tensor]:
    """The same steps, the plain way."""
    day = open_day(data_dir, common.DAY, SETTINGS[args.setting])
    reader = BaselineReader(SETTINGS[args.setting], data_dir, common.DAY)
    trainer, device = build_baseline(args, data_dir), torch.device(args.device)
    places = cycle(range(0, len(day) // args.batch_size * args.batch_size, args.batch_size))

    def step() -> torch.Tensor:
        first = next(places)
        requests = np.arange(first, first + args.batch_size)
        with record_function("step.data"):
            reader.batch(requests.tolist())  # the work of it; what it makes equals what the cache holds
        return trainer.step(day.batch(requests).to(device))

    return step


def roofline(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a step must compute and move, and which share of the machine's ceiling it reaches."""
    cascade = SETTINGS[args.setting]
    models = build_models(cascade, dict.fromkeys(ID_FIELDS, 1), 8, 128, None)
    ceiling = common.ceilings(args.device)
    flops, moved = flops_of_step(cascade, args.batch_size, models, 50), bytes_of_step(args.batch_size, cascade, models)
    bound = flops / ceiling["gflops"] / 1e9 + moved / ceiling["gigabytes_per_second"] / 1e9
    return {
        "gigaflops_a_step": flops / 1e9,
        "gigabytes_a_step": moved / 1e9,
        "ceiling": ceiling,
        "seconds_at_the_ceiling": bound,
        "share_of_the_ceiling": bound / seconds,
    }


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        day = open_day(data_dir, common.DAY, SETTINGS[args.setting])  # the cache is there before anybody's turn
        distinct = {field: len(day.ids(field)) for field in ("video", "author")}
        with common.contestants({"ours": ours, "baseline": baseline}, args, data_dir) as both:
            seconds, losses = common.turns(both, args.repeats)
            peaks = {name: contestant.peak() for name, contestant in both.items()}
            parts = {name: contestant.parts(1 if name == "baseline" else 3) for name, contestant in both.items()}
    if args.baseline and not math.isclose(losses["ours"] or 0, losses["baseline"] or 0, rel_tol=1e-5):
        raise InputError(f"the first losses differ: {losses}")
    results = common.compared(seconds)
    results["requests_per_second"] = {name: args.batch_size / value for name, value in seconds.items()}
    results |= {"first_loss": losses, "seconds_per_part": parts, "peak_bytes": peaks, "distinct_ids": distinct}
    common.report(args, results | {"roofline": roofline(args, seconds["ours"])})


if __name__ == "__main__":
    sys.exit(run_command(main))
