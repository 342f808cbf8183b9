"""From a day's files to encoded columns (spec: index 0 is padding, 2 for category_one; times in the log's zone).

Nothing here loops over items: a few thousand requests at a time, their rows are joined into one array and encoded
together.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from deep_components.batch import ITEM_FIELDS, PADDING_INDEX
from deep_components.cascade import LABEL_CEILING, Cascade
from deep_components.cli import progress
from deep_components.dataset import recflow
from deep_components.dataset.clock import MAX_SECONDS, MIN_SECONDS, wall_clock
from deep_components.dataset.safe_pickle import PickledArray
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

logger = logging.getLogger(__name__)

_REQUEST_IDS = ("user", "device", "gender", "age", "province")
_CONTENT_IDS = ("video", "author", "category_two", "category_one", "upload_type")
_TIMES = ("weekday", "hour", "minute")
_ITEM_WIDTH = 7  # columns of an item's row that are used
_HISTORY_WIDTH = 8
_MAX_WIDTH = 64  # a wider row is damage, and would be paid for in memory
_REQUESTS_PER_CHUNK = 8192
_LABEL_RANGE = np.iinfo(np.int16)


class ColumnFiles:
    """Columns written piece by piece into .npy files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, np.ndarray] = {}

    def write(self, name: str, chunk: slice, total: int, values: np.ndarray, dtype: np.dtype) -> None:
        """Put ``values`` at the rows ``chunk`` of column ``name``, which has ``total`` rows of ``dtype``."""
        if name not in self._open:
            self._open[name] = np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(total, *values.shape[1:])
            )
        self._open[name][chunk] = values

    def close(self) -> None:
        """Write all columns back to disk."""
        for column in self._open.values():
            column.flush()  # type: ignore[attr-defined]
        self._open.clear()


def encode_day(
    data_dir: Path, day: str, cascade: Cascade, counts: Mapping[str, int], zone: ZoneInfo, files: ColumnFiles
) -> dict[str, int]:
    """Write the columns of ``day`` to ``files``: request_id, request.<field> [R], history.<field> and history.mask
    [R, 50], items.<field>, items.label and items.mask [R, N].

    Returns:
        what was left out or repaired, counted.

    Raises:
        InputError: a file is missing, damaged, or holds a value that cannot be encoded.
    """
    logger.info("%s: encoding into the columnar cache (once)", day)
    repairs: dict[str, int] = {}
    source = recflow.feather_path(data_dir, day)
    truth = cascade.groups[0]
    assert truth.index_field is not None
    log = recflow.read_requests(source, truth.name, truth.index_field)
    path = recflow.request_path(data_dir, day)
    items = recflow.read_request_dict(path)
    listed = np.fromiter(
        (key in items for key in log.fields["request_id"].tolist()), bool, len(log.fields["request_id"])
    )
    repairs["requests of all_stage without items in request_id_dict, left out"] = int((~listed).sum())
    repairs["requests of request_id_dict without rows in all_stage, left out"] = len(items) - int(listed.sum())
    requests = {name: values[listed] for name, values in log.fields.items()}
    ids = requests["request_id"].tolist()
    if not ids:
        raise InputError(f"{path}: none of its requests stands in {source}; fetch both files again")
    encoder = _Encoder(counts, zone, files, len(ids))
    encoder.requests(source, requests)
    positions = _TruePositions(log, requests["request_id"])
    unplaced = 0
    for chunk in progress(_chunks(len(ids)), f"{day}: items", "chunk"):
        unplaced += encoder.items(path, chunk, ids[chunk], [items[key] for key in ids[chunk]], cascade, positions)
    repairs[f"items of {truth.name} without {truth.index_field} in all_stage, left out"] = unplaced
    del items
    path = recflow.history_path(data_dir, day)
    histories = recflow.read_history_dict(path)
    repairs["requests without a history in seq_effective_50_dict, given an empty one"] = sum(
        key not in histories for key in ids
    )
    for chunk in progress(_chunks(len(ids)), f"{day}: histories", "chunk"):
        encoder.histories(path, chunk, ids[chunk], [histories.get(key) for key in ids[chunk]])
    files.close()
    return repairs


class _TruePositions:
    """Looks up the true position of (request, video) pairs."""

    def __init__(self, log: recflow.Requests, request_ids: np.ndarray) -> None:
        self._sorted_ids = np.sort(request_ids)
        known = np.isin(log.truth_request_id, request_ids)
        keys = self._keys(log.truth_request_id[known], log.truth_video_id[known])
        order = np.argsort(keys, kind="stable")
        self._known, self._index = keys[order], log.truth_index[known][order]

    def _keys(self, request_ids: np.ndarray, video_ids: np.ndarray) -> np.ndarray:
        """One int64 for a pair: the request's place among all, then the video, which has fewer than 2^32 ids."""
        return (np.searchsorted(self._sorted_ids, request_ids) << 32) + video_ids

    def find(self, request_ids: np.ndarray, video_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, whether each is known) of pairs [R, 10]; ``request_ids`` is [R, 1]."""
        if not len(self._known):
            return np.zeros_like(video_ids), np.zeros(video_ids.shape, bool)
        keys = self._keys(request_ids, np.clip(video_ids, 0, (1 << 32) - 1))
        place = np.searchsorted(self._known, keys).clip(max=len(self._known) - 1)
        return self._index[place], self._known[place] == keys


class _Encoder:
    """Encodes chunks of requests and hands the columns to the files."""

    def __init__(self, counts: Mapping[str, int], zone: ZoneInfo, files: ColumnFiles, total: int) -> None:
        self.counts, self.zone, self.files, self.total = counts, zone, files, total

    def requests(self, path: Path, log: Mapping[str, np.ndarray]) -> None:
        """Encode the request side, columns of the feather file."""
        everything = slice(0, self.total)
        self._write("request_id", everything, log["request_id"], np.dtype(np.int64))
        self._write_times(
            "request", everything, path, log["request_id"].tolist(), log["request_timestamp"] // 1000, None
        )

        def place_of(row: tuple[int, ...]) -> str:
            return f"request {log['request_id'][row[0]]}"

        for field in _REQUEST_IDS:
            encoded = self._encode(path, field, log[LOG_COLUMN[field]], None, place_of)
            self._write(f"request.{field}", everything, encoded, self._dtype(field))

    def items(
        self,
        path: Path,
        chunk: slice,
        ids: list[int],
        requests: Sequence[Mapping[str, PickledArray]],
        cascade: Cascade,
        positions: _TruePositions,
    ) -> int:
        """Encode all groups of a chunk; returns the number of ground-truth items left out for want of a position."""
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
        rows = np.concatenate([rows for rows, _ in parts], axis=1)  # [b, N, 7]
        mask = np.concatenate([present for _, present in parts], axis=1)  # [b, N]
        labels = np.zeros(mask.shape, np.int64)
        size = cascade.group_size
        for place, group in enumerate(cascade.groups[1:], start=1):
            labels[:, place * size : (place + 1) * size] = group.label()
        index, known = positions.find(np.array(ids)[:, None], rows[:, :size, 0])
        labels[:, :size] = np.where(known, LABEL_CEILING - index, 0)
        unplaced = mask[:, :size] & ~known
        mask[:, :size] &= known
        if (labels < _LABEL_RANGE.min).any() or (labels > _LABEL_RANGE.max).any():
            raise InputError(
                f"{path}: a label lies outside 16 bits; check {cascade.groups[0].index_field} in all_stage"
            )

        def place_of(row: tuple[int, ...]) -> str:
            return f"request {ids[row[0]]}, {cascade.groups[row[1] // size].name}"

        columns = {field: recflow.ITEM_COLUMNS.index(LOG_COLUMN[field]) for field in _CONTENT_IDS}
        for field, column in columns.items():
            encoded = self._encode(path, field, rows[:, :, column], mask, place_of)
            encoded[~mask] = PADDING_INDEX.get(field, 0)
            self._write(f"items.{field}", chunk, encoded, self._dtype(field))
        uploaded = rows[:, :, recflow.ITEM_COLUMNS.index("upload_timestamp")]
        self._write_times("items", chunk, path, ids, uploaded, mask)
        self._write("items.label", chunk, labels, np.dtype(np.int16))
        self._write("items.mask", chunk, mask, np.dtype(bool))
        return int(unplaced.sum())

    def histories(self, path: Path, chunk: slice, ids: list[int], histories: Sequence[PickledArray | None]) -> None:
        """Encode the histories of a chunk; padding positions are 0 in every field, category_one too."""
        length = recflow.HISTORY_LENGTH
        for request_id, history in zip(ids, histories, strict=True):
            if history is not None and history.shape[:1] != (length,):
                raise InputError(
                    f"{path}: the history of request {request_id} has shape {history.shape}, "
                    f"not {length} rows; fetch the file again"
                )
        rows, _ = _stack(path, "the history", ids, histories, length, _HISTORY_WIDTH)
        mask = rows[:, :, recflow.HISTORY_COLUMNS.index("request_timestamp")] != 0
        for field in _CONTENT_IDS:
            column = recflow.HISTORY_COLUMNS.index(LOG_COLUMN[field])
            encoded = self._encode(path, field, rows[:, :, column], mask, lambda row: f"request {ids[row[0]]}, history")
            encoded[~mask] = 0
            self._write(f"history.{field}", chunk, encoded, self._dtype(field))
        self._write("history.mask", chunk, mask, np.dtype(bool))

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
        chunk: slice,
        path: Path,
        ids: Sequence[int],
        seconds: np.ndarray,
        mask: np.ndarray | None,
    ) -> None:
        column = "request_timestamp" if prefix == "request" else "upload_timestamp"
        known = seconds if mask is None else np.where(mask, seconds, 0)
        wrong = np.argwhere((known < MIN_SECONDS) | (known >= MAX_SECONDS))
        if len(wrong):
            raise InputError(
                f"{path}: request {ids[wrong[0][0]]}: {column} is {known[tuple(wrong[0])]} s, outside the years "
                "1900 to 2200; is it in the unit that data/README.md names?"
            )
        encoded = wall_clock(known, self.zone)
        for field, values in zip(_TIMES, encoded, strict=True):
            if mask is not None:
                values[~mask] = 0
            self._write(f"{prefix}.{field}", chunk, values, np.dtype(np.uint8))

    def _write(self, name: str, chunk: slice, values: np.ndarray, dtype: np.dtype) -> None:
        self.files.write(name, chunk, self.total, values, dtype)

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
                f"{path}: request {ids[place]}, {what}: shape {array.shape}, not rows of {width} to {_MAX_WIDTH} "
                "columns; fetch the file again"
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


def _chunks(total: int) -> list[slice]:
    return [slice(first, min(first + _REQUESTS_PER_CHUNK, total)) for first in range(0, total, _REQUESTS_PER_CHUNK)]


assert (*_CONTENT_IDS, *_TIMES) == ITEM_FIELDS
