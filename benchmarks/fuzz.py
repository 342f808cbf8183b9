"""Damages every file that the project reads, at random, and watches what becomes of it.

    python -m benchmarks.fuzz --seconds=60 [--seed=0]

A damaged file must be refused with an InputError of one line, or give what the sound file gives. Of files without a
checksum, which nothing protects, what is read must at least be a sound day: indices within their tables, masks and
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deep_components import run_test2, run_train2
from deep_components.cascade import TWO_STAGE
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import LOG_FILE, open_log, write_log_file
from deep_components.dataset.manifest import MANIFEST_FILE, write_manifest
from deep_components.errors import InputError
from deep_components.reporting.frame import frame
from deep_components.runs.state import load
from tests.dataset.synthetic import DAY, random_log, write_log

SLOW_SECONDS = 20.0
MEMORY_BYTES = 2 << 30  # more than at the start: what takes more fails
EXECUTIONS_PER_PROCESS = 2000
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
CHANGES = ("bit", "bit", "number", "number", "insert", "delete", "repeat", "cut", "splice")


class Target(NamedTuple):
    """A file to damage; ``read`` gives what is made of it, ``protected`` says that this must not change."""

    path: Path
    read: Callable[[], dict[str, Any]]
    protected: bool


class UnsoundError(Exception):
    """What was read is no sound day."""


# ---- what is read ----------------------------------------------------------------------------------------------------


def make_targets(folder: Path) -> list[Target]:
    """Logs without and with a manifest, a cache, a columnar log and an evaluated run in ``folder``, and how each of
    their files is read."""
    plain, guarded, cached = (write_log(folder / name, random_log(4)) for name in ("plain", "guarded", "cached"))
    for root in (plain, guarded, cached):
        recflow.write_origin(root, {"data": "fuzz"})
    write_manifest(guarded, open_log(guarded).files())
    run, columnar, caches = folder / "run", folder / "columnar", folder / "caches"
    sizes = ["--loss_type=bce", "--emb_dim=1", "--nn_units=4", "--batch_size=2", f"--train_days={DAY}"]
    common = ["--device=cpu", f"--data_dir={plain}", f"--output_dir={run}"]
    run_train2.main([*common, *sizes])
    run_test2.main(common)
    read_log(cached, caches)
    (cache,) = (caches / TWO_STAGE.name).iterdir()
    shutil.copytree(cache, columnar / DAY)
    write_log_file(columnar, "fuzz")

    def targets(paths: Sequence[Path], read: Callable[[], dict[str, Any]], protected: bool = True) -> list[Target]:
        return [Target(path, read, protected) for path in paths]

    return [
        *targets(open_log(plain).files(), partial(read_log, plain, folder / "plain_cache"), protected=False),
        *targets(
            [*open_log(guarded).files(), guarded / MANIFEST_FILE], partial(read_log, guarded, folder / "guarded_cache")
        ),
        *targets(sorted(cache.iterdir()), partial(read_log, cached, caches)),
        *targets(sorted((columnar / DAY).iterdir()), partial(read_log, columnar)),
        *targets([columnar / LOG_FILE], partial(read_log, columnar), protected=False),
        *(Target(path, partial(read_arrays, path), True) for path in sorted(run.glob("*.safetensors"))),
        *targets([run / "config.json", run / "metrics.json"], partial(read_results, run)),
    ]


def read_log(root: Path, cache_dir: Path | None = None) -> dict[str, Any]:
    """What a training takes from a log. UnsoundError for what no table or mask has."""
    log = open_log(root)
    day = log.open_day(DAY, TWO_STAGE, cache_dir)
    columns = {name: np.array(values) for name, values in day.columns.items()}
    for field in day.schema.fields:
        values = columns[f"{field.side}.{field.name}"]
        if len(values) != len(day) or values.max() >= field.size or values.min() < 0:
            raise UnsoundError(f"{field}: {len(values)} values up to {values.max()}")
    return {"origin": log.origin, "schema": log.schema.to_json(), **columns}


def read_arrays(path: Path) -> dict[str, Any]:
    return load(path)[0]


def read_results(run: Path) -> dict[str, Any]:
    return {"rows": repr(frame(run).to_dict("records"))}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name]) if isinstance(value, np.ndarray) else value == other[name]
        for name, value in one.items()
    )


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of the content."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, count, new = _change(content, rng, others)
        content = content[:start] + new + content[start + count :]
    return content


def _change(content: bytes, rng: random.Random, others: Sequence[bytes]) -> tuple[int, int, bytes]:
    """From where how many bytes are replaced by which."""
    size, kind, count = len(content), rng.choice(CHANGES), rng.choice((1, 2, 8, 100, 1000))
    # More often at the ends, where the structure is.
    start = rng.choice((rng.randint(0, size), rng.randint(0, min(size, 100)), rng.randint(max(0, size - 100), size)))
    if kind == "bit" and start < size:
        return start, 1, bytes([content[start] ^ 1 << rng.randrange(8)])
    if kind == "number":
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(NUMBERS) % (1 << 8 * width)
        return start, width, number.to_bytes(width, rng.choice(("little", "big")))
    if kind == "insert":
        return start, 0, rng.randbytes(count)
    if kind == "repeat":
        return start, 0, content[start : start + count] * rng.choice((1, 2, 50))
    if kind == "splice":
        other = rng.choice(others)
        first = rng.randrange(max(1, len(other) - count))
        return start, count, other[first : first + count]
    return start, size if kind == "cut" else count, b""


# ---- executions ------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Runs executions, each of which depends on its seed alone.

    Attributes:
        counts: of what became of the executions.
        findings: what must not have happened.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets
        self.originals = [target.path.read_bytes() for target in targets]
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self._sound = [target.read() for target in targets]
        self._warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("deep_components").addHandler(handler)

    def execute(self, seed: int) -> None:
        """Damage one file, read it, note what became of it, and put it right."""
        rng = random.Random(seed)
        chosen = rng.randrange(len(self.targets))
        target, original = self.targets[chosen], self.originals[chosen]
        changed = damage(original, rng, self.originals)
        target.path.unlink()  # not written over: a column may be mapped
        target.path.write_bytes(changed)
        began = time.monotonic()
        self._warnings.clear()
        kind, detail = self._read(target, self._sound[chosen], changed == original)
        if time.monotonic() - began > SLOW_SECONDS:
            kind, detail = "finding", f"slow: {time.monotonic() - began:.0f} s"
        self.counts[kind] += 1
        if kind == "finding":
            self.findings.append(f"seed {seed}, {target.path.name}: {detail}")
        target.path.unlink(missing_ok=True)
        target.path.parent.mkdir(parents=True, exist_ok=True)
        target.path.write_bytes(original)

    def _read(self, target: Target, sound: dict[str, Any], unchanged: bool) -> tuple[str, str]:
        try:
            read = target.read()
        except InputError as error:
            return _refused(target, str(error))
        except Exception:  # whatever is no refusal is what a fuzzer looks for
            return "finding", traceback.format_exc()
        if same(read, sound):
            return ("unchanged" if unchanged else "read as it was"), ""
        if target.protected and not any("has no checksum" in warning for warning in self._warnings):
            return "finding", "a difference that nothing tells of"
        return ("read with a warning" if target.protected else "read as another sound log"), ""


def _refused(target: Target, message: str) -> tuple[str, str]:
    """The sentence must be short and name the file, or the manifest or meta.json that says what the file must be."""
    names = (target.path.name, "manifest.json", "meta.json")
    if len(message) > 2000 or len(message.splitlines()) > 1 or not any(name in message for name in names):
        return "finding", f"unclear: {message[:3000]}"
    return "refused", ""


def _executions(folder: Path, seeds: range, until: float, current: Any) -> None:
    """Executions in a process of their own, whose crash is seen from outside: ``current`` is the seed in use. What is
    found is printed; exit code 1 when something is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)
    fuzzer = Fuzzer(make_targets(folder))
    for seed in seeds:
        if time.monotonic() > until:
            break
        current.value = seed
        fuzzer.execute(seed)
    current.value += 1
    lines = [f"{fuzzer.counts.total()} executions: {dict(fuzzer.counts)}", *fuzzer.findings]
    print("\n".join(lines), flush=True)
    sys.exit(bool(fuzzer.findings))


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage every file that is read, and watch.", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first execution; the next has the next number")
    parser.add_argument("--executions", type=int, default=1 << 62, help="stop after so many")
    args = parser.parse_args()
    logging.getLogger("deep_components").setLevel(logging.WARNING)
    logging.getLogger().addHandler(logging.NullHandler())
    context, until = multiprocessing.get_context("fork"), time.monotonic() + args.seconds
    current, last, failed = context.Value("q", args.seed), args.seed + args.executions, False
    while current.value < last and time.monotonic() < until:
        seeds = range(current.value, min(current.value + EXECUTIONS_PER_PROCESS, last))
        with tempfile.TemporaryDirectory() as folder:
            process = context.Process(target=_executions, args=(Path(folder), seeds, until, current))
            process.start()
            process.join()
        failed |= process.exitcode != 0
        if process.exitcode not in (0, 1):
            print(f"seed {current.value}: the process ended with {process.exitcode}", flush=True)
            current.value += 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
