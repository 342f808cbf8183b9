"""``python -m deep_components NAME arguments``: the command ``lcron``."""

import sys

if __name__ == "__main__":
    import os

    # Python puts the current folder first, which may be that of a log: nothing in it is to be imported.
    here = os.getcwd()  # noqa: PTH109 - pathlib is not loaded yet
    if here != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
        sys.path[:] = [path for path in sys.path if path not in ("", here)]

    from deep_components.commands import main

    sys.exit(main())
