"""What a GPU computes equals what the CPU computes. Skipped where there is none."""

import numpy as np
import pytest
import torch

from deep_components import run_train2, run_train3
from deep_components.batch import CascadeBatch, Targets
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade
from deep_components.models import build_models
from deep_components.tables.embedding import ID_FIELDS
from deep_components.training.step import Trainer
from tests.models.test_models import random_features

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

METHODS = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting"]


def batch_of(cascade: Cascade, requests: int) -> CascadeBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (requests, cascade.num_items)
    return CascadeBatch(
        request_id=torch.arange(requests),
        features=random_features(requests, cascade.num_items, length=50),
        targets=Targets(
            labels=torch.stack([torch.randperm(cascade.num_items, generator=generator) for _ in range(requests)]),
            mask=torch.rand(shape, generator=generator) < 0.9,
            group=torch.arange(cascade.num_items) // cascade.group_size,
        ),
    )


def trainer_on(device: str, cascade: Cascade, method: str) -> Trainer:
    models = build_models(cascade, dict.fromkeys(ID_FIELDS, 20), emb_dim=8, nn_units=16, seed=0)
    command = run_train2 if cascade is TWO_STAGE else run_train3
    loss = command.build_loss(command.parse_args([f"--loss_type={method}", "--data_dir=.", "--output_dir=."]))
    for module in (*models.values(), loss):
        module.to(device=device, dtype=torch.float64)
    return Trainer(models, loss, lr=0.01)


@pytest.mark.parametrize("cascade", [TWO_STAGE, THREE_STAGE], ids=lambda cascade: cascade.name)
@pytest.mark.parametrize("method", METHODS)
def test_training_steps_are_those_of_the_cpu(cascade: Cascade, method: str) -> None:
    batch = batch_of(cascade, requests=6)
    on_cpu, on_gpu = trainer_on("cpu", cascade, method), trainer_on("cuda", cascade, method)
    for _ in range(3):
        expected = on_cpu.step(batch)["loss"].item()
        found = on_gpu.step(batch.pin_memory().to(torch.device("cuda")))["loss"].item()
        assert found == pytest.approx(expected, rel=1e-6 if method != "icc" else 1e-3)


def test_a_saved_state_goes_on_as_before() -> None:
    batch = batch_of(TWO_STAGE, requests=4).to(torch.device("cuda"))
    first, second = (trainer_on("cuda", TWO_STAGE, "lcron") for _ in range(2))
    first.step(batch)
    second.restore({name: value.cpu() for name, value in first.state().items()})
    losses = [np.array([trainer.step(batch)["loss"].item() for _ in range(3)]) for trainer in (first, second)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
