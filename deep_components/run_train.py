"""Train any cascade of two to four stages: arguments -> build_loss -> train -> checkpoint."""

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
from deep_components.cascade import SETTINGS, Cascade, named_cascade
from deep_components.cli import run_command
from deep_components.distributed.launch import launch
from deep_components.errors import InputError
from deep_components.loss.arf import ARF
from deep_components.loss.arf_v2 import ARFv2
from deep_components.loss.bce import BCE
from deep_components.loss.fs_lambdaloss import FSLambdaLoss
from deep_components.loss.fs_ranknet import FSRankNet
from deep_components.loss.icc import ICC
from deep_components.loss.lcron import LCRON
from deep_components.loss.rankflow import RankFlow
from deep_components.loss.sorting import SortingCrossEntropy
from deep_components.models import check_models
from deep_components.training.loop import train_cascade


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The arguments of a training run; ``cascade`` is the cascade itself. InputError when its file cannot be used."""
    parser = training_parser("Train a cascade of two to four stages.")
    parser.add_argument("--cascade", required=True, metavar="FILE",
                        help=f"a TOML file (docs/cascades.md), or one of {', '.join(SETTINGS)}")  # fmt: skip
    add_method_options(parser)
    args = parser.parse_args(argv)
    source, args.cascade = args.cascade, named_cascade(args.cascade)
    check_models(args.cascade, source)
    for stage in args.cascade.stage_names:  # a loss names its trainable weights by the stages
        if hasattr(nn.ParameterDict(), stage):
            raise InputError(f"cascade {args.cascade.name}: stage {stage!r}: PyTorch uses this name; choose another")
    return args


def build_loss(args: argparse.Namespace) -> nn.Module:
    """The loss of ``args.loss_type`` for ``args.cascade``: loss(scores, targets) -> {"loss": ..., named terms}.

    Where the released code of two and of three stages differ, two stages are as the one, three and four as the other.
    """
    cascade: Cascade = args.cascade
    two_stages = len(cascade.stages) == 2
    if args.loss_type == "bce":
        return BCE(cascade.seen_groups(args.num_random_items), **method_options(args))
    elif args.loss_type == "icc":
        weights = dict.fromkeys(cascade.stage_names, 1.0) if two_stages else None
        return ICC(cascade.icc_cuts, weights, **method_options(args))
    elif args.loss_type == "rankflow":
        return RankFlow(cascade.quotas, order_distillation=not two_stages, **method_options(args))
    elif args.loss_type == "fs_ranknet":
        return FSRankNet(**method_options(args))
    elif args.loss_type == "fs_lambdaloss":
        return FSLambdaLoss(**method_options(args))
    elif args.loss_type == "arf":
        return ARF(cascade.quotas, cascade.num_relevant, **method_options(args, tau=200.0))
    elif args.loss_type == "arf_v2":
        return ARFv2(cascade.quotas, cascade.num_relevant, **operator_options(args, tau=200.0, topk_op="neural_sort"))
    elif args.loss_type == "lcron":
        ties = "shared" if two_stages else "repeated"
        return LCRON(cascade.stage_names, cascade.num_relevant, **lcron_options(args, cascade, label_ties=ties))
    elif args.loss_type == "sorting":
        return SortingCrossEntropy(**sorting_options(args))
    else:
        raise unknown_method(args.loss_type, __file__)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    loss = build_loss(args)
    # A run keeps its cascade whole, not the name of a file that may change; the rest is as run_train2's.
    cascade = vars(args).pop("cascade")
    if not launch(args, "deep_components.run_train", argv):
        train_cascade(cascade, args, loss)


if __name__ == "__main__":
    sys.exit(run_command(main))
