"""Requests in a file -> served lists in a file, by a bundle's cascade.

    python -m deep_components recommend --bundle=B --requests=r.parquet --output=o.parquet

Memory does not grow with the number of requests.
"""

import argparse
import logging
import sys
from pathlib import Path

from deep_components.arguments import choose_device, folder
from deep_components.cascade import named_cascade
from deep_components.cli import Parser, run_command
from deep_components.dataset.rows import open_rows
from deep_components.errors import InputError
from deep_components.serving.batch import recommend_table, writer_of
from deep_components.serving.recommender import Recommender

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Answer the requests of a table.")
    parser.add_argument("--bundle", type=folder, required=True, help="a bundle's folder, made by lcron export")
    parser.add_argument("--requests", type=Path, required=True,
                        help="Parquet, CSV or Feather, a file or a folder of them (docs/serving.md)")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".parquet, .csv, .feather or .arrow")
    parser.add_argument("--k", type=int, default=20, help="items of an answer (default 20)")
    parser.add_argument("--filter_seen", action=argparse.BooleanOptionalAction, default=True,
                        help="leave out the items of a request's history (default)")  # fmt: skip
    parser.add_argument("--explain", action="store_true", help="also where each candidate fell out, and its scores")
    parser.add_argument("--id", action="append", default=[], metavar="COLUMN",
                        help="a column of the requests to keep beside the user's; may be given again")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=256, help="requests held at a time (default 256)")
    parser.add_argument("--cascade", metavar="FILE",
                        help="the bundle's; needed where a stage's model is your own code")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.set_defaults(cuda=None)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    for name in ("k", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)}: is 1 or more")
    writer_of(args.output)
    cascade = named_cascade(args.cascade) if args.cascade is not None else None
    recommender = Recommender.load(args.bundle, cascade, str(choose_device(args)))
    requests = open_rows(args.requests, "--requests", recommender.bundle.encoding.columns("request"))
    done = recommend_table(
        recommender, requests, args.output, args.id, args.batch_size, args.explain, k=args.k,
        filter_seen=args.filter_seen,
    )  # fmt: skip
    logger.info("%d requests -> %s", done, args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
