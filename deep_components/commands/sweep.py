"""Choose hyper-parameters: train every method with as many settings of a grid, compare them on the validation day.

    lcron sweep --cascade=two_stage --data_dir=LOG --output_dir=D --methods=lcron,arf_v2 \\
        --grid=lr=0.005,0.01,0.02 --grid=lcron:tau=20,50 --grid=arf_v2:tau=100,200 --budget=6

With --sampler=optuna each method's next setting is proposed by Optuna from what those before it reached, and an option
may have a range, --grid=lr=0.002...0.05, tried on a log scale where both ends are above 0.

The validation day is the last training day, which is not trained on (--validation of `lcron experiments`); the test day
is not read. Trainings are kept in D as those of `lcron experiments` are, whose arguments this command takes too: the
same command goes on where it was stopped. It writes D/sweep.json, and prints the table of all settings and the command
that tests each method's best one. With --test_seeds=30,31 it does that itself, in the folder D_test, and prints its
table; `lcron table --kind=choices D` compares what was chosen.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deep_components import run_experiments
from deep_components.arguments import positive_int
from deep_components.cli import Parser, run_command, write_out
from deep_components.errors import InputError
from deep_components.experiments.execution import Outcome
from deep_components.experiments.optuna_search import ends_of, load_optuna, optuna_rounds
from deep_components.experiments.plan import Method, Run, make_plan, parse_training
from deep_components.experiments.sweep import Rounds, Trial, axis_of, count_of, grids_of, one_round, trials_of
from deep_components.files import write_json
from deep_components.reporting.sweep import sweep_document
from deep_components.reporting.tables import text
from deep_components.runs.folder import SWEEP_FILE, tested_folder
from deep_components.runs.records import read_folder

SEED = "--seeds=30"

_NO_PLACE = {
    "streaming": "the validation day alone counts",
    "test_day": "the test day is not read",
    "run_list": "sweep.json lists the runs",
}

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other arguments are those of `lcron experiments`, --output_dir among them, which must be given.",
    )
    parser.add_argument("--grid", action="append", required=True, metavar="[METHOD:]OPTION=V,V",
                        help="values of a training's option to try, with all values of the others; of all methods, or "
                        "of one; once for each option")  # fmt: skip
    parser.add_argument("--budget", type=positive_int, required=True, metavar="N",
                        help="trainings of each method at most; of a larger grid a random part is tried")  # fmt: skip
    parser.add_argument("--sampler", choices=("random", "optuna"), default="random",
                        help="how the settings are chosen where there are more than the budget allows: at random "
                        "(default), or by Optuna (pip install .[optuna]), each after those before it")  # fmt: skip
    parser.add_argument("--sample_seed", type=int, default=0, help="of that choice (default 0)")
    parser.add_argument("--test_seeds", type=run_experiments.seed_list, default=[], metavar="SEED,SEED",
                        help="then train each method's best setting on all training days with these seeds, and test "
                        "it")  # fmt: skip
    return parser


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace, list[Method], list[str]]:
    """The sweep's own arguments; and those of run_experiments, the methods, and the user's for the training."""
    ours, users = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    first = next((index for index, word in enumerate(ours) if word.startswith("--method=")), len(ours))
    own, others = _parser().parse_known_args([*ours[:first], *users])
    runner = ["--validation", "--no-untrained", SEED, *others, *ours[first:]]
    args, methods, training = run_experiments.parse_args(runner)
    for name, why in _NO_PLACE.items():
        if getattr(args, name):
            raise InputError(f"--{name} has no place in a sweep, where {why}; leave it out")
    if args.output_dir is None:
        raise InputError("--output_dir is missing; name a folder for the sweep's runs")
    tested_folder(args.output_dir)
    args.several = True  # each setting has a folder of its own
    own.axes = [axis_of(grid) for grid in own.grid]
    given = {word.partition("=")[0] for word in training}
    for axis in own.axes:
        if f"--{axis.name}" in given:
            raise InputError(f"--{axis.name} would take the place of the values of {axis}; leave out one of them")
    return own, args, methods, training


def _search(own: argparse.Namespace, methods: Sequence[Method], seeds: int) -> tuple[list[Trial], int, Rounds]:
    """Trials with all that may be tried, to be checked before any is made; how many of each method are tried; and the
    rounds in which they are."""
    if own.sampler == "random":
        trials = trials_of(methods, own.axes, own.budget, seeds, own.sample_seed)
        return trials, len(trials) // len(methods), one_round(trials)
    load_optuna()
    grids = grids_of(methods, own.axes)
    count = count_of(grids, own.budget, seeds)
    return ends_of(methods, grids), count, optuna_rounds(methods, grids, count, own.sample_seed)


def _check_different(trials: Sequence[Trial], runs: Sequence[Run]) -> None:
    """InputError when two settings of a method are the same, as 0.01 and 0.010 are: the budget would not be equal."""
    seen: dict[tuple[str, str], Trial] = {}
    for trial, run in zip(trials, runs, strict=False):  # the first seed's
        key = run.name, str(run.config["arguments"])
        if key in seen:
            one, other = (" ".join(f"--{n}={v}" for n, v in t.setting.items()) for t in (seen[key], trial))
            raise InputError(f"--grid: {one} and {other} of {run.name} are the same; leave one of them out")
        seen[key] = trial


def _trial(trial: Trial, outcomes: Sequence[Outcome], folder: Path) -> dict[str, Any]:
    """What sweep.json says of a trial."""
    found = {outcome.run.seed: read_folder(outcome.run.folder).metrics for outcome in outcomes if outcome.done}
    values = {str(seed): metrics[_metric(metrics)] for seed, metrics in found.items()}
    complete = len(values) == len(outcomes) and None not in values.values()
    recalls = list(values.values()) if complete else []
    errors = dict.fromkeys(f"{outcome.run.title}: {outcome.error}" for outcome in outcomes if not outcome.done)
    if None in values.values():
        errors["no request of the validation day has ground truth"] = None
    return {
        "method": trial.method.name,
        "arguments": dict(trial.setting),
        "values": values,
        "mean": float(np.mean(recalls)) if recalls else None,
        "std": float(np.std(recalls, ddof=1)) if len(recalls) > 1 else None,
        "folders": [str(outcome.run.folder.relative_to(folder)) for outcome in outcomes],
        "error": "; ".join(errors),
        "chosen": False,
        "tested": [],
    }


def _metric(metrics: Mapping[str, Any]) -> str:
    return next(name for name in metrics if name.startswith("joint_recall@"))


def _choose(trials: Sequence[dict[str, Any]]) -> None:
    """Mark the best trial of each method; of equal ones the first."""
    for name in dict.fromkeys(trial["method"] for trial in trials):
        complete = [trial for trial in trials if trial["method"] == name and trial["mean"] is not None]
        if complete:
            max(complete, key=lambda trial: trial["mean"])["chosen"] = True


def _command(
    args: argparse.Namespace, methods: Sequence[Method], training: Sequence[str], trials: Sequence[Mapping[str, Any]]
) -> str:
    """The command that trains the chosen settings on all training days and tests them; "" where there is none."""
    stated = len(args.cascade_words) + 1 if args.cascade_words else 0  # run_experiments says these words itself
    words = list[str]()
    for method in methods:
        for trial in trials:
            if trial["chosen"] and trial["method"] == method.name:
                setting = [f"--{name}={value}" for name, value in trial["arguments"].items()]
                words += [f"--method={method.name}", *method.arguments[stated:], *setting]
    commands = (f"--setting={args.setting}", f"--train={args.train}", f"--evaluate={args.evaluate}")
    user = [f"--data_dir={args.data_dir.absolute()}", f"--output_dir={tested_folder(args.output_dir)}"]
    user += [f"--batch_divisor={args.batch_divisor}"] if args.batch_divisor > 1 else []
    user += [f"--test_random_items={args.test_random_items}"] if args.test_random_items else []
    named = args.cascade_words or commands
    return shlex.join(["lcron", "experiments", *named, *words, "--", *user, *training]) if words else ""


def _content(
    own: argparse.Namespace, args: argparse.Namespace, methods: Sequence[Method], training: Sequence[str],
    trials: Sequence[dict[str, Any]], outcomes: Sequence[Outcome],
) -> dict[str, Any]:  # fmt: skip
    """sweep.json."""
    _choose(trials)
    done = [read_folder(outcome.run.folder).metrics for outcome in outcomes if outcome.done]
    part = outcomes[0].run.parts[0]
    return {
        "setting": args.setting,
        "data": outcomes[0].run.config["data"],
        "data_dir": str(args.data_dir.absolute()),
        "train_days": list(part.train_days),
        "validation_day": part.test_day,
        "metric": _metric(done[0]) if done else "joint recall",
        "budget": own.budget,
        "sampler": own.sampler,
        "sample_seed": own.sample_seed,
        "grid": [str(axis).removeprefix("--grid=") for axis in own.axes],
        "seeds": args.seeds,
        "test_seeds": own.test_seeds,
        "warnings": sorted({str(value) for metrics in done for name, value in metrics.items() if "warning" in name}),
        "trials": list(trials),
        "command": _command(args, methods, training, trials),
    }


def _test(
    args: argparse.Namespace, seeds: list[int], planned: Sequence[Method], training: Sequence[str],
    content: dict[str, Any],
) -> list[Outcome]:  # fmt: skip
    """Train the chosen settings on all training days and test them; sweep.json names their folders before it begins."""
    folder = tested_folder(args.output_dir)
    changes = {"validation": False, "seeds": seeds, "output_dir": folder}
    test_args = argparse.Namespace(**vars(args) | changes)
    chosen = [method for method, trial in zip(planned, content["trials"], strict=True) if trial["chosen"]]
    runs = make_plan(test_args, chosen, training)
    for trial in content["trials"]:
        mine = [run for run in runs if trial["chosen"] and run.name == trial["method"]]
        trial["tested"] = [str(run.folder.relative_to(folder)) for run in mine]
    write_json(args.output_dir / SWEEP_FILE, content)
    outcomes = run_experiments.make_runs(test_args, runs)
    if folders := run_experiments.finished(outcomes):
        run_experiments.print_table(test_args, folders)
    return outcomes


def _make_rounds(
    args: argparse.Namespace, training: Sequence[str], rounds: Rounds
) -> tuple[list[Trial], list[dict[str, Any]], list[Outcome]]:
    """The trials as they were chosen, what sweep.json says of each, and how all trainings ended."""
    trials, made, outcomes = list[Trial](), list[dict[str, Any]](), list[Outcome]()
    with suppress(StopIteration):
        chosen = next(rounds)
        while True:
            runs = make_plan(args, [trial.planned() for trial in chosen], training)
            _check_different(chosen, runs)
            ended = run_experiments.make_runs(args, runs)
            folder = args.output_dir.absolute()
            found = [_trial(trial, ended[index :: len(chosen)], folder) for index, trial in enumerate(chosen)]
            trials, made, outcomes = [*trials, *chosen], [*made, *found], [*outcomes, *ended]
            chosen = rounds.send([trial["mean"] for trial in found])
    return trials, made, outcomes


def main(argv: list[str]) -> None:
    own, args, methods, training = parse_args(argv)
    ends, count, rounds = _search(own, methods, len(args.seeds))
    planned = [trial.planned() for trial in ends]
    parse_training(args, planned, training)
    if args.check:
        return
    if own.sampler == "optuna":  # before its first round; a random choice is one round
        _check_different(ends, make_plan(args, planned, training))
    seeds = len(args.seeds)
    logger.info(
        "%d settings of each of %d methods, %d seeds each: %d trainings",
        count, len(methods), seeds, count * len(methods) * seeds,
    )  # fmt: skip
    trials, made, outcomes = _make_rounds(args, training, rounds)
    content = _content(own, args, methods, training, made, outcomes)
    write_json(args.output_dir / SWEEP_FILE, content)
    write_out(text(partial(sweep_document, content)))
    if own.test_seeds and any(trial["chosen"] for trial in made):
        outcomes += _test(args, own.test_seeds, [trial.planned() for trial in trials], training, content)
    code = run_experiments.report_failures(outcomes)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(run_command(main))
