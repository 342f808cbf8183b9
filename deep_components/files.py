"""Writing files so that no reader ever sees half of one."""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from deep_components.errors import InputError


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents unless they are there. InputError when that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror}); name another one") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; renamed to ``path`` when the block ends without an error.

    Raises InputError when the folder cannot be written or the disk is full; the temporary file is removed then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free the space or name another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporaries(path: Path) -> list[Path]:
    """The temporary files and folders of writers of ``path``, in use or left by a killed process."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then rename it. Errors as in :func:`atomic_path`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write(file)
