"""The compiled loops against PyTorch's formulas, and what happens where nothing can be compiled."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deep_components import kernels as module
from deep_components.kernels import Kernels, TableUse, load_kernels
from deep_components.models.din import PADDING_LOGIT, _CompiledLogits
from deep_components.models.tower import _linear_relu
from deep_components.tables.deferred_adam import DeferredAdam
from tests.helpers import config, same_parameters, train

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 0.01
DTYPES = (torch.float32, torch.float64)
TOLERANCE: dict[torch.dtype, Any] = {
    dtype: {"rtol": bound, "atol": bound} for dtype, bound in zip(DTYPES, (2e-5, 1e-12), strict=True)
}
pytestmark = pytest.mark.usefixtures("short_rules")
some = settings(max_examples=30, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(DTYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def compiled(dtype: torch.dtype) -> Kernels:
    kernels = load_kernels(dtype)
    assert kernels is not None, "the tests need a C compiler"
    return kernels


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- attention -------------------------------------------------------------------------------------------------------


@st.composite
def attention_inputs(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """history [B, L, H], items [B, N, H], weight [H], bias [1], mask [B, L], gradient [B, N, L]; odd sizes."""
    dtype, generator = draw(dtypes), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, num_items = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7]))
    length, units = draw(st.sampled_from([1, 2, 9])), draw(st.sampled_from([1, 3, 8, 17]))
    valid = draw(st.sampled_from([0.0, 0.5, 1.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = torch.rand(batch, length, generator=generator) < valid
    parts = (normal(batch, length, units), normal(batch, num_items, units), normal(units), normal(1))
    return *parts, mask, normal(batch, num_items, length)


def plain_logits(history: Tensor, items: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    hidden = (history.unsqueeze(1) + items.unsqueeze(2)).relu()  # [B, N, L, H]
    return (hidden @ weight + bias).masked_fill(~mask.unsqueeze(1), PADDING_LOGIT)


@some
@given(inputs=attention_inputs())
def test_attention_has_the_values_and_gradients_of_the_formula(inputs: tuple[Tensor, ...]) -> None:
    *parts, mask, upstream = inputs
    kernels, tolerance = compiled(parts[0].dtype), TOLERANCE[parts[0].dtype]
    leaves = history, items, weight, bias = [part.requires_grad_() for part in parts]
    ours = _CompiledLogits.apply(kernels, *leaves, mask)
    theirs = plain_logits(history, items, weight, bias, mask)
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert (ours[(~mask).unsqueeze(1).expand_as(ours)] == ours.new_tensor(PADDING_LOGIT)).all()
    expected = torch.autograd.grad(theirs, leaves, upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, upstream), expected, **tolerance)


@some
@given(inputs=attention_inputs(), number=st.sampled_from([2, 3, 8]))
def test_attention_does_not_depend_on_the_number_of_threads(inputs: tuple[Tensor, ...], number: int) -> None:
    history, items, weight, bias, mask, upstream = inputs
    kernels, results = compiled(history.dtype), []
    for count in (1, number):
        with threads(count):
            forward = kernels.attention_forward(history, items, weight, bias, mask, PADDING_LOGIT)
            results.append((forward, *kernels.attention_backward(history, items, weight, mask, upstream)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@every_dtype
@pytest.mark.parametrize("where", ["history", "items", "weight", "bias"])
def test_attention_hides_no_nan(dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    parts = {"history": torch.randn(2, 3, 4), "items": torch.randn(2, 5, 4), "weight": torch.randn(4)}
    parts = {name: part.to(dtype) for name, part in (parts | {"bias": torch.randn(1)}).items()}
    mask = torch.tensor([[True, False, True], [True, True, True]])
    parts[where].view(-1)[1 if where != "bias" else 0] = float("nan")
    history, items, weight, bias = parts.values()
    ours = compiled(dtype).attention_forward(history, items, weight, bias, mask, PADDING_LOGIT)
    theirs = plain_logits(history, items, weight, bias, mask)
    assert theirs.isnan().any() and torch.equal(ours.isnan(), theirs.isnan())


@every_dtype
def test_a_nan_at_padding_stays_out(dtype: torch.dtype) -> None:
    history, items = torch.randn(1, 3, 4, dtype=dtype), torch.randn(1, 2, 4, dtype=dtype)
    history[0, 1] = float("nan")
    mask = torch.tensor([[True, False, True]])
    logits = compiled(dtype).attention_forward(history, items, history[0, 0], history[0, 0, :1], mask, PADDING_LOGIT)
    assert logits.isfinite().all()


# ---- look-ups --------------------------------------------------------------------------------------------------------


@st.composite
def look_ups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A table [rows, d], a strided vector of ids, and how many columns stand before its rows in the output."""
    dtype, generator = draw(dtypes), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows, dim = draw(st.sampled_from([1, 2, 30])), draw(st.sampled_from([1, 3, 8]))
    ids = torch.randint(rows, (draw(st.sampled_from([1, 2, 50])), draw(st.integers(1, 4))), generator=generator)
    table = torch.randn(rows, dim, generator=generator, dtype=dtype)
    return table, ids[:, draw(st.integers(0, ids.shape[1] - 1))], draw(st.integers(0, 5))


@some
@given(drawn=look_ups())
def test_gather_is_indexing(drawn: tuple[Tensor, Tensor, int]) -> None:
    table, ids, before = drawn
    whole = torch.full((len(ids), before + table.shape[1] + 2), 7, dtype=table.dtype)
    compiled(table.dtype).gather([TableUse(table, ids, whole[:, before:-2], 0)])
    assert torch.equal(whole[:, before:-2], table[ids])
    assert (whole[:, :before] == 7).all() and (whole[:, -2:] == 7).all()


@some
@given(drawn=look_ups(), padding=st.integers(0, 2))
def test_scatter_add_is_the_gradient_of_an_embedding(drawn: tuple[Tensor, Tensor, int], padding: int) -> None:
    table, ids, before = drawn
    grad = torch.randn(len(ids), before + table.shape[1], dtype=table.dtype)[:, before:]
    start = table.clone()
    compiled(table.dtype).scatter_add([TableUse(table, ids, grad, padding)])
    leaf = start.clone().requires_grad_()
    looked_up = torch.nn.functional.embedding(ids, leaf, padding_idx=padding if padding < len(leaf) else None)
    looked_up.backward(grad)
    assert leaf.grad is not None
    torch.testing.assert_close(table - start, leaf.grad, **TOLERANCE[table.dtype])


@every_dtype
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**62)])
def test_an_id_that_is_not_a_row(dtype: torch.dtype, bad: int) -> None:
    with pytest.raises(IndexError, match="not one of its table's rows"):
        compiled(dtype).gather(
            [TableUse(torch.zeros(5, 3, dtype=dtype), torch.tensor([0, bad]), torch.zeros(2, 3, dtype=dtype), 0)]
        )


@every_dtype
def test_look_ups_hide_no_nan(dtype: torch.dtype) -> None:
    table, out = torch.zeros(3, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    table[1, 0] = float("nan")
    compiled(dtype).gather([TableUse(table, torch.tensor([0, 1]), out, 0)])
    assert out.isnan().tolist() == [[False, False], [True, False]]
    compiled(dtype).scatter_add([TableUse(table, torch.tensor([2, 0]), out.flip(0), 0)])
    assert table.isnan().tolist() == [[False, False], [True, False], [True, False]]


# ---- deferred Adam ---------------------------------------------------------------------------------------------------


def optimizers(dtype: torch.dtype, dim: int, rows: int = 12) -> list[DeferredAdam]:
    """Without and with compiled loops, on equal tables."""
    start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [
        DeferredAdam(torch.nn.Parameter(start.clone()), LR, BETAS, EPS, kernels) for kernels in (None, compiled(dtype))
    ]


def run_steps(optimizer: DeferredAdam, dim: int, steps: int, seed: int) -> None:
    """Steps with gradients of some rows; between them, steps without any."""
    generator = torch.Generator().manual_seed(seed)
    table = optimizer.table
    for _ in range(steps):
        rows = torch.randperm(len(table), generator=generator)[: int(torch.randint(1, 6, (), generator=generator))]
        values = optimizer.gather(rows)
        assert torch.equal(values, table[rows])
        gradient = torch.randn(len(rows), dim, generator=generator).to(table.dtype)
        optimizer.step(rows, gradient * 10.0 ** torch.randint(-8, 2, (len(rows), 1), generator=generator))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            optimizer.step(rows[:0], gradient[:0])


@settings(some, max_examples=8)
@given(dtype=dtypes, dim=st.sampled_from([1, 3, 8]), seed=st.integers(0, 10**6))
def test_deferred_adam_is_that_of_pytorch_s_operators(dtype: torch.dtype, dim: int, seed: int) -> None:
    pair = optimizers(dtype, dim)
    for optimizer in pair:
        run_steps(optimizer, dim, 12, seed)
        optimizer.flush()
    plain, ours = pair
    for name in ("table", "first", "second"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), **TOLERANCE[dtype])
    assert torch.equal(ours.last, plain.last) and (ours.last == ours.steps).all()


@every_dtype
def test_deferred_adam_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    results = []
    for count in (1, 3):
        optimizer = optimizers(dtype, 3)[1]
        with threads(count):
            run_steps(optimizer, 3, 10, seed=1)
            optimizer.flush()
        results.append((optimizer.table, optimizer.first, optimizer.second, optimizer.last))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@every_dtype
def test_deferred_adam_hides_no_nan(dtype: torch.dtype) -> None:
    optimizer, rows = optimizers(dtype, 2)[1], torch.tensor([3, 4])
    optimizer.gather(rows)
    optimizer.step(rows, torch.tensor([[float("nan"), 1.0], [1.0, 1.0]], dtype=dtype))
    optimizer.step(rows[:0], torch.zeros(0, 2, dtype=dtype))
    optimizer.flush()
    table = optimizer.table
    assert table[3].isnan().tolist() == [True, False] and not table[4].isnan().any()
    assert table.isnan().sum() == 1


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    """The loops would read and write beyond the shorter one."""
    kernels, history, items = compiled(torch.float32), torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    good: dict[str, Any] = {"weight": torch.zeros(4), "bias": torch.zeros(1), "mask": torch.ones(2, 3).bool()}
    kernels.attention_forward(history, items, **good, padding=0.0)
    bad = {"weight": torch.zeros(3), "bias": torch.zeros(2), "mask": torch.ones(2, 2).bool()}
    for name, value in (*bad.items(), ("weight", torch.zeros(4).double()), ("weight", torch.zeros(8)[::2])):
        with pytest.raises(ValueError):
            kernels.attention_forward(history, items, **(good | {name: value}), padding=0.0)
    with pytest.raises(ValueError):
        kernels.attention_backward(history, items, torch.zeros(4), good["mask"], torch.zeros(2, 5, 2))
    with pytest.raises(ValueError):
        kernels.bias_relu(torch.zeros(5, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError):
        kernels.relu_backward(torch.zeros(5, 4), torch.zeros(4, 4), 1)
    table = torch.zeros(9, 4)
    for ids, values in ((torch.zeros(3).long(), torch.zeros(2, 4)), (torch.zeros(3).int(), torch.zeros(3, 4))):
        with pytest.raises(ValueError):
            kernels.gather([TableUse(table, ids, values, 0)])
    optimizer = optimizers(torch.float32, 3)[1]
    for rows in (torch.tensor([12]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            optimizer.gather(rows)
    with pytest.raises(ValueError):
        optimizer.step(torch.tensor([1, 2]), torch.zeros(1, 3))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_several_uses_of_several_tables(count: int) -> None:
    """Uses of one table are added up in their order, by one thread, whatever the number of threads."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.zeros(9, 8) for _ in range(4)]
    uses = [
        TableUse(table, torch.randint(0, 9, (40,), generator=generator), torch.randn(40, 8, generator=generator), -1)
        for table in tables
        for _ in range(3)
    ]
    expected = [torch.zeros(9, 8) for _ in tables]
    for place, use in enumerate(uses):
        for row, values in zip(use.ids.tolist(), use.values, strict=True):
            expected[place // 3][row] += values
    with threads(count):
        compiled(torch.float32).scatter_add(uses)
    assert all(torch.equal(one, other) for one, other in zip(tables, expected, strict=True))


def test_one_pool_of_threads() -> None:
    """The kernels run on PyTorch's own OpenMP: no second copy is loaded beside it, which would fight for the cores."""
    script = (
        "import torch; from deep_components.kernels import load_kernels, _openmp; load_kernels(torch.float32); "
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}; "
        "assert _openmp() is None or maps == {str(_openmp().resolve())}, maps"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing remembered of earlier loads, before and after."""
    caches = (module.load_kernels, module._private_folder)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_training_runs(
    fresh: pytest.MonkeyPatch, log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(log, tmp_path / "plain", "--no-compile")
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CC", raising=False)
    with caplog.at_level("WARNING"):
        run = train(log, tmp_path / "run")
        train(log, tmp_path / "again")
    said = [record.getMessage() for record in caplog.records if "kernels" in record.getMessage()]
    assert len(said) == 1 and "no C compiler" in said[0] and "--no-compile" in said[0]
    assert config(run)["kernels"] == "pytorch"
    assert same_parameters(run, plain)


@pytest.mark.parametrize("script", ["exit 1", 'echo "no such flag" >&2; [ "$1" = --version ]', "kill -9 $$"])
def test_a_compiler_that_fails(
    script: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level("WARNING"):
        assert load_kernels(torch.float32) is None
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()
    if "flag" in script:
        assert "no such flag" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [compiler]  # nothing is left


def test_compiled_once_and_kept(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernels(torch.float32) is not None
    [library] = (tmp_path / "lcron-kernels").iterdir()
    made = library.stat().st_mtime_ns
    module.load_kernels.cache_clear()
    assert load_kernels(torch.float32) is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "lcron-kernels").iterdir()] == [made]
    assert (tmp_path / "lcron-kernels").stat().st_mode & 0o077 == 0


def gathers(kernels: Kernels | None) -> bool:
    """Whether these are kernels that work."""
    out = torch.zeros(1, 2)
    assert kernels is not None
    kernels.gather([TableUse(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), out, 0)])
    return out.tolist() == [[1.0, 2.0]]


def flipped(content: bytes, bit: int) -> bytes:
    return bytes(byte ^ (1 << bit % 8) * (index == bit // 8) for index, byte in enumerate(content))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a bit of the code": lambda content: flipped(content, 4 * len(content)),
    "a bit of the checksum": lambda content: flipped(content, 8 * len(content) - 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_compiled_again(damage: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = module._compiled("float")
    whole = library.read_bytes()
    library.write_bytes(DAMAGE[damage](whole))
    assert gathers(load_kernels(torch.float32))
    assert library.read_bytes() == whole and list(library.parent.iterdir()) == [library]


def plant(library: Path, canary: Path) -> None:
    """Put a library with a right checksum there that writes the canary when it is loaded."""
    source = library.with_name("planted.c")
    source.write_text(f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fopen("{canary}", "w"); }}\n')
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    source.unlink()


@pytest.mark.parametrize("way", ["a folder above", "the folder", "the file", "a link", "another owner", "nothing"])
def test_a_library_that_others_can_write_is_not_loaded(way: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if way == "another owner" and os.getuid():
        pytest.skip("only root gives a file away")
    home, canary = tmp_path / "above" / "home", tmp_path / "canary"
    fresh.setenv("XDG_CACHE_HOME", str(home))
    library = module._compiled("float")
    plant(library, canary)
    if way == "another owner":
        os.chown(library, 65534, 65534)
    elif way == "a link":
        library.rename(tmp_path / "elsewhere")
        library.symlink_to(tmp_path / "elsewhere")
    elif way != "nothing":
        {"a folder above": home.parent, "the folder": library.parent, "the file": library}[way].chmod(0o777)
    if way == "nothing":  # the canary sings
        assert load_kernels(torch.float32) is None and canary.exists()
    else:
        assert gathers(load_kernels(torch.float32)) and not canary.exists()


def test_a_cache_home_that_depends_on_the_current_folder_is_none(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.chdir(tmp_path)
    fresh.setenv("XDG_CACHE_HOME", "cache")
    assert gathers(load_kernels(torch.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_loaded(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system whose files may not be executed: the advice is not to install what is there."""

    def refuses(path: str, mode: int = 0) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setattr(module.ctypes, "CDLL", refuses)
    assert load_kernels(torch.float32) is None
    [record] = caplog.records
    assert "XDG_CACHE_HOME" in record.getMessage() and "gcc" not in record.getMessage()


@pytest.mark.parametrize("home", ["a file", "others write there", "no folder at all"])
def test_a_cache_home_that_cannot_be_used(home: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies there would be executed: only a folder of the user's own will do."""
    place = tmp_path / "home"
    if home == "others write there":
        (place / "lcron-kernels").mkdir(parents=True)
        (place / "lcron-kernels").chmod(0o777)
    else:
        place.write_text("") if home == "a file" else None
    fresh.setenv("XDG_CACHE_HOME", str(place) if home != "no folder at all" else "/proc/nothing")
    assert gathers(load_kernels(torch.float32))
    if home == "others write there":
        assert list((place / "lcron-kernels").iterdir()) == []


def test_several_compile_at_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As processes do that start together: each runs its own compiler, and all use one library."""
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    begin = threading.Barrier(3)

    def compiles() -> Path:
        begin.wait()
        return module._compiled("float")

    with ThreadPoolExecutor(3) as pool:
        libraries = {future.result() for future in [pool.submit(compiles) for _ in range(3)]}
    assert libraries == set((tmp_path / "lcron-kernels").iterdir()) and len(libraries) == 1
    assert gathers(Kernels(libraries.pop(), torch.float32))


# ---- layers ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("rows_per_group", [1, 3, 200])
def test_a_layer_is_linear_and_relu(dtype: torch.dtype, groups: int, rows_per_group: int) -> None:
    """Values and gradients of ReLU(x W^T + b), with one bias for all rows or one a group of rows."""
    generator = torch.Generator().manual_seed(rows_per_group)
    shapes = (groups, rows_per_group, 5), (6, 5), (groups, 6) if groups > 1 else (6,)
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    inputs, weight, bias = leaves
    ours = _linear_relu(inputs, weight, bias, compiled(dtype))
    theirs = (inputs @ weight.t() + (bias.unsqueeze(1) if groups > 1 else bias)).relu()
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    upstream = torch.randn(theirs.shape, generator=generator, dtype=dtype)
    expected = torch.autograd.grad(theirs, leaves, upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, upstream), expected, **TOLERANCE[dtype])


@every_dtype
def test_a_layer_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    out, grad = torch.randn(2500, 9, dtype=dtype), torch.randn(2500, 9, dtype=dtype)
    results = []
    for count in (1, 3):
        with threads(count):
            forward = out.clone()
            compiled(dtype).bias_relu(forward, out[:1].contiguous())
            results.append((forward, *compiled(dtype).relu_backward(out, grad, 1)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@every_dtype
def test_a_layer_hides_no_nan(dtype: torch.dtype) -> None:
    inputs = torch.tensor([[1.0, float("nan")], [1.0, 2.0]], dtype=dtype)
    out = _linear_relu(inputs, torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype), compiled(dtype))
    assert out.isnan().any(dim=-1).tolist() == [True, False]
