"""paper/operators.sh: which trainings the study asks for, of which parts, and that all methods have the same budget."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deep_components.commands import sweep
from deep_components.experiments.plan import Method, make_plan
from deep_components.experiments.sweep import Axis, Trial, trials_of
from deep_components.loss.selection import SELECTION_OPERATORS, TEMPERATURES
from tests.test_scripts import PROJECT, Recorded

SCRIPT = "paper/operators"
RATES = ("0.01", "0.02", "0.04")
DEFAULTS: Mapping[str, Mapping[str, float]] = {  # of a method without --tau, when the study began
    loss: dict.fromkeys(("neural_sort", "soft_sort"), sorts) | TEMPERATURES | {"dftopk": 30.0}
    for loss, sorts in (("lcron", 50.0), ("arf_v2", 200.0))
}
BUDGET = 9


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("study")
    (folder / "the project").mkdir()
    return Recorded(folder)


class Part:
    """What a call of `lcron sweep` asks for."""

    own: argparse.Namespace
    args: argparse.Namespace
    methods: list[Method]
    training: list[str]

    def __init__(self, call: list[str]) -> None:
        self.own, self.args, self.methods, self.training = sweep.parse_args(call)
        seeds = len(self.args.seeds)
        self.trials: list[Trial] = trials_of(self.methods, self.own.axes, self.own.budget, seeds, self.own.sample_seed)
        self.taus: dict[str, Axis] = {axis.method: axis for axis in self.own.axes if axis.method}

    @property
    def loss(self) -> str:
        return next(word for word in self.methods[0].arguments if word.startswith("--loss_type=")).partition("=")[2]

    def positions(self, method: str) -> list[tuple[int, int]]:
        """Which values of the grid's learning rates and temperatures a method tries."""
        values = self.taus[method].values
        made = [trial.setting for trial in self.trials if trial.method.name == method]
        return [(RATES.index(setting["lr"]), values.index(setting["tau"])) for setting in made]


@pytest.fixture(scope="module")
def whole(recorded: Recorded) -> list[Part]:
    """The study without the user's arguments but the log."""
    recorded.run("--data_dir=D", script=SCRIPT)
    return [Part(call) for call in recorded.calls("sweep")]


def test_the_parts(whole: list[Part], recorded: Recorded) -> None:
    """Each in a folder of its own; then their tables."""
    expected = [
        (setting, random, loss)
        for random in (0, 160)
        for setting in ("two_stage", "three_stage")
        for loss in ("lcron", "arf_v2")
    ]
    assert [(part.args.setting, part.args.test_random_items, part.loss) for part in whole] == [
        (setting, random or None, loss) for setting, random, loss in expected
    ]
    folder = recorded.project / "runs/operators/D"
    assert [part.args.output_dir for part in whole] == [
        folder / setting / f"random{random}" / loss for setting, random, loss in expected
    ]
    tables = recorded.calls("table")
    assert all(call[-1] == str(folder) for call in tables)
    assert all({"--kind=choices", "--compare=neural_sort", "--test=paired"} <= set(call) for call in tables)
    assert [call[-2] for call in tables] == [f"--output={folder}.md", f"--output={folder}.csv", "--format=text"]


def test_every_method_has_the_same_budget(whole: list[Part]) -> None:
    """As many settings, at the same positions of a grid whose middle is the defaults, on the validation day."""
    for part in whole:
        assert {method.name for method in part.methods} == set(SELECTION_OPERATORS)
        assert (part.own.budget, part.args.seeds, part.args.validation) == (BUDGET, [30], True)
        assert part.own.test_seeds == [*range(30, 40)]
        assert [axis.values for axis in part.own.axes if axis.method is None] == [RATES]
        tried = part.positions("neural_sort")
        assert tried == [(rate, tau) for rate in range(3) for tau in range(3)]
        for name, axis in part.taus.items():
            default = DEFAULTS[part.loss][name]
            assert [float(value) for value in axis.values] == pytest.approx([default / 5, default, default * 5])
            assert TEMPERATURES.get(name, default) in map(float, axis.values)
            assert part.positions(name) == tried


def test_the_trainings(whole: list[Part], log: Path) -> None:
    """Planned as they would be made on a small log: a setting of every method can be used, and says what it should."""
    for part in whole:
        part.args.data_dir, part.args.batch_divisor = log, 64
        first = {trial.method.name: trial.planned() for trial in reversed(part.trials)}
        runs = make_plan(part.args, [*first.values()], part.training)
        assert [run.name for run in runs] == [*first]  # and no untrained cascades
        for run in runs:
            arguments = run.config["arguments"]
            assert (arguments["topk_op"], arguments["loss_type"]) == (run.name, part.loss)
            assert (arguments["num_random_items"] or 0) == (run.test_random_items or 0)
            assert arguments["label_ties"] == ("shared" if part.loss == "lcron" else None)
            assert arguments["batch_size"] == 1024 // 64


def test_a_part_of_the_study(recorded: Recorded) -> None:
    recorded.run(
        *("--data_dir=D", "--settings=three_stage", "--lists=72", "--losses=arf_v2", "--operators=neural_sort,lml"),
        *("--budget=4", "--seeds=1,2", "--output_dir=my runs", "--jobs=2", "--batch_size=64"),
        script=SCRIPT,
    )
    (call,) = recorded.calls("sweep")
    part = Part(call)
    assert [method.name for method in part.methods] == ["neural_sort", "lml"]
    assert (part.args.setting, part.loss, part.args.test_random_items) == ("three_stage", "arf_v2", 32)
    assert (part.own.budget, part.own.test_seeds, part.args.jobs) == (4, [1, 2], 2)
    assert part.training == ["--batch_size=64"]
    assert part.args.output_dir == Path("my runs/D/three_stage/random32/arf_v2")


def test_the_simulated_log(recorded: Recorded) -> None:
    words = ("--lists=40", "--losses=lcron")
    recorded.run(*words, script=SCRIPT, CHECKS=sys.executable, PYTHONPATH=str(PROJECT))
    assert "SIMULATED log" in recorded.result.stderr
    assert len(recorded.calls("simulate")) == 1
    parts = [Part(call) for call in recorded.calls("sweep")]
    log = recorded.project / "data/simulated"
    check, *parts = parts
    assert (check.args.check, check.args.data_dir, check.args.batch_divisor) == (True, log, 8)
    assert [(part.args.data_dir, part.args.batch_divisor) for part in parts] == [(log, 8)] * 2


@pytest.mark.parametrize("mistake", ["--operators=foo", "--lrr=0.1", "--seeds=a"])
def test_a_mistake_is_said_before_a_log_is_simulated(mistake: str, recorded: Recorded) -> None:
    recorded.run(mistake, "--lists=40", script=SCRIPT, check=False, CHECKS=sys.executable, PYTHONPATH=str(PROJECT))
    assert recorded.result.returncode == 2
    assert recorded.calls("simulate") == recorded.calls("sweep")[1:] == []


def test_only_the_tables(recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", "--tables", script=SCRIPT) == "the table\n" * 3
    assert recorded.calls("sweep") == []


def test_the_steps_are_timed(recorded: Recorded) -> None:
    """As many random items as the parts have, and no runs; the results of an earlier time go into the tables."""
    (recorded.folder / "O").mkdir()
    (recorded.folder / "O/steps_three_stage.json").touch()
    words = (
        "--data_dir=D",
        "--output_dir=O",
        "--settings=three_stage",
        "--losses=arf_v2",
        "--operators=neural_sort,lml",
    )
    recorded.run(*words, "--tables", "--measure", script=SCRIPT)
    first = recorded.calls_file.read_text().split("\x1e")[0].split("\x1f")
    expected = (
        "benchmarks.long_lists",
        "--setting=three_stage",
        "--items=50,210",
        "--methods=arf_v2_neural_sort,arf_v2_lml",
    )
    assert {*expected, "--output=O/steps_three_stage.json"} <= {*first}
    assert recorded.calls("sweep") == []
    assert all("--steps=O/steps_three_stage.json" in call for call in recorded.calls("table"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--lists=40,20", "--lists=40,20: give numbers from 40 on"),
        ("--settings=four_stage", "--settings=four_stage: give two_stage, three_stage or both"),
        ("--losses=bce", "--losses=bce: give lcron, arf_v2 or both"),
        ("--operators=lml,sort", "--operators: sort is no selection operator"),
    ],
)
def test_mistakes(argument: str, said: str, recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", argument, script=SCRIPT, check=False) == ""
    assert recorded.result.returncode == 2
    assert recorded.result.stderr.startswith(f"error: {said}") and recorded.result.stderr.count("\n") == 1
    assert recorded.calls("sweep") == []


def test_failures(recorded: Recorded) -> None:
    """A refused command ends the study; one that has made its part, but not all trainings, does not."""
    arguments = ("--data_dir=D", "--output_dir=F", "--budget=0", "--lists=40")
    assert recorded.run(*arguments, script=SCRIPT, check=False, FAIL_ON="--budget=0") == ""
    assert (recorded.result.returncode, len(recorded.calls("sweep"))) == (2, 1)
    for setting in ("two_stage", "three_stage"):
        for loss in ("lcron", "arf_v2"):
            part = recorded.folder / "F/D" / setting / "random0" / loss
            part.mkdir(parents=True)
            (part / "sweep.json").touch()
    recorded.run(*arguments, script=SCRIPT, check=False, FAIL_ON="--budget=0")
    assert (recorded.result.returncode, len(recorded.calls("sweep"))) == (2, 4)
    assert len(recorded.calls("table")) == 3
