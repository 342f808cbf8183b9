"""``log.toml``: which columns of a table are the request, its items, their groups and their features.

:func:`read_mapping` gives all problems of the file at once; what it says of a table's columns is compared with the
table by ``source``.
"""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from deep_components.dataset.clock import time_zone
from deep_components.dataset.encoding import PARTS, SCALES, TIME_UNITS, TYPES
from deep_components.errors import InputError
from deep_components.schema import SIDES

FORMATS = {".parquet": "parquet", ".csv": "csv", ".feather": "feather", ".arrow": "feather"}
KINDS = ("id", "number", "time")
MAX_GROUPS = 256
MAX_LENGTH = 1 << 16  # of a history or a list
MAX_BUCKETS = 100_000
_RESERVED = ("mask", "label", "group", "offset")
_SEE = "see docs/own_log.md"
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")  # as cascades name groups


@dataclass(frozen=True)
class Rows:
    """The table: one row a candidate of a request."""

    path: str  # a file, or a folder of files
    request: str
    item: str
    time: str
    time_unit: str | None = None  # of a number; None: a timestamp column, or ISO text
    time_zone: str = "UTC"
    user: str | None = None
    format: str | None = None  # one of FORMATS' values; None: by the files' ending
    delimiter: str = ","  # of CSV
    null_values: tuple[str, ...] = ("",)  # of CSV: what stands for a missing value


@dataclass(frozen=True)
class Groups:
    """Where an item left the cascade; exactly one of column, flags and position."""

    order: tuple[str, ...]
    column: str | None = None
    flags: tuple[str, ...] = ()
    position: str | None = None
    cuts: tuple[int, ...] = ()
    label: str | None = None
    rating: str | None = None  # the same as label
    rank: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The groups as a cascade names them: ``Re-ranked`` is ``re_ranked``."""
        return tuple(re.sub(r"[\W_]+", "_", name.lower()).strip("_") for name in self.order)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that tell an item's group, and the true order."""
        given = (self.column, *self.flags, self.position, self.order_column)
        return tuple(name for name in given if name is not None)

    @property
    def order_column(self) -> str | None:
        return self.label or self.rating or self.rank


@dataclass(frozen=True)
class History:
    """The past events of a request: at most the latest ``length``."""

    length: int
    derive: tuple[str, ...] = ()


@dataclass(frozen=True)
class FieldRule:
    """One entry of ``[[fields]]``."""

    name: str
    side: str
    kind: str
    column: str | None = None  # None: the request's own time
    type: str | None = None  # "string" or "integer": how ids are keyed; None: as the table has them
    table: str = ""  # by default the name
    min_count: int = 1
    length: int = 0  # above 0: a list of at most so many values
    separator: str | None = None  # splits text into a list
    scale: str = "standard"
    buckets: int = 16
    parts: tuple[str, ...] = ()
    time_unit: str | None = None  # of the field's own column

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that a model may see of it."""
        if self.kind == "time":
            return tuple(f"{self.name}_{part}" for part in self.parts)
        standard = self.kind == "number" and self.scale == "standard"
        return (self.name, f"{self.name}_missing") if standard else (self.name,)

    @property
    def tables(self) -> tuple[str, ...]:
        """Their embedding tables."""
        if self.kind == "id":
            return (self.table or self.name,)
        return () if self.kind == "number" and self.scale == "standard" else self.names


@dataclass(frozen=True)
class LogMapping:
    """The whole of log.toml; ``path`` is the file, ``folder`` what its paths are relative to."""

    path: Path
    rows: Rows
    groups: Groups
    fields: tuple[FieldRule, ...]
    history: History = History(0)
    test_days: int = 1
    origin: str = "table"  # the log's name in its results

    @property
    def source(self) -> Path:
        return self.path.parent / self.rows.path

    def side(self, side: str) -> tuple[FieldRule, ...]:
        """The fields of a side. Of histories that are derived, the item fields that they take."""
        if side == "history" and self.history.derive:
            items = {rule.name: rule for rule in self.fields if rule.side == "item"}
            return tuple(replace(items[name], side="history") for name in self.history.derive)
        return tuple(rule for rule in self.fields if rule.side == side)


def read_mapping(path: Path) -> tuple[LogMapping | None, list[str]]:
    """The mapping in a TOML file, None when it has none, and all that is wrong with it, a sentence each."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return None, [f"{path}: cannot be read ({error.strerror}); --mapping names a TOML file, {_SEE}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, [f"{path}: not a TOML file ({error}); {_SEE}"]
    problems: list[str] = []
    tables = {"rows": Rows, "groups": Groups, "history": History, "split": _Split}
    known = {*tables, "fields", "origin"}
    problems += [_unknown("the file", key, known) for key in content if key not in known]
    parsed: dict[str, Any] = {}
    for name, kind in tables.items():
        if name in content or name in ("rows", "groups"):
            parsed[name] = _parsed(kind, content.get(name), f"[{name}]", problems)
    listed = content.get("fields")
    if not isinstance(listed, list) or not listed:
        problems.append("there is no [[fields]]; name the fields that the models see")
        listed = []
    rules = [_parsed(FieldRule, entry, _field_name(entry, i), problems) for i, entry in enumerate(listed, 1)]
    origin = content.get("origin", "table")
    if not isinstance(origin, str) or not origin.isprintable() or not 0 < len(origin) <= 100:
        problems.append("origin is not a name of at most 100 characters")
    mapping = None
    if not problems:
        split, history = parsed.get("split") or _Split(), parsed.get("history") or History(0)
        mapping = LogMapping(path, parsed["rows"], parsed["groups"], tuple(rules), history, split.test_days, origin)
        problems += _problems(mapping)
    return mapping if not problems else None, [f"{path}: {problem}" for problem in problems]


def load_mapping(path: Path) -> LogMapping:
    """The mapping in a TOML file. InputError for the first thing that is wrong with it."""
    mapping, problems = read_mapping(path)
    if mapping is None:
        raise InputError(problems[0])
    return mapping


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at what ``name`` was meant to be."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"


# ---- entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    test_days: int = 1


def _field_name(entry: Any, number: int) -> str:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"field {name}" if isinstance(name, str) else f"[[fields]] number {number}"


def _unknown(what: str, key: str, known: Any) -> str:
    return f"{what} has the key {key!r}, which is none of its keys; {nearest(key, sorted(known))}"


def _parsed(kind: type[Any], content: Any, what: str, problems: list[str]) -> Any:
    """A ``kind`` of an entry's keys; None, with its problems noted, for a key that it lacks, or has not, or of a type
    that it cannot be."""
    known = {field.name: field for field in fields(kind)}
    if not isinstance(content, Mapping):
        problems.append(f"{what} is missing, or no table of keys; {_SEE}")
        return None
    found = [_unknown(what, key, known) for key in content if key not in known]
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in content:
            try:
                values[name] = _typed(field.type, content[name])
            except TypeError as error:
                found.append(f"{name} of {what} is {content[name]!r}, not {error}")
        elif field.default is MISSING:
            found.append(f"{what} has no {name}; {_SEE}")
    problems += found
    return None if found else kind(**values)


def _typed(kind: Any, value: Any) -> Any:
    """The value as a field of type ``kind`` takes it; TypeError that says what is wanted."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, list) or not all(type(entry) is inner for entry in value):
            raise TypeError(f"a list of {'texts' if inner is str else 'whole numbers'}")
        return tuple(value)
    wanted = get_args(kind)[0] if isinstance(kind, UnionType) else kind
    if type(value) is not wanted or value == "":
        raise TypeError("a text" if wanted is str else "a whole number")
    return value


# ---- what contradicts itself -----------------------------------------------------------------------------------------


def _problems(mapping: LogMapping) -> Iterator[str]:
    yield from _row_problems(mapping.rows)
    yield from _group_problems(mapping.groups)
    for rule in mapping.fields:
        yield from (f"field {rule.name}: {problem}" for problem in _field_problems(rule))
    yield from _name_problems(mapping)
    yield from _column_problems(mapping)
    yield from _history_problems(mapping)
    if mapping.test_days < 1:
        yield "test_days of [split] is 1 or more"


def _row_problems(rows: Rows) -> Iterator[str]:
    if rows.format is not None and rows.format not in FORMATS.values():
        yield f"format of [rows] is {rows.format!r}; choose one of {', '.join(sorted(set(FORMATS.values())))}"
    if rows.time_unit is not None and rows.time_unit not in TIME_UNITS:
        yield f"time_unit of [rows] is {rows.time_unit!r}; choose one of {', '.join(TIME_UNITS)}"
    if len(rows.delimiter) != 1 or not rows.delimiter.isascii() or rows.delimiter in '"\r\n':
        yield f"delimiter of [rows] is {rows.delimiter!r}, not one character"
    try:
        time_zone(rows.time_zone)
    except InputError:
        yield f"time_zone of [rows] is {rows.time_zone!r}, no time zone; use a name such as Asia/Shanghai"


def _group_problems(groups: Groups) -> Iterator[str]:
    if not 2 <= len(groups.order) <= MAX_GROUPS:
        yield f"order of [groups] names {len(groups.order)} groups, not 2 to {MAX_GROUPS}, the ground truth first"
    for name, count in Counter(groups.order).items():
        if count > 1:
            yield f"order of [groups] names {name} twice"
    for name in groups.names:
        if not _GROUP_NAME.fullmatch(name):
            yield f"group {name!r} of [groups]: a name begins with a letter, and has letters, digits and _"
    if len(set(groups.names)) < len(set(groups.order)):
        yield "two names in order of [groups] differ in capitals or signs only; give them other names in the table"
    ways = [groups.column is not None, bool(groups.flags), groups.position is not None]
    if sum(ways) != 1:
        yield "[groups] has exactly one of column, flags, and position with cuts"
    if groups.flags and len(groups.flags) != len(groups.order) - 1:
        yield f"flags of [groups] are {len(groups.flags)}, not {len(groups.order) - 1}: one for each group but the last"
    cuts = groups.cuts
    if (groups.position is None) != (not cuts):
        yield "[groups] has position and cuts together"
    elif cuts and (len(cuts) != len(groups.order) - 1 or list(cuts) != sorted(set(cuts)) or cuts[0] < 1):
        yield f"cuts of [groups] are not {len(groups.order) - 1} rising positions from 1, the last ones of groups"
    if sum(name is not None for name in (groups.label, groups.rating, groups.rank)) > 1:
        yield "[groups] has at most one of label, rating and rank"


def _field_problems(rule: FieldRule) -> Iterator[str]:
    if not rule.name.isidentifier() or rule.name in _RESERVED:
        yield "the name is no identifier, or is reserved"
    if rule.side not in SIDES:
        yield f"side is {rule.side!r}; {nearest(rule.side, SIDES)}"
    if rule.kind not in KINDS:
        yield f"kind is {rule.kind!r}; {nearest(rule.kind, KINDS)}"
        return
    if rule.column is None and (rule.kind != "time" or rule.side != "request"):
        yield "it names no column; only a time field of side request has none, it is the request's own time"
    if rule.kind == "id":
        if rule.type is not None and rule.type not in TYPES:
            yield f"type is {rule.type!r}; {nearest(rule.type, TYPES)}"
        if rule.min_count < 1:
            yield "min_count is 1 or more"
    if rule.kind == "number":
        if rule.scale not in SCALES:
            yield f"scale is {rule.scale!r}; {nearest(rule.scale, SCALES)}"
        if not 2 <= rule.buckets <= MAX_BUCKETS:
            yield f"buckets is not 2 to {MAX_BUCKETS}"
    if rule.kind == "time":
        for part in rule.parts:
            if part not in PARTS:
                yield f"parts names {part!r}; {nearest(part, list(PARTS))}"
        if not rule.parts or len(set(rule.parts)) < len(rule.parts):
            yield f"parts names one or more of {', '.join(PARTS)}, each once"
    if rule.time_unit is not None and (rule.time_unit not in TIME_UNITS or rule.kind != "time"):
        yield f"time_unit is for time fields, one of {', '.join(TIME_UNITS)}"
    if rule.table and (not rule.table.isidentifier() or rule.kind != "id"):
        yield "table is an identifier, for id fields"
    if not 0 <= rule.length <= MAX_LENGTH or (rule.length and (rule.kind != "id" or rule.side == "history")):
        yield f"length is 1 to {MAX_LENGTH}, for id fields of side request or item; [history] has its own"
    if rule.separator is not None and not (rule.separator and (rule.length or rule.side == "history")):
        yield "separator splits text into a list; give the list's length too"


def _name_problems(mapping: LogMapping) -> Iterator[str]:
    names = Counter((rule.side, name) for rule in mapping.fields for name in rule.names)
    yield from (f"two fields of side {side} have the name {name}" for (side, name), n in names.items() if n > 1)
    tables: dict[str, FieldRule] = {}
    for rule in mapping.fields:
        for table in rule.tables:
            first = tables.setdefault(table, rule)
            if first.kind == rule.kind == "time":
                continue  # parts of times have the same rows everywhere
            if first is not rule and {first.kind, rule.kind} != {"id"}:
                yield f"field {rule.name}: its table {table} is that of field {first.name} too; give it another name"
            elif first.min_count != rule.min_count:
                yield f"field {rule.name}: min_count is not that of field {first.name}, which shares the table {table}"


def _column_problems(mapping: LogMapping) -> Iterator[str]:
    """Columns that are named twice where they may not be."""
    rows, groups = mapping.rows, mapping.groups
    roles = [("request", rows.request), ("item", rows.item), ("time", rows.time), ("user", rows.user)]
    for (role, one), (other, two) in ((a, b) for i, a in enumerate(roles) for b in roles[i + 1 :]):
        if one == two and one is not None:
            yield f"column {one} is {role} and {other} of [rows]; each has a column of its own"
    taken = Counter(groups.columns)
    yield from (f"column {name} is named twice in [groups]; name each once" for name, n in taken.items() if n > 1)
    for name in (rows.request, rows.item, rows.time, rows.user):
        if name in taken:
            yield f"column {name} is in [rows] and in [groups]; it cannot be both"
    for rule in mapping.fields:
        if rule.column in taken:
            yield (
                f"field {rule.name}: column {rule.column} is in [groups], so it would give the label away; "
                "leave the field out"
            )
    same = Counter((r.side, r.column, r.kind, r.scale if r.kind == "number" else "") for r in mapping.fields)
    for (side, column, kind, _), count in same.items():
        if count > 1:
            what = f"column {column}" if column else "the request's time"
            yield f"{what} is named twice, by {count} fields of side {side} and kind {kind}; name it once"
    types: dict[str, str] = {}
    for rule in mapping.fields:
        if rule.column and rule.type and types.setdefault(rule.column, rule.type) != rule.type:
            yield f"field {rule.name}: column {rule.column} has another type in another field; give it one"


def _history_problems(mapping: LogMapping) -> Iterator[str]:
    history, listed = mapping.history, [rule for rule in mapping.fields if rule.side == "history"]
    if not 0 <= history.length <= MAX_LENGTH or (history.length == 0 and (history.derive or listed)):
        yield f"length of [history] is 1 to {MAX_LENGTH}, the latest events that a request keeps"
    if history.length and not history.derive and not listed:
        yield "[history] has no derive, and no field has side history; give one of them, or leave [history] out"
    if history.derive and listed:
        yield f"field {listed[0].name} is of side history, and [history] derives it; use one of them"
    if history.derive and mapping.rows.user is None:
        yield "derive of [history] needs the column user of [rows]"
    known = [rule.name for rule in mapping.fields if rule.side == "item"]
    for name in history.derive:
        if name not in known:
            yield f"derive of [history] names {name!r}, no field of side item; {nearest(name, known)}"
    if len(set(history.derive)) < len(history.derive):
        yield "derive of [history] names a field twice"
