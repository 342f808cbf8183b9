"""Many runs -> one table: metrics (mean +- standard deviation over seeds), costs of training, or a stream's days.

    python -m deep_components table RUNS... [--kind=metrics|costs|streaming|choices] [--output=table.md|.csv|.tex|.json]

One method, ours, is compared with every other: by a t-test over seeds, corrected for their number, and by a bootstrap
interval over requests. On RecFlow the paper's numbers stand beside.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from deep_components.cli import Parser, run_command, write_out
from deep_components.errors import InputError
from deep_components.files import write_atomically
from deep_components.reporting.choices import choices_document, step_seconds
from deep_components.reporting.frame import frame, read_runs
from deep_components.reporting.results import OUR_METHOD, Results, build_results
from deep_components.reporting.tables import (
    FORMATS,
    SUFFIXES,
    Maker,
    costs_document,
    metrics_document,
    streaming_document,
)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and how they are compared."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folders that hold evaluated runs, at any depth")  # fmt: skip
    parser.add_argument("--compare", metavar="NAME",
                        help=f"the row to compare with every other trained row (default: {OUR_METHOD})")  # fmt: skip
    parser.add_argument("--test", choices=["welch", "paired"], default="welch",
                        help="over seeds: Welch's t-test (default), or the t-test paired by seed")  # fmt: skip
    parser.add_argument("--any_code", action="store_true",
                        help="let the seeds of a row be of different code; they are marked then")  # fmt: skip


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Print one table of many runs.")
    add_run_arguments(parser)
    parser.add_argument("--kind", choices=["metrics", "costs", "streaming", "choices"], default="metrics",
                        help="metrics (default), time and memory of training, joint recall by day, or the tested "
                        "choices of lcron sweep --test_seeds, whose folders RUN are then")  # fmt: skip
    parser.add_argument("--steps", type=Path, action="append", default=[], metavar="FILE",
                        help="of --kind=choices: seconds of a step, as python -m benchmarks.long_lists --output=FILE "
                        "measures them")  # fmt: skip
    parser.add_argument("--format", choices=list(FORMATS), help="default: by the ending of --output, else text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    return parser.parse_args(argv)


def results_of(args: argparse.Namespace) -> Results:
    """The results that the arguments of :func:`add_run_arguments` ask for."""
    return build_results(read_runs(args.runs), args.compare, args.test, args.any_code)


def _document(args: argparse.Namespace) -> Maker:
    if args.kind == "costs":
        return partial(costs_document, frame(args.runs), any_code=args.any_code)
    if args.kind == "streaming":
        return partial(streaming_document, read_runs(args.runs), any_code=args.any_code)
    if args.kind == "choices":
        steps = step_seconds(args.steps)
        return partial(choices_document, args.runs, args.compare, args.test, steps, any_code=args.any_code)
    return partial(metrics_document, results_of(args))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    suffix = args.output.suffix if args.output else ".txt"
    form = args.format or SUFFIXES.get(suffix)
    if form is None:
        raise InputError(f"--output={args.output}: ending unknown; use {', '.join(SUFFIXES)}, or give --format")
    content = FORMATS[form](_document(args))
    if args.output is None:
        write_out(content)
    else:
        write_atomically(args.output, lambda file: file.write(content.encode()))


if __name__ == "__main__":
    sys.exit(run_command(main))
