"""The stage models: embedded features -> scores. They know widths from the schema, and neither tables nor optimizers.

A model of one's own is a ``torch.nn.Module`` with ``__init__(self, schema, emb_dim, nn_units)`` and
``forward(self, features: EmbeddedFeatures) -> Tensor`` of scores [B, N]: under a name in MODELS, or anywhere on
Python's import path (docs/cascades.md).
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
from deep_components.models.own import build_own, own_class
from deep_components.schema import Schema

MODELS: dict[str, Callable[[Schema, int, int], nn.Module]] = {"dssm": DSSM, "mlp": MLP, "din": DIN}


def check_models(cascade: Cascade, source: str) -> None:
    """InputError, which begins with ``source``, when a stage names a model that is neither in MODELS nor a class that
    can be imported. Imports the latter: only for a cascade that the user named."""
    for stage in cascade.stages:
        if ":" in stage.model:
            own_class(stage.model, f"{source}: stage {stage.name}: model")
        elif stage.model not in MODELS:
            raise InputError(
                f"{source}: stage {stage.name}: model {stage.model!r} is none of {', '.join(MODELS)}; one of your "
                'own is named "my_package.my_module:MyModel"'
            )


def build_models(
    cascade: Cascade, schema: Schema, emb_dim: int, nn_units: int, seed: int | None
) -> dict[str, nn.Module]:
    """A freshly initialised model for every stage, in serving order, ``nn_units`` wide unless the stage says otherwise.

    A stage's initial parameters depend on (seed, stage name) alone; the CPU's global generator is left as it was.

    Raises InputError as :func:`check_models`, and when a model of one's own has another interface.
    """
    check_models(cascade, f"cascade {cascade.name}")
    models: dict[str, nn.Module] = {}
    for stage in cascade.stages:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{stage.name}".encode()).digest()[:7], "little"))
            models[stage.name] = _build(stage, schema, emb_dim, stage.nn_units or nn_units)
    return models


def _build(stage: Stage, schema: Schema, emb_dim: int, nn_units: int) -> nn.Module:
    if stage.model in MODELS:
        return MODELS[stage.model](schema, emb_dim, nn_units)
    what = f"stage {stage.name}: model"
    return build_own(own_class(stage.model, what), schema, emb_dim, nn_units, f"{what} {stage.model!r}")
