"""RecFlow's log: its days are encoded into columns (spec: index 0 is padding, 2 for category_one) and cached.

Nothing here loops over items: a few thousand requests at a time, their rows are joined into one array and encoded
together.
"""

import hashlib
import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from deep_components.cascade import Cascade
from deep_components.cli import progress
from deep_components.dataset import clock
from deep_components.dataset.cache import cached_day, day_folder, default_cache_dir
from deep_components.dataset.columnar import FORMAT_VERSION, ColumnFiles, DayCache, checksum_of, read_day, write_day
from deep_components.dataset.encoding import (
    ENCODING_FILE,
    NO_TIME,
    aligned,
    column_of,
    flattened,
    integers_of,
    plain_encoding,
    times_of,
)
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.safe_pickle import PickledArray
from deep_components.dataset.manifest import read_manifest, verify
from deep_components.errors import InputError
from deep_components.files import write_json
from deep_components.schema import Field, Schema, recflow_schema

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
ENCODING_VERSION = 2  # of the rules by which a day is encoded: part of a cache's identity
UNSHIFTED = ("category_one",)  # encoded as it is; every other id is encoded as id + 1

T = TypeVar("T")

logger = logging.getLogger(__name__)

_REQUEST_IDS = ("user", "device", "gender", "age", "province")
_CONTENT_IDS = ("video", "author", "category_two", "category_one", "upload_type")
_TIMES = ("weekday", "hour", "minute")
_FIRST_TIMES = {
    "request": ("request_timestamp", clock.MIN_REQUEST_SECONDS, 1990),
    "item": ("upload_timestamp", clock.MIN_SECONDS, 1900),
}
_ITEM_WIDTH = 7  # columns of an item's row that are used
_HISTORY_WIDTH = 8
_MAX_WIDTH = 64  # a wider row is damage, and would be paid for in memory
_MAX_POSITION = int(np.iinfo(np.int16).max)  # of an item in the true order
_MAX_VIDEO = (1 << 32) - 1


# ---- the log ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecFlowLog:
    """A log in RecFlow's layout.

    Attributes:
        folder: where it lies.
        origin: what made it: "recflow", "simulated", "movielens-1m", ...
        schema: the fields of its days.
        test_days: the last so many of its days are not trained on.
        encoding_checksum: None, since its ids are indices already.
        protocol_days: those of the published protocol, used where all of them are there; none for logs without one.
        history_length: L, the history positions of a request: the maximum of --seq_len.
    """

    folder: Path
    origin: str
    schema: Schema
    protocol_days: tuple[str, ...] = recflow.PERIOD_1
    test_days: int = 1
    encoding_checksum: None = None
    history_length: int = recflow.HISTORY_LENGTH

    def days(self, named: bool = False) -> list[str]:
        """The days that are complete, in order, and the errors of ``recflow_files.available_days``."""
        return recflow.available_days(self.folder, named)

    def open_day(
        self,
        day: str,
        cascade: Cascade,
        cache_dir: Path | None = None,
        zone: str = clock.DEFAULT_TIME_ZONE,
        history_length: int | None = None,
    ) -> DayCache:
        """One of :meth:`days`, with the item groups of the cascade.

        Days that must be encoded take their times in ``zone`` and are kept in ``cache_dir``, by default beside the log.
        Batches have the last ``history_length`` positions, by default all. Raises InputError when a file is missing or
        cannot be used, or the cache cannot be written.
        """
        check_groups(cascade)
        identity = self._identity(day, cascade, zone)

        def read(folder: Path) -> DayCache:
            return read_day(folder, day, cascade, made_from=identity)

        def build(folder: Path) -> None:
            verify(self.folder, self.day_files(day))
            encode_day(self.folder, day, cascade, self.schema, clock.time_zone(zone), folder, identity)

        parent, name = self._cached(day, cascade, cache_dir, zone)
        return cached_day(parent, name, identity, read, build).with_history(history_length)

    def checksum(self, day: str, cascade: Cascade, cache_dir: Path | None, zone: str) -> str | None:
        """``checksum`` of the opened day, by what its cache says of itself; None where it is not in the cache."""
        folder = day_folder(*self._cached(day, cascade, cache_dir, zone), self._identity(day, cascade, zone))
        return checksum_of(folder) if folder.exists() else None

    def _cached(self, day: str, cascade: Cascade, cache_dir: Path | None, zone: str) -> tuple[Path, str]:
        """Where the cascade's days lie, and what the names of this one begin with. The log is in them too: logs that
        share a --cache_dir must not take each other's days for stale."""
        log = hashlib.sha256(f"{self.folder.resolve()}|{zone}".encode()).hexdigest()[:8]
        return (cache_dir or default_cache_dir(self.folder)) / cascade.name, f"{day}-{log}"

    def files(self) -> list[Path]:
        """All files that the log consists of, for its manifest."""
        days = sorted(set().union(*recflow.days_of(self.folder)))
        paths = [path for day in days for path in self.day_files(day)]
        shared = (recflow.id_count_path(self.folder), self.folder / recflow.ORIGIN_FILE)
        return [path for path in (*paths, *shared) if path.exists()]

    def day_files(self, day: str) -> list[Path]:
        return list(recflow.day_paths(self.folder, day))

    def checks(self, day: str, cascade: Cascade) -> dict[str, Callable[[], str]]:
        """Quick checks of a day: name -> function that says what is sound, or raises InputError."""
        feather, requests, histories = self.day_files(day)
        truth = cascade.groups[0]

        def rows() -> str:
            return f"its first {recflow.check_feather(feather, truth.name, truth.index_field):,} rows are sound"

        def first(path: Path, read: Callable[[Path], Iterator[Sequence[object]]]) -> str:
            piece = next(read(path), ())
            if not piece:
                raise InputError(f"{path}: holds no request; fetch the file again")
            return f"its first {len(piece):,} requests are sound"

        return {
            "all_stage": rows,
            "request_id_dict": lambda: first(requests, recflow.read_request_dict),
            "seq_effective_50_dict": lambda: first(histories, recflow.read_history_dict),
        }

    def _identity(self, day: str, cascade: Cascade, zone: str) -> dict[str, Any]:
        """All that the encoded day depends on."""
        manifest = read_manifest(self.folder) or {}
        sources = {}
        for path in self.day_files(day):
            try:
                status = path.stat()
            except OSError as error:
                raise InputError(f"{path}: no such file; see data/README.md for the files a day consists of") from error
            listed = manifest.get(str(path.relative_to(self.folder)))
            sources[path.parent.name] = [status.st_size, status.st_mtime_ns, listed]
        return {
            "format": FORMAT_VERSION,
            "encoding": ENCODING_VERSION,
            "sources": sources,
            "schema": self.schema.checksum,
            "groups": [asdict(group) for group in cascade.groups],
            "time_zone": zone,
        }


def open_recflow(data_dir: Path) -> RecFlowLog:
    """The log in ``data_dir``. InputError when there is none, or when what concerns all of its days is damaged."""
    origin = recflow.read_origin(data_dir)
    recflow.available_days(data_dir, named=True)  # where nothing is there, this says so best
    counts = recflow.read_id_counts(data_dir)
    return RecFlowLog(data_dir, origin, recflow_schema({field: counts[column] for field, column in LOG_COLUMN.items()}))


def check_groups(cascade: Cascade) -> None:
    """InputError when a group of the cascade is not in RecFlow's files, or its order is not."""
    for number, group in enumerate(cascade.groups):
        what = f"cascade {cascade.name}: group {group.name}"
        if group.name not in recflow.GROUP_NAMES:
            raise InputError(f"{what} is not in a log of RecFlow's layout, which has {', '.join(recflow.GROUP_NAMES)}")
        if number and group.position is None:
            raise InputError(f"{what} has no position; in RecFlow's layout only the first group can do without")
        if group.position is None and group.index_field is None:
            raise InputError(f"{what} has neither position nor index_field; give one of them")
        if group.position is not None and not 0 <= group.position <= _MAX_POSITION:
            raise InputError(f"{what}: position is {group.position}, outside the 0 .. {_MAX_POSITION} that it can be")


# ---- raw values ------------------------------------------------------------------------------------------------------


class RecFlowEncoding:
    """How raw values of RecFlow's files become its days' indices (a RawEncoding, see dataset/encoding.py).

    Raw columns have RecFlow's names: request_timestamp is in ms, upload_timestamp in s, as the files have them.
    """

    item, user, time = "video_id", "user_id", "request_timestamp"
    item_field = "video"

    def __init__(self, schema: Schema, zone: str, history_length: int = recflow.HISTORY_LENGTH) -> None:
        self.schema, self.zone, self.history_length = schema, zone, history_length

    def columns(self, side: str) -> dict[str, pa.DataType | None]:
        """See RawEncoding."""
        names = [LOG_COLUMN[field.name] for field in self.schema.side(side) if field.name in LOG_COLUMN]
        return dict.fromkeys([*names, *([_FIRST_TIMES[side][0]] if side in _FIRST_TIMES else [])], pa.int64())

    def encode(self, side: str, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """See RawEncoding."""
        made: dict[str, np.ndarray] = {}
        for field in self.schema.side(side):
            if field.kind == "time":
                continue
            with column_of(columns, LOG_COLUMN[field.name], field.name, side) as column:
                if side == "history":
                    flat, counts = flattened(column)
                    made[field.name] = aligned(self._indices(field, flat), counts, self.history_length, 0, latest=True)
                    made["mask"] = np.arange(self.history_length, 0, -1) <= counts[:, None]
                else:
                    made[field.name] = self._indices(field, column)
        return made | (self._times(side, columns) if side in _FIRST_TIMES else {})

    def _indices(self, field: Field, column: pa.Array) -> np.ndarray:
        ids, missing = integers_of(column)
        known = ~missing & (ids >= 0) & (ids <= field.size - 2)  # as others/id_cnt.pkl allows
        return np.where(known, ids if field.name in UNSHIFTED else ids + 1, field.padding)

    def _times(self, side: str, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        name = _FIRST_TIMES[side][0]
        with column_of(columns, name, "weekday", side) as column:
            unit = {"request": "ms", "item": "s"}[side] if not pa.types.is_timestamp(column.type) else None
            times = times_of(column, unit, self.zone)
        there = times != NO_TIME
        parts = clock.wall_clock(np.where(there, times // 1_000_000, 0), clock.time_zone(self.zone))
        return {field: np.where(there, values, 0) for field, values in zip(_TIMES, parts, strict=True)}

    def save(self, folder: Path) -> None:
        """See RawEncoding."""
        content = {"version": 1, "kind": "recflow", "schema": self.schema.to_json(), "time_zone": self.zone}
        write_json(folder / ENCODING_FILE, content | {"history_length": self.history_length})

    @classmethod
    def load(cls, folder: Path) -> "RecFlowEncoding":
        """What :meth:`save` wrote. InputError when it is damaged."""
        content, schema = plain_encoding(folder, "recflow", time_zone=str, history_length=int)
        if {field.name for field in schema.fields} != {*LOG_COLUMN, *_TIMES}:
            raise InputError(f"{folder / ENCODING_FILE}: its fields are not RecFlow's; export the run again")
        clock.time_zone(content["time_zone"])
        return cls(schema, content["time_zone"], content["history_length"])


def raw_ids(field: str, indices: np.ndarray) -> np.ndarray:
    """The ids, int64, of a field of LOG_COLUMN that a day has as these indices; -1 for padding, which is no id."""
    ids: np.ndarray = indices.astype(np.int64)
    return ids if field in UNSHIFTED else ids - 1


def item_rows(log: RecFlowLog) -> Iterator[pa.RecordBatch]:
    """The items of all days as the files have them, columns of ITEM_COLUMNS but effective_view, which belongs to a
    request; a few thousand requests at a time, each item once a piece."""
    names = recflow.ITEM_COLUMNS[:_ITEM_WIDTH]
    for day in log.days(named=True):
        path = recflow.request_path(log.folder, day)
        verify(log.folder, [path])
        for piece in recflow.read_request_dict(path):
            arrays = [(key, rows) for key, groups in piece for rows in groups.values() if rows.shape[:1] != (0,)]
            longest = max((rows.shape[0] for _, rows in arrays if rows.shape), default=0)
            ids, groups = [key for key, _ in arrays], [rows for _, rows in arrays]
            values, mask = _stack(path, "its items", ids, groups, longest, _ITEM_WIDTH)
            values = values[mask]
            last = len(values) - 1 - np.unique(values[::-1, 0], return_index=True)[1]
            kept = values[np.sort(last)]
            yield pa.record_batch({name: kept[:, number] for number, name in enumerate(names)})


# ---- encoding --------------------------------------------------------------------------------------------------------


def encode_day(
    data_dir: Path,
    day: str,
    cascade: Cascade,
    schema: Schema,
    zone: ZoneInfo,
    folder: Path,
    made_from: Mapping[str, Any],
) -> None:
    """Write the day to ``folder``, in the columnar format.

    The day's files are read once, in pieces of some thousand requests. Beyond a piece, the memory taken is that of the
    requests' own fields and of the true positions: some 0.6 KB a request. Raises InputError when a file is missing,
    damaged, or holds a value that cannot be encoded; OSError when the folder cannot be written.
    """
    logger.info("%s: encoding into the columnar cache (once)", day)
    feather, items, histories = recflow.day_paths(data_dir, day)
    truth = cascade.groups[0]
    log = recflow.read_requests(feather, truth.name, truth.index_field)
    ids = log.fields["request_id"]
    with write_day(folder, schema, len(ids), made_from) as files:
        encoder = _Encoder(schema, zone, files)
        index = _RequestIndex(items, ids)
        positions = _TruePositions(feather, truth.index_field, log, index)
        for piece in progress(recflow.read_request_dict(items), f"{day}: items", "piece"):
            encoder.items(items, *index.take(piece), cascade, positions)
        listed = np.flatnonzero(index.taken)
        if not len(listed):
            raise InputError(f"{items}: none of its requests stands in {feather}; fetch both files again")
        if len(listed) < len(ids):
            files.keep(listed)
        encoder.requests(feather, {name: values[listed] for name, values in log.fields.items()})
        last = cascade.label_ceiling
        repairs = {
            "requests whose rows disagree in a field of the request, the first row taken": log.disagreeing,
            f"items with several {truth.index_field}, the first taken": positions.ambiguous,
            "requests of all_stage without items in request_id_dict, left out": len(ids) - len(listed),
            "requests of request_id_dict without rows in all_stage, left out": index.not_found,
            f"items of {truth.name} without {truth.index_field} in all_stage, left out": encoder.without_position,
            f"items of {truth.name} with {truth.index_field} above {last}, given label 0": encoder.beyond,
            "items that their request has already, in the same or a better group, left out": encoder.duplicates,
        }
        index = _RequestIndex(histories, ids[listed])
        del log, positions, ids
        encoder.histories(histories, np.zeros(0, np.int64), [], [])  # what no history is written to is padding
        for events in progress(recflow.read_history_dict(histories), f"{day}: histories", "piece"):
            encoder.histories(histories, *index.take(events))
        without_history = len(index.taken) - int(index.taken.sum())
        repairs["requests without a history in seq_effective_50_dict, given an empty one"] = without_history
        files.repairs = repairs


class _RequestIndex:
    """Finds the rows of requests in a day's columns; ``path`` may name each request once.

    ``taken`` [R] bool are the requests that the file has named, ``not_found`` counts those of its own without a row.
    """

    def __init__(self, path: Path, request_ids: np.ndarray) -> None:
        self.path = path
        self._order = np.argsort(request_ids)
        self._sorted_ids = request_ids[self._order]
        self.taken = np.zeros(len(request_ids), bool)
        self.not_found = 0

    def rows(self, request_ids: np.ndarray) -> np.ndarray:
        """The row of each request, -1 for those that have none."""
        near = np.searchsorted(self._sorted_ids, request_ids).clip(max=len(self._sorted_ids) - 1)
        return np.where(self._sorted_ids[near] == request_ids, self._order[near], -1)

    def take(self, piece: Sequence[tuple[int, T]]) -> tuple[np.ndarray, list[int], list[T]]:
        """(rows, request ids, values) of those requests of the piece that have a row.

        Raises InputError when one comes a second time.
        """
        rows = self.rows(np.array([key for key, _ in piece], np.int64))
        found = np.flatnonzero(rows >= 0)
        self.not_found += len(piece) - len(found)
        keys, values = [piece[k][0] for k in found.tolist()], [piece[k][1] for k in found.tolist()]
        rows = rows[found]
        again = self.taken[rows]
        again[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
        if again.any():
            raise InputError(f"{self.path}: holds request {keys[again.argmax()]} twice; fetch the file again")
        self.taken[rows] = True
        return rows, keys, values


class _TruePositions:
    """Looks up the true position of (request, video) pairs.

    ``ambiguous`` counts pairs that the log gives several positions, the first of which is taken; a negative position is
    none. Raises InputError for one that a label cannot hold, and for a video that no table can.
    """

    def __init__(self, path: Path, field: str | None, log: recflow.Requests, index: _RequestIndex) -> None:
        given = log.truth_index >= 0
        requests, videos, positions = (a[given] for a in (log.truth_request_id, log.truth_video_id, log.truth_index))
        for name, values, limit in (("video_id", videos, _MAX_VIDEO), (field, positions, _MAX_POSITION)):
            wrong = (values < 0) | (values > limit)
            if wrong.any():
                raise InputError(
                    f"{path}: request {requests[wrong][0]}: {name} is {values[wrong][0]}, outside the 0 .. {limit} "
                    "that it can be; fetch the file again"
                )
        keys = (index.rows(requests) << 32) + videos  # one int64 for a pair: videos have fewer than 2^32 ids
        order = np.argsort(keys, kind="stable")
        self._known, self._positions = keys[order], positions[order].astype(np.int16)
        first = np.searchsorted(self._known, self._known)  # of the equal keys
        self.ambiguous = len(np.unique(self._known[self._positions != self._positions[first]]))

    def find(self, rows: np.ndarray, video_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, whether each is known) of the videos [b, n] of the requests in ``rows`` [b]."""
        if not len(self._known):
            return np.zeros_like(video_ids), np.zeros(video_ids.shape, bool)
        keys = (rows[:, None] << 32) + np.clip(video_ids, 0, _MAX_VIDEO)
        near = np.searchsorted(self._known, keys).clip(max=len(self._known) - 1)
        return self._positions[near].astype(np.int64), self._known[near] == keys


class _Encoder:
    """Encodes pieces of a day into its columns.

    Of the ground-truth items, ``without_position`` counts those left out because the log does not give their position,
    and ``beyond`` those at a position beyond the cascade's labels, which have label 0. ``duplicates`` counts the items
    left out because their request has them already.
    """

    def __init__(self, schema: Schema, zone: ZoneInfo, files: ColumnFiles) -> None:
        self._tables, self._zone, self._files = schema.tables, zone, files
        self.without_position = self.beyond = self.duplicates = 0

    def requests(self, path: Path, log: Mapping[str, np.ndarray]) -> None:
        """Encode the request side, columns of the feather file."""
        ids, everything = log["request_id"], slice(None)
        self._files.write("request_id", ids)
        seconds = log["request_timestamp"] // 1000
        self._write_times(path, "request", ids, everything, seconds)
        fields = {field: log[LOG_COLUMN[field]] for field in _REQUEST_IDS}
        self._write_ids(path, "request", everything, fields, np.True_, lambda row: f"request {ids[row[0]]}")

    def items(
        self,
        path: Path,
        rows: np.ndarray,
        ids: Sequence[int],
        requests: Sequence[Mapping[str, PickledArray]],
        cascade: Cascade,
        positions: _TruePositions,
    ) -> None:
        """Encode all groups of the requests whose columns' rows are ``rows``."""
        stacked = [
            _stack(path, group.name, ids, [request.get(group.name) for request in requests], group.slots, _ITEM_WIDTH)
            for group in cascade.groups
        ]
        values = np.concatenate([values for values, _ in stacked], axis=1)  # [b, N, 7]
        mask = np.concatenate([mask for _, mask in stacked], axis=1)  # [b, N]
        groups = cascade.group_of_item
        shared = cascade.labels(np.array([group.position or 0 for group in cascade.groups]))
        labels = np.repeat(shared[None, groups], len(rows), axis=0)
        if cascade.groups[0].index_field is not None:
            size = cascade.groups[0].slots
            position, known = positions.find(rows, values[:, :size, 0])
            labels[:, :size] = np.where(known, cascade.labels(position), 0)
            self.beyond += int((mask[:, :size] & known & (position > cascade.label_ceiling)).sum())
            self.without_position += int((mask[:, :size] & ~known).sum())
            mask[:, :size] &= known
        repeated = _repeated(values[:, :, 0], mask)
        self.duplicates += int(repeated.sum())
        mask &= ~repeated
        fields = {field: values[:, :, recflow.ITEM_COLUMNS.index(LOG_COLUMN[field])] for field in _CONTENT_IDS}
        self._write_ids(
            path,
            "item",
            rows,
            fields,
            mask,
            lambda row: f"request {ids[row[0]]}, {cascade.groups[groups[row[1]]].name}",
        )
        uploaded = np.where(mask, values[:, :, recflow.ITEM_COLUMNS.index("upload_timestamp")], 0)
        self._write_times(path, "item", ids, rows, uploaded, mask)
        self._files.write("item.label", labels.astype(np.int16), rows)
        self._files.write("item.mask", mask, rows)

    def histories(self, path: Path, rows: np.ndarray, ids: Sequence[int], histories: Sequence[PickledArray]) -> None:
        """Encode the histories of the requests whose columns' rows are ``rows``; padding positions are 0 in every
        field, category_one too."""
        length = recflow.HISTORY_LENGTH
        for request_id, history in zip(ids, histories, strict=True):
            if history.shape[:1] != (length,):
                raise InputError(
                    f"{path}: the history of request {request_id} has shape {reprlib.repr(history.shape)}, "
                    f"not {length} rows; fetch the file again"
                )
        values, _ = _stack(path, "the history", ids, histories, length, _HISTORY_WIDTH)
        mask = values[:, :, recflow.HISTORY_COLUMNS.index("request_timestamp")] != 0
        fields = {field: values[:, :, recflow.HISTORY_COLUMNS.index(LOG_COLUMN[field])] for field in _CONTENT_IDS}
        self._write_ids(path, "history", rows, fields, mask, lambda row: f"request {ids[row[0]]}, history")
        self._files.write("history.mask", mask, rows)

    def _write_ids(
        self,
        path: Path,
        side: str,
        rows: np.ndarray | slice,
        fields: Mapping[str, np.ndarray],
        mask: np.ndarray | np.bool_,
        where: Callable[[tuple[int, ...]], str],
    ) -> None:
        """Write the ids of each field as indices, padding where not ``mask``; where it is, a value outside 0 .. count
        is an InputError that says ``where``."""
        for field, ids in fields.items():
            table = self._tables[field]
            count = table.size - 2
            wrong = ((ids < 0) | (ids > count)) & mask
            if wrong.any():
                first = tuple(int(axis[0]) for axis in np.nonzero(wrong))
                raise InputError(
                    f"{path}: {where(first)}: {LOG_COLUMN[field]} is {ids[first]}, outside the 0 .. {count} that "
                    "others/id_cnt.pkl allows; fetch both files again"
                )
            encoded = (ids if field in UNSHIFTED else ids + 1).astype(np.min_scalar_type(count + 1))
            encoded[~mask] = table.padding if side == "item" else 0
            self._files.write(f"{side}.{field}", encoded, rows)

    def _write_times(
        self,
        path: Path,
        side: str,
        ids: Sequence[int] | np.ndarray,
        rows: np.ndarray | slice,
        seconds: np.ndarray,
        mask: np.ndarray | np.bool_ = np.True_,
    ) -> None:
        """Write the wall-clock fields, padding where not ``mask``. InputError for a time before 1990 (requests), 1900
        (uploads), or after 2200."""
        column, first, year = _FIRST_TIMES[side]
        wrong = np.argwhere((seconds < first) | (seconds >= clock.MAX_SECONDS))
        if len(wrong):
            raise InputError(
                f"{path}: request {ids[wrong[0][0]]}: {column} is {seconds[tuple(wrong[0])]} s, outside {year} to 2200;"
                " is it in the unit that data/README.md names?"
            )
        for field, values in zip(_TIMES, clock.wall_clock(seconds, self._zone), strict=True):
            self._files.write(f"{side}.{field}", values * mask, rows)


def _repeated(videos: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Which items their request has in an earlier slot too; masked items do not count. [b, N] bool."""
    videos = np.where(mask, videos, np.iinfo(np.int64).min + np.arange(videos.shape[1]))  # masked: each its own
    order = videos.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(videos, order, axis=1)
    repeated = np.zeros_like(mask)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated


def _stack(
    path: Path, what: str, ids: Sequence[int], arrays: Sequence[PickledArray | None], limit: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``limit`` rows of each array, zero-padded at the end; the first ``width`` columns.

    Returns:
        (values [b, limit, width] int64, mask [b, limit] bool, where an array has a row).
    """
    counts = np.zeros(len(arrays), np.int64)
    pieces: list[bytes] = []
    columns = 0  # of the first array; in a sound file all have the same number
    for number, array in enumerate(arrays):
        if array is None or array.shape[:1] == (0,):
            continue
        if len(array.shape) != 2 or not width <= array.shape[1] <= _MAX_WIDTH:
            raise InputError(
                f"{path}: request {ids[number]}, {what}: shape {reprlib.repr(array.shape)}, not rows of {width} to "
                f"{_MAX_WIDTH} columns; fetch the file again"
            )
        columns = columns or array.shape[1]
        counts[number] = min(array.shape[0], limit)
        if array.dtype == np.int64 and array.shape[1] == columns:
            pieces.append(array.data[: counts[number] * columns * 8])
        else:
            pieces.append(_integer_rows(path, f"request {ids[number]}, {what}", array, limit, columns))
    mask = np.arange(limit) < counts[:, None]
    values = np.zeros((len(arrays), limit, columns or width), np.int64)
    values[mask] = np.frombuffer(b"".join(pieces), np.int64).reshape(-1, columns or width)
    return values[:, :, :width], mask


def _integer_rows(path: Path, what: str, array: PickledArray, limit: int, columns: int) -> bytes:
    """The first rows of an array of another type or width as int64 rows of ``columns`` columns."""
    values = array.to_numpy()[:limit, :columns]
    rows = np.zeros((len(values), columns), np.int64)
    with np.errstate(invalid="ignore"):
        rows[:, : values.shape[1]] = values
    if not np.array_equal(rows[:, : values.shape[1]], values):
        raise InputError(f"{path}: {what}: holds a number that is not an integer of 64 bits; fetch the file again")
    return rows.tobytes()
