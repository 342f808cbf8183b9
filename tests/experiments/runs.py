"""Runs whose commands are fakes, and what the fakes wrote down.

The package is imported late: the fakes import this module and must not wait for PyTorch.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

DAYS = ("2024-01-13", "2024-01-14", "2024-01-15", "2024-01-16")
CHECKSUMS = {day: f"sum of {day}" for day in DAYS}


def fake_run(folder: Path, seed: int = 30, streaming: bool = False, **arguments: Any) -> Any:
    """A run on DAYS in folder/seed<seed>; ``arguments`` are the training's, e.g. lr=13 for one that fails."""
    from deep_components.experiments.plan import Part, Run

    parts = tuple(Part(DAYS[:count], DAYS[count]) for count in range(1 if streaming else len(DAYS) - 1, len(DAYS)))
    known: dict[str, Any] = {
        "seed": seed,
        "epochs": 1,
        "lr": 0.01,
        "loss_type": "lcron",
        "batch_size": 1024,
    } | arguments
    return Run(
        name="mine",
        variant="streaming" if streaming else "",
        folder=folder / f"seed{seed}",
        data_dir=folder,
        commands=("tests.experiments.fake_training", "tests.experiments.fake_evaluation"),
        training=tuple(f"--{name}={value}" for name, value in arguments.items()),
        evaluation=(),
        config={
            "setting": "two_stage",
            "data": "simulated",
            "arguments": known,
            "train_days": list(parts[-1].train_days),
            "data_checksums": {day: CHECKSUMS[day] for day in parts[-1].train_days},
        },
        parts=parts,
        checksums=CHECKSUMS,
        steps=3 * known["epochs"],
        streaming=streaming,
        days_named=True,
        cwd=folder,
    )


def on_days(run: Any, *parts: tuple[tuple[str, ...], str]) -> Any:
    """The run with other days: (training days, test day)."""
    from deep_components.experiments.plan import Part

    days = list(parts[-1][0])
    return replace(run, parts=tuple(Part(*part) for part in parts), config=dict(run.config) | {"train_days": days})


def calls(run: Any) -> list[list[str]]:
    """The arguments of the trainings of a run, the number of threads last."""
    path = run.folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(run: Any) -> dict[str, Any]:
    return json.loads((run.folder / "run.json").read_text())
