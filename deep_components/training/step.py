"""One optimizer step of a cascade, and all that continuing a training needs.

Names no method. Adam is elementwise and stages share nothing, so one optimizer over all parameters equals one per
stage, and methods that train each stage by its own step are the sum of their losses.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from deep_components.batch import CascadeBatch
from deep_components.errors import InputError
from deep_components.kernels import Kernels
from deep_components.models import use_kernels
from deep_components.tables.deferred_adam import DeferredAdam
from deep_components.tables.embedding import FieldEmbedding
from deep_components.tables.id_set import IdSet
from deep_components.tables.rows import BatchRows

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8
LARGE_TABLE = 1 << 20  # about where the two cost the same at a batch of 1,024

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim's names of Adam's two moments


class Trainer:
    """Stage models, a loss and their optimizer; one call of :meth:`step` per batch.

    Args:
        models: stage -> model, in serving order.
        loss: the method; its parameters train too.
        lr: learning rate.
        optimizer: "deferred_adam" (dense Adam; large ID tables cost what a batch touches of them), "adam" (torch's,
            dense), or "sparse_adam" (torch's SparseAdam for all ID tables: another algorithm).
        large_table: rows from which "deferred_adam" defers a table; below, a dense step is cheaper.
        kernels: compiled loops for models on a CPU.
        autocast: the type that layers compute in where PyTorch's autocast allows it; None for the parameters' own.
        skip_nonfinite: leave out steps whose loss or gradient is not finite; the device is waited for.

    Attributes:
        prepare: rewrites a log's batch for :meth:`step`; a loader's thread may call it ahead.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        loss: nn.Module,
        lr: float,
        optimizer: str = "deferred_adam",
        large_table: int = LARGE_TABLE,
        kernels: Kernels | None = None,
        autocast: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        self.models, self.loss, self.autocast, self.skip_nonfinite = models, loss, autocast, skip_nonfinite
        parts = {**models, "loss": loss}
        self.parameters = {
            f"{part}/{name}": p for part, module in parts.items() for name, p in module.named_parameters()
        }
        self.embeddings = {
            stage: cast(FieldEmbedding, model.get_submodule("embedding")) for stage, model in models.items()
        }
        first = next(iter(self.embeddings.values()))
        self.ids: Mapping[str, IdSet] = first.ids
        self.gathered_fields = gathered_fields(first.rows, optimizer, large_table)
        paddings = {field: first.padding_row(field) for field in first.rows}
        self.prepare = BatchRows(self.ids, {field: first.rows[field] for field in self.gathered_fields}, paddings)
        tables = {f"{stage}/embedding.{field}" for stage in models for field in self.gathered_fields}
        gathered = {name: p for name, p in self.parameters.items() if name in tables}
        dense = [p for name, p in self.parameters.items() if name not in tables]
        self.device, self.dtype = dense[0].device, dense[0].dtype
        use_kernels(models, kernels if self.device.type == "cpu" else None)
        on_cpu = all(table.device.type == "cpu" for table in gathered.values())
        adam: dict[str, Any] = {"lr": lr, "betas": ADAM_BETAS, "eps": ADAM_EPSILON}
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, **adam)]
        self.deferred: DeferredAdam | None = None
        if optimizer == "deferred_adam":
            self.deferred = DeferredAdam(gathered, **adam, kernels=kernels if on_cpu else None)
        elif gathered:
            self.optimizers.append(torch.optim.SparseAdam(list(gathered.values()), **adam))

    def step(self, batch: CascadeBatch) -> dict[str, Tensor]:
        """One optimizer step; returns the loss, its terms and ``gradient_norm.<stage>``, detached and still on the
        device. ``batch`` names the tables' rows, as after ``prepare`` or ``prepare.distinct_rows``."""
        if self.gathered_fields and not batch.distinct:
            batch = self.prepare.distinct_rows(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with record_function("step.gather"):  # names that a profiler shows, benchmarks/step.py among them
            self._gather(batch)
        with (
            record_function("step.forward"),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            scores = [model(batch.features) for model in self.models.values()]
        with record_function("step.loss"):
            terms = self.loss(
                {stage: score.to(self.dtype) for stage, score in zip(self.models, scores, strict=True)}, batch.targets
            )
        with record_function("step.backward"):
            terms["loss"].backward()
        values = {name: term.detach().clone() for name, term in terms.items()}  # a weight is about to change in place
        values |= {f"gradient_norm.{stage}": self._gradient_norm(stage) for stage in self.models}
        if self.skip_nonfinite and not all(value.isfinite() for value in values.values()):
            return values
        with record_function("step.optimizer"):
            self._update(batch)
        return values

    def _gather(self, batch: CascadeBatch) -> None:
        """Have the models look up the batch's distinct rows of the gathered fields, up to date, as leaves."""
        for stage, embedding in self.embeddings.items():
            embedding.gathered = {}
            for field in self.gathered_fields:
                rows = batch.distinct[field]
                if self.deferred is not None:
                    values = self.deferred.gather(f"{stage}/embedding.{field}", rows)
                else:
                    values = embedding.get_parameter(field).detach()[rows.to(self.device)]
                embedding.gathered[field] = values.to(self.device, non_blocking=True).requires_grad_()

    def _gradient_norm(self, stage: str) -> Tensor:
        """Euclidean norm of the loss's gradient with respect to all parameters of the stage."""
        own = [p.grad for p in self.models[stage].parameters() if p.grad is not None]
        own += [values.grad for values in self.embeddings[stage].gathered.values() if values.grad is not None]
        return torch.stack(torch._foreach_norm(own)).norm() if own else torch.zeros((), device=self.device)

    def _update(self, batch: CascadeBatch) -> None:
        gradients = {}
        for stage, embedding in self.embeddings.items():
            for field, values in embedding.gathered.items():
                rows = batch.distinct[field]
                gradient = torch.zeros_like(values) if values.grad is None else values.grad
                gradients[f"{stage}/embedding.{field}"] = rows, gradient
            embedding.gathered = {}
        if self.deferred is None:
            for name, (rows, gradient) in gradients.items():
                places = rows.to(gradient.device).unsqueeze(0)
                table = self.parameters[name]
                table.grad = torch.sparse_coo_tensor(places, gradient, table.shape, check_invariants=False)
        else:
            self.deferred.step(gradients)
        for optimizer in self.optimizers:
            optimizer.step()

    def flush(self) -> None:
        """Bring all tables up to date: parameters are then those of dense Adam."""
        for embedding in self.embeddings.values():
            embedding.gathered = {}
        if self.deferred is not None:
            self.deferred.flush()

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from, bit for bit, as named tensors: parameters, optimizer state, the ids of
        compacted tables, and the state of PyTorch's generators."""
        state = {f"parameter/{name}": value.detach() for name, value in self.parameters.items()}
        state |= {f"ids/{field}": torch.from_numpy(known.ids()) for field, known in self.ids.items()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    state[f"{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
        if self.deferred is not None:
            for name in self.deferred.tables:
                moments = (self.deferred.first[name], self.deferred.second[name])
                state |= {f"{key}/{name}": value for key, value in zip(_MOMENTS, moments, strict=True)}
                state[f"last/{name}"] = self.deferred.last[name]
            state["deferred_steps"] = torch.tensor(self.deferred.steps)
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
            self._copy(parameter, state, f"parameter/{name}", name)
        steps = int(state.get("deferred_steps", torch.tensor(0)))
        for optimizer in self.optimizers:
            self._restore_optimizer(optimizer, state)
        if self.deferred is not None:
            self.deferred.steps = steps
            for name, table in self.deferred.tables.items():
                counted = state.get(f"step/{name}")  # the table was small enough for a dense step before
                self.deferred.steps = int(counted) if counted is not None else steps
                if f"exp_avg/{name}" not in state:
                    continue  # no step has been made
                self.deferred.last[name].fill_(self.deferred.steps)
                for key, moment in zip(_MOMENTS, (self.deferred.first[name], self.deferred.second[name]), strict=True):
                    self._copy(moment, state, f"{key}/{name}", name)
                if f"last/{name}" in state:
                    self._copy(self.deferred.last[name], state, f"last/{name}", name)
                last = self.deferred.last[name]
                if len(table) and not 0 <= int(last.min()) <= int(last.max()) <= self.deferred.steps:
                    raise InputError(f"the saved state does not fit: last/{name} names steps never made; train again")
        try:
            torch.set_rng_state(state["generator/cpu"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                "the saved state does not fit: generator/cpu is missing or damaged; train again"
            ) from error
        if self.device.type == "cuda" and "generator/cuda" in state:
            torch.cuda.set_rng_state(state["generator/cuda"], self.device)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        dense = isinstance(optimizer, torch.optim.Adam)
        for parameter in optimizer.param_groups[0]["params"]:
            name = names[id(parameter)]
            if f"step/{name}" not in state:
                continue
            # Adam counts its steps in a CPU tensor, SparseAdam in a number.
            count = state[f"step/{name}"]
            entries: dict[str, Any] = {"step": count.clone() if dense else int(count)}
            for key in _MOMENTS:
                entries[key] = torch.zeros_like(parameter)
                self._copy(entries[key], state, f"{key}/{name}", name)
            optimizer.state[parameter] = entries

    def _copy(self, target: Tensor, state: Mapping[str, Tensor], key: str, name: str) -> None:
        """Copy a saved tensor; that of a compacted table row by row."""
        saved, field = state.get(key), name.rpartition("embedding.")[2]
        known = state.get(f"ids/{field}") if "embedding." in name else None
        if saved is not None and known is not None and field in self.ids:
            rows = saved_rows(self.ids[field], known, len(saved))
            if rows is not None and saved.shape[1:] == target.shape[1:]:
                target[rows.to(target.device)] = saved.to(target)
                return
        if saved is None or saved.shape != target.shape:
            raise InputError(f"the saved state does not fit: {name} is missing or has another shape; train again")
        target.copy_(saved)


def saved_rows(known: IdSet, saved_ids: Tensor, count: int) -> Tensor | None:
    """The rows that the saved ids have among ``known`` ones [count]; None when one is missing or they are damaged."""
    ids = saved_ids.numpy()
    if ids.shape != (count,) or (count and (ids.min() < 0 or ids.max() >= known.size)):
        return None
    return torch.from_numpy(known.rows(ids)) if np.all(known.contains(ids)) else None


def gathered_fields(rows: Mapping[str, int], optimizer: str, large_table: int = LARGE_TABLE) -> tuple[str, ...]:
    """The fields of whose tables a step reads and moves the batch's distinct rows alone."""
    limit = {"deferred_adam": large_table, "sparse_adam": 0}.get(optimizer, math.inf)
    return tuple(sorted(field for field, count in rows.items() if count >= limit))
