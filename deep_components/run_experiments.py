"""Make the runs of a table: every method with every seed, trained and evaluated, finished runs kept.

    python -m deep_components.run_experiments --setting=two_stage --train=deep_components.run_train2 \\
        --evaluate=deep_components.run_test2 --method=lcron --loss_type=lcron --tau=50 -- --data_dir=D --output_dir=O

    lcron experiments --cascade=FILE --data_dir=D --methods=lcron,arf_v2 --seeds=30,31     a cascade of one's own

The bash scripts of two_stage/, three_stage/ and paper/ call the first form. The second trains the paper's eight
methods, or those of --methods, with their default hyper-parameters, and prints the table; other hyper-parameters are
stated as in the first form. What stands after ``--`` are the user's arguments; those that are not listed here go to
the training, after the method's own, so that they win; --cache_dir, --time_zone, --cuda, --device and --no-compile to
the evaluation too.
"""

import argparse
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from deep_components.arguments import folder, method_names, random_items, seed_number
from deep_components.cascade import SETTINGS, named_cascade
from deep_components.cli import Parser, nearest, printable, run_command, write_out
from deep_components.errors import InputError
from deep_components.experiments.engines import run_locally, run_on_ray, slots
from deep_components.experiments.execution import REFUSED, Options, Outcome
from deep_components.experiments.plan import UNTRAINED, Method, Run, make_plan, methods_of, parse_training
from deep_components.experiments.progress import Progress
from deep_components.files import write_atomically
from deep_components.reporting.frame import read_runs
from deep_components.reporting.results import build_results
from deep_components.reporting.tables import metrics_document, streaming_document, text
from deep_components.runs.records import check_same_run, read_folder

METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron")  # the paper's rows

logger = logging.getLogger(__name__)


def seed_list(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(seed_number(seed) for seed in text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers as 30,31: {error}") from error


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = parser.add_argument_group("what the scripts say")
    cascade = table.add_mutually_exclusive_group(required=True)
    cascade.add_argument("--setting", choices=sorted(SETTINGS), help="of the paper, with --train and --evaluate")
    cascade.add_argument("--cascade", metavar="FILE", help="a TOML file (docs/cascades.md), or a setting's name")
    table.add_argument("--train", default="deep_components.run_train", metavar="MODULE", help="the command that trains")
    table.add_argument(
        "--evaluate", default="deep_components.run_test", metavar="MODULE", help="and the one that tests"
    )
    table.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs lie without --output_dir")
    table.add_argument("--variant", default="", help="what sets the runs apart from the methods' main ones")
    table.add_argument("--by_setting", action="store_true", help="runs lie in OUTPUT_DIR/<setting>/<method>")
    table.add_argument("--no-untrained", dest="untrained", action="store_false", help="without the untrained cascade")
    table.add_argument("--run_list", type=Path, help="gets the folder of every finished run, each with a zero byte")
    table.add_argument("--check", action="store_true", help="only say whether the arguments can be used")
    user = parser.add_argument_group("the user's")
    user.add_argument("--data_dir", type=folder, required=True, help="a log: RecFlow's layout, or docs/format.md")
    user.add_argument("--output_dir", type=folder, help="default: RUNS_DIR/<setting>/<method>/<data folder>")
    user.add_argument("--seeds", "--seed", type=seed_list, default=[30, 31, 32, 33, 34], help="default 30,31,32,33,34")
    user.add_argument(
        "--methods",
        type=lambda text: [*filter(None, text.split(","))],
        help="only these of a table's rows, as lcron,bce; with --cascade any methods",
    )
    user.add_argument("--test_day", help="default: the last day; on RecFlow 2024-02-04")
    user.add_argument("--validation", action="store_true", help="for tuning: the last training day is the test day")
    user.add_argument("--streaming", action="store_true", help="each day tests what was trained on all days before it")
    user.add_argument("--batch_divisor", type=_at_least_one, default=1, help="of the scripts' batch sizes (default 1)")
    user.add_argument("--test_random_items", type=random_items, metavar="N", help="of the day, with each test request")
    user.add_argument("--save_scores", action="store_true", help="also write scores.npz")
    user.add_argument("--resume", action="store_true", help="let a run of fewer days or passes go on")
    user.add_argument("--force", action="store_true", help="make again what is finished, or replace another run")
    user.add_argument("--any_code", action="store_true", help="keep runs of other code, and go on with unfinished ones")
    user.add_argument("--discard_state", action="store_true", help="remove a finished run's saved state: less space")
    user.add_argument("--jobs", type=_at_least_one, default=1, help="runs at a time on a machine (default 1)")
    user.add_argument("--threads", type=_at_least_one, help="of each process (default: the cores shared out)")
    user.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a Ray cluster")
    return parser


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[Method], list[str]]:
    """The runner's arguments, the methods, and the user's arguments of the training."""
    ours, users = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    first = next((index for index, word in enumerate(ours) if word.startswith("--method=")), len(ours))
    args, training = _parser().parse_known_args([*ours[:first], *users])
    methods = methods_of(ours[first:])
    if args.cascade is not None and not methods:
        others = [name for name in method_names() if args.methods and name not in METHODS]
        methods = [Method(name, ()) for name in (*METHODS, *others)]
    methods = _with_cascade(args, methods)
    names = [method.name for method in methods]
    unknown = [name for name in args.methods or [] if name not in names]
    if unknown or not methods:
        near = nearest(unknown[0], names) if unknown else ""
        choice = ", ".join(names) or "the --method= given"
        raise InputError(f"--methods={','.join(unknown)}: choose from {choice}{near}")
    args.several = len(methods) > 1
    return args, [method for method in methods if method.name in (args.methods or names)], training


def _with_cascade(args: argparse.Namespace, methods: Sequence[Method]) -> list[Method]:
    """args.cascade becomes the cascade itself, args.setting its name, and args.cascade_words what names it to the
    commands; the methods with these words, and their own name as the loss unless they say another one."""
    named = args.cascade if args.cascade is not None else args.setting
    words = () if args.cascade is None else (f"--cascade={named if named in SETTINGS else Path(named).absolute()}",)
    args.cascade, args.cascade_words = named_cascade(named), words
    args.setting = args.cascade.name
    return [
        replace(method, arguments=(*words, f"--loss_type={method.name}", *method.arguments)) if words else method
        for method in methods
    ]


def _engine(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[list[Outcome]]:
    options = Options(args.force, args.resume, args.any_code, args.discard_state)
    cores = len(os.sched_getaffinity(0))
    processes = max(run.config["arguments"].get("processes") or 1 for run in runs)
    named = any(word.startswith(("--device=", "--cuda=")) for word in runs[0].evaluation)
    environment = os.environ.get("OMP_NUM_THREADS", "")
    threads = args.threads or (int(environment) if environment.isdecimal() else None)
    if args.engine == "ray":
        each = threads or max(1, cores // (args.jobs * processes))
        (slot, *_) = slots(args.jobs, 0, cores, named, each, processes)
        return run_on_ray(runs, slot, "--device=cpu" not in runs[0].evaluation, options)
    made = slots(args.jobs, torch.cuda.device_count(), cores, named, threads, processes)
    if args.jobs > 1:
        where = sorted({slot.device for slot in made if slot.device})
        logger.info(
            "%d runs at a time, %d threads each%s; another number of threads may change the last digits",
            args.jobs, (made[0].threads or 1) * processes, f", on {', '.join(where)}" if where else "",
        )  # fmt: skip
    return run_locally(runs, made, options)


def _make_all(args: argparse.Namespace, runs: Sequence[Run]) -> list[Outcome]:
    """Make the runs, with one progress bar; how they ended, in the order of the plan."""
    ended: dict[Path, Outcome] = {}
    with logging_redirect_tqdm(), closing(Progress(runs)) as progress:
        try:
            for outcomes in _engine(args, runs):
                for outcome in outcomes:
                    ended[outcome.run.folder] = outcome
                    progress.ended(outcome)
                progress.look()
        except KeyboardInterrupt:
            done = sum(outcome.done for outcome in ended.values())
            logger.info("stopped: %d of %d runs are finished; the same command goes on from here", done, len(runs))
            raise
    return [ended[run.folder] for run in runs]


def finished(outcomes: Sequence[Outcome]) -> list[Path]:
    """The folders of the finished runs, for the tables; none when nothing but untrained cascades would be in them."""
    done = [outcome.run for outcome in outcomes if outcome.done]
    return [run.folder for run in done if any(other.name != UNTRAINED for other in done)]


def _write_list(path: Path, outcomes: Sequence[Outcome]) -> None:
    content = b"".join(os.fsencode(folder) + b"\0" for folder in finished(outcomes))
    write_atomically(path, lambda file: file.write(content))


def _say_codes(outcomes: Sequence[Outcome]) -> None:
    """Say so when runs that were kept were made by other code than the rest, or by code that they do not name."""
    records = [read_folder(outcome.run.folder).record for outcome in outcomes if outcome.done]
    codes = Counter(f"code {r['code']}" if r.get("code") else f"commit {r.get('commit')}" for r in records)
    if len(codes) > 1:
        counts = ", ".join(f"{count} by {code}" for code, count in codes.items())
        logger.warning("the runs were not all made by the same code: %s; --force makes them again", counts)


def print_table(args: argparse.Namespace, folders: Sequence[Path]) -> None:
    collected = read_runs(folders)
    if args.streaming:
        write_out(text(partial(streaming_document, collected, any_code=args.any_code)))
    else:
        write_out(text(partial(metrics_document, build_results(collected, any_code=args.any_code))))


def report_failures(outcomes: Sequence[Outcome]) -> int:
    """Name the failed runs; the exit code: 0, 2 when every failure is a mistake in the input, else 1."""
    failed = [outcome for outcome in outcomes if not outcome.done]
    if not failed:
        return 0
    count = f"{len(failed)} of {len(outcomes)}"
    lines = [f"error: {count} runs failed; the others are kept when the command is given again"]
    for sentence in dict.fromkeys(outcome.error for outcome in failed):
        same = [outcome for outcome in failed if outcome.error == sentence]
        lines += [f"  {'; '.join(outcome.run.title for outcome in same)}: {sentence}"]
        lines += [f"    {outcome.log}" for outcome in same if outcome.log is not None]
    sys.stderr.write("\n".join(map(printable, lines)) + "\n")
    return REFUSED if all(outcome.code == REFUSED for outcome in failed) else 1


def make_runs(args: argparse.Namespace, runs: Sequence[Run]) -> list[Outcome]:
    """Make what is not finished of the plan's runs; how each ended, in their order. InputError, before anything starts,
    when a folder holds another run."""
    for run in [] if args.force else runs:  # better said now than after hours
        held = read_folder(run.folder)
        check_same_run(held, run.config, run.streaming, args.resume, args.any_code, run.test_random_items)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.batch_divisor > 1:
        logger.info("the scripts' batch sizes are divided by %d, for a small log", args.batch_divisor)
    outcomes = _make_all(args, runs)
    _say_codes(outcomes)
    return outcomes


def main(argv: list[str]) -> None:
    args, methods, training = parse_args(argv)
    if args.check:
        parse_training(args, methods, training)
        return
    outcomes = make_runs(args, make_plan(args, methods, training))
    if args.run_list is not None:
        _write_list(args.run_list, outcomes)
    elif folders := finished(outcomes):
        print_table(args, folders)
    code = report_failures(outcomes)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(run_command(main))
