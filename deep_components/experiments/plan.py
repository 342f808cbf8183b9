"""A plan: which runs to make, each with its folder, the days it trains and tests on, and the arguments of its commands.

Methods come as the bash scripts state them (a name and hyper-parameters); the user's arguments come after them and win.
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from deep_components.arguments import training_parser
from deep_components.cascade import SETTINGS
from deep_components.dataset.clock import DEFAULT_TIME_ZONE
from deep_components.dataset.days import test_day, training_days
from deep_components.dataset.log import Log, open_log
from deep_components.errors import InputError
from deep_components.runs.identity import UNTRAINED_ARGUMENTS, first_difference
from deep_components.training.config import run_config

UNTRAINED = "untrained"


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
class Run:
    """All that is needed to make one run, on this machine or another that sees the same folders.

    Args:
        name: the row's name, e.g. "lcron_tau_1".
        variant: what sets this run apart from the method's main one, e.g. "lr0.001_bs512", "streaming"; or "".
        folder: of its results.
        data_dir: the log.
        commands: modules that train and evaluate.
        training: arguments of the training but the seed, folders and days.
        evaluation: arguments of the evaluation but folders and day.
        config: what its config.json will say, as far as it makes the run this one (runs/identity.py).
        parts: one, or for a streaming run one a test day.
        checksums: of each day's content.
        steps: of the whole training.
        days_named: the training is told its days, else it takes the log's usual ones.
        cwd: where relative paths in the arguments start.
    """

    name: str
    variant: str
    folder: Path
    data_dir: Path
    commands: tuple[str, str]
    training: tuple[str, ...]
    evaluation: tuple[str, ...]
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    checksums: Mapping[str, str]
    steps: int
    streaming: bool
    days_named: bool
    cwd: Path

    @property
    def seed(self) -> int:
        return int(self.config["arguments"]["seed"])

    @property
    def epochs(self) -> int:
        return int(self.config["arguments"]["epochs"])

    @property
    def title(self) -> str:
        return f"{self.name}{f' ({self.variant})' if self.variant else ''}, seed {self.seed}"

    def train_command(self, part: Part, resume: bool) -> list[str]:
        where = [f"--seed={self.seed}", f"--data_dir={self.data_dir}", f"--output_dir={self.folder}"]
        days = [f"--train_days={','.join(part.train_days)}"] if self.days_named else []
        return [self.commands[0], *self.training, *where, *days, *(["--resume"] if resume else [])]

    def test_command(self, part: Part) -> list[str]:
        where = [f"--data_dir={self.data_dir}", f"--output_dir={self.folder}", f"--test_day={part.test_day}"]
        return [self.commands[1], *self.evaluation, *where]


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


def schedule(
    log: Log, train_days: Sequence[str] | None, day: str | None, validation: bool = False, streaming: bool = False
) -> tuple[Part, ...]:
    """The days that train and the day that tests.

    Args:
        train_days, day: the user's, or None for the main protocol's.
        validation: the last training day becomes the test day; the test day is not touched.
        streaming: every day from the second on tests what was trained on all days before it.
    """
    days = training_days(log, train_days)
    if validation:
        if day is not None:
            raise InputError(f"--validation tests on the last training day; leave out it or --test_day={day}")
        if len(days) < 2:
            raise InputError(f"{log.folder}: --validation wants two training days or more, and there is only {days[0]}")
        days, tested = days[:-1], days[-1]
    else:
        tested = test_day(log, day)
    if not streaming:
        return (Part(tuple(days), tested),)
    stream = [*days, tested]
    if any(later <= earlier for earlier, later in pairwise(stream)):
        raise InputError(
            f"--train_days={','.join(days)} --test_day={tested}: a streaming run takes its days in order, each once, "
            "and the test day after all of them"
        )
    return tuple(Part(tuple(stream[:count]), stream[count]) for count in range(1, len(stream)))


def make_plan(args: argparse.Namespace, methods: Sequence[Method], training: Sequence[str]) -> list[Run]:
    """All runs, seed by seed, so that a first table is there early; the untrained cascade, the same for all methods
    of a seed, is among them once.

    Raises InputError when the data or an argument cannot be used, or two runs would share a folder. Caches are built
    here, before several processes want them.
    """
    mode = "_".join(mode for mode in ("validation", "streaming") if getattr(args, mode))
    variant = "_".join(word for word in (args.variant, mode) if word)
    shared = _shared_arguments(args)
    log = open_log(args.data_dir)
    rows = []
    first_untrained = None
    template, opened = _template(args, log, shared)
    for method in methods:
        words = [*_divided(args, method), *training, *shared]
        parsed, loss = _parsed(args, words)
        trained = [opened[day] for day in template.parts[-1].train_days]
        config = run_config(SETTINGS[args.setting], parsed, loss, log, template.parts[-1].train_days, trained)
        steps = parsed.epochs * sum(len(day) // parsed.batch_size for day in trained)
        untrained = _untrained_name(parsed)
        first_untrained = first_untrained or untrained
        # In an --output_dir of the user's, the cascade of the first method's sizes is simply "untrained".
        folder = UNTRAINED if args.output_dir and untrained == first_untrained else untrained
        if args.untrained and parsed.epochs:
            before = config | {"arguments": config["arguments"] | {"epochs": 0}}
            rows.append((UNTRAINED, folder, mode, before, [*words, "--epochs=0"], 0))
        rows.append((method.name, method.name, variant, config, words, steps))
    runs: dict[Path, Run] = {}
    for seed in args.seeds:
        for name, row, run_variant, config, words, steps in rows:
            run = replace(
                template,
                name=name,
                variant=run_variant,
                folder=_folder(args, row, run_variant) / f"seed{seed}",
                training=tuple(words),
                config=config | {"arguments": config["arguments"] | {"seed": seed}},
                steps=steps,
            )
            if first_difference(runs.setdefault(run.folder, run).config, run.config) is not None:
                raise InputError(f"{run.folder}: two rows of the table, of different arguments, would be made there")
    return list(runs.values())


def _shared_arguments(args: argparse.Namespace) -> list[str]:
    """Those that go to both the training and the evaluation."""
    given = {name: getattr(args, name) for name in ("cache_dir", "time_zone", "cuda", "device")}
    shared = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if args.compile is not None:
        shared.append("--compile" if args.compile else "--no-compile")
    return shared


def _parsed(args: argparse.Namespace, words: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments as the training command will parse them, and its loss. A mistake ends the program as it would end
    the command, but before anything is trained."""
    command = importlib.import_module(args.train)
    folders = [f"--data_dir={args.data_dir}", f"--output_dir={args.output_dir or args.runs_dir}"]
    parsed = command.parse_args([*words, *folders])
    return parsed, command.build_loss(parsed)


def _divided(args: argparse.Namespace, method: Method) -> list[str]:
    """The script's hyper-parameters with their batch size divided, at least 1."""
    if args.batch_divisor == 1:
        return list(method.arguments)
    batch_size = _parsed(args, method.arguments)[0].batch_size
    return [*method.arguments, f"--batch_size={max(1, batch_size // args.batch_divisor)}"]


def _untrained_name(parsed: argparse.Namespace) -> str:
    """The folder of an untrained cascade: the same for all methods, another one for other sizes."""
    usual = training_parser("")
    given = {name: getattr(parsed, name) for name in UNTRAINED_ARGUMENTS}
    differing = [name for name, value in given.items() if value != usual.get_default(name)]
    return "_".join([UNTRAINED, *(f"{name}{str(given[name]).replace('/', '-')}" for name in differing)])


def _template(args: argparse.Namespace, log: Log, shared: Sequence[str]) -> tuple[Run, dict[str, Any]]:
    """What all runs of a plan have in common, and its opened days."""
    parts = schedule(log, args.train_days, args.test_day, args.validation, args.streaming)
    zone = args.time_zone or DEFAULT_TIME_ZONE
    cache = Path(args.cache_dir) if args.cache_dir else None
    days = sorted({*parts[-1].train_days, *(part.test_day for part in parts)})
    opened = {day: log.open_day(day, SETTINGS[args.setting], cache, zone) for day in days}
    template = Run(
        name="",
        variant="",
        folder=Path(),
        data_dir=args.data_dir.absolute(),
        commands=(args.train, args.evaluate),
        training=(),
        evaluation=(*shared, *(["--save_scores"] if args.save_scores else [])),
        config={},
        parts=parts,
        checksums={day: cached.checksum for day, cached in opened.items()},
        steps=0,
        streaming=args.streaming,
        days_named=args.train_days is not None or args.validation or args.streaming,
        cwd=Path.cwd(),
    )
    return template, opened


def _folder(args: argparse.Namespace, name: str, variant: str) -> Path:
    """Where the runs of a row lie: in --output_dir itself for the one method of a script."""
    if args.output_dir is not None and not (args.several or args.by_setting):
        return args.output_dir.absolute() / (name if name.startswith(UNTRAINED) else "")
    row = f"{name}_{variant}" if variant else name
    if args.output_dir is not None:
        return args.output_dir.absolute() / (args.setting if args.by_setting else "") / row
    return args.runs_dir.absolute() / args.setting / row / args.data_dir.resolve().name
