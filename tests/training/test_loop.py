"""Training: reproducible to the byte, resumable, every flag takes effect, Adam with dense semantics."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deep_components import run_train2
from deep_components.arguments import METHOD_OPTIONS, hyper_parameters, recorded_arguments, training_parser
from deep_components.batch import CascadeBatch
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.commands import export_checkpoint
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.loader import batches
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.files import as_json, write_json
from deep_components.loss.lcron import LCRON
from deep_components.models import build_models
from deep_components.runs.folder import STATE_FILE
from deep_components.runs.state import load_state, save_state
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore, build_stores
from deep_components.training import memory
from deep_components.training.step import Trainer
from tests.helpers import (
    BATCH_SIZE,
    DAYS,
    REQUESTS_PER_DAY,
    STAGES,
    config,
    contents,
    evaluate,
    leftovers,
    logged_steps,
    parameters,
    same_parameters,
    small_log,
    train,
    training_arguments,
)

MODEL_FILES = tuple(f"{stage}.safetensors" for stage in STAGES)
STEPS_PER_DAY = REQUESTS_PER_DAY // BATCH_SIZE


@pytest.fixture(scope="session")
def other_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory, seed=1)


@pytest.fixture(scope="session")
def baseline(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the small defaults."""
    return train(log, tmp_path_factory.mktemp("baseline"))


def assert_trained_alike(one: Path, other: Path) -> None:
    """The same parameters, losses and further course."""
    assert logged_steps(one) == logged_steps(other)
    assert same_parameters(one, other)
    ours, theirs = load_file(one / STATE_FILE), load_file(other / STATE_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes training stop as by Ctrl-C in the given step, counted from 1; 0 lets it go on."""
    step, made = Trainer.step, 0

    def stop_in(number: int) -> None:
        nonlocal made
        made = 0

        def counted(self: Trainer, batch: CascadeBatch) -> dict[str, Tensor]:
            nonlocal made
            made += 1
            if made == number:
                raise KeyboardInterrupt
            return step(self, batch)

        monkeypatch.setattr(Trainer, "step", counted)

    yield stop_in


# ---- reproducible ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(log: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)  # whatever the process did before
    first = train(log, tmp_path / "first")
    torch.manual_seed(2)
    second = train(log, tmp_path / "second", f"--cache_dir={tmp_path / 'cold cache'}")
    for run in (first, second):
        evaluate(log, run, "--save_scores")
    names = (*MODEL_FILES, STATE_FILE, "metrics.json", "scores.npz")
    assert contents(first, *names) == contents(second, *names)
    assert logged_steps(first) == logged_steps(second)


def test_the_log_s_content_stands_in_the_records_wherever_it_lies(log: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(log, copied)
    run, other = train(log, tmp_path / "run", f"--cache_dir={tmp_path}"), train(copied, tmp_path / "other")
    checksums = config(run)["data_checksums"]
    assert checksums == config(other)["data_checksums"]
    assert list(checksums) == list(DAYS[:2]) and len(set(checksums.values())) == 2
    assert evaluate(log, run)["test_day_checksum"] not in checksums.values()


def test_what_the_training_took_is_written_when_it_is_complete(log: Path, tmp_path: Path) -> None:
    cost = json.loads((train(log, tmp_path) / "training.json").read_text())
    assert cost["steps"] == len(logged_steps(tmp_path)) and cost["requests"] == cost["steps"] * BATCH_SIZE
    assert cost["seconds"] > 0 and cost["device"] == "cpu" and cost["peak_gpu_memory_bytes"] is None
    assert 50e6 < cost["peak_memory_bytes"] < 50e9


def test_another_seed_gives_another_initial_cascade_and_another_order(log: Path, tmp_path: Path) -> None:
    runs = [train(log, tmp_path / f"{seed}", f"--seed={seed}", "--epochs=0") for seed in (30, 31)]
    ours, theirs = (parameters(run) for run in runs)
    assert all(not np.array_equal(ours[name], theirs[name]) for name in ours)
    one, two = (
        train(log, tmp_path / f"from 30 by {seed}", f"--seed={seed}", f"--init_from={runs[0]}") for seed in (30, 31)
    )
    assert logged_steps(one)[0]["loss"] != logged_steps(two)[0]["loss"]


def test_each_epoch_has_its_own_order(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--epochs=2", "--lr=1e-30")  # nothing is learned, so the loss tells the batch
    losses = [step["loss"] for step in logged_steps(run)]
    assert losses[: len(losses) // 2] != losses[len(losses) // 2 :]


# ---- resumed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_epochs(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(log, tmp_path_factory.mktemp("two-epochs"), "--epochs=2")


@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_resumed_after_an_interruption(
    step: int, log: Path, two_epochs: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    arguments = training_arguments(log, tmp_path, "--epochs=2", "--print_freq=1")
    interrupt(step)
    assert run_command(run_train2.main, arguments) == 130
    assert len(logged_steps(tmp_path)) == step - 1  # steps of the broken day are made again and must not stand twice
    assert not (tmp_path / MODEL_FILES[0]).exists()
    interrupt(0)
    assert run_command(run_train2.main, [*arguments, "--resume"]) == 0
    assert_trained_alike(tmp_path, two_epochs)
    assert [record["step"] for record in logged_steps(tmp_path)] == list(range(1, 4 * STEPS_PER_DAY + 1))
    assert leftovers(tmp_path) == []


def test_more_epochs(log: Path, two_epochs: Path, tmp_path: Path) -> None:
    train(log, tmp_path, "--epochs=1")
    train(log, tmp_path, "--epochs=2", "--resume")
    assert_trained_alike(tmp_path, two_epochs)


def test_more_days(log: Path, baseline: Path, tmp_path: Path) -> None:
    train(log, tmp_path, f"--train_days={DAYS[0]}")
    train(log, tmp_path, f"--train_days={DAYS[0]},{DAYS[1]}", "--resume")
    assert config(tmp_path)["train_days"] == list(DAYS[:2])
    assert_trained_alike(tmp_path, baseline)


def test_a_finished_run_resumed_stays_as_it_is(log: Path, baseline: Path, tmp_path: Path) -> None:
    train(log, tmp_path)
    train(log, tmp_path, "--resume")
    assert_trained_alike(tmp_path, baseline)


@pytest.mark.parametrize("epochs", [0, 1])
def test_fewer_epochs_are_refused(epochs: int, log: Path, tmp_path: Path) -> None:
    train(log, tmp_path, "--epochs=2")
    before = config(tmp_path)
    with pytest.raises(InputError, match="--resume"):
        train(log, tmp_path, f"--epochs={epochs}", "--resume")
    assert config(tmp_path) == before


def test_resuming_removes_the_results_of_the_shorter_run(log: Path, tmp_path: Path) -> None:
    train(log, tmp_path, "--epochs=1")
    evaluate(log, tmp_path, "--save_scores")
    train(log, tmp_path, "--epochs=2", "--resume")
    assert not any((tmp_path / name).exists() for name in ("metrics.json", "scores.npz", "per_request.npz"))


@pytest.mark.parametrize(
    "flag",
    [
        *("--seed=31", "--lr=0.02", "--batch_size=8", "--emb_dim=8", "--nn_units=32", "--seq_len=6", "--tau=20"),
        *("--dtype=float64", "--no-shuffle", "--time_zone=UTC", "--sort=soft_sort", f"--train_days={DAYS[1]}"),
    ],
)
def test_resuming_with_other_arguments_is_refused(flag: str, log: Path, baseline: Path) -> None:
    names = (*MODEL_FILES, STATE_FILE, "config.json", "train.jsonl")
    before = contents(baseline, *names)
    with pytest.raises(InputError, match="--resume"):
        train(log, baseline, flag, "--resume")
    assert contents(baseline, *names) == before


def test_resuming_on_other_data_is_refused(baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match=r"--resume: .* another schema"):
        train(small_log(tmp_path_factory, users=31), baseline, "--resume")


def test_resuming_on_days_of_other_content_is_refused(other_log: Path, log: Path, baseline: Path) -> None:
    """The same counts of ids, but other requests."""
    assert open_log(other_log).schema == open_log(log).schema
    with pytest.raises(InputError, match=rf"--resume: .* another day {DAYS[0]};"):
        train(other_log, baseline, "--resume")


@pytest.mark.parametrize("missing", ["config.json", STATE_FILE])
def test_a_complete_run_that_lacks_a_file_is_not_resumed(missing: str, log: Path, tmp_path: Path) -> None:
    train(log, tmp_path)
    (tmp_path / missing).unlink()
    before = contents(tmp_path, *MODEL_FILES, "training.json")
    with pytest.raises(InputError, match=missing):
        train(log, tmp_path, "--resume")
    assert contents(tmp_path, *MODEL_FILES, "training.json") == before


def test_resumed_though_interrupted_before_the_first_save(
    log: Path, baseline: Path, tmp_path: Path, interrupt: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(2)
    assert run_command(run_train2.main, training_arguments(log, tmp_path)) == 130
    interrupt(0)
    with pytest.raises(InputError, match=r"--resume: .* seed=30, not 31"):
        train(log, tmp_path, "--resume", "--seed=31")
    with caplog.at_level("INFO"):
        train(log, tmp_path, "--resume")
    assert "holds no saved state; training starts at the beginning" in caplog.text
    assert_trained_alike(tmp_path, baseline)
    assert_trained_alike(train(log, tmp_path / "empty", "--resume"), baseline)  # from the first time on


def test_a_damaged_state(log: Path, tmp_path: Path) -> None:
    train(log, tmp_path)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        train(log, tmp_path, "--resume")


@pytest.mark.parametrize(
    "forged", [{"epoch": 1, "step": 8}, {"day": 7}, {"day": 1}, {"batch": 1}, {"batch": 99, "step": 103}, {"step": 3}]
)
def test_a_position_that_the_training_cannot_have_reached(forged: dict[str, int], log: Path, tmp_path: Path) -> None:
    """Steps would be left out, or made twice, without a word."""
    train(log, tmp_path)
    arrays, position = load_state(tmp_path / STATE_FILE)
    assert position == {"epoch": 0, "day": 2, "batch": 0, "step": 4, "skipped": 0}
    save_state(tmp_path / STATE_FILE, arrays, position | forged)
    with pytest.raises(InputError, match=f"{STATE_FILE}: its position, .* is none of this training"):
        train(log, tmp_path, "--resume")
    save_state(tmp_path / STATE_FILE, arrays, position)
    train(log, tmp_path, "--resume")


def test_files_of_another_run(log: Path, tmp_path: Path) -> None:
    """Those of another seed, copied over a run's own, are neither evaluated, exported, nor gone on with."""
    own, other = (train(log, tmp_path / str(seed), f"--seed={seed}") for seed in (30, 31))
    state = (own / STATE_FILE).read_bytes()
    shutil.copy(other / STATE_FILE, own)
    said = "is of another run than the config.json beside it, which differs in seed"
    with pytest.raises(InputError, match=f"{STATE_FILE}: {said}"):
        train(log, own, "--resume", "--seed=30", "--epochs=2")
    (own / STATE_FILE).write_bytes(state)
    shutil.copy(other / "rank.safetensors", own)
    with pytest.raises(InputError, match=f"rank.safetensors: {said}"):
        evaluate(log, own)
    with pytest.raises(InputError, match=f"rank.safetensors: {said}"):
        export_checkpoint.main([f"--run={own}", f"--output_dir={tmp_path / 'exported'}"])
    assert not (tmp_path / "exported").exists()
    train(log, tmp_path / "child", f"--init_from={own}")  # models are taken from anywhere


def test_resumed_after_it_was_killed_before_the_first_save_of_more_passes(
    log: Path, two_epochs: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    """config.json names two passes then, the state beside it is of one."""
    train(log, tmp_path)
    state = (tmp_path / STATE_FILE).read_bytes()
    interrupt(1)
    assert run_command(run_train2.main, training_arguments(log, tmp_path, "--epochs=2", "--resume")) == 130
    (tmp_path / STATE_FILE).write_bytes(state)
    interrupt(0)
    train(log, tmp_path, "--epochs=2", "--resume")
    assert_trained_alike(tmp_path, two_epochs)


def test_an_untrained_cascade_too_large_for_the_memory(log: Path, tmp_path: Path) -> None:
    for flags in (["--nn_units=1048576"], ["--nn_units=1048576", "--epochs=0"]):
        with pytest.raises(InputError, match=r"the training needs about .* of memory"):
            train(log, tmp_path / "run", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_step_log_does_not_hinder(
    log: Path, baseline: Path, tmp_path: Path, interrupt: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing but curves and times is taken from it."""
    interrupt(4)
    assert run_command(run_train2.main, training_arguments(log, tmp_path)) == 130
    path = tmp_path / "train.jsonl"
    content = bytearray(path.read_bytes())
    content[3] ^= 128
    path.write_bytes(content)
    interrupt(0)
    train(log, tmp_path, "--resume")
    assert same_parameters(tmp_path, baseline)
    assert "train.jsonl: 1 of 2 steps are damaged or missing" in caplog.text
    assert logged_steps(tmp_path) == logged_steps(baseline)[1:]


# ---- started again, or from another run ------------------------------------------------------------------------------


def test_epochs_0_writes_the_untrained_cascade(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--epochs=0", "--seed=5")
    schema = open_log(log).schema
    models, stores = build_models(TWO_STAGE, schema, 4, 16, seed=5), build_stores(TWO_STAGE, schema, 4, seed=5)
    for stage, model in models.items():
        expected = {f"embedding.{table}": values for table, values in stores[stage].tables.items()} | model.state_dict()
        written = load_file(run / f"{stage}.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert logged_steps(run) == []
    assert config(run)["arguments"]["epochs"] == 0
    cost = json.loads((run / "training.json").read_text())
    assert (cost["steps"], cost["seconds"]) == (0, 0.0) and isinstance(cost["seconds"], float)


def test_a_run_that_starts_again_removes_old_results_first(
    log: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    train(log, tmp_path)
    evaluate(log, tmp_path, "--save_scores")
    interrupt(1)
    assert run_command(run_train2.main, training_arguments(log, tmp_path, "--seed=31")) == 130
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json", "train.jsonl"}
    assert logged_steps(tmp_path) == []


def test_init_from(log: Path, baseline: Path, tmp_path: Path) -> None:
    copy = train(log, tmp_path / "copy", f"--init_from={baseline}", "--epochs=0", "--seed=99")
    assert same_parameters(copy, baseline)
    further = train(log, tmp_path / "further", f"--init_from={baseline}")
    assert not same_parameters(further, baseline)
    assert config(further)["arguments"]["init_from"] == str(baseline)


def test_init_from_the_run_itself_is_refused(log: Path, tmp_path: Path) -> None:
    """Its models would be gone before the first new ones are written."""
    train(log, tmp_path)
    before = contents(tmp_path, *MODEL_FILES)
    with pytest.raises(InputError, match=r"--init_from=.* is --output_dir"):
        train(log, tmp_path, f"--init_from={tmp_path / '..' / tmp_path.name}")
    assert contents(tmp_path, *MODEL_FILES) == before


def test_resuming_after_the_models_of_init_from_have_changed(log: Path, tmp_path: Path) -> None:
    """The parent was trained again: another run would go on from this one's state."""
    parent = train(log, tmp_path / "parent", f"--train_days={DAYS[0]}")
    arguments = (f"--init_from={parent}", f"--train_days={DAYS[1]}")
    child = train(log, tmp_path / "child", *arguments)
    train(log, child, *arguments, "--resume")
    train(log, parent, f"--train_days={DAYS[0]}", "--seed=31")
    with pytest.raises(InputError, match=r"--resume: .* other models in --init_from: rank, retrieval"):
        train(log, child, *arguments, "--resume")


def test_init_from_in_float64_is_exact(log: Path, tmp_path: Path) -> None:
    double = train(log, tmp_path / "double", "--dtype=float64")
    copy = train(log, tmp_path / "copy", "--dtype=float64", f"--init_from={double}", "--epochs=0")
    assert same_parameters(copy, double)


def test_init_from_a_folder_without_models(log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        train(log, tmp_path / "run", f"--init_from={tmp_path}")
    assert not (tmp_path / "run").exists()


def test_init_from_models_of_another_size(log: Path, baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--emb_dim"):
        train(log, tmp_path / "run", f"--init_from={baseline}", "--emb_dim=8")


# ---- steps and what is written about them ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [13, 20, 40])
def test_the_partial_batch_of_a_day_is_dropped(batch_size: int, log: Path, tmp_path: Path) -> None:
    steps = logged_steps(train(log, tmp_path, f"--batch_size={batch_size}"))
    whole = REQUESTS_PER_DAY // batch_size
    assert [step["day"] for step in steps] == [DAYS[0]] * whole + [DAYS[1]] * whole
    assert [step["step"] for step in steps] == list(range(1, 2 * whole + 1))


def test_a_day_smaller_than_a_batch(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(run_train2.main, training_arguments(log, tmp_path, "--batch_size=41"))
    assert code == 2
    error = capsys.readouterr().err
    assert f"day {DAYS[0]} has 40 requests, fewer than --batch_size=41" in error
    assert "Traceback" not in error
    assert not any((tmp_path / name).exists() for name in MODEL_FILES)
    assert leftovers(tmp_path) == []


def test_a_refused_run_leaves_the_old_one(log: Path, tmp_path: Path) -> None:
    train(log, tmp_path)
    evaluate(log, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError):
        train(log, tmp_path, "--batch_size=41")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_step_log(baseline: Path) -> None:
    records = [json.loads(line) for line in (baseline / "train.jsonl").read_text().splitlines()]
    assert len(records) == 2 * STEPS_PER_DAY
    terms = {"end_to_end", *STAGES, "weight.retrieval", "weight.rank"}
    norms = {f"gradient_norm.{stage}" for stage in STAGES}
    for record in records:
        assert set(record) == {"step", "day", "loss", "seconds", "data"} | terms | norms
        assert record["seconds"] > 0
        # L = E + sum_i S_i / (2 w_i^2) + log(prod_i w_i)
        expected = record["end_to_end"]
        for stage in STAGES:
            weight = record[f"weight.{stage}"]
            expected += record[stage] / (2 * weight**2) + np.log(weight)
        assert record["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_loss_falls(log: Path, tmp_path: Path) -> None:
    losses = [step["loss"] for step in logged_steps(train(log, tmp_path, "--epochs=6", "--emb_dim=8"))]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1


def test_the_config_holds_every_argument(log: Path, baseline: Path) -> None:
    written = config(baseline)
    args = run_train2.parse_args(training_arguments(log, baseline))
    loss = run_train2.build_loss(args)
    expected = as_json(recorded_arguments(args, loss))
    assert written["arguments"] == expected
    assert (written["setting"], written["cascade"]) == ("two_stage", as_json(TWO_STAGE.to_json()))
    schema = open_log(log).schema
    assert (written["schema"], written["schema_checksum"]) == (schema.to_json(), schema.checksum)
    assert written["loss"] == as_json(hyper_parameters(loss)) and written["loss"]["tau"] == 50
    assert written["train_days"] == list(DAYS[:2])
    assert written["versions"].keys() >= {"python", "torch", "numpy"}
    assert written["versions"]["torch"] == torch.__version__
    assert "commit" in written
    assert written["device"] == "cpu"


def test_the_origin_of_the_data_stands_in_every_file(log: Path, tmp_path: Path) -> None:
    train(log, tmp_path)
    results = evaluate(log, tmp_path, "--save_scores")
    assert config(tmp_path)["data"] == results["data"] == "simulated"
    assert "SIMULATED" in results["warning"]
    assert {step["data"] for step in logged_steps(tmp_path)} == {"simulated"}
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["data"] == "simulated"
    for name in MODEL_FILES:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert "simulated" in str(file.metadata())


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_the_run(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(run_train2.main, training_arguments(log, tmp_path, "--lr=1e30", "--print_freq=1"))
    assert code == 2
    error = capsys.readouterr().err
    assert "lcron, step 2, day 2024-01-13: the loss is nan" in error and "gradient_norm.rank" in error
    assert "--lr" in error
    assert "Traceback" not in error
    assert [step["step"] for step in logged_steps(tmp_path)] == [1]
    assert not any((tmp_path / name).exists() for name in (*MODEL_FILES, STATE_FILE))


class Returning(nn.Module):
    """A loss that returns what ``result`` makes of the sum of all scores."""

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, scores: dict[str, Tensor], targets: Any) -> Any:
        return self.result(torch.stack([values.sum() for values in scores.values()]).sum())


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda total: total, "a Tensor, not a dict"),
        (lambda total: None, "a NoneType, not a dict"),
        (lambda total: {}, "a dict without 'loss', of nothing"),
        (lambda total: {"total": total}, "a dict without 'loss', of total"),
        (lambda total: {"loss": total.expand(3)}, r"'loss' as a tensor of shape \(3,\), not a tensor of one number"),
        (lambda total: {"loss": total, "rank": 0.5}, "'rank' as a float, not a tensor of one number"),
        (lambda total: {"loss": total.detach()}, "a 'loss' that does not depend on the scores"),
    ],
)
def test_a_loss_that_returns_something_else(
    result: Callable[[Tensor], Any],
    text: str,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_train2, "build_loss", lambda args: Returning(result))
    assert run_command(run_train2.main, training_arguments(log, tmp_path)) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(f"the loss Returning returned {text}", message)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_output_folder_is_a_file(log: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError):
        train(log, tmp_path / "file", "--epochs=0")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "flag", ["--train_days=2024-02-01", "--train_days=,", "--time_zone=Nowhere/Land", "--data_dir=x"]
)
def test_refused_before_anything_is_written(flag: str, log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        train(log, tmp_path / "run", flag, f"--cache_dir={tmp_path / 'cache'}")
    assert not (tmp_path / "run").exists()


# ---- every flag takes effect -----------------------------------------------------------------------------------------

# Flags that lead to other parameters when they alone change.
CHANGES_PARAMETERS = {
    "loss_type": "bce",
    "train_days": DAYS[0],
    "seed": "31",
    "lr": "0.02",
    "batch_size": "20",
    "epochs": "2",
    "seq_len": "6",
    "time_zone": "UTC",
    "tau": "20",
    "topk_op": "soft_sort",
    "terms": "end_to_end",
    "single_weight": "2",
    "weighting": "paper",
    "label_ties": "repeated",
    "end_to_end_quotas": "30,20",
    "single_quotas": "30,20",
}
# The others; each has a test of its own, named here.
TESTED_BELOW = {
    "data_dir": "test_flag_data_dir",
    "output_dir": "test_flag_output_dir_and_cache_dir",
    "cache_dir": "test_flag_output_dir_and_cache_dir",
    "emb_dim": "test_flags_of_the_size",
    "nn_units": "test_flags_of_the_size",
    "dtype": "test_flag_dtype",
    "optimizer": "test_flag_optimizer",
    "print_freq": "test_flag_print_freq",
    "tensorboard": "test_flag_tensorboard",
    "shuffle": "test_flag_shuffle",
    "init_from": "test_init_from",
    "resume": "test_resumed_after_an_interruption",
    "any_code": "test_flag_any_code",
    "cuda": "test_flags_of_the_device",
    "device": "test_flags_of_the_device",
    "save_minutes": "test_flag_save_minutes",
    "on_nonfinite": "test_flag_on_nonfinite",
    "compile": "test_flag_compile",
    "compact_from": "test_flag_compact_from",
    "pull_from": "test_flag_pull_from",
    "table_memory": "test_flag_table_memory",
    "day_on_device": "test_flag_day_on_device",
    "autocast": "test_flag_autocast",
}


# In test_validation.py, test_random_items.py and tests/distributed.
ELSEWHERE = {"validate_every", "keep", "patience", "num_random_items", "timeout", "processes", "max_restarts", "engine"}


def test_every_flag_is_tested() -> None:
    shared = {action.dest for action in training_parser("")._actions} - {"help", *ELSEWHERE}
    assert shared | set(METHOD_OPTIONS) == CHANGES_PARAMETERS.keys() | TESTED_BELOW.keys()
    assert all(test in globals() for test in TESTED_BELOW.values())


@pytest.mark.parametrize("flag", CHANGES_PARAMETERS)
def test_flag_changes_the_parameters(flag: str, log: Path, baseline: Path, tmp_path: Path) -> None:
    value = CHANGES_PARAMETERS[flag]
    run = train(log, tmp_path, f"--{flag}={value}")
    assert config(run)["arguments"][flag] != config(baseline)["arguments"].get(flag)
    assert not same_parameters(run, baseline)


def test_flag_data_dir(other_log: Path, baseline: Path, tmp_path: Path) -> None:
    assert not same_parameters(train(other_log, tmp_path), baseline)


def test_flag_output_dir_and_cache_dir(log: Path, baseline: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path / "deep" / "down", f"--cache_dir={tmp_path / 'cache'}", "--epochs=1")
    assert {path.name for path in run.iterdir()} == {path.name for path in baseline.iterdir()}
    assert len(list((tmp_path / "cache").rglob("meta.json"))) == 2  # the days trained on


def test_flags_of_the_size(log: Path, tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in parameters(train(log, tmp_path, "--epochs=0")).items()}
    wider = parameters(train(log, tmp_path, "--epochs=0", "--emb_dim=12"))
    taller = parameters(train(log, tmp_path, "--epochs=0", "--nn_units=24"))
    for stage in STAGES:
        rows = shapes[f"{stage}/embedding.user"][0]
        assert wider[f"{stage}/embedding.user"].shape == (rows, 12)
        assert taller[f"{stage}/embedding.user"].shape == (rows, 4)
    assert wider["rank/tower.0.weight"].shape == (16, 21 * 12)
    assert taller["rank/tower.0.weight"].shape == (24, 21 * 4)


def test_flag_dtype(log: Path, baseline: Path, tmp_path: Path) -> None:
    double, single = parameters(train(log, tmp_path, "--dtype=float64")), parameters(baseline)
    assert {value.dtype for value in double.values()} == {np.dtype(np.float64)}
    assert {value.dtype for value in single.values()} == {np.dtype(np.float32)}
    name = "rank/tower.0.weight"
    assert not np.array_equal(double[name], double[name].astype(np.float32))  # it was computed in float64
    with np.load(evaluated_scores(log, tmp_path)) as scores:
        assert scores["rank"].dtype == np.float64


def evaluated_scores(log: Path, run: Path) -> Path:
    evaluate(log, run, "--save_scores")
    return run / "scores.npz"


def test_flag_shuffle(log: Path, baseline: Path, tmp_path: Path) -> None:
    assert not same_parameters(train(log, tmp_path / "run", "--no-shuffle"), baseline)
    # In file order the same initial models see the same batches, whatever the seed.
    one, two = (
        train(log, tmp_path / f"{seed}", "--no-shuffle", f"--init_from={baseline}", f"--seed={seed}")
        for seed in (30, 31)
    )
    assert logged_steps(one) == logged_steps(two) and same_parameters(one, two)


@pytest.mark.parametrize(("print_freq", "written"), [("1", 3), ("2", 2), ("50", 2)])
def test_flag_print_freq(
    print_freq: str, written: int, log: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    interrupt(4)  # the second step of the second day
    arguments = training_arguments(log, tmp_path, f"--print_freq={print_freq}")
    assert run_command(run_train2.main, arguments) == 130
    assert len(logged_steps(tmp_path)) == written  # reports so far, and the whole first day


def test_flag_tensorboard(log: Path, baseline: Path, tmp_path: Path) -> None:
    """It only watches; what it writes is tested in test_watching.py."""
    watched = train(log, tmp_path, "--tensorboard")
    assert same_parameters(watched, baseline)
    assert logged_steps(watched) == logged_steps(baseline)
    assert (watched / "tensorboard").is_dir() and not (baseline / "tensorboard").exists()


def test_flags_of_the_device(log: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config(baseline)["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for flag in ("--device=cuda", "--device=cuda:1", "--cuda=0"):
        with pytest.raises(InputError, match="CUDA devices here"):
            train(log, tmp_path / "run", flag)
    assert not (tmp_path / "run").exists()


def test_flag_save_minutes(log: Path, baseline: Path, tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    """The state is there before the first day has ended, and training goes on from it within the day."""
    interrupt(2)
    arguments = training_arguments(log, tmp_path)
    assert run_command(run_train2.main, [*arguments, "--save_minutes=0"]) == 130
    assert not (tmp_path / STATE_FILE).exists()
    interrupt(2)
    assert run_command(run_train2.main, [*arguments, "--save_minutes=1e-9"]) == 130
    assert load_state(tmp_path / STATE_FILE)[1] == {"epoch": 0, "day": 0, "batch": 1, "step": 1, "skipped": 0}
    interrupt(0)
    assert run_command(run_train2.main, [*arguments, "--resume"]) == 0
    assert_trained_alike(tmp_path, baseline)


@pytest.mark.filterwarnings("ignore:overflow")
def test_flag_on_nonfinite(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is not finite leaves no trace but its line: the course is that of the other steps."""
    backward, made = torch.Tensor.backward, 0

    def broken_once(self: Tensor) -> None:
        nonlocal made
        made += 1
        backward(self * torch.nan if made == 2 else self)

    monkeypatch.setattr(torch.Tensor, "backward", broken_once)
    train(log, tmp_path / "skip", "--on_nonfinite=skip")
    records = logged_steps(tmp_path / "skip")
    assert [record.get("skipped", False) for record in records] == [False, True, False, False]
    assert records[1]["gradient_norm.rank"] is None and records[2]["loss"] is not None
    assert all(np.isfinite(value).all() for value in parameters(tmp_path / "skip").values())
    made = 0
    with pytest.raises(InputError, match=r"lcron, step 2, day .*gradient_norm\.retrieval.*--on_nonfinite=skip"):
        train(log, tmp_path / "stop")


@pytest.mark.filterwarnings("ignore:overflow")
def test_steps_that_are_left_out_are_counted_and_limited(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[int], None]
) -> None:
    """One may be, or 1 % of all; the count is part of the saved state and of all results."""
    backward, broken = torch.Tensor.backward, [2]
    made = 0

    def some_broken(self: Tensor) -> None:
        nonlocal made
        made += 1
        backward(self * torch.nan if made in broken else self)

    monkeypatch.setattr(torch.Tensor, "backward", some_broken)
    run = tmp_path / "run"
    interrupt(4)
    assert run_command(run_train2.main, training_arguments(log, run, "--on_nonfinite=skip")) == 130
    interrupt(0)
    (run / "train.jsonl").unlink()  # from which nothing but curves is taken
    train(log, run, "--on_nonfinite=skip", "--resume")
    assert evaluate(log, run)["skipped_steps"] == 1
    assert json.loads((run / "training.json").read_text())["skipped_steps"] == 1
    made, broken = 0, [2, 4]
    with pytest.raises(InputError, match=r"step 4, day .* has left out 1 already, and 1 % of all steps is its limit"):
        train(log, tmp_path / "two", "--on_nonfinite=skip")
    assert not (tmp_path / "two" / "training.json").exists()


def test_flag_any_code(log: Path, tmp_path: Path) -> None:
    """A run of other code goes on only deliberately, and its record says so."""
    run = train(log, tmp_path / "run", f"--train_days={DAYS[0]}")
    written, days = config(run), f"--train_days={DAYS[0]},{DAYS[1]}"
    assert written["code"]["files"]["deep_components/training/step.py"]
    assert set(written["code"]["method"]) >= {"deep_components/loss/lcron.py", "deep_components/run_train2.py (lcron)"}
    for part, name in (("files", "deep_components/models/din.py"), ("method", "deep_components/loss/lcron.py")):
        code = written["code"] | {part: written["code"][part] | {name: "other"}}
        write_json(run / "config.json", written | {"code": code})
        with pytest.raises(InputError, match=f"--resume: .* a run of other code: {name}; --any_code goes on"):
            train(log, run, days, "--resume")
    train(log, run, days, "--resume", "--any_code")
    assert config(run)["code"] == written["code"] | {"before": {"deep_components/loss/lcron.py": "other"}}
    train(log, run, days, "--resume")
    assert config(run)["code"]["before"] == {"deep_components/loss/lcron.py": "other"}


def test_flag_compile(log: Path, baseline: Path, tmp_path: Path) -> None:
    plain = train(log, tmp_path, "--no-compile")
    assert (config(plain)["kernels"], config(baseline)["kernels"]) == ("pytorch", "compiled")
    for ours, theirs in zip(logged_steps(plain), logged_steps(baseline), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["deferred_adam", "adam", "sparse_adam"])
def test_flag_compact_from(optimizer: str, log: Path, tmp_path: Path) -> None:
    """Compacted tables hold the rows of the days' ids, and give the scores that whole tables give."""
    arguments = [f"--optimizer={optimizer}", "--epochs=2"]
    whole = train(log, tmp_path / "whole", *arguments)
    compact = train(log, tmp_path / "compact", *arguments, "--compact_from=1")
    assert without_norms(compact) == without_norms(whole)
    names = {name for name in parameters(compact) if "/ids." in name}
    tables = open_log(log).schema.tables
    assert names == {f"{stage}/ids.{table}" for stage in STAGES for table in tables}
    ours, theirs = parameters(compact), parameters(whole)
    days = [open_log(log).open_day(day, TWO_STAGE) for day in DAYS[:2]]
    for stage in STAGES:
        videos = ours[f"{stage}/ids.video"]
        named = [np.unique(day.columns[f"{part}.video"]) for day in days for part in ("item", "history")]
        assert np.array_equal(videos, np.unique(np.concatenate([[0], *named])))
        assert len(videos) < len(theirs[f"{stage}/embedding.video"])
        for table in tables:
            rows = theirs[f"{stage}/embedding.{table}"][ours[f"{stage}/ids.{table}"]]
            assert np.array_equal(ours[f"{stage}/embedding.{table}"], rows)
    with np.load(evaluated_scores(log, compact)) as one, np.load(evaluated_scores(log, whole)) as other:
        assert all(np.array_equal(one[name], other[name]) for name in one.files)


def without_norms(run: Path) -> list[dict[str, Any]]:
    """The steps without the gradients' norms, whose last digit depends on the order of a table's rows."""
    return [{k: v for k, v in step.items() if not k.startswith("gradient_norm")} for step in logged_steps(run)]


def test_flag_table_memory(log: Path, baseline: Path, tmp_path: Path) -> None:
    host = train(log, tmp_path, "--table_memory=host")
    assert same_parameters(host, baseline)  # on a CPU both are the same memory
    assert config(host)["arguments"]["table_memory"] == "host"
    with pytest.raises(InputError, match="--table_memory=host: --optimizer=adam"):
        train(log, tmp_path / "dense", "--table_memory=host", "--optimizer=adam")
    assert not (tmp_path / "dense").exists()


def test_flag_day_on_device(log: Path, baseline: Path, tmp_path: Path) -> None:
    assert_trained_alike(train(log, tmp_path, "--day_on_device"), baseline)


def test_flag_autocast(log: Path, baseline: Path, tmp_path: Path) -> None:
    short = train(log, tmp_path, "--autocast=bfloat16")
    assert not same_parameters(short, baseline)
    for ours, theirs in zip(logged_steps(short), logged_steps(baseline), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert {value.dtype for value in parameters(short).values()} == {np.dtype(np.float32)}


def test_more_days_with_compacted_tables(log: Path, tmp_path: Path) -> None:
    """Ids of the new day have the rows that they would have had from the beginning."""
    at_once = train(log, tmp_path / "at once", "--compact_from=1")
    grown = train(log, tmp_path / "grown", "--compact_from=1", f"--train_days={DAYS[0]}")
    before = len(parameters(grown)["rank/ids.user"])
    train(log, grown, "--compact_from=1", f"--train_days={DAYS[0]},{DAYS[1]}", "--resume")
    assert same_parameters(grown, at_once)
    assert len(parameters(grown)["rank/ids.user"]) > before


def test_init_from_keeps_the_ids_of_compacted_tables(log: Path, tmp_path: Path) -> None:
    first = train(log, tmp_path / "first", "--compact_from=1", f"--train_days={DAYS[0]}")
    whole = train(log, tmp_path / "whole", f"--train_days={DAYS[0]}")
    second = ("--seed=31", f"--train_days={DAYS[1]}")
    compact = train(log, tmp_path / "compact", "--compact_from=1", f"--init_from={first}", *second)
    expected = train(log, tmp_path / "expected", f"--init_from={whole}", *second)
    with np.load(evaluated_scores(log, compact)) as one, np.load(evaluated_scores(log, expected)) as other:
        assert all(np.array_equal(one[name], other[name]) for name in one.files)


def test_too_little_memory_is_said_before_it_is_taken(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(InputError, match=r"needs about 0\.\d GB of memory on cpu.*--train_days"):
        train(log, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the trainer -----------------------------------------------------------------------------------------------------


class HandMadeAdam:
    """Adam (Kingma and Ba, ICLR 2015) as published; every element moves in every step, whatever its gradient."""

    def __init__(self, lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, parameters: dict[str, nn.Parameter]) -> None:
        self.steps += 1
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * gradient**2
            mean = self.first[name] / (1 - 0.9**self.steps)
            spread = self.second[name] / (1 - 0.999**self.steps)
            parameter.sub_(self.lr * mean / (spread.sqrt() + 1e-8))
            parameter.grad = None


def fresh(log: Path) -> tuple[dict[str, nn.Module], dict[str, EmbeddingStore], LCRON]:
    schema = open_log(log).schema
    models, stores = build_models(TWO_STAGE, schema, 4, 16, seed=30), build_stores(TWO_STAGE, schema, 4, seed=30)
    loss = LCRON(TWO_STAGE.stage_names, TWO_STAGE.num_relevant)
    for module in (*models.values(), loss):
        module.double()
    for store in stores.values():
        store.to(torch.device("cpu"), torch.float64)
    return models, stores, loss


@pytest.fixture
def day(log: Path) -> DayCache:
    return open_log(log).open_day(DAYS[0], TWO_STAGE, history_length=5)


def test_trainer_is_adam_with_dense_semantics(log: Path, day: DayCache) -> None:
    trainer = Trainer(*fresh(log), lr=0.01)
    several = list(batches(day, np.arange(REQUESTS_PER_DAY), 10, torch.device("cpu"), trainer.prepare))
    models, stores, loss = fresh(log)
    adam = HandMadeAdam(lr=0.01)
    named = {f"{stage}/embedding.{table}": p for stage, store in stores.items() for table, p in store.tables.items()}
    named |= {f"{stage}/{n}": p for stage, model in models.items() for n, p in model.named_parameters()}
    named |= {f"loss/{name}": parameter for name, parameter in loss.named_parameters()}
    assert named.keys() == trainer.parameters.keys()
    history = []
    for batch in several:
        terms = trainer.step(batch)
        assert not any(term.requires_grad for term in terms.values())
        scores = {stage: model(stores[stage].embed(batch.features)) for stage, model in models.items()}
        expected = loss(scores, batch.targets)
        expected["loss"].backward()
        adam.step(named)
        torch.testing.assert_close(terms["loss"], expected["loss"].detach(), rtol=1e-9, atol=0)
        history.append(trainer.parameters["retrieval/embedding.user"].detach().clone())
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter, named[name], rtol=1e-7, atol=1e-9, msg=name)

    # A user of the first batch alone keeps moving; one that never came does not move.
    users = [set(batch.features.request["user"].tolist()) for batch in several]
    once = sorted(users[0] - set.union(*users[1:]))
    never = sorted(set(range(len(history[0]))) - set.union(*users))
    assert once and never
    for before, after in pairwise(history):
        assert (before[once] != after[once]).any(dim=-1).all()
        assert torch.equal(before[never], after[never])


def run_steps(trainer: Trainer, day: DayCache, starts: range) -> list[float]:
    prepared = (trainer.prepare(day.batch(np.arange(start, start + 10))) for start in starts)
    return [trainer.step(batch)["loss"].item() for batch in prepared]


def test_flag_pull_from(log: Path, tmp_path: Path) -> None:
    """Rows that are pulled train as all rows do, and the state says since when each has not been touched."""
    sizes = {"whole": 1 << 30, "pulled": 1}
    whole, pulled = (train(log, tmp_path / n, f"--pull_from={rows}", "--dtype=float64") for n, rows in sizes.items())
    for stage in TWO_STAGE.stage_names:
        ours, theirs = (load_file(run / f"{stage}.safetensors") for run in (pulled, whole))
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in theirs)
    assert "last/rank/embedding.video" in load_file(pulled / STATE_FILE)
    assert "last/rank/embedding.video" not in load_file(whole / STATE_FILE)


def test_only_large_tables_are_deferred(log: Path) -> None:
    sizes = {name: table.size for name, table in open_log(log).schema.tables.items()}
    rows = max(sizes.values())
    largest = tuple(sorted(name for name, size in sizes.items() if size == rows))
    assert Trainer(*fresh(log), lr=0.01, large_table=rows).pulled == largest
    assert not Trainer(*fresh(log), lr=0.01, large_table=rows + 1).pulled


@pytest.mark.parametrize("optimizer", ["adam", "deferred_adam", "sparse_adam"])
def test_a_restored_trainer_goes_on_alike(optimizer: str, log: Path, day: DayCache) -> None:
    first, second = (Trainer(*fresh(log), lr=0.01, optimizer=optimizer, large_table=0) for _ in range(2))
    run_steps(first, day, range(0, 20, 10))
    second.restore({name: value.clone() for name, value in first.state().items()})
    assert run_steps(first, day, range(20, 40, 10)) == run_steps(second, day, range(20, 40, 10))
    ours, theirs = first.state(), second.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_flag_optimizer(log: Path, baseline: Path, tmp_path: Path) -> None:
    dense = train(log, tmp_path / "dense", "--optimizer=adam")
    assert same_parameters(dense, baseline)  # tables this small are not deferred
    sparse = train(log, tmp_path / "sparse", "--optimizer=sparse_adam")
    assert not same_parameters(sparse, baseline)


def test_the_weights_of_the_loss_are_trained(log: Path, baseline: Path) -> None:
    args = run_train2.parse_args(training_arguments(log, baseline))
    names = {name for name, _ in run_train2.build_loss(args).named_parameters()}
    assert names == {f"weight.{stage}" for stage in STAGES}
    state = load_file(baseline / STATE_FILE)
    for stage in STAGES:
        assert state[f"parameter/loss/weight.{stage}"] != 1
        values = [step[f"weight.{stage}"] for step in logged_steps(baseline)]
        assert len(set(values)) == len(values)


def test_a_state_that_does_not_fit(log: Path) -> None:
    trainer = Trainer(*fresh(log), lr=0.01)
    state = trainer.state()
    del state["parameter/loss/weight.rank"]
    with pytest.raises(InputError, match=r"loss/weight\.rank is missing"):
        trainer.restore(state)


def test_a_state_of_as_many_other_ids_does_not_fit(log: Path) -> None:
    schema = open_log(log).schema

    def trainer(ids: list[int]) -> Trainer:
        known = {"user": IdSet.of([np.array(ids)], schema.tables["user"].size)}
        models, stores = build_models(TWO_STAGE, schema, 4, 8, 0), build_stores(TWO_STAGE, schema, 4, 0, known)
        return Trainer(models, stores, LCRON(TWO_STAGE.stage_names, 10), lr=0.01)

    with pytest.raises(InputError, match=r"retrieval/embedding\.user has other ids"):
        trainer([0, 1, 3]).restore(trainer([0, 1, 2]).state())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("generator/cpu", None, "generator/cpu"),
        ("generator/cpu", torch.zeros(3), "generator/cpu"),
        ("last/rank/embedding.video", torch.tensor(99), "rank/embedding.video: last"),
        ("last/rank/embedding.video", torch.tensor(-1), "rank/embedding.video: last"),
    ],
)
def test_a_damaged_part_of_the_state(name: str, value: Tensor | None, said: str, log: Path, day: DayCache) -> None:
    """A step never made would have the compiled loops read beyond the rules' end."""
    trainer = Trainer(*fresh(log), lr=0.01, large_table=0)
    run_steps(trainer, day, range(0, 20, 10))
    state = {key: tensor.clone() for key, tensor in trainer.state().items()}
    if value is None:
        del state[name]
    else:
        state[name] = value if value.ndim else torch.full_like(state[name], int(value))
    with pytest.raises(InputError, match=f"{STATE_FILE}: {said}"):
        trainer.restore(state)
