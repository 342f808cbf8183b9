"""Compiled loops for CPUs: DIN's attention, embedding look-ups, and the rows of deferred Adam.

kernels.c is compiled once per machine and number type by the C compiler ($CC, else gcc, cc or clang) and kept, with its
SHA-256, in the user's cache directory, if nobody else can write there. Without a compiler :func:`load_kernels` gives
None, and models and optimizer use PyTorch's own operators: the same formulas, to rounding, in several times the time.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")

_REAL = {torch.float32: "float", torch.float64: "double"}
_C_TYPE = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas", "-fPIC")
# The arguments of kernels.c's functions: i int64_t, p a pointer, r REAL.
_ARGUMENTS = {
    "attention_forward": "iiiippppprp",
    "attention_backward": "iiiipppppppp",
    "bias_relu": "iiiipp",
    "relu_backward": "iiiipppp",
    "gather": "iip",
    "scatter_add": "iip",
    "catch_up": "iipppppiipppprrp",
    "adam_rows": "iipppppiprrrrrr",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE_ALLOCATION = 1 << 30
_RETURNED_FROM = 1 << 23
_ROWS_PER_SUM = 512  # rows whose gradients are summed in one piece, whatever the number of threads
_SECONDS_TO_COMPILE = 120
_DIGEST = hashlib.sha256().digest_size  # bytes after a library, which the loader does not look at

logger = logging.getLogger(__name__)


class TableUse(NamedTuple):
    """A table [rows, d], ids [n] int64 (strided) or lists of them [n, G] (contiguous), values [n, d] with contiguous
    rows, and the id that is padding."""

    table: Tensor
    ids: Tensor
    values: Tensor
    padding: int


class _NoCompilerError(OSError):
    pass


class _Use(ctypes.Structure):
    """The struct ``use`` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "length", "rows", "id_stride", "row_stride", "padding")),
        *((name, ctypes.c_void_p) for name in ("ids", "table", "values")),
    )


class Kernels:
    """The compiled functions for one number type. Tensors are contiguous CPU tensors of that type unless said.

    Work is cut into one piece per thread of PyTorch; a result does not depend on their number.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        openmp = _openmp()
        if openmp is not None:  # what the library's calls to OpenMP are bound to
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self.dtype = dtype
        types = {"i": ctypes.c_int64, "p": ctypes.c_void_p, "r": _C_TYPE[dtype]}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_int64, [types[kind] for kind in arguments]

    def attention_forward(
        self, history: Tensor, items: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, padding: float
    ) -> Tensor:
        """logits[b, n, l] = bias + sum_h weight[h] ReLU(history[b, l, h] + items[b, n, h]); ``padding`` where not mask.

        Shapes: history [B, L, H], items [B, N, H], weight [H], bias [1], mask [B, L] bool; logits [B, N, L].
        """
        (batch, length, units), num_items = history.shape, items.shape[1]
        self._expect((history, items, weight, bias), (history.shape, (batch, num_items, units), (units,), (1,)))
        _expect((mask,), ((batch, length),), torch.bool)
        logits = history.new_empty(batch, num_items, length)
        sizes = (batch, num_items, length, units)
        self._run("attention_forward", *sizes, history, items, weight, bias, mask, padding, logits)
        return logits

    def attention_backward(
        self, history: Tensor, items: Tensor, weight: Tensor, mask: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient [B, N, L] of :meth:`attention_forward`'s logits those of history, items and weight."""
        (batch, length, units), num_items = history.shape, items.shape[1]
        shapes = (history.shape, (batch, num_items, units), (units,), (batch, num_items, length))
        self._expect((history, items, weight, grad), shapes)
        _expect((mask,), ((batch, length),), torch.bool)
        grads = torch.empty_like(history), torch.empty_like(items), history.new_empty(batch, units)
        sizes = (batch, num_items, length, units)
        self._run("attention_backward", *sizes, history, items, weight, mask, grad, *grads)
        return grads[0], grads[1], grads[2].sum(dim=0)

    def bias_relu(self, x: Tensor, bias: Tensor) -> None:
        """x = ReLU(x + bias) in place; x is [M, H], bias [G, H]: the g-th M / G rows get bias g."""
        rows = len(x)
        self._expect((x, bias), (x.shape, (len(bias), x.shape[1])))
        if rows % max(len(bias), 1):
            raise ValueError(f"{rows} rows cannot be cut into {len(bias)} groups")
        group = rows // len(bias) if len(bias) > 1 else _ROWS_PER_SUM
        if len(bias) == 1:
            bias = bias.expand(-(-rows // group), -1).contiguous()
        self._run("bias_relu", len(bias), rows, group, x.shape[1], bias, x)

    def relu_backward(self, out: Tensor, grad: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The gradients before ReLU(x + bias) = out: of x [M, H], and of bias [G, H] with G = ``groups``."""
        rows = len(out)
        self._expect((out, grad), (out.shape, out.shape))
        group = rows // groups if groups > 1 else _ROWS_PER_SUM
        passed, sums = torch.empty_like(out), out.new_empty(-(-rows // group), out.shape[1])
        self._run("relu_backward", len(sums), rows, group, out.shape[1], out, grad, passed, sums)
        return passed, sums if groups > 1 else sums.sum(dim=0, keepdim=True)

    def gather(self, uses: Sequence[TableUse]) -> None:
        """values[i] = table[ids[i]] for every use; for a list of ids the mean of its rows, padding left out, and 0
        where it holds nothing else. IndexError when an id is not a row of its table."""
        if self._call("gather", *_uses_as_c(uses)):
            raise IndexError("an id is not one of its table's rows")

    def scatter_add(self, uses: Sequence[TableUse]) -> None:
        """What :meth:`gather` passes back: table[ids[i]] += values[i] for every use, but for ids that are its padding;
        for a list, values[i] divided by the number of its ids that are none. Uses of one table stand together and are
        added in their order. The ids must be rows, which :meth:`gather` has checked."""
        self._call("scatter_add", *_uses_as_c(uses))

    def catch_up(
        self, rows: Tensor, table: Tensor, moments: tuple[Tensor, Tensor], last: Tensor, now: int,
        rule: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor], lr: float, eps: float,
    ) -> Tensor:  # fmt: skip
        """Bring distinct ``rows`` [U] int64 of a table to step ``now`` (tables/deferred_adam.py); returns them [U, d].

        ``table`` and Adam's two ``moments`` [rows, d] and the steps ``last`` [rows] int32 that the rows were last
        brought to are changed in place. ``rule``: weights and nodes of the drift rules of steps 0 .. now, [steps,
        nodes] each. ``kept``: what k = 0 .. now steps leave of the two moments, [now + 1] each.
        """
        out = table.new_empty(len(rows), table.shape[1])
        self._expect((table, *moments, *rule), (*[table.shape] * 3, *[rule[0].shape] * 2))
        self._expect(kept, [(len(kept[0]),)] * 2)
        _expect_rows(rows, last, len(table))
        if min(len(rule[0]), len(kept[0])) <= now:
            raise ValueError(f"rules of {len(rule[0])} steps do not reach step {now}")
        nodes = rule[0].shape[1]
        arrays = (rows, table, *moments, last)
        self._run("catch_up", *out.shape, *arrays, now, nodes, *rule, *kept, lr, eps, out)
        return out

    def adam_rows(
        self, rows: Tensor, table: Tensor, moments: tuple[Tensor, Tensor], last: Tensor, now: int,
        grad: Tensor, lr: float, betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        """Adam's step number ``now`` of distinct ``rows`` with gradients [U, d]; else as in :meth:`catch_up`."""
        self._expect((table, *moments, grad), (*[table.shape] * 3, (len(rows), table.shape[1])))
        _expect_rows(rows, last, len(table))
        b1, b2 = betas
        numbers = (1 - b1, b2, 1 - b2, (1 - b2**now) ** 0.5, lr / (1 - b1**now), eps)
        self._run("adam_rows", *grad.shape, rows, table, *moments, last, now, grad, *numbers)

    def _expect(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
        _expect(tensors, shapes, self.dtype)

    def _call(self, name: str, *arguments: object) -> int:
        values = (value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
        return int(getattr(self._library, name)(*values))

    def _run(self, name: str, *arguments: object) -> None:
        if self._call(name, *arguments):
            raise MemoryError("the attention's working memory cannot be allocated")


def _expect(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    """ValueError unless all are contiguous, on the CPU, and of these shapes and this type: the loops trust it."""
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} where the kernel takes {dtype} {tuple(shape)}")
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("the kernels take contiguous tensors on the CPU")


def _expect_rows(rows: Tensor, last: Tensor, table_rows: int) -> None:
    """The same for distinct rows [U] int64 of a table, and the step [rows] int32 that each row was last brought to."""
    _expect((rows,), ((len(rows),),), torch.int64)
    _expect((last,), ((table_rows,),), torch.int32)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < table_rows:
        raise IndexError("a row is not one of the table's")


def _uses_as_c(uses: Sequence[TableUse]) -> tuple[int, int, object]:
    """Number of uses, d, and the uses."""
    dim = uses[0].table.shape[1]
    for use in uses:
        lists = use.ids.dim() == 2 and use.ids.is_contiguous()
        if use.ids.dtype != torch.int64 or not (lists or use.ids.dim() == 1) or use.values.shape != (len(use.ids), dim):
            raise ValueError(f"ids {tuple(use.ids.shape)} do not belong to values {tuple(use.values.shape)}")
        if use.table.shape[1] != dim or not use.table.is_contiguous() or use.values.stride(1) != 1:
            raise ValueError("tables have rows of one width, and the rows of values are contiguous")
    array = (_Use * len(uses))(*(
        _Use(len(use.ids), (*use.ids.shape, 1)[1], len(use.table), use.ids.stride(0), use.values.stride(0), use.padding,
             use.ids.data_ptr(), use.table.data_ptr(), use.values.data_ptr())
        for use in uses
    ))  # fmt: skip
    return len(uses), dim, array


def keep_freed_memory(pairs: int) -> None:
    """Have glibc reuse the memory of large tensors instead of giving it back to the system after each use: a training
    step would spend a tenth of its time on fetching it again. Where lists are so long that a batch has more than 2^24
    ``pairs`` of items that of 8 MB and more is given back: tensors of many sizes leave gaps that take several times the
    memory. Does nothing with another C library."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_ALLOCATION if pairs <= 1 << 24 else _RETURNED_FROM)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGE_ALLOCATION)


@cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for a number type, compiled first when they are not there; None, and why in the log, without them."""
    try:
        return Kernels(_compiled(_REAL[dtype]), dtype)
    except (OSError, KeyError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip() or type(error).__name__
        logger.warning("the compiled kernels are not used (%s): PyTorch's operators do the same, several times slower; "
                       "%s, or silence this with --no-compile", reason.splitlines()[-1], _advice(error))  # fmt: skip
        return None


def _advice(error: Exception) -> str:
    if isinstance(error, _NoCompilerError):
        return "install gcc"
    if isinstance(error, subprocess.SubprocessError):
        return "name another compiler in CC"
    return "name a folder of your own, whose files may be executed, in XDG_CACHE_HOME"


def use_kernels(users: Iterable[object], kernels: Kernels | None) -> None:
    """Have models and embedding stores compute with the kernels, or with None by PyTorch's operators: whatever has an
    attribute ``kernels`` for them. All must be on a CPU."""
    for user in users:
        if hasattr(user, "kernels"):
            user.kernels = kernels


def _compiled(real: str) -> Path:
    """The shared library for a number type, whole and written by nobody else. OSError or SubprocessError when it cannot
    be made."""
    names = filter(None, (os.environ.get("CC"), "gcc", "cc", "clang"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise _NoCompilerError("there is no C compiler")
    compiler = str(Path(compiler).absolute())  # it is started in another folder
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    flags = (*_FLAGS, "-fopenmp") if _openmp() is not None else _FLAGS
    identity = [SOURCE.read_text(), *flags, real, version, platform.machine(), _processor()]
    name = f"kernels-{real}-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"
    library = _cache_folder() / name
    if not _intact(library):
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / name
            # OpenMP is not linked: its names are bound to PyTorch's own copy, so that there is one pool of threads. Two
            # would fight for the cores.
            compile_it = [compiler, *flags, f"-DREAL={real}", "-c", str(SOURCE.absolute()), "-o", "kernels.o"]
            for command in (compile_it, [compiler, "-shared", "kernels.o", "-o", name, "-lm"]):
                subprocess.run(command, cwd=folder, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True,
                               check=True, timeout=_SECONDS_TO_COMPILE)  # fmt: skip
            content = built.read_bytes()
            built.write_bytes(content + hashlib.sha256(content).digest())
            built.chmod(0o700)
            built.replace(library)
    return library


def _intact(library: Path) -> bool:
    """Whether the library is there as it was compiled, by the SHA-256 at its end, and nobody else can change it."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return _only_ours(library) and hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _openmp() -> Path | None:
    """The GNU OpenMP library that PyTorch came with and uses; without it the kernels have one thread."""
    package = Path(torch.__file__).parent
    found = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    return found[0] if len(found) == 1 else None


def _cache_folder() -> Path:
    """A folder that only this user writes to, and can replace: what lies in it is executed."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if home.is_absolute():  # else it would depend on the folder one stands in
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = (home / "lcron-kernels").resolve()
            folder.mkdir(exist_ok=True, mode=0o700)
            if not _only_ours(folder):
                logger.warning(
                    "%s: other users can change it or a folder above it, so the compiled kernels are not "
                    "kept; take that right from them, or name another folder in XDG_CACHE_HOME",
                    folder,
                )
            elif os.access(folder, os.W_OK):
                return folder
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        pass
    return _private_folder()


@cache
def _private_folder() -> Path:
    """For this process only, where there is no cache directory."""
    folder = Path(tempfile.mkdtemp(prefix="lcron-kernels-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not _only_ours(folder):
        raise OSError(f"other users can change a folder above {folder}")
    return folder


def _only_ours(path: Path) -> bool:
    """Whether no other user, but root, can change a file or folder without symbolic links, or replace it by changing a
    folder above it."""
    this, *above = [part.lstat() for part in (path, *path.parents)]
    owners = {0, os.getuid()}
    writable = [this.st_mode, *(folder.st_mode for folder in above if not folder.st_mode & stat.S_ISVTX)]
    return all(part.st_uid in owners for part in (this, *above)) and not any(mode & 0o022 for mode in writable)


def _processor() -> str:
    """What -march=native depends on: one home directory may serve different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
