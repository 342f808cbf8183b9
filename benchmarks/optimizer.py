"""A training step's time by optimizer and by the size of the video table.

    python -m benchmarks.optimizer [--rows=4000,1000000,8000000] [--batch_size=1024] [--steps=7]

Two-stage LCRON on random requests whose videos are drawn uniformly, so that nearly every one is new. Both optimizers
step in turn in one process; printed are the medians of the steps after the first, and their ratio.
"""

import argparse
import json
import sys
import time
from statistics import median

import torch

from deep_components.batch import HISTORY_FIELDS, ITEM_FIELDS, REQUEST_FIELDS, CascadeBatch, Features, Targets
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.loss.two_stage.lcron import LCRON
from deep_components.models import build_models
from deep_components.models.embedding import ID_FIELDS
from deep_components.trainer import Trainer

OPTIMIZERS = ("adam", "deferred_adam")
SMALL = 50  # ids of every field but the video


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="4000,1000000,8000000")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def random_batch(num_requests: int, num_videos: int, generator: torch.Generator) -> CascadeBatch:
    num_items, length = TWO_STAGE.num_items, 50

    def ids(*shape: int, high: int = 7) -> torch.Tensor:
        return torch.randint(1, high, shape, generator=generator)

    history, items = ids(num_requests, length, len(HISTORY_FIELDS)), ids(num_requests, num_items, len(ITEM_FIELDS))
    history[..., 0], items[..., 0] = (ids(num_requests, size, high=num_videos) for size in (length, num_items))
    return CascadeBatch(
        request_id=torch.arange(num_requests),
        features=Features(
            **{field: ids(num_requests) for field in REQUEST_FIELDS},
            history=history,
            history_mask=torch.ones(num_requests, length, dtype=torch.bool),
            items=items,
        ),
        targets=Targets(
            labels=torch.arange(num_items).flip(0).expand(num_requests, -1),
            mask=torch.ones(num_requests, num_items, dtype=torch.bool),
            group=torch.arange(num_items) // TWO_STAGE.group_size,
        ),
    )


def measure(rows: int, args: argparse.Namespace) -> dict[str, float]:
    generator, device = torch.Generator().manual_seed(0), torch.device(args.device)
    vocabulary = dict.fromkeys(ID_FIELDS, SMALL) | {"video": rows}
    trainers = {}
    for optimizer in OPTIMIZERS:
        models = build_models(TWO_STAGE, vocabulary, emb_dim=8, nn_units=128, seed=None)
        for model in models.values():
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.to(device)
        trainers[optimizer] = Trainer(models, LCRON(10).to(device), lr=0.01, optimizer=optimizer)
    seconds: dict[str, list[float]] = {optimizer: [] for optimizer in OPTIMIZERS}
    for _ in range(args.steps):
        batch = random_batch(args.batch_size, rows, generator).to(device)
        for optimizer, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step(batch)["loss"].item()  # waits for the device
            seconds[optimizer].append(time.perf_counter() - started)
    return {optimizer: median(values[1:]) for optimizer, values in seconds.items()}


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    for rows in (int(text) for text in args.rows.split(",")):
        medians = measure(rows, args)
        ratio = medians["adam"] / medians["deferred_adam"]
        print(json.dumps({"rows": rows} | {k: round(v, 4) for k, v in medians.items()} | {"ratio": round(ratio, 2)}))


if __name__ == "__main__":
    sys.exit(run_command(main))
