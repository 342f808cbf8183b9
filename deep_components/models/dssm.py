"""DSSM, the retrieval stage: two towers and a dot product (Huang et al., CIKM 2013)."""

import torch
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures
from deep_components.kernels import Kernels
from deep_components.models.tower import mean_history, run_tower, tower
from deep_components.schema import Schema


class DSSM(nn.Module):
    """score(request, item) = user_tower(request, mean history) . item_tower(item).

    Towers are [input -> u -> u/2 -> u/4] with u = ``nn_units``, a multiple of 4. ``schema`` gives the inputs' widths;
    ``emb_dim`` is d, the numbers an id is embedded in.
    """

    def __init__(self, schema: Schema, emb_dim: int = 8, nn_units: int = 128) -> None:
        super().__init__()
        hidden = [nn_units, nn_units // 2, nn_units // 4]
        self.user_tower = tower([schema.width("request", emb_dim) + schema.width("history", emb_dim), *hidden])
        self.item_tower = tower([schema.width("item", emb_dim), *hidden])
        self.kernels: Kernels | None = None

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        """Scores [B, N]."""
        return torch.einsum("bu,bnu->bn", self.user_vectors(features), self.item_vectors(features.item))

    def user_vectors(self, features: EmbeddedFeatures) -> Tensor:
        """The requests' vectors [B, u/4]; items take no part."""
        history = mean_history(features.history, features.history_mask)
        return run_tower(self.user_tower, torch.cat([features.request, history], dim=-1), self.kernels)

    def item_vectors(self, item: Tensor) -> Tensor:
        """The vectors [B, N, u/4] of embedded items [B, N, W]."""
        return run_tower(self.item_tower, item, self.kernels)
