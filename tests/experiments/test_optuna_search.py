"""Settings from Optuna: inside what was named, none twice, the same again, and better than chance."""

import math
from collections.abc import Callable, Sequence
from statistics import mean, median

import pytest

from deep_components.experiments.optuna_search import ends_of, optuna_rounds
from deep_components.experiments.plan import Method
from deep_components.experiments.sweep import Trial, axis_of, count_of, grids_of

METHODS = (Method("a", ()), Method("b", ()))
RANGES = ("lr=0.0001...1", "tau=1...1000", "a:emb_dim=2...64", "b:emb_dim=2,4,8")
LISTS = ("lr=1,2,3", "tau=1,2")

Objective = Callable[[Trial], float | None]


def peaked(trial: Trial) -> float:
    """Best at lr = 0.01 and tau = 30."""
    return -abs(math.log10(float(trial.setting["lr"]) / 0.01)) - abs(math.log10(float(trial.setting["tau"]) / 30))


def search(axes: Sequence[str], budget: int, seed: int, objective: Objective) -> list[list[Trial]]:
    """What each round proposed."""
    grids = grids_of(METHODS, [axis_of(text) for text in axes])
    rounds = optuna_rounds(METHODS, grids, count_of(grids, budget, seeds=1), seed)
    made = [next(rounds)]
    with pytest.raises(StopIteration):
        while True:
            made.append(rounds.send([objective(trial) for trial in made[-1]]))
    return made


def test_proposals_are_inside_the_ranges_and_repeat() -> None:
    rounds = search(RANGES, 30, 0, peaked)
    assert len(rounds) == 30 and all([trial.method.name for trial in made] == ["a", "b"] for made in rounds)
    trials = [trial for made in rounds for trial in made]
    for trial in trials:
        assert 0.0001 <= float(trial.setting["lr"]) <= 1 and 1 <= float(trial.setting["tau"]) <= 1000
        assert all(len(trial.setting[name].lstrip("0.").replace(".", "")) <= 4 for name in ("lr", "tau"))
        assert trial.setting["tau"].isdecimal() and trial.setting["emb_dim"].isdecimal()  # whole, as their ends are
        known = range(2, 65) if trial.method.name == "a" else (2, 4, 8)
        assert int(trial.setting["emb_dim"]) in known
    assert search(RANGES, 40, 0, peaked)[:30] == rounds != search(RANGES, 30, 1, peaked)  # a larger budget goes on


def test_ranges_are_tried_on_a_log_scale() -> None:
    rates = [float(trial.setting["lr"]) for made in search(["lr=0.0001...1"], 60, 0, lambda _: None) for trial in made]
    assert 0.3 < mean(rate < 0.01 for rate in rates) < 0.7  # on a linear scale one in a hundred


def test_later_proposals_are_better_than_the_first() -> None:
    """Of 60 the first five are random."""
    first, last = [], []
    for seed in range(4):
        rounds = [[peaked(trial) for trial in made] for made in search(RANGES[:2], 60, seed, peaked)]
        first += [value for values in rounds[:5] for value in values]
        last += [value for values in rounds[40:] for value in values]
    assert median(last) > median(first) + 0.5


@pytest.mark.parametrize("objective", [lambda trial: 1.0, lambda trial: None, peaked], ids=["tied", "failed", "peaked"])
@pytest.mark.parametrize("budget", [1, 4, 6, 100])
def test_no_setting_is_tried_twice(budget: int, objective: Objective) -> None:
    rounds = search(LISTS, budget, 0, objective)
    assert len(rounds) == min(budget, 6)
    for method in range(2):
        assert len({str(made[method].setting) for made in rounds}) == len(rounds)


def test_whole_numbers_of_a_range_are_as_many_as_there_are() -> None:
    rounds = search(["emb_dim=4...6", "lr=1,2"], 100, 0, lambda _: 1.0)
    assert sorted((made[0].setting["emb_dim"], made[0].setting["lr"]) for made in rounds) == [
        (units, rate) for units in "456" for rate in "12"
    ]


def test_a_range_too_narrow_for_its_digits() -> None:
    rounds = search(["lr=0.1...0.10001"], 4, 0, lambda _: 1.0)
    assert all(0.1 <= float(made[0].setting["lr"]) <= 0.10001 for made in rounds) and len(rounds) == 4


def test_a_method_without_a_grid_gets_its_one_setting() -> None:
    assert [[dict(trial.setting) for trial in made] for made in search(["a:lr=1,2"], 5, 0, lambda _: 1.0)] == [
        [{"lr": "2"}, {}]
    ]


def test_everything_that_may_be_proposed_is_checked_before() -> None:
    grids = grids_of(METHODS, [axis_of(text) for text in ("lr=0.1...1", "b:tau=1,2,3")])
    checked = [(trial.method.name, dict(trial.setting)) for trial in ends_of(METHODS, grids)]
    assert checked == [
        ("a", {"lr": "0.1"}), ("a", {"lr": "1"}),
        ("b", {"lr": "0.1", "tau": "1"}), ("b", {"lr": "1", "tau": "1"}),
        ("b", {"lr": "0.1", "tau": "2"}), ("b", {"lr": "0.1", "tau": "3"}),
    ]  # fmt: skip
