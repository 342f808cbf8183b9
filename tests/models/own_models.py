"""Models as users write them, named in cascades as "tests.models.own_models:Name"."""

import torch
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures
from deep_components.schema import Schema

nothing = 3


class Bilinear(nn.Module):
    """score(request, item) = norm(request W + b) . item, with dropout, and buffers that count batches."""

    def __init__(self, schema: Schema, emb_dim: int, nn_units: int) -> None:
        super().__init__()
        self.map = nn.Linear(schema.width("request", emb_dim), nn_units)
        self.norm = nn.BatchNorm1d(nn_units)
        self.item = nn.Linear(schema.width("item", emb_dim), nn_units)
        self.drop = nn.Dropout(0.2)
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        request = self.drop(self.norm(self.map(features.request)))
        return torch.einsum("bi,bni->bn", request, self.item(features.item))


class Towers(Bilinear):
    """Has what a first stage needs to be served."""

    def user_vectors(self, features: EmbeddedFeatures) -> Tensor:
        vectors: Tensor = self.norm(self.map(features.request))
        return vectors

    def item_vectors(self, item: Tensor) -> Tensor:
        vectors: Tensor = self.item(item)
        return vectors


class OneScoreTooMuch(Bilinear):
    def forward(self, features: EmbeddedFeatures) -> Tensor:
        return super().forward(features).unsqueeze(-1)


class TwoOutputs(Bilinear):
    def forward(self, features: EmbeddedFeatures) -> Tensor:
        return super().forward(features), features  # type: ignore[return-value]


class NoForward(nn.Module):
    def __init__(self, schema: Schema, emb_dim: int, nn_units: int) -> None:
        super().__init__()


class NoConstructor(nn.Module):
    def forward(self, features: EmbeddedFeatures) -> Tensor:
        return features.item.sum(dim=-1)


class OtherArguments(Bilinear):
    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)


class NamedAsTables(Bilinear):
    def __init__(self, schema: Schema, emb_dim: int, nn_units: int) -> None:
        super().__init__(schema, emb_dim, nn_units)
        self.embedding = nn.Embedding(3, nn_units)


def function(schema: Schema, emb_dim: int, nn_units: int) -> nn.Module:
    return Bilinear(schema, emb_dim, nn_units)
