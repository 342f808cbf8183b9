"""torch.optim.SparseAdam over one embedding table: only rows with a gradient move. Another algorithm than dense Adam,
kept for comparison (--optimizer=sparse_adam)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SparseAdam:
    """As :class:`deep_components.tables.deferred_adam.DeferredAdam`, but untouched rows do not drift."""

    def __init__(self, table: nn.Parameter, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.table = table
        self.optimizer = torch.optim.SparseAdam([table], lr=lr, betas=betas, eps=eps)

    def gather(self, rows: Tensor) -> Tensor:
        """Values [U, d] of distinct rows [U] int64."""
        return self.table.detach()[rows.to(self.table.device)]

    peek = gather

    def values(self) -> Tensor:
        """The table."""
        return self.table.detach()

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of the rows [U] with gradients [U, d]."""
        rows, gradient = rows.to(self.table.device).unsqueeze(0), gradient.to(self.table.device)
        self.table.grad = torch.sparse_coo_tensor(rows, gradient, self.table.shape, check_invariants=False)
        self.optimizer.step()
        self.table.grad = None

    def flush(self) -> None:
        """Nothing is deferred."""

    def state(self) -> dict[str, Tensor]:
        """Steps and moments, empty before the first step."""
        return {name: torch.as_tensor(value) for name, value in self.optimizer.state.get(self.table, {}).items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """The reverse of :meth:`state`; ``rows`` are those of the saved ones in this table, None when all in order."""
        index = slice(None) if rows is None else rows.to(self.table.device)
        moments = {name: torch.zeros_like(self.table) for name in ("exp_avg", "exp_avg_sq")}
        for name, moment in moments.items():
            moment[index] = state[name].to(moment)
        self.optimizer.state[self.table] = {"step": int(state["step"]), **moments}
