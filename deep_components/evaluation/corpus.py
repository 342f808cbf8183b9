"""Evaluating the served cascade over a whole corpus: what it finds of a request's ground truth among all items.

The ground truth is that of the metrics on logged candidates: of group 0 the K best by label, where those that tie count
in part. It is matched to the corpus by the item's index in the schema; what the corpus lacks, or the log has only as an
unknown id, is missed.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_components.arguments import LOGGED_ITEMS, choose_device
from deep_components.batch import CascadeBatch, Features
from deep_components.cascade import Cascade
from deep_components.cli import progress
from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError
from deep_components.files import map_npy
from deep_components.metrics import survival
from deep_components.schema import Field
from deep_components.serving.bundle import QUERIES_FILE, VERSIONS, Bundle
from deep_components.serving.export import export_run
from deep_components.serving.index import IndexChoice, VectorIndex, build_index
from deep_components.serving.recommender import Recommender
from deep_components.serving.requests import EncodedRequests

_SCORES_AT_A_TIME = 1 << 24  # of an exact search
_CANDIDATES_AT_A_TIME = 1 << 16  # of all requests of a batch


class ExactIndex(VectorIndex):
    """Searches all item vectors [M, d] by dot product, some at a time, without faiss."""

    def __init__(self, vectors: np.ndarray) -> None:
        super().__init__(vectors, IndexChoice("flat"))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best for each of the queries [B, d]: scores and rows [B, k], -inf and -1 where there are fewer."""
        users = torch.from_numpy(queries)
        scores, rows = users.new_empty(len(users), 0), torch.empty(len(users), 0, dtype=torch.int64)
        step = max(k, _SCORES_AT_A_TIME // max(len(users), 1))
        for first in range(0, len(self.vectors), step):
            block = users @ torch.from_numpy(np.array(self.vectors[first : first + step])).T
            numbers = torch.arange(first, first + block.shape[1]).expand_as(block)
            scores, rows = torch.cat([scores, block], dim=1), torch.cat([rows, numbers], dim=1)
            scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, best)
        missing = (0, k - rows.shape[1])
        pad = torch.nn.functional.pad
        return pad(scores, missing, value=-torch.inf).numpy(), pad(rows, missing, value=-1).numpy()


class ItemRows:
    """From an item's index in the schema to its row of a corpus; -1 where it has none.

    Padding and unknown ids are no item's. Of several rows with one index the last counts.

    Args:
        field: names an item.
        indices: the corpus' of this field, [M].
    """

    def __init__(self, field: Field, indices: np.ndarray) -> None:
        self._no_item = [index for index in (field.padding, field.unknown) if index is not None]
        self._rows = np.argsort(indices, kind="stable")
        self._rising = np.asarray(indices)[self._rows].astype(np.int64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        if not len(self._rising):
            return np.full(indices.shape, -1)
        position = np.searchsorted(self._rising, indices, side="right") - 1
        there = (self._rising[position] == indices) & self.known(indices)
        return np.where(there, self._rows[position], -1)

    def known(self, indices: np.ndarray) -> np.ndarray:
        """Whether an index stands for one item."""
        return ~np.isin(indices, self._no_item)


@dataclass(frozen=True)
class Truth:
    """The ground truth of B requests with N logged items each.

    Args:
        relevant: [B, N] bool.
        weight: [B, N] float64, how much of the item counts; 0 for what is no ground truth.
        known: [B, N] bool, whether the item's index stands for one item.
        rows: [B, N] int64, its row of the corpus, -1 where that lacks it.
    """

    relevant: np.ndarray
    weight: np.ndarray
    known: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, batch: CascadeBatch[Features], item: str, items: ItemRows, num_relevant: int) -> "Truth":
        targets, indices = batch.targets, batch.features.item[item].numpy()
        relevant = (targets.group == 0) & targets.mask
        weight = survival(targets.labels.double(), relevant.double(), num_relevant)
        return cls(relevant.numpy(), weight.numpy(), items.known(indices), items(indices))

    def share(self, kept: np.ndarray) -> np.ndarray:
        """Of the ground truth what is among the rows ``kept`` [B, q], in which -1 is none: [B], NaN where there is no
        ground truth."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.weight * _among(self.rows, kept)).sum(axis=1) / self.weight.sum(axis=1))


def _among(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Whether each of ``rows`` [B, N] is one of its own request's ``kept`` [B, q]; -1 is none."""
    request = np.arange(len(rows))[:, None] * (1 + max(rows.max(initial=-1), kept.max(initial=-1)))
    return np.isin(rows + request, (kept + request)[kept >= 0]) & (rows >= 0)


def recall_names(cascade: Cascade) -> list[str]:
    """The names of the recalls after each stage, and of the last one's once more as that of the served list."""
    k = cascade.num_relevant
    after = [f"corpus_recall_after_{stage.name}@{k}@{stage.keep}" for stage in cascade.stages]
    return [f"corpus_recall@{k}@{cascade.stages[-1].keep}", *after]


def evaluate_run(
    args: argparse.Namespace, cascade: Cascade | None, day: DayCache
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`evaluate_corpus` of the run in args.output_dir (evaluation_parser), exported to a temporary bundle."""
    with tempfile.TemporaryDirectory(prefix="lcron-corpus-") as name:
        folder, corpus = Path(name) / "bundle", None if args.corpus == LOGGED_ITEMS else Path(args.corpus)
        where = {"corpus": corpus, "data_dir": args.data_dir, "cache_dir": args.cache_dir}
        what = {"cascade": cascade, "item": args.item, "index": "flat", "any_code": args.any_code}
        export_run(args.output_dir, folder, **where, **what)
        loaded = Bundle.load(folder, cascade, str(choose_device(args)))
        bundle = replace(loaded, cascade=with_quotas(loaded.cascade, args.quotas))
        vectors, keep = bundle.index.vectors, bundle.cascade.stages[0].keep
        queries = map_npy(folder / VERSIONS / bundle.version / QUERIES_FILE)
        served = {"exact": Recommender(replace(bundle, index=ExactIndex(vectors)))}
        for kind in args.index:
            served[kind] = Recommender(replace(bundle, index=build_index(vectors, kind, queries, keep)))
        arrays, results = evaluate_corpus(served, day, _item_field(bundle), args.filter_seen)
        for kind in args.index:
            results["index"][kind]["parameters"] = served[kind].bundle.index.choice.to_json()
        return arrays, {"checksum": _checksum(bundle), **results}


def check_arguments(args: argparse.Namespace) -> None:
    """InputError when an option of the evaluation over a corpus is given without one."""
    if args.corpus is None:
        for name in ("item", "quotas", "filter_seen", "index"):
            if getattr(args, name):
                raise InputError(f"--{name} belongs to --corpus; give that too, or leave the option out")


def with_quotas(cascade: Cascade, quotas: Sequence[int] | None) -> Cascade:
    """The cascade with other quotas; None: its own. InputError when they do not fit its stages."""
    if quotas is None:
        return cascade
    if len(quotas) != len(cascade.stages) or list(quotas) != sorted(quotas, reverse=True):
        raise InputError(
            f"--quotas={','.join(map(str, quotas))}: give a number for each of {', '.join(cascade.stage_names)}, none "
            "above the one before it"
        )
    stages = (replace(stage, keep=keep) for stage, keep in zip(cascade.stages, quotas, strict=True))
    return replace(cascade, stages=tuple(stages))


def _item_field(bundle: Bundle) -> Field:
    """The field that names an item."""
    name = bundle.encoding.item_field
    for field in bundle.schema.side("item"):
        if field.name == name:
            return field
    raise InputError(
        f"--corpus: no field of the items is made of their id, column {bundle.encoding.item}, so the ground truth "
        "cannot be found among them"
    )


def _checksum(bundle: Bundle) -> str:
    """Of the items as the models take them."""
    files = bundle.manifest["files"]
    sums = {name: file["sha256"] for name, file in files.items() if name.startswith(("item.", "key"))}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def evaluate_corpus(
    served: Mapping[str, Recommender], day: DayCache, item: Field, filter_seen: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a cascade serves of the day's ground truth: per request [R], and on average.

    Args:
        served: the same cascade and corpus with different indexes; the first is exact, the others are compared with it.
        day: whose requests are served.
        item: the field that names an item.
        filter_seen: leave out the items of a request's own history.
    """
    exact, *others = served
    bundle = served[exact].bundle
    items = ItemRows(item, bundle.corpus.features[item.name])
    history = next((field.name for field in bundle.schema.side("history") if field.table == item.table), None)
    counts = dict.fromkeys(("ground_truth", "ground_truth_unknown", "ground_truth_not_in_corpus"), 0)
    shares: dict[str, list[np.ndarray]] = {name: [] for name in served}
    overlaps: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for batch in _batches(day, bundle.cascade):
        truth = Truth.of(batch, item.name, items, bundle.cascade.num_relevant)
        for name, found in zip(counts, (truth.relevant, ~truth.known, truth.known & (truth.rows < 0)), strict=True):
            counts[name] += int((truth.relevant & found).sum())
        encoded = _encoded(batch, items, history if filter_seen else None)
        kept = {name: list(_kept(recommender, encoded, filter_seen)) for name, recommender in served.items()}
        for name, stages in kept.items():
            shares[name].append(np.stack([truth.share(stages[-1]), *map(truth.share, stages)], axis=1))
        for name in others:
            both = _among(kept[exact][0], kept[name][0]).sum(axis=1)
            overlaps[name].append(both / (kept[exact][0] >= 0).sum(axis=1).clip(min=1))
    names = recall_names(bundle.cascade)
    whole = {name: np.concatenate(parts) for name, parts in shares.items()}
    means = {name: dict(zip(names, _means(values), strict=True)) for name, values in whole.items()}
    results: dict[str, Any] = {"items": len(bundle.corpus), "filter_seen": filter_seen, **counts, **means[exact]}
    if others:
        first = bundle.cascade.stages[0]
        results["index"] = {
            name: {
                f"{first.name}_recall_of_exact@{first.keep}": float(np.concatenate(overlaps[name]).mean()),
                **means[name],
            }
            for name in others
        }
    return {name: torch.from_numpy(whole[exact][:, column]) for column, name in enumerate(names)}, results


def _means(values: np.ndarray) -> list[float | None]:
    """Over the requests that have ground truth; None where none has."""
    defined = values[~np.isnan(values).any(axis=1)]
    return [float(mean) for mean in defined.mean(axis=0)] if len(defined) else [None] * values.shape[1]


def _batches(day: DayCache, cascade: Cascade) -> Iterator[CascadeBatch[Features]]:
    size = max(1, min(1024, _CANDIDATES_AT_A_TIME // cascade.stages[0].keep))
    for first in progress(range(0, len(day), size), f"serving {day.day}", "batch"):
        yield day.batch(np.arange(first, min(first + size, len(day))))


def _encoded(batch: CascadeBatch[Features], items: ItemRows, history: str | None) -> EncodedRequests:
    """The requests as a Recommender takes them, with the items of their histories where the field is named."""
    features, mask = batch.features, batch.features.history_mask.numpy()
    sides = [{name: values.numpy() for name, values in side.items()} for side in (features.request, features.history)]
    seen = [np.zeros(0, np.int64)] * len(mask)
    if history is not None:
        rows = np.where(mask, items(sides[1][history]), -1)
        seen = [np.unique(own[own >= 0]) for own in rows]
    return EncodedRequests(sides[0], sides[1] | {"mask": mask}, seen)


def _kept(recommender: Recommender, encoded: EncodedRequests, filter_seen: bool) -> Iterator[np.ndarray]:
    """The rows [B, q] that are left after each stage, -1 where a request has fewer."""
    for stage, ranking in zip(recommender.bundle.cascade.stages, recommender.rank(encoded, filter_seen), strict=True):
        rows, counts = ranking.best(stage.keep)
        yield np.where(np.arange(rows.shape[1]) < counts[:, None], rows, -1)
