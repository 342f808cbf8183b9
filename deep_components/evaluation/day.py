"""Evaluating a cascade: checkpoint -> scores of a test day -> metrics.json."""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deep_components.arguments import COMPACT_FROM, DTYPES, choose_device
from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache, open_day
from deep_components.dataset.days import test_day
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.dataset.loader import batches
from deep_components.errors import InputError
from deep_components.files import write_atomically
from deep_components.kernels import load_kernels
from deep_components.metrics import cascade_metrics
from deep_components.models import build_models, use_kernels
from deep_components.runs import checkpoint
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore

logger = logging.getLogger(__name__)


@torch.inference_mode()
def score_day(
    models: Mapping[str, nn.Module],
    stores: Mapping[str, EmbeddingStore],
    day: DayCache,
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scores of every stage over every request of the day, in file order, in one pass.

    Returns:
        on the CPU: stage -> [R, N]; and "request_id" [R], "labels", "mask" and "group" [R, N].
    """
    first = next(iter(stores.values()))
    lookup = TableLookup(first.schema, first.ids, {})
    parts: dict[str, list[Tensor]] = {}
    with tqdm(
        total=len(day), unit="req", desc=f"scoring {day.day}", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for batch in batches(day, np.arange(len(day)), batch_size, device, lookup):
            columns = {stage: model(stores[stage].embed(batch.features)) for stage, model in models.items()}
            columns |= {"request_id": batch.request_id, **vars(batch.targets)}
            for name, values in columns.items():
                parts.setdefault(name, []).append(values.cpu())
            bar.update(len(batch.request_id))
    return {name: torch.cat(values) for name, values in parts.items()}


def evaluate_cascade(cascade: Cascade, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the run in args.output_dir (evaluation_parser): writes per_request.npz, metrics.json, and if asked for
    scores.npz.

    Returns:
        the content of metrics.json.
    """
    config = checkpoint.read_training(args.output_dir)
    if config.get("setting") != cascade.name:
        raise InputError(
            f"{args.output_dir}: a {config.get('setting')} run; evaluate it with the command of that setting"
        )
    trained = argparse.Namespace(**config["arguments"])
    counts = recflow.read_id_counts(args.data_dir)
    if counts != config["id_counts"]:
        raise InputError(
            f"{args.data_dir}: its id counts differ from those of the run's data; evaluate on the same log"
        )
    origin = recflow.read_origin(args.data_dir)
    if config["data"] not in (origin, "unknown"):  # unknown: imported models
        raise InputError(
            f"{args.output_dir}: trained on {config['data']} data, but {args.data_dir} is {origin}; "
            "evaluate on the same log"
        )
    device, dtype = choose_device(args), DTYPES[trained.dtype]
    name = test_day(args.data_dir, args.test_day)
    day = open_day(args.data_dir, name, cascade, args.cache_dir, args.time_zone or trained.time_zone, trained.seq_len)
    vocabulary = {field: counts[column] for field, column in LOG_COLUMN.items()}
    # Tables need no rows but those of the day's ids; ids that the training did not see have their initial rows.
    ids = {field: day.ids(field) for field, count in vocabulary.items() if count + 2 >= COMPACT_FROM}
    models = build_models(cascade, vocabulary, trained.emb_dim, trained.nn_units, None, ids)
    for model in models.values():
        model.to(device=device, dtype=dtype).eval()
    checkpoint.load_models(args.output_dir, models)
    use_kernels(models, load_kernels(dtype) if args.compile and device.type == "cpu" else None)
    scored = score_day(models, day, args.batch_size, device, BatchRows(ids, {}, {}))
    metrics, results = summary(cascade, scored, torch.from_numpy(day.group))
    results |= {"test_day": name, "setting": cascade.name, "loss_type": trained.loss_type, "seed": trained.seed}
    results |= {"epochs": trained.epochs, "commit": config.get("commit"), "data": origin}
    results |= {"test_day_checksum": day.checksum}
    if results["data"] == "simulated":
        results["warning"] = "SIMULATED DATA: these numbers say nothing about a real log"
    if trained.epochs and name in config["train_days"]:
        results["warning_test_day"] = f"the models were trained on {name}: these are not test numbers"
        logger.warning("%s", results["warning_test_day"])
    (args.output_dir / checkpoint.SCORES_FILE).unlink(missing_ok=True)  # those of an earlier evaluation
    _write_arrays(args.output_dir / checkpoint.PER_REQUEST_FILE, {"request_id": scored["request_id"], **metrics})
    if args.save_scores:
        data = np.array(results["data"])
        _write_arrays(args.output_dir / checkpoint.SCORES_FILE, scored, data=data)
    checkpoint.write_json(args.output_dir / checkpoint.METRICS_FILE, results)
    return results


def _write_arrays(path: Path, tensors: Mapping[str, Tensor], **arrays: np.ndarray) -> None:
    """Write the tensors and arrays as a compressed .npz, atomically."""
    contents: dict[str, Any] = {name: values.numpy() for name, values in tensors.items()} | arrays
    write_atomically(path, lambda file: np.savez_compressed(file, **contents))


def summary(cascade: Cascade, scored: Mapping[str, Tensor], group: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The metrics per request, and their means over the requests where they are defined.

    InputError when a score is not finite.
    """
    mask = scored["mask"]
    for stage in cascade.stage_names:
        broken = int((~scored[stage].isfinite() & mask).sum())
        if broken:
            raise InputError(
                f"{stage}.safetensors gives {broken} scores that are not finite; train again with a lower --lr"
            )
    relevant = (group == 0).expand_as(mask) & mask
    metrics = cascade_metrics(
        {stage: scored[stage] for stage in cascade.stage_names},
        scored["labels"],
        mask,
        relevant,
        cascade.quotas,
        cascade.num_relevant,
    )
    results: dict[str, Any] = {}
    for name, values in metrics.items():
        mean = values.nanmean().item()
        results[name] = mean if np.isfinite(mean) else None
    results["num_requests"] = len(mask)
    results["num_requests_without_ground_truth"] = int((~relevant.any(dim=-1)).sum())
    return metrics, results
