"""A bundle with another corpus: a new version with the models of the current one, which stays as it was."""

import argparse
import logging
from pathlib import Path

from deep_components.arguments import folder
from deep_components.cascade import named_cascade
from deep_components.cli import Parser
from deep_components.commands.export import add_index_arguments, check_index_arguments
from deep_components.serving.export import index_corpus

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Give a bundle another corpus, without training.")
    parser.add_argument("--bundle", type=folder, required=True, help="the bundle's folder")
    parser.add_argument("--corpus", type=Path, required=True,
                        help="all items: Parquet, CSV or Feather, a file or a folder of them")  # fmt: skip
    parser.add_argument("--cascade", metavar="FILE", help="needed where a stage's model is your own code")
    add_index_arguments(parser, "as before", "as before")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    check_index_arguments(args)
    cascade = named_cascade(args.cascade) if args.cascade is not None else None
    version = index_corpus(args.bundle, args.corpus, cascade, args.index, args.recall, args.keep)
    logger.info("%s: version %s", args.bundle, version)
