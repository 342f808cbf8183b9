"""The trials of a sweep: with which hyper-parameters each method is trained, as many settings of every method."""

import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deep_components.arguments import add_method_options, training_parser
from deep_components.cli import nearest
from deep_components.errors import InputError
from deep_components.experiments.plan import Method
from deep_components.runs.identity import EXECUTION_ARGUMENTS

# Arguments of a training that are no hyper-parameters of its method, beside those of the execution.
_NOT_VARIED = ("help", "loss_type", "train_days", "seed", "time_zone", "init_from", "on_nonfinite", "compact_from")


Grid = Mapping[str, "Axis"]  # option -> what to try of it
# Yields the trials to make next, is sent what each reached on the validation day, None where it failed, and ends.
Rounds = Generator[list["Trial"], Sequence[float | None], None]


@dataclass(frozen=True)
class Axis:
    """An option and the values to try, or the two ends of a range of numbers: of one method, or with None of all."""

    method: str | None
    name: str
    values: tuple[str, ...]
    is_range: bool = False

    def __str__(self) -> str:
        values = ("..." if self.is_range else ",").join(self.values)
        return f"--grid={f'{self.method}:' if self.method else ''}{self.name}={values}"

    @property
    def is_whole(self) -> bool:
        """A range of which both ends are written as whole numbers, so that these alone are tried."""
        return self.is_range and all(value.lstrip("-").isdecimal() for value in self.values)

    @property
    def size(self) -> float:
        """How many values there are."""
        if self.is_whole:
            return int(self.values[1]) - int(self.values[0]) + 1
        return math.inf if self.is_range else len(self.values)

    def value(self, index: int) -> str:
        """One of them, where they can be counted."""
        return str(int(self.values[0]) + index) if self.is_whole else self.values[index]


@dataclass(frozen=True)
class Trial:
    """A method with one setting: option -> value, as the user wrote them."""

    method: Method
    setting: Mapping[str, str]

    def planned(self) -> Method:
        """What to plan: the method's own arguments, then the setting's; its variant names the setting in folders."""
        words = tuple(f"--{name}={value}" for name, value in self.setting.items())
        values = {name: re.sub(r"[^\w.+-]", "-", value) for name, value in self.setting.items()}
        variant = "_".join(f"{name}{value}" for name, value in values.items())
        return replace(self.method, arguments=(*self.method.arguments, *words), variant=variant)


def axis_of(text: str) -> Axis:
    """``tau=20,50`` or, for one method alone, ``lcron:tau=20,50``; a range: ``tau=5...100``. InputError for what is no
    option of a training with a value, names a value twice, or is no range of numbers."""
    names, equals, listed = text.partition("=")
    method, colon, name = names.rpartition(":")
    is_range = "..." in listed
    values = tuple(value.strip() for value in listed.split("..." if is_range else ","))
    axis = Axis(method if colon else None, name.removeprefix("--"), values, is_range)
    known = _options()
    if not equals or not all(axis.values):
        raise InputError(f"--grid={text}: give an option and its values, as --grid=lr=0.005,0.01,0.02")
    if axis.name not in known:
        raise InputError(
            f"--grid={text}: {axis.name!r} is no hyper-parameter of a training{nearest(axis.name, known)}; choose from "
            f"{', '.join(known)}"
        )
    if len(set(axis.values)) < len(axis.values):
        raise InputError(f"--grid={text}: names a value twice; leave one of them out")
    if is_range and not _is_range(values):
        raise InputError(f"--grid={text}: a range has two numbers, the lower one first, as --grid=lr=0.002...0.05")
    return axis


def _is_range(values: Sequence[str]) -> bool:
    try:
        low, high = map(float, values)
    except ValueError:
        return False
    return -math.inf < low < high < math.inf


def _options() -> list[str]:
    """The options that a sweep may vary: those of a training that take one value and change what it ends in."""
    parser = training_parser("")
    add_method_options(parser)
    varied = [action for action in parser._actions if action.dest not in (*EXECUTION_ARGUMENTS, *_NOT_VARIED)]
    return [name[2:] for action in varied if action.nargs != 0 for name in action.option_strings]


def trials_of(
    methods: Sequence[Method], axes: Sequence[Axis], budget: int, seeds: int, sample_seed: int
) -> list[Trial]:
    """The trials, as many of every method: those of the smallest grid among the methods, or as many as ``budget``
    trainings of a method with so many ``seeds`` each allow. Of a larger grid a random part, fixed by ``sample_seed``.

    InputError as of :func:`grids_of` and :func:`count_of`, and for a range.
    """
    if ranges := [axis for axis in axes if axis.is_range]:
        raise InputError(f"{ranges[0]}: a range needs --sampler=optuna; without it list the values to try")
    grids = grids_of(methods, axes)
    count = count_of(grids, budget, seeds)
    return [
        Trial(method, setting) for method in methods for setting in _settings(grids[method.name], count, sample_seed)
    ]


def one_round(trials: list[Trial]) -> Rounds:
    """All at once."""
    yield trials


def grids_of(methods: Sequence[Method], axes: Sequence[Axis]) -> dict[str, Grid]:
    """Each method's grid, by its name. InputError when a method is stated twice, an axis names no method, or an option
    has two axes."""
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--method={twice[0]}: stated twice; give one of them another name, and --loss_type")
    for axis in axes:
        if axis.method not in (None, *names):
            raise InputError(
                f"{axis}: no such method{nearest(str(axis.method), names)}; choose from {', '.join(names)}"
            )
    return {method.name: _grid(method, axes) for method in methods}


def count_of(grids: Mapping[str, Grid], budget: int, seeds: int) -> int:
    """How many settings of each method are tried. InputError when the ``budget`` is less than the ``seeds`` of one."""
    count = int(min(budget // seeds, *map(size_of, grids.values())))
    if count < 1:
        raise InputError(
            f"--budget={budget}: fewer trainings than the {seeds} seeds of one setting; give at least {seeds}, or "
            "fewer --seeds"
        )
    return count


def size_of(grid: Grid) -> float:
    """How many settings a grid has."""
    return math.prod(axis.size for axis in grid.values())


def _grid(method: Method, axes: Sequence[Axis]) -> dict[str, Axis]:
    grid: dict[str, Axis] = {}
    for axis in axes:
        if axis.method not in (None, method.name):
            continue
        if axis.name in grid:
            raise InputError(f"{axis}: {axis.name} of {method.name} has values already; name all of them in one --grid")
        grid[axis.name] = axis
    return grid


def _settings(grid: Grid, count: int, sample_seed: int) -> list[dict[str, str]]:
    """``count`` of the grid's settings, in its order; methods of one grid get the same, larger counts these too."""
    size = int(size_of(grid))
    generator, chosen = np.random.default_rng(sample_seed), set(range(size) if count == size else ())
    while len(chosen) < count:
        chosen.add(int(generator.integers(size)))
    return [setting_at(grid, index) for index in sorted(chosen)]


def setting_at(grid: Grid, index: int) -> dict[str, str]:
    """The setting with this number, in the grid's order."""
    shape = [int(axis.size) for axis in grid.values()]
    position = map(int, np.unravel_index(index, shape)) if shape else ()
    return {name: axis.value(at) for (name, axis), at in zip(grid.items(), position, strict=True)}
