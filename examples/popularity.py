"""What popularity alone reaches: every stage ranks by how often an item was ground truth in the training days.

    python -m examples.popularity --data_dir=D --cascade=cascade.toml --field=item

Beside it stands chance: a random order in every stage, on average.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deep_components.batch import CascadeBatch
from deep_components.cascade import SETTINGS, Cascade
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.days import test_day, training_days
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.metrics import joint_recall


def batches(day: DayCache, size: int = 512) -> Iterator[CascadeBatch]:
    for first in range(0, len(day), size):
        yield day.batch(np.arange(first, min(first + size, len(day))))


def recall_on(day: DayCache, cascade: Cascade, counts: Tensor, field: str) -> float:
    """Joint recall when ``counts[item]`` is every stage's score; a constant gives chance."""
    recalls = []
    for batch in batches(day):
        scores, mask = counts[batch.features.item[field]], batch.targets.mask
        relevant = (batch.targets.group == 0) & mask
        quotas = list(cascade.quotas.values())
        recalls.append(joint_recall([scores] * len(quotas), mask, relevant, quotas))
    return torch.cat(recalls).nanmean().item()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Joint recall of popularity and of chance.")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cascade", required=True, help="a TOML file, or two_stage, three_stage")
    parser.add_argument("--field", required=True, help="the field of side item that is the item's id")
    args = parser.parse_args(argv)
    cascade = SETTINGS.get(args.cascade) or Cascade.from_toml(Path(args.cascade))
    log = open_log(args.data_dir)
    sizes = {field.name: field.size for field in log.schema.side("item") if field.kind == "id"}
    if args.field not in sizes:
        raise InputError(f"--field={args.field}: the log has no such id of items; choose one of {', '.join(sizes)}")
    counts = torch.zeros(sizes[args.field], dtype=torch.float64)
    for name in training_days(log, None):
        for batch in batches(log.open_day(name, cascade)):
            bought = (batch.targets.group == 0) & batch.targets.mask
            counts += torch.bincount(batch.features.item[args.field][bought], minlength=len(counts))
    day = log.open_day(test_day(log, None), cascade)
    for what, score in (("popularity", counts), ("chance", torch.zeros_like(counts))):
        sys.stdout.write(f"{what:<10}  {recall_on(day, cascade, score, args.field):.4f}\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
