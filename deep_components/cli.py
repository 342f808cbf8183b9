"""The edge of every command: logging, progress bars, and mistakes reported as one sentence with exit code 2."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from deep_components.errors import EndedError, InputError, StoppedError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations, which says what is wrong in one sentence and names the option that may have
    been meant, one of its own or of ``others``."""

    def __init__(self, *, others: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._others = tuple(others)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"{name}: no such {'option' if name.startswith('-') else 'argument'}{self._hint(name)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; --help lists the options\n")

    def _hint(self, name: str) -> str:
        return nearest(name, [*self._option_string_actions, *self._others])


def nearest(name: str, names: Iterable[str]) -> str:
    """The words " (did you mean ...?)" with the most similar of the names; "" where none is similar."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run ``command(argv)`` and return the process's exit code.

    0 on success, 1 when nobody reads the output any more, 2 for an :class:`InputError` (its sentence goes to stderr),
    130 or 143 when SIGINT or SIGTERM stopped it. Anything else is a defect of ours and keeps its traceback.
    Of several processes of one training the first speaks for all, but for errors.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    speaks = int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if speaks else logging.ERROR, handlers=[handler])
    try:
        command(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        sys.stderr.write(f"error: {printable(' '.join(str(error).splitlines()))}\n")
        return 2
    except StoppedError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return 128 + error.signal_number
    except EndedError as error:
        sys.stderr.write(f"{printable(str(error))}\n" if str(error) else "")
        return error.code
    except BrokenPipeError:  # who reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its end
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n" if speaks else "")
        return 130
    return 0


def write_out(text: str) -> None:
    """Write to standard output; what its encoding lacks, as letters of a name, becomes question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


def printable(text: str) -> str:
    """The text, which a file may have brought, as one line that says what it holds: characters that a terminal would
    obey, or that hide or reorder others, are written as in Python (\\n, \\x1b, \\u202e)."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class _Printable(logging.Formatter):
    """Messages, and the lines of tracebacks, are :func:`printable`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def progress(iterable: Iterable[T], description: str, unit: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on a terminal, silence elsewhere."""
    return tqdm(
        iterable, desc=printable(description), unit=unit, total=total, disable=not sys.stderr.isatty(), leave=False
    )
