"""Gradients of the parameters that every process has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deep_components.distributed.processes import Processes


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], numbers: Tensor, processes: Processes) -> Tensor:
    """Add up the gradients of ``parameters`` over the processes, in one collective with some ``numbers`` [n], whose
    sums are returned. A parameter has no gradient afterwards where no process has one."""
    there = torch.tensor([p.grad is not None for p in parameters], dtype=numbers.dtype, device=numbers.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sizes = [len(numbers), len(there), *(gradient.numel() for gradient in gradients)]
    flat = processes.all_sum(torch.cat([numbers, there, *(gradient.flatten() for gradient in gradients)]))
    sums, there, *parts = flat.split(sizes)
    for parameter, part, known in zip(parameters, parts, there.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if known else None
    return sums
