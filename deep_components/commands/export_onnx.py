"""A bundle's models -> ONNX graphs and torch.export programs, compared with the models."""

import argparse
import logging

from deep_components.arguments import folder
from deep_components.cascade import named_cascade
from deep_components.cli import Parser
from deep_components.serving.interchange import ONNX_FOLDER, export_bundle

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Write a bundle's models as ONNX graphs and torch.export programs.")
    parser.add_argument("--bundle", type=folder, required=True, help="the bundle's folder; they go to its folder onnx")
    parser.add_argument("--data_dir", type=folder, help="the run's log: they are compared on its requests too")
    parser.add_argument("--cache_dir", type=folder, help="where its columnar cache lies (default: DATA_DIR/cache)")
    parser.add_argument("--cascade", metavar="FILE", help="needed where a stage's model is your own code")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    cascade = named_cascade(args.cascade) if args.cascade is not None else None
    manifest = export_bundle(args.bundle, cascade, args.data_dir, args.cache_dir)
    for graph in manifest["graphs"].values():
        for name, difference in graph["largest_difference"].items():
            logger.info("%s: differs from the model by at most %.1e", args.bundle / ONNX_FOLDER / name, difference)
