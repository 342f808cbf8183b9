"""Settings that Optuna proposes one after the other, from what those before reached on the validation day."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deep_components.errors import InputError
from deep_components.experiments.plan import Method
from deep_components.experiments.sweep import Grid, Rounds, Trial, setting_at, size_of

_FIRST = 5  # proposals at random, before any result counts
_ASKED_AGAIN = 20  # times, for a setting that was not tried
_DIGITS = 4  # of a number from a range


def load_optuna() -> Any:
    """The package, which says nothing of each trial. InputError when it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"--sampler=optuna: {sys.executable} lacks optuna; run: {sys.executable} -m pip install "
            "-r requirements-optuna.txt"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def ends_of(methods: Sequence[Method], grids: Mapping[str, Grid]) -> list[Trial]:
    """Trials that have every listed value, and both ends of every range, of each method: what may be proposed."""
    trials = []
    for method in methods:
        grid = grids[method.name]
        first = {name: axis.values[0] for name, axis in grid.items()}
        trials.append(Trial(method, first))
        trials += [Trial(method, first | {n: value}) for n, axis in grid.items() for value in axis.values[1:]]
    return trials


def optuna_rounds(methods: Sequence[Method], grids: Mapping[str, Grid], count: int, seed: int) -> Rounds:
    """``count`` rounds of one trial of each method, by Optuna's tree-structured Parzen estimator. The first five of a
    method are random. No setting is tried twice. The same ``seed`` and the same results give the same proposals,
    whatever the ``count``."""
    searches = [_Search(method, grids[method.name], seed) for method in methods]
    for _ in range(count):
        values = yield [search.propose() for search in searches]
        for search, value in zip(searches, values, strict=True):
            search.learn(value)


class _Search:
    def __init__(self, method: Method, grid: Grid, seed: int) -> None:
        self._optuna = load_optuna()
        self._method, self._grid = method, grid
        sampler = self._optuna.samplers.TPESampler(n_startup_trials=_FIRST, seed=seed)
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        self._known: dict[tuple[str, ...], float | None] = {}  # a setting's values -> what it reached
        self._asked: Any = None
        self._setting: dict[str, str] = {}

    def propose(self) -> Trial:
        for _ in range(_ASKED_AGAIN):
            setting = self._ask()
            if tuple(setting.values()) not in self._known:
                return Trial(self._method, setting)
            self.learn(self._known[tuple(setting.values())])
        size = size_of(self._grid)
        if size < math.inf:
            untried = (setting_at(self._grid, index) for index in range(int(size)))
            setting = next(one for one in untried if tuple(one.values()) not in self._known)
            self._study.enqueue_trial({n: int(v) if self._grid[n].is_whole else v for n, v in setting.items()})
        return Trial(self._method, self._ask())  # a range too narrow for its digits may repeat

    def _ask(self) -> dict[str, str]:
        self._asked = self._study.ask({name: self._distribution(name) for name in self._grid})
        self._setting = {name: self._text(name, value) for name, value in self._asked.params.items()}
        return self._setting

    def learn(self, value: float | None) -> None:
        """What the last proposal reached; None: its training failed."""
        self._known[tuple(self._setting.values())] = value
        failed = self._optuna.trial.TrialState.FAIL if value is None else None
        self._study.tell(self._asked, value, state=failed)

    def _distribution(self, name: str) -> Any:
        axis, distributions = self._grid[name], self._optuna.distributions
        if not axis.is_range:
            return distributions.CategoricalDistribution(axis.values)
        if axis.is_whole:
            low, high = map(int, axis.values)
            return distributions.IntDistribution(low, high, log=low > 0)
        bounds = [float(value) for value in axis.values]
        return distributions.FloatDistribution(*bounds, log=bounds[0] > 0)

    def _text(self, name: str, value: Any) -> str:
        axis = self._grid[name]
        if not axis.is_range or axis.is_whole:
            return str(value)
        low, high = map(float, axis.values)
        return f"{min(max(float(f'{value:.{_DIGITS}g}'), low), high):g}"
