"""One optimizer step of a cascade, and all that continuing a training needs.

Names no method. Adam is elementwise and stages share nothing, so one optimizer over all parameters equals one per
stage, and methods that train each stage by its own step are the sum of their losses.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from deep_components.arguments import PULL_FROM
from deep_components.batch import CascadeBatch, SlotFeatures, Targets
from deep_components.dataset.loader import Prepare
from deep_components.distributed.gradients import sum_gradients
from deep_components.distributed.processes import Processes
from deep_components.distributed.sharding import ShardedLookup, fetch, send_gradients
from deep_components.distributed.whole_batch import check_is_of_totals, global_terms
from deep_components.errors import InputError
from deep_components.kernels import Kernels, use_kernels
from deep_components.runs.folder import STATE_FILE
from deep_components.tables.deferred_adam import DeferredAdam
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.sparse_adam import SparseAdam
from deep_components.tables.store import EmbeddingStore

ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}

WISHES = ("stop", "save")  # what a process may want all to do after a step

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim's names of Adam's two moments


@dataclass(frozen=True)
class Shards:
    """The tables of a training on several processes: of all of them, so that each knows which rows lie where."""

    processes: Processes
    ids: Mapping[str, IdSet]  # compacted table -> its ids
    rows: Mapping[str, int]  # table -> its rows


class Trainer:
    """Stage models, their embedding stores, a loss and its optimizers; one call of :meth:`step` per batch.

    ``models`` and ``stores`` are by stage, in serving order, on their devices; the parameters of ``loss`` train too.

    * ``optimizer``: "deferred_adam" (dense Adam; ID tables of ``large_table`` rows or more cost what a batch touches of
      them), "adam" (torch's, dense), or "sparse_adam" (torch's SparseAdam for all ID tables: another algorithm).
    * ``kernels``: compiled loops for models and tables on a CPU.
    * ``autocast``: the type that layers compute in where PyTorch's autocast allows it; None for the parameters' own.
    * ``shards``: of a training on several processes; the pulled tables of ``stores`` are then shards.
    * ``skip_nonfinite``: leave out steps whose loss or gradient is not finite; the device is waited for.

    ``prepare`` rewrites a log's batch for :meth:`step`; a loader's thread may call it ahead.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore], loss: nn.Module, lr: float,
        optimizer: str = "deferred_adam", large_table: int = PULL_FROM, kernels: Kernels | None = None,
        autocast: torch.dtype | None = None, skip_nonfinite: bool = False, shards: Shards | None = None,
    ) -> None:  # fmt: skip
        self.models, self.stores, self.loss = models, stores, loss
        self.autocast, self.skip_nonfinite, self.shards = autocast, skip_nonfinite, shards
        first = next(iter(stores.values()))
        self.ids = first.ids
        self.pulled = pulled_tables(first.rows if shards is None else shards.rows, optimizer, large_table)
        self.prepare: Prepare
        if shards is None:
            self.prepare = TableLookup(first.schema, first.ids, {table: first.rows[table] for table in self.pulled})
        else:
            rows, processes = {table: shards.rows[table] for table in self.pulled}, shards.processes
            whole = TableLookup(first.schema, shards.ids, rows, processes.count)
            self.prepare = ShardedLookup(whole, processes)
        self.checked = False  # the loss, on the first step of several processes
        self.wishes = dict.fromkeys(WISHES, False)
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
        device. ``batch`` comes from ``prepare``. With several processes it is this one's part of the batch, all must
        call it, and what is returned is of the whole batch; ``wishes`` that one process has all have afterwards."""
        self.dense_optimizer.zero_grad(set_to_none=True)
        rows: Mapping[str, Any] = batch.features.rows
        with record_function("step.pull"):  # names that a profiler shows, benchmarks/step.py among them
            pulled = self._pull(rows)
        with (
            record_function("step.forward"),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            scores = {
                stage: model(self.stores[stage].embed(batch.features, pulled[stage])).to(self.dtype)
                for stage, model in self.models.items()
            }
        with record_function("step.loss"):
            terms = self._terms(scores, batch.targets)
        with record_function("step.backward"):
            (terms["loss"] if self.shards is None else terms["loss"] / self.shards.processes.count).backward()
        values = {name: term.detach().clone() for name, term in terms.items()}  # a weight is about to change in place
        with record_function("step.exchange"):
            gradients, norms, broken = self._gradients(pulled, rows, values)
        values |= {f"gradient_norm.{stage}": norm for stage, norm in norms.items()}
        if self.skip_nonfinite and (broken or not all(value.isfinite() for value in values.values())):
            return values
        with record_function("step.optimizer"):
            for stage, store in self.stores.items():
                for table, gradient in gradients[stage].items():
                    store.push(table, rows[table] if self.shards is None else rows[table].rows, gradient)
            self.dense_optimizer.step()
        return values

    def _stage_parameters(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """A stage's parameters under their names in checkpoints, tables first."""
        tables = [(f"embedding.{table}", parameter) for table, parameter in self.stores[stage].tables.items()]
        return [*tables, *self.models[stage].named_parameters()]

    def _pull(self, rows: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Stage -> table -> the values of the batch's distinct rows, as leaves of the step's graph."""
        if self.shards is not None:
            pulled = fetch(self.stores, rows, self.shards.processes, self.device)
        else:
            pulled = {
                stage: {
                    table: store.pull(table, distinct).to(self.device, non_blocking=True)
                    for table, distinct in rows.items()
                }
                for stage, store in self.stores.items()
            }
        for of_stage in pulled.values():
            for values in of_stage.values():
                values.requires_grad_()
        return pulled

    def _terms(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """What the loss returns, of the whole batch of all processes."""
        if self.shards is None:
            terms = self.loss(scores, targets)
            _check_terms(self.loss, terms)
            return terms
        processes = self.shards.processes
        terms = global_terms(self.loss, scores, targets, processes)
        _check_terms(self.loss, terms)
        if not self.checked:
            check_is_of_totals(self.loss, scores, targets, processes)
            self.checked = True
        return terms

    def _gradients(
        self, pulled: Mapping[str, Mapping[str, Tensor]], rows: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], bool]:
        """Stage -> table -> the gradient of the rows of this process that the batch has; stage -> the Euclidean norm of
        the loss's gradient with respect to all its parameters; and whether another process saw a term that is not
        finite."""
        gradients = {
            stage: {table: _gradient(leaf) for table, leaf in of_stage.items()} for stage, of_stage in pulled.items()
        }
        if self.shards is None:
            return gradients, {stage: self._gradient_norm(stage, pulled[stage]) for stage in self.models}, False
        processes = self.shards.processes
        gradients = send_gradients(gradients, rows, processes, next(iter(self.stores.values())).kernels)
        # A sum of squares beside what all must know, in the one collective that adds up the other gradients.
        squares = [self._square(gradients[stage].values()) for stage in self.models]
        broken = self.skip_nonfinite and not all(value.isfinite() for value in values.values())
        flags = torch.tensor([*self.wishes.values(), broken], dtype=self.dtype, device=self.device)
        sums = sum_gradients(
            self.dense_optimizer.param_groups[0]["params"], torch.cat([torch.stack(squares), flags]), processes
        )
        norms = {
            stage: (square + self._gradient_norm(stage, {}) ** 2).sqrt()
            for stage, square in zip(self.models, sums[: len(squares)], strict=True)
        }
        *wished, any_broken = (flag > 0 for flag in sums[len(squares) :].tolist())
        self.wishes = dict(zip(self.wishes, wished, strict=True))
        return gradients, norms, any_broken

    def _square(self, gradients: Iterable[Tensor]) -> Tensor:
        if not (parts := list(gradients)):
            return torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.stack(torch._foreach_norm(parts)).square().sum()

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
        state |= {f"ids/{table}": torch.from_numpy(known.ids()) for table, known in self.ids.items()}
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
        if self.shards is not None and "generator/cpu" not in state:
            return  # saved by fewer processes: this one's stays as it was seeded
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
            if f"ids/{table}" in state and table in self.ids:
                rows = saved_rows(self.ids[table], state[f"ids/{table}"], len(own["exp_avg"]))
                if rows is None:
                    raise ValueError("its ids are not those of this log")
            self.stores[stage].optimizers[table].restore(own, rows)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise _does_not_fit(f"{name}: {error}") from error

    def _copy(self, target: Tensor, state: Mapping[str, Tensor], kind: str, name: str) -> None:
        """Copy the saved ``kind/name``; that of a compacted table row by row."""
        saved, table = state.get(f"{kind}/{name}"), name.rpartition("embedding.")[2]
        known = state.get(f"ids/{table}") if "embedding." in name else None
        if saved is not None and known is not None and table in self.ids:
            rows = saved_rows(self.ids[table], known, len(saved))
            if rows is None or saved.shape[1:] != target.shape[1:]:
                raise _does_not_fit(f"{name} has other ids or another shape")
            target[rows.to(target.device)] = saved.to(target)
        elif saved is None or saved.shape != target.shape:
            problem = "is missing" if saved is None else f"has shape {tuple(saved.shape)}, not {tuple(target.shape)}"
            raise _does_not_fit(f"{kind} {name} {problem}")
        else:
            target.copy_(saved)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _check_terms(loss: nn.Module, terms: Any) -> None:
    """InputError, without a look at values, unless the loss returned a dict of scalars with "loss" among them."""
    if not isinstance(terms, Mapping):
        problem = f"a {type(terms).__name__}, not a dict"
    elif "loss" not in terms:
        problem = f"a dict without 'loss', of {', '.join(map(str, terms)) or 'nothing'}"
    elif wrong := [name for name, value in terms.items() if not isinstance(value, Tensor) or value.dim()]:
        value = terms[wrong[0]]
        what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        problem = f"{wrong[0]!r} as a {what}, not a tensor of one number without axes"
    elif not terms["loss"].requires_grad:
        problem = "a 'loss' that does not depend on the scores, detached perhaps"
    else:
        return
    raise InputError(f"the loss {type(loss).__name__} returned {problem}; return {{'loss': its sum, and terms to log}}")


def _does_not_fit(what: str) -> InputError:
    return InputError(f"{STATE_FILE}: {what}; train again without --resume")


def saved_rows(known: IdSet, saved_ids: Tensor, count: int) -> Tensor | None:
    """The rows that the saved ids have among ``known`` ones [count]; None when one is missing or they are damaged."""
    ids = saved_ids.numpy()
    if ids.shape != (count,) or (count and (ids.min() < 0 or ids.max() >= known.size)):
        return None
    return torch.from_numpy(known.rows(ids)) if np.all(known.contains(ids)) else None


def pulled_tables(rows: Mapping[str, int], optimizer: str, large_table: int = PULL_FROM) -> tuple[str, ...]:
    """The tables of which a step reads and moves the batch's distinct rows alone; ``rows`` are those of each table."""
    limit = {"deferred_adam": large_table, "sparse_adam": 0}.get(optimizer, math.inf)
    return tuple(sorted(table for table, count in rows.items() if count >= limit))
