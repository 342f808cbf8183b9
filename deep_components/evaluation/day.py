"""Evaluating a cascade: checkpoint -> scores of a test day -> metrics.json."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from deep_components.arguments import COMPACT_FROM, DTYPES, choose_device
from deep_components.cascade import Cascade
from deep_components.checkpoint import check_sizes, trained_ids, trained_models
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.days import missing_days, test_day
from deep_components.dataset.loader import Join, batches
from deep_components.dataset.log import Log, open_log
from deep_components.dataset.random_items import with_items_of_day
from deep_components.errors import InputError
from deep_components.evaluation import corpus
from deep_components.evaluation.bound import bound_of_run, keep_some
from deep_components.evaluation.checks import (
    check_cascade,
    check_encoding,
    check_log,
    check_same_log,
    checked_code,
    time_zone_of,
)
from deep_components.files import write_atomically
from deep_components.kernels import load_kernels, use_kernels
from deep_components.metrics import cascade_metrics
from deep_components.runs.folder import (
    CONFIG_FILE,
    COST_FILE,
    METRICS_FILE,
    PER_REQUEST_FILE,
    SCORES_FILE,
    cascade_of,
    model_file,
    read_json,
    read_training,
    write_json,
)
from deep_components.runs.state import check_same_run
from deep_components.schema import Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore

_ITEMS_AT_A_TIME = 1 << 17

logger = logging.getLogger(__name__)


@torch.inference_mode()
def score_day(
    models: Mapping[str, nn.Module],
    stores: Mapping[str, EmbeddingStore],
    day: DayCache,
    batch_size: int,
    device: torch.device,
    join: Join | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Scores of every stage over every request of the day, in file order and batch by batch: stage -> [B, N] on the
    CPU, and "request_id" [B], "labels", "mask" and "group" [B, N]. ``join`` adds items to a batch before."""
    first = next(iter(stores.values()))
    lookup = TableLookup(first.schema, first.ids, {})
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(day), unit="req", desc=f"scoring {day.day}", disable=hidden, leave=False) as bar:
        for batch in batches(day, np.arange(len(day)), batch_size, device, lookup, join=join):
            columns = {stage: model(stores[stage].embed(batch.features)) for stage, model in models.items()}
            columns |= {"request_id": batch.request_id, **vars(batch.targets)}
            bar.update(len(batch.request_id))
            yield {name: values.cpu() for name, values in columns.items()}


def whole_day(scored: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All batches of :func:`score_day` as one: [R] and [R, N], with the longest of their N; what is beyond a request's
    own items is 0, and masked."""
    batches = list(scored)
    longest = max(batch["mask"].shape[1] for batch in batches)

    def column(name: str) -> Tensor:
        parts = [batch[name] for batch in batches]
        return torch.cat([F.pad(part, (0, longest - part.shape[1])) if part.dim() > 1 else part for part in parts])

    return {name: column(name) for name in batches[0]}


def evaluate_cascade(args: argparse.Namespace, cascade: Cascade | None = None) -> dict[str, Any]:
    """Evaluate the run in args.output_dir (evaluation_parser): writes per_request.npz, metrics.json, and if asked for
    scores.npz. Returns the content of metrics.json. ``cascade`` is what the run must be of; None takes any."""
    run: Path = args.output_dir
    corpus.check_arguments(args)
    config, log = read_training(run), open_log(args.data_dir)
    own = cascade_of(run, config)
    check_cascade(run, own, cascade)
    check_log(run, config, log)
    check_encoding(run, config)
    trained = argparse.Namespace(**config["arguments"])
    ran = checked_code(run, config, own, args.any_code)
    zone = time_zone_of(run, config, args.time_zone)
    name = test_day(log, args.test_day)
    check_same_log(run, config, log, own, args.cache_dir, zone)
    day = log.open_day(name, own, args.cache_dir, zone, trained.seq_len)
    _check_new_requests(run, config, name, day)
    bound = bound_of_run(run / CONFIG_FILE, config, own, day, args.bound_samples, args.bound_noise)
    scored = _scores(run, config, own, log.schema, args, day)
    kept: list[Mapping[str, Tensor]] = []
    scored = keep_some(scored, bound.every, kept) if bound else scored
    if args.save_scores:
        scored = list(scored)
    metrics, results = summary(own, scored)
    results |= bound.measure(whole_day(kept)) if bound else {}
    results |= _about(run, config, own, log, args, day) | {"time_zone": zone, "code": ran}
    if args.corpus is not None:
        served, results["corpus"] = corpus.evaluate_run(args, cascade, day)
        metrics |= served
    (run / SCORES_FILE).unlink(missing_ok=True)  # those of an earlier evaluation
    _write_arrays(run / PER_REQUEST_FILE, metrics)
    if args.save_scores:
        _write_arrays(run / SCORES_FILE, whole_day(scored), data=np.array(log.origin))
    write_json(run / METRICS_FILE, results)
    return results


def _about(
    run: Path, config: Mapping[str, Any], cascade: Cascade, log: Log, args: argparse.Namespace, day: DayCache
) -> dict[str, Any]:
    """What metrics.json says of the run and the day beside the metrics, with a word on what they are not."""
    trained = argparse.Namespace(**config["arguments"])
    about = {"test_day": day.day, "setting": cascade.name, "loss_type": trained.loss_type, "seed": trained.seed}
    about |= {"epochs": trained.epochs, "commit": config.get("commit"), "data": log.origin}
    about |= {"test_day_checksum": day.checksum}
    about |= {"test_random_items": args.test_random_items} if args.test_random_items else {}
    about |= _skipped_steps(run)
    if log.origin == "simulated":
        about["warning"] = "SIMULATED DATA: these numbers say nothing about a real log"
    if absent := missing_days(log):
        about["warning_days"] = f"the log lacks {', '.join(absent)} of RecFlow's Period 1, which the paper trained on"
    if trained.epochs and day.day in config["train_days"]:
        about["warning_test_day"] = f"the models were trained on {day.day}: these are not test numbers"
    elif trained.epochs and day.day == config.get("validation_day"):
        about["warning_test_day"] = f"the run followed its metrics on {day.day}: these are no test numbers"
    if "warning_test_day" in about:
        logger.warning("%s", about["warning_test_day"])
    return about


def _check_new_requests(run: Path, config: Mapping[str, Any], name: str, day: DayCache) -> None:
    """InputError when the test day is a copy of a training day under another name."""
    for trained, checksum in (config.get("data_checksums") or {}).items():
        if checksum == day.checksum and trained != name:
            raise InputError(
                f"--test_day={name}: has the same requests as {trained}, which {run} was trained on; name another day"
            )


def _skipped_steps(run: Path) -> dict[str, Any]:
    """What metrics.json says of training steps that were left out; nothing for models of an earlier version."""
    cost = read_json(run / COST_FILE) or {}
    return {"skipped_steps": cost["skipped_steps"]} if "skipped_steps" in cost else {}


def _scores(
    run: Path, config: Mapping[str, Any], cascade: Cascade, schema: Schema, args: argparse.Namespace, day: DayCache
) -> Iterable[Mapping[str, Tensor]]:
    """:func:`score_day` by the run's models."""
    trained = argparse.Namespace(**config["arguments"])
    device, dtype = choose_device(args), DTYPES[trained.dtype]
    check_sizes(run, cascade, schema, trained.emb_dim, trained.nn_units)
    for stage in cascade.stage_names:
        check_same_run(run / model_file(stage), config)
    ids = _needed_ids(run, cascade, schema, day)
    models, stores, _ = trained_models(run, cascade, schema, trained.emb_dim, trained.nn_units, dtype, device, ids)
    use_kernels(
        [*models.values(), *stores.values()], load_kernels(dtype) if args.compile and device.type == "cpu" else None
    )
    count = args.test_random_items
    group = len(cascade.groups)
    join: Join | None = (
        (lambda batch, day, requests, whole: with_items_of_day(batch, day, requests, count, group)) if count else None
    )
    return score_day(models, stores, day, _requests_at_a_time(args.batch_size, day, count or 0), device, join)


def _requests_at_a_time(batch_size: int, day: DayCache, random_items: int) -> int:
    """The batch size, or less where requests have so many items that their activations would fill the memory."""
    return max(1, min(batch_size, _ITEMS_AT_A_TIME // (day.num_items + random_items)))


def _needed_ids(run: Path, cascade: Cascade, schema: Schema, day: DayCache) -> dict[str, IdSet]:
    """The ids that large tables need rows for, those of the day. Of a table with a row for unknown ids, only those that
    the training has seen; other tables give such ids their initial rows."""
    with_unknown = any(table.unknown is not None for table in schema.tables.values())
    seen = trained_ids(run, cascade, schema) if with_unknown else {}
    ids = {}
    for name, table in schema.tables.items():
        if table.unknown is not None and name in seen:
            ids[name] = seen[name] & day.ids(name)
        elif table.size >= COMPACT_FROM:
            ids[name] = day.ids(name)
    return ids


def _write_arrays(path: Path, tensors: Mapping[str, Tensor], **arrays: np.ndarray) -> None:
    """Write the tensors and arrays as a compressed .npz, atomically."""
    contents: dict[str, Any] = {name: values.numpy() for name, values in tensors.items()} | arrays
    write_atomically(path, lambda file: np.savez_compressed(file, **contents))


def summary(cascade: Cascade, scored: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The metrics per request, [R] each beside "request_id", and their means over the requests where they are defined.

    ``scored`` are the batches of :func:`score_day`; one at a time is looked at. InputError when a score is not finite.
    """
    parts: dict[str, list[Tensor]] = {}
    without_truth = 0
    for batch in scored:
        relevant = (batch["group"] == 0) & batch["mask"]
        without_truth += int((~relevant.any(dim=-1)).sum())
        for name, values in {"request_id": batch["request_id"], **_metrics(cascade, batch, relevant)}.items():
            parts.setdefault(name, []).append(values)
    metrics = {name: torch.cat(values) for name, values in parts.items()}
    means = {name: values.nanmean().item() for name, values in metrics.items() if name != "request_id"}
    results: dict[str, Any] = {name: mean if np.isfinite(mean) else None for name, mean in means.items()}
    results["num_requests"] = len(metrics["request_id"])
    results["num_requests_without_ground_truth"] = without_truth
    return metrics, results


def _metrics(cascade: Cascade, batch: Mapping[str, Tensor], relevant: Tensor) -> dict[str, Tensor]:
    mask, scores = batch["mask"], {stage: batch[stage] for stage in cascade.stage_names}
    for stage, values in scores.items():
        if (~values.isfinite() & mask).any():
            raise InputError(f"{stage}.safetensors gives scores that are not finite; train again with a lower --lr")
    return cascade_metrics(scores, batch["labels"], mask, relevant, cascade.quotas, cascade.num_relevant)
