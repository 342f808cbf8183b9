"""Sums over a batch that several processes share, with gradients.

Every process computes the same loss L from the totals of the whole batch and starts its backward pass from L / W, W the
number of processes; gradients of parameters are added afterwards. A process's own sum then gets the gradient of L by
taking W times what reaches its total, without another exchange, and a parameter used behind the totals gets W times
1 / W of its gradient. This holds for any function of totals and parameters.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Processes(Protocol):
    """What the losses' side needs of the processes."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def count(self) -> int:
        """W."""

    def all_sum(self, tensor: Tensor) -> object:
        """Replace the tensor by the sum of all processes' ones, of one shape and type."""


class _AllSum(torch.autograd.Function):
    """The sum of all processes' values; the gradient is W times the incoming one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.count = processes.count
        total = values.detach().clone()
        processes.all_sum(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.count, None


def all_sum(values: Tensor, processes: Processes) -> Tensor:
    """The sum over the processes of tensors of one shape, with the module's gradient."""
    total: Tensor = _AllSum.apply(values, processes)
    return total


def global_totals(processes: Processes) -> Callable[..., tuple[Tensor, ...]]:
    """What :func:`deep_components.loss.functional.totals_by` takes: each call is one sum in float64 over all processes,
    one more for vectors ``by_number``. Results have the types of the sums given."""

    def reduce(*sums: Tensor, by_number: bool = False) -> tuple[Tensor, ...]:
        if by_number:
            sums = _of_one_length(sums, processes)
        flat = torch.cat([values.reshape(-1).to(torch.float64) for values in sums])
        parts = all_sum(flat, processes).split([values.numel() for values in sums])
        return tuple(part.view(own.shape).to(own.dtype) for part, own in zip(parts, sums, strict=True))

    return reduce


def _of_one_length(sums: tuple[Tensor, ...], processes: Processes) -> tuple[Tensor, ...]:
    """Vectors, with zeros behind them up to the greatest length that one has in any process."""
    lengths = sums[0].new_zeros(processes.count, dtype=torch.int64)
    lengths[processes.rank] = max(len(values) for values in sums)
    processes.all_sum(lengths)
    longest = int(lengths.max())
    return tuple(torch.nn.functional.pad(values, (0, longest - len(values))) for values in sums)
