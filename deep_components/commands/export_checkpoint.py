"""A run's models -> state_dict files with the parameter names of the paper's original code."""

import argparse
import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.errors import InputError
from deep_components.files import write_atomically
from deep_components.models.original_names import original_name
from deep_components.runs import checkpoint

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The run and where its models go."""
    parser = argparse.ArgumentParser(description="Write models for the original code.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets <stage>.pt for every stage")
    return parser.parse_args(argv)


def _vocabulary(path: Path, counts: Mapping[str, Any]) -> dict[str, int]:
    """Distinct ids of every field; ``counts`` are those of the log's columns."""
    for column in LOG_COLUMN.values():
        count = counts.get(column)
        if not isinstance(count, int) or count < 0:
            raise InputError(f"{path}: field id_counts has no count of {column}; train again")
    return {field: counts[column] for field, column in LOG_COLUMN.items()}


def _renamed(path: Path, stage: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return {original_name(stage, name): value for name, value in tensors.items()}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: parameter {error} is none of the {stage} model; train again") from error


def main(argv: list[str]) -> None:
    """Read <stage>.safetensors of the run, write <stage>.pt with whole tables, as the original code has them."""
    args = parse_args(argv)
    config = checkpoint.read_training(args.run)
    setting = config["setting"]
    if setting not in SETTINGS:
        raise InputError(
            f"{args.run / checkpoint.CONFIG_FILE}: setting is {setting!r}, not one of {', '.join(SETTINGS)}"
        )
    vocabulary = _vocabulary(args.run / checkpoint.CONFIG_FILE, config["id_counts"])
    for stage in SETTINGS[setting].stage_names:
        tensors = checkpoint.load_whole(args.run, stage, vocabulary)
        state = _renamed(args.run / f"{stage}.safetensors", stage, tensors)
        write_atomically(args.output_dir / f"{stage}.pt", partial(torch.save, state))
    logger.info("exported %s -> %s", args.run, args.output_dir)


