"""A run's folder: the names of its files, its JSON files, what is removed when, and who may write in it."""

import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deep_components import files
from deep_components.cascade import SETTINGS, Cascade
from deep_components.errors import InputError
from deep_components.files import temporaries
from deep_components.files import write_json as write_json

CONFIG_FILE = "config.json"
STATE_FILE = "training_state.safetensors"
STEP_LOG_FILE = "train.jsonl"
COST_FILE = "training.json"  # of a complete training
METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.npz"
PER_REQUEST_FILE = "per_request.npz"
ENCODING_FOLDER = "encoding"  # a copy of the log's: how raw values become the models' indices
RUN_FILE = "run.json"  # of the runner, as the next two
STREAMING_FILE = "streaming.json"
LOG_FILE = "run.log"
SWEEP_FILE = "sweep.json"  # of a sweep, beside its runs' folders
BEST_FOLDER = "best_at_step_"  # of a validated training, followed by the step: the models to go on from
LOCK_FILE, RUNNER_LOCK_FILE = ".lock", ".runner.lock"

# A shard of the state: step, rank, number of processes; and what a killed writer leaves of one.
_SHARD, _HALF_SHARD = (
    re.compile(pattern) for pattern in (r"training_state\.\d+\.\d+-of-\d+\.safetensors",
                                        r"\.training_state\.\d+\.\d+-of-\d+\.safetensors\..*\.tmp")
)  # fmt: skip
_CONFIG_FIELDS = {"setting": str, "data": str, "arguments": dict, "train_days": list}
_OPTIONAL_CONFIG_FIELDS = {"data_checksums": dict, "init_from_checksums": dict, "init_from_days": dict}
MAX_EMB_DIM, MAX_NN_UNITS = 1 << 16, 1 << 20
_MAX_INTEGER = (1 << 63) - 1
# Arguments of a training that evaluating or continuing it needs, and what they can be.
_CONFIG_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "emb_dim": lambda value: _integer(value, 1, MAX_EMB_DIM),
    "nn_units": lambda value: _integer(value, 4, MAX_NN_UNITS) and value % 4 == 0,
    "seq_len": lambda value: _integer(value, 0),
    "dtype": lambda value: value in ("float32", "float64"),
    "time_zone": lambda value: isinstance(value, str),
    "loss_type": lambda value: isinstance(value, str),
    "seed": lambda value: value is None or _integer(value, 0),  # None: models of another program
    "epochs": lambda value: value is None or _integer(value, 0),
}


def model_file(stage: str) -> str:
    """The name of the file of a stage's model."""
    return f"{stage}.safetensors"


def best_folder(run: Path, step: int) -> Path:
    """Where the best models of a training that is under way lie, those of that step."""
    return run / f"{BEST_FOLDER}{step}"


def remove_best(run: Path, but: Collection[int] = ()) -> None:
    """Remove the best models of all steps ``but`` these."""
    kept = {best_folder(run, step) for step in but}
    for path in run.glob(f"{BEST_FOLDER}*"):
        if path not in kept:
            files.remove(path)


def shard_file(step: int, rank: int, count: int) -> str:
    """The name of the file that the process of ``rank``, of ``count``, saves beside STATE_FILE at a step."""
    return f"training_state.{step}.{rank}-of-{count}.safetensors"


def remove_shards(run: Path, but: Collection[str] = ()) -> None:
    """Remove all shards ``but`` those of these names, which STATE_FILE needs."""
    _remove(run, lambda name: _SHARD.fullmatch(name) is not None and name not in but)


def _remove(run: Path, chosen: Callable[[str], bool]) -> None:
    for path in list(run.iterdir()) if run.is_dir() else ():
        if chosen(path.name):
            files.remove(path)


def tested_folder(sweep: Path) -> Path:
    """Where the settings that the sweep in this folder has chosen are tested. InputError for a folder without name."""
    folder = sweep.resolve() if sweep.name in ("", "..") else sweep.absolute()
    if not folder.name:
        raise InputError(f"{sweep}: the folder of a sweep needs a name; give another one")
    return folder.with_name(f"{folder.name}_test")


def remove_state(run: Path) -> None:
    """Remove all that a training would go on from: the state first, which names the rest."""
    (run / STATE_FILE).unlink(missing_ok=True)
    remove_shards(run)
    remove_best(run)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of a run; None when there is none. InputError when it is damaged."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); make the run again (the scripts: --force)") from error


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json. InputError when there is none or it is damaged."""
    config = read_config_if_any(run)
    if config is None:
        raise InputError(f"{run / CONFIG_FILE}: no such file; {run} is not the folder of a training run")
    return config


def read_config_if_any(run: Path) -> dict[str, Any] | None:
    """A run's config.json; None when there is none. InputError when it is damaged."""
    config = read_json(run / CONFIG_FILE)
    for field, kind in _OPTIONAL_CONFIG_FIELDS.items():
        if config is not None and not isinstance(config.get(field, {}), kind):
            raise InputError(
                f"{run / CONFIG_FILE}: field {field} is damaged; make the run again (the scripts: --force)"
            )
    return config


def read_training(run: Path) -> dict[str, Any]:
    """A run's config.json, which must hold what evaluating or continuing the training needs. InputError if not."""
    path, config = run / CONFIG_FILE, read_config(run)
    for field, kind in _CONFIG_FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise InputError(f"{path}: field {field} is missing or damaged; train again")
    if not all(isinstance(day, str) for day in config["train_days"]):
        raise InputError(f"{path}: field train_days is missing or damaged; train again")
    for name, sound in _CONFIG_ARGUMENTS.items():
        if name not in config["arguments"]:
            raise InputError(f"{path}: field arguments lacks {name}; train again")
        if not sound(config["arguments"][name]):
            value = reprlib.repr(config["arguments"][name])
            raise InputError(f"{path}: field arguments: {name} is {value}, which no training has; train again")
    return config


def _integer(value: Any, least: int, most: int = _MAX_INTEGER) -> bool:
    return type(value) is int and least <= value <= most


def cascade_of(run: Path, config: Mapping[str, Any]) -> Cascade:
    """The cascade that a run's config.json describes; runs of earlier versions only name one of SETTINGS.

    InputError when it describes none."""
    if "cascade" in config:
        return Cascade.from_json(config["cascade"], str(run / CONFIG_FILE))
    try:
        return SETTINGS[config["setting"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run / CONFIG_FILE}: field cascade is missing; train again") from error


def remove_results(run: Path, stages: Iterable[str]) -> None:
    """Remove the models of ``stages``, and of those the folder's config.json names, and what an evaluation made of
    them, and the encoding: a new training is about to replace them."""
    for name in (COST_FILE, METRICS_FILE, SCORES_FILE, PER_REQUEST_FILE, *_model_files(run, stages)):
        (run / name).unlink(missing_ok=True)
    files.remove_folder(run / ENCODING_FOLDER)


def remove_run(run: Path, stages: Iterable[str]) -> None:
    """Remove all results of a run, its state and its records."""
    remove_results(run, stages)
    remove_state(run)
    for name in (CONFIG_FILE, STEP_LOG_FILE, STREAMING_FILE, RUN_FILE):
        (run / name).unlink(missing_ok=True)


def remove_leftovers(run: Path, stages: Iterable[str]) -> None:
    """Remove what a training that was killed while it wrote a file left of it; nobody else may be training there. Whole
    shards that STATE_FILE does not name go with the next save, or :func:`remove_shards`."""
    for name in (STATE_FILE, CONFIG_FILE, STEP_LOG_FILE, COST_FILE, ENCODING_FOLDER, *_model_files(run, stages)):
        for leftover in temporaries(run / name):
            files.remove(leftover)
    _remove(run, lambda name: _HALF_SHARD.fullmatch(name) is not None)
    if not (run / STATE_FILE).exists():
        remove_shards(run)


def _model_files(run: Path, stages: Iterable[str]) -> list[str]:
    try:
        before = cascade_of(run, read_config(run)).stage_names
    except InputError:  # no run, or a damaged one
        before = ()
    return [model_file(stage) for stage in sorted({*stages, *before})]


@contextmanager
def only_user(run: Path, lock: str, purpose: str, wait: float = 0) -> Iterator[int]:
    """Hold the lock of that name in a run's folder, made if need be; yields its descriptor. A process that inherits the
    descriptor holds it too.

    InputError when another process holds it for longer than ``wait`` seconds, or the folder cannot be written: before
    or within the block.
    """
    try:
        with files.locked(run / lock, wait=wait) as descriptor:
            if descriptor is None:
                raise InputError(f"{run}: another process is {purpose}; wait for it, or name another --output_dir")
            yield descriptor
    except OSError as error:
        raise InputError(
            f"{run}: cannot be written ({error.strerror or error}); free the space or name another --output_dir"
        ) from error
