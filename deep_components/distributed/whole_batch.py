"""Losses that are no function of sums over the batch: how they are found, and computed on several processes."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deep_components.batch import Targets
from deep_components.distributed.totals import Processes, all_sum, global_totals
from deep_components.errors import InputError
from deep_components.loss.functional import totals_by

# Of float32 and of float64: how much of its size a value, and the norm of a gradient, may differ. Sums in another order
# differ by 1e-6 and 1e-15; the mean of the processes' means by 1e-2.
_VALUE_TOLERANCE = {torch.float64: 1e-9}, 1e-4
_GRADIENT_TOLERANCE = {torch.float64: 1e-8}, 1e-3


def global_terms(
    loss: nn.Module, scores: Mapping[str, Tensor], targets: Targets, processes: Processes
) -> dict[str, Tensor]:
    """``loss(scores, targets)`` of the whole batch from this process's part of it: "loss" and its terms, the same in all
    processes. Their backward passes start from "loss" / W and their parameters' gradients are to be added."""
    if getattr(loss, "whole_batch", False):
        return whole_batch_loss(loss, scores, targets, processes)
    with totals_by(global_totals(processes)):
        terms: dict[str, Tensor] = loss(scores, targets)
        return terms


def whole_batch_loss(
    loss: nn.Module, scores: Mapping[str, Tensor], targets: Targets, processes: Processes
) -> dict[str, Tensor]:
    """The loss of the scores of all processes, computed by each: exact for any loss. Where it draws random numbers, all
    draw those of the first process."""
    _, whole_scores, whole_targets = whole_batch(scores, targets, processes)
    with totals_by(None), _generators_of_the_first(processes, whole_targets.mask.device):
        terms: dict[str, Tensor] = loss(whole_scores, whole_targets)
        return terms


def whole_batch(
    scores: Mapping[str, Tensor], targets: Targets, processes: Processes
) -> tuple[slice, dict[str, Tensor], Targets]:
    """The requests of all processes, by rank, with as many items as the longest has; further items are missing.

    Returns:
        This process's rows, stage -> scores [B, N] with their gradients, and targets.
    """
    rows, shape = _shape_of_all(targets.mask, processes)
    integers = torch.stack([targets.labels, targets.group, targets.mask.to(torch.int64)])
    labels, group, mask = all_sum(_padded(integers, rows, shape), processes)
    values = all_sum(_padded(torch.stack(list(scores.values())), rows, shape), processes)
    return rows, dict(zip(scores, values.unbind(), strict=True)), Targets(labels, mask.bool(), group)


def _shape_of_all(mask: Tensor, processes: Processes) -> tuple[slice, tuple[int, int]]:
    """This process's rows in the whole batch, and the batch's shape."""
    shapes = mask.new_zeros(processes.count, 2, dtype=torch.int64)
    shapes[processes.rank] = torch.tensor(mask.shape)
    processes.all_sum(shapes)
    requests, items = zip(*shapes.tolist(), strict=True)
    first = sum(requests[: processes.rank])
    return slice(first, first + len(mask)), (sum(requests), max(items))


def _padded(values: Tensor, rows: slice, shape: tuple[int, int]) -> Tensor:
    """Values [..., b, n] at their rows of [..., B, N], 0 elsewhere."""
    right, below = shape[1] - values.shape[-1], shape[0] - rows.stop
    return nn.functional.pad(values, (0, right, rows.start, below))


# ---- random numbers --------------------------------------------------------------------------------------------------


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _fork(device: torch.device) -> Any:
    """A context after which PyTorch's generators are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _generators_of_the_first(processes: Processes, device: torch.device) -> Iterator[None]:
    """Random numbers are those that the first process draws, whose generators go on; the others' are left alone."""
    states = [state.to(device) if processes.rank == 0 else torch.zeros_like(state, device=device)
              for state in _generator_states(device)]  # fmt: skip
    for state in states:
        processes.all_sum(state)
    if processes.rank == 0:
        yield
        return
    with _fork(device):
        torch.set_rng_state(states[0].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1].cpu(), device)
        yield


# ---- is it a function of sums? ---------------------------------------------------------------------------------------


def check_is_of_totals(loss: nn.Module, scores: Mapping[str, Tensor], targets: Targets, processes: Processes) -> None:
    """InputError, in all processes, unless the loss from the totals of the processes is the whole batch's: its value,
    its terms, its buffers, and its gradients with respect to the scores and its parameters.

    Nothing else changes: the loss runs on copies of its parameters and buffers, the generators are as before. A loss
    that draws random numbers cannot be compared and is refused. One with ``whole_batch`` needs no comparison. Where
    numbers are not finite nothing is said.
    """
    if getattr(loss, "whole_batch", False):
        return
    own = {stage: values.detach().requires_grad_() for stage, values in scores.items()}
    with torch.no_grad():
        rows, whole_scores, whole_targets = whole_batch(own, targets, processes)
    whole = {stage: values.requires_grad_() for stage, values in whole_scores.items()}
    device, before = targets.mask.device, _generator_states(targets.mask.device)
    with _fork(device):
        with totals_by(global_totals(processes)):
            ours = _evaluated(loss, own, targets, processes)
        drawn = any(not torch.equal(*pair) for pair in zip(before, _generator_states(device), strict=True))
        with totals_by(None):
            theirs = _evaluated(loss, whole, whole_targets, None)
    items = targets.mask.shape[1]
    expected = {what: values[rows, :items] if what[0] == _SCORES else values for what, values in theirs.items()}
    different = _differences(ours, expected, drawn, processes)
    if different:
        raise InputError(
            f"the loss {type(loss).__name__} {different}; to train it on {processes.count} processes, sum requests "
            "with masked_mean or batch_totals (docs/library.md), or set whole_batch = True in its class"
        )


_VALUES, _SCORES, _PARAMETERS = "value", "gradient of the scores", "gradient of the parameter"


def _evaluated(
    loss: nn.Module, scores: dict[str, Tensor], targets: Targets, processes: Processes | None
) -> dict[tuple[str, str], Tensor]:
    """(kind, name) -> all that a loss gives, on copies of its parameters and buffers; gradients added up."""
    parameters = {name: values.detach().clone().requires_grad_() for name, values in loss.named_parameters()}
    buffers = {name: values.detach().clone() for name, values in loss.named_buffers()}
    # The shallow copy takes what forward sets, a counter of steps perhaps.
    terms = torch.func.functional_call(copy.copy(loss), {**parameters, **buffers}, (scores, targets))
    leaves = {(_SCORES, stage): values for stage, values in scores.items()}
    leaves |= {(_PARAMETERS, name): values for name, values in parameters.items()}
    count = 1 if processes is None else processes.count
    found = torch.autograd.grad(terms["loss"] / count, list(leaves.values()), allow_unused=True)
    gradients = {
        what: torch.zeros_like(leaf) if gradient is None else gradient
        for (what, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    for (kind, _), gradient in gradients.items():
        if processes is not None and kind == _PARAMETERS:
            processes.all_sum(gradient)
    values = {(_VALUES, name): value.detach() for name, value in {**buffers, **terms}.items()}
    return {**values, **gradients}


def _differences(
    ours: Mapping[tuple[str, str], Tensor],
    theirs: Mapping[tuple[str, str], Tensor],
    drawn: bool,
    processes: Processes,
) -> str:
    """What is wrong, as a part of a sentence, the same in all processes; "" where nothing is."""
    dtype = ours[_VALUES, "loss"].dtype
    rows = [
        torch.stack([(ours[what] - theirs[what]).double().norm() ** 2, theirs[what].double().norm() ** 2])
        for what in theirs
    ]
    table = torch.stack([*rows, rows[0].new_tensor([float(drawn), 0])])
    processes.all_sum(table)
    *squares, (draws, _) = table.tolist()
    if draws:
        return "draws random numbers, of which each process has its own"
    if not all(math.isfinite(value) for row in squares for value in row):
        return ""
    norms = {what: (math.sqrt(error), math.sqrt(size)) for what, (error, size) in zip(theirs, squares, strict=True)}
    for (kind, name), (error, size) in norms.items():
        by_type, otherwise = _VALUE_TOLERANCE if kind == _VALUES else _GRADIENT_TOLERANCE
        scale = max(n for (k, _), (_, n) in norms.items() if k == kind or (kind == _PARAMETERS and k == _VALUES))
        if error > by_type.get(dtype, otherwise) * size + 100 * torch.finfo(dtype).eps * scale:
            return f"is no function of sums over the batch (its {kind} {name} differs)"
    return ""
