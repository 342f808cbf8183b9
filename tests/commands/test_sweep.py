"""lcron sweep: a choice on the validation day alone, as many trainings for every method, and mistakes said first."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from deep_components import run_experiments
from deep_components.cli import run_command
from deep_components.commands import sweep, table
from deep_components.errors import InputError
from deep_components.experiments.execution import Options, Outcome, Slot, execute
from deep_components.experiments.plan import Method, Run
from deep_components.experiments.sweep import Trial, axis_of, trials_of
from deep_components.files import read_json
from tests.helpers import DAYS, train
from tests.test_experiments_cascade import Here

JOINT = "joint_recall@10@20"
METHODS = ("lcron", "bce")
RATES = ("0.001", "0.05", "1e30")
SMALL = ("--batch_size=16", "--emb_dim=4", "--nn_units=16", "--seq_len=5", "--device=cpu")

Sweep = Callable[..., tuple[int | str | None, list[str]]]


@pytest.fixture(scope="module")
def untested(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose test day cannot be read."""
    copied = tmp_path_factory.mktemp("untested") / "log"
    shutil.copytree(log, copied, ignore=shutil.ignore_patterns("cache", "manifest.json"))
    for path in copied.rglob(f"*{DAYS[2]}*"):
        path.write_bytes(b"no day")
    return copied


@pytest.fixture
def give(untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Give the command; its exit code, and how each training ended."""

    def give(*words: str, log: Path = untested) -> tuple[int | str | None, list[str]]:
        ended = []

        def engine(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[list[Outcome]]:
            for run in runs:
                outcome = execute(run, Slot(), Options(), Here())
                ended.append(f"{run.folder.relative_to(args.output_dir)} {outcome.status}")
                yield [outcome]

        monkeypatch.setattr(run_experiments, "_engine", engine)
        where = [f"--data_dir={log}", f"--output_dir={tmp_path / 'D'}"]
        try:
            return run_command(sweep.main, ["--cascade=two_stage", *where, *SMALL, *words]), ended
        except SystemExit as end:
            return end.code, ended

    return give


def test_the_best_setting_of_each_method(
    give: Sweep, untested: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that diverges is named and counts as tried; a second call makes what is missing."""
    words = (f"--methods={','.join(METHODS)}", f"--grid=lr={','.join(RATES)}", "--budget=9")
    folders = [f"{method}_lr{rate}_validation/seed30" for method in ("bce", "lcron") for rate in RATES]
    code, ended = give(*words)
    assert code == 2  # all failures are of the input
    assert ended == [f"{folder} {'failed' if '1e30' in folder else 'finished'}" for folder in folders]
    content, shown = read_json(tmp_path / "D/sweep.json"), capsys.readouterr().out
    assert (content["train_days"], content["validation_day"]) == ([DAYS[0]], DAYS[1])
    for trial, folder in zip(content["trials"], folders, strict=True):
        assert trial["folders"] == [folder] and (trial["error"] != "") == (trial["mean"] is None) == ("1e30" in folder)
        if trial["mean"] is not None:
            metrics = read_json(tmp_path / "D" / folder / "metrics.json")
            assert trial["values"] == {"30": metrics[JOINT]} and metrics["test_day"] == DAYS[1]
    assert shown.startswith(f"two_stage, data: simulated, validation day {DAYS[1]}; one run each; the test day was not")
    settings = []
    for method in METHODS:
        made = [trial for trial in content["trials"] if trial["method"] == method and trial["mean"] is not None]
        best = max(made, key=lambda trial: trial["mean"])
        assert [trial for trial in made if trial["chosen"]] == [best]
        assert f"{best['mean']:.4f} *" in shown and f"--lr={best['arguments']['lr']}" in content["command"]
        settings.append((method, float(best["arguments"]["lr"])))
    assert content["command"] in shown

    shutil.rmtree(tmp_path / "D" / folders[1])
    again = ["finished" if folder == folders[1] else "failed" if "1e30" in folder else "kept" for folder in folders]
    assert give(*words)[1] == [f"{folder} {how}" for folder, how in zip(folders, again, strict=True)]
    assert read_json(tmp_path / "D/sweep.json") == content

    table.main([str(tmp_path / "D"), "--output", str(tmp_path / "table.csv")])
    assert f"lcron (lr={float(RATES[1])})" in (tmp_path / "table.csv").read_text()

    lcron, command, *rest = shlex.split(content["command"].replace(str(untested), str(log)))
    assert (lcron, command) == ("lcron", "experiments")
    runs = [run for run in run_experiments.make_plan(*run_experiments.parse_args(rest)) if run.name != "untrained"]
    assert [(run.name, run.config["arguments"]["lr"]) for run in runs if run.seed == 30] == sorted(settings)
    assert {(run.parts[0].train_days, run.parts[0].test_day) for run in runs} == {(DAYS[:2], DAYS[2])}
    assert {run.config["arguments"]["batch_size"] for run in runs} == {16}


def test_the_chosen_settings_are_tested(
    give: Sweep, log: Path, untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On all training days with each seed, after the choice; a second call makes nothing."""
    words = ("--methods=lcron", "--grid=lr=0.001,0.05", "--test_seeds=30,31", "--test_random_items=5")
    code, ended = give(*words, "--budget=2", log=log)
    assert code == 0 and all(line.endswith("finished") for line in ended) and len(ended) == 4
    content, shown = read_json(tmp_path / "D/sweep.json"), capsys.readouterr().out
    (best,) = (trial for trial in content["trials"] if trial["chosen"])
    name = f"lcron_lr{best['arguments']['lr']}"
    assert best["tested"] == [f"{name}/seed30", f"{name}/seed31"] and content["test_seeds"] == [30, 31]
    assert [trial["tested"] for trial in content["trials"] if not trial["chosen"]] == [[]]
    assert (
        "the test day was not read for the choice" in shown and f"test day {DAYS[2]}, 40 requests with up to 5" in shown
    )
    for folder in best["tested"]:
        config, metrics = (read_json(tmp_path / "D_test" / folder / f"{n}.json") for n in ("config", "metrics"))
        assert (config["train_days"], metrics["test_day"], metrics["test_random_items"]) == ([*DAYS[:2]], DAYS[2], 5)
        assert config["arguments"]["lr"] == float(best["arguments"]["lr"])
    assert "--test_random_items=5" in shlex.split(content["command"])

    assert give(*words, "--budget=2", log=log) == (0, [line.replace("finished", "kept") for line in ended])
    code, without = give(*words, "--budget=1", log=untested)
    assert code == 2 and len(without) == 1  # the choice is made before the test day is asked for
    assert "the test day was not read for the choice" in capsys.readouterr().out


OPTUNA = (
    "--methods=lcron,bce",
    "--grid=lr=0.001...0.05",
    "--grid=lcron:tau=10...100",
    "--sampler=optuna",
    "--budget=3",
)


def test_optuna_goes_on_from_what_is_finished(give: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call proposes the same settings, and makes the missing training alone. The table is by method."""
    code, ended = give(*OPTUNA)
    table_rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("bce", "lcron"))]
    assert table_rows[:6] == ["bce"] * 3 + ["lcron"] * 3
    content = read_json(tmp_path / "D/sweep.json")
    trials = content["trials"]
    assert code == 0 and [trial["method"] for trial in trials] == ["bce", "lcron"] * 3
    assert ended == [f"{trial['folders'][0]} finished" for trial in trials]
    assert content["sampler"] == "optuna" and content["grid"] == ["lr=0.001...0.05", "lcron:tau=10...100"]
    for trial in trials:
        arguments = read_json(tmp_path / "D" / trial["folders"][0] / "config.json")["arguments"]
        assert 0.001 <= arguments["lr"] <= 0.05 and 10 <= (arguments["tau"] or 10) <= 100
    for method in ("lcron", "bce"):
        own = [trial for trial in trials if trial["method"] == method]
        assert [trial["chosen"] for trial in own] == [trial is max(own, key=lambda t: t["mean"]) for trial in own]

    shutil.rmtree(tmp_path / "D" / trials[2]["folders"][0])
    again = [line.replace("finished", "kept") if index != 2 else line for index, line in enumerate(ended)]
    assert give(*OPTUNA) == (0, again)
    assert read_json(tmp_path / "D/sweep.json") == content


def test_optuna_is_named_where_it_is_missing(
    give: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert give(*OPTUNA) == (2, [])
    assert "lacks optuna; run: " in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "--grid=lrr=0.1,0.2": "'lrr' is no hyper-parameter of a training (did you mean lr?)",
    "--grid=jobs=1,2": "'jobs' is no hyper-parameter of a training",
    "--grid=shuffle=1": "'shuffle' is no hyper-parameter of a training",
    "--grid=seed=1,2": "'seed' is no hyper-parameter of a training",
    "--grid=lr": "--grid=lr: give an option and its values, as --grid=lr=0.005,0.01,0.02",
    "--grid=lr=0.1,": "--grid=lr=0.1,: give an option and its values",
    "--grid=lr=0.1,0.1": "--grid=lr=0.1,0.1: names a value twice",
    "--grid=lr=0.01,0.010": "--grid: --lr=0.01 and --lr=0.010 of lcron are the same",
    "--grid=lr=0.1,abc": "argument --lr: 'abc' is not a number above 0",
    "--grid=lcorn:tau=1,2": "--grid=lcorn:tau=1,2: no such method (did you mean lcron?)",
    "--grid=tau=20,50 --methods=lcron,bce": "--tau is not an option of bce",
    "--grid=tau=20,50 --grid=lcron:tau=10": "tau of lcron has values already",
    "--grid=lr=0.1 --lr=0.2": "--lr would take the place of the values of --grid=lr=0.1",
    "--grid=lr=0.1 --taus=3": "--taus: no such option (did you mean --tau?)",
    "--grid=lr=0.1 --method=lcron --method=lcron": "--method=lcron: stated twice",
    "--grid=lr=0.1 --budget=0": "argument --budget: '0' is not a whole number above 0",
    "--grid=lr=0.1 --budget=1 --seeds=1,2": "--budget=1: fewer trainings than the 2 seeds of one setting",
    f"--grid=lr=0.1 --test_day={DAYS[2]}": "--test_day has no place in a sweep",
    "--grid=lr=0.1...1": "--grid=lr=0.1...1: a range needs --sampler=optuna; without it list the values to try",
    "--grid=lr=1...0.1": "--grid=lr=1...0.1: a range has two numbers, the lower one first",
    "--grid=lr=0.1...": "--grid=lr=0.1...: give an option and its values",
    "--grid=lr=a...b": "--grid=lr=a...b: a range has two numbers",
    "--grid=lr=0.1...inf": "--grid=lr=0.1...inf: a range has two numbers",
    "--sampler=optuna --grid=lr=0...0.1": "argument --lr: '0' is not a number above 0",
    "--sampler=optuna --grid=lr=0.1,0.2,-1": "argument --lr: '-1' is not a number above 0",
    "--sampler=optuna --grid=lr=0.01,0.010": "--grid: --lr=0.01 and --lr=0.010 of lcron are the same",
    "--sampler=optuna --grid=tau=1...9 --methods=bce": "--tau is not an option of bce",
    "--sampler=tpe --grid=lr=0.1": "argument --sampler: invalid choice: 'tpe'",
    "--grid=lr=0.1 --streaming": "--streaming has no place in a sweep",
    "--grid=lr=0.1 --test_seeds=3,-1": "argument --test_seeds: '3,-1' is not a list of whole numbers",
    f"--grid=lr=0.1 --train_days={','.join(DAYS)}": f"--train_days names {DAYS[2]}, the day of the tests",
    "--grid=lr=0.1 --output_dir=/": "/: the folder of a sweep needs a name",
    "--grid=lr=0.1 --test_seeds=3,x": "argument --test_seeds: '3,x' is not a list of whole numbers",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_said_before_anything_is_made(
    words: str, give: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert give("--methods=lcron", "--budget=4", *words.split()) == (2, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and REFUSED[words] in error
    assert list(tmp_path.iterdir()) == []


def test_models_that_have_seen_the_validation_day_choose_nothing(
    give: Sweep, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = train(log, tmp_path / "parent", f"--train_days={DAYS[1]}", *SMALL)
    assert give("--methods=lcron", "--budget=1", "--grid=lr=0.1", f"--init_from={parent}") == (2, [])
    assert f"day {DAYS[1]}, which validates, is one that the models of --init_from" in capsys.readouterr().err


def test_a_folder_is_named(untested: Path) -> None:
    with pytest.raises(InputError, match="--output_dir is missing"):
        sweep.main(["--cascade=two_stage", f"--data_dir={untested}", "--grid=lr=1", "--budget=1"])


def settings(trials: list[Trial], method: str) -> list[dict[str, str]]:
    return [dict(trial.setting) for trial in trials if trial.method.name == method]


def test_every_method_gets_as_many_settings() -> None:
    """The whole grid where the budget allows, else a random part, the same for methods of one grid."""
    methods = [Method("a", ()), Method("b", ("--tau=1",))]
    axes = [axis_of("lr=1,2,3"), axis_of("batch_size=8,16")]
    whole = [{"lr": rate, "batch_size": size} for rate in "123" for size in ("8", "16")]
    everything = trials_of(methods, axes, budget=100, seeds=1, sample_seed=0)
    assert settings(everything, "a") == settings(everything, "b") == whole
    parts = [trials_of(methods, axes, budget=9, seeds=3, sample_seed=seed) for seed in range(20)]
    for part in parts:
        chosen = settings(part, "a")
        assert settings(part, "b") == chosen and len(chosen) == 3
        assert [setting for setting in whole if setting in chosen] == chosen
    assert len({str(settings(part, "a")) for part in parts}) > 5
    assert {str(setting) for part in parts for setting in settings(part, "a")} == set(map(str, whole))
    for budget, more in pairwise(range(1, 7)):
        fewer, larger = (settings(trials_of(methods, axes, b, 1, sample_seed=1), "a") for b in (budget, more))
        assert len(larger) == len(fewer) + 1 and all(setting in larger for setting in fewer)  # trainings are kept
    own = trials_of(methods, [*axes[:1], axis_of("b:tau=1,2")], budget=100, seeds=1, sample_seed=0)
    assert (len(settings(own, "a")), len(settings(own, "b"))) == (3, 3)  # the smallest grid's
    planned = trials_of(methods, [axis_of("b:tau=1/2")], budget=1, seeds=1, sample_seed=0)[1].planned()
    assert (planned.arguments, planned.variant) == (("--tau=1", "--tau=1/2"), "tau1-2")
