"""What config.json says of a training: its arguments, its data, and what it ran on."""

import argparse
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deep_components.arguments import hyper_parameters, recorded_arguments
from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.log import Log, zone_of
from deep_components.errors import InputError
from deep_components.files import as_json
from deep_components.models import model_classes
from deep_components.runs.code import training_code
from deep_components.runs.folder import read_config_if_any
from deep_components.runs.state import model_checksum


def run_config(
    cascade: Cascade,
    args: argparse.Namespace,
    loss: nn.Module,
    log: Log,
    train_days: Sequence[str],
    opened: Sequence[DayCache],
    validation_day: DayCache | None = None,
) -> dict[str, Any]:
    """All that makes a training this one (runs/identity.py), as config.json holds it.

    InputError when --init_from lacks a model, or the validation day is one of the ``opened`` training days, or of those
    of --init_from."""
    of_log = {"seq_len": args.seq_len or log.history_length, "time_zone": zone_of(log, args.time_zone)}
    held_out = [] if validation_day is None else [validation_day]
    seen = _days_of(args.init_from)
    for day in held_out:
        _check_no_copy(day, opened)
        check_not_seen(day, seen)
    parents = cascade.stage_names if args.init_from is not None else ()
    return as_json(
        {
            "setting": cascade.name,
            "cascade": cascade.to_json(),
            "data": log.origin,
            "schema": log.schema.to_json(),
            "schema_checksum": log.schema.checksum,
            "encoding_checksum": log.encoding_checksum,
            "arguments": dict(sorted((recorded_arguments(args, loss) | of_log).items())),
            "loss": hyper_parameters(loss),
            "init_from_checksums": {stage: model_checksum(args.init_from, stage) for stage in parents},
            "train_days": list(train_days),
            "data_checksums": {day.day: day.checksum for day in (*opened, *held_out)},
            "code": training_code(args.loss_type, map(type, loss.modules()), model_classes(cascade), bool(held_out)),
        }
        | ({"validation_day": validation_day.day} if validation_day is not None else {})
        | ({"init_from_days": seen} if seen else {})
    )


def _days_of(parent: Path | None) -> dict[str, str]:
    """Checksum -> name of the days that the models of --init_from were trained on, and those of their own --init_from;
    of models of another program, and of an earlier version's --init_from, none is known."""
    config = (read_config_if_any(parent) if parent is not None else None) or {}
    own = {day: checksum for day, checksum in config.get("data_checksums", {}).items()
           if day != config.get("validation_day")}  # fmt: skip
    return config.get("init_from_days", {}) | {str(checksum): str(day) for day, checksum in own.items()}


def check_not_seen(day: DayCache, seen: Mapping[str, str]) -> None:
    """InputError when a day that is to validate is one that the models of --init_from were trained on, ``seen``."""
    if day.checksum in seen:
        raise InputError(
            f"day {day.day}, which validates, is one that the models of --init_from were trained on "
            f"({seen[day.checksum]}); name other days with --train_days, or other models"
        )


def _check_no_copy(validation_day: DayCache, opened: Sequence[DayCache]) -> None:
    """InputError when the validation day is a training day under another name."""
    for day in opened:
        if day.checksum == validation_day.checksum:
            raise InputError(
                f"day {validation_day.day}, which validates, has the same requests as day {day.day}, which trains; "
                "leave one of them out with --train_days"
            )


def environment(device: torch.device, compiled: bool) -> dict[str, Any]:
    """What a training ran on; other values may change the last digits."""
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if compiled else "pytorch",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's commit, with "-modified" where files differ from it; None outside a git checkout."""
    # GIT_DIR and its like would name another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=variables).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
