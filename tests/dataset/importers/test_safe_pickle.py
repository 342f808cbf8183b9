"""The pickle reader: what a data file may hold comes through, everything else is refused and nothing is run."""

import collections
import copyreg
import importlib
import pickle
import pickletools
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deep_components.dataset.importers import safe_pickle
from deep_components.dataset.importers.safe_pickle import PickledArray, iterate_pickle, load_pickle
from deep_components.errors import InputError

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)

# A damaged string may draw a DeprecationWarning from Python's own unpickler; to users that is not an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def load(folder: Path, content: bytes) -> Any:
    path = folder / "forged.pkl"
    path.unlink(missing_ok=True)  # some file systems write a file that is overwritten to the disk at once
    path.write_bytes(content)
    return load_pickle(path)


def refused(folder: Path, content: bytes) -> str:
    """The message with which ``content`` is refused."""
    with pytest.raises(InputError) as caught:
        load(folder, content)
    assert str(folder / "forged.pkl") in str(caught.value)
    return str(caught.value)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a GiB more than now: what asks for absurd sizes fails here instead of taking the machine's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---------------------------------------------------------------------------------------------- what data files hold


def same(loaded: Any, original: Any) -> None:
    """Assert that ``loaded`` is ``original`` with PickledArrays for arrays and Python numbers for numpy scalars."""
    if isinstance(original, np.ndarray):
        assert type(loaded) is PickledArray and type(loaded.data) is bytes
        assert (loaded.shape, loaded.dtype) == (original.shape, original.dtype)
        assert loaded.data == original.tobytes()  # row-major, whatever the original's order
        array = loaded.to_numpy()
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, original, strict=True)
    elif isinstance(original, np.generic):
        assert type(loaded) is type(original.item()) and loaded == original.item()
    elif isinstance(original, dict):
        assert type(loaded) is dict and list(map(type, loaded)) == [
            type(key.item()) if isinstance(key, np.generic) else type(key) for key in original
        ]
        for (loaded_key, loaded_value), (key, value) in zip(loaded.items(), original.items(), strict=True):
            same(loaded_key, key)
            same(loaded_value, value)
    elif isinstance(original, list | tuple):
        assert type(loaded) is type(original)
        for loaded_value, value in zip(loaded, original, strict=True):
            same(loaded_value, value)
    else:
        assert type(loaded) is type(original) and loaded == original


def numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


ARRAYS = {
    dtype: numbers(dtype, 3, 8)
    for dtype in ("<i8", ">i8", "<i4", ">i4", "<i2", "i1", "u1", "<u8", "<f8", ">f8", "<f4", "<f2", "?")
} | {
    "fortran": np.asfortranarray(numbers("i8", 3, 8)),
    "transposed": numbers("i4", 8, 3).T,
    "every second": numbers("i8", 6, 16)[::2, ::2],
    "fortran, big-endian": np.asfortranarray(numbers(">i4", 5, 4, 3)),
    "one dimension": numbers("i8", 7),
    "no dimension": np.array(7),
    "large": numbers("i8", 300, 80),
}
EMPTY = {"no rows": np.zeros((0, 8), np.int64), "nothing": np.array([]), "fortran": np.zeros((0, 3), order="F")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path: Path, protocol: int, name: str) -> None:
    same(load(tmp_path, pickle.dumps({1: ARRAYS[name]}, protocol)), {1: ARRAYS[name]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", EMPTY)
def test_empty_arrays(tmp_path: Path, protocol: int, name: str) -> None:
    same(load(tmp_path, pickle.dumps({1: EMPTY[name]}, protocol)), {1: EMPTY[name]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_dict(tmp_path: Path, protocol: int) -> None:
    day = {
        12345678901234: {"rank_pos": numbers("i8", 10, 8), "rank_neg": numbers("i8", 3, 8)},
        np.int64(2): {"rank_pos": np.asfortranarray(numbers("f8", 2, 8))},
        3: {},
    }
    same(load(tmp_path, pickle.dumps(day, protocol)), day)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values(tmp_path: Path, protocol: int) -> None:
    values = {
        "ints": [0, 1, -1, 255, 256, 65536, -(1 << 40), 1 << 70],
        "floats": (0.5, float("inf"), -1e300),
        "text": ["", " category_level_two", "短视频\n", None, True, False],
        "scalars": [np.int64(-5), np.int32(7), np.uint8(255), np.float64(0.25), np.float32(1.5), np.bool_(True)],
        "big-endian scalar": np.array([258], ">i4")[0],
        "bytes": b"\x00\xff",
        "nested": {"list": [[], [()], {}]},
    }
    same(load(tmp_path, pickle.dumps(values, protocol)), values)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("factory", [dict, list, int, float, set, str, None])
def test_default_and_ordered_dicts_become_dicts(tmp_path: Path, protocol: int, factory: Any) -> None:
    groups = {"rank_pos": numbers("i8", 2, 8), "rank_neg": numbers("i4", 1, 7)}
    day = {1: collections.defaultdict(factory, groups), 2: collections.OrderedDict(groups)}
    same(load(tmp_path, pickle.dumps(day, protocol)), {1: groups, 2: groups})


def test_one_object_named_twice(tmp_path: Path) -> None:
    array = numbers("i8", 2, 8)
    loaded = load(tmp_path, pickle.dumps({1: array, 2: array}, 4))
    assert loaded[1] is loaded[2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_of_numpy_1_and_numpy_2(tmp_path: Path, protocol: int) -> None:
    day = {np.int64(1): numbers("i8", 3, 8), 2: np.float64(0.5)}
    written = pickle.dumps(day, protocol)
    assert b"numpy._core" in written
    same(load(tmp_path, written), day)
    if protocol < 4:  # names end at the line's end there; later protocols write their length before them
        old = written.replace(b"numpy._core", b"numpy.core")
    else:
        old = written.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = old.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
        old = old[:2] + old[11:]  # without the frame, whose length has changed
    assert b"numpy._core" not in old and b"numpy.core" in old
    same(load(tmp_path, old), day)


# ---------------------------------------------------------------------------------------------- programs


def text(value: str) -> bytes:
    """Push a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    """Push what a module calls ``attribute``."""
    return f"c{module}\n{attribute}\n".encode()


def stack_global(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def touch(canary: Path) -> bytes:
    return text(f"touch {canary}")


def code(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def evaluated(canary: Path) -> bytes:
    """Push eval and a tuple with its argument."""
    return name("builtins", "eval") + b"(" + code(canary) + b"t"


IMPORT_OS = call(name("builtins", "__import__"), text("os"))

# Each makes the file ``canary`` when Python's own unpickler reads it.
PROGRAMS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda canary: call(name("os", "system"), touch(canary)),
    "posix.system": lambda canary: call(name("posix", "system"), touch(canary)),
    "by protocol 4": lambda canary: b"\x80\x04" + call(stack_global("os", "system"), touch(canary)),
    "eval": lambda canary: call(name("builtins", "eval"), code(canary)),
    "Python 2's eval": lambda canary: call(name("__builtin__", "eval"), code(canary)),
    "exec": lambda canary: call(name("builtins", "exec"), code(canary)),
    "subprocess": lambda canary: call(
        name("subprocess", "check_output"), b"(" + text("touch") + text(str(canary)) + b"l"
    ),
    "getattr": lambda canary: call(call(name("builtins", "getattr"), IMPORT_OS, text("system")), touch(canary)),
    "dotted name": lambda canary: (
        b"\x80\x04" + call(stack_global("pathlib", "Path.touch"), call(name("pathlib", "Path"), text(str(canary))))
    ),
    "dotted name of a permitted one": lambda canary: (
        b"\x80\x04"
        + call(stack_global("numpy", "ndarray.tofile"), call(name("numpy", "zeros"), b"K\x01"), text(str(canary)))
    ),
    "numpy.save": lambda canary: call(name("numpy", "savetxt"), text(str(canary)), b"]"),
    "inner call": lambda canary: call(
        name("builtins", "list"), call(name("builtins", "map"), name("builtins", "eval"), b"(" + code(canary) + b"l")
    ),
    "in a dict of arrays": lambda canary: (
        pickle.dumps({1: ARRAYS["<i8"]}, 2)[:-1] + b"K\x02" + call(name("os", "system"), touch(canary)) + b"s"
    ),
    "in the factory of a defaultdict": lambda canary: call(
        name("collections", "defaultdict"),
        call(
            name("functools", "partial"), call(name("builtins", "eval"), code(canary)) + b"0" + name("builtins", "int")
        ),
    ),
    "in the shape of an array": lambda canary: call(
        name("numpy._core.multiarray", "_reconstruct"),
        name("numpy", "ndarray"),
        b"(" + call(name("os", "system"), touch(canary)) + b"t",
        text("b"),
    ),
    "dropped from the stack": lambda canary: b"N" + call(name("os", "system"), touch(canary)) + b"0",
    "INST": lambda canary: b"(" + touch(canary) + b"ios\nsystem\n",
    "OBJ": lambda canary: b"(" + name("os", "system") + touch(canary) + b"o",
    "NEWOBJ": lambda canary: (
        b"\x80\x02"
        + call(
            name("builtins", "list"),
            name("builtins", "map") + b"(" + name("builtins", "eval") + b"(" + code(canary) + b"l" + b"t\x81",
        )
    ),
    "NEWOBJ_EX": lambda canary: (
        b"\x80\x04"
        + call(
            name("builtins", "list"),
            name("builtins", "map") + b"(" + name("builtins", "eval") + b"(" + code(canary) + b"l" + b"t}\x92",
        )
    ),
    "__setstate__": lambda canary: call(
        call(name("functools", "partial"), name("builtins", "int")) + b"(" + evaluated(canary) + b"}}tb"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_refused_and_not_run(tmp_path: Path, program: str) -> None:
    canary = tmp_path / "canary"
    content = PROGRAMS[program](canary) + b"."
    pickle.loads(content)
    assert canary.exists(), "the program does not work, so its refusal says nothing"
    canary.unlink()
    assert "which a data file has no use for" in refused(tmp_path, content)
    assert not canary.exists()


def test_no_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    for module in ("forged_first", "forged_second"):
        (tmp_path / f"{module}.py").write_text(f"open({str(canary)!r}, 'w').close()\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert pickle.loads(name("forged_first", "value") + b".") == 1
    assert canary.exists()
    canary.unlink()
    assert "forged_second.value" in refused(tmp_path, name("forged_second", "value") + b".")
    assert not canary.exists() and "forged_second" not in sys.modules


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("builtins", "getattr"),
        ("builtins", "open"),
        ("builtins", "type"),
        ("builtins", "object"),
        ("builtins", "dict.fromkeys"),
        ("copyreg", "_reconstructor"),
        ("copy_reg", "_reconstructor"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("operator", "attrgetter"),
        ("collections", "namedtuple"),
        ("collections", "defaultdict.__init__"),
        ("numpy", "load"),
        ("numpy", "dtype.__reduce__"),
        ("numpy", "memmap"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct.__globals__"),
        ("numpy.f2py.diagnose", "run"),
        ("torch", "load"),
        ("deep_components.dataset.importers.safe_pickle", "PickledArray"),
        ("numpy", "ndarray "),
        ("", ""),
    ],
)
def test_a_name_outside_the_list_is_refused(tmp_path: Path, module: str, attribute: str) -> None:
    for content in (name(module, attribute), b"\x80\x04" + stack_global(module, attribute)):
        assert f"{module}.{attribute}" in refused(tmp_path, content + b".")


def test_extension_codes_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    opcodes = {b"\x82": b"\xf0", b"\x83": b"\xf0\x00", b"\x84": b"\xf0\x00\x00\x00"}
    contents = [call(b"\x80\x02" + opcode + number, touch(canary)) + b"." for opcode, number in opcodes.items()]
    for content in contents:
        refused(tmp_path, content)
    copyreg.add_extension("os", "system", 0xF0)
    try:
        for content in contents:
            assert "which a data file has no use for" in refused(tmp_path, content)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"Pcanary\n.", text("canary") + b"Q.", b"\x80\x05\x97.", b"\x80\x05\x97\x98."])
def test_what_lies_outside_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Persistent ids and out-of-band buffers."""
    refused(tmp_path, content)


# ------------------------------------------------------------------------------ permitted names put to another use

NDARRAY, DTYPE = name("numpy", "ndarray"), name("numpy", "dtype")
RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")


def integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def listed(*items: bytes) -> bytes:
    """Push a list."""
    return b"](" + b"".join(items) + b"e"


TRUE, FALSE = b"\x88", b"\x89"


def pack(*items: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(items) + b"t"


def dtype(type_string: bytes, order: bytes = text("<"), *more: bytes) -> bytes:
    state = pack(integer(3), order, *(more or (b"N", b"N", b"N", integer(-1), integer(-1), integer(0))))
    return call(DTYPE, type_string, FALSE, TRUE) + state + b"b"


INT64 = dtype(text("i8"))


def raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def array(shape: bytes, described: bytes, data: bytes, fortran: bytes = FALSE) -> bytes:
    empty = call(RECONSTRUCT, NDARRAY, pack(integer(0)), raw(b"b"))
    return b"\x80\x03" + empty + pack(integer(1), shape, described, fortran, data) + b"b"


def test_the_forger_s_tools_make_a_sound_array(tmp_path: Path) -> None:
    content = array(pack(integer(2), integer(1)), INT64, raw(struct.pack("<2q", 5, -6)))
    same(load(tmp_path, content + b"."), np.array([[5], [-6]]))
    assert pickle.loads(content + b".").tolist() == [[5], [-6]]


EIGHT = raw(bytes(8))
ONE = pack(integer(1))
FORGED = {
    "objects": array(ONE, dtype(text("O8"), text("|")), EIGHT),
    "objects, by a list": array(ONE, dtype(text("O8"), text("|")), listed(b"N")),
    "text": array(ONE, dtype(text("U2")), EIGHT),
    "bytes": array(ONE, dtype(text("S8"), text("|")), EIGHT),
    "dates": array(ONE, dtype(text("M8[ns]")), EIGHT),
    "complex": array(ONE, dtype(text("c8")), EIGHT),
    "void": array(ONE, dtype(text("V8"), text("|")), EIGHT),
    "fields": array(ONE, dtype(text("i4,i4")), EIGHT),
    "fields, one of them objects": array(ONE, dtype(text("i8,O8")), raw(bytes(16))),
    "a dtype of an array": array(ONE, dtype(text("(2,)i4")), EIGHT),
    "a type string that is no Python": array(ONE, dtype(text("(1,,)i8")), EIGHT),
    "an unknown type": array(ONE, dtype(text("i7")), EIGHT),
    "a numbered type": array(ONE, dtype(integer(7)), EIGHT),
    "a type that is a list of fields": array(ONE, dtype(listed(pack(text("a"), text("O8")))), EIGHT),
    "an unknown byte order": array(ONE, dtype(text("i8"), text("=")), EIGHT),
    "a byte order that is a number": array(ONE, dtype(text("i8"), integer(1)), EIGHT),
    "an element type that is no dtype": array(ONE, text("i8"), EIGHT),
    "an element type that is the name": array(ONE, DTYPE, EIGHT),
    "too few bytes": array(pack(integer(2)), INT64, EIGHT),
    "too many bytes": array(pack(integer(1)), INT64, raw(bytes(9))),
    "far too few bytes": array(pack(integer(1 << 40), integer(1 << 40)), INT64, EIGHT),
    "a size beyond 64 bits": array(pack(integer(1 << 70)), INT64, EIGHT),
    "sizes whose product is 1 in 64 bits": array(pack(integer(3), integer(0xAAAAAAAAAAAAAAAB)), INT64, EIGHT),
    "a negative size": array(pack(integer(-1), integer(-1)), INT64, EIGHT),
    "a size that is a truth value": array(pack(TRUE), INT64, EIGHT),
    "a size that is no integer": array(pack(b"G" + struct.pack(">d", 1.0)), INT64, EIGHT),
    "a shape that is a number": array(integer(1), INT64, EIGHT),
    "a shape that is a list": array(listed(integer(1)), INT64, EIGHT),
    "data that are text": array(ONE, INT64, text("12345678")),
    "data that are a list": array(ONE, INT64, listed(integer(1) * 8)),
    "data that are an array": array(ONE, INT64, array(pack(integer(8)), dtype(text("i1"), text("|")), EIGHT)[2:]),
    "too many dimensions, in Fortran order": array(pack(*[integer(1)] * 100), INT64, EIGHT, TRUE),
    "a short state": call(RECONSTRUCT, NDARRAY, pack(integer(0)), raw(b"b")) + pack(integer(1)) + b"b",
    "a state that is a dict": call(RECONSTRUCT) + b"}" + text("data") + EIGHT + b"sb",
    "attributes by a state of slots": call(RECONSTRUCT) + pack(b"N", b"}" + text("data") + EIGHT + b"s") + b"b",
    "a scalar of objects": call(name("numpy.core.multiarray", "scalar"), dtype(text("O8"), text("|")), EIGHT),
    "a scalar with too few bytes": call(name("numpy.core.multiarray", "scalar"), INT64, raw(b"1234")),
    "a scalar without bytes": call(name("numpy.core.multiarray", "scalar"), INT64),
    "a called array type": call(NDARRAY, pack(integer(1 << 40))),
    "a new object of the array type": b"\x80\x02" + NDARRAY + pack(pack(integer(1 << 40))) + b"\x81",
    "a called list": call(name("builtins", "list"), b"]"),
    "a changed name": name("_codecs", "encode") + b"}" + text("_call") + NDARRAY + b"sb",
    "a changed name, by slots": name("_codecs", "encode") + pack(b"N", b"}" + text("_call") + NDARRAY + b"s") + b"b",
    "a changed name, by its class": name("_codecs", "encode") + b"}" + text("__class__") + NDARRAY + b"sb",
    "a name that is a list": name("_codecs", "encode") + b"(" + integer(1) + integer(2) + b"e",
    "a name that is a dict": name("_codecs", "encode") + integer(1) + integer(2) + b"s",
    "an unknown encoding": call(name("_codecs", "encode"), text("a"), text("rot13")),
    "text beyond the encoding": call(name("_codecs", "encode"), text("\u4e2d"), text("latin1")),
    "bytes that are encoded": call(name("_codecs", "encode"), EIGHT, text("latin1")),
    "a state for a dict": b"}}" + text("a") + integer(1) + b"sb",
    "a key that cannot be one": b"}]" + integer(1) + b"s",
    "a called value": call(integer(1)),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_value_is_refused(tmp_path: Path, forgery: str) -> None:
    before = dict(safe_pickle._PERMITTED)
    refused(tmp_path, FORGED[forgery] + b".")
    assert before == safe_pickle._PERMITTED
    day = {1: ARRAYS["<i8"], 2: b"\xff"}
    same(load(tmp_path, pickle.dumps(day, 2)), day)  # the names still mean the same


def test_fields_in_the_state_of_a_dtype_are_not_taken(tmp_path: Path) -> None:
    fields = pack(text("a")), b"}" + text("a") + pack(dtype(text("i4")), integer(0)) + b"s"
    described = dtype(text("i8"), text("<"), b"N", *fields, integer(8), integer(1), integer(27))
    loaded = load(tmp_path, array(ONE, described, raw(struct.pack("<q", 7))) + b".")
    same(loaded, np.array([7]))


def test_an_array_without_its_state_is_no_array(tmp_path: Path) -> None:
    content = call(RECONSTRUCT, NDARRAY, pack(integer(0)), raw(b"b"))
    try:
        loaded = load(tmp_path, b"\x80\x03" + content + b".")
    except InputError:
        return
    assert loaded.to_numpy().shape == loaded.shape


HUGE = {
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60),
    "BINBYTES8, possible": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40),
    "BINBYTES": b"\x80\x03B" + struct.pack("<I", 0xFFFFFFFF),
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40),
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40),
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF),
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40),
    "FRAME beyond 63 bits": b"\x80\x04\x95" + struct.pack("<Q", (1 << 64) - 1),
    "LONG_BINPUT": b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFF),
    "a protocol's number": b"\x80\xff",
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("opcode", HUGE)
def test_a_huge_declared_size_is_refused(tmp_path: Path, opcode: str) -> None:
    refused(tmp_path, HUGE[opcode] + b"1234.")


# ---------------------------------------------------------------------------------------------- damage

SMALL = {7: {"rank_pos": np.arange(3, dtype=np.int32), "n": np.float64(0.5)}, 8: [b"ab", "c", 1.5]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cut_file_is_refused(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(SMALL, protocol)
    same(load(tmp_path, content), SMALL)
    for length in range(len(content)):
        refused(tmp_path, content[:length])


def loads_or_refuses(folder: Path, content: bytes) -> None:
    """Anything but a value or an InputError comes through and fails the test."""
    try:
        load(folder, content)
    except InputError:
        return


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_flipped_bit_gives_a_value_or_is_refused(tmp_path: Path, protocol: int) -> None:
    content = bytearray(pickle.dumps(SMALL, protocol))
    for number in range(len(content)):
        for bit in range(8):
            content[number] ^= 1 << bit
            loads_or_refuses(tmp_path, bytes(content))
            content[number] ^= 1 << bit


OPCODES = sorted(opcode.code.encode("latin1") for opcode in pickletools.opcodes)


@pytest.mark.usefixtures("little_memory")
@given(st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=5)), max_size=30).map(b"".join))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_opcodes_give_a_value_or_are_refused(tmp_path: Path, content: bytes) -> None:
    loads_or_refuses(tmp_path, content)


@pytest.mark.parametrize("protocol", [0, 1])
def test_older_protocols_are_refused(tmp_path: Path, protocol: int) -> None:
    """Python 3 has never written them unasked."""
    refused(tmp_path, pickle.dumps(SMALL, protocol))


@pytest.mark.parametrize("content", [b"", b".", b"not a pickle", b"\x80\x63N.", bytes(100)])
def test_what_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}/day.pkl: no such file; see data/README.md"):
        load_pickle(tmp_path / "day.pkl")
    with pytest.raises(InputError, match=rf"{tmp_path}: cannot be read"):
        load_pickle(tmp_path)


# ---------------------------------------------------------------------------------------------- bombs

DEEP = 1 << 17
BOMBS: dict[str, Callable[[], bytes]] = {  # made when needed: most are of some MiB
    "a key of nested tuples": lambda: b"})" + b"\x85" * DEEP + b"Ns",
    "a key that is a tuple": lambda: b"})Ns",
    "an array in a shape of nested tuples": lambda: array(b")" + b"\x85" * DEEP, INT64, EIGHT),
    "nested tuples without end": lambda: b")" + b"\x85" * DEEP,
    "marks without end": lambda: b"(" * DEEP,
    "lists without end": lambda: b"]" * DEEP,
    "numbers without end": lambda: b"](" + b"K\x01" * DEEP + b"e",
    "a memo without end": lambda: b"N" + b"\x94" * DEEP,
    "a text encoded many times": lambda: (
        text("x" * (1 << 20)) + b"q\x00" + name("_codecs", "encode") + b"q\x01" + text("latin1") + b"q\x02]"
        + b"h\x01h\x00h\x02\x86Ra" * 2000
    ),
    "an array turned many times": lambda: (
        array(pack(integer(1 << 10), integer(1 << 10)), dtype(text("i1"), text("|")), raw(bytes(1 << 20)), TRUE)
        [:-1] + b"q\x000]" + (call(RECONSTRUCT) + b"h\x00ba") * 2000
    ),
    "an integer of 200 bytes": lambda: b"\x80\x02\x8a\xc8" + bytes(200),
    "keys of one hash": lambda: b"}(" + b"".join(integer(n * ((1 << 61) - 1)) + b"N" for n in range(1 << 12)) + b"u",
    "a shape of 5,000 sizes": lambda: array(pack(*[integer(1)] * 5000), INT64, EIGHT),
    "a line without end": lambda: b"c" + b"x" * (1 << 25),
}  # fmt: skip


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    monkeypatch.setattr(safe_pickle, "_MAX_BYTES", 1 << 26)
    monkeypatch.setattr(safe_pickle, "_MAX_MEMORY", 0)
    monkeypatch.setattr(safe_pickle, "_MAX_OPCODES", DEEP)
    assert len(refused(tmp_path, BOMBS[bomb]() + b".")) < 1000


@pytest.mark.usefixtures("little_memory")
def test_a_large_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    assert load(tmp_path, b"Nr\xff\xff\xff\xff.") is None  # Python's own unpickler allocates 64 GiB for this


def test_what_nests_deeply_is_freed(tmp_path: Path) -> None:
    """Lists, tuples and dicts in one another, as deeply as the limit of a piece lets them be."""
    for content in (b"]" * 200_000 + b"a" * 199_999, b")" + b"\x85" * 200_000, b"(" * 200_000 + b"t" * 200_000):
        deep = load(tmp_path, content + b".")
        assert len(deep) <= 1
        del deep


@pytest.mark.parametrize(
    "asked", ["os\nsystem", "o" * 5000, "\x1b[31mred", "os\u2028system"], ids=["line", "long", "escape", "separator"]
)
def test_a_forged_name_is_quoted_and_cut(tmp_path: Path, asked: str) -> None:
    message = refused(tmp_path, b"\x80\x04" + stack_global(asked, "x") + b".")
    assert message.isprintable() and len(message) < 400


# ---------------------------------------------------------------------------------------------- piece by piece


def pieces(path: Path) -> Iterator[tuple[Any, Any]]:
    for piece in iterate_pickle(path):
        yield from piece


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("block", [16, 1000, 1 << 20])
def test_items_come_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, block: int
) -> None:
    """Blocks end anywhere; nothing is kept of earlier pieces but what later ones may name."""
    monkeypatch.setattr(safe_pickle, "_BLOCK", block)
    monkeypatch.setattr(safe_pickle, "_MAX_MEMORY", 0)
    rng = np.random.default_rng(protocol)
    forms = [np.zeros((0, 8), np.int64), np.array([]), np.ones((1, 1), np.int8), np.arange(300).reshape(3, 100)]
    day: dict[int, Any] = {}
    for request in rng.choice(1 << 40, 2300, replace=False).tolist():
        form = forms[request % 4]  # in later protocols one array of many requests
        rows = [rng.integers(0, 9, (int(rng.integers(1, 4)), 8)), form if protocol > 2 else form.copy()]
        day[request] = {"rank_pos": rows[0], "rank_neg": rows[1], "twice": rows[0]} if request % 3 else rows[0]
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps(day, protocol))
    same(dict(pieces(path)), day)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_array_of_an_earlier_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.setattr(safe_pickle, "_MAX_MEMORY", 0)
    shared = np.arange(80).reshape(10, 8)
    day = {request: shared if request % 7 == 0 else np.full((10, 8), request) for request in range(5000)}
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps(day, protocol))
    same(dict(pieces(path)), day)


def test_another_object_of_an_earlier_piece_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_pickle, "_MAX_MEMORY", 0)
    shared: list[int] = []
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps({0: shared} | dict.fromkeys(range(1, 2000), 5) | {2000: shared}, 4))
    with pytest.raises(InputError, match="an object of one request named in another"):
        list(iterate_pickle(path))


def test_names_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_pickle, "_MAX_MEMORY", 0)
    monkeypatch.setattr(safe_pickle, "_MAX_KEPT", 100)
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps({n: f"name {n}" for n in range(5000)}, 4))
    with pytest.raises(InputError, match="more names than a data file has"):
        list(iterate_pickle(path))


@pytest.mark.parametrize("content", [[1], 5, ({1: 2}, 3), [{1: 2}]])
def test_what_is_no_dict_has_no_items(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(InputError, match=r"not a dict|not what it gives"):
        list(iterate_pickle(path))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_values_against_python_s_unpickler(tmp_path: Path, protocol: int) -> None:
    plain = st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 100), 1 << 100) | st.floats(allow_nan=False) | st.text()
        | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner)
        | st.dictionaries(st.integers(-1000, 1 << 62) | st.text(), inner),
        max_leaves=20,
    )  # fmt: skip

    @given(plain)
    @settings(max_examples=25, deadline=None, derandomize=True)
    def check(value: Any) -> None:
        same(load(tmp_path, pickle.dumps(value, protocol)), value)

    check()
