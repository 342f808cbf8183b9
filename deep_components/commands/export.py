"""A trained run -> a bundle, from which it is served: models, encoding, corpus, and an index over it."""

import argparse
import logging
from pathlib import Path

from deep_components.arguments import folder
from deep_components.cascade import named_cascade
from deep_components.cli import Parser
from deep_components.errors import InputError
from deep_components.serving.export import export_run
from deep_components.serving.index import KINDS, RECALL
from deep_components.serving.interchange import export_bundle

logger = logging.getLogger(__name__)


def add_index_arguments(parser: argparse.ArgumentParser, kind: str, recall: str) -> None:
    """How a corpus is searched, ``kind`` and ``recall`` being the defaults, and what stays of earlier versions."""
    parser.add_argument("--index", choices=KINDS, help=f"how items are searched (default: {kind})")
    parser.add_argument("--recall", type=float, metavar="SHARE", help="of the exact search's items that an approximate "
                        f"index must find (default: {recall})")  # fmt: skip
    parser.add_argument("--keep", type=int, metavar="N", help="remove all but the newest N versions (default: none)")


def check_index_arguments(args: argparse.Namespace) -> None:
    """InputError when one is out of range."""
    if args.recall is not None and not 0 < args.recall <= 1:
        raise InputError(f"--recall={args.recall}: is a share above 0, at most 1")
    if args.keep is not None and args.keep < 1:
        raise InputError(f"--keep={args.keep}: is 1 or more")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Make a bundle of a run, or add a version to one.")
    parser.add_argument("--run", type=folder, required=True, help="a run's folder")
    parser.add_argument("--output", type=folder, required=True, help="the bundle's folder")
    parser.add_argument("--corpus", type=Path, help="the items: Parquet, CSV or Feather, a file or a folder of them "
                        "(default: the items of the log)")  # fmt: skip
    parser.add_argument("--data_dir", type=folder, help="the run's log; not needed where that was made by lcron import")
    parser.add_argument("--cache_dir", type=folder, help="where its columnar cache lies (default: DATA_DIR/cache)")
    parser.add_argument(
        "--item", metavar="COLUMN", help="the raw column that names an item, where the log does not say"
    )
    parser.add_argument("--cascade", metavar="FILE",
                        help="what the run must be of; needed where a stage's model is your own code")  # fmt: skip
    parser.add_argument("--any_code", action="store_true", help="export a run that was trained by other code")
    parser.add_argument("--onnx", action="store_true", help="write ONNX graphs too, as lcron export onnx does")
    add_index_arguments(parser, "auto, by their number", str(RECALL))
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    check_index_arguments(args)
    cascade = named_cascade(args.cascade) if args.cascade is not None else None
    version = export_run(
        args.run, args.output, args.corpus, args.data_dir, cascade, args.item, args.index or "auto",
        args.recall or RECALL, args.any_code, args.cache_dir, args.keep,
    )  # fmt: skip
    logger.info("%s: version %s", args.output, version)
    if args.onnx:
        export_bundle(args.output, cascade, args.data_dir, args.cache_dir)
