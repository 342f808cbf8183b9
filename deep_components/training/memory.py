"""How much memory a training will need, and whether there is so much."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from deep_components.errors import InputError

logger = logging.getLogger(__name__)

# Activations and their gradients alive at the peak of a step, in numbers per request, item and history position, and
# per request, item and unit of the towers' first layer; measured with benchmarks/memory.py.
_PER_POSITION, _PER_UNIT = 6, 14
_WORTH_SAYING = 1 << 30

ROOT = Path("/")
# Of a control group: the files of its limit and usage, and how names begin in memory.stat.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")


def table_bytes(rows: Mapping[str, int], dim: int, pulled: Collection[str], itemsize: int) -> tuple[int, int]:
    """Bytes of a stage's tables with Adam's state: (``pulled`` ones, the others, which also have a dense gradient).

    ``rows`` are those of each table, ``dim`` is the embedding dimension.
    """
    sparse = sum(rows[table] * (3 * dim * itemsize + 4) for table in pulled)  # value, two moments; its last step
    dense = sum(4 * count * dim * itemsize for table, count in rows.items() if table not in pulled)
    return sparse, dense


def step_bytes(batch_size: int, num_items: int, length: int, nn_units: int, stages: int, itemsize: int) -> int:
    """An estimate of what a step's activations take."""
    per_item = _PER_POSITION * length + _PER_UNIT * nn_units * stages
    return batch_size * num_items * per_item * itemsize


def validation_bytes(
    rows: Mapping[str, int], looked_up: Mapping[str, int], dim: int, stages: int, itemsize: int
) -> tuple[int, int]:
    """Bytes of a validation: (of the rows that are ``looked_up`` in each table, of all stages at once; of one stage's
    tables of so many ``rows``, copied while the best models are written)."""
    return stages * sum(looked_up.values()) * dim * itemsize, sum(rows.values()) * dim * itemsize


def check_memory(needed: Mapping[torch.device, int]) -> None:
    """Say what is needed of each device's memory. InputError, with advice, where there is less."""
    for device, size in needed.items():
        free = available(device)
        if size >= _WORTH_SAYING:
            logger.info("memory on %s: about %.1f GB needed, %.1f GB free", device, size / 1e9, free / 1e9)
        if size > free:
            host = "; keep the ID tables in host memory with --table_memory=host" if device.type == "cuda" else ""
            raise InputError(
                f"the training needs about {size / 1e9:.1f} GB of memory on {device}, where {free / 1e9:.1f} GB are "
                f"free: train on fewer days (--train_days), or with a smaller --emb_dim or --batch_size{host}"
            )


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on the device: for a CPU the least of what the system and the process's control
    groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_bytes_in(ROOT / "proc/meminfo", "MemAvailable:"), *_left_in_groups()]))


def peak() -> int:
    """Bytes that this process has taken at the most. What getrusage calls so is, right after the start, the maximum of
    the process that started it."""
    return _bytes_in(Path("/proc/self/status"), "VmHWM:")


def _bytes_in(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _left_in_groups() -> Iterator[int]:
    """What is left in each control group, of version 1 or 2, that the process is in and that has a limit."""
    with suppress(OSError):  # a system without control groups
        for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = ROOT / "sys/fs/cgroup" / ("memory" if controllers else "")
            files = _VERSION_1 if controllers else _VERSION_2
            # In a container the name may be that outside, and the group's files lie at the top.
            for group in (top / name.lstrip("/"), *(top / name.lstrip("/")).parents):
                if group.is_relative_to(top):
                    with suppress(OSError, ValueError):  # no such group, or "max": no limit
                        yield _left(group, *files)


def _left(group: Path, limit: str, usage: str, prefix: str) -> int:
    """A group's limit less its usage, without the file cache, which the system gives back when memory is asked for."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = sum(int(statistics.get(f"{prefix}{part}_file", 0)) for part in ("active", "inactive"))
    return int((group / limit).read_text()) - max(0, int((group / usage).read_text()) - cache)
