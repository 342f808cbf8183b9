"""Train the two-stage cascade: arguments -> build_loss -> train -> checkpoint."""

import argparse
import sys

from torch import nn

from deep_components.arguments import (
    add_method_options,
    lcron_options,
    method_options,
    operator_options,
    sorting_options,
    training_parser,
    unknown_method,
)
from deep_components.cascade import TWO_STAGE as CASCADE
from deep_components.cli import run_command
from deep_components.distributed.launch import launch
from deep_components.loss.arf import ARF
from deep_components.loss.arf_v2 import ARFv2
from deep_components.loss.bce import BCE
from deep_components.loss.fs_lambdaloss import FSLambdaLoss
from deep_components.loss.fs_ranknet import FSRankNet
from deep_components.loss.icc import ICC
from deep_components.loss.lcron import LCRON
from deep_components.loss.rankflow import RankFlow
from deep_components.loss.sorting import SortingCrossEntropy
from deep_components.training.loop import train_cascade


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The arguments of a two-stage training run."""
    parser = training_parser("Train a two-stage cascade (retrieval: DSSM, rank: DIN).")
    add_method_options(parser)
    return parser.parse_args(argv)


def build_loss(args: argparse.Namespace) -> nn.Module:
    """The loss of ``args.loss_type``: loss(scores, targets) -> {"loss": ..., named terms}."""
    if args.loss_type == "bce":
        return BCE(CASCADE.seen_groups(args.num_random_items), **method_options(args))
    elif args.loss_type == "icc":
        return ICC(CASCADE.icc_cuts, dict.fromkeys(CASCADE.stage_names, 1.0), **method_options(args))
    elif args.loss_type == "rankflow":
        return RankFlow(CASCADE.quotas, order_distillation=False, **method_options(args))
    elif args.loss_type == "fs_ranknet":
        return FSRankNet(**method_options(args))
    elif args.loss_type == "fs_lambdaloss":
        return FSLambdaLoss(**method_options(args))
    elif args.loss_type == "arf":
        return ARF(CASCADE.quotas, CASCADE.num_relevant, **method_options(args, tau=200.0))
    elif args.loss_type == "arf_v2":
        return ARFv2(CASCADE.quotas, CASCADE.num_relevant, **operator_options(args, tau=200.0, topk_op="neural_sort"))
    elif args.loss_type == "lcron":
        return LCRON(CASCADE.stage_names, CASCADE.num_relevant, **lcron_options(args, CASCADE, label_ties="shared"))
    elif args.loss_type == "sorting":
        return SortingCrossEntropy(**sorting_options(args))
    else:
        raise unknown_method(args.loss_type, __file__)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    loss = build_loss(args)
    if not launch(args, "deep_components.run_train2", argv):
        train_cascade(CASCADE, args, loss)


if __name__ == "__main__":
    sys.exit(run_command(main))
