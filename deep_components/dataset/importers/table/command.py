"""``lcron import --mapping=log.toml --output_dir=D``: a table of requests and candidates becomes a log.

Rows are read once, checked, and put into scratch files by day and request; then requests are assembled, vocabularies
and scales are learnt from the training days, and the days are encoded. All passes work on pieces of bounded size, in
``jobs`` processes; the scratch files stand beside the output, which appears when it is complete.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa

from deep_components.cli import progress, run_command
from deep_components.dataset.encoding import Encoding, keys_of
from deep_components.dataset.importers.table.clean import Cleaned, DayCounts, clean
from deep_components.dataset.importers.table.history import derive
from deep_components.dataset.importers.table.learn import Samples, learn
from deep_components.dataset.importers.table.mapping import LogMapping, read_mapping
from deep_components.dataset.importers.table.plan import Plan, Problem, make_plan, needed_columns
from deep_components.dataset.importers.table.scan import Scanned, csv_types, scan, typed
from deep_components.dataset.importers.table.source import Source, batches, open_source
from deep_components.dataset.importers.table.tasks import ENGINES, Run, cores, workers
from deep_components.errors import InputError, StoppedError
from deep_components.files import locked, make_folder

logger = logging.getLogger(__name__)


@dataclass
class Read:
    """What the first two passes found."""

    plan: Plan
    scanned: Scanned
    counts: dict[str, DayCounts]  # day -> its counts, of all buckets
    samples: Samples
    problems: Counter[Problem] = field(default_factory=Counter)

    @property
    def days(self) -> list[str]:
        """The days that have requests."""
        return sorted(day for day, counts in self.counts.items() if counts.requests)

    @property
    def training_days(self) -> list[str]:
        return [day for day in self.days if day not in self.test_days]

    @property
    def test_days(self) -> list[str]:
        return [day for day in sorted(self.scanned.days)[-self.plan.mapping.test_days :] if day in self.days]


def import_table(mapping_path: Path, output_dir: Path, jobs: int = 1, engine: str = "process") -> None:
    """Make the log. InputError for the first problem; nothing is left then, nor when it is stopped."""
    mapping, source = _opened(mapping_path)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir={output_dir}: is there already; remove it or name another folder")
    with _scratch(output_dir) as folder, workers(jobs, folder, engine) as run:
        read = read_rows(run, make_plan(mapping, source, folder, strict=True), source)
        for problem in row_problems(read, source):
            raise InputError(problem)
        _check_days(read)
        log = folder / "log"
        _write_log(run, read, log)
        if output_dir.exists():
            output_dir.rmdir()
        log.rename(output_dir)
    for day in read.days:
        counts = read.counts[day]
        logger.info("%s: %s requests, %s items", day, f"{counts.requests:,}", f"{counts.rows:,}")


def _opened(mapping_path: Path) -> tuple[LogMapping, Source]:
    """The mapping, and the files that have its columns. InputError for the first problem."""
    mapping, problems = read_mapping(mapping_path)
    source = open_source(mapping, needed_columns(mapping)) if mapping is not None else None
    problems += source.problems if source is not None else []
    if mapping is None or source is None or problems:
        raise InputError(problems[0])
    return mapping, source


def read_rows(run: Run, plan: Plan, source: Source) -> Read:
    """The first two passes over the table."""
    for bucket in range(plan.buckets):
        (plan.scratch / str(bucket)).mkdir()
    needed = needed_columns(plan.mapping)
    types = csv_types(plan.mapping)
    columns = {name: types.get(name) for name in needed}
    read = Read(plan, Scanned(), {}, Samples())
    pieces = source.pieces()
    for scanned in progress(run(scan, [(plan, piece, columns) for piece in pieces]), "reading", "piece", len(pieces)):
        read.scanned.rows += scanned.rows
        for name in ("problems", "unread", "days", "other_days"):
            getattr(read.scanned, name).update(getattr(scanned, name))
    common = sorted(read.scanned.days), read.scanned.rows, sorted(read.scanned.unread)
    tasks = [(plan, bucket, *common) for bucket in range(plan.buckets)]
    for cleaned in progress(run(clean, tasks), "checking", "bucket", len(tasks)):
        _add(read, cleaned)
    read.problems += read.scanned.problems
    return read


def _add(read: Read, cleaned: Cleaned) -> None:
    read.samples.add(cleaned)
    read.problems += cleaned.problems
    for day, counts in cleaned.days.items():
        whole = read.counts.setdefault(day, DayCounts())
        whole.requests += counts.requests
        whole.rows += counts.rows
        for name in ("repairs", "lengths", "groups"):
            getattr(whole, name).update(getattr(counts, name))


def row_problems(read: Read, source: Source) -> list[str]:
    """The problems of rows, each once: with the number of its rows, and the first file or a request that has it."""
    first: dict[tuple[str, str, str], Problem] = {}
    rows = Counter[Problem]()
    for problem, count in sorted(read.problems.items()):
        rows[first.setdefault((problem.column, problem.kind, problem.remedy), problem)] += count
    wanted = {problem.request for problem in rows if problem.request is not None}
    named = _named_requests(read.plan, source, wanted) if wanted else {}
    made = []
    for problem, count in rows.items():
        file, request = named.get(problem.request, (problem.file, "whose id cannot be read again"))
        made.append(replace(problem, file=file).sentence(count, request))
    return made


def _named_requests(plan: Plan, source: Source, keys: set[int]) -> dict[int | None, tuple[str, str]]:
    """Key -> the first file that has the request, and its id: read again from the table, until all are found."""
    column, found = plan.mapping.rows.request, dict[int | None, tuple[str, str]]()
    kind = plan.request_type
    for piece in source.pieces():
        with suppress(InputError, pa.ArrowException):  # a damaged file or column, which is a problem of its own
            for batch in batches(plan.mapping, piece, {column: pa.string()}, plan.rows_per_batch):
                ids = typed(batch[column], pa.string() if kind == "string" else pa.int64())
                here, first = np.unique(keys_of(ids, kind), return_index=True)
                for key, row in zip(here.tolist(), first.tolist(), strict=True):
                    if key in keys:
                        found.setdefault(key, (str(piece.file.path), _shortened(ids[row].as_py())))
                if len(found) == len(keys):
                    return found
    return found


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_days(read: Read) -> None:
    """InputError unless there are training days and test days."""
    for problem in day_problems(read):
        raise InputError(problem)
    for day in sorted(set(read.scanned.days) - set(read.days)):
        logger.warning("%s: no request has ground truth and two items; the day is left out", day)


def day_problems(read: Read) -> Iterator[str]:
    """What is wrong with the days; not what is so because rows or columns were left out for other problems."""
    scanned, mapping = read.scanned, read.plan.mapping
    told = mapping.groups.column or mapping.groups.flags or mapping.groups.position
    all_read = told and sum(scanned.days.values()) == scanned.rows and not {"group", "item"} & scanned.unread
    if not scanned.rows and not scanned.problems:
        yield f"{mapping.source}: holds no row; name the table's files in path of [rows]"
    elif not read.days:
        if all_read:
            yield f"{mapping.source}: no request has ground truth and two items; check [groups] and request of [rows]"
    elif mapping.rows.time is None or "time" in scanned.unread:
        return
    elif not read.training_days or not read.test_days:
        listed = f"{read.days[0]} to {read.days[-1]}" if len(read.days) > 1 else f"{read.days[0]} only"
        yield (
            f"{mapping.source}: has requests of {listed}, which leaves no day to train or none to test on; "
            "add days, or check test_days of [split] and time_unit of [rows]"
        )


def _write_log(run: Run, read: Read, log: Path) -> None:
    """Learn from the training days, and write all days, encoded."""
    from deep_components.dataset.importers.table.assemble import assemble
    from deep_components.dataset.log import write_log_file

    plan, mapping = read.plan, read.plan.mapping
    encoding = learned(read)
    encoding.save(log / "encoding")
    if plan.derived:
        for _ in progress(run(derive, [(plan, bucket) for bucket in range(plan.buckets)]), "histories", "bucket"):
            pass
    largest_first = sorted(read.days, key=lambda day: -read.counts[day].rows)
    tasks = [(plan, log, day, dict(read.counts[day].repairs)) for day in largest_first]
    for _ in progress(run(assemble, tasks), "writing", "day", len(tasks)):
        pass
    about: dict[str, Any] = {"groups": list(mapping.groups.names), "test_days": len(read.test_days)}
    write_log_file(log, mapping.origin, **about, time_zone=mapping.rows.time_zone)


def learned(read: Read) -> Encoding:
    """The encoding that the training days give."""
    return learn(read.plan, read.samples.of_days(read.training_days), read.training_days)


# ---- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def _scratch(output_dir: Path) -> Iterator[Path]:
    """A temporary folder beside the output; removed when the block ends. What a killed process has left is removed."""
    make_folder(output_dir.parent)
    folder = output_dir.with_name(f".{output_dir.name}.{uuid.uuid4().hex}.tmp")
    for leftover in output_dir.parent.glob(f".{output_dir.name}.{'[0-9a-f]' * 32}.tmp"):
        with locked(leftover / "lock", wait=0) as free:
            if free is not None:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        folder.mkdir()
        with locked(folder / "lock"):
            yield folder
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--output_dir={output_dir}: cannot be written ({reason}); free the space or name another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an error does, so that its scratch files are removed."""

    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt  # which no library takes for an error of its own

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise StoppedError("stopped; nothing was written", received[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Make a log from a table of requests and candidates (docs/own_log.md).", allow_abbrev=False
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--mapping", type=Path, help="log.toml, which names the table and its columns")
    what.add_argument(
        "--suggest", type=Path, metavar="ROWS", help="print a first log.toml for a table, made by guessing"
    )
    made.add_argument("--output_dir", type=Path, help="folder of the log; must not be there")
    made.add_argument("--jobs", type=int, default=cores(), help="processes at a time (%(default)s)")
    made.add_argument("--engine", choices=ENGINES, default="process", help="where they run (%(default)s)")
    made.add_argument("--check", action="store_true", help="write nothing; report on the table, and all problems")
    return made


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.suggest is not None:
        from deep_components.dataset.importers.table.suggest import suggest

        sys.stdout.write(suggest(args.suggest))
        return
    if args.jobs < 1:
        raise InputError(f"--jobs={args.jobs}: is 1 or more")
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a launcher such as torchrun has started several processes, and each would make the whole log; start one, "
            "with --jobs on one machine, --engine=ray on several"
        )
    with _stopped_by_sigterm():
        if args.check:
            from deep_components.dataset.importers.table.check import check_table

            with tempfile.TemporaryDirectory(dir=args.output_dir and args.output_dir.parent) as folder:
                check_table(args.mapping, Path(folder), args.jobs, args.engine)
            return
        if args.output_dir is None:
            raise InputError("--output_dir is missing; name the folder of the log")
        import_table(args.mapping, args.output_dir.absolute(), args.jobs, args.engine)


if __name__ == "__main__":
    sys.exit(run_command(main))
