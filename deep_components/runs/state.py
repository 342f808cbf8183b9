"""A run's safetensors files: the models, <stage>.safetensors, and the state from which training goes on.

They hold named arrays and metadata, each under a SHA-256 that is verified when it is read. Where tables are compacted,
a model's file lists beside a table ``embedding.<table>`` the ids of its rows, ascending, as ``ids.<table>``.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deep_components.errors import InputError
from deep_components.files import atomic_path, regular, sha256_of
from deep_components.runs.folder import CONFIG_FILE, model_file
from deep_components.runs.identity import fingerprint

TABLE, IDS = "embedding.", "ids."  # how the names of a model's tables, and of their rows' ids, begin

_METADATA = "run"
_RUN = "of_run"  # entry of the metadata: the run's fingerprint
_ARRAY_CHECKSUMS, _CHECKSUM = "tensor_sha256", "sha256"  # entries of the metadata; the second one covers all others
_ROWS_AT_A_TIME = 1 << 20  # bounds the temporary memory of making a table whole
_POSITION = ("epoch", "day", "batch", "step", "skipped")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedModel:
    """What a stage's file holds."""

    path: Path
    arrays: dict[str, np.ndarray]  # parameter -> values; a compacted table has the rows of its ids only
    ids: dict[str, np.ndarray]  # compacted table -> the ids of its rows, ascending
    initial_seed: int | None  # gives the initial values of ids that compacted tables lack; None: all tables are whole

    def rows(self, table: str, wanted: np.ndarray, initial: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
        """The rows [n, d] of the ``wanted`` ids [n], in any order, of a table.

        Args:
            initial: (table, ids that the file lacks) -> their rows; it is asked only where ``initial_seed`` is known.

        Raises:
            InputError: the ids do not fit the table, or one is missing and nothing tells its initial value.
        """
        values = self.arrays.get(f"{TABLE}{table}")
        saved = self.ids.get(table, np.arange(0 if values is None else len(values)))
        if values is None or values.ndim != 2 or len(values) != len(saved):
            raise InputError(f"{self.path}: the ids of table {table} do not fit it; train again")
        rows = np.searchsorted(saved, wanted).clip(max=max(len(saved) - 1, 0))
        known = saved[rows] == wanted if len(saved) else np.zeros(len(wanted), bool)
        if self.initial_seed is None and not known.all():
            raise InputError(
                f"{self.path}: table {table} lacks id {wanted[~known][0]}; use the log that it was trained with"
            )
        found = np.empty((len(wanted), values.shape[1]), values.dtype)
        found[known] = values[rows[known]]
        missing = np.flatnonzero(~known)
        for first in range(0, len(missing), _ROWS_AT_A_TIME):
            some = missing[first : first + _ROWS_AT_A_TIME]
            found[some] = initial(table, wanted[some])
        return found


def save_models(
    run: Path,
    models: Mapping[str, Mapping[str, np.ndarray]],
    note: Mapping[str, Any],
    ids: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write every stage's model: stage -> parameter -> values. ``note`` goes into the files' metadata; ``initial_seed``
    in it, and ``ids``, are those of :class:`SavedModel`."""
    listed = {f"{IDS}{table}": known for table, known in (ids or {}).items()}
    for stage, arrays in models.items():
        save(run / model_file(stage), {**arrays, **listed}, note)


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
    with _opened(path) as (_, metadata):
        noted = metadata.get(_CHECKSUM)
        return noted if isinstance(noted, str) else sha256_of(path)


def saved_shapes(run: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays in a stage's file, of which nothing else is read. InputError when it cannot be."""
    with _opened(run / model_file(stage)) as (file, _):
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict


def _read_model(run: Path, stage: str, prefix: str) -> SavedModel:
    path = run / model_file(stage)
    arrays, note = load(path, prefix)
    ids = {name.removeprefix(IDS): arrays.pop(name) for name in list(arrays) if name.startswith(IDS)}
    for table, known in ids.items():
        if known.dtype != np.int64 or known.ndim != 1 or (len(known) and known[0] < 0) or (np.diff(known) <= 0).any():
            raise InputError(f"{path}: {IDS}{table} is not a list of ascending ids; train again")
    seed = note.get("initial_seed")
    return SavedModel(path, arrays, ids, seed if type(seed) is int else None)


def save_state(
    path: Path, arrays: Mapping[str, np.ndarray], position: Mapping[str, int], note: Mapping[str, Any] | None = None
) -> None:
    """Write all that training needs to go on, in one file: named arrays and the position reached. ``note`` goes into
    the file's metadata."""
    save(path, arrays, {**(note or {}), "position": dict(position)})


def run_note(config: Mapping[str, Any]) -> dict[str, Any]:
    """What models and states note of their run, for :func:`check_same_run`."""
    return {_RUN: fingerprint(config)}


def check_same_run(path: Path, config: Mapping[str, Any]) -> None:
    """InputError when a model or state is of another run than the config.json beside it says; one that notes no run, as
    of an earlier version or another program, may be of any. Also InputError when it cannot be read."""
    with _opened(path) as (_, metadata):
        noted = metadata.get(_RUN)
    found, wanted = noted if isinstance(noted, dict) else {}, fingerprint(config)
    different = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    if different:
        raise InputError(
            f"{path}: is of another run than the {CONFIG_FILE} beside it, which differs in {', '.join(different[:4])}; "
            "put back the run's own file, or train again"
        )


def load_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """What :func:`save_state` wrote. InputError when the file is missing or damaged."""
    arrays, metadata = load(path)
    position = metadata.get("position")
    if isinstance(position, dict):
        position = {"skipped": 0, **position}  # earlier versions did not count them
    if (
        not isinstance(position, dict)
        or position.keys() != set(_POSITION)
        or not all(type(number) is int and 0 <= number < 1 << 63 for number in position.values())
    ):
        raise InputError(f"{path}: not the state of a training run; train again without --resume")
    return arrays, position


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write arrays and metadata, with checksums, atomically."""
    contiguous = {name: np.ascontiguousarray(values).reshape(values.shape) for name, values in arrays.items()}
    sealed = dict(metadata) | {_ARRAY_CHECKSUMS: {name: _sha256(values) for name, values in contiguous.items()}}
    sealed[_CHECKSUM] = _metadata_sha256(sealed)
    try:
        with (
            atomic_path(path) as temporary,
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder,
        ):
            # safetensors has a temporary file of its own, under a name that tells nothing: killed, it must be found.
            written = Path(folder) / path.name
            # One entry: safetensors writes several in random order.
            save_file(contiguous, written, metadata={_METADATA: json.dumps(sealed, sort_keys=True)})
            temporary.touch()
            written.chmod(temporary.stat().st_mode & 0o777)  # as any file; safetensors' are for their owner alone
            written.replace(temporary)
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error}); free the space or name another folder") from error


def load(path: Path, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays whose names begin with ``prefix``, and the metadata, of a safetensors file; checksums are verified.

    A file without checksums was not written by this project; it is taken with a warning. Raises InputError when the
    file is missing or damaged.
    """
    with _opened(path) as (file, metadata):
        names = set(file.keys())
        arrays = {name: file.get_tensor(name) for name in sorted(names) if name.startswith(prefix)}
    damaged = _damage(path, metadata, names, arrays)
    if damaged:
        raise InputError(f"{path}: damaged: {damaged} not match the checksum; copy the file again, or train again")
    return arrays, {name: value for name, value in metadata.items() if name not in (_ARRAY_CHECKSUMS, _CHECKSUM)}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file and our metadata in it. InputError when it is missing or damaged, before or in the block."""
    try:
        os.close(regular(str(path), os.O_RDONLY))  # a pipe would wait for a writer
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata are not an object")
            yield file, metadata
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; train first") from error
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); train again") from error


def _damage(path: Path, metadata: dict[str, Any], names: set[str], arrays: Mapping[str, np.ndarray]) -> str:
    """What does not match the checksums in the metadata; "" if all does."""
    if not metadata.keys() & {_CHECKSUM, _ARRAY_CHECKSUMS}:
        logger.warning("%s: has no checksums, so damage in it would not be seen", path)
        return ""
    if metadata.get(_CHECKSUM) != _metadata_sha256(metadata):
        return "its metadata do"
    known = metadata.get(_ARRAY_CHECKSUMS)
    if not isinstance(known, dict) or known.keys() != names:
        return "its list of tensors does"
    return next((f"tensor {name} does" for name in arrays if _sha256(arrays[name]) != known[name]), "")


def _sha256(values: np.ndarray) -> str:
    """Of a contiguous array's type (by its name in PyTorch), shape and bytes."""
    digest = hashlib.sha256(json.dumps([f"torch.{values.dtype.name}", list(values.shape)]).encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _metadata_sha256(metadata: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
