"""What a GPU computes equals what the CPU computes. Skipped where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deep_components import run_test2, run_train2, run_train3
from deep_components.batch import CascadeBatch, Features
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade
from deep_components.files import read_json
from deep_components.loss.selection import SELECTION_OPERATORS, TEMPERATURES
from deep_components.models import build_models
from deep_components.tables.store import build_stores
from deep_components.training.step import Trainer
from tests.helpers import DAYS, train
from tests.schemas import RECFLOW, random_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

METHODS = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting"]
WITH_OPERATORS = [
    f"{method} --topk_op={name}" for method in ("arf_v2", "lcron") for name in ("soft_sort", *TEMPERATURES)
]


def batch_of(cascade: Cascade, requests: int) -> CascadeBatch[Features]:
    batch = random_batch(RECFLOW, requests, cascade.num_items, length=50)
    group = torch.from_numpy(cascade.group_of_item).expand(requests, -1)
    return replace(batch, targets=replace(batch.targets, group=group))


def trainer_on(device: str, cascade: Cascade, method: str, large_table: int = 1 << 20, host: bool = False) -> Trainer:
    stores = build_stores(cascade, RECFLOW, 8, seed=0)
    models = build_models(cascade, RECFLOW, emb_dim=8, nn_units=16, seed=0)
    command = run_train2 if cascade is TWO_STAGE else run_train3
    name, *options = method.split()
    loss = command.build_loss(command.parse_args([f"--loss_type={name}", *options, "--data_dir=.", "--output_dir=."]))
    for module in (*models.values(), loss):
        module.to(device=device, dtype=torch.float64)
    for store in stores.values():
        store.to(torch.device(device), torch.float64, host=list(store.tables) if host else ())
    return Trainer(models, stores, loss, lr=0.01, large_table=large_table)


@pytest.mark.parametrize("cascade", [TWO_STAGE, THREE_STAGE], ids=lambda cascade: cascade.name)
@pytest.mark.parametrize("method", METHODS + WITH_OPERATORS)
@pytest.mark.parametrize("large_table", [1 << 20, 0], ids=["dense", "deferred"])
def test_training_steps_are_those_of_the_cpu(cascade: Cascade, method: str, large_table: int) -> None:
    batch = batch_of(cascade, requests=6)
    on_cpu, on_gpu = (trainer_on(device, cascade, method, large_table) for device in ("cpu", "cuda"))
    for _ in range(3):
        expected = on_cpu.step(on_cpu.prepare(batch))["loss"].item()
        found = on_gpu.step(on_gpu.prepare(batch).pin_memory().to(torch.device("cuda")))["loss"].item()
        assert found == pytest.approx(expected, rel=1e-6 if method != "icc" else 1e-3)


@pytest.mark.parametrize("name", SELECTION_OPERATORS)
@pytest.mark.parametrize("cuts", [[4, 4, 4], [1, 3, 30]], ids=["one cut", "a cut each"])
@pytest.mark.parametrize("share", [1.0, 0.7], ids=["complete", "items missing"])
def test_selections_are_those_of_the_cpu(name: str, cuts: list[int], share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(3, 20, generator=generator, dtype=torch.float64) * 4).round() / 2  # some are tied
    mask, results = torch.rand(3, 20, generator=generator) < share, []
    for device in ("cpu", "cuda"):
        leaf = scores.to(device).requires_grad_()
        chosen = SELECTION_OPERATORS[name](leaf, mask.to(device), torch.tensor(cuts, device=device), 1.0)
        parts = torch.stack([chosen.top, chosen.rest, *chosen.logs()])
        (parts * torch.arange(20, device=device)).sum().backward()
        assert leaf.grad is not None
        results.append((parts.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_tables_in_host_memory_take_rows_that_lie_on_the_device() -> None:
    """As with --table_memory=host and --day_on_device."""
    batch = batch_of(TWO_STAGE, requests=6)
    on_cpu = trainer_on("cpu", TWO_STAGE, "lcron", large_table=0)
    on_gpu = trainer_on("cuda", TWO_STAGE, "lcron", large_table=0, host=True)
    resident = on_gpu.prepare.rows(batch).to(torch.device("cuda"))
    for _ in range(20):
        expected = on_cpu.step(on_cpu.prepare(batch))["loss"].item()
        assert on_gpu.step(on_gpu.prepare.slots(resident))["loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("where", [(), ("--table_memory=host",)], ids=["on the device", "in host memory"])
def test_a_validation_measures_what_a_test_does(where: tuple[str, ...], log: Path, tmp_path: Path) -> None:
    rows = ("--compact_from=1", "--pull_from=1")
    run = train(log, tmp_path, "--cuda=0", "--validate_every=1", "--keep=best", *rows, *where)
    run_test2.main([f"--data_dir={log}", f"--output_dir={run}", "--cuda=0", f"--test_day={DAYS[1]}"])
    best = read_json(run / "training.json")["validation"]["best_joint_recall"]
    assert read_json(run / "metrics.json")["joint_recall@10@20"] == pytest.approx(best, abs=1e-3)


def test_a_saved_state_goes_on_as_before() -> None:
    first, second = (trainer_on("cuda", TWO_STAGE, "lcron", large_table=0) for _ in range(2))
    batch = first.prepare(batch_of(TWO_STAGE, requests=4)).to(torch.device("cuda"))
    first.step(batch)
    second.restore({name: value.cpu() for name, value in first.state().items()})
    losses = [np.array([trainer.step(batch)["loss"].item() for _ in range(3)]) for trainer in (first, second)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
