"""A loss and its gradient alone: seconds a batch, beside evaluating it once a group of items as the baseline does.

python -m benchmarks.loss [--setting=two_stage] [--loss_type=lcron] [--batch_size=1024]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from deep_components.batch import Targets
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command


def evaluate_loss(times: int, args: argparse.Namespace, data_dir: Path) -> common.Work:
    """The loss of random scores ``times`` times over, and one backward pass."""
    cascade, device = SETTINGS[args.setting], torch.device(args.device)
    loss = common.COMMANDS[args.setting].build_loss(common.training_arguments(args, data_dir)).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, cascade.num_items)
    scores = {stage: torch.randn(shape, generator=generator).to(device).requires_grad_() for stage in cascade.quotas}
    group = torch.from_numpy(cascade.group_of_item).expand(shape).to(device)
    labels = torch.where(group == 0, 30 - torch.arange(cascade.num_items, device=device), 8 - group)
    targets = Targets(labels, torch.ones(shape, dtype=torch.bool, device=device), group)

    def work() -> Tensor:
        for _ in range(times):
            value: Tensor = loss(scores, targets)["loss"]
        value.backward()
        return value.detach()

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    groups = len(SETTINGS[args.setting].groups)
    builders = {"ours": partial(evaluate_loss, 1), "baseline": partial(evaluate_loss, groups)}
    measured = common.compete(builders, args, Path())
    losses = {name: one.first_result for name, one in measured.items()}
    common.report(args, common.compared(measured, args.batch_size) | {"loss": losses})


if __name__ == "__main__":
    sys.exit(run_command(main))
