"""Models of one's own: a class that a cascade file names, ``model = "my_package.my_module:MyModel"``."""

import copy
import importlib
import inspect

import torch
from torch import nn

from deep_components.batch import EmbeddedFeatures
from deep_components.errors import InputError
from deep_components.schema import Schema

_TABLES = ("embedding.", "ids.")  # names of a run's files that begin so are those of tables (runs/state.py)


def own_class(name: str, what: str) -> type[nn.Module]:
    """The class called "package.module:Class", found by Python's usual import path.

    Importing runs the module's code, so the name must come from the user, not from a data file.

    Raises:
        InputError: it cannot be imported, or is no nn.Module; begins with ``what``.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise InputError(f'{what} {name!r}: write it as "my_package.my_module:MyModel"; see docs/cascades.md')
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise InputError(
            f"{what} {name!r}: cannot be imported ({error}); install its package, or name its folder in PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        kind = f"there is no {attribute}" if found is None else f"{attribute} is no subclass of torch.nn.Module"
        raise InputError(f"{what} {name!r}: {kind} in {module}; see docs/cascades.md")
    return found


def build_own(kind: type[nn.Module], schema: Schema, emb_dim: int, nn_units: int, what: str) -> nn.Module:
    """A model of the class. InputError, which begins with ``what``, unless it has the interface of a stage's model."""
    for method in ("__init__", "forward"):
        if getattr(kind, method) is getattr(nn.Module, method):
            raise InputError(f"{what}: has no {method} of its own; see docs/cascades.md")
    try:
        inspect.signature(kind).bind(schema, emb_dim, nn_units)
    except TypeError as error:
        raise InputError(f"{what}: cannot be called with (schema, emb_dim, nn_units): {error}") from error
    model = kind(schema, emb_dim, nn_units)
    if reserved := [name for name in model.state_dict() if name.startswith(_TABLES)]:
        raise InputError(f"{what}: parameter {reserved[0]}: tables have names that begin so; rename the attribute")
    shape = _scores_shape(model, schema, emb_dim)
    if shape != (2, 3):
        raise InputError(f"{what}: two requests of three items get scores of shape {shape}; forward gives [B, N]")
    return model


@torch.no_grad()
def _scores_shape(model: nn.Module, schema: Schema, emb_dim: int) -> tuple[int, ...] | None:
    """Of the scores of two requests with three items and two events; None where they are no tensor of floats."""
    shapes = {"request": (2,), "history": (2, 2), "item": (2, 3)}
    sides = {side: torch.zeros(*shape, schema.width(side, emb_dim)) for side, shape in shapes.items()}
    scores = copy.deepcopy(model).eval()(EmbeddedFeatures(**sides, history_mask=torch.ones(2, 2, dtype=torch.bool)))
    return tuple(scores.shape) if isinstance(scores, torch.Tensor) and scores.is_floating_point() else None
