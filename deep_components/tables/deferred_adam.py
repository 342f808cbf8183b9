"""Adam for embedding tables: dense semantics at the cost of the rows touched.

Dense Adam moves a row by its momentum long after its last gradient; torch.optim.SparseAdam leaves that out and is
another algorithm. But the drift of an untouched row is a known function of its state, so it can be applied when the row
is next read. From step s to t = s + k without a gradient, with r = b1 / sqrt(b2):

    p_t = p_s - lr m_s [F(s; v_s) - b1^k F(t; b2^k v_s)],  m_t = b1^k m_s,  v_t = b2^k v_s
    F(t; v) = sum_{i >= 1} mu_i(t) / (sqrt(v) + eps g_i(t))
    mu_i(t) = r^i sqrt(1 - b2^(t+i)) / (1 - b1^(t+i)),  g_i(t) = sqrt(1 - b2^(t+i)) b2^(-i/2)

The sum telescopes, so this is exact. F is a Stieltjes function of eps / sqrt(v): an n-node Gauss rule, fitted once for
every step t, gives F(t; v) = sum_n W_n(t) / (sqrt(v) + eps G_n(t)), with 6 nodes to 2e-8 for every v and t >= 1.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.kernels import Kernels

_NODES = 6
_TERMS = 600  # of the sum over i: r^600 < 1e-27
_STEPS_AT_A_TIME = 2048  # rules are fitted in blocks of so many steps


class DriftRule:
    """Nodes and weights of F(t; v) for t = 0, 1, 2, ..., fitted as far as they are asked for.

    Args:
        betas: Adam's, of the bias correction.
        decays: what the moments are really multiplied by: float32 Adam uses 1 - float32(1 - b1) and float32(b2).
    """

    def __init__(self, betas: tuple[float, float], decays: tuple[float, float]) -> None:
        self.betas, self.decays = betas, decays
        self.weights = np.empty((0, _NODES))
        self.nodes = np.empty((0, _NODES))

    def extend(self, steps: int) -> None:
        """Have the rules of t = 0 .. steps - 1 at least."""
        while len(self.weights) < steps:
            first = len(self.weights)
            weights, nodes = self._fit(np.arange(first, first + _STEPS_AT_A_TIME))
            self.weights, self.nodes = np.vstack([self.weights, weights]), np.vstack([self.nodes, nodes])

    def series(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mu_i(t) and g_i(t), [len(t), _TERMS] each."""
        (b1, b2), (decay1, decay2) = self.betas, self.decays
        i = np.arange(1, _TERMS + 1, dtype=float)
        step = t[:, None] + i
        root = np.sqrt(1 - b2**step)
        return (decay1 / np.sqrt(decay2)) ** i * root / (1 - b1**step), root * decay2 ** (-i / 2)

    def _fit(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gauss rules for the measures sum_i mu_i delta(g_i), in xi = (g0 - g) / (g0 + g), which makes 1 / (a + eps g)
        a ratio of linear functions of xi on [-1, 1]; by Lanczos with re-orthogonalisation (Golub and Welsch, 1969)."""
        mu, g = self.series(t)
        total = mu.sum(axis=1, keepdims=True)
        scale = np.exp((mu * np.log(g)).sum(axis=1, keepdims=True) / total)  # g0
        xi = (scale - g) / (scale + g)
        basis = [np.sqrt(mu / total)]
        jacobi = np.zeros((len(t), _NODES, _NODES))
        for n in range(_NODES):
            vector = xi * basis[n]
            jacobi[:, n, n] = (vector * basis[n]).sum(axis=1)
            for _ in range(2):
                for known in basis:
                    vector = vector - (vector * known).sum(axis=1, keepdims=True) * known
            if n + 1 < _NODES:
                length = np.sqrt((vector * vector).sum(axis=1))
                jacobi[:, n, n + 1] = jacobi[:, n + 1, n] = length
                basis.append(vector / length[:, None])
        values, vectors = np.linalg.eigh(jacobi)
        return total * vectors[:, 0, :] ** 2, scale * (1 - values) / (1 + values)


@cache
def _drift_rule(betas: tuple[float, float], decays: tuple[float, float]) -> DriftRule:
    """Fitted once a process: it depends on nothing else."""
    return DriftRule(betas, decays)


class DeferredAdam:
    """Adam (no weight decay, constant lr) over embedding tables, equal to dense torch.optim.Adam.

    A step reads the rows it needs by :meth:`gather`, which brings them up to date, computes their gradients, and hands
    them to :meth:`step`. :meth:`flush` brings whole tables up to date, before anything else reads them. Tables may lie
    elsewhere than the computation: in host memory, say, while only a batch's rows travel to a GPU.

    Args:
        tables: name -> parameter [rows, d].
        lr: learning rate.
        betas: decay of the two moments.
        eps: Adam's epsilon.
        kernels: compiled loops for tables of their type on a CPU.
    """

    def __init__(
        self,
        tables: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        kernels: Kernels | None = None,
    ) -> None:
        self.tables, self.lr, self.betas, self.eps, self.kernels = dict(tables), lr, betas, eps, kernels
        self.steps = 0
        self.first = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.second = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.last = {
            name: torch.zeros(len(table), dtype=torch.int32, device=table.device) for name, table in self.tables.items()
        }
        self._fitted: dict[tuple[torch.dtype, torch.device], _Fitted] = {}

    @torch.no_grad()
    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Bring the given distinct rows [U] int64 of a table to the current step; their values [U, d]."""
        table, last = self.tables[name], self.last[name]
        rows = rows.to(table.device, non_blocking=True)
        fitted, moments = self._rule(table), (self.first[name], self.second[name])
        if self.kernels is not None:
            rule, kept = (fitted.weights, fitted.nodes), (fitted.kept_first, fitted.kept_second)
            return self.kernels.catch_up(rows, table.detach(), moments, last, self.steps, rule, kept, self.lr, self.eps)
        since = last[rows].long()
        k = self.steps - since
        m, v = moments[0][rows], moments[1][rows]
        kept_first, kept_second = (kept[k].unsqueeze(-1) for kept in (fitted.kept_first, fitted.kept_second))
        root = v.sqrt()
        before = _rule_sum(fitted.weights[since], fitted.nodes[since], root, self.eps)
        after = _rule_sum(fitted.weights[self.steps], fitted.nodes[self.steps], root * kept_second.sqrt(), self.eps)
        drift = self.lr * m * (before - kept_first * after)
        values = table[rows] - torch.where(k.unsqueeze(-1) > 0, drift, 0)
        table[rows] = values
        moments[0][rows], moments[1][rows] = m * kept_first, v * kept_second
        last[rows] = self.steps
        return values

    @torch.no_grad()
    def step(self, gradients: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """One Adam step. ``gradients``: table -> rows [U] that :meth:`gather` has brought up to date, and their
        gradients [U, d]; every other row is left to its momentum."""
        self.steps += 1
        b1, b2 = self.betas
        for name, (rows, gradient) in gradients.items():
            table, moments = self.tables[name], (self.first[name], self.second[name])
            rows, gradient = rows.to(table.device, non_blocking=True), gradient.to(table.device)
            if self.kernels is not None:
                self.kernels.adam_rows(
                    rows, table.detach(), moments, self.last[name], self.steps, gradient.contiguous(), self.lr,
                    self.betas, self.eps,
                )  # fmt: skip
                continue
            m = moments[0][rows].lerp_(gradient, 1 - b1)
            v = moments[1][rows].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            denominator = (v.sqrt() / (1 - b2**self.steps) ** 0.5).add_(self.eps)
            table[rows] -= m / denominator * (self.lr / (1 - b1**self.steps))
            moments[0][rows], moments[1][rows] = m, v
            self.last[name][rows] = self.steps

    def flush(self, rows_at_a_time: int = 1 << 18) -> None:
        """Bring every row of every table to the current step."""
        for name, table in self.tables.items():
            for start in range(0, len(table), rows_at_a_time):
                self.gather(name, torch.arange(start, min(start + rows_at_a_time, len(table)), device=table.device))

    def _decays(self, dtype: torch.dtype) -> tuple[float, float]:
        """What a moment is multiplied by in a step without gradient, as arithmetic of that type does it."""
        b1, b2 = self.betas
        if dtype == torch.float64:
            return b1, b2
        return 1 - float(np.float32(1 - b1)), float(np.float32(b2))

    def _rule(self, table: Tensor) -> "_Fitted":
        """What the drift up to the current step needs, in the table's type and place."""
        decays = self._decays(table.dtype)
        rule = _drift_rule(self.betas, decays)
        key = (table.dtype, table.device)
        if key not in self._fitted or len(self._fitted[key].weights) <= self.steps:
            rule.extend(self.steps + 1)
            steps = np.arange(len(rule.weights))
            parts = (rule.weights, rule.nodes, decays[0] ** steps, decays[1] ** steps)
            self._fitted[key] = _Fitted(*(torch.from_numpy(part).to(table) for part in parts))
        return self._fitted[key]


class _Fitted(NamedTuple):
    """W and G of steps 0, 1, ... [steps, nodes], and what 0, 1, ... steps leave of the moments [steps]."""

    weights: Tensor
    nodes: Tensor
    kept_first: Tensor
    kept_second: Tensor


def _rule_sum(weights: Tensor, nodes: Tensor, root: Tensor, eps: float) -> Tensor:
    """sum_n W_n / (root + eps G_n) for every number of ``root`` [rows, d]; W and G are [rows, nodes] or [nodes]."""
    total = torch.zeros_like(root)
    for weight, node in zip(weights.unbind(-1), nodes.unbind(-1), strict=True):
        total += weight.unsqueeze(-1) / (root + eps * node.unsqueeze(-1))
    return total
