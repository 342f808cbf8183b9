"""Safetensors files of named arrays and metadata, each under a SHA-256 that is verified when it is read.

They are written and read block by block where an array is large, so that none has to lie in memory whole.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from deep_components.errors import InputError
from deep_components.files import atomic_path, regular

CHECKSUM = "sha256"  # entry of the metadata: covers all others, and so, by the tensors' checksums, the whole file

_METADATA = "run"
_ARRAY_CHECKSUMS = "tensor_sha256"
_UNKNOWN = "0" * 64  # stands for a SHA-256 until it is known
_BLOCK_BYTES = 1 << 24
# Types in the order in which safetensors writes their arrays, and its names of them.
_TYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NUMPY = {theirs: np.dtype(ours) for ours, theirs in _TYPES.items()}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """An array to be written that comes in blocks: ``blocks`` [n, ...], each of any number of rows n, are together
    ``shape`` and all of ``dtype``. They are asked for when the array is written, and one is kept at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def written_order(arrays: Mapping[str, "np.ndarray | Blocks"]) -> list[str]:
    """The names in the order in which :func:`save` writes the arrays, one after the other, and the file holds them."""
    order = {name: at for at, name in enumerate(_TYPES)}
    return sorted(arrays, key=lambda name: (order.get(arrays[name].dtype.name, len(order)), name))


def save(path: Path, arrays: Mapping[str, "np.ndarray | Blocks"], metadata: Mapping[str, Any]) -> str:
    """Write arrays and metadata, with checksums, atomically: the bytes that safetensors itself would write.

    Returns the checksum that covers everything. InputError when the folder cannot be written or the disk is full.
    """
    names = written_order(arrays)
    unknown = next((arrays[name].dtype for name in names if arrays[name].dtype.name not in _TYPES), None)
    if unknown is not None:
        raise InputError(f"{path}: cannot be written (safetensors files have no type {unknown}); use another type")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.seek(len(_header(arrays, _sealed(metadata, dict.fromkeys(names, _UNKNOWN)))))
        sealed = _sealed(metadata, {name: _write(file, arrays[name]) for name in names})
        file.seek(0)
        file.write(_header(arrays, sealed))  # as long as the one above
    checksum: str = sealed[CHECKSUM]
    return checksum


def _sealed(metadata: Mapping[str, Any], checksums: Mapping[str, str]) -> dict[str, Any]:
    sealed = {**metadata, _ARRAY_CHECKSUMS: dict(checksums)}
    return sealed | {CHECKSUM: _metadata_sha256(sealed)}


def _header(arrays: Mapping[str, np.ndarray | Blocks], metadata: Mapping[str, Any]) -> bytes:
    """The file's beginning. Our metadata are one entry: safetensors writes several in random order."""
    entries: dict[str, Any] = {"__metadata__": {_METADATA: json.dumps(metadata, sort_keys=True)}}
    end = 0
    for name in written_order(arrays):
        shape, dtype = arrays[name].shape, arrays[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _TYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, values: np.ndarray | Blocks) -> str:
    """Append an array's bytes; its SHA-256."""
    digest, dtype, start = _digest(values.dtype, values.shape), values.dtype.newbyteorder("<"), file.tell()
    for block in values.blocks if isinstance(values, Blocks) else (values,):
        assert block.dtype == values.dtype and block.shape[1:] == values.shape[1:]
        data = np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data
        digest.update(data)
        file.write(data)
    assert file.tell() - start == math.prod(values.shape) * dtype.itemsize
    return digest.hexdigest()


def load(path: Path, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays whose names begin with ``prefix``, and the metadata, of a safetensors file; checksums are verified.

    A file without checksums was not written by this project; it is taken with a warning. Raises InputError when the
    file is missing or damaged.
    """
    file = CheckedFile(path)
    return file.read(name for name in file.shapes if name.startswith(prefix)), file.metadata


class CheckedFile:
    """A file that :func:`save` wrote; its metadata are verified here, its arrays as they are read.

    Attributes: ``path``; ``metadata``; ``checksum``, what :func:`save` returned, None where the file has none (it is
    taken with a warning); ``shapes`` and ``dtypes`` of its arrays, by name. InputError, here and when an array is read,
    when the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as (file, self._sealed):
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: _numpy_type(part.get_dtype()) for name, part in slices.items()}
        self.checksum: str | None = self._sealed.get(CHECKSUM)
        self._checksums: dict[str, Any] = {}
        if self._sealed.keys() & {CHECKSUM, _ARRAY_CHECKSUMS}:
            self._checksums = self._sealed.get(_ARRAY_CHECKSUMS, {})
            if self.checksum != _metadata_sha256(self._sealed):
                raise self._damaged("its metadata do")
            if not isinstance(self._checksums, dict) or self._checksums.keys() != self.shapes.keys():
                raise self._damaged("its list of tensors does")
        else:
            logger.warning("%s: has no checksums, so damage in it would not be seen", path)

    @property
    def metadata(self) -> dict[str, Any]:
        return {name: value for name, value in self._sealed.items() if name not in (_ARRAY_CHECKSUMS, CHECKSUM)}

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Arrays by name."""
        with self._opened() as file:
            arrays = {name: file.get_tensor(name) for name in names}
        for name, values in arrays.items():
            digest = _digest(values.dtype, values.shape)
            digest.update(values.reshape(-1).view(np.uint8).data)
            self._verify(name, digest.hexdigest())
        return arrays

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """An array of one axis or more in blocks of its rows, of some 16 MB. They are verified when the last one has
        been taken, so take all, and trust none before."""
        shape = self.shapes[name]
        if 0 in shape:  # safetensors slices none of these
            yield self.read([name])[name]
            return
        with self._opened() as file:
            rows = file.get_slice(name)
            first_row = rows[:1]
            count = max(1, _BLOCK_BYTES // first_row.nbytes)
            digest = _digest(first_row.dtype, shape)
            for first in range(0, shape[0], count):
                block = np.ascontiguousarray(rows[first : min(first + count, shape[0])])
                digest.update(block.reshape(-1).view(np.uint8).data)
                yield block
        self._verify(name, digest.hexdigest())

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with opened(self.path) as (file, sealed):
            if sealed != self._sealed or set(file.keys()) != self.shapes.keys():
                raise InputError(f"{self.path}: changed while it was read; give the command again")
            yield file

    def _verify(self, name: str, found: str) -> None:
        if self._checksums and self._checksums[name] != found:
            raise self._damaged(f"tensor {name} does")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged: {what} not match the checksum; copy the file again, or train again")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file and our metadata in it, not verified. InputError when it is missing or damaged, before or in
    the block."""
    try:
        os.close(regular(str(path), os.O_RDONLY))  # a pipe would wait for a writer
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata are not an object")
            yield file, metadata
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; train first") from error
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); train again") from error


def _numpy_type(name: str) -> np.dtype:
    if name not in _NUMPY:
        raise ValueError(f"it holds a tensor of type {name}")
    return _NUMPY[name]


def _digest(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """The SHA-256 of an array, begun: it covers the type (by its name in PyTorch), the shape, and then the bytes."""
    return hashlib.sha256(json.dumps([f"torch.{dtype.name}", list(shape)]).encode())


def _metadata_sha256(metadata: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in metadata.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
