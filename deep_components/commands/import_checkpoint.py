"""Checkpoints of the paper's original code (state_dict files) -> a run folder that --init_from and run_test accept."""

import argparse
import logging
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_components.cascade import SETTINGS, THREE_STAGE, Cascade
from deep_components.cli import run_command
from deep_components.dataset.columnar import DEFAULT_TIME_ZONE
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.dataset.importers.recflow_files import HISTORY_LENGTH
from deep_components.errors import InputError
from deep_components.files import make_folder
from deep_components.models import MODEL_OF_STAGE
from deep_components.models.original_names import from_original
from deep_components.runs import checkpoint

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """One file for each stage of the setting."""
    parser = argparse.ArgumentParser(description="Read checkpoints of the original code.", allow_abbrev=False)
    parser.add_argument("--setting", choices=sorted(SETTINGS), required=True)
    for stage in THREE_STAGE.stage_names:
        parser.add_argument(f"--{stage}", type=Path, metavar="FILE", help=f"the {stage} model's state_dict")
    parser.add_argument("--output_dir", type=Path, required=True, help="the run folder to write")
    return parser.parse_args(argv)


def import_checkpoint(cascade: Cascade, files: Mapping[str, Path], output_dir: Path) -> None:
    """Write ``<stage>.safetensors`` and config.json from the original's state_dict files.

    Sizes (ids of every field, embedding dimension, tower width) are read off the parameters.

    Raises InputError when a file is damaged, holds more than tensors, or its parameters are not the stage's model.
    """
    states = {stage: _read(stage, files[stage]) for stage in cascade.stage_names}
    sizes = {stage: _sizes(stage, files[stage], state) for stage, state in states.items()}
    first = cascade.stage_names[0]
    for stage in cascade.stage_names:
        if sizes[stage] != sizes[first]:
            raise InputError(f"{files[stage]} and {files[first]} have tables or towers of different sizes; "
                             "give the checkpoints of one run")  # fmt: skip
    vocabulary, arguments = sizes[first]["vocabulary"], sizes[first]["arguments"]
    make_folder(output_dir)
    checkpoint.remove_results(output_dir)
    for name in (checkpoint.STATE_FILE, checkpoint.STEP_LOG_FILE, checkpoint.RUN_FILE, checkpoint.STREAMING_FILE):
        (output_dir / name).unlink(missing_ok=True)
    checkpoint.save_models(output_dir, states, {"data": "unknown", "loss_type": "imported"})
    config = {
        "setting": cascade.name,
        "data": "unknown",
        "arguments": arguments
        | {"loss_type": "imported", "seed": None, "epochs": None, "seq_len": HISTORY_LENGTH}
        | {"time_zone": DEFAULT_TIME_ZONE},
        "train_days": [],
        "id_counts": {column: vocabulary[field] for field, column in LOG_COLUMN.items()},
        "imported_from": {stage: str(files[stage]) for stage in cascade.stage_names},
        "commit": None,
    }
    checkpoint.write_json(output_dir / checkpoint.CONFIG_FILE, config)


def _read(stage: str, path: Path) -> dict[str, Tensor]:
    """The file's tensors under our names."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; --{stage} names the {stage} model's state_dict") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable state_dict of tensors alone ({reason}); save the model's state_dict()"
                         ) from error  # fmt: skip
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: not a state_dict of tensors; save the model's state_dict()")
    try:
        # Models wrapped for several GPUs save their names behind "module.".
        return from_original(stage, {str(name).removeprefix("module."): value for name, value in content.items()})
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: parameter {error} is none of the original's {stage} model; "
                         "give each stage its own file") from error  # fmt: skip


def _sizes(stage: str, path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Vocabulary and model arguments; InputError unless they explain every parameter's shape."""
    try:
        vocabulary = {field: len(state[f"embedding.{field}"]) - 2 for field in LOG_COLUMN}
        emb_dim = state["embedding.user"].shape[1]
        first_layer = "user_tower.0.weight" if stage == "retrieval" else "tower.0.weight"
        nn_units = len(state[first_layer])
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: parameter {error} is missing; give each stage its own file") from error
    with torch.device("meta"):
        expected = MODEL_OF_STAGE[stage](vocabulary, emb_dim, nn_units).state_dict()
    wrong = [name for name in expected.keys() | state.keys() if _shape(expected, name) != _shape(state, name)]
    if wrong:
        raise InputError(f"{path}: parameter {min(wrong)} is missing or has another shape than the {stage} model's")
    dtype = "float64" if state[first_layer].dtype == torch.float64 else "float32"
    return {"vocabulary": vocabulary, "arguments": {"emb_dim": emb_dim, "nn_units": nn_units, "dtype": dtype}}


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def main(argv: list[str]) -> None:
    """Check that the files are those of the setting's stages, and import them."""
    args = parse_args(argv)
    cascade = SETTINGS[args.setting]
    files = {stage: getattr(args, stage) for stage in THREE_STAGE.stage_names}
    for stage, path in files.items():
        if (path is None) == (stage in cascade.stage_names):
            wanted = ", ".join(f"--{name}=FILE" for name in cascade.stage_names)
            raise InputError(f"--setting={args.setting} takes exactly {wanted}")
    import_checkpoint(cascade, files, args.output_dir)
    logger.info("imported %s -> %s", ", ".join(cascade.stage_names), args.output_dir)


