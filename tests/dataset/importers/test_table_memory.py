"""The memory of an import does not grow with the table."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from deep_components.dataset.importers.table.mapping import load_mapping
from deep_components.dataset.importers.table.plan import make_plan, needed_columns
from deep_components.dataset.importers.table.source import open_source
from tests.helpers import PRINT_PEAK

CANDIDATES = 50
IMPORT = """
import sys
from pathlib import Path
from deep_components.dataset.importers.table import assemble, clean, learn, plan, scan
from deep_components.dataset.importers.table.command import import_table

plan.BYTES_PER_BUCKET = scan._FLUSH_BYTES = 1 << 19
plan._BYTES_PER_BATCH = 1 << 19
clean.SAMPLED = learn._KEYS_AT_ONCE = 1 << 12
import_table(Path(sys.argv[1]) / "log.toml", Path(sys.argv[1]) / "log")
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """With buckets and batches of half a megabyte, three times the rows, whose records take 30 MB more, need no such
    memory: less than half of it, for what libraries keep. The ids are as many."""
    write_table = importlib.import_module("benchmarks.import").write_table
    peaks, sizes = [], []
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # else threads hold back as much as they like
    for requests in (8_000, 24_000):
        folder = tmp_path / str(requests)
        write_table(folder, requests, CANDIDATES, 1000)
        mapping = load_mapping(folder / "log.toml")
        source = open_source(mapping, needed_columns(mapping))
        sizes.append(source.rows * make_plan(mapping, source, folder, strict=True).item_record.itemsize)
        command = [sys.executable, "-c", IMPORT + PRINT_PEAK, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert sizes[1] - sizes[0] > 3e7
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 2
