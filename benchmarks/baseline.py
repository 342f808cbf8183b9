"""The plain way to do the same work, which the benchmarks compare with.

The original's structure: requests are turned into arrays item by item in Python; the items' groups pass through the
models one after the other, with DIN's attention on an expanded concatenation of history and item; the loss is evaluated
once a group; torch's dense Adam moves whole tables, one optimizer a stage; metrics are computed request by request. The
models' parameters are ours, so the first losses must be equal, which ``python -m benchmarks.step`` checks.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.feather
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from deep_components.batch import CascadeBatch, Features, Targets
from deep_components.cascade import LABEL_CEILING, Cascade
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log
from deep_components.models.din import DIN, PADDING_LOGIT
from deep_components.models.dssm import DSSM
from deep_components.schema import SIDES
from deep_components.tables.store import EmbeddingStore

ZONE = ZoneInfo("Asia/Shanghai")


# ---- models ----------------------------------------------------------------------------------------------------------


def embed(store: EmbeddingStore, side: str, ids: Mapping[str, Tensor]) -> Tensor:
    """The fields of a side, looked up one by one: [B, W], [B, L, W] or [B, n, W]."""
    fields = store.schema.side(side)
    return torch.cat([F.embedding(ids[f.name], store.tables[f.table], padding_idx=f.padding) for f in fields], dim=-1)


def group_scores(model: nn.Module, store: EmbeddingStore, features: Features, items: Mapping[str, Tensor]) -> Tensor:
    """Scores [B, n] of one group of items."""
    request, history = embed(store, "request", features.request), embed(store, "history", features.history)
    item, mask = embed(store, "item", items), features.history_mask
    (batch, length, width), num_items = history.shape, item.shape[1]
    if isinstance(model, DIN):
        query = item[..., model.matched].unsqueeze(2).expand(batch, num_items, length, -1)
        keys = history.unsqueeze(1).expand(batch, num_items, length, width)
        logits = model.attention(torch.cat([keys, query], dim=-1)).squeeze(-1)
        padding = torch.full_like(logits, PADDING_LOGIT)
        logits = torch.where(mask.unsqueeze(1).expand_as(logits), logits, padding)
        own = torch.cat([logits.softmax(dim=-1) @ history, item], dim=-1)
    else:
        mean = history.sum(dim=1) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        request, own = torch.cat([request, mean], dim=-1), item
    if isinstance(model, DSSM):
        return (model.user_tower(request).unsqueeze(1) * model.item_tower(own)).sum(dim=-1)
    tower = model.get_submodule("tower")
    return tower(torch.cat([request.unsqueeze(1).expand(batch, num_items, -1), own], dim=-1)).squeeze(-1)


class BaselineTrainer:
    """The same steps as Trainer's, to rounding."""

    def __init__(
        self,
        cascade: Cascade,
        models: Mapping[str, nn.Module],
        stores: Mapping[str, EmbeddingStore],
        loss: nn.Module,
        lr: float,
    ) -> None:
        self.cascade, self.models, self.stores, self.loss = cascade, models, stores, loss
        parts = [[*model.parameters(), *stores[stage].tables.values()] for stage, model in models.items()]
        self.optimizers = [torch.optim.Adam(part, lr=lr) for part in (*parts, list(loss.parameters())) if part]

    def scores(self, features: Features) -> dict[str, Tensor]:
        """Scores [B, N] of every stage, group by group."""
        sizes = [group.size for group in self.cascade.groups]
        split = {name: ids.split(sizes, dim=1) for name, ids in features.item.items()}
        groups = [{name: parts[k] for name, parts in split.items()} for k in range(len(sizes))]
        return {
            stage: torch.cat([group_scores(model, self.stores[stage], features, items) for items in groups], dim=1)
            for stage, model in self.models.items()
        }

    def step(self, batch: CascadeBatch[Features]) -> Tensor:
        """One step; the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with record_function("step.forward"):
            scores = self.scores(batch.features)
        with record_function("step.loss"):
            for _ in self.cascade.groups:
                terms = self.loss(scores, batch.targets)
        with record_function("step.backward"):
            terms["loss"].backward()
        with record_function("step.optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()
        return terms["loss"].detach()


# ---- data ------------------------------------------------------------------------------------------------------------


def _clock(seconds: int) -> list[int]:
    local = datetime.fromtimestamp(seconds, ZONE)
    return [local.weekday() + 1, local.hour + 1, local.minute + 1]


def _item(row: np.ndarray) -> list[int]:
    """An item's eight fields from its row in request_id_dict."""
    video, author, _, category_two, upload_type, uploaded, category_one = (int(value) for value in row[:7])
    return [video + 1, author + 1, category_two + 1, category_one, upload_type + 1, *_clock(uploaded)]


def _event(row: np.ndarray) -> list[int]:
    """A history position's five fields; padding has no time."""
    video, author, category_two, category_one, upload_type = (int(value) for value in row[:5])
    return [video + 1, author + 1, category_two + 1, category_one, upload_type + 1] if row[7] else [0] * 5


class BaselineReader:
    """A day whose requests are encoded one by one, item by item, when they are asked for."""

    def __init__(self, cascade: Cascade, data_dir: Path, day: str) -> None:
        self.cascade, self.schema = cascade, open_log(data_dir).schema
        feather, items, histories = recflow.day_paths(data_dir, day)
        table = pyarrow.feather.read_table(feather)
        self.columns = {name: table[name].to_numpy() for name in table.column_names}
        self.items = {
            request: {name: rows.to_numpy() for name, rows in groups.items()}
            for part in recflow.read_request_dict(items)
            for request, groups in part
        }
        self.histories = {
            request: rows.to_numpy() for part in recflow.read_history_dict(histories) for request, rows in part
        }
        truth = cascade.groups[0]
        self.first: dict[int, int] = {}
        self.truth: dict[tuple[int, int], int] = {}
        flags, positions = self.columns[truth.name], self.columns[str(truth.index_field)]
        for row, request in enumerate(self.columns["request_id"].tolist()):
            self.first.setdefault(request, row)
            if flags[row]:
                self.truth[request, int(self.columns["video_id"][row])] = int(positions[row])
        self.requests = list(self.first)

    def request(self, request: int) -> dict[str, Any]:
        """One request, encoded; no item is missing."""
        row = self.first[request]
        ids = ("user_id", "device_id", "gender", "age", "province")
        user = _clock(int(self.columns["request_timestamp"][row]) // 1000)
        user += [int(self.columns[name][row]) + 1 for name in ids]
        items, labels, groups = list[list[int]](), list[int](), list[int]()
        for number, group in enumerate(self.cascade.groups):
            for item in self.items[request][group.name][: group.size]:
                items.append(_item(item))
                groups.append(number)
                if number:
                    labels.append(group.label())
                else:
                    known = self.truth.get((request, int(item[0])))
                    labels.append(0 if known is None else LABEL_CEILING - known)
        history = [_event(event) for event in self.histories[request]]
        mask = [bool(event[7]) for event in self.histories[request]]
        sides = {"request": user, "history": history, "item": items}
        return {**sides, "history_mask": mask, "labels": labels, "group": groups}

    def batch(self, requests: Sequence[int]) -> CascadeBatch[Features]:
        """Some requests, stacked."""
        encoded = [self.request(request) for request in requests]
        stacked = {name: torch.tensor([one[name] for one in encoded]) for name in encoded[0]}
        sides: dict[str, dict[str, Tensor]] = {
            side: {field.name: stacked[side][..., k] for k, field in enumerate(self.schema.side(side))}
            for side in SIDES
        }
        targets = Targets(stacked["labels"], torch.ones_like(stacked["labels"], dtype=torch.bool), stacked["group"])
        features = Features(**sides, history_mask=stacked["history_mask"])
        return CascadeBatch(torch.tensor(requests), features, targets)

    def batches(self, size: int, whole: bool = False) -> Iterator[CascadeBatch[Features]]:
        """The day in file order; the last batch may be smaller, unless only ``whole`` ones are wanted."""
        for first in range(0, len(self.requests) // size * size if whole else len(self.requests), size):
            with record_function("step.data"):
                batch = self.batch(self.requests[first : first + size])
            yield batch


# ---- metrics ---------------------------------------------------------------------------------------------------------


def request_metrics(cascade: Cascade, scores: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The metrics of one request without missing items or tied scores; ``labels`` and each stage's scores are [N]."""
    truth = set(range(cascade.groups[0].slots))
    alive = list(range(len(labels)))
    results: dict[str, float] = {}
    for stage, quota in cascade.quotas.items():
        alone = np.argsort(-scores[stage])[:quota].tolist()
        results[f"{stage}_recall"] = len(truth.intersection(alone)) / len(truth)
        results[f"{stage}_ndcg"] = ndcg_score(labels[None], scores[stage][None], k=cascade.num_relevant)
        results[f"{stage}_kendall_tau"] = kendalltau(scores[stage], labels).statistic
        alive = sorted(alive, key=lambda item: -scores[stage][item])[:quota]
    results["joint_recall"] = len(truth.intersection(alive)) / len(truth)
    return results


def day_metrics(cascade: Cascade, scores: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Means over all requests."""
    rows = [
        request_metrics(cascade, {stage: values[index] for stage, values in scores.items()}, labels[index])
        for index in range(len(labels))
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
