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

from torch import nn

from deep_components.arguments import check_validation, choose_device, training_parser
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.days import hold_out_last, test_day, training_days
from deep_components.dataset.loader import steps_of
from deep_components.dataset.log import Log, open_log, zone_of
from deep_components.errors import InputError
from deep_components.runs.identity import UNTRAINED_ARGUMENTS, first_difference
from deep_components.training.config import check_not_seen, run_config
from deep_components.training.tensorboard import check_installed

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Method:
    """One row of a table: its name, which is its script's, and the hyper-parameters the script states."""

    name: str
    arguments: tuple[str, ...]
    variant: str = ""  # what sets its runs apart from others of the method


@dataclass(frozen=True)
class Part:
    """Training on ``train_days``, then a test on one day. A streaming run has many parts, others have one."""

    train_days: tuple[str, ...]  # as the training is told them: with --validate_every it trains on all but the last
    test_day: str


@dataclass(frozen=True)
class Run:
    """All that is needed to make one run, on this machine or another that sees the same folders."""

    name: str  # of the row, e.g. "lcron_tau_1"
    variant: str  # what sets this run apart from the method's main one, e.g. "lr0.001_bs512", "streaming"; or ""
    folder: Path  # of its results
    data_dir: Path
    commands: tuple[str, str]  # modules that train and evaluate
    training: tuple[str, ...]  # its arguments but the seed, folders and days
    evaluation: tuple[str, ...]  # its arguments but folders and day
    config: Mapping[str, Any]  # what its config.json will say, as far as it makes the run this one (runs/identity.py)
    parts: tuple[Part, ...]  # one, or for a streaming run one a test day
    checksums: Mapping[str, str]  # of each day's content
    steps: int  # of the whole training
    streaming: bool
    days_named: bool  # the training is told each part's days, else it takes the user's or the log's usual ones
    cwd: Path  # where relative paths in the arguments start
    test_random_items: int | None = None  # of each request in the tests

    @property
    def seed(self) -> int:
        return int(self.config["arguments"]["seed"])

    @property
    def epochs(self) -> int:
        return int(self.config["arguments"]["epochs"])

    @property
    def title(self) -> str:
        return f"{self.name}{f' ({self.variant})' if self.variant else ''}, seed {self.seed}"

    def trained_days(self, part: Part) -> tuple[str, ...]:
        """The days that the part really trains on."""
        return part.train_days[:-1] if self.config.get("validation_day") else part.train_days

    def train_command(self, part: Part, resume: bool) -> list[str]:
        where = [f"--seed={self.seed}", f"--data_dir={self.data_dir}", f"--output_dir={self.folder}"]
        days = [f"--train_days={','.join(part.train_days)}"] if self.days_named else []
        return [self.commands[0], *self.training, *where, *days, *(["--resume"] if resume else [])]

    def test_command(self, part: Part) -> list[str]:
        where = [f"--data_dir={self.data_dir}", f"--output_dir={self.folder}", f"--test_day={part.test_day}"]
        return [self.commands[1], *self.evaluation, *where]


def methods_of(argv: Sequence[str]) -> list[Method]:
    """The methods of ``--method=NAME hyper-parameters --method=NAME hyper-parameters ...``."""
    starts = [index for index, word in enumerate(argv) if word.startswith("--method=")]
    parts = [argv[start:end] for start, end in pairwise([*starts, len(argv)])]
    return [Method(first.removeprefix("--method="), tuple(rest)) for first, *rest in parts]


def schedule(
    log: Log, train_days: Sequence[str] | None, day: str | None, validation: bool = False, streaming: bool = False
) -> tuple[Part, ...]:
    """The days that train and the day that tests: the user's, or the main protocol's for None.

    With ``validation`` the last training day becomes the test day, and the test day is not touched; with ``streaming``
    every day from the second on tests what was trained on all days before it.
    """
    days = training_days(log, train_days)
    if validation:
        if day is not None:
            raise InputError(f"--validation tests on the last training day; leave out it or --test_day={day}")
        if (reserved := test_day(log, None)) in days:
            raise InputError(f"--train_days names {reserved}, the day of the tests, which --validation leaves alone; "
                             "leave it out of them")  # fmt: skip
        days, tested = hold_out_last(log, days, "--validation")
    else:
        tested = test_day(log, day)
    if not streaming:
        return (Part(tuple(days), tested),)
    # Where the log holds back several days, those before the tested one are in the stream too.
    between = [name for name in log.days(named=False) if days[-1] < name < tested] if train_days is None else []
    stream = [*days, *between, tested]
    if any(later <= earlier for earlier, later in pairwise(stream)):
        raise InputError(
            f"--train_days={','.join(days)} --test_day={tested}: a streaming run takes its days in order, each once, "
            "and the test day after all of them"
        )
    return tuple(Part(tuple(stream[:count]), stream[count]) for count in range(1, len(stream)))


def make_plan(args: argparse.Namespace, methods: Sequence[Method], training: Sequence[str]) -> list[Run]:
    """All runs, seed by seed, so that a first table is there early; the untrained cascade, the same for all methods
    of a seed, is among them once. ``args`` are run_experiments', ``training`` the user's for the training.

    Raises InputError when the data or an argument cannot be used, or two runs would share a folder. Caches are built
    here, before several processes want them.
    """
    words, commands = parse_training(args, methods, training)
    log = open_log(args.data_dir)
    template, opened = _template(args, commands[0][0], log)
    rows: list[Run] = []
    for method, given, (parsed, loss) in zip(methods, words, commands, strict=True):
        names, held_out = list(template.parts[-1].train_days), None
        if parsed.validate_every and parsed.epochs:
            names, held_out = hold_out_last(log, names, "--validate_every")
        days = [opened[day] for day in names]
        config = run_config(args.cascade, parsed, loss, log, names, days, opened[held_out] if held_out else None)
        if args.validation:
            check_not_seen(opened[template.parts[-1].test_day], config.get("init_from_days", {}))
        steps = parsed.epochs * sum(steps_of(day.with_history(parsed.seq_len), parsed.batch_size) for day in days)
        run = replace(template, name=method.name, training=tuple(given), config=config, steps=steps)
        if args.untrained and parsed.epochs:
            rows.append(_untrained(args, run, parsed, commands[0][0]))
        variant = "_".join(word for word in (args.variant, method.variant, template.variant) if word)
        rows.append(replace(run, variant=variant, folder=_folder(args, method.name, variant)))
    runs: dict[Path, Run] = {}
    for seed in args.seeds:
        for row in rows:
            run = replace(row, folder=row.folder / f"seed{seed}", config=_with(row.config, seed=seed))
            if first_difference(runs.setdefault(run.folder, run).config, run.config) is not None:
                raise InputError(f"{run.folder}: two rows of the table, of different arguments, would be made there")
    return list(runs.values())


def parse_training(
    args: argparse.Namespace, methods: Sequence[Method], training: Sequence[str]
) -> tuple[list[list[str]], list[tuple[argparse.Namespace, nn.Module]]]:
    """Of every method its arguments, and these parsed with its loss. A mistake in them is found before a log is read or
    anything is trained: InputError, or SystemExit from the training command's parser."""
    words = [[*_divided(args, method), *training] for method in methods]
    commands = [_parsed(args, given) for given in words]
    for parsed, _ in commands:
        if args.engine == "local":  # a cluster's nodes have devices of their own
            choose_device(parsed)
        check_installed(parsed.tensorboard)
        check_validation(parsed)
        if args.streaming and parsed.validate_every:
            raise InputError("--streaming tests each day anyway; leave out --validate_every")
    return words, commands


def _with(config: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**config, "arguments": config["arguments"] | arguments}


def _parsed(args: argparse.Namespace, words: Sequence[str]) -> tuple[argparse.Namespace, nn.Module]:
    """The arguments as the training command will parse them, and its loss. A mistake ends the program as it would end
    the command, but before anything is trained."""
    command = importlib.import_module(args.train)
    folders = [f"--data_dir={args.data_dir}", f"--output_dir={args.output_dir or args.runs_dir}"]
    parsed = command.parse_args([*words, *folders])
    loss = command.build_loss(parsed)
    vars(parsed).pop("cascade", None)  # as run_train does: the run's config has it whole
    return parsed, loss


def _divided(args: argparse.Namespace, method: Method) -> list[str]:
    """The script's hyper-parameters with their batch size divided, at least 1."""
    if args.batch_divisor == 1:
        return list(method.arguments)
    batch_size = _parsed(args, method.arguments)[0].batch_size
    return [*method.arguments, f"--batch_size={max(1, batch_size // args.batch_divisor)}"]


def _untrained(args: argparse.Namespace, run: Run, parsed: argparse.Namespace, first: argparse.Namespace) -> Run:
    """The untrained cascade beside a run. Its folder is the same for all methods, another one for other sizes; in an
    --output_dir of the user's, that of the ``first`` method's sizes is simply "untrained"."""
    usual = vars(first) if args.output_dir else {n: training_parser("").get_default(n) for n in UNTRAINED_ARGUMENTS}
    differing = [name for name in UNTRAINED_ARGUMENTS if getattr(parsed, name) != usual[name]]
    values = [f"{name}{str(getattr(parsed, name)).replace('/', '-')}" for name in differing]
    folder = _folder(args, "_".join([UNTRAINED, *values]), run.variant)
    words, config = (*run.training, "--epochs=0"), _with(run.config, epochs=0)
    return replace(run, name=UNTRAINED, folder=folder, training=words, config=config, steps=0)


def _template(args: argparse.Namespace, parsed: argparse.Namespace, log: Log) -> tuple[Run, dict[str, DayCache]]:
    """What all runs of a plan have in common, and its opened days."""
    parts = schedule(log, parsed.train_days, args.test_day, args.validation, args.streaming)
    days = sorted({*parts[-1].train_days, *(part.test_day for part in parts)})
    opened = {day: log.open_day(day, args.cascade, parsed.cache_dir, parsed.time_zone) for day in days}
    _check_no_copy(parts, {day: cached.checksum for day, cached in opened.items()})
    both = {name: getattr(parsed, name) for name in ("cache_dir", "cuda", "device")}
    both["time_zone"] = zone_of(log, parsed.time_zone)
    evaluation = [*args.cascade_words, *(f"--{name}={value}" for name, value in both.items() if value is not None)]
    evaluation += [] if parsed.compile else ["--no-compile"]
    evaluation += ["--save_scores"] if args.save_scores else []
    evaluation += [f"--test_random_items={args.test_random_items}"] if args.test_random_items else []
    template = Run(
        name="",
        variant="_".join(mode for mode in ("validation", "streaming") if getattr(args, mode)),
        folder=Path(),
        data_dir=args.data_dir.absolute(),
        commands=(args.train, args.evaluate),
        training=(),
        evaluation=tuple(evaluation),
        config={},
        parts=parts,
        checksums={day: cached.checksum for day, cached in opened.items()},
        steps=0,
        streaming=args.streaming,
        days_named=args.validation or args.streaming,
        cwd=Path.cwd(),
        test_random_items=args.test_random_items,
    )
    return template, opened


def _check_no_copy(parts: Sequence[Part], checksums: Mapping[str, str]) -> None:
    """InputError when a test day is a copy of one of its training days under another name."""
    for part in parts:
        for day in part.train_days:
            if day != part.test_day and checksums[day] == checksums[part.test_day]:
                raise InputError(
                    f"day {part.test_day}, which tests, has the same requests as day {day}, which trains; leave one of "
                    "them out with --train_days or --test_day"
                )


def _folder(args: argparse.Namespace, name: str, variant: str) -> Path:
    """Where the runs of a row lie: in --output_dir itself for the one method of a script."""
    row = f"{name}_{variant}" if variant else name
    if args.output_dir is None:
        return args.runs_dir.absolute() / args.setting / row / args.data_dir.resolve().name
    if not (args.several or args.by_setting):
        row = name if name.startswith(UNTRAINED) else ""
    return args.output_dir.absolute() / (args.setting if args.by_setting else "") / row
