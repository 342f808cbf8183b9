"""Train the two-stage cascade: arguments -> build_loss -> train -> checkpoint."""

import argparse
import sys

from torch import nn

from deep_components.arguments import training_parser, unknown_method
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.loss import two_stage
from deep_components.loss.sorting import neural_sort, soft_sort
from deep_components.loss.two_stage.lcron import LCRON
from deep_components.training import train_cascade


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The arguments of a two-stage training run."""
    parser = training_parser("Train a two-stage cascade (retrieval: DSSM, rank: DIN).")
    parser.add_argument("--tau", type=float, default=50.0, help="temperature of the sorting operator (default 50)")
    parser.add_argument("--sort", choices=["neural_sort", "soft_sort"], default="neural_sort", help="sorting operator")
    return parser.parse_args(argv)


def build_loss(args: argparse.Namespace) -> nn.Module:
    """The loss of ``args.loss_type``: loss(retrieval, rank, targets) -> {"loss": ..., named terms}."""
    if args.loss_type == "lcron":
        sort = {"neural_sort": neural_sort, "soft_sort": soft_sort}[args.sort]
        return LCRON(TWO_STAGE.num_relevant, tau=args.tau, sort=sort)
    raise unknown_method(args.loss_type, two_stage.__name__, list(two_stage.__path__))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    train_cascade(TWO_STAGE, args, build_loss(args))


if __name__ == "__main__":
    sys.exit(run_command(main))
