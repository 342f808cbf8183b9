"""The state that a training goes on from, of one process or of several.

One process saves it in one file, STATE_FILE (runs/folder.py). Where W processes hold the rows of large tables between
them, each first writes a shard, its rows and what is its own; then the first process writes STATE_FILE, which holds
all that is alike on every process, and the shards' checksums. It is what commits the save: whenever a process is
killed, either the state before is whole or the new one is. Shards of another save are removed after it.

Arrays are named ``<kind>/<stage>/embedding.<table>``, for rows [n, ...] of a table, ``ids/<table>`` [n] int64, the ids
of these rows, ascending, and as the trainer likes. A table without ``ids/<table>`` is whole: row i of the file of rank
r of W is that of id r + i W.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.errors import InputError
from deep_components.runs.checked import CheckedFile, save
from deep_components.runs.folder import STATE_FILE, shard_file

SHARDS = "shards"  # entry of STATE_FILE's metadata: the shards' checksums, by rank

_TABLE, _IDS = "/embedding.", "ids/"
_POSITION = ("epoch", "day", "batch", "step", "skipped")


def save_shard(
    run: Path, step: int, rank: int, count: int, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]
) -> str:
    """Write the shard of ``rank`` of ``count`` processes: the ``arrays`` that this one alone has, its rows of sharded
    tables, their ids where tables are compacted, and the states of its generators. Every rank's has the same names.

    ``note`` is :func:`deep_components.runs.state.run_note`'s; ``step`` that of the position. Returns the checksum that
    ``save_state`` is given in its list, in the order of ranks. A second save at one step must be of the same state.
    InputError when the folder cannot be written or the disk is full.
    """
    about = {"shard": {"step": step, "rank": rank, "count": count}}
    return save(run / shard_file(step, rank, count), arrays, {**note, **about})


@dataclass(frozen=True)
class _Source:
    """A file with rows of tables, and whose they are."""

    file: CheckedFile
    rank: int
    count: int

    def ids(self, table: str, rows: int) -> np.ndarray | range:
        """The ids of a table's rows, ascending; those of a whole table take no memory."""
        if (name := f"{_IDS}{table}") not in self.file.shapes:
            return range(self.rank, self.rank + rows * self.count, self.count)
        ids = _ids(self, name)
        if len(ids) != rows:
            raise _unfit(self.file.path, f"{name} lists {len(ids)} ids, but the table has {rows} rows")
        return ids


class SavedState(Mapping[str, np.ndarray]):
    """A saved state as one process would have saved it, whatever number of processes did: name -> array.

    An array is read, and verified, each time it is asked for. Tables that are sharded come whole, their rows in
    ascending order of ids, as does ``ids/<table>``; :meth:`copy_rows` reads some of the rows, in little memory. Of what
    each process has of its own, as generators, this is the first one's; :meth:`of_rank` gives the others'.

    ``path`` is STATE_FILE's; ``rank`` is that of the process that reads: of the shards it reads that of its own rank
    first, and no other if this one has all. The manifest, and that all shards are there and those of this state, is
    verified here. Any method raises InputError where a file is missing, damaged or not of this state, or does not fit.

    Attributes: ``position``, as given to ``save_state``; ``shards``, the names of the shards' files; none of one
    process.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self._whole = CheckedFile(path)
        metadata = self._whole.metadata
        self.position = _position(path, metadata)
        checksums = metadata.get(SHARDS, [])
        if not isinstance(checksums, list) or not all(isinstance(checksum, str) for checksum in checksums):
            raise _unfit(path, f"its list of {SHARDS} is damaged")
        self.shards = [shard_file(self.position["step"], at, len(checksums)) for at in range(len(checksums))]
        files = [_shard(path, name, noted) for name, noted in zip(self.shards, checksums, strict=True)]
        self._by_rank = [_Source(file, at, len(files)) for at, file in enumerate(files)]
        self._own_first = self._by_rank[rank:] + self._by_rank[:rank] if rank < len(files) else self._by_rank
        self._names = {*self._whole.shapes, *(name for source in self._by_rank[:1] for name in source.file.shapes)}
        for source in self._by_rank:
            ids = {f"{_IDS}{_table(name)}" for name in source.file.shapes if _TABLE in name}
            if missing := ids & self._names - source.file.shapes.keys():  # it would be read as of a whole table
                raise _unfit(source.file.path, f"lacks {min(missing)}")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name in self._whole.shapes:
            return self._whole.read([name])[name]
        if name.startswith(_IDS):
            return np.sort(np.concatenate([_ids(source, name) for source in self._by_rank]))
        if _TABLE not in name:
            return _of(self._by_rank[0], name)
        ids, first, rows = f"{_IDS}{_table(name)}", self._by_rank[0].file, self.rows(name)
        values = np.empty((rows, *first.shapes[name][1:]), first.dtypes[name])
        if not self.copy_rows(name, self[ids] if ids in self else np.arange(rows), values).all():
            raise _unfit(self._whole.path, f"{name} lacks rows")
        return values

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them: faster than one by one."""
        ours = self._whole.read(self._whole.shapes)
        return {name: ours[name] if name in ours else self[name] for name in self}

    def of_rank(self, name: str, rank: int) -> np.ndarray | None:
        """What the process of ``rank`` saved under ``name`` as its own; None where there was no such process."""
        if not self._by_rank:
            return self.get(name) if rank == 0 else None
        if rank >= len(self._by_rank) or name not in self._by_rank[rank].file.shapes:
            return None
        return _of(self._by_rank[rank], name)

    def rows(self, name: str) -> int:
        """How many rows ``name`` was saved with, in all files together."""
        return sum(_shape(source, name)[0] for source in self._sources(name))

    def like(self, name: str) -> np.ndarray:
        """No rows [0, ...] of an array, of its shape and type. KeyError for an unknown name."""
        if name not in self._names:
            raise KeyError(name)
        file = self._sources(name)[0].file
        return np.empty((0, *file.shapes[name][1:]), file.dtypes[name])

    def copy_rows(self, name: str, ids: np.ndarray, into: np.ndarray) -> np.ndarray:
        """Copy the rows of a table to ``into`` [n, ...], in its type, for these of the log's indices ``ids`` [n] int64,
        ascending: ``into`` keeps the rows of ids that the state does not know. Of every file one block is in memory at
        a time; a file is read until all ids are found.

        ``name`` is ``<kind>/<stage>/embedding.<table>``; of a state in which the table was not sharded too. Returns
        which ids were found [n] bool. After an InputError ``into`` may hold damaged values. KeyError for an unknown
        name.
        """
        if name not in self._names:
            raise KeyError(name)
        found = np.zeros(len(ids), bool)
        for source in self._sources(name):
            if found.all():
                break
            _copy_rows(source, name, ids, into, found)
        return found

    def _sources(self, name: str) -> list[_Source]:
        return [_Source(self._whole, 0, 1)] if name in self._whole.shapes else self._own_first


def _shard(state: Path, name: str, noted: str) -> CheckedFile:
    path = state.with_name(name)
    if not path.exists():
        raise InputError(
            f"{path}: no such file, but {state.name} names it; copy the whole folder, or train again without --resume"
        )
    shard = CheckedFile(path)
    if shard.checksum != noted:
        raise _unfit(path, f"is not the shard that {state.name} names, but of another save, rank or run")
    return shard


def _copy_rows(source: _Source, name: str, ids: np.ndarray, into: np.ndarray, found: np.ndarray) -> None:
    """The rows of one file; ``found`` is set where there is one."""
    shape = _shape(source, name)
    if shape[1:] != into.shape[1:]:
        raise _unfit(source.file.path, f"{name} has rows of shape {shape[1:]}, not {into.shape[1:]}")
    saved, end = source.ids(_table(name), shape[0]), 0
    for block in source.file.blocks(name):
        start, end = end, end + len(block)
        some = saved[start:end]
        there = np.arange(some.start, some.stop, some.step) if isinstance(some, range) else some
        if not len(there):
            continue
        first, last = np.searchsorted(ids, there[0]), np.searchsorted(ids, there[-1], side="right")
        at = np.searchsorted(there, ids[first:last])
        known = there[at] == ids[first:last]
        into[first:last][known] = block[at[known]]
        found[first:last] |= known


def _ids(source: _Source, name: str) -> np.ndarray:
    ids = _of(source, name)
    if ids.dtype != np.int64 or ids.ndim != 1 or (ids[:1] < 0).any() or (np.diff(ids) <= 0).any():
        raise _unfit(source.file.path, f"{name} is not a list of ascending ids")
    return ids


def _of(source: _Source, name: str) -> np.ndarray:
    _shape(source, name)
    return source.file.read([name])[name]


def _shape(source: _Source, name: str) -> tuple[int, ...]:
    """Of an array; InputError where the file lacks it, or it has no rows though it is a table's."""
    shape = source.file.shapes.get(name)
    if shape is None or (not shape and _TABLE in name):
        raise _unfit(source.file.path, f"lacks {name}" if shape is None else f"{name} has no rows")
    return shape


def _table(name: str) -> str:
    return name.rpartition(_TABLE)[2]


def _position(path: Path, metadata: Mapping[str, Any]) -> dict[str, int]:
    position = metadata.get("position")
    if isinstance(position, dict):
        position = {"skipped": 0, **position}  # earlier versions did not count them
    if (
        not isinstance(position, dict)
        or position.keys() != set(_POSITION)
        or not all(type(number) is int and 0 <= number < 1 << 63 for number in position.values())
    ):
        raise InputError(f"{path}: not the state of a training run; train again without --resume")
    return position


def _unfit(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; put back the files that {STATE_FILE} was saved with, or train again without "
                      "--resume")  # fmt: skip
