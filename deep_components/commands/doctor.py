"""Is everything here that a training needs, and is it sound? Says what is wrong, and what to do about it.

    python -m deep_components.commands.doctor --data_dir=data [--full] [--write_manifest]

Exit code 0 when nothing FAILs, 1 when something does, 2 for wrong arguments. By default of every file only the
beginning is read (and of Feather files the footer); ``--full`` reads all of every day, as its preparation would.
"""

import argparse
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import torch

from deep_components.cascade import SETTINGS, Cascade
from deep_components.cli import run_command
from deep_components.dataset.clock import time_zone
from deep_components.dataset.columnar import DEFAULT_TIME_ZONE, default_cache_dir
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import ColumnFiles, encode_day
from deep_components.dataset.manifest import MANIFEST_FILE, read_manifest, verify, write_manifest
from deep_components.errors import InputError
from deep_components.kernels import load_kernels
from deep_components.training import memory

PROJECT = Path(__file__).parents[2]
PYTHON_NEEDED = (3, 11)
CACHE_BYTES = 1_300  # of a request, for one setting
HISTORY_FILE_BYTES = 4_040  # of a request
PREPARATION_BYTES = 500_000_000  # of a day, whatever its size
EMBEDDING_BYTES = 32  # of a row of --emb_dim=8
CHECKPOINT_COPIES = 4  # a model, and in the state its values and two moments
WIDTH = 24

GOOD, ODD, BAD = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report: GOOD, ODD (it works, but the user should know) or BAD."""

    level: str
    subject: str
    text: str


def parse_args(argv: list[str]) -> argparse.Namespace:
    """What to check, and how closely."""
    parser = argparse.ArgumentParser(
        description="Check the environment and a log; say what is wrong and what to do.",
        epilog="Exit code: 0 nothing FAILs, 1 something does, 2 wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", type=Path, default=PROJECT / "data", help="the log (default: data)")
    parser.add_argument("--cache_dir", type=Path, help="where the columnar cache lies (default: DATA_DIR/cache)")
    parser.add_argument("--time_zone", default=DEFAULT_TIME_ZONE, help=f"of the log (default {DEFAULT_TIME_ZONE})")
    parser.add_argument("--full", action="store_true", help="read all of every day, and compare it with the manifest")
    parser.add_argument(
        "--write_manifest",
        action="store_true",
        help=f"write DATA_DIR/{MANIFEST_FILE}: the checksums against which the files are compared from then on",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Print the report; exit code 1 when something in it FAILs."""
    args = parse_args(argv)
    zone = time_zone(args.time_zone)
    sections: list[tuple[str, Iterator[Finding]]] = [("environment", environment())]
    if holds_data(args.data_dir):
        if args.write_manifest:
            count = write_manifest(args.data_dir, log_files(args.data_dir))
            sys.stdout.write(f"{args.data_dir / MANIFEST_FILE}: written, {count} files\n\n")
        sections.append((f"data in {args.data_dir}", data(args.data_dir)))
        for day in complete_days(args.data_dir):
            found = full_day(args.data_dir, day, zone) if args.full else quick_day(args.data_dir, day)
            sections.append((f"day {day}", found))
        sections.append(("space", space(args.data_dir, args.cache_dir)))
    elif args.write_manifest:
        raise InputError(f"--write_manifest: {args.data_dir} holds no log; see data/README.md for the tree expected")
    else:
        nothing = "nothing here; a script without --data_dir simulates a log in data/simulated"
        sections.append((f"data in {args.data_dir}", iter([Finding(GOOD, "log", nothing)])))
    levels = [finding.level for title, findings in sections for finding in report(title, findings)]
    failed, odd = levels.count(BAD), levels.count(ODD)
    sys.stdout.write(f"\n{summary(failed, odd)}\n")
    if failed:
        raise SystemExit(1)


def report(title: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Print the findings under their title, each as soon as it is there."""
    sys.stdout.write(f"{title}\n")
    for finding in findings:
        text = " ".join(finding.text.splitlines())
        sys.stdout.write(f"  {finding.level:<5} {finding.subject:<{WIDTH}} {text}\n")
        sys.stdout.flush()
        yield finding


def summary(failed: int, odd: int) -> str:
    if not failed and not odd:
        return "All is well."
    parts = [f"{count} {name}" for count, name in ((failed, BAD), (odd, ODD)) if count]
    return f"{' and '.join(parts)}; " + ("each line says what to do." if failed else "a training is possible.")


def checked(subject: str, check: Callable[[], str]) -> Finding:
    """OK with what ``check`` returns, FAIL with the sentence it raises."""
    try:
        return Finding(GOOD, subject, check())
    except InputError as error:
        return Finding(BAD, subject, str(error))


# ---- environment -----------------------------------------------------------------------------------------------------


def environment() -> Iterator[Finding]:
    """Python, the pinned packages, devices, kernels, memory."""
    version = ".".join(map(str, sys.version_info[:3]))
    needed = ".".join(map(str, PYTHON_NEEDED))
    if sys.version_info >= PYTHON_NEEDED:
        yield Finding(GOOD, "python", f"{version}, {sys.executable}")
    else:
        yield Finding(BAD, "python", f"{version}, but {needed} or later is needed; name one with PYTHON=")
    yield from packages(PROJECT / "requirements.txt")
    yield device()
    yield kernels()
    available = memory.available(torch.device("cpu"))
    level = GOOD if available > PREPARATION_BYTES else ODD
    yield Finding(level, "memory", f"{size(available)} available; preparing a day takes {size(PREPARATION_BYTES)}")


def packages(requirements: Path) -> Iterator[Finding]:
    """The pinned packages beside those installed."""
    try:
        lines = requirements.read_text().splitlines()
    except OSError as error:
        yield Finding(ODD, "packages", f"{requirements}: cannot be read ({error.strerror}); the pins are unknown")
        return
    for name, pin in (line.split("==") for line in lines if "==" in line and not line.startswith("#")):
        install = f"run: {sys.executable} -m pip install {name}=={pin}"
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(BAD, name, f"not installed; {install}")
            continue
        if installed.partition("+")[0] == pin:
            yield Finding(GOOD, name, installed)
        else:
            yield Finding(ODD, name, f"{installed}, the project is tested with {pin}; {install}")


def device() -> Finding:
    """What a training would run on."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text = f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}"
        return Finding(GOOD, "device", text)
    built = f"this PyTorch is built for CUDA {torch.version.cuda}, but sees no device" if torch.version.cuda else ""
    return Finding(ODD if built else GOOD, "device", f"{built or 'CPU'}; {os.cpu_count()} processors")


def kernels() -> Finding:
    """Whether the loops in C can be compiled."""
    with quiet(logging.getLogger(load_kernels.__module__), logging.ERROR):
        if load_kernels(torch.float32) is not None:
            return Finding(GOOD, "kernels", "compiled")
    text = "cannot be compiled, so a training on a CPU takes several times as long; install gcc, or say --no-compile"
    return Finding(ODD, "kernels", text)


# ---- data ------------------------------------------------------------------------------------------------------------


def holds_data(root: Path) -> bool:
    """Whether one of RecFlow's folders is there."""
    return any(path.parent.is_dir() for path in (*recflow.day_paths(root, ""), recflow.id_count_path(root)))


def complete_days(root: Path) -> list[str]:
    """The days whose three files are here; none where a file's name is no date, which the report says."""
    try:
        return recflow.days_of(root)[0]
    except InputError:
        return []


def log_files(root: Path) -> list[Path]:
    """All files of the log but its manifest."""
    days = sorted(set().union(*recflow.days_of(root)))
    paths = [path for day in days for path in recflow.day_paths(root, day)]
    return [path for path in (*paths, recflow.id_count_path(root), root / recflow.ORIGIN_FILE) if path.exists()]


def data(root: Path) -> Iterator[Finding]:
    """What concerns the log as a whole."""
    yield checked("origin", partial(recflow.read_origin, root))
    yield checked("days", partial(_days, root))
    known = len(set(complete_days(root)) & set(recflow.PERIOD_1))
    if 0 < known < len(recflow.PERIOD_1) and not (root / recflow.ORIGIN_FILE).exists():
        text = f"{known} of its {len(recflow.PERIOD_1)} days are here; the paper's protocol takes all of them"
        yield Finding(ODD, "RecFlow's Period 1", text)
    yield checked("id counts", partial(_id_counts, root))
    yield _manifest(root)


def _days(root: Path) -> str:
    days = recflow.available_days(root)
    if len(days) == 1:
        return f"{days[0]} alone: to train on it name it with --train_days, or add days"
    return f"{len(days)}, {days[0]} .. {days[-1]}"


def _id_counts(root: Path) -> str:
    return ", ".join(f"{field} {count:,}" for field, count in recflow.read_id_counts(root).items())


def _manifest(root: Path) -> Finding:
    try:
        manifest = read_manifest(root)
        if manifest is None:
            text = f"none, so bit rot in the files would pass unseen; --write_manifest writes {MANIFEST_FILE}"
            return Finding(GOOD, "manifest", text)
        gone = [root / name for name in sorted(manifest) if not (root / name).exists()]
        if gone:
            raise InputError(f"{gone[0]}: no such file, though {MANIFEST_FILE} lists it; fetch the file again")
        verify(root, log_files(root), sizes_only=True)
    except InputError as error:
        return Finding(BAD, "manifest", str(error))
    return Finding(GOOD, "manifest", f"{len(manifest)} files, whose sizes fit; --full compares their content too")


def quick_day(root: Path, day: str) -> Iterator[Finding]:
    """The beginnings of the day's files."""
    feather, requests, histories = recflow.day_paths(root, day)
    for cascade in SETTINGS.values():
        truth = cascade.groups[0]
        yield checked(f"all_stage, {cascade.name}", partial(_rows, feather, truth.name, str(truth.index_field)))
    yield checked("request_id_dict", partial(_requests, requests, recflow.read_request_dict))
    yield checked("seq_effective_50_dict", partial(_requests, histories, recflow.read_history_dict))


def _rows(path: Path, truth_flag: str, truth_index: str) -> str:
    rows = recflow.check_feather(path, truth_flag, truth_index)
    return f"{size(path.stat().st_size)}, its first {rows:,} rows are sound"


def _requests(path: Path, read: Callable[[Path], Iterator[Sequence[object]]]) -> str:
    first = next(read(path), ())
    if not first:
        raise InputError(f"{path}: holds no request; fetch the file again")
    return f"{size(path.stat().st_size)}, its first {len(first):,} requests are sound"


def full_day(root: Path, day: str, zone: ZoneInfo) -> Iterator[Finding]:
    """The whole day, encoded for every setting into a folder that is removed afterwards."""
    yield checked("manifest", partial(_compared, root, day))
    for cascade in SETTINGS.values():
        repairs: dict[str, int] = {}
        yield checked(cascade.name, partial(_encoded, root, day, cascade, zone, repairs))
        for text, count in repairs.items():
            if count:
                yield Finding(ODD, cascade.name, f"{text}: {count:,}; data/README.md says what is done with them")


def _compared(root: Path, day: str) -> str:
    verify(root, recflow.day_paths(root, day))
    return "none" if read_manifest(root) is None else "the SHA-256 of all three files fit"


@contextmanager
def quiet(logger: logging.Logger, least: int = logging.WARNING) -> Iterator[None]:
    """Leave out what the logger says below a level."""
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)


def _encoded(root: Path, day: str, cascade: Cascade, zone: ZoneInfo, repairs: dict[str, int]) -> str:
    counts = recflow.read_id_counts(root)
    with tempfile.TemporaryDirectory() as folder, quiet(logging.getLogger(encode_day.__module__)):
        try:
            repairs |= encode_day(root, day, cascade, counts, zone, ColumnFiles(Path(folder)))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); set TMPDIR to another folder") from error
        requests = len(np.load(Path(folder) / "request_id.npy", mmap_mode="r"))
    return f"all {requests:,} requests read and encoded"


# ---- space -----------------------------------------------------------------------------------------------------------


def space(root: Path, cache_dir: Path | None) -> Iterator[Finding]:
    """Room for caches and checkpoints."""
    histories = [recflow.history_path(root, day) for day in complete_days(root)]
    requests = sum(path.stat().st_size for path in histories) // HISTORY_FILE_BYTES
    cache = cache_dir or default_cache_dir(root)
    yield _room("cache", cache, requests * CACHE_BYTES * len(SETTINGS), "--cache_dir")
    try:
        rows = sum(recflow.read_id_counts(root).values())
    except InputError:
        return  # said above
    stages = max(len(cascade.stages) for cascade in SETTINGS.values())
    yield _room("a run", PROJECT, rows * EMBEDDING_BYTES * stages * CHECKPOINT_COPIES, "--output_dir")


def _room(subject: str, folder: Path, needed: int, flag: str) -> Finding:
    """Whether the folder, or where it would be made, can be written to and has ``needed`` bytes."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Finding(BAD, subject, f"{there}: cannot be written; name another folder with {flag}")
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size(free)} free, at most {size(needed)} needed"
    if free > needed:
        return Finding(GOOD, subject, text)
    return Finding(ODD, subject, f"{text}; free some, or name another folder with {flag}")


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    sys.exit(run_command(main))
