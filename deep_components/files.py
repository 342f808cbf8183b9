"""Writing files so that no reader ever sees half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from deep_components.errors import InputError


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then rename it: a reader never sees half a file.

    Raises InputError when the folder cannot be written or the disk is full; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free the space or name another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
