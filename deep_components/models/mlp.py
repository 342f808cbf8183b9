"""MLP, the pre-ranking stage: one tower over request, mean history and item."""

import torch
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures
from deep_components.kernels import Kernels
from deep_components.models.tower import mean_history, run_tower, tower
from deep_components.schema import SIDES, Schema


class MLP(nn.Module):
    """score = tower(request, mean history, item), [input -> u -> u/2 -> u/4 -> 1] with u = ``nn_units``.

    Arguments as those of :class:`deep_components.models.dssm.DSSM`.
    """

    def __init__(self, schema: Schema, emb_dim: int = 8, nn_units: int = 128) -> None:
        super().__init__()
        width = sum(schema.width(side, emb_dim) for side in SIDES)
        self.tower = tower([width, nn_units, nn_units // 2, nn_units // 4, 1])
        self.kernels: Kernels | None = None

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        """Scores [B, N]."""
        history = mean_history(features.history, features.history_mask)
        request = torch.cat([features.request, history], dim=-1)
        return run_tower(self.tower, features.item, self.kernels, shared=request).squeeze(-1)
