"""A run's models -> state_dict files with the parameter names of the paper's original code."""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

import torch

from deep_components import checkpoint
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.files import write_atomically
from deep_components.models.original_names import original_name

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The run and where its models go."""
    parser = argparse.ArgumentParser(description="Write models for the original code.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets <stage>.pt for every stage")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Read <stage>.safetensors of the run, write <stage>.pt."""
    args = parse_args(argv)
    setting = checkpoint.read_config(args.run).get("setting")
    if setting not in SETTINGS:
        raise InputError(
            f"{args.run / checkpoint.CONFIG_FILE}: setting is {setting!r}, not one of {', '.join(SETTINGS)}"
        )
    for stage in SETTINGS[setting].stage_names:
        tensors, _ = checkpoint.load_tensors(args.run / f"{stage}.safetensors")
        state = {original_name(stage, name): value for name, value in tensors.items()}
        write_atomically(args.output_dir / f"{stage}.pt", partial(torch.save, state))
    logger.info("exported %s -> %s", args.run, args.output_dir)


if __name__ == "__main__":
    sys.exit(run_command(main))
