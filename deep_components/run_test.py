"""Evaluate a run of any cascade: checkpoint -> metrics.json."""

import sys

from deep_components.arguments import evaluation_parser
from deep_components.cascade import named_cascade
from deep_components.cli import run_command
from deep_components.distributed.evaluation import evaluate
from deep_components.distributed.launch import launch


def main(argv: list[str]) -> None:
    parser = evaluation_parser("Evaluate a run on a test day; the run says which cascade it is.")
    parser.add_argument("--cascade", metavar="FILE",
                        help="what the run must be of; needed where a stage's model is your own code")  # fmt: skip
    args = parser.parse_args(argv)
    if not launch(args, "deep_components.run_test", argv, trains=False):
        evaluate(args, named_cascade(args.cascade) if args.cascade is not None else None)


if __name__ == "__main__":
    sys.exit(run_command(main))
