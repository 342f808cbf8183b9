"""Evaluating a run, alone or on several processes."""

import argparse

from deep_components.arguments import choose_device
from deep_components.cascade import Cascade
from deep_components.distributed.processes import joined
from deep_components.distributed.spread import share_of
from deep_components.evaluation.day import evaluate_cascade


def evaluate(args: argparse.Namespace, cascade: Cascade | None) -> None:
    """:func:`evaluate_cascade` on this process, or its share of it among those that were started with it."""
    with joined(choose_device(args), args.timeout) as processes:
        evaluate_cascade(args, cascade, share_of(processes))
