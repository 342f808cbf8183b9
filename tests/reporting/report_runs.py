"""Runs with everything a report shows, and names that would be markup if they were not escaped."""

from pathlib import Path

import numpy as np

from tests.reporting.fake_runs import add_requests, write_costs, write_run, write_steps, write_streaming

SCRIPT = "<script>alert(1)</script>"
MARKUP = "</script><img src=x onerror=alert(2)>\"'&amp;"
RECALLS = {"bce": 0.70, "arf": 0.78, "lcron": 0.80, SCRIPT: 0.60}
SURVIVAL = {"survival_after_retrieval": 0.9, "survival_after_rank": 0.8}
TIGHTNESS = {
    "bound_product": 0.2, "bound_product_at_quotas": 0.6, "bound_sampled_product": 0.65, "bound_sampled": 0.7,
    "bound_sampled_error": 0.001, "bound_hard": 0.8, "bound_violated": 0.0, "bound_violated_at_quotas": 0.05,
}  # fmt: skip
WITH_BOUND = ("lcron", SCRIPT)


def write_all(folder: Path) -> Path:
    """Four methods of three seeds, and an untrained cascade."""
    generator = np.random.default_rng(0)
    for index, (name, recall) in enumerate(RECALLS.items()):
        for seed in (30, 31, 32):
            run = write_run(
                folder / f"method{index}" / str(seed),
                name=name,
                results=SURVIVAL | {"warning": f"SIMULATED {MARKUP}"} | (TIGHTNESS if name in WITH_BOUND else {}),
                arguments={"batch_size": 16, "note": MARKUP, "tau": 10.0 * index},
                config={"commit": MARKUP, "device": "cpu", "versions": {"python": MARKUP}},
                seed=seed,
            )
            add_requests(run, np.clip(recall + generator.normal(0, 0.05, 40) + (seed - 31) / 100, 0, 1))
            losses = [2 - step / 50 + generator.normal(0, 0.1) for step in range(60)]
            weights = {f"weight.{stage}": [1 - step / 100 for step in range(60)] for stage in ("retrieval", "rank")}
            write_steps(run, losses, **weights)
            write_streaming(run, {f"2024-01-{date}": recall + date / 1000 for date in range(14, 20)})
            write_costs(run)
    untrained = write_run(folder / "untrained", epochs=0, results=SURVIVAL)
    add_requests(untrained, np.clip(generator.normal(0.4, 0.05, 40), 0, 1))
    return folder
