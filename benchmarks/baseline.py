"""The plain way to do the same work, which the benchmarks compare with.

The original's structure: requests are turned into arrays item by item in Python; the items' groups pass through the
models one after the other, with DIN's attention on an expanded concatenation of history and item; the loss is evaluated
once a group; torch's dense Adam moves whole tables, one optimizer a stage; metrics are computed request by request. The
models' parameters are ours, so the scores must be equal, which ``python -m benchmarks.step`` checks.
"""

from collections.abc import Mapping, Sequence
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

from deep_components.batch import HISTORY_FIELDS, ITEM_FIELDS, PADDING_INDEX, REQUEST_FIELDS, Features
from deep_components.cascade import LABEL_CEILING, Cascade
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.models.din import DIN, PADDING_LOGIT
from deep_components.models.dssm import DSSM

ZONE = ZoneInfo("Asia/Shanghai")


# ---- models ----------------------------------------------------------------------------------------------------------


def look_up(model: nn.Module, field: str, ids: Tensor) -> Tensor:
    return F.embedding(ids, model.get_parameter(f"embedding.{field}"), padding_idx=PADDING_INDEX.get(field, 0))


def embed(model: nn.Module, features: Features, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """User side [B, 8d], history [B, L, 5d], items [B, n, 8d]."""
    user = [look_up(model, field, getattr(features, field)) for field in REQUEST_FIELDS]
    history = [look_up(model, field, features.history[..., k]) for k, field in enumerate(HISTORY_FIELDS)]
    return (
        torch.cat(user, dim=-1),
        torch.cat(history, dim=-1),
        torch.cat([look_up(model, field, items[..., k]) for k, field in enumerate(ITEM_FIELDS)], dim=-1),
    )


def group_scores(model: nn.Module, features: Features, items: Tensor) -> Tensor:
    """Scores [B, n] of one group of items."""
    user, history, item = embed(model, features, items)
    (batch, length, width), num_items = history.shape, items.shape[1]
    if isinstance(model, DIN):
        query = item[..., :width].unsqueeze(2).expand(batch, num_items, length, width)
        keys = history.unsqueeze(1).expand(batch, num_items, length, width)
        logits = model.attention(torch.cat([keys, query], dim=-1)).squeeze(-1)
        padding = torch.full_like(logits, PADDING_LOGIT)
        logits = torch.where(features.history_mask.unsqueeze(1).expand_as(logits), logits, padding)
        interest = logits.softmax(dim=-1) @ history
        own = torch.cat([interest, item], dim=-1)
    else:
        mean = history.sum(dim=1) / features.history_mask.sum(dim=-1, keepdim=True).clamp(min=1)
        user, own = torch.cat([user, mean], dim=-1), item
    if isinstance(model, DSSM):
        return (model.user_tower(user).unsqueeze(1) * model.item_tower(own)).sum(dim=-1)
    tower = model.get_submodule("tower")
    return tower(torch.cat([user.unsqueeze(1).expand(batch, num_items, -1), own], dim=-1)).squeeze(-1)


def all_scores(cascade: Cascade, models: Mapping[str, nn.Module], features: Features) -> list[Tensor]:
    """Scores [B, N] of every stage, group by group."""
    size = cascade.group_size
    groups = [features.items[:, k * size : (k + 1) * size] for k in range(len(cascade.groups))]
    return [torch.cat([group_scores(model, features, items) for items in groups], dim=1) for model in models.values()]


class BaselineTrainer:
    """The same steps as Trainer's, to rounding."""

    def __init__(self, cascade: Cascade, models: Mapping[str, nn.Module], loss: nn.Module, lr: float) -> None:
        self.cascade, self.models, self.loss = cascade, models, loss
        parts = [list(part.parameters()) for part in (*models.values(), loss)]
        self.optimizers = [torch.optim.Adam(part, lr=lr) for part in parts if part]

    def step(self, batch: Any) -> Tensor:
        """One step; the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with record_function("step.forward"):
            scores = all_scores(self.cascade, self.models, batch.features)
        with record_function("step.loss"):
            for _ in self.cascade.groups:
                terms = self.loss(*scores, batch.targets)
        with record_function("step.backward"):
            terms["loss"].backward()
        with record_function("step.optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()
        return terms["loss"].detach()


# ---- data ------------------------------------------------------------------------------------------------------------


def load_day(data_dir: Path, day: str) -> tuple[dict[str, np.ndarray], dict[int, Any], dict[int, Any]]:
    """A day's files as they are."""
    table = pyarrow.feather.read_table(recflow.feather_path(data_dir, day))
    columns = {name: table[name].to_numpy() for name in table.column_names}
    items = {
        request: {name: rows.to_numpy() for name, rows in groups.items()}
        for part in recflow.read_request_dict(recflow.request_path(data_dir, day))
        for request, groups in part
    }
    histories = {
        request: rows.to_numpy()
        for part in recflow.read_history_dict(recflow.history_path(data_dir, day))
        for request, rows in part
    }
    return columns, items, histories


def _clock(seconds: int) -> list[int]:
    local = datetime.fromtimestamp(seconds, ZONE)
    return [local.weekday() + 1, local.hour + 1, local.minute + 1]


def _item(row: np.ndarray) -> list[int]:
    """An item's eight fields from its row in request_id_dict."""
    return [
        int(row[0]) + 1,
        int(row[1]) + 1,
        int(row[3]) + 1,
        int(row[6]),
        int(row[4]) + 1,
        *_clock(int(row[5])),
    ]


class BaselineReader:
    """A day whose requests are encoded one by one, item by item, when they are asked for."""

    def __init__(self, cascade: Cascade, data_dir: Path, day: str) -> None:
        self.cascade = cascade
        columns, self.items, self.histories = load_day(data_dir, day)
        truth = cascade.groups[0]
        self.first: dict[int, int] = {}
        self.truth: dict[tuple[int, int], int] = {}
        flags, places = columns[truth.name], columns[str(truth.index_field)]
        for row, request in enumerate(columns["request_id"].tolist()):
            self.first.setdefault(request, row)
            if flags[row]:
                self.truth[request, int(columns["video_id"][row])] = int(places[row])
        self.columns = columns
        self.requests = list(self.first)

    def __len__(self) -> int:
        return len(self.requests)

    def request(self, place: int) -> dict[str, Any]:
        """One request, encoded."""
        request = self.requests[place]
        row = self.first[request]
        ids = ("user_id", "device_id", "gender", "age", "province")
        user = _clock(int(self.columns["request_timestamp"][row]) // 1000)
        user += [int(self.columns[name][row]) + 1 for name in ids]
        items: list[list[int]] = []
        labels: list[int] = []
        for group in self.cascade.groups:
            for item in self.items[request][group.name][: self.cascade.group_size]:
                items.append(_item(item))
                known = self.truth.get((request, int(item[0])))
                labels.append(LABEL_CEILING - known if group is self.cascade.groups[0] and known is not None
                              else group.label() if group is not self.cascade.groups[0] else 0)  # fmt: skip
        history = [
            [int(event[0]) + 1, int(event[1]) + 1, int(event[2]) + 1, int(event[3]), int(event[4]) + 1]
            if event[7]
            else [0] * 5
            for event in self.histories[request]
        ]
        return {"user": user, "items": items, "labels": labels, "history": history}

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Some requests, stacked."""
        rows = [self.request(place) for place in places]
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# ---- metrics ---------------------------------------------------------------------------------------------------------


def request_metrics(cascade: Cascade, scores: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The metrics of one request without missing items or tied scores; ``labels`` and each stage's scores are [N]."""
    truth = set(range(cascade.group_size))
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
        request_metrics(cascade, {stage: values[place] for stage, values in scores.items()}, labels[place])
        for place in range(len(labels))
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
