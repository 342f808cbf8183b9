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

import numpy as np
import torch
from torch import Tensor, nn

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


class DeferredAdam:
    """Adam (no weight decay, constant lr) over embedding tables with sparse gradients, equal to dense torch.optim.Adam.

    Before the forward pass the rows it will read are brought up to date (:meth:`catch_up`); after the backward pass
    :meth:`step` updates the rows that have gradients. :meth:`flush` brings whole tables up to date, before they are
    saved or read by anything else.

    Args:
        tables: name -> parameter [rows, d], whose gradient is a sparse tensor (embedding(..., sparse=True)).
        lr: learning rate.
        betas: decay of the two moments.
        eps: Adam's epsilon.
    """

    def __init__(
        self,
        tables: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.tables, self.lr, self.betas, self.eps = dict(tables), lr, betas, eps
        self.steps = 0
        self.first = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.second = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.last = {
            name: torch.zeros(len(table), dtype=torch.int32, device=table.device) for name, table in self.tables.items()
        }
        self._rules: dict[torch.dtype, DriftRule] = {}
        self._fitted: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def catch_up(self, name: str, rows: Tensor) -> None:
        """Bring the given distinct rows of a table to the current step."""
        behind = rows[(self.last[name][rows] < self.steps)]
        if not len(behind):
            return
        table, first, second = self.tables[name], self.first[name], self.second[name]
        weights, nodes = self._rule(table)
        decay1, decay2 = self._decays(table.dtype)
        since = self.last[name][behind].long()
        m, v = first[behind], second[behind]
        k = (self.steps - since).to(table.dtype).unsqueeze(-1)
        kept, kept_second = decay1**k, decay2**k
        root = v.sqrt()
        before = _rule_sum(weights[since], nodes[since], root, self.eps)
        after = _rule_sum(weights[self.steps], nodes[self.steps], root * kept_second.sqrt(), self.eps)
        table[behind] -= self.lr * m * (before - kept * after)
        first[behind] = m * kept
        second[behind] = v * kept_second
        self.last[name][behind] = self.steps

    @torch.no_grad()
    def step(self) -> None:
        """One Adam step of the rows with gradients, which must be caught up; clears the gradients."""
        self.steps += 1
        b1, b2 = self.betas
        for name, table in self.tables.items():
            if table.grad is None:
                continue
            gradient = table.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            m = self.first[name][rows].lerp_(values, 1 - b1)
            v = self.second[name][rows].mul_(b2).addcmul_(values, values, value=1 - b2)
            denominator = (v.sqrt() / (1 - b2**self.steps) ** 0.5).add_(self.eps)
            table[rows] -= m / denominator * (self.lr / (1 - b1**self.steps))
            self.first[name][rows], self.second[name][rows] = m, v
            self.last[name][rows] = self.steps
            table.grad = None

    def state(self) -> dict[str, Tensor]:
        """The state of flushed tables as named tensors: the moments and the number of steps."""
        moments = {f"{name}/first": value for name, value in self.first.items()}
        moments |= {f"{name}/second": value for name, value in self.second.items()}
        return moments | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`state`; a state without tables leaves everything at the beginning."""
        self.steps = int(state["steps"]) if "steps" in state else 0
        for name in self.tables:
            self.first[name].copy_(state[f"{name}/first"])
            self.second[name].copy_(state[f"{name}/second"])
            self.last[name].fill_(self.steps)

    def flush(self, rows_at_a_time: int = 1 << 18) -> None:
        """Bring every row of every table to the current step."""
        for name, table in self.tables.items():
            for start in range(0, len(table), rows_at_a_time):
                rows = torch.arange(start, min(start + rows_at_a_time, len(table)), device=table.device)
                self.catch_up(name, rows)

    def _decays(self, dtype: torch.dtype) -> tuple[float, float]:
        """What a moment is multiplied by in a step without gradient, as arithmetic of that type does it."""
        b1, b2 = self.betas
        if dtype == torch.float64:
            return b1, b2
        return 1 - float(np.float32(1 - b1)), float(np.float32(b2))

    def _rule(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """W and G of all steps up to now, [steps, nodes], in the table's type and place."""
        rule = self._rules.setdefault(table.dtype, DriftRule(self.betas, self._decays(table.dtype)))
        key = (table.dtype, table.device)
        if key not in self._fitted or len(self._fitted[key][0]) <= self.steps:
            rule.extend(self.steps + 1)
            self._fitted[key] = (
                torch.from_numpy(rule.weights).to(table),
                torch.from_numpy(rule.nodes).to(table),
            )
        return self._fitted[key]


def _rule_sum(weights: Tensor, nodes: Tensor, root: Tensor, eps: float) -> Tensor:
    """sum_n W_n / (root + eps G_n) for every number of ``root`` [rows, d]; W and G are [rows, nodes] or [nodes]."""
    total = torch.zeros_like(root)
    for weight, node in zip(weights.unbind(-1), nodes.unbind(-1), strict=True):
        total += weight.unsqueeze(-1) / (root + eps * node.unsqueeze(-1))
    return total
