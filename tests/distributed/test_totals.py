"""A loss on the parts of a batch that several processes share equals the loss of the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deep_components.distributed.totals import global_totals
from deep_components.loss import functional
from deep_components.loss.functional import batch_totals, groupwise_ranknet, totals_by
from deep_components.loss.lcron import LCRON
from tests.distributed.processes import Thread, on_each, slice_of
from tests.loss.methods import Batch, Method, Step, make_batch, step
from tests.loss.test_properties import MATRIX

ROOT = Path(__file__).parents[2]
PAPER = [method for method in MATRIX if method.setting != "four_stage"]
BOTH = ("two_stage", "three_stage")


def ragged(setting: str, num_requests: int = 25, num_items: int = 14, seed: int = 3) -> Batch:
    """Requests of lengths of their own, of whose items 35 % are missing; one is empty."""
    batch = make_batch(setting, seed, num_requests, num_items)
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch.targets.mask.shape, generator=random) < 0.65
    mask &= torch.arange(num_items) < torch.randint(1, num_items + 1, (num_requests, 1), generator=random)
    mask[num_requests // 2] = False
    return batch.replace(mask=mask)


def shared_step(method: Method, process: Thread, batch: Batch) -> Step:
    """One process's step: its terms, the gradients of its scores, and of its weights."""
    loss, part = method.build_weighted(), slice_of(batch, process.rank, process.count)
    leaves = {stage: scores.clone().requires_grad_() for stage, scores in part.scores.items()}
    with totals_by(global_totals(process)):
        terms = loss(leaves, part.targets)
    summed = process.calls
    (terms["loss"] / process.count).backward()
    assert process.calls == summed, "a backward pass exchanges nothing"
    missing = batch.targets.mask.shape[1] - part.targets.mask.shape[1]
    grads = {stage: nn.functional.pad(of(leaf), (0, missing)) for stage, leaf in leaves.items()}
    return Step(terms, grads, {name.removeprefix("weight."): of(leaf) for name, leaf in loss.named_parameters()})


def of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def assert_equals_whole(method: Method, batch: Batch, count: int) -> None:
    whole, parts = step(method.build_weighted(), batch), on_each(count, lambda p: shared_step(method, p, batch))
    for part in parts:
        torch.testing.assert_close(part.terms, whole.terms, rtol=1e-12, atol=1e-13)
    for stage, expected in whole.grads.items():
        found = torch.cat([part.grads[stage] for part in parts])
        assert float((found - expected).norm()) <= 1e-12 * float(expected.norm()) + 1e-15
    for name, expected in whole.weight_grads.items():
        summed = torch.stack([part.weight_grads[name] for part in parts]).sum()
        torch.testing.assert_close(summed, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", PAPER, ids=str)
def test_parts_of_a_batch_give_the_loss_of_the_whole(method: Method) -> None:
    for count in (2, 3, 7):
        assert_equals_whole(method, ragged(method.setting), count)


@pytest.mark.parametrize("flags", ["icc", "fs_ranknet", "fs_lambdaloss", "arf", "lcron", "sorting"])
def test_so_do_parts_made_a_few_requests_at_a_time(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that the backward pass makes again: it exchanges nothing (shared_step looks)."""
    monkeypatch.setattr(functional, "MATRIX_NUMBERS", 0)
    monkeypatch.setattr(functional, "NUMBERS_PER_BLOCK", 3 * 14**2)
    assert_equals_whole(Method("three_stage", f"--loss_type={flags}"), ragged("three_stage"), 3)


@pytest.mark.parametrize("setting", BOTH)
@pytest.mark.parametrize("method", ["bce", "fs_ranknet", "lcron"])
def test_processes_without_a_request(setting: str, method: str) -> None:
    assert_equals_whole(Method(setting, f"--loss_type={method}"), ragged(setting, num_requests=4), 7)


@pytest.mark.parametrize("count", [2, 7, 25])
def test_a_row_of_groups_shared_by_some_parts(count: int) -> None:
    """Among 25 processes each has one request, which shares its row with none; the numbers are the same."""
    batch = ragged("three_stage")
    row = torch.arange(14) // 4
    batch = batch.replace(group=row.expand(25, -1))
    assert_equals_whole(Method("three_stage", "--loss_type=fs_ranknet"), batch, count)


def test_a_group_that_one_process_has() -> None:
    """Processes count the pairs of different numbers of groups; some share a row of groups, others do not."""
    batch = ragged("three_stage", num_requests=9)
    group = batch.targets.group.clone()
    group[0, :] = torch.arange(14) * 5
    group[6:] = 0
    batch = batch.replace(group=group, mask=batch.targets.mask | (torch.arange(9) == 0).unsqueeze(-1))
    assert_equals_whole(Method("three_stage", "--loss_type=fs_ranknet"), batch, 3)


# ---- the totals themselves -------------------------------------------------------------------------------------------


def test_alone_sums_are_the_very_same_tensors() -> None:
    total, count = torch.ones(()).requires_grad_(), torch.tensor(3)
    assert batch_totals(total, count) == (total, count)
    assert all(a is b for a, b in zip(batch_totals(total, count), (total, count), strict=True))


def test_totals_keep_their_types_and_count_beyond_float32() -> None:
    """2^24 + 1 is no float32; a float32 sum of such is rounded once, at the end."""

    def totals(process: Thread) -> list[Tensor]:
        total, count = torch.tensor([1.5, 2.0**24]), torch.tensor(2**24 + 1)
        with totals_by(global_totals(process)):
            return list(batch_totals(total[process.rank : process.rank + 1], count, torch.ones(2, 2)))

    for total, count, ones in on_each(2, totals):
        assert total.dtype == torch.float32 and total.tolist() == [2.0**24 + 2]
        assert count.dtype == torch.int64 and count.item() == 2**25 + 2
        assert ones.tolist() == [[2, 2], [2, 2]]


def test_vectors_by_a_number_end_at_the_batchs_largest() -> None:
    def totals(process: Thread) -> list[float]:
        with totals_by(global_totals(process)):
            (counts,) = batch_totals(torch.arange(1.0, 2 * process.rank + 1).double(), by_number=True)
            return list(counts.tolist())

    assert on_each(3, totals) == [[2, 4, 3, 4]] * 3


def test_totals_end_with_their_context_also_after_an_error() -> None:
    with pytest.raises(KeyError), totals_by(lambda *sums, **_: sums[::-1]):
        assert batch_totals(torch.tensor(1), torch.tensor(2)) == (2, 1)
        with totals_by(None):
            assert batch_totals(torch.tensor(1), torch.tensor(2)) == (1, 2)
        raise KeyError
    assert batch_totals(torch.tensor(1), torch.tensor(2)) == (1, 2)


def test_a_junk_group_of_a_missing_item_counts_nowhere() -> None:
    """Also in a row that all requests share."""
    batch = ragged("two_stage", num_requests=6)
    there = batch.targets.mask & (torch.arange(14) != 5)
    row = batch.targets.group[0]
    values = []
    for junk in (0, -1, 2**62):
        group = torch.where(torch.arange(14) == 5, junk, row).expand(6, -1)
        targets = batch.replace(group=group, mask=there).targets
        values.append(groupwise_ranknet(batch.scores["rank"], targets).item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


# ---- real processes --------------------------------------------------------------------------------------------------

_WORKER = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from deep_components.distributed.totals import global_totals
from deep_components.loss.functional import groupwise_ranknet, totals_by
from deep_components.loss.lcron import LCRON

torch.set_num_threads(1)
folder, rank, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
scores, targets = torch.load(f"{folder}/part.{rank}.pt", weights_only=True)
leaves, targets = {stage: s.requires_grad_() for stage, s in scores.items()}, SimpleNamespace(**targets)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
with totals_by(global_totals(SimpleNamespace(rank=rank, count=count, all_sum=dist.all_reduce))):
    loss = LCRON(leaves, 10).double()(leaves, targets)["loss"] + groupwise_ranknet(leaves["rank"], targets)
dist.destroy_process_group()
(loss / count).backward()
torch.save((loss.detach(), {stage: leaf.grad for stage, leaf in leaves.items()}), f"{folder}/found.{rank}.pt")
"""


def test_processes_that_exchange_by_gloo(tmp_path: Path) -> None:
    batch, workers = ragged("two_stage"), []
    for rank in (0, 1):
        part = slice_of(batch, rank, 2)
        torch.save((part.scores, vars(part.targets)), tmp_path / f"part.{rank}.pt")
        words = [sys.executable, "-c", _WORKER, str(tmp_path), str(rank), "2"]
        workers.append(subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    leaves = {stage: scores.requires_grad_() for stage, scores in batch.scores.items()}
    loss = LCRON(leaves, 10).double()(leaves, batch.targets)["loss"] + groupwise_ranknet(leaves["rank"], batch.targets)
    loss.backward()
    for worker in workers:
        _, error = worker.communicate(timeout=300)
        assert worker.returncode == 0, error
    parts = [torch.load(tmp_path / f"found.{rank}.pt", weights_only=True) for rank in (0, 1)]
    for value, _ in parts:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    for stage, leaf in leaves.items():
        width = leaf.shape[1]
        found = torch.cat([nn.functional.pad(g[stage], (0, width - g[stage].shape[1])) for _, g in parts])
        torch.testing.assert_close(found, of(leaf), rtol=1e-10, atol=1e-14)
