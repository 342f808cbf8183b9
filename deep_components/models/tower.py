"""The fully connected part that all stage models have."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_components.kernels import Kernels


def tower(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1] with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run_tower(layers: nn.Sequential, inputs: Tensor, kernels: Kernels | None, shared: Tensor | None = None) -> Tensor:
    """The output of a :func:`tower`, [..., N, widths[-1]], for ``inputs`` [..., N, widths[0]].

    With ``shared`` [..., S], the first features, which all N have in common, ``inputs`` are the others; the part of the
    shared ones is computed once. ``kernels``: compiled loops for a CPU; None for PyTorch's operators.
    """
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    hidden = inputs
    for index, layer in enumerate(linear[:-1]):
        weight: Tensor = layer.weight
        bias: Tensor = layer.bias
        if shared is not None and index == 0:
            width = shared.shape[-1]
            weight, bias = weight[:, width:], F.linear(shared, weight[:, :width], bias)
        hidden = _linear_relu(hidden, weight, bias, kernels)
    return linear[-1](hidden)


def _linear_relu(inputs: Tensor, weight: Tensor, bias: Tensor, kernels: Kernels | None) -> Tensor:
    """ReLU(inputs weight^T + bias) for inputs [..., N, I]; bias is [H], or [..., H] for one per N."""
    if kernels is None or torch.is_autocast_enabled(inputs.device.type):
        if bias.dim() == 1:
            return F.linear(inputs, weight, bias).relu()
        return (F.linear(inputs, weight) + bias.unsqueeze(-2)).relu()
    flat = inputs.flatten(0, -2)  # also of width 0, for a schema without fields of the request and its history
    out = _CompiledLinearReLU.apply(kernels, flat, weight, bias.reshape(-1, bias.shape[-1]))
    return out.view(*inputs.shape[:-1], -1)


class _CompiledLinearReLU(torch.autograd.Function):
    """Bias, ReLU and their backward in one pass over the activations each."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = inputs @ weight.t()
        kernels.bias_relu(out, bias.contiguous())
        ctx.kernels, ctx.groups = kernels, len(bias)
        ctx.save_for_backward(inputs, weight, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, out = ctx.saved_tensors
        passed, grad_bias = ctx.kernels.relu_backward(out, grad.contiguous(), ctx.groups)
        return None, passed @ weight, passed.t() @ inputs, grad_bias


def mean_history(history: Tensor, history_mask: Tensor) -> Tensor:
    """Sum of all L history embeddings [B, L, W] divided by max(number of events, 1): [B, W].

    Padding positions take part in the sum: they look up row 0, which is zero in every table but category_one's.
    """
    events = history_mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [B, 1]
    return history.sum(dim=1) / events.to(history.dtype)
