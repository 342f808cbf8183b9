"""Initial values of embedding rows: each a function of (seed, table, id) alone, whichever ids a log has."""

import hashlib

import numpy as np
import torch
from torch import Tensor

_ROWS_PER_CHUNK = 1 << 18  # bounds the temporary memory


@torch.no_grad()
def fill_initial_rows(table: Tensor, seed: int, name: str, ids: np.ndarray, padding: int) -> None:
    """Write the initial value of each id to its row; zero for the padding id. ``name`` is "<stage>.<table>"."""
    for first in range(0, len(ids), _ROWS_PER_CHUNK):
        chunk = ids[first : first + _ROWS_PER_CHUNK]
        table[first : first + len(chunk)] = initial_rows(seed, name, chunk, table.shape[1])
    table[torch.from_numpy(np.flatnonzero(ids == padding))] = 0


def initial_rows(seed: int, table: str, ids: np.ndarray, dim: int) -> Tensor:
    """Rows of a table's initial value, N(0, 1), each a function of (seed, table, id) alone: float64 [len(ids), dim].

    A counter-based generator (splitmix64 of the key and the counter, then Box-Muller) instead of a stream: adding or
    leaving out ids never changes another id's row.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{table}".encode()).digest()[:8], np.uint64)
    counters = (ids.astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)) * np.uint64(2)
    first = _uniform(key ^ _splitmix64(counters))
    second = _uniform(key ^ _splitmix64(counters + np.uint64(1)))
    return torch.from_numpy(np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that mixes all bits."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _uniform(words: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1] from 64-bit words, which are mixed once more."""
    return ((_splitmix64(words) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
