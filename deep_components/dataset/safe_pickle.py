"""Reading pickled data files without running anything they ask for.

A pickle is a program. This reader runs it on a machine that knows only what RecFlow's files hold - dicts (defaultdict
included), lists, tuples, integers, floats, strings, bytes, numpy arrays and numpy scalars - and refuses any other
name before it is looked up. Arrays are not even built by numpy: the pickle's array state becomes a
:class:`PickledArray`, plain bytes with a checked shape and dtype, so that a forged state cannot reach numpy's C code.
"""

import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.errors import InputError

_SAFE_DTYPE_KINDS = "iufb"
_TYPE_STRING = re.compile(r"[iufb]\d{1,2}")  # as numpy pickles them; np.dtype itself would parse far more

# What a damaged pickle can make the unpickler raise.
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class PickledArray:
    """A numpy array as its pickle describes it: ``data`` are the array's bytes, row-major."""

    __slots__ = ("data", "dtype", "shape")

    shape: tuple[int, ...]
    dtype: np.dtype
    data: bytes

    def __init__(self) -> None:
        """One zero of no dimension, until the state comes."""
        self.shape, self.dtype, self.data = (), np.dtype(np.int64), bytes(8)

    def __setstate__(self, state: Any) -> None:
        """Take numpy's state (version, shape, dtype, is_fortran, bytes). Raises ValueError when it does not fit."""
        _, shape, dtype, fortran, data = state
        self._fill(shape, dtype, data, fortran)

    def _fill(self, shape: Any, dtype: Any, data: Any, fortran: bool) -> None:
        described = dtype.dtype if isinstance(dtype, _PickledDtype) else None
        if described is None or described.kind not in _SAFE_DTYPE_KINDS:
            raise ValueError("an array whose elements are not numbers")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array whose shape is not a tuple of sizes")
        if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * described.itemsize:
            raise ValueError(f"an array whose data do not fill its shape {shape}")
        if fortran:
            data = np.frombuffer(data, described).reshape(shape, order="F").tobytes()
        self.shape, self.dtype, self.data = shape, described, bytes(data)

    def to_numpy(self) -> np.ndarray:
        """The array, read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class _PickledDtype:
    """numpy.dtype as its pickle describes it: a type string, then its byte order in the state."""

    __slots__ = ("dtype",)

    dtype: np.dtype

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|"):
            raise ValueError("a dtype of unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Name:
    """What a permitted global name stands for. Callable, but without attributes that a pickle could set."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a permitted name cannot be changed")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _dtype(code: Any, *_: Any) -> _PickledDtype:
    if not isinstance(code, str) or not _TYPE_STRING.fullmatch(code):
        raise ValueError("an array whose elements are not numbers")
    described = _PickledDtype()
    described.dtype = np.dtype(code)
    return described


def _empty_array(*_: Any) -> PickledArray:
    return PickledArray()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array._fill(shape, dtype, data, order == "F")
    return array


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    array = PickledArray()
    array._fill((), dtype, data, fortran=False)
    return array.to_numpy().item()


def _latin1_bytes(text: Any, encoding: Any) -> bytes:
    """Protocols 0 to 2 write bytes as _codecs.encode(text, "latin1")."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("a byte string in an unknown encoding")
    return text.encode("latin1")


def _no_call(*_: Any) -> Any:
    raise ValueError("a type that is called")


def _empty_bytes() -> bytes:
    """Protocols 0 to 2 write b"" as a call of bytes."""
    return b""


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_PERMITTED: dict[tuple[str, str], _Name] = {
    ("numpy", "ndarray"): _Name(_no_call),
    ("numpy", "dtype"): _Name(_dtype),
    ("collections", "defaultdict"): _Name(_empty_dict),
    ("collections", "OrderedDict"): _Name(_empty_dict),
    ("_codecs", "encode"): _Name(_latin1_bytes),
}
# The factories a defaultdict may name; they are never called. Protocols 0 to 2 write int as long, str as unicode.
for _module in ("builtins", "__builtin__"):
    for _factory in ("dict", "list", "int", "long", "float", "set", "str", "unicode"):
        _PERMITTED[_module, _factory] = _Name(_no_call)
    _PERMITTED[_module, "bytes"] = _Name(_empty_bytes)
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _PERMITTED[f"{_core}.multiarray", "_reconstruct"] = _Name(_empty_array)
    _PERMITTED[f"{_core}.multiarray", "scalar"] = _Name(_scalar)
    _PERMITTED[f"{_core}.numeric", "_frombuffer"] = _Name(_array_from_buffer)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        permitted = _PERMITTED.get((module, name))
        if permitted is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data file has no use for")
        return permitted


def load_pickle(path: Path) -> Any:
    """The object in ``path``, with numpy arrays as :class:`PickledArray` and numpy scalars as Python numbers.

    Raises InputError when the file is missing, damaged, or asks for anything but plain data.
    """
    try:
        with path.open("rb") as file:
            return _RestrictedUnpickler(file).load()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; see data/README.md for the files expected") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: not a readable data pickle ({reason}); fetch the file again") from error
