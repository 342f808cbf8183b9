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
from deep_components.errors import InputError
from deep_components.evaluation.day import score_day, summary
from deep_components.runs.folder import STATE_FILE
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore

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


class Validated(NamedTuple):
    """What a validation found."""

    recall: float  # of the whole cascade
    metrics: dict[str, float]  # all that are defined, under the names of metrics.json


@dataclass(frozen=True)
class Validation:
    """The validation day of a training. ``initial_seed`` gives the rows of ids that compacted tables lack."""

    cascade: Cascade
    day: DayCache
    device: torch.device
    initial_seed: int | None

    def measure(self, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore]) -> Validated:
        """The metrics of the models as they are now, as `lcron test` would measure them. InputError when a score is not
        finite, or no request of the day has ground truth."""
        with _only_looking(models, self.device):
            seen = {stage: self._view(store) for stage, store in stores.items()}
            scored = score_day(models, seen, self.day, BATCH_SIZE, self.device)
            metrics, results = summary(self.cascade, scored)
        found = {name: results[name] for name in metrics if name != "request_id" and results[name] is not None}
        recall = next((value for name, value in found.items() if name.startswith("joint_recall@")), None)
        if recall is None:
            raise InputError(
                f"--validate_every: no request of the validation day {self.day.day} has ground truth; name other days "
                "with --train_days"
            )
        return Validated(recall, found)

    def ids(self, store: EmbeddingStore) -> dict[str, IdSet]:
        """The rows that are looked up of tables of which training does not hold, or does not update, all: those of the
        day. An id that training has not seen is unknown where the table has a row for such, as when a run is tested."""
        ids = {name: self.day.ids(name) for name in store.rows if name in store.ids or name in store.optimizers}
        unknown = [name for name in store.ids if store.schema.tables[name].unknown is not None]
        return ids | {name: store.ids[name] & ids[name] for name in unknown}

    def _view(self, store: EmbeddingStore) -> EmbeddingStore:
        """The stage's tables as of now: small ones are the training's own, the others copies of the day's rows."""
        ids = self.ids(store)
        view = EmbeddingStore(store.stage, store.schema, store.dim, ids)
        view.tables = dict(store.tables)
        for name, known in ids.items():
            rows = _current(store, name, known.ids(), self.initial_seed).to(self.device)
            view.tables[name] = nn.Parameter(rows, requires_grad=False)
        view.dtype, view.kernels = store.dtype, store.kernels
        return view


def _current(store: EmbeddingStore, table: str, ids: np.ndarray, initial_seed: int | None) -> Tensor:
    """The rows [n, d] of the log's indices ``ids`` [n]; the initial ones of those that a compacted table lacks."""
    if table not in store.ids:
        return store.peek(table, torch.from_numpy(ids))
    known = store.ids[table].contains(ids)
    rows = store.peek(table, torch.from_numpy(store.ids[table].rows(ids[known])))
    values = rows.new_empty(len(ids), store.dim)
    values[torch.from_numpy(known).to(values.device)] = rows
    if not known.all():
        assert initial_seed is not None  # compacted tables have one
        initial = store.initial_values(table, ids[~known], initial_seed)
        values[torch.from_numpy(~known).to(values.device)] = initial.to(values)
    return values


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
