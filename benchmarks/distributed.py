"""One training on 1, 2, ... processes of one thread each: speed, CPU time, waiting, bytes, and memory of a rank.

    python -m benchmarks.distributed [--processes=1,2] [--steps=8] [--memory_processes=1,2,4] [--output=figures.json]

Speed: all train on the same simulated log with whole tables of --videos and --authors rows, shared out by row, and take
turns of --steps steps in one run; a figure is the median of its turns. Their first losses must be the same to rounding.
CPU time is user and system time of all ranks. Waiting is the time that a thread spends in collectives: the training's,
which a step is longer by, and the loader's, which works ahead. Bytes are those that a rank sends: as its collectives
count them, as the loopback device counts them (with all else that the machine sends to itself), and by the formula of
docs/performance.md. Memory: the peak of a rank on a log of RecFlow's vocabulary, the saved state and models included.

The results are printed as JSON, and after it as the Markdown tables of docs/performance.md.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import common
from deep_components.batch import CascadeBatch, SlotFeatures
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.loader import batches
from deep_components.distributed.processes import Processes, joined
from deep_components.errors import InputError
from deep_components.training import memory
from deep_components.training.loop import Position, Run, prepare

MEMORY_STEPS = 4
ENDING = 30.0  # seconds in which ranks end that are no longer asked
TOLERANCE = 1e-5  # of the first losses, relative
NOTED = ("waiting.training", "waiting.loader", "bytes.rows", "bytes.sums", "bytes.formula")


# ---- a rank ----------------------------------------------------------------------------------------------------------


class Noted(Processes):
    """Processes that note what their collectives take."""

    def __init__(self, processes: Processes) -> None:
        vars(self).update(vars(processes))
        vars(self)["notes"] = defaultdict[str, float](float)

    def all_sum(self, values: Tensor) -> Tensor:
        # The least that an all-reduce sends: every rank gets and gives all but its own part twice.
        with self._noted("bytes.sums", 2 * values.nbytes * (self.count - 1) / self.count):
            return super().all_sum(values)

    def exchange(
        self, values: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None = None
    ) -> Tensor:
        a_row = values.nbytes // max(1, len(values))
        with self._noted("bytes.rows", a_row * (sum(sent) - sent[self.rank])):
            return super().exchange(values, sent, received, group)

    @contextmanager
    def _noted(self, name: str, size: float) -> Iterator[None]:
        started = time.perf_counter()
        yield
        thread = "training" if threading.current_thread() is threading.main_thread() else "loader"
        notes: dict[str, float] = vars(self)["notes"]
        notes[f"waiting.{thread}"] += time.perf_counter() - started
        notes[name] += size


def serve(args: argparse.Namespace) -> None:
    """Be a rank: do what the benchmark asks for until it hangs up."""
    count = int(os.environ["WORLD_SIZE"])
    # For speed the large tables have a row per id, and are shared out.
    whole = ("--compact_from=1000000000", f"--pull_from={min(args.videos, args.authors)}")
    flags = (*(() if args.rank_memory else whole), f"--output_dir={args.rank_log / f'run{count}'}")
    namespace = common.training_arguments(args, args.rank_log, *flags)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(torch.device(args.device), namespace.timeout))
        noted = Noted(processes) if processes is not None else None
        run = prepare(SETTINGS[args.setting], namespace, common.COMMANDS[args.setting].build_loss(namespace), noted)
        source = _batches(run)
        asked = stack.enter_context(socket.create_connection(("127.0.0.1", args.rank_port))).makefile("rw")
        for line in asked:
            what = json.loads(line)
            answer = _memory(run) if what == "memory" else _turn(run, source, what)
            asked.write(json.dumps(answer) + "\n")
            asked.flush()


def _batches(run: Run) -> Iterator[CascadeBatch[SlotFeatures]]:
    """This rank's part of the day's batches, again and again."""
    size, order = run.args.batch_size, np.arange(run.steps[0] * run.args.batch_size)
    part = slice(None) if run.processes is None else run.processes.slice_of(size)
    while True:
        yield from batches(run.days[0], order, size, run.device, run.trainer.prepare, part=part)


def _turn(run: Run, source: Iterator[CascadeBatch[SlotFeatures]], steps: int) -> dict[str, float]:
    """What so many steps take, a step; "loss" is that of the first."""
    notes = getattr(run.processes, "notes", {})
    before, loss = _reading(notes), None
    for _ in range(steps):
        batch = next(source)
        if isinstance(run.processes, Noted):
            rows: Mapping[str, Any] = batch.features.rows
            notes["bytes.formula"] += formula(run, {table: int(route.sent.sum()) for table, route in rows.items()})
        terms = run.trainer.step(batch)
        loss = terms["loss"] if loss is None else loss
    common.synchronise()
    after = _reading(notes)
    return {name: (after[name] - before[name]) / steps for name in after} | {"loss": float(loss or 0)}


def _reading(notes: Mapping[str, float]) -> dict[str, float]:
    """Clocks and counters of this process."""
    sent = Path("/proc/net/dev").read_text().partition("lo:")[2].split()[8]
    clocks = {"seconds": time.perf_counter(), "cpu": time.process_time(), "bytes.loopback": float(sent)}
    return clocks | {name: notes.get(name, 0.0) for name in NOTED}


def formula(run: Run, distinct: Mapping[str, int]) -> float:
    """Bytes that a rank sends in a step with so many ``distinct`` rows of each table: the row's number, its values and
    gradients in every stage, and the dense gradients."""
    assert run.processes is not None
    number = torch.empty((), dtype=run.trainer.dtype).itemsize
    a_row = 4 + 2 * number * len(run.trainer.models) * run.args.emb_dim
    dense = sum(p.numel() for group in run.trainer.dense_optimizer.param_groups for p in group["params"])
    others = (run.processes.count - 1) / run.processes.count
    return (sum(distinct.values()) * a_row + 2 * number * dense) * others


def _memory(run: Run) -> dict[str, float]:
    """Peak of this process after the state and the models are written, and what its part of the large tables takes."""
    run.folder.mkdir(exist_ok=True)
    run.save(Position(step=MEMORY_STEPS))
    run.trainer.flush()
    run.save_models(run.folder)
    stores = run.trainer.stores.values()
    tables = sum(
        store.tables[table].nbytes + sum(values.nbytes for values in optimizer.state().values())
        for store in stores
        for table, optimizer in store.optimizers.items()
    )
    return {"peak_bytes": memory.peak(), "table_bytes": tables}


# ---- all of them -----------------------------------------------------------------------------------------------------


@contextmanager
def started(count: int, words: Sequence[str]) -> Iterator[list[TextIO]]:
    """So many ranks of one thread, started as a training's, and ready for questions. InputError when one ends."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        command = [*launcher, "benchmarks.distributed", *words, f"--rank_port={listener.getsockname()[1]}"]
        agent = stack.enter_context(subprocess.Popen(command, env=environment))
        stack.callback(_end, agent)  # after the connections are closed, which ends the ranks
        listener.settimeout(1)
        ranks = list[TextIO]()
        while len(ranks) < count:
            if agent.poll() is not None:
                raise InputError(f"a rank of {count} ended before it was ready, see above")
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                continue
            connection.settimeout(None)
            ranks.append(stack.enter_context(connection.makefile("rw")))
        yield ranks


def _end(agent: "subprocess.Popen[bytes]") -> None:
    try:
        agent.wait(ENDING)
    except subprocess.TimeoutExpired:
        agent.terminate()


def ask(ranks: Sequence[TextIO], what: Any) -> dict[str, list[float]]:
    """Name -> what every rank answers."""
    for rank in ranks:
        rank.write(json.dumps(what) + "\n")
        rank.flush()
    lines = [rank.readline() for rank in ranks]
    if not all(lines):
        raise InputError(f"a rank of {len(ranks)} ended, see above")
    answers = [json.loads(line) for line in lines]
    return {name: [answer[name] for answer in answers] for name in answers[0]}


def speed(args: argparse.Namespace, words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Number of processes -> its figures."""
    turns: dict[int, list[dict[str, list[float]]]] = {count: [] for count in args.processes}
    with ExitStack() as stack:
        ranks = {count: stack.enter_context(started(count, words)) for count in args.processes}
        for _ in range(1 + args.repeats):
            for count in args.processes:
                turns[count].append(ask(ranks[count], args.steps))
    losses = {count: of_count[0]["loss"][0] for count, of_count in turns.items()}
    first = losses[args.processes[0]]
    if any(abs(loss - first) > TOLERANCE * abs(first) for loss in losses.values()):
        raise InputError(f"the first losses differ: {losses}")
    return {str(count): figures(turns[count][1:], args.batch_size) for count in args.processes}


def figures(turns: Sequence[Mapping[str, Sequence[float]]], requests: int) -> dict[str, float]:
    """Of a step of so many requests, medians of the turns; ranks are together in seconds, added in CPU seconds."""
    seconds = median(max(turn["seconds"]) for turn in turns)
    count = len(turns[0]["seconds"])
    result = {"requests_per_second": requests / seconds, "cpu_seconds": median(sum(turn["cpu"]) for turn in turns)}
    for thread in ("training", "loader"):
        shares = (mean(turn[f"waiting.{thread}"]) / max(turn["seconds"]) for turn in turns)
        result[f"waiting.{thread}"] = median(shares)
    for name in ("rows", "sums", "formula"):
        result[f"bytes.{name}"] = median(mean(turn[f"bytes.{name}"]) for turn in turns)
    return result | {"bytes.loopback": median(mean(turn["bytes.loopback"]) for turn in turns) / count}


def peaks(args: argparse.Namespace, words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Number of processes -> the greatest memory of a rank."""
    result = {}
    for count in args.memory_processes:
        with started(count, words) as ranks:
            ask(ranks, MEMORY_STEPS)
            result[str(count)] = {name: max(values) for name, values in ask(ranks, "memory").items()}
    return result


def compared(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Each number of processes beside the first one."""
    first = next(iter(results.values()))
    return {
        count: {
            "requests_per_second": found["requests_per_second"] / first["requests_per_second"],
            "cpu_seconds": found["cpu_seconds"] / first["cpu_seconds"],
        }
        for count, found in results.items()
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    lines = [
        "| processes | requests/s | | CPU s a step | | waiting: training | loader "
        "| MB a step and rank: counted | loopback | formula |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for count, found in results["speed"].items():
        beside = results["ratio"][count]
        sent = found["bytes.rows"] + found["bytes.sums"]
        sizes = (sent, found["bytes.loopback"], found["bytes.formula"])
        lines.append(
            f"| {count} | {found['requests_per_second']:,.0f} | {beside['requests_per_second']:.2f} | "
            f"{found['cpu_seconds']:.3f} | {beside['cpu_seconds']:.2f} | {found['waiting.training']:.1%} | "
            f"{found['waiting.loader']:.1%} | {' | '.join(f'{size / 1e6:.2f}' for size in sizes)} |"
        )
    if results["memory"]:
        lines += ["", "| processes | peak of a rank, GB | large tables of a rank, GB |", "|---|---|---|"]
        lines += [
            f"| {count} | {found['peak_bytes'] / 1e9:.2f} | {found['table_bytes'] / 1e9:.3f} |"
            for count, found in results["memory"].items()
        ]
    return "\n".join(lines) + "\n"


def _counts(text: str) -> list[int]:
    counts = [int(word) for word in text.split(",") if word]
    if min(counts, default=1) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1")
    return counts


def _log(args: argparse.Namespace, stack: ExitStack, argv: list[str], **size: int) -> list[str]:
    """The command line of ranks that train on a new log of this size."""
    data_dir = stack.enter_context(common.simulated_log(argparse.Namespace(**vars(args) | size)))
    common.open_day(args, data_dir)  # the cache is there before any rank
    return [*argv, *(f"--{name}={value}" for name, value in size.items()), f"--rank_log={data_dir}"]


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__, videos=2_000_000, authors=1_000_000)
    parser.add_argument("--processes", type=_counts, default=[1, 2], help="numbers compared, the first with the others")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--memory_processes", type=_counts, default=[1, 2, 4], help="numbers whose memory is measured")
    parser.add_argument("--memory_requests", type=int, default=65_536)
    parser.add_argument("--memory_videos", type=int, default=82_200_000)
    parser.add_argument("--memory_authors", type=int, default=33_500_000)
    for name, kind in {"rank_log": Path, "rank_port": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--rank_memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_port is not None:
        serve(args)
        return
    of_memory = {name: getattr(args, f"memory_{name}") for name in ("requests", "videos", "authors")}
    for requests in (args.requests, of_memory["requests"]):
        if requests < args.batch_size:
            raise InputError(f"{requests} requests: fewer than --batch_size={args.batch_size}")
    results: dict[str, Any] = {"speed": {}, "ratio": {}, "memory": {}}
    if args.processes:
        with ExitStack() as stack:
            results["speed"] = speed(args, _log(args, stack, argv))
        results["ratio"] = compared(results["speed"])
    if args.memory_processes:
        with ExitStack() as stack:
            results["memory"] = peaks(args, [*_log(args, stack, argv, **of_memory), "--rank_memory"])
    common.report(args, results)
    sys.stdout.write(markdown(results))


if __name__ == "__main__":
    sys.exit(run_command(main))
