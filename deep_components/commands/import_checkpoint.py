"""Checkpoints of the paper's original code (state_dict files) -> a run folder that --init_from and run_test accept."""

import argparse
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_components.cascade import SETTINGS, THREE_STAGE, Cascade, Stage
from deep_components.checkpoint import as_array
from deep_components.cli import Parser
from deep_components.dataset.clock import DEFAULT_TIME_ZONE
from deep_components.dataset.importers.recflow_files import HISTORY_LENGTH
from deep_components.errors import InputError
from deep_components.files import make_folder, regular
from deep_components.models import MODELS
from deep_components.models.original_names import from_original
from deep_components.runs.folder import CONFIG_FILE, remove_run, write_json
from deep_components.runs.state import TABLE, save_models
from deep_components.schema import RECFLOW_IDS, Schema, recflow_schema

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Read checkpoints of the original code.")
    parser.add_argument("--setting", choices=sorted(SETTINGS), required=True)
    for stage in THREE_STAGE.stage_names:
        parser.add_argument(f"--{stage}", type=Path, metavar="FILE", help=f"the {stage} model's state_dict")
    parser.add_argument("--output_dir", type=Path, required=True, help="the run folder to write")
    return parser.parse_args(argv)


def import_checkpoint(cascade: Cascade, files: Mapping[str, Path], output_dir: Path) -> None:
    """Write ``<stage>.safetensors`` and config.json from the original's state_dict files.

    Sizes (ids of every field, embedding dimension, tower width) are read off the parameters. InputError when a file is
    damaged, holds more than tensors, or its parameters are not the stage's model.
    """
    states = {stage.name: _read(stage, files[stage.name]) for stage in cascade.stages}
    sizes = {stage.name: _sizes(stage, files[stage.name], states[stage.name]) for stage in cascade.stages}
    first = cascade.stage_names[0]
    for stage in cascade.stage_names:
        if sizes[stage] != sizes[first]:
            raise InputError(f"{files[stage]} and {files[first]} have tables or towers of different sizes; "
                             "give the checkpoints of one run")  # fmt: skip
    schema, arguments = sizes[first]
    make_folder(output_dir)
    remove_run(output_dir, cascade.stage_names)
    arrays = {stage: {name: as_array(value) for name, value in state.items()} for stage, state in states.items()}
    save_models(output_dir, arrays, {"data": "unknown", "loss_type": "imported"})
    arguments |= {"loss_type": "imported", "seed": None, "epochs": None, "seq_len": HISTORY_LENGTH}
    config: dict[str, Any] = {
        "setting": cascade.name,
        "cascade": cascade.to_json(),
        "data": "unknown",
        "schema": schema.to_json(),
        "schema_checksum": schema.checksum,
        "arguments": arguments | {"time_zone": DEFAULT_TIME_ZONE},
        "train_days": [],
        "imported_from": {stage: str(files[stage]) for stage in cascade.stage_names},
        "commit": None,
    }
    write_json(output_dir / CONFIG_FILE, config)


def _read(stage: Stage, path: Path) -> dict[str, Tensor]:
    """The file's tensors under our names."""
    try:
        os.close(regular(str(path), os.O_RDONLY))  # a pipe would wait for a writer
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; --{stage} names the {stage} model's state_dict") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable state_dict of tensors alone ({reason}); save the model's state_dict()"
                         ) from error  # fmt: skip
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: not a state_dict of tensors; save the model's state_dict()")
    for name, value in content.items():  # a tensor of stride 0 can have any size in a small file
        if value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise InputError(f"{path}: parameter {name} is larger than what the file holds of it; save the model's "
                             "state_dict()")  # fmt: skip
    try:
        # Models wrapped for several GPUs save their names behind "module.".
        return from_original(stage.model, {str(name).removeprefix("module."): value for name, value in content.items()})
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: parameter {error} is none of the original's {stage.name} model; "
                         "give each stage its own file") from error  # fmt: skip


def _sizes(stage: Stage, path: Path, state: Mapping[str, Tensor]) -> tuple[Schema, dict[str, Any]]:
    """Schema and model arguments; InputError unless they explain every parameter's shape."""
    try:
        schema = recflow_schema({name: len(state[f"{TABLE}{name}"]) - 2 for name in RECFLOW_IDS})
        emb_dim = state[f"{TABLE}user"].shape[1]
        first_layer = state["user_tower.0.weight" if stage.model == "dssm" else "tower.0.weight"]
        nn_units = len(first_layer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: parameter {error} is missing; give each stage its own file") from error
    with torch.device("meta"):
        parameters = MODELS[stage.model](schema, emb_dim, nn_units).state_dict()
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    expected |= {f"{TABLE}{name}": (table.size, emb_dim) for name, table in schema.tables.items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise InputError(
            f"{path}: parameter {min(wrong)} is missing, or of another shape than the {stage.name} model's"
        )
    dtype = "float64" if first_layer.dtype == torch.float64 else "float32"
    return schema, {"emb_dim": emb_dim, "nn_units": nn_units, "dtype": dtype}


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
