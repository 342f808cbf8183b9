"""Sets of ids: which rows a compacted table has.

A log of some days names a small part of RecFlow's 82 million videos. A compacted table has rows for these ids alone, in
ascending order of the ids; dense Adam never moves a row that no request names, so nothing is lost.
"""

from collections.abc import Iterable

import numpy as np

_WORD = 64
_WORDS_AT_A_TIME = 1 << 16


class IdSet:
    """A set of ids from 0 .. size - 1 that gives each of its ids a row: its rank among them.

    A bit per id and a count per 64 bits (rank by counting bits: Jacobson, FOCS 1989): 82 million ids take 15 MB, and a
    look-up touches two words. ``bits`` [ceil(size / 64)] uint64: bit k of word w says whether id 64 w + k is in
    the set.
    """

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits
        counts = np.bitwise_count(bits).astype(np.int64)
        self._before = (np.cumsum(counts) - counts).astype(np.int32)
        self._length = int(counts.sum())

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray], size: int) -> "IdSet":
        """The ids that occur in the arrays. IndexError when one is not from 0 .. size - 1."""
        present = np.zeros(-(-size // _WORD) * _WORD, bool)
        valid = present[:size]
        for ids in arrays:
            if ids.size and ids.min() < 0:  # numpy would count from the end
                raise IndexError(f"{ids.min()} is not an id")
            valid[ids] = True
        return cls(np.packbits(present, bitorder="little").view(np.uint64))

    @classmethod
    def below(cls, size: int) -> "IdSet":
        """All ids 0 .. size - 1."""
        present = np.zeros(-(-size // _WORD) * _WORD, bool)
        present[:size] = True
        return cls(np.packbits(present, bitorder="little").view(np.uint64))

    @property
    def size(self) -> int:
        """Ids are below this; a multiple of 64."""
        return len(self.bits) * _WORD

    def __len__(self) -> int:
        return self._length

    def __or__(self, other: "IdSet") -> "IdSet":
        """The ids of either; both sets must be of one size."""
        return IdSet(self.bits | other.bits)

    def __and__(self, other: "IdSet") -> "IdSet":
        """The ids of both; the sets must be of one size."""
        return IdSet(self.bits & other.bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdSet) and np.array_equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def every(self, step: int, first: int) -> "IdSet":
        """The ids of rows ``first``, ``first + step``, ...; beside the result it takes little memory."""
        parts = []
        for start in range(0, len(self.bits), _WORDS_AT_A_TIME):
            words = self.bits[start : start + _WORDS_AT_A_TIME]
            present = np.unpackbits(words.view(np.uint8), bitorder="little")
            there = np.flatnonzero(present)
            rows = self._before[start] + np.arange(len(there))
            present[there[rows % step != first]] = 0
            parts.append(np.packbits(present, bitorder="little").view(np.uint64))
        return IdSet(np.concatenate(parts) if parts else self.bits)

    def ids(self) -> np.ndarray:
        """The ids in ascending order, int64: row r belongs to the r-th."""
        return np.flatnonzero(np.unpackbits(self.bits.view(np.uint8), bitorder="little"))

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id is in the set; ids from 0 .. size - 1."""
        word, bit = ids >> 6, (ids & 63).astype(np.uint64)
        return (self.bits[word] >> bit & np.uint64(1)).astype(bool)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id, int64. KeyError when one is not in the set."""
        word, bit = ids >> 6, (ids & 63).astype(np.uint64)
        bits = self.bits[word]
        if not (bits >> bit & np.uint64(1)).all():
            raise KeyError("an id is not in the set")
        below = bits & ((np.uint64(1) << bit) - np.uint64(1))
        return self._before[word] + np.bitwise_count(below).astype(np.int64)
