"""Losses that are no function of sums over the batch: refused, or computed of the whole batch by every process."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_components.distributed.totals import Processes
from deep_components.distributed.whole_batch import check_is_of_totals, global_terms, whole_batch
from deep_components.errors import InputError
from deep_components.loss.functional import Targets, batch_totals, masked_mean, masked_sum
from tests.distributed.processes import Thread, on_each, slice_of
from tests.distributed.test_totals import BOTH, ragged
from tests.loss.methods import Batch, Method, step
from tests.loss.test_properties import VARIANTS

Formula = Callable[["Own", Tensor, Targets], Tensor]


class Own(nn.Module):
    """A user's loss of the rank stage's scores times a trained scale, by a formula."""

    mean: Tensor

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula, self.calls = formula, 0
        self.scale = nn.Parameter(torch.tensor(1.25, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        self.calls += 1
        return {"loss": self.formula(self, scores["rank"] * self.scale, targets)}


class WholeOwn(Own):
    whole_batch = True


def listwise(_: Own, s: Tensor, targets: Targets) -> Tensor:
    """A softmax over all items of the batch."""
    shares = s.masked_fill(~targets.mask, -torch.inf).flatten().log_softmax(dim=0).view_as(s)
    return -torch.where(targets.mask & (targets.group == 0), shares, 0).sum() / 100


def mean_of_requests(_: Own, s: Tensor, targets: Targets) -> Tensor:
    return (torch.where(targets.mask, s, 0) ** 2).sum(dim=-1).mean()


def sum_alone(_: Own, s: Tensor, targets: Targets) -> Tensor:
    return masked_sum(s**2, targets.mask)[0]


def total_in_each_request(_: Own, s: Tensor, targets: Targets) -> Tensor:
    """Its value is right and its gradient wrong: a total is used in sums over requests."""
    return masked_mean((s - masked_mean(s, targets.mask)) ** 2 * (targets.labels + 1), targets.mask)


def running_mean(own: Own, s: Tensor, targets: Targets) -> Tensor:
    """Its buffer is another one in each process, from the next step on."""
    with torch.no_grad():
        own.mean += torch.where(targets.mask, s, 0).mean()
    return masked_mean(s**2, targets.mask)


def noisy(_: Own, s: Tensor, targets: Targets) -> Tensor:
    return masked_mean((s + torch.rand_like(s)) ** 2, targets.mask)


def variance(_: Own, s: Tensor, targets: Targets) -> Tensor:
    """A function of sums that masked_mean does not give."""
    total, squares, count = batch_totals(*masked_sum(s, targets.mask)[:1], *masked_sum(s**2, targets.mask))
    return squares / count - (total / count) ** 2


def weighted_mean(own: Own, s: Tensor, targets: Targets) -> Tensor:
    return masked_mean(s.exp(), targets.mask) ** 2 * own.scale


def running_global_mean(own: Own, s: Tensor, targets: Targets) -> Tensor:
    mean = masked_mean(s, targets.mask)
    with torch.no_grad():
        own.mean += mean
    return (mean - own.mean / 2) ** 2


REFUSED = (listwise, mean_of_requests, sum_alone, total_in_each_request, running_mean)
ACCEPTED = (variance, weighted_mean, running_global_mean)


def check(loss: nn.Module, batch: Batch, process: Thread) -> None:
    part = slice_of(batch, process.rank, process.count)
    check_is_of_totals(loss, part.scores, part.targets, process)


@pytest.mark.parametrize("formula", REFUSED)
def test_a_loss_that_is_no_function_of_totals_is_refused_by_all(formula: Formula) -> None:
    said = []

    def refused(process: Thread) -> None:
        with pytest.raises(InputError, match="set whole_batch = True in its class") as error:
            check(Own(formula), ragged("two_stage"), process)
        said.append(str(error.value))

    on_each(3, refused)
    assert len(said) == 3
    assert len(set(said)) == 1
    assert said[0].startswith("the loss Own is no function of sums over the batch (its ")
    assert "\n" not in said[0]


@pytest.mark.parametrize("formula", ACCEPTED)
def test_a_loss_of_totals_is_accepted_and_left_as_it_was(formula: Formula) -> None:
    def accepted(process: Thread) -> tuple[float, int, Any]:
        loss = Own(formula)
        check(loss, ragged("two_stage"), process)
        return float(loss.mean), loss.calls, loss.scale.grad

    assert on_each(3, accepted) == [(0, 0, None)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [*VARIANTS[:6], "--loss_type=arf_v2", "--loss_type=lcron", "--loss_type=sorting"])
def test_every_method_is_accepted_in_its_type(flags: str, dtype: torch.dtype) -> None:
    batch = ragged("three_stage")
    batch = batch.replace({stage: scores.to(dtype) for stage, scores in batch.scores.items()})
    on_each(2, lambda process: check(Method("three_stage", flags).build_weighted(dtype), batch, process))


def test_numbers_that_are_not_finite_are_left_to_the_training() -> None:
    batch = ragged("two_stage")
    spoilt = batch.replace(batch.scores | {"rank": torch.full_like(batch.scores["rank"], torch.inf)})
    on_each(2, lambda process: check(Own(mean_of_requests), spoilt, process))


def test_a_loss_that_draws_random_numbers_is_refused() -> None:
    before = torch.get_rng_state()

    def refused(process: Processes) -> None:
        with pytest.raises(InputError, match=r"the loss Own draws random numbers, .* set whole_batch = True in its cl"):
            check_is_of_totals(Own(noisy), part.scores, part.targets, process)

    part = ragged("two_stage")
    on_each(1, refused)  # the generators are the interpreter's, which threads share
    assert torch.equal(torch.get_rng_state(), before)


# ---- whole_batch = True ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", [*REFUSED, weighted_mean])
def test_the_loss_of_the_whole_batch_is_exact_for_any_formula(formula: Formula) -> None:
    batch = ragged("two_stage", num_requests=11)
    alone = Own(formula)
    leaf = batch.scores["rank"].clone().requires_grad_()
    expected = alone({"rank": leaf}, batch.targets)["loss"]
    expected.backward()

    def shared(process: Thread) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, part = WholeOwn(formula), slice_of(batch, process.rank, process.count)
        check(loss, batch, process)
        own = part.scores["rank"].clone().requires_grad_()
        total = global_terms(loss, {"rank": own}, part.targets, process)["loss"]
        (total / process.count).backward()
        assert own.grad is not None
        assert loss.scale.grad is not None
        return total.detach(), nn.functional.pad(own.grad, (0, 14 - own.shape[1])), loss.scale.grad, loss.mean

    for count in (2, 3):
        values, gradients, scales, means = zip(*on_each(count, shared), strict=True)
        for value, mean in zip(values, means, strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(mean, alone.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.cat(gradients), leaf.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.stack(scales).sum(), alone.scale.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("setting", BOTH)
def test_the_whole_batch_is_gathered_by_rank(setting: str) -> None:
    batch = ragged(setting, num_requests=5)

    def gathered(process: Thread) -> None:
        part = slice_of(batch, process.rank, process.count)
        rows, scores, targets = whole_batch(part.scores, part.targets, process)
        assert rows == slice(5 * process.rank // 3, 5 * (process.rank + 1) // 3)
        items = targets.mask.shape[1]
        assert torch.equal(targets.mask, batch.targets.mask[:, :items])
        assert not batch.targets.mask[:, items:].any()
        for stage, values in scores.items():
            assert torch.equal(values[targets.mask], batch.scores[stage][:, :items][targets.mask])
        for name in ("labels", "group"):
            ours, theirs = getattr(targets, name), getattr(batch.targets, name)[:, :items]
            assert torch.equal(ours[targets.mask], theirs[targets.mask])

    on_each(3, gathered)


def test_random_numbers_of_the_whole_batch_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share PyTorch's generator, so each process here has its part of the batch after the other's exchange:
    the states that are exchanged are the first's, whatever the others' are."""
    batch = ragged("two_stage", num_requests=6)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    expected = Own(noisy)(batch.scores, batch.targets)["loss"].item()
    after = torch.get_rng_state()

    class Others:
        """The first process has requests 0 to 5, the second none; seen from ``rank``."""

        count = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def all_sum(self, tensor: Tensor) -> None:
            if tensor.dtype == torch.uint8 and self.rank == 1:
                assert not tensor.any()
                tensor.copy_(state)
            elif tensor.shape == (2, 2) and self.rank == 1:
                tensor[0] = torch.tensor(batch.targets.mask.shape)
            elif tensor.dtype == torch.int64 and self.rank == 1:
                tensor.copy_(torch.stack([batch.targets.labels, batch.targets.group, batch.targets.mask.long()]))
            elif self.rank == 1:
                tensor.copy_(batch.scores["rank"].unsqueeze(0))

        def all_max(self, tensor: Tensor) -> None:
            raise AssertionError

    for rank, seed, left in ((0, 5, after), (1, 77, torch.Generator().manual_seed(77).get_state())):
        part = batch if rank == 0 else batch.take(slice(6, 6))
        torch.manual_seed(seed)
        scores = {"rank": part.scores["rank"]}
        assert global_terms(WholeOwn(noisy), scores, part.targets, Others(rank))["loss"].item() == expected
        assert torch.equal(torch.get_rng_state(), left)


def test_all_processes_end_with_the_parameters_gradient_of_one() -> None:
    """Of a method with trained weights: global_terms takes the totals, as the class does not ask for the batch."""
    method, batch = Method("two_stage", "--loss_type=lcron"), ragged("two_stage")
    whole = step(method.build_weighted(), batch)

    def shared(process: Thread) -> tuple[Tensor, dict[str, Tensor]]:
        loss, part = method.build_weighted(), slice_of(batch, process.rank, process.count)
        terms = global_terms(loss, part.scores, part.targets, process)
        (terms["loss"] / process.count).backward()
        return terms["loss"].detach(), {n.removeprefix("weight."): p.grad for n, p in loss.named_parameters()}  # type: ignore[misc]

    values, gradients = zip(*on_each(3, shared), strict=True)
    torch.testing.assert_close(values[1], whole.loss, rtol=1e-12, atol=0)
    for name, expected in whole.weight_grads.items():
        torch.testing.assert_close(torch.stack([g[name] for g in gradients]).sum(), expected, rtol=1e-12, atol=1e-14)
