"""Writing files so that no reader ever sees half of one, and JSON that a flipped bit does not pass unseen."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deep_components.errors import InputError

_CHECKSUM = "checksum"
# The beginning of a .npy file as np.save writes it. numpy's own reader parses it as Python.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(\|b1|[<>|][iu][1248]|[<>]f[248])', 'fortran_order': False, "
    rb"'shape': \((\d{0,18}(?:, \d{1,18}){0,2}),?\), \} *\n",
    re.DOTALL,
)
_MAX_JSON = 1 << 26  # bytes; the largest that is written here, a manifest, has some thousand times less

logger = logging.getLogger(__name__)


def regular(path: str, flags: int) -> int:
    """An ``opener`` for open(): OSError for what is no regular file. A pipe would wait, and a device may never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; OSError when it cannot be read, or is larger than ``most`` bytes."""
    with open(path, "rb", opener=regular) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than the {most} bytes that such a file may have", str(path))
        return file.read()


def npy_header(beginning: bytes, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape, and where the numbers begin, of a .npy file of ``size`` bytes that begins so.

    ValueError unless it is one that np.save writes of numbers in C order, and the size is that of its array."""
    header = _NPY_HEADER.match(beginning)
    if header is None:
        raise ValueError("it does not begin as one that np.save writes of numbers in C order")
    dtype, shape = np.dtype(header[1].decode()), tuple(int(part) for part in header[2].split(b",") if part)
    if size != header.end() + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its {size} bytes are not those of the array that it declares")
    return dtype, shape, header.end()


class NpyWriter:
    """Writes a .npy file of a known shape piece by piece, as np.save would; a context."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self._left = path, dtype, shape[0]
        self._file = path.open("xb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, values: np.ndarray) -> None:
        """Append rows."""
        self._left -= len(values)
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._left == 0


def map_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped read-only; ValueError or OSError when it is none that np.save writes."""
    with open(path, "rb", opener=regular) as file:
        dtype, shape, start = npy_header(file.read(1 << 10), os.fstat(file.fileno()).st_size)
    return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)


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
    temporary = _temporary(path)
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, atomically, with a field that holds the SHA-256 of all others."""
    plain = as_json(content)
    text = json.dumps(plain | {_CHECKSUM: _digest(plain)}, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is read back when ``content`` is written: lists for tuples, texts for paths. ValueError for NaN."""
    plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False, default=str))
    return plain


def read_json(path: Path, must_have_checksum: bool = False) -> dict[str, Any]:
    """What :func:`write_json` wrote, its checksum verified; a file without one, written by others, is taken with a
    warning unless it ``must_have_checksum``. ValueError when it is no JSON object, or not what was written."""
    content = json.loads(read_bytes(path, _MAX_JSON))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    checksum = content.pop(_CHECKSUM, None)
    if (checksum is not None or must_have_checksum) and checksum != _digest(content):
        raise ValueError("it does not match its checksum, so it was damaged or changed after it was written")
    if checksum is None:
        logger.warning("%s: has no checksum, so damage in it would not be seen", path)
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path, shared: bool = False, wait: float = math.inf) -> Iterator[int | None]:
    """Hold a lock on ``path``, made if need be, which ends with the process at the latest.

    Yields the lock's descriptor: a process that inherits it holds the lock too. None where another process holds it for
    longer than ``wait`` seconds. ``shared`` locks do not exclude one another. Where nothing can be locked, a read-only
    folder or a file system without locks, a shared lock is none, and others raise OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not shared:
            raise
        yield -1
        return
    try:
        yield descriptor if _lock(descriptor, shared, path, wait) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, shared: bool, path: Path, wait: float) -> bool:
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began >= wait:
                return False
        except OSError as error:
            if not shared or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return True
        else:
            return True
        if not said:
            logger.info("waiting for another process (it holds %s)", path)
            said = True
        time.sleep(0.1)


def folder_checksum(folder: Path) -> str | None:
    """SHA-256 of the names and contents of a folder's files; None where there is no folder.

    InputError when something in it is no plain file: a link or a pipe could be anything.
    """
    if not folder.is_dir():
        return None
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path}: not a plain file; remove it, or make the folder again")
    return _digest({path.name: sha256_of(path) for path in folder.iterdir()})


def copy_folder(source: Path, target: Path, checksum: str) -> None:
    """Copy a folder of plain files to ``target``, which is not there, whole or not at all.

    InputError when the copy does not have the :func:`folder_checksum`.
    """
    temporary = _temporary(target)
    try:
        shutil.copytree(source, temporary, symlinks=True)
        if folder_checksum(temporary) != checksum:
            raise InputError(f"{source}: changed while it was read; give the command again")
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, all at once: what a killed process leaves of it has a temporary name."""
    gone = _temporary(path)
    remove(gone)
    with suppress(FileNotFoundError):
        path.rename(gone)
        remove(gone)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
