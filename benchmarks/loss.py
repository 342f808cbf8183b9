"""A loss and its gradient alone: seconds a batch, beside evaluating it once a group of items as the baseline does.

python -m benchmarks.loss [--setting=two_stage] [--loss_type=lcron] [--batch_size=1024]
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import common
from deep_components.batch import Targets
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command


def evaluate_loss(times: int, args: argparse.Namespace, data_dir: Path) -> Callable[[], torch.Tensor]:
    """The loss of random scores ``times`` times over, and one backward pass."""
    cascade = SETTINGS[args.setting]
    loss = common.COMMANDS[args.setting].build_loss(common.training_namespace(args, data_dir)).to(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, cascade.num_items)
    scores = {
        stage: torch.randn(shape, generator=generator).to(args.device).requires_grad_() for stage in cascade.stage_names
    }
    group = torch.from_numpy(cascade.group_of_item).expand(shape)
    labels = torch.where(group == 0, 30 - torch.arange(cascade.num_items), 8 - group)
    targets = Targets(
        labels.to(args.device), torch.ones(shape, dtype=torch.bool, device=args.device), group.to(args.device)
    )

    def work() -> torch.Tensor:
        for _ in range(times):
            value = loss(scores, targets)["loss"]
        value.backward()
        return value.detach()

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    groups = len(SETTINGS[args.setting].groups)
    builders = {"ours": partial(evaluate_loss, 1), "baseline": partial(evaluate_loss, groups)}
    with common.contestants(builders, args, Path()) as both:
        seconds, losses = common.turns(both, args.repeats)
    common.report(args, common.compared(seconds) | {"loss": losses})


if __name__ == "__main__":
    sys.exit(run_command(main))
