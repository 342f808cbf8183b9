"""Is everything here that a training needs, and is it sound? Says what is wrong, and what to do about it.

By default the beginning of every file of a log is read; ``--full`` reads and encodes all of it, as a training would.
"""

import argparse
import importlib.metadata
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from deep_components.cascade import SETTINGS, TWO_STAGE, Cascade, Group
from deep_components.cli import Parser, printable
from deep_components.dataset.cache import default_cache_dir
from deep_components.dataset.clock import DEFAULT_TIME_ZONE
from deep_components.dataset.columnar import REPEATED, repeated_items
from deep_components.dataset.days import missing_days
from deep_components.dataset.log import ColumnarLog, Log, open_log
from deep_components.dataset.manifest import MANIFEST_FILE, read_manifest, verify, write_manifest
from deep_components.errors import InputError
from deep_components.kernels import load_kernels
from deep_components.training.memory import available

PROJECT = Path(__file__).parents[2]
PREPARATION_BYTES = 500_000_000  # memory to encode a day, whatever its size
EMBEDDING_BYTES = 32  # of a row of --emb_dim=8
CHECKPOINT_COPIES = 4  # a model, and in the state its values and two moments

OK, WARN, FAIL = "OK", "WARN", "FAIL"


class Finding(NamedTuple):
    """One line of the report; WARN: it works, but the user should know."""

    level: str
    subject: str
    text: str


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Check the environment and a log; say what is wrong and what to do.",
        epilog="Exit code: 0 nothing FAILs, 1 something does, 2 wrong arguments.",
    )
    parser.add_argument("--data_dir", type=Path, help="the log (default: the project's data, where it holds one)")
    parser.add_argument("--cascade", metavar="FILE", help="check the log for this one (default: both settings)")
    parser.add_argument("--cache_dir", type=Path, help="where the columnar cache lies (default: DATA_DIR/cache)")
    parser.add_argument("--time_zone", default=DEFAULT_TIME_ZONE, help=f"of the log (default {DEFAULT_TIME_ZONE})")
    parser.add_argument("--full", action="store_true", help="read all of every day, and compare it with the manifest")
    parser.add_argument("--write_manifest", action="store_true",
                        help=f"write DATA_DIR/{MANIFEST_FILE}: the checksums against which the files are compared from "
                        "then on")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Print the report; exit code 1 when something in it FAILs."""
    args = parse_args(argv)
    if args.write_manifest:
        if args.data_dir is None:
            raise InputError("--write_manifest: name the log with --data_dir")
        count = write_manifest(args.data_dir, open_log(args.data_dir).files())
        sys.stdout.write(printable(f"{args.data_dir / MANIFEST_FILE}: written, {count} files") + "\n\n")
    levels = [*_report("environment", environment()), *_report("log", log_and_room(args))]
    failed, odd = levels.count(FAIL), levels.count(WARN)
    counts = " and ".join(f"{count} {level}" for count, level in ((failed, FAIL), (odd, WARN)) if count)
    advice = "each line says what to do" if failed else "a training is possible"
    sys.stdout.write(f"\n{counts}; {advice}.\n" if counts else "\nAll is well.\n")
    if failed:
        raise SystemExit(1)


def _report(title: str, findings: Iterator[Finding]) -> Iterator[str]:
    """Print the findings under their title, each as soon as it is there; yields their levels."""
    sys.stdout.write(f"{title}\n")
    for level, subject, text in findings:
        line = f"{subject:<24} {' '.join(text.splitlines())}"
        sys.stdout.write(f"  {level:<5} {printable(line)}\n")
        sys.stdout.flush()
        yield level


def checked(subject: str, check: Callable[[], str]) -> Finding:
    """OK with what ``check`` returns, FAIL with the sentence it raises."""
    try:
        return Finding(OK, subject, check())
    except InputError as error:
        return Finding(FAIL, subject, str(error))


def environment() -> Iterator[Finding]:
    """Python, the pinned packages, the device, kernels, memory."""
    yield Finding(OK, "python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from packages(PROJECT / "requirements.txt")
    yield _device()
    with _quiet(load_kernels.__module__):
        compiled = load_kernels(torch.float32) is not None
    slow = "cannot be used, so a training on a CPU takes several times as long; install gcc or, where it is, do what "
    slow += "a training's warning says, or say --no-compile"
    yield Finding(OK, "kernels", "compiled") if compiled else Finding(WARN, "kernels", slow)
    free = available(torch.device("cpu"))
    text = f"{size(free)} available; preparing a day takes {size(PREPARATION_BYTES)}"
    yield Finding(OK if free > PREPARATION_BYTES else WARN, "memory", text)


def packages(requirements: Path) -> Iterator[Finding]:
    """The pinned packages beside those installed; the pins are the file's or, where there is none, those that the
    project was installed with."""
    there = requirements.exists()
    try:
        written = requirements.read_text(encoding="utf-8").splitlines() if there else None
        lines = importlib.metadata.requires("lcron") or [] if written is None else written
    except importlib.metadata.PackageNotFoundError:
        yield Finding(WARN, "packages", f"{requirements}: no such file, so the versions to compare with are unknown")
        return
    for name, pin in (line.split("==") for line in lines if "==" in line and not re.search("[#;]", line)):
        install = f"run: {sys.executable} -m pip install {name}=={pin}"
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(FAIL, name, f"not installed; {install}")
            continue
        same = installed.partition("+")[0] == pin
        text = installed if same else f"{installed}, the project is tested with {pin}; {install}"
        yield Finding(OK if same else WARN, name, text)


def _device() -> Finding:
    """What a training would run on."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text = f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}"
        return Finding(OK, "device", text)
    built = f"this PyTorch is built for CUDA {torch.version.cuda}, but sees no device" if torch.version.cuda else ""
    return Finding(WARN if built else OK, "device", f"{built or 'CPU'}; {os.cpu_count()} processors")


def log_and_room(args: argparse.Namespace) -> Iterator[Finding]:
    """The log as a whole, each of its days, and the room that preparing it and a run take."""
    root = args.data_dir or PROJECT / "data"
    if args.data_dir is None and not (root / "all_stage").exists():
        yield Finding(WARN, "log", "none named by --data_dir; a script without it simulates one in data/simulated")
        return
    if not root.is_dir():
        yield Finding(FAIL, "log", f"{root}: no such folder; --data_dir names the folder of a log")
        return
    try:
        log = open_log(root)
        days = log.days(named=True)
    except InputError as error:
        yield Finding(FAIL, "log", str(error))
        return
    cascades = _cascades(args.cascade, log)
    yield Finding(OK, "origin", log.origin)
    yield from _days(log, days)
    yield Finding(OK, "tables", ", ".join(f"{name} {table.size:,}" for name, table in log.schema.tables.items()))
    yield _manifest(log)
    for day in days:
        for cascade in cascades:
            yield from _full(log, day, cascade, args.time_zone) if args.full else _quick(log, day, cascade)
    yield from _space(log, days, cascades, args.cache_dir)


def _cascades(named: str | None, log: Log) -> list[Cascade]:
    """The cascade that is named, else the paper's two, or for a log with groups of its own one that has these."""
    if named:
        return [SETTINGS.get(named) or Cascade.from_toml(Path(named))]
    if isinstance(log, ColumnarLog) and log.groups:
        stages = tuple(replace(stage, keep=1) for stage in TWO_STAGE.stages)  # any log has as many items
        return [Cascade(stages, tuple(map(Group, log.groups)), name="own")]
    return list(SETTINGS.values())


def _days(log: Log, days: list[str]) -> Iterator[Finding]:
    alone = "; alone: to train on it name it with --train_days, or add days" if len(days) == 1 else ""
    yield checked("days", lambda: f"{len(log.days())}, {days[0]} .. {days[-1]}{alone}")
    if absent := missing_days(log):
        yield Finding(WARN, "published protocol", f"lacks {', '.join(absent)}; {_without(log, days)}")


def _without(log: Log, days: list[str]) -> str:
    """How to train on a log that lacks days of the protocol."""
    *train, test = [day for day in log.protocol_days if day in days]
    try:
        log.days()
    except InputError:  # files of the others are there: a training must be told that they are not meant
        if train:
            return f"to train without them say --train_days={','.join(train)} --test_day={test}; the table will say so"
        return "to train without them name other days with --train_days=DAY,DAY and --test_day=DAY"
    return (f"without them a training takes all days here but the last, {days[-1]}, which tests; "
            "--train_days=DAY,DAY and --test_day=DAY name others")  # fmt: skip


def _manifest(log: Log) -> Finding:
    def compare() -> str:
        manifest = read_manifest(log.folder)
        if manifest is None and isinstance(log, ColumnarLog):
            return "none, and none needed: each day has checksums of its own"
        if manifest is None:
            return f"none, so bit rot in the files would pass unseen; --write_manifest writes {MANIFEST_FILE}"
        gone = [log.folder / name for name in sorted(manifest) if not (log.folder / name).exists()]
        if gone:
            raise InputError(f"{gone[0]}: no such file, though {MANIFEST_FILE} lists it; fetch the file again")
        verify(log.folder, log.files(), sizes_only=True)
        return f"{len(manifest)} files, whose sizes fit; --full compares their content too"

    return checked("manifest", compare)


def _quick(log: Log, day: str, cascade: Cascade) -> Iterator[Finding]:
    """The beginnings of the day's files."""
    found = [checked(f"{day} {cascade.name}", check) for check in log.checks(day, cascade).values()]
    failed = [finding for finding in found if finding.level == FAIL]
    yield from failed or [found[0]._replace(text="; ".join(dict.fromkeys(finding.text for finding in found)))]


def _full(log: Log, day: str, cascade: Cascade, zone: str) -> Iterator[Finding]:
    """The whole day, compared with the manifest and encoded into a folder that is removed afterwards."""
    repairs: dict[str, int] = {}

    def encode() -> str:
        verify(log.folder, log.day_files(day))
        with tempfile.TemporaryDirectory() as folder, _quiet("deep_components.dataset"):
            opened = log.open_day(day, cascade, Path(folder), zone)
            repairs.update({REPEATED: repeated_items(opened.schema, opened.columns)} | dict(opened.repairs))
            return f"all {len(opened):,} requests read and encoded"

    yield checked(f"{day} {cascade.name}", encode)
    for text, count in repairs.items():
        if count:
            advice = f"{'docs/format' if text == REPEATED else 'data/README'}.md says what is done with them"
            yield Finding(WARN, f"{day} {cascade.name}", f"{text}: {count:,}; {advice}")


def _space(log: Log, days: list[str], cascades: list[Cascade], cache_dir: Path | None) -> Iterator[Finding]:
    """On the disks of the cache, unless the log is one, and of a run."""
    if not isinstance(log, ColumnarLog):
        source = sum(path.stat().st_size for day in days for path in log.day_files(day))
        yield _room("cache", cache_dir or default_cache_dir(log.folder), source * len(cascades) // 4, "--cache_dir")
    rows = sum(table.size for table in log.schema.tables.values())
    stages = max(len(cascade.stages) for cascade in cascades)
    yield _room("a run", Path.cwd(), rows * EMBEDDING_BYTES * stages * CHECKPOINT_COPIES, "--output_dir")


def _room(subject: str, folder: Path, needed: int, flag: str) -> Finding:
    """Whether the folder, or where it would be made, can be written to and has ``needed`` bytes."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Finding(FAIL, subject, f"{there}: cannot be written; name another folder with {flag}")
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size(free)} free, at most {size(needed)} needed"
    advice = "" if free > needed else f"; free some, or name another folder with {flag}"
    return Finding(WARN if advice else OK, subject, text + advice)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Leave out what a logger says: the report says it."""
    named = logging.getLogger(logger)
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
