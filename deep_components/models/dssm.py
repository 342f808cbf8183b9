"""DSSM, the retrieval stage: two towers and a dot product (Huang et al., CIKM 2013)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deep_components.batch import Features
from deep_components.models.tower import run_tower, tower
from deep_components.tables.embedding import FieldEmbedding, mean_history
from deep_components.tables.id_set import IdSet


class DSSM(nn.Module):
    """score(request, item) = user_tower(user side, mean history) . item_tower(item).

    Towers are [input -> u -> u/2 -> u/4] with u = ``nn_units``; inputs are 13d and 8d wide.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        emb_dim: int = 8,
        nn_units: int = 128,
        ids: Mapping[str, IdSet] | None = None,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(vocabulary, emb_dim, ids)
        hidden = [nn_units, nn_units // 2, nn_units // 4]
        self.user_tower = tower([13 * emb_dim, *hidden])
        self.item_tower = tower([8 * emb_dim, *hidden])

    def forward(self, features: Features) -> Tensor:
        """Scores [B, N]."""
        embedded = self.embedding(features)
        history = mean_history(embedded.history, features.history_mask)
        user = run_tower(
            self.user_tower, torch.cat([embedded.user, history], dim=-1), self.embedding.kernels
        )  # [B, u/4]
        items = run_tower(self.item_tower, embedded.items, self.embedding.kernels)  # [B, N, u/4]
        return torch.einsum("bu,bnu->bn", user, items)
