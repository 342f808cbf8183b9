"""The trials of a sweep: with which hyper-parameters each method is trained, as many settings of every method."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deep_components.arguments import add_method_options, training_parser
from deep_components.cli import nearest
from deep_components.errors import InputError
from deep_components.experiments.plan import Method
from deep_components.runs.identity import EXECUTION_ARGUMENTS

# Arguments of a training that are no hyper-parameters of its method, beside those of the execution.
_NOT_VARIED = ("help", "loss_type", "train_days", "seed", "time_zone", "init_from", "on_nonfinite", "compact_from")


@dataclass(frozen=True)
class Axis:
    """An option and the values to try: of one method, or with None of all."""

    method: str | None
    name: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"--grid={f'{self.method}:' if self.method else ''}{self.name}={','.join(self.values)}"


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
    """``tau=20,50`` or, for one method alone, ``lcron:tau=20,50``. InputError for what is no option of a training with
    a value, or names a value twice."""
    names, equals, listed = text.partition("=")
    method, colon, name = names.rpartition(":")
    axis = Axis(method if colon else None, name.removeprefix("--"), tuple(value.strip() for value in listed.split(",")))
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
    return axis


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

    InputError when a method is stated twice, an axis names no method, an option has two axes, or the budget is less
    than one setting.
    """
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--method={twice[0]}: stated twice; give one of them another name, and --loss_type")
    for axis in axes:
        if axis.method not in (None, *names):
            raise InputError(
                f"{axis}: no such method{nearest(str(axis.method), names)}; choose from {', '.join(names)}"
            )
    grids = {method.name: _grid(method, axes) for method in methods}
    sizes = {name: math.prod(map(len, grid.values())) for name, grid in grids.items()}
    count = min(budget // seeds, *sizes.values())
    if count < 1:
        raise InputError(
            f"--budget={budget}: fewer trainings than the {seeds} seeds of one setting; give at least {seeds}, or "
            "fewer --seeds"
        )
    return [
        Trial(method, setting)
        for method in methods
        for setting in _settings(grids[method.name], sizes[method.name], count, sample_seed)
    ]


def _grid(method: Method, axes: Sequence[Axis]) -> dict[str, tuple[str, ...]]:
    """Option -> values, of a method."""
    grid: dict[str, tuple[str, ...]] = {}
    for axis in axes:
        if axis.method not in (None, method.name):
            continue
        if axis.name in grid:
            raise InputError(f"{axis}: {axis.name} of {method.name} has values already; name all of them in one --grid")
        grid[axis.name] = axis.values
    return grid


def _settings(grid: Mapping[str, Sequence[str]], size: int, count: int, sample_seed: int) -> list[dict[str, str]]:
    """``count`` of the grid's settings, in its order; methods of one grid get the same, larger counts these too."""
    generator, chosen = np.random.default_rng(sample_seed), set(range(size) if count == size else ())
    while len(chosen) < count:
        chosen.add(int(generator.integers(size)))
    shape = [len(values) for values in grid.values()]
    positions = [map(int, np.unravel_index(index, shape)) if shape else () for index in sorted(chosen)]
    return [
        {name: values[at] for (name, values), at in zip(grid.items(), position, strict=True)} for position in positions
    ]
