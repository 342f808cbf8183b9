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

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> None:
    parent, module = int(argv[0]), argv[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before Linux was told
        raise SystemExit(130)
    sys.argv = [module, *argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
