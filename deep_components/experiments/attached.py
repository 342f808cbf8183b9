"""Run a module as ``python -m`` does, in a process that ends with the one that started it.

    python -m deep_components.experiments.attached PARENT MODULE [arguments]

A runner that is killed outright cannot stop its commands, nor can a script that is killed stop its runner; Linux then
sends them SIGTERM. SIGTERM is an interruption here, as Ctrl-C is: what is being written is removed.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _is_ancestor(process: int) -> bool:
    """Whether this process or one that started it was started by ``process``, which lives."""
    pid = os.getpid()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid == process:
            return True
    return False


def main(argv: list[str]) -> None:
    parent, module = int(argv[0]), argv[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if not _is_ancestor(parent):  # it ended before Linux was told; an interpreter may be a script that starts another
        raise SystemExit(130)
    sys.argv = [module, *argv[2:]]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # before the module has taken charge of it
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
