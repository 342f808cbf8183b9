"""Folders of runs as training and evaluation leave them, made by hand."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARGUMENTS = {"loss_type": "lcron", "seed": 30, "tau": 50.0, "epochs": 1, "lr": 0.01, "output_dir": "x", "cuda": None}
RESULTS = {
    "joint_recall@10@20": 0.5,
    "rank_ndcg@10": 0.25,
    "rank_kendall_tau": 0.1,
    "num_requests": 40,
    "test_day": "2024-02-04",
    "setting": "two_stage",
    "loss_type": "lcron",
    "seed": 30,
    "epochs": 1,
    "data": "recflow",
}


def write_run(
    folder: Path,
    recall: float | None = 0.5,
    arguments: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    **both: Any,
) -> Path:
    """A run's folder; ``both`` goes into the arguments and into the results, as the seed does."""
    folder.mkdir(parents=True)
    all_arguments = ARGUMENTS | {"output_dir": str(folder)} | both | dict(arguments or {})
    (folder / "config.json").write_text(json.dumps({"arguments": all_arguments} | dict(config or {})))
    all_results = RESULTS | {"joint_recall@10@20": recall} | both | dict(results or {})
    (folder / "metrics.json").write_text(json.dumps(all_results))
    if name is not None:
        (folder / "run.json").write_text(json.dumps({"name": name}))
    return folder


def write_runs(folder: Path, recalls: Iterable[float], first_seed: int = 30, **others: Any) -> Path:
    """A method's folder: a run for each value, with seeds from ``first_seed``."""
    for seed, recall in enumerate(recalls, start=first_seed):
        write_run(folder / f"seed{seed}", recall, seed=seed, **others)
    return folder


def add_requests(run: Path, recalls: Sequence[float] | np.ndarray, ids: Sequence[int] | None = None) -> Path:
    """Give the run these values per request; metrics.json gets their mean."""
    path = run / "metrics.json"
    values = np.asarray(recalls, dtype=np.float64)
    changed = {"joint_recall@10@20": float(np.nanmean(values)), "num_requests": len(values)}
    results = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(results))
    arrays = {"joint_recall@10@20": values, "rank_ndcg@10": np.full(len(values), results["rank_ndcg@10"])}
    requests = np.arange(len(values)) if ids is None else np.asarray(ids, dtype=np.int64)
    np.savez(run / "per_request.npz", allow_pickle=False, request_id=requests, **arrays)
    return run


def corpus(recall: float | None = 0.25, **changes: Any) -> dict[str, Any]:
    """What metrics.json says of an evaluation over a corpus."""
    names = ("corpus_recall@10@20", "corpus_recall_after_retrieval@10@30")
    content = {"items": 12345, "checksum": "a" * 64, "filter_seen": False} | dict.fromkeys(names, recall)
    return content | {"index": {"ivf": {"corpus_recall@10@20": 0.2}}} | changes


def write_steps(run: Path, losses: Sequence[float | None], **terms: Sequence[float]) -> Path:
    """Give the run a step log."""
    records = [
        {"step": step, "day": "2024-01-13", "loss": loss, **{name: values[step - 1] for name, values in terms.items()}}
        | {"seconds": 0.1, "data": "simulated"}
        for step, loss in enumerate(losses, start=1)
    ]
    (run / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def write_streaming(run: Path, recalls: Mapping[str, float | None]) -> Path:
    """Give the run a stream: test day -> joint recall."""
    days = [{"test_day": day, "joint_recall@10@20": recall} for day, recall in recalls.items()]
    (run / "streaming.json").write_text(json.dumps({"days": days}))
    return run


def write_costs(run: Path, **changes: Any) -> Path:
    """Say what the run's training took."""
    cost = {"steps": 60, "requests": 960, "seconds": 4.0, "device": "cpu", "peak_memory_bytes": 1 << 30}
    (run / "training.json").write_text(json.dumps(cost | {"peak_gpu_memory_bytes": None} | changes))
    return run
