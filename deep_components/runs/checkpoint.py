"""What a run leaves behind: config.json, <stage>.safetensors, and the state from which training goes on.

All of it carries a SHA-256 of its content, which is verified when it is read.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deep_components.batch import PADDING_INDEX
from deep_components.cascade import SETTINGS
from deep_components.errors import InputError
from deep_components.files import atomic_path, read_json, temporaries
from deep_components.files import write_json as write_json
from deep_components.tables.embedding import FieldEmbedding, fill_initial_rows
from deep_components.training.memory import available

CONFIG_FILE = "config.json"
STATE_FILE = "training_state.safetensors"
METRICS_FILE = "metrics.json"
LOCK_FILE = ".lock"
COST_FILE = "training.json"
SCORES_FILE = "scores.npz"
PER_REQUEST_FILE = "per_request.npz"
STEP_LOG_FILE = "train.jsonl"
RUN_FILE = "run.json"  # of the runner
STREAMING_FILE = "streaming.json"

_METADATA = "run"
_TABLES, _IDS = "embedding.", "ids."  # a stage's parameters of the tables; the ids of compacted ones
_TENSOR_CHECKSUMS, _CHECKSUM = "tensor_sha256", "sha256"  # entries of the metadata; the second one covers all others
_ROWS_PER_PIECE = 1 << 20  # bounds the temporary memory of making a table whole
_CONFIG_FIELDS = {"setting": str, "data": str, "arguments": dict, "id_counts": dict, "train_days": list}
_CONFIG_ARGUMENTS = ("emb_dim", "nn_units", "seq_len", "dtype", "time_zone", "loss_type", "seed", "epochs")

logger = logging.getLogger(__name__)


def remove_results(run: Path) -> None:
    """Remove the models of every stage and what an evaluation made of them: a new training is about to replace them."""
    for name in (COST_FILE, METRICS_FILE, SCORES_FILE, PER_REQUEST_FILE, *_model_files()):
        (run / name).unlink(missing_ok=True)


def _model_files() -> list[str]:
    stages = {stage for cascade in SETTINGS.values() for stage in cascade.stage_names}
    return [f"{stage}.safetensors" for stage in sorted(stages)]


def remove_leftovers(run: Path) -> None:
    """Remove what a training that was killed while it wrote a file left of it; nobody else may be training there."""
    for name in (STATE_FILE, CONFIG_FILE, STEP_LOG_FILE, COST_FILE, *_model_files()):
        for leftover in temporaries(run / name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json. InputError when there is none or it is damaged."""
    path = run / CONFIG_FILE
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {run} is not the folder of a training run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); train again") from error


def read_training(run: Path) -> dict[str, Any]:
    """A run's config.json, which must hold what evaluating or continuing the training needs. InputError if not."""
    path, config = run / CONFIG_FILE, read_config(run)
    for field, kind in _CONFIG_FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise InputError(f"{path}: field {field} is missing or damaged; train again")
    for name in _CONFIG_ARGUMENTS:
        if name not in config["arguments"]:
            raise InputError(f"{path}: field arguments lacks {name}; train again")
    return config


def save_models(
    run: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    note: Mapping[str, Any],
    ids: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write ``<stage>.safetensors`` from every stage's state dict.

    Args:
        run: the folder.
        states: stage -> its model's state dict.
        note: goes into the files' metadata. Where tables are compacted, ``initial_seed`` in it gives the initial values
            of the ids that they lack.
        ids: field -> the ids of its compacted table's rows; written beside the tables as ``ids.<field>``.
    """
    listed = {f"{_IDS}{field}": torch.from_numpy(known) for field, known in (ids or {}).items()}
    for stage, state in states.items():
        _save(run / f"{stage}.safetensors", {**state, **listed}, note)


def saved_ids(run: Path, stage: str) -> dict[str, np.ndarray]:
    """The ids of the compacted tables of a stage's checkpoint. InputError when they are damaged."""
    path = run / f"{stage}.safetensors"
    tensors, _ = load_tensors(path, _IDS)
    return _take_ids(path, tensors)


def _take_ids(path: Path, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Remove the ids of compacted tables from a checkpoint's tensors; field -> its ids. InputError when damaged."""
    listed = [name for name in tensors if name.startswith(_IDS)]
    return {name.removeprefix(_IDS): _checked_ids(path, name, tensors.pop(name)) for name in listed}


def _checked_ids(path: Path, name: str, ids: Tensor) -> np.ndarray:
    if ids.dtype != torch.int64 or ids.ndim != 1 or (len(ids) and ids[0] < 0) or not (ids.diff() > 0).all():
        raise InputError(f"{path}: {name} is not a list of ascending ids; train again")
    return ids.numpy()


@torch.no_grad()
def load_models(run: Path, models: Mapping[str, nn.Module]) -> int | None:
    """Read every stage's parameters from ``run`` into ``models``, cast to the models' type.

    A compacted table gets the rows of its ids; an id that the checkpoint lacks gets its initial value, which is that of
    the checkpoint's seed.

    Returns:
        the seed of the initial values; None for a checkpoint whose tables are all whole.

    Raises:
        InputError: a file is missing or damaged, or its parameters do not fit the model.
    """
    seed = None
    for stage, model in models.items():
        path = run / f"{stage}.safetensors"
        tensors, note = load_tensors(path)
        ids = _take_ids(path, tensors)
        expected = dict(model.state_dict())
        embedding = getattr(model, "embedding", None)
        known = embedding.ids if isinstance(embedding, FieldEmbedding) else {}
        for field in sorted(ids.keys() | known.keys()):
            name = f"{_TABLES}{field}"
            if name in expected and name in tensors:
                seed = note.get("initial_seed")
                rows = known[field].ids() if field in known else np.arange(len(expected[name]))
                tensors[name] = _rows_of_ids(path, f"{stage}.{field}", tensors[name], ids.get(field), rows, seed)
        for name in sorted(expected.keys() | tensors.keys()):
            found, wanted = (tuple(part[name].shape) if name in part else None for part in (tensors, expected))
            if found != wanted:
                raise InputError(
                    f"{path}: parameter {name} has shape {found}, but the model wants {wanted}; use the "
                    "data and the sizes (--emb_dim, --nn_units) that the checkpoint was trained with"
                )
        model.load_state_dict(tensors)
    return seed


@torch.no_grad()
def load_whole(run: Path, stage: str, vocabulary: Mapping[str, int]) -> dict[str, Tensor]:
    """A stage's parameters with every table whole: ``vocabulary[field] + 2`` rows, an id that a compacted table lacks
    at its initial value, which is where dense Adam leaves what no request names.

    Args:
        vocabulary: number of distinct ids of every field.

    Raises:
        InputError: the checkpoint is missing or damaged, its ids do not fit the vocabulary, or the whole tables do not
            fit into memory.
    """
    path = run / f"{stage}.safetensors"
    tensors, note = load_tensors(path)
    ids = _take_ids(path, tensors)
    for field, known in ids.items():
        table = tensors.get(f"{_TABLES}{field}")
        if table is None or table.ndim != 2 or len(table) != len(known) or field not in vocabulary:
            raise InputError(f"{path}: the ids of {stage}.{field} do not fit its table; train again")
        if len(known) and known[-1] >= vocabulary[field] + 2:
            raise InputError(f"{path}: the ids of {stage}.{field} are more than {CONFIG_FILE} names; train again")
    needed = sum((vocabulary[field] + 2) * _row_bytes(tensors[f"{_TABLES}{field}"]) for field in ids)
    free = available(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"{path}: its whole tables take {needed / 1e9:.1f} GB of memory, where {free / 1e9:.1f} GB are free; "
            "free some, or use a machine with more"
        )
    for field, known in ids.items():
        name = f"{_TABLES}{field}"
        tensors[name] = _whole(path, f"{stage}.{field}", tensors[name], known, vocabulary[field] + 2, note)
    return tensors


def _row_bytes(table: Tensor) -> int:
    return table.shape[1] * table.dtype.itemsize


def _whole(path: Path, name: str, table: Tensor, saved: np.ndarray, rows: int, note: Mapping[str, Any]) -> Tensor:
    """A compacted table among the initial values of all other rows, which are drawn piece by piece."""
    if len(saved) == rows:
        return table
    seed, field = note.get("initial_seed"), name.partition(".")[2]
    if not isinstance(seed, int):
        raise InputError(f"{path}: initial_seed, of the rows that table {name} lacks, is missing; train again")
    whole = table.new_empty(rows, table.shape[1])
    for first in range(0, rows, _ROWS_PER_PIECE):
        piece = np.arange(first, min(rows, first + _ROWS_PER_PIECE))
        fill_initial_rows(whole[first : first + len(piece)], seed, name, piece, PADDING_INDEX.get(field, 0))
    whole[torch.from_numpy(saved)] = table
    return whole


def _rows_of_ids(
    path: Path, name: str, table: Tensor, saved: np.ndarray | None, wanted: np.ndarray, seed: int | None
) -> Tensor:
    """The rows of the ``wanted`` ids (ascending) of a saved table, whose rows are those of the ``saved`` ids."""
    saved = np.arange(len(table)) if saved is None else saved
    if saved.shape != (len(table),):
        raise InputError(f"{path}: the ids of {name} do not fit its table; train again")
    place = np.searchsorted(saved, wanted).clip(max=max(len(saved) - 1, 0))
    there = saved[place] == wanted if len(saved) else np.zeros(len(wanted), bool)
    if seed is None and not there.all():
        raise InputError(
            f"{path}: table {name} lacks id {wanted[~there][0]}; use the log that the checkpoint was trained with"
        )
    rows = table.new_empty(len(wanted), *table.shape[1:])
    rows[torch.from_numpy(there)] = table[torch.from_numpy(place[there])]
    if seed is not None and not there.all():
        missing = table.new_empty(int((~there).sum()), *table.shape[1:])
        field = name.partition(".")[2]
        fill_initial_rows(missing, seed, name, wanted[~there], PADDING_INDEX.get(field, 0))
        rows[torch.from_numpy(~there)] = missing
    return rows


def save_state(path: Path, tensors: Mapping[str, Tensor], position: Mapping[str, int]) -> None:
    """Write all that training needs to go on, in one file: named tensors and the position reached."""
    _save(path, dict(tensors), {"position": dict(position)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What :func:`save_state` wrote. InputError when the file is missing or damaged."""
    tensors, metadata = load_tensors(path)
    try:
        return tensors, {name: int(metadata["position"][name]) for name in ("epoch", "day", "batch", "step")}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the state of a training run; train again without --resume") from error


def _save(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    on_cpu = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    sealed = dict(metadata) | {_TENSOR_CHECKSUMS: {name: _tensor_sha256(value) for name, value in on_cpu.items()}}
    sealed[_CHECKSUM] = _metadata_sha256(sealed)
    try:
        with (
            atomic_path(path) as temporary,
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder,
        ):
            # safetensors has a temporary file of its own, under a name that tells nothing: killed, it must be found.
            written = Path(folder) / path.name
            # One entry: safetensors writes several in random order.
            save_file(on_cpu, written, metadata={_METADATA: json.dumps(sealed, sort_keys=True)})
            temporary.touch()
            written.chmod(temporary.stat().st_mode & 0o777)  # as any file; safetensors' are for their owner alone
            written.replace(temporary)
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error}); free the space or name another folder") from error


def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors whose names begin with ``prefix``, and the metadata, of a safetensors file; checksums are verified.

    A file without checksums was not written by this project; it is taken with a warning. Raises InputError when the
    file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata are not an object")
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in sorted(names) if name.startswith(prefix)}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; train first") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); train again") from error
    _verify(path, metadata, names, tensors)
    return tensors, {name: value for name, value in metadata.items() if name not in (_TENSOR_CHECKSUMS, _CHECKSUM)}


def _verify(path: Path, metadata: Any, names: set[str], tensors: Mapping[str, Tensor]) -> None:
    """InputError unless the checksums in the metadata hold."""
    if isinstance(metadata, dict) and not metadata.keys() & {_CHECKSUM, _TENSOR_CHECKSUMS}:
        logger.warning("%s: has no checksums, so damage in it would not be seen", path)
        return
    if not isinstance(metadata, dict) or metadata.get(_CHECKSUM) != _metadata_sha256(metadata):
        damaged = "its metadata do"
    elif metadata[_TENSOR_CHECKSUMS].keys() != names:
        damaged = "its list of tensors does"
    else:
        wrong = [name for name in tensors if _tensor_sha256(tensors[name]) != metadata[_TENSOR_CHECKSUMS][name]]
        damaged = f"tensor {wrong[0]} does" if wrong else ""
    if damaged:
        raise InputError(f"{path}: damaged: {damaged} not match the checksum; copy the file again, or train again")


def _tensor_sha256(value: Tensor) -> str:
    """Of a contiguous tensor's type, shape and bytes on the CPU, which are read where they lie."""
    digest = hashlib.sha256(json.dumps([str(value.dtype), list(value.shape)]).encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata_sha256(metadata: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
