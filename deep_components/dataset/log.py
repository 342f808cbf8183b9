"""A log: days of requests in one folder, whatever wrote them.

Two kinds of folder are understood: RecFlow's layout (data/README.md), whose days are encoded into a cache when they are
first opened, and days in the columnar format itself (docs/format.md), with a ``log.json`` beside them::

    log.json                 {"origin": "what made the log"}, and optionally groups (the names of the items' groups in
                             order), test_days and time_zone
    2024-01-13/meta.json     a day, as columnar.write_day leaves it
    2024-01-13/*.npy
    ...
"""

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deep_components.cascade import Cascade
from deep_components.dataset.clock import DEFAULT_TIME_ZONE, is_date, time_zone
from deep_components.dataset.columnar import META_FILE, DayCache, checksum_of, history_length_of, read_day, schema_of
from deep_components.dataset.encoding import Encoding, IndexEncoding, RawEncoding, encoding_kind
from deep_components.dataset.importers.recflow import RecFlowEncoding, RecFlowLog, open_recflow
from deep_components.dataset.importers.recflow_files import origin_in
from deep_components.errors import InputError
from deep_components.files import folder_checksum, write_atomically
from deep_components.schema import Schema

LOG_FILE = "log.json"
ENCODING_FOLDER = "encoding"


@dataclass(frozen=True)
class ColumnarLog:
    """A log in the columnar format; its methods as RecFlowLog has them."""

    folder: Path
    origin: str
    schema: Schema
    groups: tuple[str, ...] = ()  # of its items, from best to worst; empty where the log does not name them
    test_days: int = 1  # the last so many days, from which nothing was learnt when the log was made
    time_zone: str = DEFAULT_TIME_ZONE  # in which its days begin, and its times were taken
    protocol_days: tuple[str, ...] = ()

    @cached_property
    def encoding_checksum(self) -> str | None:
        """Of ENCODING_FOLDER, which says how raw values became the log's indices; None where there is none."""
        return folder_checksum(self.folder / ENCODING_FOLDER)

    @property
    def history_length(self) -> int:
        return history_length_of(self.folder / self.days()[0])

    def days(self, named: bool = False) -> list[str]:
        return _columnar_days(self.folder)

    def open_day(
        self,
        day: str,
        cascade: Cascade,
        cache_dir: Path | None = None,
        zone: str = DEFAULT_TIME_ZONE,
        history_length: int | None = None,
    ) -> DayCache:
        own = tuple(group.name for group in cascade.groups)
        if self.groups and own != self.groups:
            raise InputError(
                f"{self.folder / LOG_FILE}: its groups are {', '.join(self.groups)}, those of the cascade "
                f"{cascade.name} are {', '.join(own)}; give --cascade the log's groups, in their order"
            )
        opened = read_day(self.folder / day, day, cascade)
        if (opened.schema, opened.history_length) != (self.schema, self.history_length):
            raise InputError(
                f"{self.folder / day / META_FILE}: another schema or history length than the log's first day; make it "
                "again"
            )
        return opened.with_history(history_length)

    def checksum(self, day: str, cascade: Cascade, cache_dir: Path | None, zone: str) -> str | None:
        return checksum_of(self.folder / day)

    def files(self) -> list[Path]:
        return [self.folder / LOG_FILE, *(path for day in self.days() for path in self.day_files(day))]

    def day_files(self, day: str) -> list[Path]:
        return sorted((self.folder / day).iterdir())

    def checks(self, day: str, cascade: Cascade) -> dict[str, Callable[[], str]]:
        return {"columns": lambda: f"all {len(self.open_day(day, cascade)):,} requests are sound"}


Log = ColumnarLog | RecFlowLog


def open_log(data_dir: Path) -> Log:
    """The log in ``data_dir``. InputError when there is none, or when what concerns all of its days is damaged."""
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder; name a log with --data_dir, see data/README.md")
    if not (data_dir / LOG_FILE).exists():
        return open_recflow(data_dir)
    first, *_ = _columnar_days(data_dir)
    path = data_dir / LOG_FILE
    origin, schema = origin_in(path, "origin"), schema_of(data_dir / first)
    return ColumnarLog(data_dir, origin, schema, _groups_in(path), **_times_in(path))


def _times_in(path: Path) -> dict[str, Any]:
    """test_days and time_zone of ``log.json``, which :func:`origin_in` has read before, where they are there."""
    content = json.loads(path.read_text())
    found = {name: content[name] for name in ("test_days", "time_zone") if name in content}
    test_days, zone = found.get("test_days", 1), found.get("time_zone", DEFAULT_TIME_ZONE)
    if type(test_days) is not int or test_days < 1:
        raise InputError(
            f"{path}: field test_days is {reprlib.repr(test_days)}, not a whole number above 0; make the log again"
        )
    try:
        time_zone(zone)
    except (InputError, TypeError) as error:
        raise InputError(
            f"{path}: field time_zone is {reprlib.repr(zone)}, not a zone such as Asia/Shanghai; make the log again"
        ) from error
    return found


def zone_of(log: Log, wanted: str) -> str:
    """The time zone that the log's times are taken in: the ``wanted``, but a log in the columnar format has its own.

    InputError where another than the default one is wanted of that.
    """
    if not isinstance(log, ColumnarLog):
        return wanted
    if wanted not in (DEFAULT_TIME_ZONE, log.time_zone):
        raise InputError(f"--time_zone={wanted}: the days of {log.folder} were made in {log.time_zone}; leave it out")
    return log.time_zone


def encoding_of(log: Log, zone: str, history_length: int, item: str | None = None) -> RawEncoding:
    """What turns raw values into the log's indices: its own encoding; RecFlow's for a log in its layout, whose times
    are those of ``zone``; else one by which a raw value is the index itself.

    ``item``: the raw column that names an item, where the log does not say. InputError when the log has another one, or
    says none.
    """
    made: RawEncoding
    if isinstance(log, RecFlowLog):
        made = RecFlowEncoding(log.schema, zone, history_length)
    elif log.encoding_checksum is not None:
        made = Encoding.load(log.folder / ENCODING_FOLDER)
    else:
        made = IndexEncoding(log.schema, history_length, item)
    return with_item(made, history_length, item)


def with_item(encoding: RawEncoding, history_length: int, item: str | None) -> RawEncoding:
    """The encoding, changed: the latest ``history_length`` events count, and the column ``item`` names an item, where
    it does not say so itself. InputError as :func:`encoding_of`."""
    encoding.history_length = history_length
    if item is not None and isinstance(encoding, Encoding) and not encoding.item:
        encoding.item = item
    if item not in (None, encoding.item):
        raise InputError(f"--item={item}: the column that names an item is {encoding.item}; leave the option out")
    if not encoding.item:
        raise InputError("no column is known to name an item; give it with --item")
    if isinstance(encoding, IndexEncoding) and encoding.item not in {
        field.name for field in encoding.schema.side("item")
    }:
        raise InputError(f"--item={encoding.item}: no field of the items; see meta.json of a day")
    return encoding


def load_encoding(folder: Path) -> RawEncoding:
    """The encoding of any kind in a folder. InputError when it is missing or damaged."""
    kinds: dict[str, Callable[[Path], RawEncoding]]
    kinds = {"learnt": Encoding.load, "recflow": RecFlowEncoding.load, "index": IndexEncoding.load}
    kind = encoding_kind(folder)
    if kind not in kinds:
        raise InputError(
            f"{folder}: an encoding of the unknown kind {reprlib.repr(kind)}; use the version that made it"
        )
    return kinds[kind](folder)


def write_log_file(folder: Path, origin: str, **about: Any) -> None:
    """Write ``log.json``: the days in ``folder`` are a log that ``origin`` made; ``about`` is what else it says, such
    as the names of its ``groups``."""
    content = (json.dumps({"origin": origin, **about}) + "\n").encode()
    write_atomically(folder / LOG_FILE, lambda file: file.write(content))


def _groups_in(path: Path) -> tuple[str, ...]:
    """The names of the items' groups in ``log.json``, which :func:`origin_in` has read before."""
    facts = json.loads(path.read_text())
    groups = facts.get("groups", ())
    if "groups" in facts and not (groups and isinstance(groups, list) and all(isinstance(g, str) for g in groups)):
        raise InputError(f"{path}: field groups is {reprlib.repr(groups)}, not a list of names; make the log again")
    return tuple(groups)


def _columnar_days(folder: Path) -> list[str]:
    days = sorted(path.parent.name for path in folder.glob(f"[!.]*/{META_FILE}"))
    for day in days:
        if not is_date(day):
            raise InputError(f"{folder / day}: {day} is no date such as 2024-01-13; name the day's folder by one")
    if not days:
        raise InputError(f"{folder}: has {LOG_FILE} but no day in it; see docs/format.md")
    return days
