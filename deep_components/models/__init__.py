"""The stage models: embedded features -> scores. They know widths from the schema, and neither tables nor optimizers.

A model of one's own is a ``torch.nn.Module`` with ``__init__(self, schema, emb_dim, nn_units)`` and
``forward(self, features: EmbeddedFeatures) -> Tensor`` of scores [B, N], under a name in MODELS (docs/cascades.md).
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from deep_components.cascade import Cascade, Stage
from deep_components.errors import InputError
from deep_components.models.din import DIN
from deep_components.models.dssm import DSSM
from deep_components.models.mlp import MLP
from deep_components.schema import Schema

MODELS: dict[str, Callable[[Schema, int, int], nn.Module]] = {"dssm": DSSM, "mlp": MLP, "din": DIN}


def parameter_shapes(stage: Stage, schema: Schema, emb_dim: int, nn_units: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a stage's model, nothing of which is allocated. InputError as
    :func:`build_models`."""
    _check_known(stage)
    with torch.device("meta"):
        parameters = MODELS[stage.model](schema, emb_dim, nn_units).state_dict()
    return {name: tuple(values.shape) for name, values in parameters.items()}


def _check_known(stage: Stage) -> None:
    if stage.model not in MODELS:
        raise InputError(f"stage {stage.name}: model {stage.model!r} is none of {', '.join(MODELS)}")


def build_models(
    cascade: Cascade, schema: Schema, emb_dim: int, nn_units: int, seed: int | None
) -> dict[str, nn.Module]:
    """A freshly initialised model for every stage, in serving order.

    A stage's initial parameters depend on (seed, stage name) alone; the CPU's global generator is left as it was.

    Raises InputError when a stage names a model that is not in MODELS.
    """
    models: dict[str, nn.Module] = {}
    for stage in cascade.stages:
        _check_known(stage)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{stage.name}".encode()).digest()[:7], "little"))
            models[stage.name] = MODELS[stage.model](schema, emb_dim, nn_units)
    return models
