"""Evaluating a cascade: checkpoint -> scores of a test day -> metrics.json."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
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
from deep_components.checkpoint import check_sizes, load_trained
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.days import missing_days, test_day
from deep_components.dataset.loader import Join, batches
from deep_components.dataset.log import ENCODING_FOLDER as ENCODING_OF_LOG
from deep_components.dataset.log import Log, open_log
from deep_components.dataset.random_items import with_items_of_day
from deep_components.errors import InputError
from deep_components.files import folder_checksum, write_atomically
from deep_components.kernels import load_kernels, use_kernels
from deep_components.metrics import cascade_metrics
from deep_components.models import MODELS, build_models, model_classes
from deep_components.runs import code
from deep_components.runs.folder import (
    COST_FILE,
    ENCODING_FOLDER,
    METRICS_FILE,
    PER_REQUEST_FILE,
    SCORES_FILE,
    cascade_of,
    model_file,
    read_json,
    read_training,
    write_json,
)
from deep_components.runs.state import check_same_run, saved_ids
from deep_components.schema import Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore, build_stores

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
    config, log = read_training(run), open_log(args.data_dir)
    own = cascade_of(run, config)
    _check(run, config, log, own, cascade)
    trained = argparse.Namespace(**config["arguments"])
    ran = _code(run, config, own, args.any_code)
    zone = _time_zone(run, config, args.time_zone)
    name = test_day(log, args.test_day)
    _check_same_log(run, config, log, own, args.cache_dir, zone)
    day = log.open_day(name, own, args.cache_dir, zone, trained.seq_len)
    _check_new_requests(run, config, name, day)
    scored = _scores(run, config, own, log.schema, args, day)
    if args.save_scores:
        scored = list(scored)
    metrics, results = summary(own, scored)
    results |= {"test_day": name, "setting": own.name, "loss_type": trained.loss_type, "seed": trained.seed}
    results |= {"epochs": trained.epochs, "commit": config.get("commit"), "data": log.origin}
    results |= {"test_day_checksum": day.checksum, "time_zone": zone, "code": ran}
    results |= {"test_random_items": args.test_random_items} if args.test_random_items else {}
    results |= _skipped_steps(run)
    if log.origin == "simulated":
        results["warning"] = "SIMULATED DATA: these numbers say nothing about a real log"
    if absent := missing_days(log):
        results["warning_days"] = f"the log lacks {', '.join(absent)} of RecFlow's Period 1, which the paper trained on"
    if trained.epochs and name in config["train_days"]:
        results["warning_test_day"] = f"the models were trained on {name}: these are not test numbers"
        logger.warning("%s", results["warning_test_day"])
    (run / SCORES_FILE).unlink(missing_ok=True)  # those of an earlier evaluation
    _write_arrays(run / PER_REQUEST_FILE, metrics)
    if args.save_scores:
        _write_arrays(run / SCORES_FILE, whole_day(scored), data=np.array(log.origin))
    write_json(run / METRICS_FILE, results)
    return results


def _check(run: Path, config: Mapping[str, Any], log: Log, own: Cascade, wanted: Cascade | None) -> None:
    """InputError unless the run is of the ``wanted`` cascade and can be evaluated on the log."""
    if wanted is not None and own != wanted:
        what = f"a run of {own.name}" if own.name != wanted.name else f"a run of another cascade than {wanted.name}"
        raise InputError(f"{run}: {what}; evaluate it with the command or the --cascade that it was trained with")
    foreign = [stage.model for stage in own.stages if stage.model not in MODELS]
    if wanted is None and foreign:  # a run's folder is data: it does not say which code is executed
        raise InputError(
            f"{run}: its cascade names {foreign[0]!r}, which is none of this project's models; to import that code, "
            "give the cascade's file with --cascade"
        )
    encoding, same = config.get("encoding_checksum", log.encoding_checksum), "evaluate on the same log"
    if config.get("schema_checksum", log.schema.checksum) != log.schema.checksum:
        raise InputError(f"{log.folder}: its fields or id counts differ from those of the run's data; {same}")
    if encoding != log.encoding_checksum:
        raise InputError(f"{log.folder / ENCODING_OF_LOG}: maps values to other ids than the run's data did; {same}")
    if "encoding_checksum" in config and folder_checksum(run / ENCODING_FOLDER) != encoding:
        raise InputError(f"{run / ENCODING_FOLDER}: missing or damaged; copy it again, or train again")
    if config["data"] not in (log.origin, "unknown"):  # unknown: imported models
        raise InputError(f"{run}: trained on {config['data']} data, but {log.folder} is {log.origin}; {same}")


def _code(run: Path, config: Mapping[str, Any], cascade: Cascade, any_code: bool) -> dict[str, Any]:
    """What metrics.json says of the evaluation's code. InputError when the models were trained by other code, as far as
    it takes part in scoring, unless ``any_code`` will do."""
    ran = code.evaluation_code(config.get("code"), model_classes(cascade))
    changed = code.changed_since_training(ran)
    if changed and not any_code:
        raise InputError(
            f"{run}: was trained by other code: {code.named(changed)}; train it again, or evaluate it all the same "
            "with --any_code"
        )
    return ran


def _time_zone(run: Path, config: Mapping[str, Any], wanted: str | None) -> str:
    """The time zone of the training, which another ``wanted`` one must not replace; imported models know none."""
    own = str(config["arguments"]["time_zone"])
    if wanted not in (None, own) and config["data"] != "unknown":
        raise InputError(f"--time_zone={wanted}: {run} was trained with {own}; leave the option out, or train again")
    return wanted or own


def _check_same_log(
    run: Path, config: Mapping[str, Any], log: Log, cascade: Cascade, cache_dir: Path | None, zone: str
) -> None:
    """InputError unless the days that the run was trained on, as far as the log has them, are the same there.

    Days of the cache are compared by what it says of itself; where it has none of them, the last one is encoded."""
    known = config.get("data_checksums") or {}  # none: an untrained cascade, imported models, an earlier version
    there = sorted(known.keys() & set(log.days(named=True)))
    if known and not there:
        raise InputError(
            f"{log.folder}: has none of the days that {run} was trained on ({', '.join(sorted(known))}), so nothing "
            "tells that it is the same log; put one of them there"
        )
    found = {day: log.checksum(day, cascade, cache_dir, zone) for day in there}
    if there and not any(found.values()):
        found[there[-1]] = log.open_day(there[-1], cascade, cache_dir, zone).checksum
    for day, checksum in found.items():
        if checksum is not None and checksum != known[day]:
            raise InputError(
                f"{log.folder}: its day {day} is not the one that {run} was trained on; evaluate on the same log, "
                "encoded by the same version"
            )


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
) -> Iterable[dict[str, Tensor]]:
    """:func:`score_day` by the run's models."""
    trained = argparse.Namespace(**config["arguments"])
    device, dtype = choose_device(args), DTYPES[trained.dtype]
    check_sizes(run, cascade, schema, trained.emb_dim, trained.nn_units)
    for stage in cascade.stage_names:
        check_same_run(run / model_file(stage), config)
    ids = _needed_ids(run, cascade, schema, day)
    models = build_models(cascade, schema, trained.emb_dim, trained.nn_units, None)
    stores = build_stores(cascade, schema, trained.emb_dim, None, ids)
    for stage, model in models.items():
        model.to(device=device, dtype=dtype).eval()
        stores[stage].to(device, dtype)
    load_trained(run, models, stores)
    use_kernels(
        [*models.values(), *stores.values()], load_kernels(dtype) if args.compile and device.type == "cpu" else None
    )
    count = args.test_random_items
    join = partial(with_items_of_day, count=count, group=len(cascade.groups)) if count else None
    return score_day(models, stores, day, _requests_at_a_time(args.batch_size, day, count or 0), device, join)


def _requests_at_a_time(batch_size: int, day: DayCache, random_items: int) -> int:
    """The batch size, or less where requests have so many items that their activations would fill the memory."""
    return max(1, min(batch_size, _ITEMS_AT_A_TIME // (day.num_items + random_items)))


def _needed_ids(run: Path, cascade: Cascade, schema: Schema, day: DayCache) -> dict[str, IdSet]:
    """The ids that large tables need rows for, those of the day. Of a table with a row for unknown ids, only those that
    the training has seen; other tables give such ids their initial rows."""
    with_unknown = any(table.unknown is not None for table in schema.tables.values())
    seen = saved_ids(run, cascade.stage_names[0])[0] if with_unknown else {}
    ids = {}
    for name, table in schema.tables.items():
        if table.unknown is not None and name in seen:
            ids[name] = IdSet.of([seen[name]], table.size) & day.ids(name)
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
