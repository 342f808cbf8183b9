"""Following a validation day: a training's metrics on it, and which models are the best so far.

A validation only looks. Tables are read as they would be if all their rows were brought up to date, and stay as they
are; models and random generators are left as they were. So the steps after it are those of a training without it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.arguments import evaluation_parser
from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache
from deep_components.distributed.sharding import fetch, routes
from deep_components.distributed.spread import share_of
from deep_components.errors import InputError
from deep_components.evaluation.day import requests_at_a_time, score_day, summary
from deep_components.evaluation.share import ALONE, Share, requests_of
from deep_components.runs.folder import STATE_FILE
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore
from deep_components.training.step import Shards

STATE = "validation/"  # begins the names in a saved state

BATCH_SIZE: int = evaluation_parser("").get_default("batch_size")  # so that a score is that of `lcron test` to the bit


@dataclass(frozen=True)
class Best:
    """The best joint recall so far, the step of its models (0: none yet), and how many validations in a row have not
    been better since."""

    recall: float = -np.inf
    step: int = 0
    waited: int = 0

    def after(self, recall: float, step: int) -> "Best":
        """With one more validation; of equal ones the first is the best."""
        return Best(recall, step) if recall > self.recall else Best(self.recall, self.step, self.waited + 1)

    def state(self) -> dict[str, np.ndarray]:
        """As named arrays of a saved state."""
        return {f"{STATE}{name}": np.array(value) for name, value in asdict(self).items()}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], steps: int) -> "Best":
        """The reverse, of a training that has made so many steps. InputError when it cannot be that of one."""
        try:
            recall, step, waited = (arrays[f"{STATE}{name}"].item() for name in ("recall", "step", "waited"))
            best = cls(float(recall), int(step), int(waited))
        except (KeyError, ValueError, OverflowError) as error:
            raise InputError(f"{STATE_FILE}: {STATE}* is missing or damaged; train again without --resume") from error
        if not (0 <= best.step <= steps and 0 <= best.waited <= steps):
            raise InputError(f"{STATE_FILE}: {best} is none of this training; train again without --resume")
        return best


def own_requests(day: DayCache, share: Share) -> slice | None:
    """The requests of a validation day that this process scores; None: all."""
    return None if share is ALONE else requests_of(share, len(day), requests_at_a_time(BATCH_SIZE, day))


class Validated(NamedTuple):
    """What a validation found."""

    recall: float  # of the whole cascade
    metrics: dict[str, float]  # all that are defined, under the names of metrics.json


@dataclass(frozen=True)
class Validation:
    """The validation day of a training. ``initial_seed`` gives the rows of ids that compacted tables lack; with
    ``shards`` each process scores its share of the day, and all must call :meth:`measure`."""

    cascade: Cascade
    day: DayCache
    device: torch.device
    initial_seed: int | None
    shards: Shards | None = None

    def measure(self, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore]) -> Validated:
        """The metrics of the models as they are now, as `lcron test` would measure them. InputError when a score is not
        finite, or no request of the day has ground truth."""
        share = share_of(None if self.shards is None else self.shards.processes)
        with _only_looking(models, self.device):
            seen = self._views(stores, share)
            size = requests_at_a_time(BATCH_SIZE, self.day)
            scored = score_day(models, seen, self.day, size, self.device, share=share)
            metrics, results = summary(self.cascade, scored, share)
        found = {name: results[name] for name in metrics if name != "request_id" and results[name] is not None}
        if self.shards is not None:  # what follows from them is the same on all, whatever their processors
            found = self.shards.processes.gather(found)[0]
        recall = next((value for name, value in found.items() if name.startswith("joint_recall@")), None)
        if recall is None:
            raise InputError(
                f"--validate_every: no request of the validation day {self.day.day} has ground truth; name other days "
                "with --train_days"
            )
        return Validated(recall, found)

    def ids(self, store: EmbeddingStore, requests: slice | None = None) -> dict[str, IdSet]:
        """The rows that are looked up of tables of which this process does not hold, or training does not update, all:
        those of the day, or of some of its ``requests``. An id that training has not seen is unknown where the table
        has a row for such, as when a run is tested."""
        looked_up = [name for name in store.rows if name in store.ids or name in store.optimizers]
        ids = {name: self.day.ids(name, requests) for name in looked_up}
        trained = self._trained(store)
        unknown = [name for name in trained if store.schema.tables[name].unknown is not None]
        return ids | {name: trained[name] & ids[name] for name in unknown}

    def _trained(self, store: EmbeddingStore) -> Mapping[str, IdSet]:
        """The ids of the compacted tables, whole ones."""
        return store.ids if self.shards is None else self.shards.ids

    def _views(self, stores: Mapping[str, EmbeddingStore], share: Share) -> dict[str, EmbeddingStore]:
        """The stages' tables as of now: small ones are the training's own, the others copies of the rows that this
        process looks up."""
        first = next(iter(stores.values()))
        ids = self.ids(first, own_requests(self.day, share))
        listed = {table: known.ids() for table, known in ids.items()}
        rows = {table: _rows_of(self._trained(first).get(table), wanted) for table, wanted in listed.items()}
        current = self._current(stores, {table: torch.from_numpy(row[row >= 0]) for table, row in rows.items()})
        views = {}
        for stage, store in stores.items():
            views[stage] = view = EmbeddingStore(stage, store.schema, store.dim, ids)
            view.tables = dict(store.tables)
            for table, wanted in listed.items():
                values = self._completed(store, table, wanted, rows[table] >= 0, current[stage].pop(table))
                view.tables[table] = nn.Parameter(values, requires_grad=False)
            view.dtype, view.kernels = store.dtype, store.kernels
        return views

    def _current(
        self, stores: Mapping[str, EmbeddingStore], rows: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Stage -> table -> the values [n, d] of rows [n] of the whole tables, on the device."""
        pulled = next(iter(stores.values())).optimizers  # of several processes the sharded tables
        found: dict[str, dict[str, Tensor]] = {stage: {} for stage in stores}
        if self.shards is not None:
            processes = self.shards.processes
            sharded = {table: wanted for table, wanted in rows.items() if table in pulled}
            # Not over the loader's group: its thread is at the next batch.
            found = fetch(stores, routes(sharded, processes, processes.control), processes, self.device, look=True)
        for stage, store in stores.items():
            own = {table: wanted for table, wanted in rows.items() if self.shards is None or table not in pulled}
            found[stage] |= {table: store.peek(table, wanted).to(self.device) for table, wanted in own.items()}
        return found

    def _completed(
        self, store: EmbeddingStore, table: str, ids: np.ndarray, known: np.ndarray, values: Tensor
    ) -> Tensor:
        """The rows [n, d] of ``ids`` [n], of the ``known`` ones [n] the ``values``; the initial ones of others."""
        if known.all():
            return values
        assert self.initial_seed is not None  # compacted tables have one
        whole = values.new_empty(len(ids), store.dim)
        whole[torch.from_numpy(known).to(whole.device)] = values
        initial = store.initial_values(table, ids[~known], self.initial_seed)
        whole[torch.from_numpy(~known).to(whole.device)] = initial.to(whole)
        return whole


def _rows_of(known: IdSet | None, ids: np.ndarray) -> np.ndarray:
    """The rows [n] of ids [n] in a table that has these ``known`` ones, None: all; -1 of others."""
    if known is None:
        return ids
    rows = np.full(len(ids), -1)
    there = known.contains(ids)
    rows[there] = known.rows(ids[there])
    return rows


@contextmanager
def _only_looking(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Models compute as in an evaluation; afterwards every part of them, and PyTorch's generators, are as before."""
    training = {part: part.training for model in models.values() for part in model.modules()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for model in models.values():
                model.eval()
            yield
    finally:
        for part, mode in training.items():
            part.training = mode
