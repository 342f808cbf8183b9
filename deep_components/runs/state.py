"""A run's safetensors files: the models, <stage>.safetensors, and the state from which training goes on.

They hold named arrays and metadata, each under a SHA-256 that is verified when it is read. Where tables are compacted,
a model's file lists beside a table ``embedding.<table>`` the ids of its rows, ascending, as ``ids.<table>``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.errors import InputError
from deep_components.files import sha256_of
from deep_components.runs.checked import CHECKSUM, Blocks, CheckedFile, opened
from deep_components.runs.checked import load as load
from deep_components.runs.checked import save as save
from deep_components.runs.folder import CONFIG_FILE, model_file, remove_shards, shard_file
from deep_components.runs.identity import fingerprint
from deep_components.runs.shards import SHARDS, SavedState

TABLE, IDS = "embedding.", "ids."  # how the names of a model's tables, and of their rows' ids, begin

_RUN = "of_run"  # entry of the metadata: the run's fingerprint
_ROWS_AT_A_TIME = 1 << 20  # bounds the temporary memory of making a table whole


@dataclass(frozen=True)
class SavedModel:
    """What a stage's file holds."""

    path: Path
    arrays: dict[str, np.ndarray]  # parameter -> values; a compacted table has the rows of its ids only
    ids: dict[str, np.ndarray]  # compacted table -> the ids of its rows, ascending
    initial_seed: int | None  # gives the initial values of ids that compacted tables lack; None: all tables are whole


class OpenModel:
    """A stage's file of which arrays are read one at a time, and of tables some rows. Any method raises InputError when
    the file is missing or damaged.

    Attributes: ``path``; ``shapes`` of the parameters, by name; ``tables``, the compacted ones; ``initial_seed`` as of
    :class:`SavedModel`.
    """

    def __init__(self, run: Path, stage: str) -> None:
        self._file = CheckedFile(run / model_file(stage))
        self.path = self._file.path
        self.shapes = {name: shape for name, shape in self._file.shapes.items() if not name.startswith(IDS)}
        self.tables = {name.removeprefix(IDS) for name in self._file.shapes if name.startswith(IDS)}
        self.initial_seed = _initial_seed(self._file.metadata)

    def verify(self) -> None:
        """Read everything, a block at a time, and keep nothing."""
        for table in self.tables:
            _ids(self.path, table, self.array(f"{IDS}{table}"))
        for name, shape in self.shapes.items():
            for _ in self._file.blocks(name) if shape else [self.array(name)]:
                pass

    def array(self, name: str) -> np.ndarray:
        """The values of a parameter."""
        return self._file.read([name])[name]

    def rows(self, table: str, wanted: np.ndarray, initial: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
        """The rows [n, d] of the ``wanted`` ids [n], in any order, of a table, which is read a block at a time.

        Args:
            initial: (table, ids that the file lacks) -> their rows; it is asked only where ``initial_seed`` is known.

        Raises:
            InputError: the ids do not fit the table, or one is missing and nothing tells its initial value.
        """
        name = f"{TABLE}{table}"
        shape = self.shapes.get(name, ())
        rows = self._rows_of(table, wanted, shape[0] if len(shape) == 2 else -1)
        if self.initial_seed is None and (rows < 0).any():
            raise InputError(
                f"{self.path}: table {table} lacks id {wanted[rows < 0][0]}; use the log that it was trained with"
            )
        found = np.empty((len(wanted), shape[1]), self._file.dtypes[name])
        order, end = np.argsort(rows, kind="stable"), 0
        rising = rows[order]
        for block in self._file.blocks(name):
            start, end = end, end + len(block)
            here = slice(*np.searchsorted(rising, (start, end)))
            found[order[here]] = block[rising[here] - start]
        missing = np.flatnonzero(rows < 0)
        for first in range(0, len(missing), _ROWS_AT_A_TIME):
            some = missing[first : first + _ROWS_AT_A_TIME]
            found[some] = initial(table, wanted[some])
        return found

    def _rows_of(self, table: str, wanted: np.ndarray, count: int) -> np.ndarray:
        """The rows [n] of ids [n] in a table of ``count`` rows; -1 of those that it lacks."""
        if table not in self.tables and count >= 0:
            return np.where(wanted < count, wanted, -1)
        saved = _ids(self.path, table, self.array(f"{IDS}{table}")) if table in self.tables else np.zeros(0, np.int64)
        if len(saved) != count:
            raise InputError(f"{self.path}: the ids of table {table} do not fit it; train again")
        rows = np.searchsorted(saved, wanted).clip(max=max(count - 1, 0))
        known = saved[rows] == wanted if count else np.zeros(len(wanted), bool)
        return np.where(known, rows, -1)


def save_models(
    run: Path,
    models: Mapping[str, Mapping[str, np.ndarray | Blocks]],
    note: Mapping[str, Any],
    ids: Mapping[str, np.ndarray | Blocks] | None = None,
) -> None:
    """Write every stage's model: stage -> parameter -> values, large ones in :class:`Blocks` (``written_order`` of
    runs/checked.py says in which order they are asked for). ``note`` goes into the files' metadata; ``initial_seed`` in
    it, and ``ids``, are those of :class:`SavedModel`."""
    listed = {f"{IDS}{table}": known for table, known in (ids or {}).items()}
    for stage, arrays in models.items():
        save(run / model_file(stage), {**arrays, **listed}, note)


def copy_model(source: Path, run: Path, stage: str, note: Mapping[str, Any]) -> None:
    """Write a stage's model as it stands in another folder, a block at a time. InputError as :func:`load_model`."""
    file = CheckedFile(source / model_file(stage))
    small = file.read(name for name, shape in file.shapes.items() if not shape)
    large = {name: Blocks(shape, file.dtypes[name], file.blocks(name)) for name, shape in file.shapes.items() if shape}
    save(run / model_file(stage), {**small, **large}, note)


def load_model(run: Path, stage: str) -> SavedModel:
    """A stage's model. InputError when its file is missing or damaged."""
    return _read_model(run, stage, "")


def saved_ids(run: Path, stage: str) -> tuple[dict[str, np.ndarray], int | None]:
    """``ids`` and ``initial_seed`` of a stage's model, alone. InputError as :func:`load_model`."""
    model = _read_model(run, stage, IDS)
    return model.ids, model.initial_seed


def model_checksum(run: Path, stage: str) -> str:
    """The SHA-256 of a stage's model, as its file notes it: of all tensors and the metadata. It is verified when the
    model is read. InputError when the file is missing or no checkpoint."""
    path = run / model_file(stage)
    with opened(path) as (_, metadata):
        noted = metadata.get(CHECKSUM)
        return noted if isinstance(noted, str) else sha256_of(path)


def saved_shapes(run: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays in a stage's file, of which nothing else is read. InputError when it cannot be."""
    with opened(run / model_file(stage)) as (file, _):
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict


def _read_model(run: Path, stage: str, prefix: str) -> SavedModel:
    path = run / model_file(stage)
    arrays, note = load(path, prefix)
    ids = {name.removeprefix(IDS): arrays.pop(name) for name in list(arrays) if name.startswith(IDS)}
    ids = {table: _ids(path, table, known) for table, known in ids.items()}
    return SavedModel(path, arrays, ids, _initial_seed(note))


def _ids(path: Path, table: str, known: np.ndarray) -> np.ndarray:
    """The ids of a table's rows, checked."""
    if known.dtype != np.int64 or known.ndim != 1 or (len(known) and known[0] < 0) or (np.diff(known) <= 0).any():
        raise InputError(f"{path}: {IDS}{table} is not a list of ascending ids; train again")
    return known


def _initial_seed(note: Mapping[str, Any]) -> int | None:
    seed = note.get("initial_seed")
    return seed if type(seed) is int else None


def save_state(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    position: Mapping[str, int],
    note: Mapping[str, Any] | None = None,
    shards: Sequence[str] = (),
) -> None:
    """Write all that training needs to go on: named arrays and the position reached. ``note`` goes into the file's
    metadata. ``shards``, of several processes: the checksums, by rank, that ``save_shard`` returned at this position's
    step; ``arrays`` are then those that all processes share. Shards of other saves beside the file are removed."""
    named = {SHARDS: list(shards)} if shards else {}
    save(path, arrays, {**(note or {}), **named, "position": dict(position)})
    remove_shards(path.parent, {shard_file(position["step"], rank, len(shards)) for rank in range(len(shards))})


def run_note(config: Mapping[str, Any]) -> dict[str, Any]:
    """What models and states note of their run, for :func:`check_same_run`."""
    return {_RUN: fingerprint(config)}


def check_same_run(path: Path, config: Mapping[str, Any]) -> None:
    """InputError when a model or state is of another run than the config.json beside it says; one that notes no run, as
    of an earlier version or another program, may be of any. Also InputError when it cannot be read."""
    with opened(path) as (_, metadata):
        noted = metadata.get(_RUN)
    found, wanted = noted if isinstance(noted, dict) else {}, fingerprint(config)
    different = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    if different:
        raise InputError(
            f"{path}: is of another run than the {CONFIG_FILE} beside it, which differs in {', '.join(different[:4])}; "
            "put back the run's own file, or train again"
        )


def load_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """What :func:`save_state` wrote, all of it, as of one process: the arrays and the position of :class:`SavedState`.
    InputError when a file is missing or damaged."""
    state = SavedState(path)
    return state.arrays(), state.position
