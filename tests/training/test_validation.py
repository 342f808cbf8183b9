"""Following a validation day: it changes nothing of the training, and the best models are kept through every kill."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.soak import results
from deep_components import run_experiments, run_test, run_train, run_train2
from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.evaluation import day
from deep_components.files import read_json
from deep_components.runs.folder import STATE_FILE, best_folder
from deep_components.runs.identity import first_difference
from deep_components.runs.state import load_state
from deep_components.training import loop as training
from deep_components.training import validation
from tests.helpers import (
    DAYS,
    REQUESTS_PER_DAY,
    config,
    evaluate,
    logged_steps,
    same_parameters,
    small_log,
    train,
    training_arguments,
)
from tests.test_own_cascade import CASCADE, arguments, write_log
from tests.training.test_loop import interrupt

__all__ = ["interrupt"]  # a fixture
pytestmark = pytest.mark.usefixtures("short_rules")

JOINT = "joint_recall@10@20"
TRAINED, HELD_OUT = DAYS[:2]
STEPS = 5  # a day
FLAGS = ("--batch_size=8", "--epochs=2")
BEST = (*FLAGS, "--lr=0.1", "--validate_every=2", "--keep=best")  # so fast that it forgets again
EVERY_STEP, EACH_DAY = "--save_minutes=1e-9", "--save_minutes=0"


def validations(run: Path) -> dict[int, float]:
    """Step -> joint recall on the validation day."""
    found = {step["step"]: step.get(f"validation.{JOINT}") for step in logged_steps(run)}
    return {step: recall for step, recall in found.items() if recall is not None}


def about(run: Path) -> dict[str, Any]:
    return read_json(run / "training.json")["validation"]


@pytest.fixture(scope="module")
def best(log: Path, tmp_path_factory: pytest.TempPathFactory, short_rules: None) -> Path:
    """A run that keeps its best models, which are not its last."""
    run = train(log, tmp_path_factory.mktemp("best"), *BEST)
    assert about(run)["best_step"] < 2 * STEPS
    return run


TABLES = {
    "whole": (),
    "compacted and deferred": ("--compact_from=1", "--pull_from=1"),
    "compacted and deferred, by pytorch's operators": ("--compact_from=1", "--pull_from=1", "--no-compile"),
    "sparse_adam": ("--optimizer=sparse_adam",),
}


@pytest.mark.parametrize("tables", TABLES)
def test_a_validation_changes_nothing(tables: str, log: Path, tmp_path: Path) -> None:
    """Beside it stands a training of the same day alone; and what it measures is what `lcron test` does."""
    alone = train(log, tmp_path / "alone", *FLAGS, f"--train_days={TRAINED}", *TABLES[tables])
    run = train(log, tmp_path / "run", *FLAGS, "--validate_every=3", *TABLES[tables])
    assert same_parameters(run, alone)
    steps = [{name: value for name, value in s.items() if "validation." not in name} for s in logged_steps(run)]
    assert steps == logged_steps(alone)
    ours, theirs = (load_file(folder / STATE_FILE) for folder in (run, alone))
    assert {name for name in ours if name.startswith("validation/")} == ours.keys() - theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(validations(run)) == [3, STEPS, 6, 9, 2 * STEPS]  # every third, and after each pass
    tested, last = evaluate(log, run, f"--test_day={HELD_OUT}"), logged_steps(run)[-1]
    measured = {name.removeprefix("validation."): value for name, value in last.items() if "validation." in name}
    assert measured == {name: tested[name] for name in measured} and JOINT in measured
    assert measured.keys() == {name for name in tested if "@" in name or name.startswith("survival_")} | {
        name for name in tested if "kendall" in name
    }  # fmt: skip
    assert config(run)["train_days"] == [TRAINED] and config(run)["validation_day"] == HELD_OUT
    assert "the run followed its metrics on 2024-01-14" in tested["warning_test_day"]


def test_models_of_ones_own(tmp_path: Path) -> None:
    """With dropout and batch normalisation in one stage, and rows for unknown ids, which the validation day has."""
    shop = write_log(tmp_path / "shop", lambda day, ids: ids % (5 if day == "2026-03-01" else 10))
    own = tmp_path / "own.toml"
    own.write_text(CASCADE.replace('"mlp"', '"tests.models.own_models:Bilinear"'))
    flags = ("--emb_dim=4", "--nn_units=8", "--batch_size=20", "--epochs=2", "--loss_type=bce", f"--cascade={own}")
    run_train.main(arguments(shop, tmp_path / "alone", *flags, "--train_days=2026-03-01"))
    run_train.main(arguments(shop, tmp_path / "run", *flags, "--validate_every=1"))
    for stage in ("recall", "coarse", "fine", "final"):
        ours, theirs = (load_file(tmp_path / run / f"{stage}.safetensors") for run in ("run", "alone"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), stage
    run_test.main(arguments(shop, tmp_path / "run", f"--cascade={own}", "--test_day=2026-03-02"))
    last = json.loads((tmp_path / "run/train.jsonl").read_text().splitlines()[-1])
    assert last["validation.joint_recall@2@3"] == read_json(tmp_path / "run/metrics.json")["joint_recall@2@3"]


def test_the_best_models_are_kept(log: Path, best: Path, tmp_path: Path) -> None:
    recalls, said = validations(best), about(best)
    highest = max(recalls.values())
    first = next(step for step, recall in recalls.items() if recall == highest)
    assert said == {
        "day": HELD_OUT, "best_joint_recall": highest, "best_step": first, "kept_step": first, "stopped_early": False
    }  # fmt: skip
    last = train(log, tmp_path / "last", *BEST, "--keep=last")
    assert validations(last) == recalls and about(last)["kept_step"] == 2 * STEPS
    assert evaluate(log, last, f"--test_day={HELD_OUT}")[JOINT] == recalls[2 * STEPS] < highest
    kept = shutil.copytree(best, tmp_path / "kept")
    assert evaluate(log, kept, f"--test_day={HELD_OUT}")[JOINT] == highest
    assert sorted(path.name for path in best.glob("best_*")) == [best_folder(best, first).name]


@pytest.mark.parametrize(("step", "saves"), [(4, EVERY_STEP), (5, EACH_DAY), (10, EACH_DAY)])
def test_resumed_after_an_interruption(
    step: int, saves: str, log: Path, best: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    """Also where better models were written after the state from which it goes on."""
    run = tmp_path / "run"
    argv = training_arguments(log, run, *BEST, saves)
    interrupt(step)
    assert run_command(run_train2.main, argv) == 130
    interrupt(0)
    assert run_command(run_train2.main, [*argv, "--resume"]) == 0
    assert results(run) == results(best)
    assert about(run) == about(best)


def test_more_passes(log: Path, best: Path, tmp_path: Path) -> None:
    train(log, tmp_path, *BEST, "--epochs=1")
    train(log, tmp_path, *BEST, "--resume")
    assert results(tmp_path) == results(best)


def test_early_stopping(log: Path, best: Path, tmp_path: Path) -> None:
    """After a validation that is not better than the one before; whatever passes follow."""
    recalls = list(validations(best).items())
    last = next(step for (_, before), (step, recall) in pairwise(recalls) if recall <= before)
    flags = (*BEST, "--patience=1", "--epochs=3")
    run = train(log, tmp_path / "run", *flags)
    assert list(validations(run).items()) == [(step, recall) for step, recall in recalls if step <= last]
    highest = max(validations(run).values())
    assert about(run)["stopped_early"] and about(run)["best_joint_recall"] == highest
    assert evaluate(log, shutil.copytree(run, tmp_path / "kept"), f"--test_day={HELD_OUT}")[JOINT] == highest
    assert read_json(run / "training.json")["steps"] == len(logged_steps(run)) == last
    before = results(run)
    train(log, run, *flags, "--resume", "--epochs=4")
    assert results(run) == before


@pytest.mark.parametrize(("epochs", "early"), [(1, False), (2, True)])
def test_patience_that_ends_with_the_training_is_no_early_stop(
    epochs: int, early: bool, log: Path, tmp_path: Path
) -> None:
    """The second validation, after the first pass, is as good as the first."""
    flags = ("--batch_size=8", "--lr=1e-30", "--validate_every=3", "--patience=1", f"--epochs={epochs}")
    run = train(log, tmp_path, *flags)
    assert read_json(run / "training.json")["steps"] == STEPS
    assert about(run)["stopped_early"] == early


def test_a_day_that_the_models_of_init_from_were_trained_on(log: Path, tmp_path: Path) -> None:
    """It validates nothing, and tests nothing without a word: neither the child's nor the grandchild's."""
    parent = train(log, tmp_path / "parent", f"--train_days={HELD_OUT}")
    with pytest.raises(
        InputError, match=f"day {HELD_OUT}, which validates, is one that the models of --init_from were"
    ):
        train(log, tmp_path / "refused", f"--init_from={parent}", "--validate_every=2")
    run = parent
    for name, flags in (("child", (f"--train_days={TRAINED}",)), ("grandchild", ("--epochs=0",))):
        run = train(log, tmp_path / name, f"--init_from={run}", *flags)
        assert "were trained on" in evaluate(log, run, f"--test_day={HELD_OUT}")["warning_test_day"]
        assert "warning_test_day" not in evaluate(log, run, f"--test_day={DAYS[2]}")
    followed = train(log, tmp_path / "followed", "--validate_every=2")  # as its children may
    train(log, tmp_path / "allowed", f"--init_from={followed}", "--validate_every=2")


def test_a_validation_of_long_lists_takes_few_requests_at_a_time(
    log: Path, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the evaluation does: activations of all items would fill the memory."""
    monkeypatch.setattr(day, "_ITEMS_AT_A_TIME", 3 * 40)
    sizes, whole = [], validation.score_day

    def score_day(*arguments: Any, **options: Any) -> Any:
        sizes.append(arguments[3])
        return whole(*arguments, **options)

    monkeypatch.setattr(validation, "score_day", score_day)
    assert validations(train(log, tmp_path, *BEST)) == pytest.approx(validations(best))
    assert set(sizes) == {3}


@pytest.mark.parametrize("harm", ["missing", "damaged", "of another run"])
def test_best_models_that_cannot_be_used(harm: str, log: Path, best: Path, tmp_path: Path) -> None:
    run = shutil.copytree(best, tmp_path / "run")
    path = best_folder(run, about(best)["best_step"]) / "rank.safetensors"
    if harm == "damaged":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif harm == "missing":
        path.unlink()
    else:
        other = train(log, tmp_path / "other", *BEST, "--seed=31", "--epochs=1")
        shutil.copy(other / "rank.safetensors", path)
    sentence = {"missing": "no such file", "damaged": "do(es)? not match", "of another run": "differs in seed"}[harm]
    with pytest.raises(InputError, match=f"{path}: .*{sentence}"):
        train(log, run, *BEST, "--resume", "--epochs=3")


@pytest.mark.parametrize("changed", [{"step": 99}, {"waited": -1}, {"recall": None}])
def test_a_state_of_no_training(changed: dict[str, Any], log: Path, best: Path, tmp_path: Path) -> None:
    run = shutil.copytree(best, tmp_path / "run")
    arrays, position = load_state(run / STATE_FILE)
    for name, value in changed.items():
        arrays.pop(f"validation/{name}")
        arrays |= {} if value is None else {f"validation/{name}": torch.tensor(value).numpy()}
    training.save_state(run / STATE_FILE, arrays, position)
    with pytest.raises(InputError, match=f"{STATE_FILE}: .*train again without --resume"):
        train(log, run, *BEST, "--resume", "--epochs=3")


def test_another_validation_is_another_run(log: Path, best: Path, tmp_path: Path) -> None:
    for flag in ("--validate_every=3", "--keep=last", "--patience=9", "--validate_every=0"):
        more = ("--keep=last",) if flag == "--validate_every=0" else ()
        with pytest.raises(InputError, match=r"--resume: .* holds a run with (validate_every|keep|patience)="):
            train(log, best, *BEST, flag, *more, "--resume")
    run = train(log, tmp_path, *BEST, "--epochs=1")
    with pytest.raises(InputError, match=f"--resume: .* holds a run with validation_day={HELD_OUT}, not {DAYS[2]}"):
        train(log, run, *BEST, "--epochs=1", "--resume", f"--train_days={','.join(DAYS)}")
    assert not any(config(train(log, tmp_path / "plain")).get(name) for name in ("validation_day", "validate_every"))


REFUSED = {
    "--keep=best": "--keep=best goes by validations; give --validate_every=STEPS too",
    "--patience=3": "--patience=3 goes by validations; give --validate_every=STEPS too",
    f"--validate_every=1 --train_days={TRAINED}": "--validate_every wants two training days or more",
    "--validate_every=-1": "argument --validate_every: '-1' is not a whole number from 0",
    "--validate_every=1 --streaming": "--streaming tests each day anyway; leave out --validate_every",
}


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes(words: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runner says them before anything is made."""
    commands: list[tuple[Callable[[list[str]], None], list[str]]] = [
        (run_train2.main, training_arguments(log, tmp_path / "run", *words.split())),
        (run_experiments.main, [f"--data_dir={log}", f"--output_dir={tmp_path / 'O'}", "--batch_size=8",
                                "--cascade=two_stage", "--methods=lcron", *words.split()]),
    ]  # fmt: skip
    for main, argv in commands[words.endswith("streaming") :]:
        try:
            code: object = run_command(main, argv)
        except SystemExit as ended:
            code = ended.code
        assert code == 2 and REFUSED[words] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_validation_day_that_is_a_copy(log: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(log, tmp_path / "log", ignore=shutil.ignore_patterns("cache", "manifest.json"))
    for path in copied.rglob(f"*{TRAINED}*"):
        shutil.copy(path, path.with_name(path.name.replace(TRAINED, HELD_OUT)))
    with pytest.raises(InputError, match=f"day {HELD_OUT}, which validates, has the same requests as day {TRAINED}"):
        train(copied, tmp_path / "run", "--validate_every=1")


def test_the_runner_knows_which_days_train(log: Path, tmp_path: Path) -> None:
    """Also which a finished run of it was trained on, so that it is kept."""
    words = ["--cascade=two_stage", f"--data_dir={log}", f"--output_dir={tmp_path}", "--methods=lcron", "--seeds=30",
             *FLAGS, "--validate_every=3", "--emb_dim=4", "--nn_units=16", "--device=cpu"]  # fmt: skip
    *_, run = run_experiments.make_plan(*run_experiments.parse_args(words))
    (part,) = run.parts
    assert (run.trained_days(part), part.test_day, run.steps) == ((TRAINED,), DAYS[2], 2 * STEPS)
    run_train.main(run.train_command(part, resume=False)[1:])
    written = config(run.folder)
    assert first_difference(written, run.config) is first_difference(run.config, written) is None
    assert written["code"] == run.config["code"]
    assert any(name.startswith("deep_components/evaluation/") for name in written["code"]["method"])


@pytest.fixture(scope="module")
def few_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield small_log(tmp_path_factory, seed=2, users=REQUESTS_PER_DAY * 2)


def test_ids_that_only_the_validation_day_has(few_users: Path, tmp_path: Path) -> None:
    """They have their initial values, in compacted tables as in whole ones, and are in no file."""
    whole, compacted = (train(few_users, tmp_path / f"{rows}", *FLAGS, "--validate_every=4", f"--compact_from={rows}")
                        for rows in (10**6, 1))  # fmt: skip
    assert validations(whole) == validations(compacted)
    alone = train(few_users, tmp_path / "alone", *FLAGS, f"--train_days={TRAINED}", "--compact_from=1")
    assert same_parameters(compacted, alone)  # the ids of their rows too
