"""--num_random_items and --test_random_items: every method learns from random items, and runs with them stay apart."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from deep_components import run_train2, run_train3
from deep_components.batch import CascadeBatch, Targets
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade, Group, Stage
from deep_components.cli import run_command
from deep_components.dataset.log import open_log
from deep_components.dataset.random_items import with_items_of_batch
from deep_components.errors import InputError
from deep_components.models import build_models
from deep_components.reporting.frame import comparable_rows, frame
from deep_components.tables.store import build_stores
from deep_components.training.step import Trainer
from tests.helpers import (
    DAYS,
    config,
    contents,
    evaluate,
    logged_steps,
    same_parameters,
    train,
    training_arguments,
)
from tests.test_own_cascade import METHODS

COMMANDS = {"two_stage": (run_train2, TWO_STAGE), "three_stage": (run_train3, THREE_STAGE)}
FILES = ("retrieval.safetensors", "rank.safetensors", "training_state.safetensors")


@pytest.mark.parametrize("setting", COMMANDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_that_random_items_are_worst(method: str, setting: str, log: Path) -> None:
    command, cascade = COMMANDS[setting]
    flags = [f"--loss_type={method}", "--num_random_items=30", "--data_dir=D", "--output_dir=O"]
    loss = command.build_loss(command.parse_args(flags))
    day, requests = open_log(log).open_day(DAYS[0], cascade), np.arange(12)
    batch = with_items_of_batch(day.batch(requests), day, requests, requests, 30, len(cascade.groups), seed=30, epoch=0)
    models, stores = build_models(cascade, day.schema, 4, 16, seed=1), build_stores(cascade, day.schema, 4, seed=1)
    trainer = Trainer(models, stores, loss, lr=0.01)
    values = trainer.step(trainer.prepare(batch))
    assert all(value.isfinite() for value in values.values())
    assert all(values[f"gradient_norm.{stage}"] > 0 for stage in cascade.stage_names)
    # The first stage's scores of all items near one another: the loss falls with those of the random items.
    generator = torch.Generator().manual_seed(0)
    shape = batch.targets.mask.shape
    scores = {name: (0.1 * torch.randn(shape, generator=generator)).requires_grad_() for name in cascade.stage_names}
    loss(scores, batch.targets)["loss"].backward()
    gradient = scores["retrieval"].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[:, cascade.num_items :].sum() > 0


@pytest.mark.parametrize("setting", COMMANDS)
def test_bce_shows_them_to_the_first_stage_alone(setting: str) -> None:
    command, cascade = COMMANDS[setting]
    words = ["--loss_type=bce", "--data_dir=D", "--output_dir=O"]
    loss = command.build_loss(command.parse_args([*words, "--num_random_items=3"]))
    count, groups = cascade.num_items + 3, len(cascade.groups)
    group = torch.cat([torch.from_numpy(cascade.group_of_item), torch.full((3,), groups)]).unsqueeze(0)
    targets = Targets(groups - group, torch.ones(1, count, dtype=torch.bool), group)
    scores = {stage: torch.zeros(1, count, requires_grad=True) for stage in cascade.stage_names}
    loss(scores, targets)["loss"].backward()
    for stage, values in scores.items():
        assert values.grad is not None
        assert (values.grad[:, -3:] != 0).all() == (stage == "retrieval")
    assert command.build_loss(command.parse_args(words)).exposed_groups == cascade.exposed_groups


def test_a_first_stage_that_saw_few_groups_is_refused() -> None:
    stages = (Stage("recall", 3, "dssm", exposed_groups=1), Stage("fine", 2, "din"))
    cascade = Cascade(stages, (Group("clicked"), Group("shown")))
    assert cascade.seen_groups(None) == cascade.exposed_groups == {"recall": 1, "fine": 2}
    with pytest.raises(InputError, match=r"first stage, recall, has exposed_groups=1.*--num_random_items"):
        cascade.seen_groups(5)


def test_none_are_the_same_run(log: Path, tmp_path: Path) -> None:
    usual, zero = train(log, tmp_path / "usual"), train(log, tmp_path / "zero", "--num_random_items=0")
    assert contents(usual, *FILES) == contents(zero, *FILES)
    assert config(zero)["arguments"]["num_random_items"] is None
    train(log, usual, "--num_random_items=0", "--resume")


@pytest.fixture(scope="module")
def with_random(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(log, tmp_path_factory.mktemp("random"), "--num_random_items=25", "--epochs=2")


def test_the_same_bytes_stopped_and_resumed_and_on_the_device(log: Path, with_random: Path, tmp_path: Path) -> None:
    flags = ("--num_random_items=25", "--epochs=2")
    step, made = Trainer.step, 0

    def stops(self: Trainer, batch: CascadeBatch) -> dict[str, torch.Tensor]:
        nonlocal made
        made += 1
        if made in (2, 6):
            raise KeyboardInterrupt
        return step(self, batch)

    with mock.patch.object(Trainer, "step", stops):
        for more in ((), ("--resume", "--day_on_device")):
            arguments = training_arguments(log, tmp_path, *flags, "--save_minutes=1e-9", *more)
            assert run_command(run_train2.main, arguments) == 130
    train(log, tmp_path, *flags, "--resume")
    assert contents(tmp_path, *FILES) == contents(with_random, *FILES)
    assert logged_steps(tmp_path) == logged_steps(with_random)


def test_another_number_is_another_run(log: Path, with_random: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--resume: .* num_random_items=25, not 24"):
        train(log, with_random, "--num_random_items=24", "--epochs=2", "--resume")
    other = train(log, tmp_path, "--epochs=2")
    assert not same_parameters(with_random, other)
    assert logged_steps(with_random)[0]["loss"] != logged_steps(other)[0]["loss"]


# ---- in the evaluation -----------------------------------------------------------------------------------------------


def test_an_evaluation_with_random_items(log: Path, with_random: Path) -> None:
    alone = evaluate(log, with_random, "--save_scores")
    scores = dict(np.load(with_random / "scores.npz"))
    results = evaluate(log, with_random, "--test_random_items=70", "--save_scores")
    more = dict(np.load(with_random / "scores.npz"))
    own, there = TWO_STAGE.num_items, slice(TWO_STAGE.num_items, None)
    assert "test_random_items" not in alone
    assert results["test_random_items"] == 70
    assert results.keys() == alone.keys() | {"test_random_items"}  # metrics are named as before
    assert more["rank"].shape == (len(scores["rank"]), own + 70)
    for name in ("retrieval", "rank", "mask", "group"):
        np.testing.assert_allclose(more[name][:, :own], scores[name], rtol=1e-5, atol=1e-6)
    assert (more["group"][:, there] == len(TWO_STAGE.groups)).all()  # so none of them is ground truth
    assert (more["labels"][:, there] == 0).all()
    np.testing.assert_array_equal(more["labels"][:, :own], scores["labels"] + 1)
    joint = []
    for retrieval, rank in zip(more["retrieval"], more["rank"], strict=True):
        recalled = np.argsort(-retrieval)[:30]
        joint.append((recalled[np.argsort(-rank[recalled])[:20]] < 10).sum() / 10)
    assert results["joint_recall@10@20"] == pytest.approx(np.mean(joint), abs=1e-12)
    assert results["joint_recall@10@20"] < alone["joint_recall@10@20"]
    smaller = evaluate(log, with_random, "--test_random_items=70", "--batch_size=7")
    for name, value in results.items():
        assert smaller[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)


def test_runs_of_different_numbers_stand_in_no_table_together(log: Path, tmp_path: Path) -> None:
    for seed, items in ((30, 0), (31, 5)):
        run = train(log, tmp_path / str(seed), f"--seed={seed}", "--epochs=0")
        evaluate(log, run, f"--test_random_items={items}")
    runs = frame(tmp_path)
    assert sorted(runs["test_random_items"]) == [0, 5]
    with pytest.raises(InputError, match="the runs differ in test_random_items"):
        comparable_rows(runs)
