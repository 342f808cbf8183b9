"""Reading pickled data files without running anything they ask for.

A pickle is a program for a small stack machine. This module is that machine, cut down to what RecFlow's files hold:
dicts (defaultdict included), lists, tuples, integers, floats, strings, bytes, numpy arrays and numpy scalars, as
protocols 2 to 5 write them. An opcode or a name outside that list is refused before anything is looked up. Arrays are
not built by numpy: the pickle's array state becomes a :class:`PickledArray`, plain bytes with a checked shape and
dtype, so that a forged state cannot reach numpy's C code.

A day's file is one dict of hundreds of thousands of requests, so its items are handed out as they are read, and what
one piece of a file may take is limited: the memory needed does not grow with the file.
"""

import math
import os
import re
import reprlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.errors import InputError
from deep_components.files import regular

_TYPE_STRING = re.compile(r"[iufb]\d{1,2}")  # as numpy pickles them; np.dtype itself would parse far more
_MAX_DIMENSIONS = 4
_MAX_SIZE = 1 << 40  # of one dimension; shapes of larger ones could be made to have one hash
_BLOCK = 1 << 20  # bytes read at a time
_LONGEST_OPCODE, _MAX_LINE = 16, 1 << 10  # names are written as lines
_MAX_INTEGER = 64  # bytes
_INT64 = np.dtype(np.int64)
# Of one piece, which is what stands between two hand-outs of items: 1,000 requests, as Python writes them.
_MAX_OPCODES = 1 << 20
_MAX_BYTES = 1 << 29
_MAX_MEMORY = 1 << 24  # bytes of the file whose objects are all kept for later references; beyond them:
_MAX_KEPT = 1 << 16  # objects that later pieces may refer to, arrays apart
_MAX_SMALL = 256  # letters of a text that later pieces may refer to

# What a damaged pickle can make the machine raise.
_DAMAGED = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@dataclass(slots=True)
class PickledArray:
    """A numpy array as its pickle describes it: ``data`` are the array's bytes, row-major. ``offset`` is where in the
    file they stand, if they stand there as they are. One zero of no dimension, until its state comes."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype = _INT64
    data: bytes = bytes(8)
    offset: int | None = None

    def take_state(self, state: Any) -> "PickledArray":
        """Take numpy's state (version, shape, dtype, is_fortran, bytes). Raises ValueError when it does not fit."""
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _PickledDtype):
            raise ValueError("an array whose elements are not numbers")
        sizes = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
        if not sizes or not all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape):
            raise ValueError(f"an array whose shape is not a tuple of at most {_MAX_DIMENSIONS} sizes")
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array whose data do not fill its shape {reprlib.repr(shape)}")
        if fortran:
            data = np.frombuffer(data, dtype.dtype).reshape(shape, order="F").tobytes()
        self.shape, self.dtype, self.data = shape, dtype.dtype, data
        return self

    def to_numpy(self) -> np.ndarray:
        """The array, read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class _PickledDtype:
    """numpy.dtype as its pickle describes it: a type string, then its byte order in the state."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPE_STRING.fullmatch(code):
            raise ValueError("an array whose elements are not numbers")
        self.dtype = np.dtype(code)

    def take_state(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|"):
            raise ValueError("a dtype of unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


def _array(shape: Any, dtype: Any, data: Any, fortran: bool) -> PickledArray:
    return PickledArray().take_state((1, shape, dtype, fortran, data))


def _latin1_bytes(text: Any, encoding: Any) -> bytes:
    """Protocol 2 writes bytes as _codecs.encode(text, "latin1")."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("a byte string in an unknown encoding")
    return text.encode("latin1")


def _no_call(*_: Any) -> Any:
    raise ValueError("a type that is called")


def _empty_array(*_: Any) -> PickledArray:
    return PickledArray()


# What permitted names stand for; a callable on the stack is one of these. Protocol 2 writes int as long, str as
# unicode, and b"" as a call of bytes. The factories that a defaultdict may name are never called.
_BUILTINS: dict[str, Callable[..., Any]] = dict.fromkeys(
    ("dict", "list", "int", "long", "float", "set", "str", "unicode"), _no_call
)
_BUILTINS["bytes"] = lambda: b""
_MULTIARRAY: dict[str, Callable[..., Any]] = {
    "_reconstruct": _empty_array,
    "scalar": lambda kind, data: _array((), kind, data, False).to_numpy().item(),
}
_NUMERIC: dict[str, Callable[..., Any]] = {
    "_frombuffer": lambda data, kind, shape, order: _array(shape, kind, data, order == "F")
}
_PERMITTED: dict[str, dict[str, Callable[..., Any]]] = {
    "numpy": {"ndarray": _no_call, "dtype": _PickledDtype},
    "collections": {"defaultdict": lambda *_: {}, "OrderedDict": lambda *_: {}},
    "_codecs": {"encode": _latin1_bytes},
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "numpy.core.multiarray": _MULTIARRAY,  # numpy 1
    "numpy._core.multiarray": _MULTIARRAY,  # numpy 2
    "numpy.core.numeric": _NUMERIC,
    "numpy._core.numeric": _NUMERIC,
}

# Nearly all of a day's file are arrays of two dimensions, written alike by protocols 3 and 4. Read as a whole, they
# take a third of the time.
_PUT_ITSELF = rb"\x94|q.|r.{4}"
_PUT = rb"(?:" + _PUT_ITSELF + rb")"
_SIZE = rb"(K.|M..|J.{4})"
_ARRAY_HEAD = re.compile(
    rb"h(.)h(.)K\x00\x85" + _PUT + rb"h.\x87" + _PUT + rb"R(" + _PUT_ITSELF + rb")\(K\x01" + _SIZE + _SIZE
    + rb"\x86" + _PUT + rb"h(.)\x89([CB])", re.DOTALL,
)  # fmt: skip
_ARRAY_TAIL = re.compile(_PUT + rb"t" + _PUT + rb"b", re.DOTALL)


class _Arrays:
    """Where in the file the arrays of earlier pieces stand, in 20 bytes each: later pieces may name them."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._index, self._offset, self._kind = array("Q"), array("Q"), array("I")
        self._kinds: dict[tuple[tuple[int, ...], np.dtype], int] = {}  # shape and dtype -> number

    def add(self, index: int, made: PickledArray) -> None:
        """Note an array; nothing is noted of one that does not stand in the file as it is."""
        if (made.offset is None and made.data) or (self._index and index <= self._index[-1]):
            return
        self._index.append(index)
        self._offset.append(made.offset or 0)
        self._kind.append(self._kinds.setdefault((made.shape, made.dtype), len(self._kinds)))
        if len(self._kinds) > _MAX_KEPT:
            raise ValueError("arrays of more shapes than a data file has")

    def find(self, index: int) -> PickledArray:
        """The array once more, read from the file. ValueError when none of that index was noted."""
        entry = bisect_left(self._index, index)
        if entry == len(self._index) or self._index[entry] != index:
            raise ValueError("an object of one request named in another, which only arrays may be")
        shape, dtype = list(self._kinds)[self._kind[entry]]
        size = math.prod(shape) * dtype.itemsize
        data = os.pread(self._file.fileno(), size, self._offset[entry])
        if len(data) != size:
            raise ValueError("it has become shorter while it was read")
        return PickledArray(shape, dtype, data, self._offset[entry])


class _Machine:
    """Runs one pickle. :meth:`items` hands out the outermost dict's items piece by piece, if that is wanted; ``result``
    is what the pickle gives, without them."""

    def __init__(self, file: FileIO, hand_out: bool) -> None:
        self._file, self._hand_out = file, hand_out
        self._left = os.fstat(file.fileno()).st_size  # bytes of the file that are not in the buffer yet
        self._buffer, self._next, self._before = b"", 0, 0  # the next byte, and how many bytes precede the buffer
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}  # what later pieces may refer to
        self._recent: dict[int, Any] = {}  # what this piece has put there
        self._memo_size = 0
        self._arrays = _Arrays(file)
        self._piece_began = self._made = self._remembered = 0
        self._data, self._data_offset = b"", 0  # the last bytes read, and where they stand
        self._handed_out: list[tuple[Any, Any]] = []
        self._outermost: dict[Any, Any] | None = None
        self.result: Any = None

    def items(self) -> Iterator[list[tuple[Any, Any]]]:
        """The items of the outermost dict, which are no longer in it, as lists of a piece each."""
        while True:
            self._piece_began, self._made = self._before + self._next, 0
            self._run_piece()
            handed_out, self._handed_out = self._handed_out, []
            if not handed_out:
                break
            yield handed_out
            if self._before + self._next - self._remembered > _MAX_MEMORY:
                self._forget()
        if self._outermost is not None and self.result is not self._outermost:
            raise ValueError("its outermost dict is not what it gives")

    def _run_piece(self) -> None:
        """Run until items of the outermost dict are there, or to the end."""
        for _ in range(_MAX_OPCODES):
            if len(self._buffer) - self._next < _LONGEST_OPCODE:
                self._fill(_LONGEST_OPCODE)
                if self._next >= len(self._buffer):
                    raise ValueError("it ends too early")
            pushes, run = _OPCODES[self._buffer[self._next]]
            self._next += 1
            value = run(self)
            if pushes:
                self._stack.append(value)
            elif value is True:
                return
        raise ValueError("more objects in one piece than a data file has")

    def _forget(self) -> None:
        """Drop what no later piece refers to in a file that Python wrote: dicts, rows, their bytes and shapes."""
        for index, value in self._recent.items():
            if isinstance(value, PickledArray):
                self._arrays.add(index, value)
            elif isinstance(value, str | bytes):  # of bytes, Python shares those of no and of one letter
                if len(value) <= (_MAX_SMALL if isinstance(value, str) else 1):
                    self._memo[index] = value
            elif callable(value) or isinstance(value, _PickledDtype):
                self._memo[index] = value
        if len(self._memo) > _MAX_KEPT:
            raise ValueError("more names than a data file has")
        self._recent, self._remembered = {}, self._before + self._next

    # ---- bytes

    def _fill(self, count: int) -> None:
        """Read on until ``count`` bytes follow, or to the end of the file."""
        parts, have = [self._buffer[self._next :]], len(self._buffer) - self._next
        self._before += self._next
        self._next = 0
        if self._before - self._piece_began > _MAX_BYTES:
            raise ValueError("more bytes in one piece than a data file has")
        while have < count and self._left:
            read = self._file.read(min(max(_BLOCK, count - have), self._left))
            if not read:
                break
            self._left -= len(read)
            have += len(read)
            parts.append(read)
        self._buffer = b"".join(parts)

    def _take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        missing = count - (len(self._buffer) - self._next)
        if missing > 0:
            if missing > self._left or count > _MAX_BYTES:
                raise ValueError("it ends too early, or declares a size that no data file has")
            self._fill(count)
        first = self._next
        self._next = first + count
        if self._next > len(self._buffer):
            raise ValueError("it ends too early")
        return self._buffer[first : self._next]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        if len(self._buffer) - self._next < _MAX_LINE:
            self._fill(_MAX_LINE)
        end = self._buffer.find(b"\n", self._next, self._next + _MAX_LINE)
        if end < 0:
            raise ValueError("it ends too early, or has a line that is too long")
        return self._take(end + 1 - self._next)[:-1].decode()

    # ---- opcodes; what they do is Python's own (pickletools).

    def _unknown(self) -> None:
        opcode, offset = self._buffer[self._next - 1], self._before + self._next - 1
        raise ValueError(f"opcode 0x{opcode:02x} at byte {offset}, which a data file has no use for")

    def _protocol(self) -> None:
        if not 2 <= self._number(1) <= 5:
            raise ValueError("a protocol other than 2 to 5")

    def _stop(self) -> bool:
        if len(self._stack) != 1 or self._marks:
            raise ValueError("it ends amid an object")
        self.result = self._stack.pop()
        return True

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        """The topmost value, which no open mark may have below it."""
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise ValueError("a mark where a value is wanted")
        return self._stack[-1]

    def _integer(self, size: int) -> int:
        if size > _MAX_INTEGER:
            raise ValueError(f"an integer of {size} bytes")
        return int.from_bytes(self._take(size), "little", signed=True)

    def _text(self, width: int) -> str:
        return self._take(self._number(width)).decode("utf-8", "surrogatepass")

    def _bytes(self, width: int) -> bytes:
        size = self._number(width)
        self._data = self._take(size)
        self._data_offset = self._before + self._next - size
        return self._data

    def _pop_values(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError("a list's items without a list")
        target.extend(values)

    def _set(self, values: list[Any]) -> bool:
        target = self._top()
        if type(target) is not dict:
            raise ValueError("a dict's items without a dict")
        pairs = _pairs(values)
        if len(self._stack) > 1 or self._marks or not self._hand_out:
            target.update(pairs)
            return False
        if self._outermost is None:
            self._outermost = target
        elif self._outermost is not target:
            raise ValueError("a second outermost dict")
        self._handed_out = pairs
        return bool(self._handed_out)

    def _put(self, index: int) -> None:
        self._recent[index] = self._top()
        self._memo_size = max(self._memo_size, index + 1)

    def _get(self, index: int) -> Any:
        for memo in (self._recent, self._memo):
            if index in memo:
                return memo[index]
        if index >= self._memo_size:
            raise ValueError("a reference to nothing")
        return self._arrays.find(index)

    def _get_short(self) -> Any:
        """BINGET; where it begins an array of two dimensions, the whole array."""
        made = self._whole_array()
        return self._get(self._number(1)) if made is None else made

    def _whole_array(self) -> PickledArray | None:
        """Read an array written as _ARRAY_HEAD says; None, and nothing read, where none stands."""
        head = _ARRAY_HEAD.match(self._buffer, self._next - 1)
        if head is None:
            return None
        reconstruct, kind, put, rows, columns, described, width = head.groups()
        dtype = self._recent.get(described[0]) or self._memo.get(described[0])
        names = (self._recent.get(index[0]) or self._memo.get(index[0]) for index in (reconstruct, kind))
        if tuple(names) != (_empty_array, _no_call) or not isinstance(dtype, _PickledDtype):
            return None
        first = head.end() + (1 if width == b"C" else 4)
        size = int.from_bytes(self._buffer[head.end() : first], "little")
        tail = _ARRAY_TAIL.match(self._buffer, first + size)
        if tail is None or size <= 1 or rows[0] == 74 or columns[0] == 74:
            return None  # bytes of one letter or none are shared; sizes of four bytes (J) have a sign
        shape = int.from_bytes(rows[1:], "little"), int.from_bytes(columns[1:], "little")
        if size != shape[0] * shape[1] * dtype.dtype.itemsize:
            return None
        made = PickledArray(shape, dtype.dtype, self._buffer[first : first + size], self._before + first)
        index = self._memo_size + 2 if put == b"\x94" else int.from_bytes(put[1:], "little")
        self._recent[index] = made
        self._memo_size = max(self._memo_size, index + 4)  # of the six entries that an array makes, it is the third
        self._next = tail.end()
        return made

    def _permitted(self, module: str, name: str) -> Callable[..., Any]:
        permitted = _PERMITTED.get(module, {}).get(name)
        if permitted is None:
            asked = f"{module}.{name}"
            asked = asked if asked.isprintable() and len(asked) <= 100 else reprlib.repr(asked)
            raise ValueError(f"it asks for {asked}, which a data file has no use for")
        return permitted

    def _global(self) -> Callable[..., Any]:
        return self._permitted(self._line(), self._line())

    def _stack_global(self) -> Callable[..., Any]:
        module, name = self._pop_values(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        return self._permitted(module, name)

    def _reduce(self) -> Any:
        called, arguments = self._pop_values(2)
        if not callable(called) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        value = called(*arguments)
        self._charge(value)
        return value

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, PickledArray | _PickledDtype):
            raise ValueError("a state for what has none")
        target.take_state(state)
        self._charge(target)

    def _charge(self, made: Any) -> None:
        """Count bytes that need not stand in the file: one text can be encoded many times. Of an array, note where in
        the file its bytes stand."""
        if isinstance(made, PickledArray):
            self._made += len(made.data)
            made.offset = self._data_offset if made.data is self._data else None
        elif isinstance(made, bytes):
            self._made += len(made)
        if self._made > _MAX_BYTES:
            raise ValueError("more bytes in one piece than a data file has")


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    """Keys and values by turns. A key is a plain value: hashing tuples of tuples of ... would overflow C's stack, and
    of longer integers any number can have one hash."""
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, int | str | float | bytes | None) for key in keys):
        raise ValueError("a dict's key that is no number and no text")
    if not all(-(1 << 63) <= key < 1 << 63 for key in keys if isinstance(key, int)):
        raise ValueError("a dict's key that is no integer of 64 bits")
    return list(zip(keys, values[1::2], strict=True))


# Opcodes that push what the function returns, and others, whose function returns True when items are there or at the
# end. Frames say nothing of objects.
_PUSHING: dict[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda machine: None,
    b"\x88": lambda machine: True,
    b"\x89": lambda machine: False,
    b"K": lambda machine: machine._number(1),
    b"M": lambda machine: machine._number(2),
    b"J": lambda machine: machine._integer(4),
    b"\x8a": lambda machine: machine._integer(machine._number(1)),
    b"\x8b": lambda machine: machine._integer(machine._number(4)),
    b"G": lambda machine: struct.unpack(">d", machine._take(8))[0],
    b"X": lambda machine: machine._text(4),
    b"\x8c": lambda machine: machine._text(1),
    b"\x8d": lambda machine: machine._text(8),
    b"B": lambda machine: machine._bytes(4),
    b"C": lambda machine: machine._bytes(1),
    b"\x8e": lambda machine: machine._bytes(8),
    b"\x96": lambda machine: machine._bytes(8),
    b")": lambda machine: (),
    b"\x85": lambda machine: tuple(machine._pop_values(1)),
    b"\x86": lambda machine: tuple(machine._pop_values(2)),
    b"\x87": lambda machine: tuple(machine._pop_values(3)),
    b"t": lambda machine: tuple(machine._pop_mark()),
    b"]": lambda machine: [],
    b"}": lambda machine: {},
    b"h": _Machine._get_short,
    b"j": lambda machine: machine._get(machine._number(4)),
    b"c": _Machine._global,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._reduce,
}
_OTHER: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine._protocol,
    b"\x95": lambda machine: machine._take(8),
    b".": _Machine._stop,
    b"(": lambda machine: machine._marks.append(len(machine._stack)),
    b"a": lambda machine: machine._extend(machine._pop_values(1)),
    b"e": lambda machine: machine._extend(machine._pop_mark()),
    b"s": lambda machine: machine._set(machine._pop_values(2)),
    b"u": lambda machine: machine._set(machine._pop_mark()),
    b"q": lambda machine: machine._put(machine._number(1)),
    b"r": lambda machine: machine._put(machine._number(4)),
    b"\x94": lambda machine: machine._put(machine._memo_size),
    b"b": _Machine._build,
}
_OPCODES = [
    (code in _PUSHING, _PUSHING.get(code) or _OTHER.get(code, _Machine._unknown))
    for code in (bytes([number]) for number in range(256))
]


def load_pickle(path: Path) -> Any:
    """The object in ``path``, with numpy arrays as :class:`PickledArray` and numpy scalars as Python numbers.

    Raises InputError when the file is missing, damaged, or asks for anything but plain data.
    """
    with _opened(path) as file:
        machine = _Machine(file, hand_out=False)
        list(machine.items())  # none
        return machine.result


def iterate_pickle(path: Path) -> Iterator[list[tuple[Any, Any]]]:
    """The items of the dict in ``path``, as lists of some thousand; values as in :func:`load_pickle`.

    The file is read once, from its beginning; of what has been handed out nothing is kept but 20 bytes an array. In a
    file of more than 16 MiB, what a later item shares with an earlier one must be an array, written by protocol 3 or
    later; Python shares nothing else between items that were made apart. Raises InputError as load_pickle does, when it
    comes to the damage, and when the file holds no dict.
    """
    with _opened(path) as file:
        machine = _Machine(file, hand_out=True)
        yield from machine.items()
        if not isinstance(machine.result, dict):
            raise ValueError("not a dict keyed by request ids")
        if machine.result:  # filled before it was the outermost one: not as Python writes dicts of this size
            yield list(machine.result.items())


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The file; says in one sentence why it cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=regular) as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; see data/README.md for the files expected") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGED as error:
        reason = str(error)[:200] or type(error).__name__
        raise InputError(f"{path}: not a readable data pickle ({reason}); fetch the file again") from error
