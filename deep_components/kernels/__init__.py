"""Compiled loops for CPUs: DIN's attention, embedding look-ups, and the rows of deferred Adam.

kernels.c is compiled once per machine and number type by the C compiler ($CC, else gcc, cc or clang) and kept in the
user's cache directory. Without a compiler :func:`load_kernels` gives None, and models and optimizer use PyTorch's own
operators: the same formulas, to rounding, in several times the time.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

SOURCE = Path(__file__).with_name("kernels.c")

_REAL = {torch.float32: "float", torch.float64: "double"}
_C_TYPE = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_FUNCTIONS = (
    *("attention_forward", "attention_backward", "bias_relu", "relu_backward"),
    *("gather", "scatter_add", "catch_up", "adam_rows"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE_ALLOCATION = 1 << 30
_ROWS_PER_SUM = 512  # rows whose gradients are summed in one piece, whatever the number of threads
_SECONDS_TO_COMPILE = 120

logger = logging.getLogger(__name__)


class Kernels:
    """The compiled functions for one number type. Tensors are contiguous CPU tensors of that type unless said.

    Work is cut into one piece per thread of PyTorch; a result does not depend on their number.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        self._library = ctypes.CDLL(str(library))
        self.dtype, self._real = dtype, _C_TYPE[dtype]
        for name in _FUNCTIONS:
            getattr(self._library, name).restype = ctypes.c_int64

    def attention_forward(
        self, history: Tensor, items: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, padding: float
    ) -> Tensor:
        """logits[b, n, l] = bias + sum_h weight[h] ReLU(history[b, l, h] + items[b, n, h]); ``padding`` where not mask.

        Args:
            history: [B, L, H].
            items: [B, N, H].
            weight: [H].
            bias: [1].
            mask: [B, L] bool.
            padding: the logit of padding.

        Returns:
            [B, N, L].
        """
        (batch, length, units), num_items = history.shape, items.shape[1]
        logits = history.new_empty(batch, num_items, length)
        sizes = tuple(map(ctypes.c_int64, (num_items, length, units)))
        arrays = (_address(history), _address(items), _address(weight), _address(bias), _address(mask))
        self._split(batch, self._library.attention_forward, *sizes, *arrays, self._real(padding), _address(logits))
        return logits

    def attention_backward(
        self, history: Tensor, items: Tensor, weight: Tensor, mask: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient [B, N, L] of :meth:`attention_forward`'s logits those of history, items and weight."""
        (batch, length, units), num_items = history.shape, items.shape[1]
        grads = torch.empty_like(history), torch.empty_like(items), history.new_empty(batch, units)
        sizes = tuple(map(ctypes.c_int64, (num_items, length, units)))
        arrays = tuple(map(_address, (history, items, weight, mask, grad, *grads)))
        self._split(batch, self._library.attention_backward, *sizes, *arrays)
        return grads[0], grads[1], grads[2].sum(dim=0)

    def bias_relu(self, x: Tensor, bias: Tensor) -> None:
        """x = ReLU(x + bias) in place; x is [M, H], bias [G, H]: the g-th M / G rows get bias g."""
        rows = len(x)
        group = rows // len(bias) if len(bias) > 1 else _ROWS_PER_SUM
        if len(bias) == 1:
            bias = bias.expand(-(-rows // group), -1).contiguous()
        sizes = tuple(map(ctypes.c_int64, (rows, group, x.shape[1])))
        self._split(len(bias), self._library.bias_relu, *sizes, _address(bias), _address(x))

    def relu_backward(self, out: Tensor, grad: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The gradients before ReLU(x + bias) = out: of x [M, H], and of bias [G, H] with G = ``groups``."""
        rows = len(out)
        group = rows // groups if groups > 1 else _ROWS_PER_SUM
        passed, sums = torch.empty_like(out), out.new_empty(-(-rows // group), out.shape[1])
        sizes = tuple(map(ctypes.c_int64, (rows, group, out.shape[1])))
        self._split(len(sums), self._library.relu_backward, *sizes, *map(_address, (out, grad, passed, sums)))
        return passed, sums if groups > 1 else sums.sum(dim=0, keepdim=True)

    def gather(self, table: Tensor, ids: Tensor, out: Tensor) -> None:
        """out[i] = table[ids[i]]: ``ids`` is a strided vector of int64, ``out`` [len(ids), d] has contiguous rows.

        Raises IndexError when an id is not a row of the table.
        """
        rows, dim = table.shape
        status = self._library.gather(
            *map(ctypes.c_int64, (len(ids), rows, dim)), _address(table), _address(ids), ctypes.c_int64(ids.stride(0)),
            _address(out), ctypes.c_int64(out.stride(0)),
        )  # fmt: skip
        if status:
            raise IndexError(f"an id is not one of the {rows} rows of its table")

    def scatter_add(self, table: Tensor, ids: Tensor, grad: Tensor, padding: int) -> None:
        """table[ids[i]] += grad[i], but for ids that are ``padding``; arguments as in :meth:`gather`."""
        self._library.scatter_add(
            *map(ctypes.c_int64, (len(ids), table.shape[1])), _address(table), _address(ids),
            ctypes.c_int64(ids.stride(0)), _address(grad), ctypes.c_int64(grad.stride(0)), ctypes.c_int64(padding),
        )  # fmt: skip

    def catch_up(
        self,
        rows: Tensor,
        table: Tensor,
        moments: tuple[Tensor, Tensor],
        last: Tensor,
        now: int,
        rule: tuple[Tensor, Tensor],
        kept: tuple[Tensor, Tensor],
        lr: float,
        eps: float,
    ) -> Tensor:
        """Bring distinct ``rows`` [U] int64 of a table to step ``now`` (optim/deferred_adam.py) and return them [U, d].

        Args:
            rows: which.
            table: [rows, d]; it, ``moments`` and ``last`` [rows] int32 are changed in place.
            moments: Adam's two, [rows, d] each.
            last: the step each row was last brought to.
            now: the step to bring them to.
            rule: weights and nodes of the drift rules of steps 0 .. now, [steps, nodes] each.
            kept: what k = 0 .. now steps leave of the two moments, [now + 1] each.
            lr: learning rate.
            eps: Adam's epsilon.
        """
        out = table.new_empty(len(rows), table.shape[1])
        self._split(
            len(rows), self._library.catch_up, ctypes.c_int64(table.shape[1]),
            *map(_address, (rows, table, *moments, last)), ctypes.c_int64(now), ctypes.c_int64(rule[0].shape[1]),
            *map(_address, (*rule, *kept)), self._real(lr), self._real(eps), _address(out),
        )  # fmt: skip
        return out

    def adam_rows(
        self,
        rows: Tensor,
        table: Tensor,
        moments: tuple[Tensor, Tensor],
        last: Tensor,
        now: int,
        grad: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Adam's step number ``now`` of distinct ``rows`` with gradients [U, d]; else as in :meth:`catch_up`."""
        b1, b2 = betas
        numbers = (1 - b1, b2, 1 - b2, (1 - b2**now) ** 0.5, lr / (1 - b1**now), eps)
        self._split(
            len(rows), self._library.adam_rows, ctypes.c_int64(table.shape[1]),
            *map(_address, (rows, table, *moments, last)), ctypes.c_int64(now), _address(grad),
            *map(self._real, numbers),
        )  # fmt: skip

    def _split(self, count: int, function: Callable[..., int], *arguments: object) -> None:
        """Call function(first, last, *arguments) on as many ranges of 0 .. count as there are threads."""
        threads = max(1, min(torch.get_num_threads(), count))
        bounds = [count * k // threads for k in range(threads + 1)]
        tasks = [
            partial(function, ctypes.c_int64(first), ctypes.c_int64(last), *arguments)
            for first, last in pairwise(bounds)
        ]
        if any(in_parallel(tasks)):
            raise MemoryError("the attention's working memory cannot be allocated")


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of large tensors instead of giving it back to the system after each use: a training
    step would spend a tenth of its time on fetching it again. Does nothing with another C library."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_ALLOCATION)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGE_ALLOCATION)


def in_parallel(tasks: Sequence[Callable[[], R]]) -> list[R]:
    """The results of all tasks, in no particular order; as many threads as PyTorch uses take one after the other.

    Compiled functions let one another run.
    """
    threads, left = min(torch.get_num_threads(), len(tasks)), iter(tasks)
    if threads <= 1:
        return [task() for task in tasks]

    def work() -> list[R]:
        return [task() for task in left]  # the next task goes to who asks first

    waiting = [_pool(threads).submit(work) for _ in range(threads - 1)]
    return work() + [result for future in waiting for result in future.result()]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads - 1, thread_name_prefix="kernels")


@cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for a number type, compiled first when they are not there; None, and why in the log, without them."""
    try:
        return Kernels(_compiled(_REAL[dtype]), dtype)
    except (OSError, KeyError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "the compiled kernels are not used (%s): PyTorch's operators do the same, several times slower; "
            "install gcc, or silence this with --no-compile",
            str(reason).strip().splitlines()[-1] if str(reason).strip() else type(error).__name__,
        )
        return None


def _compiled(real: str) -> Path:
    """The shared library for a number type. OSError or SubprocessError when it cannot be made."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    identity = [SOURCE.read_text(), *_FLAGS, real, version, platform.machine(), _processor()]
    name = f"kernels-{real}-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / name
            command = [compiler, *_FLAGS, f"-DREAL={real}", str(SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS_TO_COMPILE)
            built.replace(library)
    return library


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "gcc", "cc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise OSError("there is no C compiler")


def _cache_folder() -> Path:
    """A folder that only this user writes to: what lies in it is executed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcron" / "kernels"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = home.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(home, os.W_OK):
            return home
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        pass
    return _private_folder()


@cache
def _private_folder() -> Path:
    """For this process only, where there is no cache directory."""
    folder = tempfile.TemporaryDirectory(prefix="lcron-kernels-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _processor() -> str:
    """What -march=native depends on: one home directory may serve different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
