"""Evaluate a run of any cascade: checkpoint -> metrics.json."""

import sys

from deep_components.arguments import evaluation_parser
from deep_components.cli import run_command
from deep_components.evaluation.day import evaluate_cascade


def main(argv: list[str]) -> None:
    evaluate_cascade(
        evaluation_parser("Evaluate a run on a test day; the run says which cascade it is.").parse_args(argv)
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
