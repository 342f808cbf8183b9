"""Damages every file that the project reads, at random, and watches what becomes of it.

    python -m benchmarks.fuzz --seconds=60 [--seed=0]

A damaged file must be refused with an InputError of one line, or give what the sound file gives. Of input files without
a manifest, which nothing protects, what is read must at least be a sound day: indices within their tables, masks and
times that exist. Anything else is a finding: another exception, a difference, a crash of the process, an execution of
more than SLOW_SECONDS. Exit code 1 when there is one; the seed of each is printed: --seed=S --executions=1 repeats it.
"""

import argparse
import logging
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deep_components import run_test2, run_train2
from deep_components.cascade import TWO_STAGE
from deep_components.commands import doctor
from deep_components.dataset.columnar import open_day
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.dataset.manifest import MANIFEST_FILE, write_manifest
from deep_components.errors import InputError
from deep_components.reporting.frame import read_runs
from deep_components.runs import checkpoint
from tests.dataset.synthetic import DAY, random_log, write_log

SLOW_SECONDS = 20.0
MEMORY_BYTES = 2 << 30  # more than at the start: what takes more fails
EXECUTIONS_PER_PROCESS = 2000
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
TIMES = {"weekday": 7, "hour": 24, "minute": 60}


@dataclass(frozen=True)
class Target:
    """A file to damage; ``read`` gives what is made of it, ``protected`` says that this must not change."""

    path: Path
    read: Callable[[], Any]
    protected: bool


@dataclass
class Outcome:
    """Counts of what became of the executions, and what must not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


class UnsoundError(Exception):
    """What was read is no sound day."""


# ---- what is read ----------------------------------------------------------------------------------------------------


def make_targets(folder: Path) -> list[Target]:
    """A log without and one with a manifest, a cache and an evaluated run in ``folder``, and how each file is read."""
    plain, guarded, cached = (write_log(folder / name, random_log(4)) for name in ("plain", "guarded", "cached"))
    for root in (plain, guarded, cached):
        recflow.write_origin(root, {"data": "fuzz"})
    write_manifest(guarded, doctor.log_files(guarded))
    run = folder / "run"
    sizes = ["--loss_type=bce", "--emb_dim=1", "--nn_units=4", "--batch_size=2", f"--train_days={DAY}"]
    common = ["--device=cpu", f"--data_dir={plain}", f"--output_dir={run}"]
    run_train2.main([*common, *sizes])
    run_test2.main(common)
    open_day(cached, DAY, TWO_STAGE, folder / "cache")
    (cache,) = (folder / "cache" / TWO_STAGE.name).iterdir()
    targets = [Target(path, lambda: day(plain, folder / "plain_cache"), False) for path in doctor.log_files(plain)]
    targets += [
        Target(path, lambda: day(guarded, folder / "guarded_cache"), True)
        for path in (*doctor.log_files(guarded), guarded / MANIFEST_FILE)
    ]
    targets += [Target(path, lambda: day(cached, folder / "cache"), True) for path in sorted(cache.iterdir())]
    for path in sorted(run.glob("*.safetensors")):
        targets.append(Target(path, lambda path=path: tensors(path), True))  # type: ignore[misc]
    targets += [Target(run / name, lambda: results(run), True) for name in ("config.json", "metrics.json")]
    return targets


def day(root: Path, cache_dir: Path) -> dict[str, Any]:
    """What a training takes from a log."""
    origin, counts = recflow.read_origin(root), recflow.read_id_counts(root)
    opened = open_day(root, DAY, TWO_STAGE, cache_dir)
    columns = {name: np.array(values) for name, values in opened.columns.items()}
    for name, values in columns.items():
        last = name.rpartition(".")[2]
        limit = counts[LOG_COLUMN[last]] + 1 if last in LOG_COLUMN else TIMES.get(last)
        if len(values) != len(opened) or (limit is not None and (values.max() > limit or values.min() < 0)):
            raise UnsoundError(
                f"column {name}: {len(values)} values up to {values.max()}, where {limit} is the last one"
            )
    return {"origin": origin, "counts": counts, **columns}


def tensors(path: Path) -> dict[str, Any]:
    return {name: value.numpy() for name, value in checkpoint.load_tensors(path)[0].items()}


def results(run: Path) -> dict[str, Any]:
    return {"runs": read_runs([run]).runs.to_json(default_handler=str)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name]) if isinstance(value, np.ndarray) else value == other[name]
        for name, value in one.items()
    )


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to four changes of the content."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice((_flip, _flip, _byte, _number, _insert, _delete, _repeat, _cut, _splice))(changed, rng, others)
    return bytes(changed)


def _place(changed: bytearray, rng: random.Random) -> int:
    """Anywhere; more often at the ends, where the structure is."""
    size = len(changed)
    return rng.choice((rng.randint(0, size), rng.randint(0, min(size, 100)), rng.randint(max(0, size - 100), size)))


def _flip(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place = _place(changed, rng)
    if place < len(changed):
        changed[place] ^= 1 << rng.randrange(8)


def _byte(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place = _place(changed, rng)
    changed[place : place + 1] = bytes([rng.choice((rng.randrange(256), 0, 0x7F, 0x80, 0xFF))])


def _number(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place, size = _place(changed, rng), rng.choice((2, 4, 8))
    number = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    changed[place : place + size] = number[:: rng.choice((1, -1))]


def _insert(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place = _place(changed, rng)
    changed[place:place] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def _delete(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place = _place(changed, rng)
    del changed[place : place + rng.choice((1, 2, 8, 100))]


def _repeat(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    place, size = _place(changed, rng), rng.choice((1, 10, 100, 1000))
    changed[place:place] = changed[place : place + size] * rng.choice((1, 2, 50))


def _cut(changed: bytearray, rng: random.Random, _: list[bytes]) -> None:
    del changed[_place(changed, rng) :]


def _splice(changed: bytearray, rng: random.Random, others: list[bytes]) -> None:
    other, place, size = rng.choice(others), _place(changed, rng), rng.choice((1, 8, 64, 1000))
    first = rng.randrange(max(1, len(other) - size))
    changed[place : place + size] = other[first : first + size]


# ---- executions ------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Runs executions, each of which depends on its seed alone."""

    def __init__(self, folder: Path) -> None:
        targets = make_targets(folder)
        self.prepare(targets, [target.path.read_bytes() for target in targets], [target.read() for target in targets])

    def prepare(self, targets: list[Target], originals: list[bytes], sound: list[dict[str, Any]]) -> None:
        """Take these files, what is in them, and what their sound content gives."""
        self.targets, self.originals, self.sound = targets, originals, sound
        self.outcome = Outcome()
        self._warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("deep_components").addHandler(handler)

    def execute(self, seed: int) -> None:
        """Damage one file, read it, note what became of it, and put it right."""
        rng = random.Random(seed)
        place = rng.randrange(len(self.targets))
        target, original = self.targets[place], self.originals[place]
        changed = damage(original, rng, self.originals)
        target.path.unlink()  # not written over: a column may be mapped
        target.path.write_bytes(changed)
        began = time.monotonic()
        self._warnings.clear()
        kind, detail = self._read(target, self.sound[place], changed == original)
        if time.monotonic() - began > SLOW_SECONDS:
            kind, detail = "finding", f"slow: {time.monotonic() - began:.0f} s"
        self.outcome.counts[kind] += 1
        if kind == "finding":
            self.outcome.findings.append(f"seed {seed}, {target.path.name}: {detail}")
        target.path.unlink(missing_ok=True)
        target.path.parent.mkdir(parents=True, exist_ok=True)
        target.path.write_bytes(original)

    def _read(self, target: Target, sound: dict[str, Any], unchanged: bool) -> tuple[str, str]:
        try:
            read = target.read()
        except InputError as error:
            return self._refused(target, str(error))
        except Exception:  # whatever is no refusal is what a fuzzer looks for
            return "finding", traceback.format_exc()
        if same(read, sound):
            return ("unchanged" if unchanged else "read as it was"), ""
        if target.protected and not any("has no checksum" in warning for warning in self._warnings):
            return "finding", "a difference that nothing tells of"
        return ("read with a warning" if target.protected else "read as another sound log"), ""

    @staticmethod
    def _refused(target: Target, message: str) -> tuple[str, str]:
        """The sentence is short and names the file; but a manifest names the file that is not as it says, and fields of
        results that do not fit belong to the run."""
        names = (target.path.name, "manifest.json") if target.path.name != "metrics.json" else ("run",)
        if len(message) > 2000 or len(message.splitlines()) > 1 or not any(name in message for name in names):
            return "finding", f"unclear: {message[:3000]}"
        return "refused", ""


def in_process(folder: Path, seed: int, executions: int, until: float, connection: Any) -> None:
    """Executions in a process of their own, whose crash is seen from outside; the seed is sent before each."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)
    fuzzer = Fuzzer(folder)
    for number in range(seed, seed + executions):
        if time.monotonic() > until:
            break
        connection.send(number)
        fuzzer.execute(number)
    connection.send(fuzzer.outcome)


def rounds(seconds: float, seed: int, executions: int | None) -> Iterator[Outcome]:
    """Outcomes of one process after another, until the time is over or the executions are made."""
    until = time.monotonic() + seconds
    last = seed + (executions if executions is not None else sys.maxsize)
    while seed < last and time.monotonic() < until:
        folder = Path(tempfile.mkdtemp())
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (folder, seed, min(EXECUTIONS_PER_PROCESS, last - seed), until, theirs)
        process = multiprocessing.get_context("fork").Process(target=in_process, args=arguments)
        process.start()
        theirs.close()
        outcome = Outcome()
        try:
            while not isinstance(received := ours.recv(), Outcome):
                seed = received + 1
            outcome = received
        except EOFError:
            process.join()
            outcome.findings.append(f"seed {seed - 1}: the process ended with {process.exitcode}")
        process.join()
        shutil.rmtree(folder, ignore_errors=True)
        yield outcome


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Damage every file that is read, and watch.", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first execution; the next has the next number")
    parser.add_argument("--executions", type=int, help="stop after so many")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    logging.getLogger("deep_components").setLevel(logging.WARNING)
    logging.getLogger().addHandler(logging.NullHandler())
    total: Counter[str] = Counter()
    findings: list[str] = []
    for outcome in rounds(args.seconds, args.seed, args.executions):
        total += outcome.counts
        findings += outcome.findings
        print(f"{sum(total.values())} executions: {dict(total)}; {len(findings)} findings", flush=True)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
