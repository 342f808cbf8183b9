"""Training a cascade: scores of all stages -> one loss -> one backward pass -> one optimizer step.

Names no method. Adam is elementwise and stages share nothing, so one optimizer over all parameters equals one per
stage, and methods that train each stage by its own step are the sum of their losses.
"""

import argparse
import json
import logging
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deep_components import checkpoint
from deep_components.arguments import DTYPES, choose_device
from deep_components.batch import CascadeBatch
from deep_components.cascade import Cascade
from deep_components.dataset import recflow
from deep_components.dataset.columnar import DayCache, open_day
from deep_components.dataset.days import training_days
from deep_components.dataset.encoding import LOG_COLUMN
from deep_components.dataset.loader import batches, steps_of, training_order
from deep_components.errors import InputError
from deep_components.files import make_folder, write_atomically
from deep_components.models import build_models
from deep_components.models.embedding import FieldEmbedding, table_ids
from deep_components.optim.deferred_adam import DeferredAdam
from deep_components.watching import ScalarLog, check_installed, gradient_norms, scalar_log

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8
FEW_STEPS = 50
LARGE_TABLE = 1 << 20  # about where the two cost the same at a batch of 1,024 (benchmarks/optimizer.py)

# Arguments that may differ between a run and its continuation.
_FREE_ON_RESUME = (
    "resume",
    "output_dir",
    "data_dir",
    "cache_dir",
    "device",
    "cuda",
    "print_freq",
    "tensorboard",
    "epochs",
    "train_days",
)

logger = logging.getLogger(__name__)


class Trainer:
    """Stage models, a loss and their optimizer; one call of :meth:`step` per batch.

    Args:
        models: stage -> model, in serving order.
        loss: the method; its parameters train too.
        lr: learning rate.
        optimizer: "deferred_adam" (dense Adam; large ID tables cost what a batch touches of them), "adam" (torch's,
            dense), or "sparse_adam" (torch's SparseAdam for all ID tables: another algorithm).
        large_table: rows from which "deferred_adam" defers a table; below, a dense step is cheaper.
        watch_gradients: a step also returns ``gradient_norm.<stage>``.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        loss: nn.Module,
        lr: float,
        optimizer: str = "deferred_adam",
        large_table: int = LARGE_TABLE,
        watch_gradients: bool = False,
    ) -> None:
        self.models, self.loss, self.watch_gradients = models, loss, watch_gradients
        parts = {**models, "loss": loss}
        self.parameters = {
            f"{part}/{name}": p for part, module in parts.items() for name, p in module.named_parameters()
        }
        embeddings = [cast(FieldEmbedding, model.get_submodule("embedding")) for model in models.values()]
        limit = {"deferred_adam": large_table, "sparse_adam": 0}.get(optimizer, math.inf)
        self.sparse_fields = frozenset(field for field, count in embeddings[0].rows.items() if count >= limit)
        for embedding in embeddings:
            embedding.sparse = self.sparse_fields
        tables = {f"{stage}/embedding.{field}" for stage in models for field in self.sparse_fields}
        sparse = {name: p for name, p in self.parameters.items() if name in tables}
        dense = [p for name, p in self.parameters.items() if name not in tables]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(dense, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON)
        ]
        self.deferred: DeferredAdam | None = None
        if optimizer == "deferred_adam":
            self.deferred = DeferredAdam(sparse, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON)
        elif sparse:
            self.optimizers.append(
                torch.optim.SparseAdam(list(sparse.values()), lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON)
            )

    def step(self, batch: CascadeBatch) -> dict[str, Tensor]:
        """One optimizer step; returns the loss and its terms, detached and still on the device."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.deferred is not None:
            for field in sorted(self.sparse_fields):
                rows = table_ids(batch.features, field).unique()
                for stage in self.models:
                    self.deferred.catch_up(f"{stage}/embedding.{field}", rows)
        scores = [model(batch.features) for model in self.models.values()]
        terms = self.loss(*scores, batch.targets)
        terms["loss"].backward()
        values = {name: term.detach().clone() for name, term in terms.items()}  # a weight is about to change in place
        if self.watch_gradients:
            values |= gradient_norms(self.models)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.deferred is not None:
            self.deferred.step()
        return values

    def state(self) -> dict[str, Tensor]:
        """All parameters and optimizer state as named tensors; deferred tables are brought up to date."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        state = {}
        if self.deferred is not None:
            self.deferred.flush()
            state = {f"deferred/{name}": value for name, value in self.deferred.state().items()}
        state |= {f"parameter/{name}": value.detach() for name, value in self.parameters.items()}
        return state | {
            f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value)
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`state`. InputError when a parameter is missing or has another shape."""
        for name, parameter in self.parameters.items():
            value = state.get(f"parameter/{name}")
            if value is None or value.shape != parameter.shape:
                raise InputError(f"the saved state does not fit: {name} is missing or has another shape; train again")
            parameter.copy_(value)
        if self.deferred is not None:
            prefix = "deferred/"
            self.deferred.restore({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
        for optimizer in self.optimizers:
            self._restore_optimizer(optimizer, state)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        dense = isinstance(optimizer, torch.optim.Adam)
        for parameter in optimizer.param_groups[0]["params"]:
            prefix = f"optimizer/{names[id(parameter)]}/"
            entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if entries:  # Adam counts its steps on the CPU; SparseAdam in a number; moments lie with the parameter
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if key != "step" else value if dense else int(value)
                    for key, value in entries.items()
                }


class StepLog:
    """train.jsonl: an object per step. Terms stay on the device until :meth:`flush`: a step waits for nothing."""

    def __init__(self, path: Path, origin: str, kept_steps: int, scalars: ScalarLog | None = None) -> None:
        self.path, self.origin, self.scalars = path, origin, scalars
        try:
            lines = path.read_text().splitlines(keepends=True)[:kept_steps] if kept_steps else []
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); train again without --resume") from error
        write_atomically(path, lambda file: file.write("".join(lines).encode()))
        self._waiting: list[tuple[int, str, float, dict[str, Tensor]]] = []

    def add(self, step: int, day: str, seconds: float, terms: dict[str, Tensor]) -> None:
        self._waiting.append((step, day, seconds, terms))

    def flush(self) -> float:
        """Write what waits and return the last loss. InputError when a loss is not finite."""
        if not self._waiting:
            return math.nan
        names = list(self._waiting[0][3])
        values = torch.stack([torch.stack([terms[name].double() for name in names]) for *_, terms in self._waiting])
        with self.path.open("a") as file:
            for (step, day, seconds, _), row in zip(self._waiting, values.tolist(), strict=True):
                terms = dict(zip(names, row, strict=True))
                if not math.isfinite(terms["loss"]):
                    raise InputError(
                        f"step {step}, day {day}: the loss is {terms['loss']} (its terms: "
                        f"{', '.join(f'{name}={value:.4g}' for name, value in terms.items())}); lower --lr"
                    )
                record = {"step": step, "day": day, **terms, "seconds": round(seconds, 6), "data": self.origin}
                file.write(json.dumps(record) + "\n")
                if self.scalars is not None:
                    self.scalars.add(record)
        if self.scalars is not None:
            self.scalars.flush()
        self._waiting.clear()
        return float(values[-1, names.index("loss")])


def train_cascade(cascade: Cascade, args: argparse.Namespace, loss: nn.Module) -> None:
    """Train ``cascade`` with ``loss`` as ``args`` (training_parser) say; write the run's files to args.output_dir."""
    device, dtype = choose_device(args), DTYPES[args.dtype]
    check_installed(args.tensorboard)
    origin = recflow.read_origin(args.data_dir)
    names = training_days(args.data_dir, args.train_days)
    counts = recflow.read_id_counts(args.data_dir)
    vocabulary = {field: counts[column] for field, column in LOG_COLUMN.items()}
    models = build_models(cascade, vocabulary, args.emb_dim, args.nn_units, args.seed)
    for module in (*models.values(), loss):
        module.to(device=device, dtype=dtype)
    if args.init_from is not None:
        checkpoint.load_models(args.init_from, models)
    days = [
        open_day(args.data_dir, name, cascade, args.cache_dir, args.time_zone, args.seq_len)
        for name in (names if args.epochs else [])
    ]
    steps = [steps_of(day, args.batch_size) for day in days]
    trainer = Trainer(models, loss, args.lr, args.optimizer, watch_gradients=args.tensorboard)
    config = _config(cascade, args, device, origin, names, counts)
    config["data_checksums"] = {day.day: day.checksum for day in days}
    position = _start(args, trainer, config)
    if origin == "simulated":
        logger.warning("SIMULATED DATA: the numbers of this run say nothing about a real log")
    started, first = time.perf_counter(), position["step"]
    with scalar_log(args.output_dir, args.tensorboard, args.batch_size, first) as scalars:
        position = _train_days(args, trainer, days, steps, device, origin, position, scalars)
    seconds = time.perf_counter() - started
    requests = (position["step"] - first) * args.batch_size
    states = {stage: model.state_dict() for stage, model in models.items()}
    checkpoint.save_models(args.output_dir, states, {"data": origin, "loss_type": args.loss_type})
    cost = {"steps": position["step"] - first, "requests": requests, "seconds": seconds, "device": str(device)}
    cost |= {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    cost |= {"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
    checkpoint.write_json(args.output_dir / checkpoint.COST_FILE, cost)  # last: where it stands, training is complete
    if not args.epochs:
        logger.info("%s, seed %d: untrained -> %s", cascade.name, args.seed, args.output_dir)
        return
    logger.info(
        "%s, seed %d: %d steps, %d requests in %.1f s (%.0f requests/s) on %s -> %s",
        args.loss_type, args.seed, position["step"] - first, requests, seconds, requests / max(seconds, 1e-9), device,
        args.output_dir,
    )  # fmt: skip


def _train_days(
    args: argparse.Namespace,
    trainer: Trainer,
    days: Sequence[DayCache],
    steps: Sequence[int],
    device: torch.device,
    origin: str,
    position: dict[str, int],
    scalars: ScalarLog | None,
) -> dict[str, int]:
    """Train from ``position`` (pass, its days done, steps made) to the end; the state is saved after every day.

    ``steps`` are those of each day.
    """
    log = StepLog(args.output_dir / checkpoint.STEP_LOG_FILE, origin, position["step"], scalars)
    if args.epochs and 0 < args.epochs * sum(steps) < FEW_STEPS:
        logger.warning(
            "only %d training steps: the models will hardly learn; lower --batch_size", args.epochs * sum(steps)
        )
    done = (position["epoch"], position["day"])
    schedule = [(epoch, place) for epoch in range(args.epochs) for place in range(len(days)) if (epoch, place) >= done]
    total = sum(steps[place] for _, place in schedule) * args.batch_size
    step = position["step"]
    with tqdm(total=total, unit="req", desc=args.loss_type, disable=not sys.stderr.isatty()) as bar:
        for epoch, place in schedule:
            day = days[place]
            order = training_order(day, args.seed, epoch, args.shuffle)[: steps[place] * args.batch_size]
            began = time.perf_counter()
            for batch in batches(day, order, args.batch_size, device):
                terms = trainer.step(batch)
                step += 1
                ended = time.perf_counter()  # the wait for the batch counts; a GPU may still be at work
                log.add(step, day.day, ended - began, terms)
                began = ended
                bar.update(args.batch_size)
                if step % args.print_freq == 0:
                    bar.set_postfix(day=day.day, loss=f"{log.flush():.4f}")
            log.flush()
            position = {"epoch": epoch, "day": place + 1, "step": step}
            checkpoint.save_state(args.output_dir / checkpoint.STATE_FILE, trainer.state(), position)
    return position


def _start(args: argparse.Namespace, trainer: Trainer, config: dict[str, Any]) -> dict[str, int]:
    """Prepare the run's folder; the position to start from."""
    run: Path = args.output_dir
    make_folder(run)
    position = {"epoch": 0, "day": 0, "step": 0}
    if args.resume:
        _check_same_run(run, config)
        tensors, position = checkpoint.load_state(run / checkpoint.STATE_FILE)
        trainer.restore(tensors)
    else:
        (run / checkpoint.STATE_FILE).unlink(missing_ok=True)
    checkpoint.remove_results(run)  # they must not stand beside this training's
    checkpoint.write_json(run / checkpoint.CONFIG_FILE, config)
    return position


def _check_same_run(run: Path, config: Mapping[str, Any]) -> None:
    """InputError unless the run in the folder was started with the same arguments and data."""
    before = checkpoint.read_training(run)
    if before["setting"] != config["setting"]:
        raise InputError(f"--resume: {run} is a {before['setting']} run, not {config['setting']}; use its own command")
    if (before["data"], before["id_counts"]) != (config["data"], config["id_counts"]):
        raise InputError(f"--resume: {run} was trained on other data (origin or id counts differ); give the same log")
    if (before["arguments"]["epochs"] or 0) > config["arguments"]["epochs"]:
        raise InputError(
            f"--resume: {run} was started with --epochs={before['arguments']['epochs']}; give as many or more"
        )
    for name, value in config["arguments"].items():
        old = before.get("arguments", {}).get(name)
        if name not in _FREE_ON_RESUME and old != value:
            raise InputError(f"--resume: {run} was trained with --{name}={old}, not {value}; give the same arguments")
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
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
