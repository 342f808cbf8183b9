"""Training a cascade on a log's days: data -> steps -> checkpoints, resumable at any step.

A training that is stopped, or killed, and resumed ends in the same files as one that was not, bit for bit on a CPU: the
saved state holds everything, nothing is rounded differently for being saved, and a day's order depends on (seed, pass,
day) alone.
"""

import argparse
import json
import logging
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deep_components.arguments import AUTOCAST, DTYPES, WHEREABOUTS, choose_device
from deep_components.batch import PADDING_INDEX
from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache, open_day
from deep_components.dataset.days import training_days
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.dataset.loader import batches, steps_of, training_order
from deep_components.errors import InputError, StoppedError
from deep_components.files import locked, make_folder, write_atomically
from deep_components.kernels import keep_freed_memory, load_kernels
from deep_components.models import build_models
from deep_components.runs import checkpoint
from deep_components.tables.embedding import FieldEmbedding
from deep_components.tables.id_set import IdSet
from deep_components.training import memory
from deep_components.training.step import Trainer, gathered_fields
from deep_components.training.tensorboard import ScalarLog, check_installed, scalar_log

FEW_STEPS = 50

# Arguments that may differ between a run and its continuation.
_FREE_ON_RESUME = (*WHEREABOUTS, "on_nonfinite", "epochs", "train_days")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a training stands: passes done, days done in this pass, batches done in this day, steps made in all."""

    epoch: int = 0
    day: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Run:
    """What the parts of a training share."""

    args: argparse.Namespace
    trainer: Trainer
    days: Sequence[DayCache]
    steps: Sequence[int]  # of each day
    device: torch.device
    origin: str

    @property
    def state_file(self) -> Path:
        return Path(self.args.output_dir) / checkpoint.STATE_FILE

    def save(self, position: Position) -> None:
        checkpoint.save_state(self.state_file, self.trainer.state(), asdict(position))


class StepLog:
    """train.jsonl: an object per step. Terms stay on the device until :meth:`flush`: a step waits for nothing.

    Args:
        path: the file; lines beyond the first ``kept_steps`` are dropped.
        origin: what the data are.
        method: the loss's name.
        kept_steps: the steps made before.
        skips: whether steps that are not finite were left out; otherwise they are an error.
        scalars: also gets every step.
    """

    def __init__(
        self, path: Path, origin: str, method: str, kept_steps: int, skips: bool, scalars: ScalarLog | None = None
    ) -> None:
        self.path, self.origin, self.method, self.skips, self.scalars = path, origin, method, skips, scalars
        try:
            lines = path.read_text().splitlines(keepends=True)[:kept_steps] if kept_steps else []
            self.seconds = sum((json.loads(line)["seconds"] for line in lines), start=0.0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); train again without --resume") from error
        if len(lines) < kept_steps:
            raise InputError(f"{path}: has {len(lines)} of {kept_steps} steps; train again without --resume")
        write_atomically(path, lambda file: file.write("".join(lines).encode()))
        self._waiting: list[tuple[int, str, float, dict[str, Tensor]]] = []

    def add(self, step: int, day: str, seconds: float, terms: dict[str, Tensor]) -> None:
        self._waiting.append((step, day, seconds, terms))

    def flush(self) -> float:
        """Write what waits and return the last loss. InputError when a step is not finite and was not left out."""
        if not self._waiting:
            return math.nan
        names = list(self._waiting[0][3])
        values = torch.stack([torch.stack([terms[name].double() for name in names]) for *_, terms in self._waiting])
        with self.path.open("a") as file:
            for (step, day, seconds, _), row in zip(self._waiting, values.tolist(), strict=True):
                terms = dict(zip(names, row, strict=True))
                record = {"step": step, "day": day} | {n: v if math.isfinite(v) else None for n, v in terms.items()}
                broken = [name for name, value in terms.items() if not math.isfinite(value)]
                if broken:
                    self._not_finite(f"{self.method}, step {step}, day {day}: the loss is {terms['loss']}", broken)
                    record["skipped"] = True
                self.seconds += round(seconds, 6)
                record |= {"seconds": round(seconds, 6), "data": self.origin}
                file.write(json.dumps(record) + "\n")
                if self.scalars is not None:
                    self.scalars.add(record)
            file.flush()
            os.fsync(file.fileno())  # a state that is saved next must not outlive these lines when the power fails
        if self.scalars is not None:
            self.scalars.flush()
        self._waiting.clear()
        return float(values[-1, names.index("loss")])

    def _not_finite(self, what: str, broken: Sequence[str]) -> None:
        what = f"{what}, and not finite are {', '.join(broken)}"
        if not self.skips:
            raise InputError(f"{what}; lower --lr, or leave such steps out with --on_nonfinite=skip")
        logger.warning("%s; the step is left out", what)


def train_cascade(cascade: Cascade, args: argparse.Namespace, loss: nn.Module) -> None:
    """Train ``cascade`` with ``loss`` as ``args`` (training_parser) say; write the run's files to args.output_dir."""
    check_installed(args.tensorboard)
    if args.init_from is not None and args.init_from.resolve() == args.output_dir.resolve():
        raise InputError(
            f"--init_from={args.init_from} is --output_dir, where the training would remove the models that it starts "
            "from; name another --output_dir"
        )
    device = choose_device(args)
    kernels = load_kernels(DTYPES[args.dtype]) if args.compile else None
    keep_freed_memory()
    origin = recflow.read_origin(args.data_dir)
    names = training_days(args.data_dir, args.train_days)
    counts = recflow.read_id_counts(args.data_dir)
    days = [
        open_day(args.data_dir, name, cascade, args.cache_dir, args.time_zone, args.seq_len)
        for name in (names if args.epochs else [])
    ]
    steps = [steps_of(day, args.batch_size) for day in days]
    models, initial_seed = initial_models(cascade, args, counts, days, device)
    loss.to(device=device, dtype=DTYPES[args.dtype])
    trainer = Trainer(
        models,
        loss,
        args.lr,
        args.optimizer,
        kernels=kernels,
        autocast=AUTOCAST[args.autocast],
        skip_nonfinite=args.on_nonfinite == "skip",
    )
    config = _config(cascade, args, device, origin, names, counts) | {
        "kernels": "compiled" if kernels else "pytorch",
        "data_checksums": {day.day: day.checksum for day in days},
    }
    run = Run(args, trainer, days, steps, device, origin)
    make_folder(args.output_dir)
    with _only_writer(args.output_dir), _generators(args.seed, device):
        position = _start(run, config)
        if origin == "simulated":
            logger.warning("SIMULATED DATA: the numbers of this run say nothing about a real log")
        before = position.step
        with scalar_log(args.output_dir, args.tensorboard, args.batch_size, before) as scalars:
            position, seconds = _train_days(run, position, scalars)
        _finish(run, initial_seed, position, seconds)
    if not args.epochs:
        logger.info("%s, seed %d: untrained -> %s", cascade.name, args.seed, args.output_dir)
        return
    requests = position.step * args.batch_size
    logger.info(
        "%s, seed %d: %d steps, %d of them now; %d requests in %.1f s (%.0f requests/s) on %s -> %s",
        args.loss_type, args.seed, position.step, position.step - before, requests, seconds,
        requests / max(seconds, 1e-9), device, args.output_dir,
    )  # fmt: skip


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder. InputError when another process trains in it."""
    try:
        with locked(folder / checkpoint.LOCK_FILE, wait=False) as held:
            if not held:
                raise InputError(
                    f"{folder}: another process is training in this folder; wait for it, or name another --output_dir"
                )
            yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); free the space or name another --output_dir"
        ) from error


@contextmanager
def _generators(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's generators seeded, for losses that draw random numbers; afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGINT or SIGTERM; a second one ends the process at once. A signal that the
    process was started to ignore stays ignored."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():  # signals are its own
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        put_back()


def initial_models(
    cascade: Cascade,
    args: argparse.Namespace,
    counts: Mapping[str, int],
    days: Sequence[DayCache],
    device: torch.device,
) -> tuple[dict[str, nn.Module], int | None]:
    """The models before the first step, on their device, and the seed of the initial values of ids they lack.

    InputError when the memory does not suffice.
    """
    vocabulary = {field: counts[column] for field, column in LOG_COLUMN.items()}
    ids = _compacted(cascade, args, vocabulary, days)
    host = _check_memory(cascade, args, vocabulary, ids, device)
    models = build_models(cascade, vocabulary, args.emb_dim, args.nn_units, args.seed, ids)
    seed: int | None = args.seed
    for model in models.values():
        _to_device(model, device, DTYPES[args.dtype], host)
    if args.init_from is not None:
        seed = checkpoint.load_models(args.init_from, models)
    return models, seed


def _compacted(
    cascade: Cascade, args: argparse.Namespace, vocabulary: Mapping[str, int], days: Sequence[DayCache]
) -> dict[str, IdSet]:
    """The ids of large tables: those that the days name, and those that --init_from has rows for."""
    large = [field for field, count in vocabulary.items() if count + 2 >= args.compact_from]
    before = checkpoint.saved_ids(args.init_from, cascade.stage_names[0]) if args.init_from is not None else {}
    ids = {}
    for field in large:
        if args.init_from is not None and field not in before:
            continue  # its table is whole
        size = vocabulary[field] + 2
        known = before.get(field, np.array([0, PADDING_INDEX.get(field, 0)]))
        if len(known) and known.max() >= size:
            raise InputError(f"--init_from={args.init_from}: its {field} ids are not those of {args.data_dir}")
        ids[field] = IdSet.of([known], size)
        for day in days:
            ids[field] = ids[field] | day.ids(field)
    return ids


def _check_memory(
    cascade: Cascade,
    args: argparse.Namespace,
    vocabulary: Mapping[str, int],
    ids: Mapping[str, IdSet],
    device: torch.device,
) -> tuple[str, ...]:
    """The fields whose tables stay in host memory. InputError when there is not enough memory anywhere."""
    with torch.device("meta"):
        models = build_models(cascade, vocabulary, args.emb_dim, args.nn_units, None, ids)
    rows = cast(FieldEmbedding, models[cascade.stage_names[0]].get_submodule("embedding")).rows
    gathered = gathered_fields(rows, args.optimizer)
    itemsize = DTYPES[args.dtype].itemsize
    if args.epochs:
        sparse, dense = memory.table_bytes(models, gathered, itemsize)
        step = memory.step_bytes(
            args.batch_size, cascade.num_items, args.seq_len, args.nn_units, len(cascade.stages), itemsize
        )
        cpu = torch.device("cpu")
        apart = args.table_memory == "host" and device.type != "cpu"
        needed = {device: dense + step, cpu: sparse} if apart else {device: sparse + dense + step}
        memory.check_memory(needed)
    return gathered if args.table_memory == "host" and args.optimizer == "deferred_adam" else ()


def _to_device(model: nn.Module, device: torch.device, dtype: torch.dtype, host: Sequence[str]) -> None:
    """Move the model, but leave the tables of the ``host`` fields in host memory."""
    embedding = cast(FieldEmbedding, model.get_submodule("embedding"))
    tables = {field: embedding.get_parameter(field) for field in host}
    for field in tables:
        delattr(embedding, field)
    model.to(device=device, dtype=dtype)
    for field, table in tables.items():
        embedding.register_parameter(field, nn.Parameter(table.detach().to(dtype)))


def _start(run: Run, config: dict[str, Any]) -> Position:
    """Prepare the run's folder; the position to start from."""
    folder: Path = run.args.output_dir
    position = Position()
    if run.args.resume and _can_resume(run, config):
        tensors, place = checkpoint.load_state(run.state_file)
        run.trainer.restore(tensors)
        position = Position(**place)
        checkpoint.remove_results(folder)  # they must not stand beside this training's
    else:
        checkpoint.remove_results(folder)
        run.state_file.unlink(missing_ok=True)  # before config.json: an old state never stands beside a new config
    checkpoint.remove_leftovers(folder)
    checkpoint.write_json(folder / checkpoint.CONFIG_FILE, config)
    return position


def _can_resume(run: Run, config: Mapping[str, Any]) -> bool:
    """Whether there is a state to go on from; without one --resume starts at the beginning, so that it can be given
    from the first time on. InputError when the folder holds another run, or a complete one without its state."""
    folder: Path = run.args.output_dir
    has_state = run.state_file.exists()
    if has_state or (folder / checkpoint.CONFIG_FILE).exists():
        _check_same_run(folder, config)
    if has_state:
        return True
    if (folder / checkpoint.COST_FILE).exists():
        raise InputError(
            f"{run.state_file}: no such file, but the training is complete; leave out --resume to train again"
        )
    logger.info("--resume: %s holds no saved state; training starts at the beginning", folder)
    return False


def _train_days(run: Run, position: Position, scalars: ScalarLog | None) -> tuple[Position, float]:
    """Train from ``position`` to the end; the state is saved after every day, and every --save_minutes within it.

    Returns:
        the position reached, and the seconds of all steps.

    Raises:
        StoppedError: a signal asked to stop; the state is saved.
    """
    args = run.args
    path = args.output_dir / checkpoint.STEP_LOG_FILE
    log = StepLog(path, run.origin, args.loss_type, position.step, run.trainer.skip_nonfinite, scalars)
    total = args.epochs * sum(run.steps)
    if 0 < total < FEW_STEPS:
        logger.warning("only %d training steps: the models will hardly learn; lower --batch_size", total)
    with (
        _stop_signals() as stops,
        tqdm(
            total=total * args.batch_size,
            initial=position.step * args.batch_size,
            unit="req",
            desc=args.loss_type,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        for epoch in range(position.epoch, args.epochs):
            for place in range(position.day if epoch == position.epoch else 0, len(run.days)):
                position = _train_day(run, replace(position, epoch=epoch, day=place), log, bar, stops)
            position = replace(position, epoch=epoch, day=len(run.days))
    return position, log.seconds


def _train_day(run: Run, position: Position, log: StepLog, bar: "tqdm[Any]", stops: Sequence[int]) -> Position:
    """The rest of a day's steps."""
    args, day = run.args, run.days[position.day]
    order = training_order(day, args.seed, position.epoch, args.shuffle)
    order = order[position.batch * args.batch_size : run.steps[position.day] * args.batch_size]
    began = saved = time.perf_counter()
    for batch in batches(day, order, args.batch_size, run.device, run.trainer.prepare, args.day_on_device):
        terms = run.trainer.step(batch)
        position = replace(position, batch=position.batch + 1, step=position.step + 1)
        ended = time.perf_counter()  # the wait for the batch counts; a GPU may still be at work
        log.add(position.step, day.day, ended - began, terms)
        bar.update(args.batch_size)
        if position.step % args.print_freq == 0:
            bar.set_postfix(day=day.day, loss=f"{log.flush():.4f}")
        if stops:
            log.flush()
            run.save(position)
            raise StoppedError(
                f"stopped at step {position.step}, day {day.day}; the state is saved in {args.output_dir}: go on with "
                "the same command and --resume",
                stops[0],
            )
        began = time.perf_counter()
        if args.save_minutes and began - saved > 60 * args.save_minutes:
            log.flush()
            run.save(position)
            saved = began = time.perf_counter()
    log.flush()
    position = replace(position, day=position.day + 1, batch=0)
    run.save(position)
    return position


def _finish(run: Run, initial_seed: int | None, position: Position, seconds: float) -> None:
    """Write the models, and at last what the training took."""
    run.trainer.flush()
    states = {stage: model.state_dict() for stage, model in run.trainer.models.items()}
    note = {"data": run.origin, "loss_type": run.args.loss_type, "initial_seed": initial_seed}
    ids = {field: known.ids() for field, known in run.trainer.ids.items()}
    checkpoint.save_models(run.args.output_dir, states, note, ids)
    gpu = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None
    cost = {
        "steps": position.step,
        "requests": position.step * run.args.batch_size,
        "seconds": seconds,
        "device": str(run.device),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "peak_gpu_memory_bytes": gpu,
    }
    checkpoint.write_json(run.args.output_dir / checkpoint.COST_FILE, cost)  # last: where it stands, all is complete


def _check_same_run(run: Path, config: Mapping[str, Any]) -> None:
    """InputError unless the run in the folder was started with the same arguments and data."""
    before = checkpoint.read_training(run)
    if before["setting"] != config["setting"]:
        raise InputError(f"--resume: {run} is a {before['setting']} run, not {config['setting']}; use its own command")
    if (before["data"], before["id_counts"]) != (config["data"], config["id_counts"]):
        raise InputError(f"--resume: {run} was trained on other data (origin or id counts differ); give the same log")
    known = before.get("data_checksums", {})
    for day, checksum in config["data_checksums"].items():
        if known.get(day, checksum) != checksum:
            raise InputError(
                f"--resume: {run} was trained on another day {day} (its checksum differs); give the same log"
            )
    if (before["arguments"]["epochs"] or 0) > config["arguments"]["epochs"]:
        raise InputError(
            f"--resume: {run} was started with --epochs={before['arguments']['epochs']}; give as many or more"
        )
    for name, value in config["arguments"].items():
        old = before.get("arguments", {}).get(name)
        if name not in _FREE_ON_RESUME and old != value:
            raise InputError(f"--resume: {run} was trained with --{name}={old}, not {value}; give the same arguments")
    for name in ("kernels", "threads", "device", "versions"):  # docs/determinism.md
        if before.get(name) != config[name]:
            logger.warning(
                "%s was trained with %s=%s, not %s: the last digits will differ from a run that was not stopped",
                run, name, before.get(name), config[name],
            )  # fmt: skip
    days = before.get("train_days", [])
    if days != config["train_days"][: len(days)]:
        raise InputError(f"--resume: {run} was trained on {', '.join(days)}; give the same days, or the same and more")
    if len(days) < len(config["train_days"]) and config["arguments"]["epochs"] > 1:
        raise InputError(
            "--resume: days can be added to a training of one pass only; give the same days, or --epochs=1"
        )


def _config(
    cascade: Cascade,
    args: argparse.Namespace,
    device: torch.device,
    origin: str,
    days: Sequence[str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    return {
        "setting": cascade.name,
        "data": origin,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(args).items())},
        "train_days": list(days),
        "id_counts": dict(counts),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's commit, with "-modified" where files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
