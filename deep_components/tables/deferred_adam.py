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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.kernels import Kernels

_NODES = 6
_TERMS = 600  # of the sum over i: r^600 < 1e-27
_STEPS_AT_A_TIME = 2048  # rules are fitted in blocks of so many steps


class DriftRule:
    """Nodes and weights of F(t; v) for t = 0, 1, 2, ..., fitted as far as they are asked for. ``betas`` are Adam's, of
    the bias correction; ``decays`` what the moments are really multiplied by (:func:`_decays`)."""

    def __init__(self, betas: tuple[float, float], decays: tuple[float, float]) -> None:
        self.betas, self.decays = betas, decays
        self.weights, self.nodes = np.empty((0, _NODES)), np.empty((0, _NODES))

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


class DeferredAdam:
    """Adam (no weight decay, constant lr) over one embedding table, equal to dense torch.optim.Adam.

    A step reads the rows it needs by :meth:`gather`, which brings them up to date, and hands their gradients to
    :meth:`step`. :meth:`flush` brings the whole table up to date, before anything else reads it. The table [rows, d]
    may lie elsewhere than the computation: in host memory, say, while only a batch's rows travel to a GPU. ``kernels``
    are compiled loops for a table of their type on a CPU.

    Attributes: ``steps`` made so far; Adam's moments ``first`` and ``second`` [rows, d]; ``last`` [rows] int32, the
    step that each row was last brought to.
    """

    def __init__(
        self, table: nn.Parameter, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        kernels: Kernels | None = None,
    ) -> None:  # fmt: skip
        self.table, self.lr, self.betas, self.eps, self.kernels = table, lr, betas, eps, kernels
        self.steps = 0
        self.first, self.second = torch.zeros_like(table), torch.zeros_like(table)
        self.last = torch.zeros(len(table), dtype=torch.int32, device=table.device)

    @torch.no_grad()
    def gather(self, rows: Tensor) -> Tensor:
        """Bring the given distinct rows [U] int64 to the current step; their values [U, d]."""
        # A copy to the host that nobody waits for would be read before it is there.
        rows = rows.to(self.table.device, non_blocking=self.table.is_cuda)
        fitted, moments = _fitted(self.table, self.betas, self.steps), (self.first, self.second)
        if self.kernels is not None:
            table, rule, kept = self.table.detach(), fitted[:2], fitted[2:]
            return self.kernels.catch_up(rows, table, moments, self.last, self.steps, rule, kept, self.lr, self.eps)
        since = self.last[rows].long()
        k = self.steps - since
        m, v = self.first[rows], self.second[rows]
        kept_first, kept_second = (kept[k].unsqueeze(-1) for kept in (fitted.kept_first, fitted.kept_second))
        root = v.sqrt()
        before = _rule_sum(fitted.weights[since], fitted.nodes[since], root, self.eps)
        after = _rule_sum(fitted.weights[self.steps], fitted.nodes[self.steps], root * kept_second.sqrt(), self.eps)
        drift = self.lr * m * (before - kept_first * after)
        values = self.table[rows] - torch.where(k.unsqueeze(-1) > 0, drift, 0)
        self.table[rows] = values
        self.first[rows], self.second[rows] = m * kept_first, v * kept_second
        self.last[rows] = self.steps
        return values

    @torch.no_grad()
    def peek(self, rows: Tensor) -> Tensor:
        """What :meth:`gather` would give, to the bit; the table stays as it is. For a row that is brought up to date in
        two parts is rounded otherwise than one that is in one."""
        rows = rows.to(self.table.device)
        copies = DeferredAdam(nn.Parameter(self.table.detach()[rows]), self.lr, self.betas, self.eps, self.kernels)
        copies.steps, copies.last = self.steps, self.last[rows]
        copies.first, copies.second = self.first[rows], self.second[rows]
        return copies.gather(torch.arange(len(rows), device=rows.device))

    def values(self, rows_at_a_time: int = 1 << 18) -> Tensor:
        """The current values of the whole table: the table itself where all of its rows are up to date, else a copy."""
        table = self.table.detach()
        if bool((self.last == self.steps).all()):
            return table
        whole = torch.empty_like(table)
        for part, rows in zip(whole.split(rows_at_a_time), torch.arange(len(table)).split(rows_at_a_time), strict=True):
            part.copy_(self.peek(rows))
        return whole

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One Adam step: rows [U] that :meth:`gather` has brought up to date, and their gradients [U, d]; every other
        row is left to its momentum."""
        self.steps += 1
        b1, b2 = self.betas
        rows = rows.to(self.table.device, non_blocking=self.table.is_cuda)
        gradient = gradient.to(self.table.device)
        if self.kernels is not None:
            self.kernels.adam_rows(
                rows, self.table.detach(), (self.first, self.second), self.last, self.steps, gradient.contiguous(),
                self.lr, self.betas, self.eps,
            )  # fmt: skip
            return
        m = self.first[rows].lerp_(gradient, 1 - b1)
        v = self.second[rows].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        denominator = (v.sqrt() / (1 - b2**self.steps) ** 0.5).add_(self.eps)
        self.table[rows] -= m / denominator * (self.lr / (1 - b1**self.steps))
        self.first[rows], self.second[rows] = m, v
        self.last[rows] = self.steps

    def flush(self, rows_at_a_time: int = 1 << 18) -> None:
        """Bring every row to the current step."""
        for start in range(0, len(self.table), rows_at_a_time):
            stop = min(start + rows_at_a_time, len(self.table))
            self.gather(torch.arange(start, stop, device=self.table.device))

    def state(self) -> dict[str, Tensor]:
        """Moments under torch.optim.Adam's names, and where the rows stand."""
        step = torch.tensor(float(self.steps))
        return {"step": step, "exp_avg": self.first, "exp_avg_sq": self.second, "last": self.last}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """The reverse of :meth:`state`, or of the state of a dense torch.optim.Adam, which brings all rows to one step.

        ``rows`` [saved rows] int64 are those of the saved ones in this table; None when all, in their order. ValueError
        when the state cannot be that of this table.
        """
        self.steps = int(state["step"])
        index = slice(None) if rows is None else rows.to(self.table.device)
        last = state["last"] if "last" in state else torch.full((len(state["exp_avg"]),), self.steps)
        if len(last) and not 0 <= int(last.min()) <= int(last.max()) <= self.steps:
            raise ValueError("last names steps that were never made")
        self.last.fill_(self.steps)
        for target, saved in ((self.first, state["exp_avg"]), (self.second, state["exp_avg_sq"]), (self.last, last)):
            target[index] = saved.to(target)


def _decays(betas: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """What a moment is multiplied by in a step without gradient, as arithmetic of that type does it."""
    b1, b2 = betas
    return (b1, b2) if dtype == torch.float64 else (1 - float(np.float32(1 - b1)), float(np.float32(b2)))


class _Fitted(NamedTuple):
    """W and G of steps 0, 1, ... [steps, nodes], and what 0, 1, ... steps leave of the moments [steps]."""

    weights: Tensor
    nodes: Tensor
    kept_first: Tensor
    kept_second: Tensor


_rules: dict[tuple[float, ...], DriftRule] = {}  # fitted once a process: a rule depends on nothing else
_on_device: dict[tuple[Any, ...], _Fitted] = {}


def _fitted(table: Tensor, betas: tuple[float, float], steps: int) -> _Fitted:
    """What the drift up to step number ``steps`` needs, in the table's type and on its device."""
    decays = _decays(betas, table.dtype)
    rule = _rules.setdefault((*betas, *decays), DriftRule(betas, decays))
    key = (*betas, table.dtype, table.device)
    if key not in _on_device or len(_on_device[key].weights) <= steps:
        rule.extend(steps + 1)
        powers = np.arange(len(rule.weights))
        parts = (rule.weights, rule.nodes, decays[0] ** powers, decays[1] ** powers)
        _on_device[key] = _Fitted(*(torch.from_numpy(part).to(table) for part in parts))
    return _on_device[key]


def _rule_sum(weights: Tensor, nodes: Tensor, root: Tensor, eps: float) -> Tensor:
    """sum_n W_n / (root + eps G_n) for every number of ``root`` [rows, d]; W and G are [rows, nodes] or [nodes]."""
    total = torch.zeros_like(root)
    for weight, node in zip(weights.unbind(-1), nodes.unbind(-1), strict=True):
        total += weight.unsqueeze(-1) / (root + eps * node.unsqueeze(-1))
    return total
