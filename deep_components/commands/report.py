"""One page about many runs: results, comparisons, learning curves, where ground truth is lost, configuration.

    python -m deep_components report RUNS... --output=report.html [--figures=DIR]

The page needs no network and no other file. --figures writes its charts as PNG for a paper.
"""

import argparse
import logging
import sys
from pathlib import Path

from deep_components.cli import Parser, run_command
from deep_components.commands.table import add_run_arguments, results_of
from deep_components.files import write_atomically
from deep_components.reporting.figures import charts_of, write_figures
from deep_components.reporting.page import render

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The runs to report on, and where to."""
    parser = Parser(description="Write one page about many runs.")
    add_run_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write the charts there, as PNG of 300 dpi")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    results, problems = results_of(args).by_score(), list[str]()
    charts = charts_of(results, problems)
    page = render(results, charts, problems)
    write_atomically(args.output, lambda file: file.write(page.encode()))
    logger.info("%d runs -> %s", len(results.runs), args.output)
    if args.figures is not None:
        logger.info("%d figures -> %s", len(write_figures(charts, args.figures)), args.figures)


if __name__ == "__main__":
    sys.exit(run_command(main))
