"""MLP, the pre-ranking stage: one tower over user, mean history and item."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.batch import Features
from deep_components.models.tower import run_tower, tower
from deep_components.tables.embedding import FieldEmbedding, mean_history
from deep_components.tables.id_set import IdSet


class MLP(nn.Module):
    """score = tower(user side, mean history, item), [21d -> u -> u/2 -> u/4 -> 1] with u = ``nn_units``."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        emb_dim: int = 8,
        nn_units: int = 128,
        ids: Mapping[str, IdSet] | None = None,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(vocabulary, emb_dim, ids)
        self.tower = tower([21 * emb_dim, nn_units, nn_units // 2, nn_units // 4, 1])

    def forward(self, features: Features) -> Tensor:
        """Scores [B, N]."""
        embedded = self.embedding(features)
        history = mean_history(embedded.history, features.history_mask)
        request = torch.cat([embedded.user, history], dim=-1)  # [B, 13d]
        return run_tower(self.tower, embedded.items, self.embedding.kernels, shared=request).squeeze(-1)
