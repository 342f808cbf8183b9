"""Speed and memory of ``lcron import``: a generated table of requests and candidates, imported by a process of its own.

    python -m benchmarks.import [--requests=1000000] [--candidates=100] [--jobs=2] [--folder=/tmp]

The table has integer and text ids, numbers with gaps, a list of texts and histories to derive; it is written as
Parquet, a piece at a time, a file a day. Printed are rows a second, and rows a second of a core's time; the peak memory
of all processes of the import together; and what table, scratch files and log take on the disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deep_components.cli import run_command

DAYS = 8
FIRST_SECOND = 1_704_067_200  # 2024-01-01 UTC
REQUESTS_PER_PIECE = 10_000
MAPPING = """
[rows]
path = "rows"
request = "request"
item = "item"
time = "time"
time_unit = "ms"
user = "user"

[groups]
order = ["bought", "shown", "ranked", "retrieved"]
column = "left_at"
label = "gain"

[history]
length = 20
derive = ["item", "shop"]

[[fields]]
name = "user"
column = "user"
side = "request"
kind = "id"
min_count = 100

[[fields]]
name = "when"
side = "request"
kind = "time"
parts = ["weekday", "hour"]

[[fields]]
name = "item"
column = "item"
side = "item"
kind = "id"
min_count = 2

[[fields]]
name = "shop"
column = "shop"
side = "item"
kind = "id"

[[fields]]
name = "tags"
column = "tags"
side = "item"
kind = "id"
length = 3

[[fields]]
name = "price"
column = "price"
side = "item"
kind = "number"

[[fields]]
name = "stock"
column = "stock"
side = "item"
kind = "number"
scale = "quantile"
"""


def write_table(folder: Path, requests: int, candidates: int, items: int) -> None:
    """Write the mapping and the table, in files of a day."""
    (folder / "rows").mkdir(parents=True)
    (folder / "log.toml").write_text(MAPPING)
    rng = np.random.default_rng(0)
    per_day = requests // DAYS
    for day in range(DAYS):
        with pa.parquet.ParquetWriter(folder / "rows" / f"{day}.parquet", _piece(rng, 0, 1, 2, day, 9).schema) as file:
            for first in range(0, per_day, REQUESTS_PER_PIECE):
                count = min(REQUESTS_PER_PIECE, per_day - first)
                file.write_table(_piece(rng, day * per_day + first, count, candidates, day, items))


def _piece(rng: np.random.Generator, first: int, count: int, candidates: int, day: int, items: int) -> pa.Table:
    rows = count * candidates
    steps = np.arange(candidates)  # distinct within a request
    drawn = np.sort((items * rng.random((count, candidates)) ** 3).astype(np.int64), axis=1)
    item = (np.maximum.accumulate(drawn - steps, axis=1) + steps).ravel()
    left = rng.permuted(np.tile(np.minimum(np.arange(candidates) // 5, 3).astype(np.int8), (count, 1)), axis=1).ravel()
    seconds = np.sort(rng.integers(0, 86_400_000, count)) + (FIRST_SECOND + day * 86_400) * 1000
    shop = pa.DictionaryArray.from_arrays((item % 5000).astype(np.int32), [f"shop-{number}" for number in range(5000)])
    tags = pa.DictionaryArray.from_arrays(
        rng.integers(0, 300, 2 * rows).astype(np.int32), [f"t{n}" for n in range(300)]
    )
    names = pa.array(["bought", "shown", "ranked", "retrieved"])
    return pa.table(
        {
            "request": np.repeat(np.arange(first, first + count), candidates),
            "time": np.repeat(seconds, candidates),
            "user": np.repeat(rng.integers(0, max(1000, items // 4), count), candidates),
            "item": item,
            "shop": shop.dictionary_decode(),
            "tags": pa.ListArray.from_arrays(np.arange(0, 2 * rows + 1, 2).astype(np.int32), tags.dictionary_decode()),
            "price": pa.array(rng.lognormal(3, 1, rows), mask=rng.random(rows) < 0.05),
            "stock": rng.poisson(20, rows).astype(np.int32),
            "left_at": pa.DictionaryArray.from_arrays(left, names).dictionary_decode(),
            "gain": rng.integers(1, 6, rows).astype(np.float32),
        }
    )


class Watch(threading.Thread):
    """The largest memory of a process and its children, and size of a folder, looked at all the time."""

    def __init__(self, process: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder, self.ended = process, folder, threading.Event()
        self.memory = self.disk = 0

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.memory = max(self.memory, resident_bytes(self.process))
            self.disk = max(self.disk, folder_bytes(self.folder))


def resident_bytes(process: int) -> int:
    """The private memory, and a share of what is shared, of a process and its descendants."""
    total = 0
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(resident_bytes(int(child)) for child in (task / "children").read_text().split())
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        pass  # it ended
    return total


def folder_bytes(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was removed
                total += (Path(where) / name).stat().st_size
    return total


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the table and the log lie meanwhile")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, out = Path(name) / "table", Path(name) / "out"
        out.mkdir()
        write_table(folder, args.requests, args.candidates, args.items)
        flags = [f"--mapping={folder / 'log.toml'}", f"--output_dir={out / 'log'}", f"--jobs={args.jobs}"]
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", "deep_components", "import", *flags]) as process:
            watch = Watch(process.pid, out)
            watch.start()
            process.wait()
        seconds = time.perf_counter() - started
        watch.ended.set()
        watch.join()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = args.requests // DAYS * DAYS * args.candidates
        results = {
            "exit_code": process.returncode,
            "rows": rows,
            "seconds": round(seconds, 1),
            "rows_per_second": round(rows / seconds),
            "core_seconds": round(used.ru_utime + used.ru_stime, 1),
            "rows_per_core_second": round(rows / (used.ru_utime + used.ru_stime)),
            "peak_memory_bytes": watch.memory,
            "table_bytes": folder_bytes(folder),
            "peak_disk_bytes": watch.disk,
            "log_bytes": folder_bytes(out),
        }
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
