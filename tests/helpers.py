"""What the tests of training and evaluation share: a small log, and runs on it inside this process."""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from deep_components import run_test2, run_train2
from deep_components.dataset.simulate import SimulationSettings, simulate
from deep_components.files import read_json

DAYS = ("2024-01-13", "2024-01-14", "2024-01-15")  # by default the first two train and the last one tests
REQUESTS_PER_DAY = 40
BATCH_SIZE = 16  # two whole batches a day; 8 requests are left
STAGES = ("retrieval", "rank")
SMALL = ("--loss_type=lcron", f"--batch_size={BATCH_SIZE}", "--emb_dim=4", "--nn_units=16", "--seq_len=5")


# Python that prints the bytes its process took at the most. The maximum that getrusage knows is, right after the start,
# that of the process which started it.
PRINT_PEAK = """
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024)
"""


def small_log(factory: pytest.TempPathFactory, seed: int = 0, users: int = 30) -> Path:
    """A simulated log, made once a session for each of its settings."""
    return _small_log(factory.getbasetemp() / f"log-{seed}-{users}", seed, users)


@cache
def _small_log(folder: Path, seed: int, users: int) -> Path:
    settings = SimulationSettings(
        days=DAYS, requests_per_day=REQUESTS_PER_DAY, users=users, videos=200, authors=20, seed=seed
    )
    simulate(folder, settings)
    return folder


def training_arguments(log: Path, run: Path, *flags: str) -> list[str]:
    """The command line of a small training run; ``flags`` come last, so that they win."""
    device = [] if any(flag.startswith("--cuda") for flag in flags) else ["--device=cpu"]
    return [*SMALL, *device, f"--data_dir={log}", f"--output_dir={run}", *flags]


def evaluation_arguments(log: Path, run: Path, *flags: str) -> list[str]:
    return ["--device=cpu", f"--data_dir={log}", f"--output_dir={run}", *flags]


def train(log: Path, run: Path, *flags: str) -> Path:
    """Train a small two-stage run in ``run``."""
    run_train2.main(training_arguments(log, run, *flags))
    return run


def evaluate(log: Path, run: Path, *flags: str) -> dict[str, Any]:
    """Evaluate the run; its metrics.json."""
    run_test2.main(evaluation_arguments(log, run, *flags))
    return read_json(run / "metrics.json")


def parameters(run: Path) -> dict[str, np.ndarray]:
    """All parameters of a run as ``<stage>/<name>``."""
    return {
        f"{stage}/{name}": value
        for stage in STAGES
        for name, value in load_file(run / f"{stage}.safetensors").items()
    }  # fmt: skip


def same_parameters(one: Path, other: Path) -> bool:
    ours, theirs = parameters(one), parameters(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def config(run: Path) -> dict[str, Any]:
    return read_json(run / "config.json")


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """train.jsonl without the seconds, which no two runs share."""
    records = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def contents(run: Path, *names: str) -> dict[str, bytes]:
    """The bytes of the named files of a run."""
    return {name: (run / name).read_bytes() for name in names}


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that a command left behind."""
    return sorted(folder.rglob(".*.tmp"))


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Until it holds; a busy machine may need long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
