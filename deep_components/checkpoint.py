"""What a run leaves behind: config.json, <stage>.safetensors, and the state from which training goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deep_components.cascade import SETTINGS
from deep_components.errors import InputError
from deep_components.files import atomic_path, write_atomically

CONFIG_FILE = "config.json"
STATE_FILE = "training_state.safetensors"
METRICS_FILE = "metrics.json"
COST_FILE = "training.json"
SCORES_FILE = "scores.npz"
PER_REQUEST_FILE = "per_request.npz"
STEP_LOG_FILE = "train.jsonl"

_METADATA = "run"
_CONFIG_FIELDS = {"setting": str, "data": str, "arguments": dict, "id_counts": dict, "train_days": list}
_CONFIG_ARGUMENTS = ("emb_dim", "nn_units", "seq_len", "dtype", "time_zone", "loss_type", "seed", "epochs")


def remove_results(run: Path) -> None:
    """Remove the models of every stage and what an evaluation made of them: a new training is about to replace them."""
    stages = {stage for cascade in SETTINGS.values() for stage in cascade.stage_names}
    results = (COST_FILE, METRICS_FILE, SCORES_FILE, PER_REQUEST_FILE)
    for name in (*results, *(f"{stage}.safetensors" for stage in sorted(stages))):
        (run / name).unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, atomically."""
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json. InputError when there is none or it is damaged."""
    path = run / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {run} is not the folder of a training run") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); train again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object; train again")
    return config


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


def save_models(run: Path, states: Mapping[str, Mapping[str, Tensor]], note: Mapping[str, str]) -> None:
    """Write ``<stage>.safetensors`` from every stage's state dict; ``note`` goes into the files' metadata."""
    for stage, state in states.items():
        _save(run / f"{stage}.safetensors", dict(state), note)


def load_models(run: Path, models: Mapping[str, nn.Module]) -> None:
    """Read every stage's parameters from ``run`` into ``models``, cast to the models' type.

    Raises InputError when a file is missing or damaged, or its parameters do not fit the model.
    """
    for stage, model in models.items():
        path = run / f"{stage}.safetensors"
        tensors, _ = load_tensors(path)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != expected.get(name):
                raise InputError(
                    f"{path}: parameter {name} has shape {found}, but the model wants {expected.get(name)}; use the "
                    "data and the sizes (--emb_dim, --nn_units) that the checkpoint was trained with"
                )
        model.load_state_dict(tensors)


def save_state(path: Path, tensors: Mapping[str, Tensor], position: Mapping[str, int]) -> None:
    """Write all that training needs to go on, in one file: named tensors and the position reached."""
    _save(path, dict(tensors), {"position": dict(position)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What :func:`save_state` wrote. InputError when the file is missing or damaged."""
    tensors, metadata = load_tensors(path)
    try:
        return tensors, {name: int(metadata["position"][name]) for name in ("epoch", "day", "step")}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the state of a training run; train again without --resume") from error


def _save(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    on_cpu = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            # One entry: safetensors writes several in random order.
            save_file(on_cpu, temporary, metadata={_METADATA: json.dumps(dict(metadata), sort_keys=True)})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error}); free the space or name another folder") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a safetensors file. InputError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; train first") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); train again") from error
