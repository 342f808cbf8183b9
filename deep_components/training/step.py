"""One optimizer step of a cascade, and all that continuing a training needs.

Names no method. Adam is elementwise and stages share nothing, so one optimizer over all parameters equals one per
stage, and methods that train each stage by its own step are the sum of their losses.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from deep_components.batch import CascadeBatch, SlotFeatures
from deep_components.errors import InputError
from deep_components.kernels import Kernels, use_kernels
from deep_components.tables.deferred_adam import DeferredAdam
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.sparse_adam import SparseAdam
from deep_components.tables.store import EmbeddingStore

ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
LARGE_TABLE = 1 << 20  # about where the two cost the same at a batch of 1,024

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim's names of Adam's two moments


class Trainer:
    """Stage models, their embedding stores, a loss and its optimizers; one call of :meth:`step` per batch.

    ``models`` and ``stores`` are by stage, in serving order, on their devices; the parameters of ``loss`` train too.

    * ``optimizer``: "deferred_adam" (dense Adam; ID tables of ``large_table`` rows or more cost what a batch touches of
      them), "adam" (torch's, dense), or "sparse_adam" (torch's SparseAdam for all ID tables: another algorithm).
    * ``kernels``: compiled loops for models and tables on a CPU.
    * ``autocast``: the type that layers compute in where PyTorch's autocast allows it; None for the parameters' own.
    * ``skip_nonfinite``: leave out steps whose loss or gradient is not finite; the device is waited for.

    ``prepare`` rewrites a log's batch for :meth:`step`; a loader's thread may call it ahead.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore], loss: nn.Module, lr: float,
        optimizer: str = "deferred_adam", large_table: int = LARGE_TABLE, kernels: Kernels | None = None,
        autocast: torch.dtype | None = None, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        self.models, self.stores, self.loss = models, stores, loss
        self.autocast, self.skip_nonfinite = autocast, skip_nonfinite
        first = next(iter(stores.values()))
        self.pulled = pulled_tables(first.rows, optimizer, large_table)
        self.prepare = TableLookup(first.schema, first.ids, {table: first.rows[table] for table in self.pulled})
        self.parameters = {f"{stage}/{name}": p for stage in models for name, p in self._stage_parameters(stage)}
        self.parameters |= {f"loss/{name}": p for name, p in loss.named_parameters()}
        pulled = {f"{stage}/embedding.{table}" for stage in models for table in self.pulled}
        dense = [p for name, p in self.parameters.items() if name not in pulled]
        self.device, self.dtype = dense[0].device, dense[0].dtype
        use_kernels([*models.values(), *stores.values()], kernels if self.device.type == "cpu" else None)
        self.dense_optimizer = torch.optim.Adam(dense, lr=lr, **ADAM)
        for store in stores.values():
            for table in self.pulled:
                parameter = store.tables[table]
                compiled = kernels if parameter.device.type == "cpu" else None
                store.optimizers[table] = (
                    SparseAdam(parameter, lr, **ADAM)
                    if optimizer == "sparse_adam"
                    else DeferredAdam(parameter, lr, **ADAM, kernels=compiled)
                )

    def step(self, batch: CascadeBatch[SlotFeatures]) -> dict[str, Tensor]:
        """One optimizer step; returns the loss, its terms and ``gradient_norm.<stage>``, detached and still on the
        device. ``batch`` comes from ``prepare``."""
        self.dense_optimizer.zero_grad(set_to_none=True)
        with record_function("step.pull"):  # names that a profiler shows, benchmarks/step.py among them
            pulled = {stage: self._pull(store, batch.features.rows) for stage, store in self.stores.items()}
        with (
            record_function("step.forward"),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            scores = {
                stage: model(self.stores[stage].embed(batch.features, pulled[stage])).to(self.dtype)
                for stage, model in self.models.items()
            }
        with record_function("step.loss"):
            terms = self.loss(scores, batch.targets)
        with record_function("step.backward"):
            terms["loss"].backward()
        values = {name: term.detach().clone() for name, term in terms.items()}  # a weight is about to change in place
        values |= {f"gradient_norm.{stage}": self._gradient_norm(stage, pulled[stage]) for stage in self.models}
        if self.skip_nonfinite and not all(value.isfinite() for value in values.values()):
            return values
        with record_function("step.optimizer"):
            for stage, store in self.stores.items():
                for table, rows in batch.features.rows.items():
                    gradient = pulled[stage][table].grad
                    store.push(table, rows, torch.zeros_like(pulled[stage][table]) if gradient is None else gradient)
            self.dense_optimizer.step()
        return values

    def _stage_parameters(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """A stage's parameters under their names in checkpoints, tables first."""
        tables = [(f"embedding.{table}", parameter) for table, parameter in self.stores[stage].tables.items()]
        return [*tables, *self.models[stage].named_parameters()]

    def _pull(self, store: EmbeddingStore, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of the batch's distinct rows, as leaves of the step's graph."""
        return {
            table: store.pull(table, distinct).to(self.device, non_blocking=True).requires_grad_()
            for table, distinct in rows.items()
        }

    def _gradient_norm(self, stage: str, pulled: Mapping[str, Tensor]) -> Tensor:
        """Euclidean norm of the loss's gradient with respect to all parameters of the stage."""
        parameters = [*(p for _, p in self._stage_parameters(stage)), *pulled.values()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).norm() if gradients else torch.zeros((), device=self.device)

    def flush(self) -> None:
        """Bring all tables up to date: parameters are then those of dense Adam."""
        for store in self.stores.values():
            store.flush()

    # ---- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from, bit for bit, as named tensors: parameters, buffers, optimizer state, the ids
        of compacted tables, and the state of PyTorch's generators."""
        state = {f"parameter/{name}": value.detach() for name, value in self.parameters.items()}
        state |= {f"buffer/{name}": value for name, value in self._buffers()}
        state |= {f"ids/{table}": torch.from_numpy(known.ids()) for table, known in self.prepare.ids.items()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter, entries in self.dense_optimizer.state.items():
            state |= {f"{key}/{names[id(parameter)]}": torch.as_tensor(value) for key, value in entries.items()}
        for stage, store in self.stores.items():
            for table, optimizer in store.optimizers.items():
                state |= {f"{key}/{stage}/embedding.{table}": value for key, value in optimizer.state().items()}
        state["generator/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["generator/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`state`, also of a training on fewer days: rows of ids it did not know stay as they are.

        InputError when a parameter is missing or has another shape.
        """
        for name, parameter in self.parameters.items():
            self._copy(parameter, state, "parameter", name)
        for name, value in self._buffers():
            self._copy(value, state, "buffer", name)
        self._restore_dense_optimizer(state)
        for stage, store in self.stores.items():
            for table in store.optimizers:
                self._restore_table(stage, table, state)
        try:
            torch.set_rng_state(state["generator/cpu"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise _does_not_fit("generator/cpu is missing or damaged") from error
        if self.device.type == "cuda" and "generator/cuda" in state:
            torch.cuda.set_rng_state(state["generator/cuda"], self.device)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """What a model of one's own keeps beside its parameters, as batch normalisation does."""
        return [
            (f"{stage}/{name}", value)
            for stage, model in self.models.items()
            for name, value in model.state_dict().items()
            if name not in dict(model.named_parameters(remove_duplicate=False))
        ]

    def _restore_dense_optimizer(self, state: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter in self.dense_optimizer.param_groups[0]["params"]:
            name = names[id(parameter)]
            if f"step/{name}" not in state:
                continue
            entries: dict[str, Any] = {key: torch.zeros_like(parameter) for key in _MOMENTS}
            for key, values in entries.items():
                self._copy(values, state, key, name)
            self.dense_optimizer.state[parameter] = {"step": state[f"step/{name}"].clone(), **entries}

    def _restore_table(self, stage: str, table: str, state: Mapping[str, Tensor]) -> None:
        name = f"{stage}/embedding.{table}"
        own = {key: state[f"{key}/{name}"] for key in ("step", *_MOMENTS, "last") if f"{key}/{name}" in state}
        if not own:
            return  # no step has been made
        try:
            rows = None
            if f"ids/{table}" in state and table in self.prepare.ids:
                rows = saved_rows(self.prepare.ids[table], state[f"ids/{table}"], len(own["exp_avg"]))
                if rows is None:
                    raise ValueError("its ids are not those of this log")
            self.stores[stage].optimizers[table].restore(own, rows)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise _does_not_fit(f"{name}: {error}") from error

    def _copy(self, target: Tensor, state: Mapping[str, Tensor], kind: str, name: str) -> None:
        """Copy the saved ``kind/name``; that of a compacted table row by row."""
        saved, table = state.get(f"{kind}/{name}"), name.rpartition("embedding.")[2]
        known = state.get(f"ids/{table}") if "embedding." in name else None
        if saved is not None and known is not None and table in self.prepare.ids:
            rows = saved_rows(self.prepare.ids[table], known, len(saved))
            if rows is None or saved.shape[1:] != target.shape[1:]:
                raise _does_not_fit(f"{name} has other ids or another shape")
            target[rows.to(target.device)] = saved.to(target)
        elif saved is None or saved.shape != target.shape:
            raise _does_not_fit(f"{name} is missing or has another shape")
        else:
            target.copy_(saved)


def _does_not_fit(what: str) -> InputError:
    return InputError(f"the saved state does not fit: {what}; train again")


def saved_rows(known: IdSet, saved_ids: Tensor, count: int) -> Tensor | None:
    """The rows that the saved ids have among ``known`` ones [count]; None when one is missing or they are damaged."""
    ids = saved_ids.numpy()
    if ids.shape != (count,) or (count and (ids.min() < 0 or ids.max() >= known.size)):
        return None
    return torch.from_numpy(known.rows(ids)) if np.all(known.contains(ids)) else None


def pulled_tables(rows: Mapping[str, int], optimizer: str, large_table: int = LARGE_TABLE) -> tuple[str, ...]:
    """The tables of which a step reads and moves the batch's distinct rows alone; ``rows`` are those of each table."""
    limit = {"deferred_adam": large_table, "sparse_adam": 0}.get(optimizer, math.inf)
    return tuple(sorted(table for table, count in rows.items() if count >= limit))
