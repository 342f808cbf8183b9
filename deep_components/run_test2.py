"""Evaluate a two-stage run: checkpoint -> metrics.json."""

import sys

from deep_components.arguments import evaluation_parser
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.distributed.evaluation import evaluate
from deep_components.distributed.launch import launch


def main(argv: list[str]) -> None:
    args = evaluation_parser("Evaluate a two-stage run on a test day.").parse_args(argv)
    if not launch(args, "deep_components.run_test2", argv, trains=False):
        evaluate(args, TWO_STAGE)


if __name__ == "__main__":
    sys.exit(run_command(main))
