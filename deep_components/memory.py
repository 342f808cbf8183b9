"""How much memory a training will need, and whether there is so much."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from deep_components.errors import InputError
from deep_components.models.embedding import FieldEmbedding

logger = logging.getLogger(__name__)

# Activations and their gradients alive at the peak of a step, in numbers per request, item and history position, and
# per request, item and unit of the towers' first layer; measured with benchmarks/memory.py.
_PER_POSITION, _PER_UNIT = 6, 14
_WORTH_SAYING = 1 << 30


def table_bytes(models: Mapping[str, nn.Module], gathered: tuple[str, ...], itemsize: int) -> tuple[int, int]:
    """Bytes of the tables with Adam's state: (those of ``gathered`` fields, the others, which also have a dense
    gradient)."""
    sparse = dense = 0
    for model in models.values():
        embedding = model.get_submodule("embedding")
        assert isinstance(embedding, FieldEmbedding)
        for field, rows in embedding.rows.items():
            numbers = rows * embedding.dim * itemsize
            if field in gathered:
                sparse += 3 * numbers + 4 * rows  # value, two moments; the step a row was brought to
            else:
                dense += 4 * numbers
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
    """Bytes that can still be allocated on the device: for a CPU what the system and the process's group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory" / "memory.limit_in_bytes", group / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            limits.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return max(0, min(limits))


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")
