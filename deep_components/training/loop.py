"""Training a cascade on a log's days: data -> steps -> checkpoints, resumable at any step.

A training that is stopped, or killed, and resumed ends in the same files as one that was not, bit for bit on a CPU: the
saved state holds everything, nothing is rounded differently for being saved, and a day's order depends on (seed, pass,
day) alone.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from deep_components.arguments import AUTOCAST, DTYPES, check_validation, choose_device
from deep_components.cascade import Cascade
from deep_components.checkpoint import as_array, save_trained
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.days import hold_out_last, training_days
from deep_components.dataset.loader import Join, batches, steps_of, training_order
from deep_components.dataset.log import ENCODING_FOLDER as ENCODING_OF_LOG
from deep_components.dataset.log import Log, open_log
from deep_components.dataset.random_items import with_items_of_batch
from deep_components.distributed.processes import Processes, agreed, joined
from deep_components.distributed.refusals import check_alike, check_arguments, check_models
from deep_components.distributed.saving import OwnState, save_together, save_trained_together
from deep_components.distributed.spread import open_days
from deep_components.errors import InputError, StoppedError
from deep_components.files import copy_folder
from deep_components.kernels import keep_freed_memory, load_kernels
from deep_components.runs.code import continued
from deep_components.runs.folder import (
    CONFIG_FILE,
    COST_FILE,
    ENCODING_FOLDER,
    LOCK_FILE,
    STATE_FILE,
    STEP_LOG_FILE,
    best_folder,
    model_file,
    only_user,
    read_json,
    read_training,
    remove_best,
    remove_leftovers,
    remove_results,
    remove_shards,
    remove_state,
    write_json,
)
from deep_components.runs.identity import first_difference
from deep_components.runs.shards import SavedState
from deep_components.runs.state import OpenModel, check_same_run, copy_model, run_note, save_state
from deep_components.tables.id_set import IdSet
from deep_components.training import memory
from deep_components.training.config import environment, run_config
from deep_components.training.initial import initial_cascade, longest_list
from deep_components.training.signals import stop_signals
from deep_components.training.step import Shards, Trainer
from deep_components.training.step_log import StepLog
from deep_components.training.tensorboard import ScalarLog, check_installed, scalar_log
from deep_components.training.validation import Best, Validation

FEW_STEPS = 50
SKIPPED_SHARE = 0.01  # of the steps that --on_nonfinite=skip leaves out at most, but always one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """How far a training is: passes done, days done in this pass, batches done in this day, steps made in all, and how
    many of these were left out."""

    epoch: int = 0
    day: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0


@dataclass
class Run:
    """What the parts of a training share."""

    args: argparse.Namespace
    config: Mapping[str, Any]  # config.json
    trainer: Trainer
    days: Sequence[DayCache]
    steps: Sequence[int]  # of each day
    device: torch.device
    initial_seed: int | None  # of ids that the tables lack
    processes: Processes | None = None  # of which this is one
    validation: Validation | None = None
    best: Best = field(default_factory=Best)  # of the validations so far
    saved_best: int = 0  # the step of those that the saved state names

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def is_first(self) -> bool:
        """This process alone writes the run's folder and speaks."""
        return self.processes is None or self.processes.is_first

    @property
    def keeps_best(self) -> bool:
        return self.validation is not None and self.args.keep == "best"

    @property
    def is_exhausted(self) -> bool:
        """So many validations have not been better that training stops."""
        return self.validation is not None and 0 < self.args.patience <= self.best.waited

    def note(self) -> dict[str, Any]:
        """What the models' files note beside their values."""
        about = {"data": self.config["data"], "loss_type": self.args.loss_type, "initial_seed": self.initial_seed}
        return about | run_note(self.config) | ({"step": self.best.step} if self.keeps_best else {})

    def save(self, position: Position) -> None:
        arrays = {name: as_array(values) for name, values in self.trainer.state().items()}
        arrays |= self.best.state() if self.validation is not None else {}
        if self.shards is None:
            save_state(self.folder / STATE_FILE, arrays, asdict(position), run_note(self.config))
        else:
            compacted = {table: table in self.shards.ids for table in self.trainer.pulled}
            save_together(
                self.folder, arrays, compacted, asdict(position), run_note(self.config), self.shards.processes
            )
        self.saved_best = self.best.step
        if self.is_first:
            remove_best(self.folder, {self.saved_best})

    def restore(self) -> OwnState:
        """Go on from the saved state, and return it."""
        rank, ids = 0, dict[str, IdSet]()
        if self.processes is not None:
            rank, ids = self.processes.rank, {table: self.trainer.ids[table] for table in self.trainer.pulled}
        saved = SavedState(self.folder / STATE_FILE, rank)
        own = OwnState(saved, ids, rank)
        self.trainer.restore(own)
        if self.validation is not None:
            self.best = Best.restored(saved, saved.position["step"])
            self.saved_best = self.best.step
        return own

    def save_models(self, folder: Path) -> None:
        """Write the models as they are now."""
        models, stores, shards = self.trainer.models, self.trainer.stores, self.shards
        if shards is None:
            save_trained(folder, models, stores, self.note())
        else:
            save_trained_together(folder, models, stores, self.note(), shards.ids, shards.rows, shards.processes)

    @property
    def shards(self) -> Shards | None:
        return self.trainer.shards


def train_cascade(cascade: Cascade, args: argparse.Namespace, loss: nn.Module) -> None:
    """Train ``cascade`` with ``loss`` as ``args`` (training_parser) say; write the run's files to args.output_dir."""
    check_installed(args.tensorboard)
    check_validation(args)
    if args.init_from is not None and args.init_from.resolve() == args.output_dir.resolve():
        raise InputError(
            f"--init_from={args.init_from} is --output_dir, where the training would remove the models that it starts "
            "from; name another --output_dir"
        )
    with joined(choose_device(args), args.timeout) as processes:
        _train(cascade, args, loss, processes)


def _train(cascade: Cascade, args: argparse.Namespace, loss: nn.Module, processes: Processes | None) -> None:
    run = prepare(cascade, args, loss, processes)
    if processes is not None:
        agreed(processes, lambda: check_alike(run.config, processes))
    with _only_user(run), _generators(args.seed, run.device, processes):
        position = _start(run)
        if processes is not None:
            processes.begun()
        if run.config["data"] == "simulated":
            logger.warning("SIMULATED DATA: the numbers of this run say nothing about a real log")
        before = position.step
        with scalar_log(run.folder, args.tensorboard and run.is_first, args.batch_size, before) as scalars:
            position, seconds = _train_days(run, position, scalars)
        _finish(run, position, seconds)
    if not args.epochs:
        logger.info("%s, seed %d: untrained -> %s", cascade.name, args.seed, run.folder)
        return
    requests = position.step * args.batch_size
    logger.info(
        "%s, seed %d: %d steps, %d of them now; %d requests in %.1f s (%.0f requests/s) on %s -> %s",
        args.loss_type, args.seed, position.step, position.step - before, requests, seconds,
        requests / max(seconds, 1e-9), run.device, run.folder,
    )  # fmt: skip


def prepare(cascade: Cascade, args: argparse.Namespace, loss: nn.Module, processes: Processes | None = None) -> Run:
    """Open the data and build what trains; nothing is written to the run's folder. InputError of one process is raised
    by all."""
    if processes is not None:
        agreed(processes, lambda: check_arguments(args, processes.count))
    log, names, held_out = agreed(processes, lambda: _named_days(args))
    opened = partial(log.open_day, cascade=cascade, cache_dir=args.cache_dir, zone=args.time_zone,
                     history_length=args.seq_len)  # fmt: skip
    wanted = [*(names if args.epochs else []), *([] if held_out is None else [held_out])]
    days = open_days(wanted, opened, processes)
    return agreed(processes, lambda: _prepared(cascade, args, loss, processes, log, names, held_out, days))


def _named_days(args: argparse.Namespace) -> tuple[Log, list[str], str | None]:
    """The log, the days to train on, and that to validate on."""
    log = open_log(args.data_dir)
    names = training_days(log, args.train_days)
    if args.validate_every and args.epochs:
        return log, *hold_out_last(log, names, "--validate_every")
    return log, names, None


def _prepared(
    cascade: Cascade, args: argparse.Namespace, loss: nn.Module, processes: Processes | None, log: Log,
    names: Sequence[str], held_out: str | None, opened: Mapping[str, DayCache],
) -> Run:  # fmt: skip
    """What trains on the days that are open."""
    device, dtype = choose_device(args), DTYPES[args.dtype]
    kernels = load_kernels(dtype) if args.compile else None
    days = [opened[name] for name in names] if args.epochs else []
    validation_day = opened[held_out] if held_out is not None else None
    steps = [steps_of(day, args.batch_size) for day in days]
    keep_freed_memory(args.batch_size * longest_list(args, days) ** 2)
    config = run_config(cascade, args, loss, log, names, days, validation_day)
    config |= environment(device, kernels is not None)
    _check_start(args, config)
    length = config["arguments"]["seq_len"]
    models, stores, initial_seed, shards = initial_cascade(
        cascade, log.schema, args, days, length, device, validation_day, processes
    )
    if processes is not None:
        check_models(models)
    loss.to(device=device, dtype=dtype)
    trainer = Trainer(
        models, stores, loss, args.lr, args.optimizer, args.pull_from, kernels, AUTOCAST[args.autocast],
        skip_nonfinite=args.on_nonfinite == "skip", shards=shards,
    )  # fmt: skip
    validation = None if validation_day is None else Validation(cascade, validation_day, device, initial_seed, shards)
    return Run(args, config, trainer, days, steps, device, initial_seed, processes, validation)


def _check_start(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """InputError when --init_from is of a log whose indices stand for other values."""
    before = (read_json(args.init_from / CONFIG_FILE) or {}) if args.init_from is not None else {}
    if before.get("encoding_checksum") not in (None, config["encoding_checksum"]):
        raise InputError(
            f"--init_from={args.init_from}: trained on a log with another encoding than "
            f"{args.data_dir / ENCODING_OF_LOG}, so that ids would change their meaning; name a run on this log"
        )


@contextmanager
def _only_user(run: Run) -> Iterator[None]:
    """Hold the lock of the run's folder: the first process for all."""
    with ExitStack() as stack:
        lock = partial(only_user, run.folder, LOCK_FILE, "training in this folder")
        agreed(run.processes, lambda: stack.enter_context(lock()) if run.is_first else None)
        yield


@contextmanager
def _generators(seed: int, device: torch.device, processes: Processes | None) -> Iterator[None]:
    """PyTorch's generators seeded, for losses that draw random numbers, differently in each process; afterwards as they
    were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + (processes.rank << 32 if processes is not None else 0))
        yield


def _start(run: Run) -> Position:
    """Prepare the run's folder; the position to start from."""
    goes_on = run.args.resume or (run.processes is not None and run.processes.is_restart)
    resumes = agreed(run.processes, lambda: goes_on and _can_resume(run))
    if run.processes is not None:
        resumes = run.processes.gather(resumes)[0]
    position = Position()
    if resumes:
        saved = agreed(run.processes, lambda: _restored(run))
        position = Position(**saved.state.position)
        if run.processes is not None and (table := saved.unknown(run.processes)) is not None:
            raise InputError(
                f"{run.folder / STATE_FILE}: its ids of {table} are not those of this log; train again without --resume"
            )
    agreed(run.processes, lambda: _prepare_folder(run, resumes) if run.is_first else None)
    return position


def _restored(run: Run) -> OwnState:
    """Go on from the folder's state, and return it."""
    saved = run.restore()
    before = read_training(run.folder)
    run.config = {**run.config, "code": continued(before.get("code"), run.config["code"])}
    _check_position(run, Position(**saved.state.position))
    _check_best(run)
    return saved


def _prepare_folder(run: Run, resumes: bool) -> None:
    folder, stages = run.folder, list(run.trainer.models)
    remove_results(folder, stages)  # they must not stand beside this training's
    if not resumes:
        remove_state(folder)  # first: an old state never stands beside a new config.json
    remove_best(folder, {run.saved_best})
    remove_leftovers(folder, stages)
    remove_shards(folder, SavedState(folder / STATE_FILE).shards if resumes else ())
    checksum = run.config["encoding_checksum"]
    if checksum is not None:
        copy_folder(run.args.data_dir / ENCODING_OF_LOG, folder / ENCODING_FOLDER, checksum)
    write_json(folder / CONFIG_FILE, run.config)


def _check_position(run: Run, position: Position) -> None:
    """InputError for a position that this training cannot have reached."""
    reached = position.epoch * sum(run.steps) + sum(run.steps[: position.day]) + position.batch
    batches_of_day = [*run.steps, 0][min(position.day, len(run.steps))]
    possible = position.epoch < run.args.epochs and position.day <= len(run.days) and position.batch <= batches_of_day
    if not possible or position.step != reached:
        raise InputError(
            f"{run.folder / STATE_FILE}: its position, {position}, is none of this training; train again without "
            "--resume"
        )


def _check_best(run: Run) -> None:
    """InputError when the best models that the state names are missing, damaged, or of another run."""
    if run.keeps_best and run.best.step and run.is_first:
        for stage in run.trainer.models:
            folder = best_folder(run.folder, run.best.step)
            check_same_run(folder / model_file(stage), run.config)
            OpenModel(folder, stage).verify()


def _can_resume(run: Run) -> bool:
    """Whether there is a state to go on from; without one --resume starts at the beginning, so that it can be given
    from the first time on. InputError when the folder holds another run, or a complete one without its state."""
    folder = run.folder
    has_state = (folder / STATE_FILE).exists()
    if has_state or (folder / CONFIG_FILE).exists():
        _check_goes_on(folder, run.config, run.args.any_code)
    if has_state:
        check_same_run(folder / STATE_FILE, read_training(folder))
        return True
    if (folder / COST_FILE).exists():
        raise InputError(f"{folder / STATE_FILE}: no such file, but the training is complete; leave out --resume to "
                         "train again")  # fmt: skip
    logger.info("--resume: %s holds no saved state; training starts at the beginning", folder)
    return False


def _check_goes_on(folder: Path, config: Mapping[str, Any], any_code: bool) -> None:
    """InputError unless the training that the folder holds goes on as this one."""
    before = read_training(folder)
    difference = first_difference(before, config, more_days=True, more_epochs=True, any_code=any_code)
    if difference is not None and difference.is_code:
        raise InputError(
            f"--resume: {folder} holds a run of {difference}; --any_code goes on all the same, without --resume it is "
            "trained again, and another --output_dir keeps it"
        )
    if difference is not None:
        raise InputError(
            f"--resume: {folder} holds a run with {difference}; give the same arguments and log: only --epochs may "
            "grow, or in a training of one pass the list of --train_days"
        )
    for name in ("kernels", "threads", "device", "versions"):  # docs/determinism.md
        if before.get(name) != config[name]:
            logger.warning(
                "%s was trained with %s=%s, not %s: the last digits will differ from a run that was not stopped",
                folder, name, before.get(name), config[name],
            )  # fmt: skip


def _train_days(run: Run, position: Position, scalars: ScalarLog | None) -> tuple[Position, float]:
    """Train from ``position`` to the end; the state is saved after every day, and every --save_minutes within it.

    Returns the position reached, and the seconds of all steps. StoppedError when a signal asked to stop.
    """
    args, path = run.args, run.folder / STEP_LOG_FILE
    total = args.epochs * sum(run.steps)
    may_skip = max(1, int(SKIPPED_SHARE * total)) if run.trainer.skip_nonfinite else 0
    log = StepLog(
        path if run.is_first else None, run.config["data"], args.loss_type, position.step, may_skip, position.skipped,
        scalars,
    )  # fmt: skip
    if 0 < total < FEW_STEPS:
        logger.warning("only %d training steps: the models will hardly learn; lower --batch_size", total)
    progress = tqdm(
        total=total * args.batch_size, initial=position.step * args.batch_size, unit="req", desc=args.loss_type,
        disable=not (run.is_first and sys.stderr.isatty()),
    )  # fmt: skip
    with stop_signals() as stops, progress as bar:
        while not run.is_exhausted:
            if position.day == len(run.days):
                if position.epoch + 1 >= args.epochs:
                    break
                position = replace(position, epoch=position.epoch + 1, day=0)
            position = _train_day(run, position, log, bar, stops)
    if position.skipped:
        logger.warning("%d of %d steps were left out, because they were not finite", position.skipped, position.step)
    return position, log.seconds


def _train_day(run: Run, position: Position, log: StepLog, bar: "tqdm[Any]", stops: Sequence[int]) -> Position:
    """The rest of a day's steps."""
    args, day, join = run.args, run.days[position.day], _random_items(run, position.epoch)
    order = training_order(day, args.seed, position.epoch, args.shuffle)
    order = order[position.batch * args.batch_size : run.steps[position.day] * args.batch_size]
    part = slice(None) if run.processes is None else run.processes.slice_of(args.batch_size)
    began = saved = time.perf_counter()
    for batch in batches(day, order, args.batch_size, run.device, run.trainer.prepare, args.day_on_device, join, part):
        run.trainer.wishes = _wishes(args, stops, began - saved)
        terms = run.trainer.step(batch)
        position = replace(position, batch=position.batch + 1, step=position.step + 1)
        if run.processes is not None:
            run.processes.step = position.step
        ended = time.perf_counter()  # the wait for the batch counts; a GPU may still be at work
        log.add(position.step, day.day, ended - began, terms)
        bar.update(args.batch_size)
        if _is_due(run, position):
            _validate(run, position, log)
        if position.step % args.print_freq == 0:
            bar.set_postfix(day=day.day, loss=f"{log.flush():.4f}")
        wishes = _wishes(args, stops, ended - saved) if run.processes is None else run.trainer.wishes
        if wishes["stop"]:
            log.flush()
            run.save(replace(position, skipped=log.skipped))
            raise StoppedError(
                f"stopped at step {position.step}, day {day.day}; the state is saved in {run.folder}: go on with the "
                "same command and --resume",
                stops[0] if stops else signal.SIGTERM,
            )
        if run.is_exhausted:
            break
        began = time.perf_counter()
        if wishes["save"]:
            log.flush()
            run.save(replace(position, skipped=log.skipped))
            saved = began = time.perf_counter()
    log.flush()
    position = replace(position, skipped=log.skipped)
    if position.batch == run.steps[position.day]:
        position = replace(position, day=position.day + 1, batch=0)
    run.save(position)
    return position


def _wishes(args: argparse.Namespace, stops: Sequence[int], unsaved: float) -> dict[str, bool]:
    """What this process wants after a step, ``unsaved`` seconds after the state was last saved."""
    return {"stop": bool(stops), "save": bool(args.save_minutes) and unsaved > 60 * args.save_minutes}


def _random_items(run: Run, epoch: int) -> Join | None:
    """What adds --num_random_items to the batches of a pass."""
    count, group = run.args.num_random_items, len(run.config["cascade"]["groups"])
    return partial(with_items_of_batch, count=count, group=group, seed=run.args.seed, epoch=epoch) if count else None


def _is_due(run: Run, position: Position) -> bool:
    """Whether a validation follows the step: each --validate_every steps, and after the last of a pass, so that it does
    not matter whether another pass follows."""
    after_pass = position.day == len(run.days) - 1 and position.batch == run.steps[position.day]
    return run.validation is not None and (after_pass or position.step % run.args.validate_every == 0)


def _validate(run: Run, position: Position, log: StepLog) -> None:
    """Measure on the validation day; with --keep=best, models that are the best so far are written beside those that
    the saved state names, which stay until the next one is saved."""
    assert run.validation is not None
    models, stores = run.trainer.models, run.trainer.stores
    recall, metrics = run.validation.measure(models, stores)
    log.validated(position.step, metrics)
    run.best = run.best.after(recall, position.step)
    if run.keeps_best and run.best.step == position.step:
        run.save_models(best_folder(run.folder, position.step))
        if run.is_first:
            remove_best(run.folder, {run.saved_best, position.step})


def _finish(run: Run, position: Position, seconds: float) -> None:
    """Write the models, and at last what the training took."""
    if not run.keeps_best:
        run.trainer.flush()  # in place: nothing follows
        run.save_models(run.folder)
    if not run.is_first:
        return
    for stage in run.trainer.models if run.keeps_best else ():
        copy_model(best_folder(run.folder, run.best.step), run.folder, stage, run.note())
    cost = {
        "steps": position.step,
        "skipped_steps": position.skipped,
        "requests": position.step * run.args.batch_size,
        "seconds": seconds,
        "device": str(run.device),
        "peak_memory_bytes": memory.peak(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
    }
    if run.validation is not None:
        cost["validation"] = {
            "day": run.validation.day.day,
            "best_joint_recall": run.best.recall,
            "best_step": run.best.step,
            "kept_step": run.best.step if run.keeps_best else position.step,
            "stopped_early": position.step < run.args.epochs * sum(run.steps),
        }
        logger.info(
            "validation day %s: best joint recall %.4f, after step %d of %d; kept are the models of step %d",
            run.validation.day.day, run.best.recall, run.best.step, position.step, cost["validation"]["kept_step"],
        )  # fmt: skip
    write_json(run.folder / COST_FILE, cost)  # last: where it is, all is complete
