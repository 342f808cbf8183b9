"""Evaluating a cascade: checkpoint -> scores of a test day -> metrics.json."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
from deep_components.evaluation.bound import Bound, bound_of_run, keep_some
from deep_components.evaluation.checks import (
    check_cascade,
    check_encoding,
    check_log,
    check_same_log,
    checked_code,
    time_zone_of,
)
from deep_components.evaluation.share import ALONE, Share, requests_of
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
_WITHOUT_TRUTH = "without_ground_truth"

logger = logging.getLogger(__name__)


@torch.inference_mode()
def score_day(
    models: Mapping[str, nn.Module],
    stores: Mapping[str, EmbeddingStore],
    day: DayCache,
    batch_size: int,
    device: torch.device,
    join: Join | None = None,
    share: Share = ALONE,
) -> Iterator[dict[str, Tensor]]:
    """Scores of every stage over every request of the day, those of the ``share``, in file order and batch by batch:
    stage -> [B, N] on the CPU, and "request_id" [B], "labels", "mask" and "group" [B, N]. ``join`` adds items to a
    batch before."""
    first, own = next(iter(stores.values())), requests_of(share, len(day), batch_size)
    lookup, order = TableLookup(first.schema, first.ids, {}), np.arange(own.start, own.stop)
    hidden = not (share.is_first and sys.stderr.isatty())
    with tqdm(total=len(order), unit="req", desc=f"scoring {day.day}", disable=hidden, leave=False) as bar:
        for batch in batches(day, order, batch_size, device, lookup, join=join):
            columns = {stage: model(stores[stage].embed(batch.features)) for stage, model in models.items()}
            columns |= {"request_id": batch.request_id, **vars(batch.targets)}
            bar.update(len(batch.request_id))
            yield {name: values.cpu() for name, values in columns.items()}


def whole_day(scored: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All batches of :func:`score_day` as one: [R] and [R, N], with the longest of their N; what is beyond a request's
    own items is 0, and masked. {} of none."""
    batches = list(scored)
    longest = max((batch["mask"].shape[1] for batch in batches), default=0)

    def column(name: str) -> Tensor:
        parts = [batch[name] for batch in batches]
        return torch.cat([F.pad(part, (0, longest - part.shape[1])) if part.dim() > 1 else part for part in parts])

    return {name: column(name) for batch in batches[:1] for name in batch}


@dataclass(frozen=True)
class _Run:
    """A run that may be evaluated on a log."""

    folder: Path
    config: Mapping[str, Any]
    cascade: Cascade
    log: Log
    zone: str
    code: Mapping[str, Any]
    test_day: str

    @property
    def trained(self) -> argparse.Namespace:
        return argparse.Namespace(**self.config["arguments"])


def evaluate_cascade(args: argparse.Namespace, cascade: Cascade | None = None, share: Share = ALONE) -> dict[str, Any]:
    """Evaluate the run in args.output_dir (evaluation_parser): writes per_request.npz, metrics.json, and if asked for
    scores.npz. Returns the content of metrics.json. ``cascade`` is what the run must be of; None takes any.

    Of several processes each scores its ``share`` of the day; the first alone does the rest, and {} is returned to the
    others."""
    run = share.agreed(lambda: _checked(args, cascade))
    opened = partial(run.log.open_day, cascade=run.cascade, cache_dir=args.cache_dir, zone=run.zone,
                     history_length=run.trained.seq_len)  # fmt: skip
    day = share.opened([run.test_day], opened)[run.test_day]
    bound, size, scored = share.agreed(lambda: _prepared(run, args, day, share))
    kept: list[Mapping[str, Tensor]] = []
    scored = keep_some(scored, bound.every, kept, requests_of(share, len(day), size).start) if bound else scored
    listed: list[Mapping[str, Tensor]] = []
    scored = _listing(scored, listed) if args.save_scores else scored
    metrics, results = summary(run.cascade, scored, share)
    some = share.gathered(whole_day(kept), only_first=True)
    scores = share.gathered(whole_day(listed), only_first=True)
    if not share.is_first:
        return {}
    results |= bound.measure(some) if bound else {}
    results |= _about(run, args, day) | {"time_zone": run.zone, "code": run.code}
    if args.corpus is not None:
        served, results["corpus"] = corpus.evaluate_run(args, cascade, day)
        metrics |= served
    (run.folder / SCORES_FILE).unlink(missing_ok=True)  # those of an earlier evaluation
    _write_arrays(run.folder / PER_REQUEST_FILE, metrics)
    if args.save_scores:
        _write_arrays(run.folder / SCORES_FILE, scores, data=np.array(run.log.origin))
    write_json(run.folder / METRICS_FILE, results)
    return results


def _checked(args: argparse.Namespace, cascade: Cascade | None) -> _Run:
    """The run to evaluate. InputError when it, its log or the arguments cannot be used."""
    folder: Path = args.output_dir
    corpus.check_arguments(args)
    config, log = read_training(folder), open_log(args.data_dir)
    own = cascade_of(folder, config)
    check_cascade(folder, own, cascade)
    check_log(folder, config, log)
    check_encoding(folder, config)
    ran = checked_code(folder, config, own, args.any_code)
    zone = time_zone_of(folder, config, args.time_zone)
    name = test_day(log, args.test_day)
    check_same_log(folder, config, log, own, args.cache_dir, zone)
    return _Run(folder, config, own, log, zone, ran, name)


def _prepared(
    run: _Run, args: argparse.Namespace, day: DayCache, share: Share
) -> tuple[Bound | None, int, Iterable[Mapping[str, Tensor]]]:
    """What measures the bound, how many requests are scored at a time, and :func:`score_day` by the run's models."""
    _check_new_requests(run.folder, run.config, run.test_day, day)
    bound = bound_of_run(run.folder / CONFIG_FILE, run.config, run.cascade, day, args.bound_samples, args.bound_noise)
    size = requests_at_a_time(args.batch_size, day, args.test_random_items or 0)
    return bound, size, _scores(run, args, day, size, share)


def _listing(
    scored: Iterable[Mapping[str, Tensor]], listed: list[Mapping[str, Tensor]]
) -> Iterator[Mapping[str, Tensor]]:
    """Hand on the batches, which ``listed`` gets too."""
    for batch in scored:
        listed.append(batch)
        yield batch


def _about(run: _Run, args: argparse.Namespace, day: DayCache) -> dict[str, Any]:
    """What metrics.json says of the run and the day beside the metrics, with a word on what they are not."""
    trained, config, log = run.trained, run.config, run.log
    about = {"test_day": day.day, "setting": run.cascade.name, "loss_type": trained.loss_type, "seed": trained.seed}
    about |= {"epochs": trained.epochs, "commit": config.get("commit"), "data": log.origin}
    about |= {"test_day_checksum": day.checksum}
    about |= {"test_random_items": args.test_random_items} if args.test_random_items else {}
    about |= _skipped_steps(run.folder)
    if log.origin == "simulated":
        about["warning"] = "SIMULATED DATA: these numbers say nothing about a real log"
    if absent := missing_days(log):
        about["warning_days"] = f"the log lacks {', '.join(absent)} of RecFlow's Period 1, which the paper trained on"
    if trained.epochs and day.day in config["train_days"]:
        about["warning_test_day"] = f"the models were trained on {day.day}: these are not test numbers"
    elif trained.epochs and day.day == config.get("validation_day"):
        about["warning_test_day"] = f"the run followed its metrics on {day.day}: these are no test numbers"
    elif seen := config.get("init_from_days", {}).get(day.checksum):
        about["warning_test_day"] = f"the models of --init_from were trained on {seen}: these are not test numbers"
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
    run: _Run, args: argparse.Namespace, day: DayCache, size: int, share: Share
) -> Iterable[Mapping[str, Tensor]]:
    """:func:`score_day` by the run's models, ``size`` requests at a time."""
    trained, folder, cascade, schema = run.trained, run.folder, run.cascade, run.log.schema
    device, dtype = choose_device(args), DTYPES[trained.dtype]
    check_sizes(folder, cascade, schema, trained.emb_dim, trained.nn_units)
    for stage in cascade.stage_names:
        check_same_run(folder / model_file(stage), run.config)
    # Random items are of the whole day.
    own = None if share is ALONE or args.test_random_items else requests_of(share, len(day), size)
    ids = _needed_ids(folder, cascade, schema, day, own)
    models, stores, _ = trained_models(folder, cascade, schema, trained.emb_dim, trained.nn_units, dtype, device, ids)
    use_kernels(
        [*models.values(), *stores.values()], load_kernels(dtype) if args.compile and device.type == "cpu" else None
    )
    count = args.test_random_items
    group = len(cascade.groups)
    join: Join | None = (
        (lambda batch, day, requests, whole: with_items_of_day(batch, day, requests, count, group)) if count else None
    )
    return score_day(models, stores, day, size, device, join, share)


def requests_at_a_time(batch_size: int, day: DayCache, random_items: int = 0) -> int:
    """The batch size, or less where requests have so many items that their activations would fill the memory."""
    return max(1, min(batch_size, _ITEMS_AT_A_TIME // (day.num_items + random_items)))


def _needed_ids(run: Path, cascade: Cascade, schema: Schema, day: DayCache, requests: slice | None) -> dict[str, IdSet]:
    """The ids that large tables need rows for, those of the day or of some of its ``requests``. Of a table with a row
    for unknown ids, only those that the training has seen; other tables give such ids their initial rows."""
    with_unknown = any(table.unknown is not None for table in schema.tables.values())
    seen = trained_ids(run, cascade, schema) if with_unknown else {}
    ids = {}
    for name, table in schema.tables.items():
        if table.unknown is not None and name in seen:
            ids[name] = seen[name] & day.ids(name, requests)
        elif table.size >= COMPACT_FROM:
            ids[name] = day.ids(name, requests)
    return ids


def _write_arrays(path: Path, tensors: Mapping[str, Tensor], **arrays: np.ndarray) -> None:
    """Write the tensors and arrays as a compressed .npz, atomically."""
    contents: dict[str, Any] = {name: values.numpy() for name, values in tensors.items()} | arrays
    write_atomically(path, lambda file: np.savez_compressed(file, **contents))


def summary(
    cascade: Cascade, scored: Iterable[Mapping[str, Tensor]], share: Share = ALONE
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The metrics per request, [R] each beside "request_id", and their means over the requests where they are defined:
    on every process those of all requests.

    ``scored`` are the batches of :func:`score_day`; one at a time is looked at. InputError when a score is not finite.
    """
    metrics = share.gathered(share.agreed(lambda: _by_request(cascade, scored)))
    without_truth = int(metrics.pop(_WITHOUT_TRUTH).sum())
    means = {name: values.nanmean().item() for name, values in metrics.items() if name != "request_id"}
    results: dict[str, Any] = {name: mean if np.isfinite(mean) else None for name, mean in means.items()}
    results["num_requests"] = len(metrics["request_id"])
    results["num_requests_without_ground_truth"] = without_truth
    return metrics, results


def _by_request(cascade: Cascade, scored: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of every request, beside its id, and whether it has no ground truth. {} of none."""
    parts: dict[str, list[Tensor]] = {}
    for batch in scored:
        relevant = (batch["group"] == 0) & batch["mask"]
        found = {"request_id": batch["request_id"], _WITHOUT_TRUTH: ~relevant.any(dim=-1)}
        for name, values in (found | _metrics(cascade, batch, relevant)).items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def _metrics(cascade: Cascade, batch: Mapping[str, Tensor], relevant: Tensor) -> dict[str, Tensor]:
    mask, scores = batch["mask"], {stage: batch[stage] for stage in cascade.stage_names}
    for stage, values in scores.items():
        if (~values.isfinite() & mask).any():
            raise InputError(f"{stage}.safetensors gives scores that are not finite; train again with a lower --lr")
    return cascade_metrics(scores, batch["labels"], mask, relevant, cascade.quotas, cascade.num_relevant)
