"""From a day's files to encoded columns (spec: index 0 is padding, 2 for category_one; times in the log's zone).

Nothing here loops over items: a few thousand requests at a time, their rows are joined into one array and encoded
together.
"""

import logging
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import numpy as np

from deep_components.batch import ITEM_FIELDS, PADDING_INDEX
from deep_components.cascade import LABEL_CEILING, Cascade
from deep_components.cli import progress
from deep_components.dataset.clock import MAX_SECONDS, MIN_REQUEST_SECONDS, MIN_SECONDS, wall_clock
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.safe_pickle import PickledArray
from deep_components.errors import InputError

# our field -> the column of RecFlow's files and of id_cnt.pkl
LOG_COLUMN = {
    "user": "user_id",
    "device": "device_id",
    "gender": "gender",
    "age": "age",
    "province": "province",
    "video": "video_id",
    "author": "author_id",
    "category_two": "category_level_two",
    "category_one": "category_level_one",
    "upload_type": "upload_type",
}
UNSHIFTED = ("category_one",)  # encoded as it is; every other id is encoded as id + 1

T = TypeVar("T")

logger = logging.getLogger(__name__)

_REQUEST_IDS = ("user", "device", "gender", "age", "province")
_CONTENT_IDS = ("video", "author", "category_two", "category_one", "upload_type")
_TIMES = ("weekday", "hour", "minute")
_ITEM_WIDTH = 7  # columns of an item's row that are used
_HISTORY_WIDTH = 8
_MAX_WIDTH = 64  # a wider row is damage, and would be paid for in memory
_ROWS_PER_COPY = 8192
_MAX_POSITION = int(np.iinfo(np.int16).max)  # of an item in the true order
_MAX_VIDEO = (1 << 32) - 1


class ColumnFiles:
    """Columns written piece by piece into .npy files of one folder.

    A file is mapped only while a piece is written, so that the pages of the whole day never count as memory; its space
    on the disk is reserved first, so that a full disk is an OSError and not a SIGBUS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layouts: dict[str, dict[str, Any]] = {}  # column -> where in its file what lies, as np.memmap takes it

    def write(
        self, name: str, rows: np.ndarray | slice, total: int, values: np.ndarray, dtype: np.dtype | type[np.generic]
    ) -> None:
        """Put ``values`` at the ``rows`` of column ``name``, which has ``total`` rows of ``dtype``, zero at first."""
        path = self.folder / f"{name}.npy"
        if name in self._layouts:
            np.memmap(path, mode="r+", **self._layouts[name])[rows] = values
            return
        column = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(total, *values.shape[1:]))
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._layouts[name] = {"offset": column.offset, "shape": column.shape, "dtype": column.dtype}
        column[rows] = values

    def keep(self, rows: np.ndarray) -> None:
        """Leave only these rows (positions, rising) of every column written so far."""
        before, self._layouts = self._layouts, {}
        for name, layout in before.items():
            path = self.folder / f"{name}.npy"
            old = path.rename(path.with_suffix(".old"))
            for first in range(0, len(rows), _ROWS_PER_COPY):
                values = np.memmap(old, mode="r", **layout)[rows[first : first + _ROWS_PER_COPY]]
                self.write(name, slice(first, first + len(values)), len(rows), values, values.dtype)
            old.unlink()


def encode_day(
    data_dir: Path, day: str, cascade: Cascade, counts: Mapping[str, int], zone: ZoneInfo, files: ColumnFiles
) -> dict[str, int]:
    """Write the columns of ``day`` to ``files``: request_id, request.<field> [R], history.<field> and history.mask
    [R, 50], items.<field>, items.label and items.mask [R, N].

    The day's files are read once, in pieces of some thousand requests. Beyond a piece, the memory taken is that of the
    requests' own fields and of the true positions: some 0.6 KB a request.

    Returns:
        what was left out or repaired, counted.

    Raises:
        InputError: a file is missing, damaged, or holds a value that cannot be encoded.
    """
    logger.info("%s: encoding into the columnar cache (once)", day)
    source, path = recflow.feather_path(data_dir, day), recflow.request_path(data_dir, day)
    truth = cascade.groups[0]
    assert truth.index_field is not None
    log = recflow.read_requests(source, truth.name, truth.index_field)
    repairs = {"requests whose rows disagree in a field of the request, the first row taken": log.disagreeing}
    ids = log.fields["request_id"]
    encoder = _Encoder(counts, zone, files, len(ids))
    places = _Places(path, ids)
    positions = _TruePositions(source, truth.index_field, log, places)
    repairs[f"items with several {truth.index_field}, the first taken"] = positions.ambiguous
    unplaced = 0
    for piece in progress(recflow.read_request_dict(path), f"{day}: items", "piece"):
        rows, keys, groups = places.take(piece)
        unplaced += encoder.items(path, rows, keys, groups, cascade, positions)
    listed = np.flatnonzero(places.taken)
    repairs["requests of all_stage without items in request_id_dict, left out"] = len(ids) - len(listed)
    repairs["requests of request_id_dict without rows in all_stage, left out"] = places.strangers
    repairs[f"items of {truth.name} without {truth.index_field} in all_stage, left out"] = unplaced
    if not len(listed):
        raise InputError(f"{path}: none of its requests stands in {source}; fetch both files again")
    if len(listed) < len(ids):
        files.keep(listed)
    encoder.total = len(listed)
    encoder.requests(source, {name: values[listed] for name, values in log.fields.items()})
    places = _Places(recflow.history_path(data_dir, day), ids[listed])
    del log, positions, ids
    encoder.histories(places.path, np.zeros(0, np.int64), [], [])  # what no history is written to is padding
    for day_piece in progress(recflow.read_history_dict(places.path), f"{day}: histories", "piece"):
        encoder.histories(places.path, *places.take(day_piece))
    repairs["requests without a history in seq_effective_50_dict, given an empty one"] = int((~places.taken).sum())
    return repairs


class _Places:
    """Where the requests of a day stand in its columns; each may be taken from ``path`` once."""

    def __init__(self, path: Path, request_ids: np.ndarray) -> None:
        self.path = path
        self._order = np.argsort(request_ids)
        self._sorted_ids = request_ids[self._order]
        self.taken = np.zeros(len(request_ids), bool)
        self.strangers = 0  # requests met that have no place

    def of(self, request_ids: np.ndarray) -> np.ndarray:
        """The places of requests, -1 for those that have none."""
        near = np.searchsorted(self._sorted_ids, request_ids).clip(max=len(self._sorted_ids) - 1)
        return np.where(self._sorted_ids[near] == request_ids, self._order[near], -1)

    def take(self, piece: Sequence[tuple[int, T]]) -> tuple[np.ndarray, list[int], list[T]]:
        """(places, request ids, values) of those requests of the piece that have a place.

        Raises InputError when one comes a second time.
        """
        places = self.of(np.array([key for key, _ in piece], np.int64))
        known = places >= 0
        self.strangers += int((~known).sum())
        keys = [key for (key, _), here in zip(piece, known.tolist(), strict=True) if here]
        values = [value for (_, value), here in zip(piece, known.tolist(), strict=True) if here]
        rows = places[known]
        again = self.taken[rows]
        self.taken[rows] = True
        again[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
        if again.any():
            raise InputError(f"{self.path}: holds request {keys[again.argmax()]} twice; fetch the file again")
        return rows, keys, values


class _TruePositions:
    """Looks up the true position of (request, video) pairs.

    ``ambiguous`` counts pairs that the log gives several positions, the first of which is taken; a negative position is
    none. Raises InputError for one that a label cannot hold, and for a video that no table can.
    """

    def __init__(self, path: Path, field: str, log: recflow.Requests, places: _Places) -> None:
        given = log.truth_index >= 0
        videos, index = log.truth_video_id[given], log.truth_index[given]
        wrong = (index > _MAX_POSITION) | (videos < 0) | (videos > _MAX_VIDEO)
        if wrong.any():
            row = wrong.argmax()
            what = f"{field} is {index[row]}" if index[row] > _MAX_POSITION else f"video_id is {videos[row]}"
            raise InputError(
                f"{path}: request {log.truth_request_id[given][row]}: {what}, outside the 0 .. "
                f"{_MAX_POSITION if index[row] > _MAX_POSITION else _MAX_VIDEO} that it can be; fetch the file again"
            )
        keys = self._keys(places.of(log.truth_request_id[given]), videos)
        order = np.argsort(keys, kind="stable")
        self._known, self._index = keys[order], index[order].astype(np.int16)
        first = np.searchsorted(self._known, self._known)  # of the equal keys
        self.ambiguous = len(np.unique(self._known[self._index != self._index[first]]))

    @staticmethod
    def _keys(places: np.ndarray, video_ids: np.ndarray) -> np.ndarray:
        """One int64 for a pair: the request's place, then the video, which has fewer than 2^32 ids."""
        return (places << 32) + video_ids

    def find(self, places: np.ndarray, video_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, whether each is known) of pairs [R, 10]; ``places`` is [R, 1]."""
        if not len(self._known):
            return np.zeros_like(video_ids), np.zeros(video_ids.shape, bool)
        keys = self._keys(places, np.clip(video_ids, 0, _MAX_VIDEO))
        place = np.searchsorted(self._known, keys).clip(max=len(self._known) - 1)
        return self._index[place].astype(np.int64), self._known[place] == keys


class _Encoder:
    """Encodes pieces of a day and hands the columns to the files."""

    def __init__(self, counts: Mapping[str, int], zone: ZoneInfo, files: ColumnFiles, total: int) -> None:
        self.counts, self.zone, self.files, self.total = counts, zone, files, total

    def requests(self, path: Path, log: Mapping[str, np.ndarray]) -> None:
        """Encode the request side, columns of the feather file."""
        everything = slice(0, self.total)
        self._write("request_id", everything, log["request_id"], np.int64)
        self._write_times("request", everything, path, log["request_id"], log["request_timestamp"] // 1000, None)

        def place_of(row: tuple[int, ...]) -> str:
            return f"request {log['request_id'][row[0]]}"

        for field in _REQUEST_IDS:
            encoded = self._encode(path, field, log[LOG_COLUMN[field]], None, place_of)
            self._write(f"request.{field}", everything, encoded, self._dtype(field))

    def items(
        self,
        path: Path,
        rows: np.ndarray,
        ids: Sequence[int],
        requests: Sequence[Mapping[str, PickledArray]],
        cascade: Cascade,
        positions: _TruePositions,
    ) -> int:
        """Encode all groups of requests whose places are ``rows``; returns the number of ground-truth items left out
        for want of a position."""
        parts = [
            _stack(
                path,
                group.name,
                ids,
                [request.get(group.name) for request in requests],
                cascade.group_size,
                _ITEM_WIDTH,
            )
            for group in cascade.groups
        ]
        values = np.concatenate([values for values, _ in parts], axis=1)  # [b, N, 7]
        mask = np.concatenate([present for _, present in parts], axis=1)  # [b, N]
        labels = np.zeros(mask.shape, np.int64)
        size = cascade.group_size
        for place, group in enumerate(cascade.groups[1:], start=1):
            labels[:, place * size : (place + 1) * size] = group.label()
        index, known = positions.find(rows[:, None], values[:, :size, 0])
        labels[:, :size] = np.where(known, LABEL_CEILING - index, 0)
        unplaced = mask[:, :size] & ~known
        mask[:, :size] &= known

        def place_of(row: tuple[int, ...]) -> str:
            return f"request {ids[row[0]]}, {cascade.groups[row[1] // size].name}"

        columns = {field: recflow.ITEM_COLUMNS.index(LOG_COLUMN[field]) for field in _CONTENT_IDS}
        for field, column in columns.items():
            encoded = self._encode(path, field, values[:, :, column], mask, place_of)
            encoded[~mask] = PADDING_INDEX.get(field, 0)
            self._write(f"items.{field}", rows, encoded, self._dtype(field))
        uploaded = values[:, :, recflow.ITEM_COLUMNS.index("upload_timestamp")]
        self._write_times("items", rows, path, ids, uploaded, mask)
        self._write("items.label", rows, labels, np.int16)
        self._write("items.mask", rows, mask, np.bool_)
        return int(unplaced.sum())

    def histories(self, path: Path, rows: np.ndarray, ids: Sequence[int], histories: Sequence[PickledArray]) -> None:
        """Encode the histories of requests whose places are ``rows``; padding positions are 0 in every field,
        category_one too."""
        length = recflow.HISTORY_LENGTH
        for request_id, history in zip(ids, histories, strict=True):
            if history.shape[:1] != (length,):
                raise InputError(
                    f"{path}: the history of request {request_id} has shape {reprlib.repr(history.shape)}, "
                    f"not {length} rows; fetch the file again"
                )
        values, _ = _stack(path, "the history", ids, histories, length, _HISTORY_WIDTH)
        mask = values[:, :, recflow.HISTORY_COLUMNS.index("request_timestamp")] != 0
        for field in _CONTENT_IDS:
            column = recflow.HISTORY_COLUMNS.index(LOG_COLUMN[field])
            encoded = self._encode(
                path, field, values[:, :, column], mask, lambda row: f"request {ids[row[0]]}, history"
            )
            encoded[~mask] = 0
            self._write(f"history.{field}", rows, encoded, self._dtype(field))
        self._write("history.mask", rows, mask, np.bool_)

    def _encode(
        self,
        path: Path,
        field: str,
        ids: np.ndarray,
        mask: np.ndarray | None,
        place_of: Callable[[tuple[int, ...]], str],
    ) -> np.ndarray:
        """Indices of ``ids``; a value outside 0 .. count where ``mask`` is an InputError."""
        limit = self.counts[LOG_COLUMN[field]]
        wrong = (ids < 0) | (ids > limit)
        if mask is not None:
            wrong &= mask
        if wrong.any():
            row = tuple(int(place[0]) for place in np.nonzero(wrong))
            raise InputError(
                f"{path}: {place_of(row)}: {LOG_COLUMN[field]} is {ids[row]}, outside the 0 .. {limit} that "
                "others/id_cnt.pkl allows; fetch both files again"
            )
        return ids.copy() if field in UNSHIFTED else ids + 1

    def _write_times(
        self,
        prefix: str,
        rows: np.ndarray | slice,
        path: Path,
        ids: Sequence[int] | np.ndarray,
        seconds: np.ndarray,
        mask: np.ndarray | None,
    ) -> None:
        column, first = "request_timestamp", MIN_REQUEST_SECONDS
        if mask is not None:
            column, first = "upload_timestamp", MIN_SECONDS
        known = seconds if mask is None else np.where(mask, seconds, 0)
        wrong = np.argwhere((known < first) | (known >= MAX_SECONDS))
        if len(wrong):
            raise InputError(
                f"{path}: request {ids[wrong[0][0]]}: {column} is {known[tuple(wrong[0])]} s, outside the years "
                f"{'1990' if mask is None else '1900'} to 2200; is it in the unit that data/README.md names?"
            )
        encoded = wall_clock(known, self.zone)
        for field, values in zip(_TIMES, encoded, strict=True):
            if mask is not None:
                values[~mask] = 0
            self._write(f"{prefix}.{field}", rows, values, np.uint8)

    def _write(
        self, name: str, rows: np.ndarray | slice, values: np.ndarray, dtype: np.dtype | type[np.generic]
    ) -> None:
        self.files.write(name, rows, self.total, values, dtype)

    def _dtype(self, field: str) -> np.dtype:
        """The smallest unsigned type that holds every index of the field's table of count + 2 rows."""
        return np.min_scalar_type(self.counts[LOG_COLUMN[field]] + 1)


def _stack(
    path: Path, what: str, ids: Sequence[int], arrays: Sequence[PickledArray | None], limit: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``limit`` rows of each array, zero-padded at the end; the first ``width`` columns.

    Returns:
        (values [b, limit, width] int64, present [b, limit] bool).
    """
    counts = np.zeros(len(arrays), np.int64)
    pieces: list[bytes] = []
    columns = 0  # of the first array; in a sound file all have the same number
    for place, array in enumerate(arrays):
        if array is None or array.shape[:1] == (0,):
            continue
        if len(array.shape) != 2 or not width <= array.shape[1] <= _MAX_WIDTH:
            raise InputError(
                f"{path}: request {ids[place]}, {what}: shape {reprlib.repr(array.shape)}, not rows of {width} to "
                f"{_MAX_WIDTH} columns; fetch the file again"
            )
        columns = columns or array.shape[1]
        counts[place] = min(array.shape[0], limit)
        if array.dtype == np.int64 and array.shape[1] == columns:
            pieces.append(array.data[: counts[place] * columns * 8])
        else:
            pieces.append(_integer_rows(path, f"request {ids[place]}, {what}", array, limit, columns))
    present = np.arange(limit) < counts[:, None]
    values = np.zeros((len(arrays), limit, columns or width), np.int64)
    values[present] = np.frombuffer(b"".join(pieces), np.int64).reshape(-1, columns or width)
    return values[:, :, :width], present


def _integer_rows(path: Path, what: str, array: PickledArray, limit: int, columns: int) -> bytes:
    """The first rows of an array of another type or width as int64 rows of ``columns`` columns."""
    values = array.to_numpy()[:limit, :columns]
    rows = np.zeros((len(values), columns), np.int64)
    with np.errstate(invalid="ignore"):
        rows[:, : values.shape[1]] = values
    if not np.array_equal(rows[:, : values.shape[1]], values):
        raise InputError(f"{path}: {what}: holds a number that is not an integer of 64 bits; fetch the file again")
    return rows.tobytes()


assert (*_CONTENT_IDS, *_TIMES) == ITEM_FIELDS
