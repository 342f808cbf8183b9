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
    """Bytes that can still be allocated on the device: for a CPU what the system and the process's groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_meminfo("MemAvailable"), *_group_limits()]))


def _meminfo(name: str) -> int:
    for line in (ROOT / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")


def _group_limits() -> Iterator[int]:
    """What is left in each of the control groups, of version 1 or 2, that the process is in."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = ROOT / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif not controllers:
            top, names = ROOT / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        else:
            continue
        folder = top / group.lstrip("/")
        # In a container the path may be that of the world outside, and the group's files lie at the top.
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                yield _left(place, *names)


def _left(group: Path, limit: str, usage: str, prefix: str) -> int:
    """A group's limit less its usage, without the file cache, which the system gives back when memory is asked for."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = sum(int(statistics.get(f"{prefix}{part}_file", 0)) for part in ("active", "inactive"))
    return int((group / limit).read_text()) - max(0, int((group / usage).read_text()) - cache)
