"""What TensorBoard shows of a training: every step once, also of one that was interrupted and resumed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deep_components import run_train2
from deep_components.cli import run_command
from deep_components.dataset.log import open_log
from deep_components.tables.lookup import TableLookup
from deep_components.training.step import Trainer
from deep_components.training.tensorboard import scalar_log
from tests.helpers import BATCH_SIZE, STAGES, logged_steps, train, training_arguments
from tests.training.test_loop import DAYS, TWO_STAGE, fresh


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard reads them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) in train.jsonl, as float32, which TensorBoard keeps."""
    return [(step["step"], float(np.float32(step[name]))) for step in logged_steps(run)]


def test_the_scalars_are_those_of_the_step_log(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--tensorboard", "--print_freq=3")
    found = curves(run)
    names = {"end_to_end": "term/end_to_end", **{stage: f"term/{stage}" for stage in STAGES}, "loss": "loss"}
    names |= {f"weight.{stage}": f"weight/{stage}" for stage in STAGES}
    names |= {f"gradient_norm.{stage}": f"gradient_norm/{stage}" for stage in STAGES}
    assert set(found) == {*names.values(), "requests_per_second"}
    for name, tag in names.items():
        assert found[tag] == logged(run, name)
    seconds = [json.loads(line)["seconds"] for line in (run / "train.jsonl").read_text().splitlines()]
    speeds = [speed for _, speed in found["requests_per_second"]]
    assert speeds == pytest.approx([BATCH_SIZE / second for second in seconds], rel=1e-5)


def test_the_metrics_of_a_validation(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--tensorboard", "--validate_every=1")
    name = "joint_recall@10@20"
    assert curves(run)[f"validation/{name}"] == logged(run, f"validation.{name}") != []


@pytest.mark.parametrize("stopped_in", [3, 4])
def test_a_resumed_training_continues_its_curves(
    stopped_in: int, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second day, whose first step is made, and written, twice."""
    arguments = training_arguments(log, tmp_path / "run", "--tensorboard", "--print_freq=1")
    step, made = Trainer.step, 0

    def interrupted(self: Trainer, batch: object) -> object:
        nonlocal made
        made += 1
        if made == stopped_in:
            raise KeyboardInterrupt
        return step(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        assert run_command(run_train2.main, arguments) == 130
    assert [step for step, _ in curves(tmp_path / "run")["loss"]] == list(range(1, stopped_in))
    run_train2.main([*arguments, "--resume"])
    whole = train(log, tmp_path / "whole", "--tensorboard")
    for tag, values in curves(tmp_path / "run").items():
        assert [step for step, _ in values] == [1, 2, 3, 4], tag
        if tag != "requests_per_second":
            assert values == curves(whole)[tag]


def test_a_training_that_starts_again_leaves_no_old_curves(log: Path, tmp_path: Path) -> None:
    train(log, tmp_path, "--tensorboard", "--epochs=2")
    train(log, tmp_path, "--tensorboard", "--lr=0.02")
    assert curves(tmp_path)["loss"] == logged(tmp_path, "loss")
    train(log, tmp_path)
    assert list((tmp_path / "tensorboard").iterdir()) == []


def test_values_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    with scalar_log(tmp_path, wanted=True, batch_size=8, steps_made=0) as scalars:
        assert scalars is not None
        for step, loss in ((1, 0.5), (2, None), (3, 0.25)):
            other = {"day": "2024-01-13", "rank": 1.0, "seconds": 2.0, "skipped": True, "data": "simulated"}
            scalars.add({"step": step, "loss": loss, **other})
    found = curves(tmp_path)
    assert found["loss"] == [(1, 0.5), (3, 0.25)]
    assert set(found) == {"loss", "term/rank", "requests_per_second"}


def test_an_untrained_cascade_has_no_curve(log: Path, tmp_path: Path) -> None:
    assert curves(train(log, tmp_path, "--tensorboard", "--epochs=0")) == {}


def test_it_costs_nothing_when_not_asked_for() -> None:
    script = "import sys, deep_components.run_train2; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


def test_without_the_package(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_command(run_train2.main, training_arguments(log, tmp_path / "run", "--tensorboard")) == 2
    error = capsys.readouterr().err
    assert "--tensorboard: the package tensorboard is missing" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    with scalar_log(tmp_path, wanted=False, batch_size=1, steps_made=0) as scalars:
        assert scalars is None


# ---- gradient norms --------------------------------------------------------------------------------------------------


def test_gradient_norms_of_all_optimizers_are_those_of_the_dense_gradient(log: Path) -> None:
    batch = open_log(log).open_day(DAYS[0], TWO_STAGE, history_length=5).batch(np.arange(10))
    models, stores, loss = fresh(log)
    whole = TableLookup(open_log(log).schema, {}, {})(batch)
    scores = {stage: model(stores[stage].embed(whole.features)) for stage, model in models.items()}
    loss(scores, batch.targets)["loss"].backward()
    expected = []
    for stage, model in models.items():
        parameters = [*stores[stage].tables.values(), *model.parameters()]
        expected.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())
    for optimizer in ("adam", "deferred_adam", "sparse_adam"):
        trainer = Trainer(*fresh(log), lr=0.01, optimizer=optimizer, large_table=0)
        terms = trainer.step(trainer.prepare(batch))
        found = [terms[f"gradient_norm.{stage}"].item() for stage in STAGES]
        assert found == pytest.approx(expected, rel=1e-9), optimizer
