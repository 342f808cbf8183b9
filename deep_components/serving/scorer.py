"""Trained models as a service asks them: vectors of users and items, and any stage's scores, of encoded values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures, Features, RowFeatures, SlotFeatures
from deep_components.cascade import Cascade
from deep_components.checkpoint import as_array
from deep_components.errors import InputError
from deep_components.schema import SIDES, Schema
from deep_components.tables.lookup import padding_row, table_uses
from deep_components.tables.store import EmbeddingStore

Arrays = Mapping[str, np.ndarray]


class Scorer:
    """Scores of a cascade's models, equal to those of an evaluation of the same candidates.

    Args:
        models, stores: stage -> its model and tables, on one device, in evaluation mode.
        seed: of the initial values of ids that compacted tables lack; None where tables are whole.
    """

    def __init__(
        self,
        cascade: Cascade,
        schema: Schema,
        models: Mapping[str, nn.Module],
        stores: Mapping[str, EmbeddingStore],
        seed: int | None = None,
    ) -> None:
        self.cascade, self.schema, self.models, self.stores, self.seed = cascade, schema, models, stores, seed
        self.device = next(iter(models[cascade.stages[0].name].parameters())).device
        self._uses = table_uses(schema)
        self._ids = next(iter(stores.values())).ids

    def features(self, request: Arrays, history: Arrays, item: Arrays) -> Features:
        """Encoded sides as a batch: fields [B], histories [B, L] with "mask" [B, L], items [B, N]; lists have one more
        axis. A schema without histories may do without the mask."""
        mask = history.get("mask", np.zeros((_size(request) or _size(item), 0), bool))
        sides = {
            side: {field.name: _tensor(arrays[field.name]) for field in self.schema.side(side)}
            for side, arrays in zip(SIDES, (request, history, item), strict=True)
        }
        return Features(**sides, history_mask=torch.from_numpy(np.array(mask, bool)))

    @torch.inference_mode()
    def user_vectors(self, request: Arrays, history: Arrays) -> np.ndarray:
        """The first stage's vectors [B, d] float32 of requests."""
        batch = len(history["mask"]) if "mask" in history else _size(request)
        return self._vectors(self.features(request, history, self._nothing("item", (batch, 0))))

    def user_vectors_of(self, features: Features) -> np.ndarray:
        """The same of a log's batch."""
        none = {name: values[:, :0] for name, values in features.item.items()}
        return self._vectors(replace(features, item=none))

    @torch.inference_mode()
    def _vectors(self, features: Features) -> np.ndarray:
        stage = self.cascade.stages[0].name
        model = cast(Any, self.models[stage])
        return as_array(model.user_vectors(self._embedded(stage, features)).float())

    @torch.inference_mode()
    def item_vectors(self, item: Arrays) -> np.ndarray:
        """The first stage's vectors [M, d] float32 of items, whose fields are [M], lists [M, G]; give some thousand at
        a time. Their dot product with a user's vector is the stage's score."""
        stage = self.cascade.stages[0].name
        one = {name: values[None] for name, values in item.items()}
        history = self._nothing("history", (1, 0)) | {"mask": np.zeros((1, 0), bool)}
        embedded = self._embedded(stage, self.features(self._nothing("request", (1,)), history, one))
        return as_array(cast(Any, self.models[stage]).item_vectors(embedded.item)[0].float())

    @torch.inference_mode()
    def scores(self, stage: str, features: Features) -> np.ndarray:
        """A stage's scores [B, N] of a batch."""
        return as_array(self.models[stage](self._embedded(stage, features)))

    def _nothing(self, side: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {
            field.name: np.full((*shape, field.length) if field.length else shape, field.padding,
                                np.int64 if field.table else np.float32)
            for field in self.schema.side(side)
        }  # fmt: skip

    def _embedded(self, stage: str, features: Features) -> EmbeddedFeatures:
        """The fields looked up in the stage's tables. An id that a compacted table has no row for is the unknown one,
        or where the table has none, the id with its initial value."""
        sides = {side: {n: v.to(self.device) for n, v in getattr(features, side).items()} for side in SIDES}
        pulled: dict[str, Tensor] = {}
        for table, known in self._ids.items():
            used = [sides[side][name] for side, name in self._uses[table]]
            ids = torch.cat([part.flatten() for part in used]).cpu().numpy()
            there = known.contains(ids)
            if there.all():
                rows = known.rows(ids)
            elif (unknown := self.schema.tables[table].unknown) is not None:
                rows = known.rows(np.where(there, ids, unknown))
            else:
                pulled[table], rows = self._pulled(stage, table, ids)
            parts = torch.from_numpy(rows).to(self.device).split([part.numel() for part in used])
            for (side, name), part, new in zip(self._uses[table], used, parts, strict=True):
                sides[side][name] = new.view(part.shape)
        mask = features.history_mask.to(self.device)
        if not pulled:
            return self.stores[stage].embed(RowFeatures(**sides, history_mask=mask))
        slots = SlotFeatures(**sides, history_mask=mask, rows=dict.fromkeys(pulled, torch.empty(0)))
        return self.stores[stage].embed(slots, pulled)

    def _pulled(self, stage: str, table: str, ids: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The values of the distinct ids, that of padding first, and the slot of each id among them."""
        known, store = self._ids[table], self.stores[stage]
        distinct, slots = np.unique(ids, return_inverse=True)
        there = known.contains(distinct)
        values = store.tables[table].new_empty((1 + len(distinct), store.dim))
        values[0] = store.tables[table][padding_row(self.schema, self._ids, table)]
        values[1:][torch.from_numpy(there)] = store.tables[table][torch.from_numpy(known.rows(distinct[there]))]
        values[1:][torch.from_numpy(~there)] = self._initial(store, table, distinct[~there]).to(values)
        padding = distinct[slots] == self.schema.tables[table].padding
        return values, np.where(padding, 0, slots + 1)

    def _initial(self, store: EmbeddingStore, table: str, ids: np.ndarray) -> Tensor:
        if self.seed is None:
            raise InputError(
                f"table {table}: the models have no row of id {ids[0]}, and nothing tells its initial value"
            )
        return store.initial_values(table, ids, self.seed)


def check_retrieval(model: nn.Module, stage: str) -> None:
    """InputError unless the first stage's model scores by a dot product of vectors, so that an index can search."""
    for method in ("user_vectors", "item_vectors"):
        if not callable(getattr(model, method, None)):
            raise InputError(
                f"stage {stage}: its model {type(model).__name__} has no {method}, so no index can search the corpus "
                "for it; serve a cascade whose first stage is a dssm, or give your model the method (docs/serving.md)"
            )


def _size(arrays: Arrays) -> int:
    return len(next(iter(arrays.values()), ()))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, values.dtype if values.dtype == np.float32 else np.int64, order="C"))
