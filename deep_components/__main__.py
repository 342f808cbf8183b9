"""``python -m deep_components NAME arguments``: the command ``lcron``."""

import sys

from deep_components.commands import main

if __name__ == "__main__":
    sys.exit(main())
