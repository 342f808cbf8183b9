"""Equality with the original's models: logits, gradient norms, and float64 training trajectories."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_components import run_train2, run_train3
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade
from deep_components.dataset.log import open_log
from deep_components.kernels import load_kernels, use_kernels
from deep_components.models import build_models
from deep_components.models.original_names import from_original, to_original
from deep_components.schema import RECFLOW_IDS, Schema, recflow_schema
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore, build_stores
from deep_components.training.step import Trainer
from tests.schemas import RECFLOW

METHODS = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron"]
SETTINGS = {"two_stage": TWO_STAGE, "three_stage": THREE_STAGE}


def original_state(arrays: np.lib.npyio.NpzFile, prefix: str, model: str) -> dict[str, Tensor]:
    names = [name for name in arrays.files if name.startswith(prefix)]
    return from_original(model, {name.removeprefix(prefix): torch.from_numpy(arrays[name]) for name in names})


def schema_of(state: dict[str, Tensor]) -> Schema:
    return recflow_schema({field: len(state[f"embedding.{field}"]) - 2 for field in RECFLOW_IDS})


def load(state: dict[str, Tensor], store: EmbeddingStore, model: torch.nn.Module) -> None:
    """Put the original's parameters into a stage's tables and model."""
    with torch.no_grad():
        for name, table in store.tables.items():
            table.copy_(state[f"embedding.{name}"])
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("embedding.")})


@pytest.mark.parametrize(("setting", "stage"), [(s, stage) for s, c in SETTINGS.items() for stage in c.stage_names])
@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
def test_logits_and_gradient_norms_equal_the_originals(
    golden: Path, tmp_path: Path, stage: str, setting: str, compiled: bool
) -> None:
    arrays, cascade = np.load(golden / "models.npz"), SETTINGS[setting]
    kind = next(s.model for s in cascade.stages if s.name == stage)
    state = original_state(arrays, f"{kind}/state/", kind)
    schema = schema_of(state)
    store, model = build_stores(cascade, schema, 8, None)[stage], build_models(cascade, schema, 8, 128, 0)[stage]
    load(state, store, model)
    use_kernels([model, store], load_kernels(torch.float32) if compiled else None)
    day = open_log(golden / "recflow_mini").open_day("2024-01-13", cascade, tmp_path)
    batch = TableLookup(schema, {}, {}).rows(day.batch(np.arange(len(day))))
    logits = model(store.embed(batch.features))
    expected = torch.from_numpy(arrays[f"{kind}/{setting}/logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().mean().item())

    logits.square().mean().backward()
    tables = {f"embedding.{name}": table for name, table in store.tables.items()}
    for name, parameter in to_original(kind, {**tables, **dict(model.named_parameters())}).items():
        assert parameter.grad is not None
        norm = float(arrays[f"{kind}/{setting}/grad_norm/{name}"])
        # A constant added to all attention logits changes nothing: that bias' gradient is rounding noise around 0.
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("cascade", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("optimizer", ["adam", "deferred_adam", "compiled deferred_adam"])
@pytest.mark.parametrize("method", METHODS)
def test_float64_trajectory_equals_the_originals(
    golden: Path, tmp_path: Path, cascade: Cascade, method: str, optimizer: str
) -> None:
    """20 steps of batch 32 on two days, five passes, file order, then the scores of the test day. Deferred Adam defers
    every table here, and is held to 1e-6."""
    kernels = load_kernels(torch.float64) if optimizer.startswith("compiled") else None
    optimizer = optimizer.removeprefix("compiled ")
    arrays = np.load(golden / f"trajectory_{cascade.name}.npz")
    states = {stage.name: original_state(arrays, f"init/{stage.name}/", stage.model) for stage in cascade.stages}
    schema = schema_of(states["rank"])
    stores, models = build_stores(cascade, schema, 8, None), build_models(cascade, schema, 8, 128, 0)
    for stage, model in models.items():
        load(states[stage], stores[stage].to(torch.device("cpu"), torch.float64), model.double())
    command = run_train2 if cascade is TWO_STAGE else run_train3
    loss = command.build_loss(command.parse_args([f"--loss_type={method}", "--data_dir=.", "--output_dir=."]))
    trainer = Trainer(models, stores, loss.double(), lr=0.01, optimizer=optimizer, large_table=0, kernels=kernels)
    log = open_log(golden / "recflow_mini")
    days = [log.open_day(day, cascade, tmp_path) for day in ("2024-01-13", "2024-01-14", "2024-02-04")]
    steps = [day.batch(np.arange(first, first + 32)) for _ in range(5) for day in days[:2] for first in (0, 32)]
    losses = [trainer.step(trainer.prepare(batch))["loss"].item() for batch in steps]

    expected = arrays[f"{method}/loss_per_step"].sum(axis=1)
    if method == "icc":  # chaotic: its 1e-3-wide cut amplifies rounding, so only the first steps are comparable
        np.testing.assert_allclose(losses[:3], expected[:3], rtol=1e-6)
        return
    np.testing.assert_allclose(losses, expected, rtol=1e-8 if optimizer == "adam" else 1e-6)
    trainer.flush()  # brings deferred tables up to date
    test_day = trainer.prepare.rows(days[2].batch(np.arange(len(days[2]))))
    for stage, model in models.items():
        scores = model(stores[stage].embed(test_day.features)).detach().numpy()
        wanted = arrays[f"{method}/test_logits/{stage}"]
        assert np.linalg.norm(scores - wanted) <= 1e-6 * np.linalg.norm(wanted), stage


def test_names_map_back_and_forth() -> None:
    stores = build_stores(THREE_STAGE, RECFLOW, 2, None)
    models = build_models(THREE_STAGE, RECFLOW, 2, 4, 0)
    for stage in THREE_STAGE.stages:
        tables = {f"embedding.{name}": table.detach() for name, table in stores[stage.name].tables.items()}
        state = tables | models[stage.name].state_dict()
        original = to_original(stage.model, state)
        assert len(original) == len(state)
        assert from_original(stage.model, original).keys() == state.keys()
