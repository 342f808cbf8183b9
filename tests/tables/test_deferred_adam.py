"""DeferredAdam against torch.optim.Adam with dense gradients."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deep_components.kernels import load_kernels
from deep_components.tables.deferred_adam import DeferredAdam, DriftRule

ROWS, DIM, LR = 200, 3, 0.01
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-5}


def gradients(steps: int, dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Zipf-distributed rows with repeats, and gradients of magnitudes from 1e-13 to 1e2, one magnitude a row."""
    generator = np.random.default_rng(seed)
    magnitude = 10.0 ** generator.uniform(-13, 2, (ROWS, 1))
    for _ in range(steps):
        rows = np.minimum(generator.zipf(1.3, 12), ROWS) - 1
        values = magnitude[rows] * generator.standard_normal((len(rows), DIM))
        yield torch.from_numpy(rows), torch.from_numpy(values).to(dtype)


class Pair:
    """The same table under both optimizers."""

    def __init__(self, dtype: torch.dtype, compiled: bool = False) -> None:
        start = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, DIM))).to(dtype)
        self.dense, self.table = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.adam = torch.optim.Adam([self.dense], lr=LR)
        self.deferred = DeferredAdam(self.table, lr=LR, kernels=load_kernels(dtype) if compiled else None)

    def step(self, rows: Tensor, values: Tensor) -> None:
        self.dense.grad = torch.zeros_like(self.dense).index_add(0, rows, values)
        self.adam.step()
        distinct, slots = rows.unique(return_inverse=True)
        read = self.deferred.gather(distinct)
        assert torch.equal(read, self.table[distinct])
        self.deferred.step(distinct, torch.zeros_like(read).index_add(0, slots, values))

    def error(self) -> float:
        self.deferred.flush()
        return (self.dense - self.table).abs().max().item()


@pytest.mark.parametrize("compiled", [False, True])
def test_who_only_looks_changes_nothing(compiled: bool) -> None:
    looked, alone = Pair(torch.float32, compiled), Pair(torch.float32, compiled)
    for rows, values in gradients(60, torch.float32):
        looked.step(rows, values)
        alone.step(rows, values)
        some = rows.unique().flip(0)
        seen, whole = looked.deferred.peek(some), looked.deferred.values(rows_at_a_time=64)
        assert torch.equal(seen, whole[some])
    for name, values in alone.deferred.state().items():
        assert torch.equal(looked.deferred.state()[name], values), name
    assert torch.equal(looked.table, alone.table) and not torch.equal(whole, looked.table)
    alone.deferred.flush()
    assert torch.equal(whole, alone.table)
    assert alone.deferred.values().data_ptr() == alone.table.data_ptr()  # up to date: no copy


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_parameters_are_those_of_dense_adam(dtype: torch.dtype, compiled: bool) -> None:
    pair = Pair(dtype, compiled)
    for number, (rows, values) in enumerate(gradients(1500, dtype)):
        pair.step(rows, values)
        if number % 300 == 299:  # flushing in between changes nothing
            assert pair.error() < TOLERANCE[dtype]
    state = pair.adam.state[pair.dense]
    scale = state["exp_avg"].abs().max()
    assert (state["exp_avg"] - pair.deferred.first).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_read_after_a_long_time_is_where_dense_adam_has_it(compiled: bool) -> None:
    pair = Pair(torch.float64, compiled)
    one, other = torch.tensor([5]), torch.tensor([7])
    pair.step(one, torch.full((1, DIM), 1e-9, dtype=torch.float64))
    before = pair.table[5].clone()
    for _ in range(700):
        pair.step(other, torch.ones(1, DIM, dtype=torch.float64))
    assert torch.equal(pair.table[5], before)  # not yet
    pair.deferred.gather(one)
    torch.testing.assert_close(pair.table[5], pair.dense[5], rtol=0, atol=1e-9)
    assert (pair.table[5] - before).abs().min() > 1e-3  # the drift is many times the first step


def test_rows_never_touched_stay() -> None:
    pair = Pair(torch.float32)
    start = pair.table.detach().clone()
    for rows, values in gradients(50, torch.float32):
        pair.step(rows.clamp(max=9), values)
    pair.deferred.flush()
    assert torch.equal(pair.table[10:], start[10:]) and not torch.equal(pair.table[:10], start[:10])


@pytest.mark.parametrize("decay", [0.999, float(np.float32(0.999))])
def test_the_rule_gives_the_sum_for_every_second_moment(decay: float) -> None:
    rule = DriftRule((0.9, 0.999), (0.9, decay))
    rule.extend(3000)
    for t in (1, 2, 3, 10, 100, 2999):
        mu, g = rule.series(np.array([t]))
        for root in 10.0 ** np.linspace(-16, 4, 60):
            exact = (mu / (root + 1e-8 * g)).sum()
            assert (rule.weights[t] / (root + 1e-8 * rule.nodes[t])).sum() == pytest.approx(exact, rel=5e-8)


@pytest.mark.parametrize("saved_by", ["deferred", "dense"])
def test_a_restored_optimizer_goes_on_as_before_with_more_rows(saved_by: str) -> None:
    """The state of some rows goes into a table that has others too."""
    pair = Pair(torch.float64)
    steps = list(gradients(40, torch.float64))
    for rows, values in steps[:20]:
        pair.step(rows, values)
    pair.deferred.flush()
    larger = nn.Parameter(torch.zeros(ROWS + 5, DIM, dtype=torch.float64))
    index = torch.arange(ROWS) + 5
    with torch.no_grad():
        larger[index] = pair.table
    restored = DeferredAdam(larger, lr=LR)
    state = pair.adam.state[pair.dense] if saved_by == "dense" else pair.deferred.state()
    restored.restore(state, index)
    for rows, values in steps[20:]:
        pair.step(rows, values)
        distinct, slots = rows.unique(return_inverse=True)
        restored.gather(distinct + 5)
        restored.step(distinct + 5, torch.zeros(len(distinct), DIM, dtype=torch.float64).index_add(0, slots, values))
    restored.flush()
    torch.testing.assert_close(larger[5:], pair.dense, rtol=0, atol=1e-7)
    assert not larger[:5].any()


def test_a_state_that_cannot_be() -> None:
    pair = Pair(torch.float64)
    state = pair.deferred.state() | {"last": torch.full((ROWS,), 3)}
    with pytest.raises(ValueError, match="steps that were never made"):
        pair.deferred.restore(state)
