"""streaming.json of many runs -> one table: joint recall day by day, a column per method."""

import argparse
import sys
from pathlib import Path

from deep_components.cli import run_command
from deep_components.experiments.tables import streaming_table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, at any depth")
    sys.stdout.write(streaming_table(parser.parse_args(argv).runs))


if __name__ == "__main__":
    sys.exit(run_command(main))
