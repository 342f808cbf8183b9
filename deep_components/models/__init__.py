"""The stage models of the cascades: DSSM retrieves, MLP pre-ranks, DIN ranks."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from deep_components.cascade import Cascade
from deep_components.kernels import Kernels
from deep_components.models.din import DIN
from deep_components.models.dssm import DSSM
from deep_components.models.mlp import MLP
from deep_components.tables.embedding import FieldEmbedding
from deep_components.tables.id_set import IdSet

MODEL_OF_STAGE: dict[str, type[DSSM] | type[MLP] | type[DIN]] = {"retrieval": DSSM, "prerank": MLP, "rank": DIN}


def build_models(
    cascade: Cascade,
    vocabulary: Mapping[str, int],
    emb_dim: int,
    nn_units: int,
    seed: int | None,
    ids: Mapping[str, IdSet] | None = None,
) -> dict[str, nn.Module]:
    """A freshly initialised model for every stage, in the cascade's order.

    A stage's initial parameters depend on (seed, stage name) alone; the CPU's global generator is left as it was. With
    ``seed=None`` tables are left without values, for models that are about to be loaded. ``ids`` are those of compacted
    tables (:class:`FieldEmbedding`).
    """
    models: dict[str, nn.Module] = {}
    for stage in cascade.stage_names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:7], "little"))
            model = MODEL_OF_STAGE[stage](vocabulary, emb_dim, nn_units, ids)
        if seed is not None:
            model.embedding.initialise(seed, stage)
        models[stage] = model
    return models


def use_kernels(models: Mapping[str, nn.Module], kernels: Kernels | None) -> None:
    """Have the models use compiled kernels, or with None PyTorch's operators. Tables and inputs must be on a CPU."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, FieldEmbedding):
                module.kernels = kernels
