"""A plan: which runs to make, each with its folder, the days it trains and tests on, and the arguments of its commands.

Methods come as the bash scripts state them (a name and hyper-parameters); the user's arguments come after them and win.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_components.arguments import (
    METHOD_OPTIONS,
    UNTRAINED_ARGUMENTS,
    WHEREABOUTS,
    add_method_options,
    training_parser,
)
from deep_components.dataset.days import test_day, training_days
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.errors import InputError

UNTRAINED = "untrained"

# Arguments of the training that do not make it another run: finished ones stay when the failed one beside them is made
# again with steps left out that are not finite.
_NOT_THE_RUN = (*WHEREABOUTS, "train_days", "on_nonfinite")


@dataclass(frozen=True)
class Method:
    """One row of a table: its name, which is its script's, and the hyper-parameters the script states."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Training on ``train_days``, then a test on one day. A streaming run has many parts, others have one."""

    train_days: tuple[str, ...]
    test_day: str


@dataclass(frozen=True)
class Data:
    """The log of a run: where it lies, what it is, and for each day its SHA-256 and number of requests."""

    folder: Path
    origin: str
    checksums: Mapping[str, str]
    requests: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """All that is needed to make one run, on this machine or another that sees the same folders.

    Args:
        name: the row's name, e.g. "lcron_tau_1".
        variant: what sets this run apart from the method's main one, e.g. "lr0.001_bs512", "streaming"; or "".
        commands: modules that train and evaluate.
        training: arguments of the training but the seed, folders and days.
        evaluation: arguments of the evaluation but folders and day.
        identity: the training's arguments as parsed, that make it this run and no other.
        parts: one, or for a streaming run one a test day.
        days_named: the training is told its days, else it takes the log's usual ones.
        cwd: where relative paths in the arguments start.
    """

    name: str
    variant: str
    setting: str
    seed: int
    folder: Path
    commands: tuple[str, str]
    training: tuple[str, ...]
    evaluation: tuple[str, ...]
    identity: Mapping[str, Any]
    parts: tuple[Part, ...]
    data: Data
    streaming: bool
    days_named: bool
    cwd: Path

    @property
    def title(self) -> str:
        return f"{self.name}{f' ({self.variant})' if self.variant else ''}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        if not self.identity["epochs"]:
            return 0
        days = self.parts[-1].train_days
        return self.identity["epochs"] * sum(self.data.requests[day] // self.identity["batch_size"] for day in days)

    def train_command(self, part: Part, resume: bool) -> list[str]:
        where = [f"--seed={self.seed}", f"--data_dir={self.data.folder}", f"--output_dir={self.folder}"]
        days = [f"--train_days={','.join(part.train_days)}"] if self.days_named else []
        return [self.commands[0], *self.training, *where, *days, *(["--resume"] if resume else [])]

    def test_command(self, part: Part) -> list[str]:
        where = [f"--data_dir={self.data.folder}", f"--output_dir={self.folder}", f"--test_day={part.test_day}"]
        return [self.commands[1], *self.evaluation, *where]


def parse_training(arguments: Sequence[str], command: str) -> dict[str, Any]:
    """The training's arguments with their defaults, as JSON would hold them; "others" are those that only the method's
    own command knows. A mistake ends the program as argparse does: a sentence, exit code 2."""
    parser = training_parser("")
    parser.prog = command
    add_method_options(parser)
    required = ["--loss_type=", "--data_dir=", "--output_dir="]
    known, others = parser.parse_known_args([*required, *arguments])
    return json.loads(json.dumps(vars(known) | {"others": others}, default=str))


def divide_batch(arguments: Sequence[str], divisor: int) -> list[str]:
    """The hyper-parameters with their batch size divided, at least 1."""
    batch_size = parse_training(arguments, "")["batch_size"]
    return [*arguments, f"--batch_size={max(1, batch_size // divisor)}"] if divisor > 1 else list(arguments)


def identity(arguments: Mapping[str, Any], streaming: bool) -> dict[str, Any]:
    """What makes a training this one and no other; an untrained cascade depends on few of its arguments."""
    if not arguments["epochs"]:
        return {name: arguments[name] for name in ("seed", "epochs", *UNTRAINED_ARGUMENTS)} | {"streaming": streaming}
    return {name: value for name, value in arguments.items() if name not in _NOT_THE_RUN} | {"streaming": streaming}


def optional(name: str) -> bool:
    """Whether None in an identity stands for the method's own default."""
    return name in METHOD_OPTIONS


def untrained_name(arguments: Mapping[str, Any]) -> str:
    """The folder of an untrained cascade: the same for all methods, another one for other sizes."""
    usual = parse_training([], "")
    differing = [name for name in UNTRAINED_ARGUMENTS if arguments[name] != usual[name]]
    return "_".join([UNTRAINED, *(f"{name}{str(arguments[name]).replace('/', '-')}" for name in differing)])


def schedule(
    data_dir: Path,
    train_days: Sequence[str] | None,
    day: str | None,
    validation: bool = False,
    streaming: bool = False,
) -> tuple[Part, ...]:
    """The days that train and the day that tests.

    Args:
        train_days, day: the user's, or None for the main protocol's.
        validation: the last training day becomes the test day; the test day is not touched.
        streaming: every day from the second on tests what was trained on all days before it.
    """
    days = training_days(data_dir, train_days)
    if validation:
        if day is not None:
            raise InputError(f"--validation tests on the last training day; leave out it or --test_day={day}")
        if len(days) < 2:
            raise InputError(f"{data_dir}: --validation wants two training days or more, and there is only {days[0]}")
        days, tested = days[:-1], days[-1]
    else:
        tested = test_day(data_dir, day)
    if not streaming:
        return (Part(tuple(days), tested),)
    if tested in days:
        raise InputError(f"--test_day={tested} is a training day; in a streaming run it comes after all of them")
    stream = [*days, tested]
    return tuple(Part(tuple(stream[:place]), stream[place]) for place in range(1, len(stream)))


def read_data(data_dir: Path, days: Mapping[str, tuple[str, int]]) -> Data:
    """The log in ``data_dir``; ``days`` are its opened days: checksum and number of requests."""
    return Data(
        data_dir,
        recflow.read_origin(data_dir),
        {day: checksum for day, (checksum, _) in days.items()},
        {day: requests for day, (_, requests) in days.items()},
    )


def methods_of(argv: Sequence[str]) -> list[Method]:
    """The methods of ``--method=NAME hyper-parameters --method=NAME hyper-parameters ...``."""
    methods: list[Method] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name == "--method" and equals:
            methods.append(Method(value, ()))
        else:
            methods[-1] = Method(methods[-1].name, (*methods[-1].arguments, argument))
    return methods
