"""The edge of every command: logging, progress bars, and mistakes reported as one sentence with exit code 2."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

from deep_components.errors import InputError, StoppedError

T = TypeVar("T")


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run ``command(argv)`` and return the process's exit code.

    0 on success, 1 when nobody reads the output any more, 2 for an :class:`InputError` (its sentence goes to stderr),
    130 or 143 when SIGINT or SIGTERM stopped it. Anything else is a defect of ours and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        command(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")  # a file's content may have come in
        return 2
    except StoppedError as error:
        sys.stderr.write(f"{error}\n")
        return 128 + error.signal_number
    except BrokenPipeError:  # who reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its end
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def write_out(text: str) -> None:
    """Write to standard output; what its encoding lacks, as letters of a name, becomes question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


def progress(iterable: Iterable[T], description: str, unit: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on a terminal, silence elsewhere."""
    return tqdm(iterable, desc=description, unit=unit, total=total, disable=not sys.stderr.isatty(), leave=False)
