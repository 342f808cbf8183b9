"""Each user's latest request -> the feature store that `lcron serve` completes requests from."""

import argparse
import logging
from pathlib import Path

from deep_components.arguments import folder
from deep_components.cli import Parser
from deep_components.errors import InputError
from deep_components.serving.features import FEATURES_FILE, open_features
from deep_components.serving.latest import latest_requests

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Put each user's latest request, its fields and history, into a feature store.")
    parser.add_argument("--bundle", type=folder, required=True, help="the bundle's folder")
    parser.add_argument("--features", metavar="WHERE", help="redis://[user:password@]host[:port][/number], or a file "
                        f"(default: {FEATURES_FILE} in the bundle's folder)")  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--requests", type=Path, help="raw requests: Parquet, CSV or Feather, a file or a folder")
    source.add_argument("--data_dir", type=folder, help="a log of RecFlow's layout, or one of indices, in place of it")
    parser.add_argument("--user", metavar="COLUMN", default="",
                        help="the column that names a user, where the bundle does not say")  # fmt: skip
    parser.add_argument(
        "--cache_dir", type=folder, help="where the log's columnar cache lies (default: DATA_DIR/cache)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.features == "":
        raise InputError("--features is empty; give redis://host:port/number or a file")
    requests = latest_requests(args.bundle, args.requests, args.data_dir, args.user, args.cache_dir)
    store, count = open_features(args.features or args.bundle / FEATURES_FILE, create=True), 0
    try:
        for records in requests:
            store.put(records)
            count += len(records)
    finally:
        store.close()
    logger.info("%s: %s users", store.name, f"{count:,}")
