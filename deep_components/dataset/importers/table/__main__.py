"""``python -m deep_components.dataset.importers.table``: the command ``lcron import``."""

import sys

from deep_components.cli import run_command
from deep_components.dataset.importers.table.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
