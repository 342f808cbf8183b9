"""A run's models and embedding tables, to and from its files (runs/state.py)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.cascade import Cascade
from deep_components.errors import InputError
from deep_components.models import build_models, parameter_shapes
from deep_components.runs.folder import CONFIG_FILE, model_file
from deep_components.runs.state import TABLE, OpenModel, save_models, saved_ids, saved_shapes
from deep_components.schema import Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore, build_stores


def as_array(values: Tensor) -> np.ndarray:
    """The tensor's values on the CPU; they share its memory where it lies there."""
    array: np.ndarray = values.detach().cpu().numpy()
    return array


def save_trained(
    run: Path, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore], note: Mapping[str, Any]
) -> None:
    """Write ``<stage>.safetensors`` of every stage; ``note`` as of :func:`deep_components.runs.state.save_models`.

    Tables are written as they are at this step, and stay as they are; those that are not up to date (tables/store.py)
    are copied, one stage at a time."""
    for stage, model in models.items():
        store = stores[stage]
        arrays = {f"{TABLE}{table}": as_array(store.values(table)) for table in store.tables}
        arrays |= {name: as_array(values) for name, values in model.state_dict().items()}
        save_models(run, {stage: arrays}, note, {table: known.ids() for table, known in store.ids.items()})


def trained_models(
    run: Path,
    cascade: Cascade,
    schema: Schema,
    emb_dim: int,
    nn_units: int,
    dtype: torch.dtype,
    device: torch.device,
    ids: Mapping[str, IdSet],
) -> tuple[dict[str, nn.Module], dict[str, EmbeddingStore], int | None]:
    """The models and tables in a folder, to score with: their tables have rows for ``ids`` (other tables for all), and
    the seed is that of :func:`load_trained`. Give sizes that :func:`check_sizes`
    has seen. InputError when a file is missing or damaged."""
    models = build_models(cascade, schema, emb_dim, nn_units, None)
    stores = build_stores(cascade, schema, emb_dim, None, ids)
    for stage, model in models.items():
        model.to(device=device, dtype=dtype).eval()
        stores[stage].to(device, dtype)
    return models, stores, load_trained(run, models, stores)


def trained_ids(run: Path, cascade: Cascade, schema: Schema) -> dict[str, IdSet]:
    """The ids that the training has seen, of the tables that its files have rows of such ids only for."""
    seen = saved_ids(run, cascade.stage_names[0])[0]
    return {name: IdSet.of([seen[name]], table.size) for name, table in schema.tables.items() if name in seen}


@torch.no_grad()
def load_trained(run: Path, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore]) -> int | None:
    """Read every stage's parameters and tables from ``run``, cast to the types of ``models`` and ``stores``.

    A compacted table gets the rows of its ids; an id that the file lacks gets its initial value, which is that of the
    file's seed. Returns this seed; None where the files' tables are all whole. InputError when a file is missing or
    damaged, or does not fit the models.
    """
    seed = None
    for stage, model in models.items():
        saved, store = OpenModel(run, stage), stores[stage]
        seed = saved.initial_seed
        tables = {f"{TABLE}{table}": table for table in saved.tables | store.ids.keys() if table in store.tables}
        targets: dict[str, Tensor] = {f"{TABLE}{table}": values for table, values in store.tables.items()}
        targets |= model.state_dict()
        _check_shapes(saved, targets, tables)
        for name, target in targets.items():
            values = _rows(saved, store, tables[name]) if name in tables else saved.array(name)
            target.copy_(torch.from_numpy(values))
    return seed


def check_sizes(run: Path, cascade: Cascade, schema: Schema, emb_dim: int, nn_units: int) -> None:
    """InputError when the run's files hold models of other sizes: to be known before anything of them is allocated."""
    for stage in cascade.stages:
        wanted = parameter_shapes(stage, schema, emb_dim, nn_units)
        for name, shape in saved_shapes(run, stage.name).items():
            own = (*shape[:-1], emb_dim) if name.startswith(TABLE) else wanted.get(name, shape)
            if shape != own:
                raise InputError(
                    f"{run / model_file(stage.name)}: {name} is {shape}, but the model wants {own} with the sizes that "
                    f"{CONFIG_FILE} names, emb_dim={emb_dim} and nn_units={nn_units}; train again"
                )


def _rows(saved: OpenModel, store: EmbeddingStore, table: str) -> np.ndarray:
    """The saved rows of the ids that the store's table has."""

    def initial(table: str, ids: np.ndarray) -> np.ndarray:
        assert saved.initial_seed is not None
        return as_array(store.initial_values(table, ids, saved.initial_seed))

    return saved.rows(table, store.ids[table].ids() if table in store.ids else np.arange(store.rows[table]), initial)


def _check_shapes(saved: OpenModel, targets: Mapping[str, Tensor], tables: Collection[str]) -> None:
    """InputError unless the file has what is wanted; of ``tables`` rows may be taken."""
    for name in sorted(targets.keys() | saved.shapes.keys()):
        first = 1 if name in tables else 0
        if name not in saved.shapes:
            problem = f"lacks parameter {name} of the model"
        elif name not in targets:
            problem = f"has a parameter {name} that the model has not"
        elif saved.shapes[name][first:] != targets[name].shape[first:]:
            shapes = saved.shapes[name], tuple(targets[name].shape)
            problem = f"parameter {name} has shape {shapes[0]}, but the model wants {shapes[1]}"
        else:
            continue
        raise InputError(
            f"{saved.path}: {problem}; use the model, the data and the sizes (--emb_dim, --nn_units) that it was "
            "trained with"
        )
