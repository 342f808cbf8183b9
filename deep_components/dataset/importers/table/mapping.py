"""``log.toml``: which columns of a table are the request, its items, their groups and their features.

:func:`read_mapping` gives all problems of the file at once, and what is sound of it, with which a check goes on; what
it says of a table's columns is compared with the table by ``source``.
"""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
_DEFAULTS: dict[str, Any] = {"request": None, "item": None, "time": None, "user": None, "format": None}
_DEFAULTS["time_zone"] = "UTC"


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

    def using(self, columns: Collection[str]) -> list[Any]:
        """What :meth:`without` leaves out, so that none of the columns is read."""
        found: list[Any] = [rule for rule in self.fields if rule.column in columns]
        found += [role for role in ("request", "item", "time", "user") if getattr(self.rows, role) in columns]
        groups = self.groups
        found += ["groups"] if {groups.column, *groups.flags, groups.position} & set(columns) else []
        return [*found, "order"] if groups.order_column in columns else found

    def without(self, wrong: Collection[Any]) -> "LogMapping":
        """What is left of it without some of its fields and some of "format", "time_zone", "request", "item", "time",
        "user", "groups" (how they are told), "order" (of the ground truth), "history" and "test_days"."""
        defaults = {name: default for name, default in _DEFAULTS.items() if name in wrong}
        rows, groups = replace(self.rows, **defaults), self.groups
        if "groups" in wrong:
            groups = replace(groups, column=None, flags=(), position=None, cuts=())
        if "order" in wrong:
            groups = replace(groups, label=None, rating=None, rank=None)
        kept = [rule for rule in self.fields if not any(rule is other for other in wrong)]
        kept = [rule for rule in kept if rule.column is not None or rows.time is not None]
        items = {rule.name for rule in kept if rule.side == "item"}
        derives = rows.user is not None and "history" not in wrong
        derive = tuple(name for name in self.history.derive if name in items) if derives else ()
        length = self.history.length if "history" not in wrong else 1
        listed = any(rule.side == "history" for rule in kept)
        history = History(length if derive or listed else 0, derive)
        test_days = 1 if "test_days" in wrong else self.test_days
        return replace(self, rows=rows, groups=groups, fields=tuple(kept), history=history, test_days=test_days)


def read_mapping(path: Path) -> tuple[LogMapping | None, list[str]]:
    """What is sound of the mapping in a TOML file, and all that is wrong with it, a sentence each.

    What is wrong is left out, as in :meth:`LogMapping.without`; None when no table can be read with what is left.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return None, [f"{path}: cannot be read ({error.strerror}); --mapping names a TOML file, {_SEE}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, [f"{path}: not a TOML file ({error}); {_SEE}"]
    tables: dict[str, type[Any]] = {"rows": Rows, "groups": Groups, "history": History, "split": _Split}
    known = {*tables, "fields", "origin"}
    problems = [_unknown("the file", key, known) for key in content if key not in known]
    parsed, wrong = dict[str, Any](), set[str]()  # wrong: tables that have problems
    for name, kind in tables.items():
        found: list[str] = []
        if name in content or name in ("rows", "groups"):
            parsed[name] = _parsed(kind, content.get(name), f"[{name}]", found)
        wrong |= {name} if found else set()
        problems += found
    if not (listed := content.get("fields")) or not isinstance(listed, list):
        problems.append("there is no [[fields]]; name the fields that the models see")
        listed = []
    rules, broken = list[FieldRule](), list[FieldRule]()
    for number, entry in enumerate(listed, 1):
        found = []
        rule = _parsed(FieldRule, entry, _field_name(entry, number), found)
        if rule is not None:
            (broken if found else rules).append(rule)
        problems += found
    origin = content.get("origin", "table")
    if not isinstance(origin, str) or not origin.isprintable() or not 0 < len(origin) <= 100:
        problems.append("origin is not a name of at most 100 characters")
    mapping = None
    if (rows := parsed["rows"]) is not None and rows.path is not None:
        history, split = parsed.get("history") or History(0), parsed.get("split") or _Split()
        groups = parsed["groups"] or Groups(())
        mapping = LogMapping(path, rows, groups, tuple(rules), history, split.test_days, str(origin))
        contradictions = list(_problems(mapping, broken, wrong))
        problems += [problem for _, problem in contradictions if problem]
        left_out = [what for what, _ in contradictions]
        mapping = mapping.without(left_out) if "rows" not in left_out else None
    return mapping, [f"{path}: {problem}" for problem in problems]


def load_mapping(path: Path) -> LogMapping:
    """The mapping in a TOML file. InputError for the first thing that is wrong with it."""
    mapping, problems = read_mapping(path)
    if mapping is None or problems:
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
    """A ``kind`` of an entry's keys, None when it is no entry; notes a key that it lacks, or has not, or of a type that
    it cannot be, in whose place the default stands, else None."""
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
    missing = {name: None for name, field in known.items() if field.default is MISSING and name not in values}
    if kind is Groups and "order" in missing:
        missing["order"] = ()  # type: ignore[assignment]
    return kind(**values, **missing)


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


# Each problem is a pair: what a check that goes on leaves out (of LogMapping.without; "rows": it cannot go on; "":
# nothing), and the sentence, empty where another one has said it.
Problems = Iterator[tuple[Any, str]]


def _problems(mapping: LogMapping, broken: Sequence[FieldRule], wrong: Collection[str]) -> Problems:
    """The contradictions; of the tables in ``wrong`` and the fields in ``broken`` the problems are known."""
    yield from _row_problems(mapping.rows)
    ways = list(_way_problems(mapping.groups))
    found = [*ways, *_order_problems(mapping.groups)]
    yield from (("groups", "") for _ in ways) if "groups" in wrong else found
    for rule in mapping.fields:
        yield from ((rule, f"field {rule.name}: {problem}") for problem in _field_problems(rule))
    yield from _name_problems(mapping)
    yield from _column_problems(mapping)
    if "history" in wrong:
        yield "history", ""
    else:
        known = [rule.name for rule in (*mapping.fields, *broken) if rule.side == "item" and rule.name]
        listed = [rule for rule in (*mapping.fields, *broken) if rule.side == "history"]
        yield from (("history", problem) for problem in _history_problems(mapping.history, known, listed))
        if mapping.history.derive and mapping.rows.user is None and "rows" not in wrong:
            yield "history", "derive of [history] needs the column user of [rows]"
    if mapping.test_days < 1:
        yield "test_days", "test_days of [split] is 1 or more"


def _row_problems(rows: Rows) -> Problems:
    if rows.format is not None and rows.format not in FORMATS.values():
        choice = ", ".join(sorted(set(FORMATS.values())))
        yield "format", f"format of [rows] is {rows.format!r}; choose one of {choice}"
    if rows.time_unit is not None and rows.time_unit not in TIME_UNITS:
        yield "time", f"time_unit of [rows] is {rows.time_unit!r}; choose one of {', '.join(TIME_UNITS)}"
    if len(rows.delimiter) != 1 or not rows.delimiter.isascii() or rows.delimiter in '"\r\n':
        yield "rows", f"delimiter of [rows] is {rows.delimiter!r}, not one character"
    try:
        time_zone(rows.time_zone)
    except InputError:
        yield "time_zone", f"time_zone of [rows] is {rows.time_zone!r}, no time zone; use a name such as Asia/Shanghai"


def _way_problems(groups: Groups) -> Problems:
    """Why items' groups cannot be told."""
    if not 2 <= len(groups.order) <= MAX_GROUPS:
        what = f"names {len(groups.order)} groups, not 2 to {MAX_GROUPS}, the ground truth first"
        yield "groups", f"order of [groups] {what}"
    if sum([groups.column is not None, bool(groups.flags), groups.position is not None]) != 1:
        yield "groups", "[groups] has exactly one of column, flags, and position with cuts"
    if groups.flags and len(groups.flags) != len(groups.order) - 1:
        what = f"{len(groups.flags)}, not {len(groups.order) - 1}: one for each group but the last"
        yield "groups", f"flags of [groups] are {what}"
    cuts = groups.cuts
    if (groups.position is None) != (not cuts):
        yield "groups", "[groups] has position and cuts together"
    elif cuts and (len(cuts) != len(groups.order) - 1 or list(cuts) != sorted(set(cuts)) or cuts[0] < 1):
        what = f"{len(groups.order) - 1} rising positions from 1, the last ones of groups"
        yield "groups", f"cuts of [groups] are not {what}"
    taken = Counter(groups.columns)
    for name, count in taken.items():
        if count > 1:
            yield "groups", f"column {name} is named twice in [groups]; name each once"


def _order_problems(groups: Groups) -> Problems:
    for name, count in Counter(groups.order).items():
        if count > 1:
            yield "", f"order of [groups] names {name} twice"
    for name in groups.names:
        if not _GROUP_NAME.fullmatch(name):
            yield "", f"group {name!r} of [groups]: a name begins with a letter, and has letters, digits and _"
    if len(set(groups.names)) < len(set(groups.order)):
        yield "", "two names in order of [groups] differ in capitals or signs only; give them other names in the table"
    if sum(name is not None for name in (groups.label, groups.rating, groups.rank)) > 1:
        yield "order", "[groups] has at most one of label, rating and rank"


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


def _name_problems(mapping: LogMapping) -> Problems:
    names = set[tuple[str, str]]()
    tables: dict[str, FieldRule] = {}
    for rule in mapping.fields:
        own = {(rule.side, name) for name in rule.names}
        yield from ((rule, f"two fields of side {side} have the name {name}") for side, name in sorted(own & names))
        names |= own
        for table in rule.tables:
            first = tables.setdefault(table, rule)
            if first.kind == rule.kind == "time":
                continue  # parts of times have the same rows everywhere
            if first is not rule and {first.kind, rule.kind} != {"id"}:
                what = f"its table {table} is that of field {first.name} too; give it another name"
            elif first.min_count != rule.min_count:
                what = f"min_count is not that of field {first.name}, which shares the table {table}"
            else:
                continue
            yield rule, f"field {rule.name}: {what}"


def _column_problems(mapping: LogMapping) -> Problems:
    """Columns that are named twice where they may not be."""
    rows, groups = mapping.rows, mapping.groups
    roles = [("request", rows.request), ("item", rows.item), ("time", rows.time), ("user", rows.user)]
    for (role, one), (other, two) in ((a, b) for i, a in enumerate(roles) for b in roles[i + 1 :]):
        if one == two and one is not None:
            yield other, f"column {one} is {role} and {other} of [rows]; each has a column of its own"
    for _, name in roles:
        if name in groups.columns:
            yield "groups", f"column {name} is in [rows] and in [groups]; it cannot be both"
    known = set[tuple[Any, ...]]()
    types: dict[str, str] = {}
    for rule in mapping.fields:
        if rule.column in groups.columns:
            what = f"column {rule.column} is in [groups], so it would give the label away; leave the field out"
            yield rule, f"field {rule.name}: {what}"
        use = (rule.side, rule.column, rule.kind, rule.scale if rule.kind == "number" else "")
        if use in known:
            what = f"column {rule.column}" if rule.column else "the request's time"
            again = f"again by field {rule.name}"
            yield (
                rule,
                f"{what} is named twice by fields of side {rule.side} and kind {rule.kind}, {again}; name it once",
            )
        known.add(use)
        if rule.column and rule.type and types.setdefault(rule.column, rule.type) != rule.type:
            yield rule, f"field {rule.name}: column {rule.column} has another type in another field; give it one"


def _history_problems(history: History, known: Sequence[str], listed: Sequence[FieldRule]) -> Iterator[str]:
    """``known`` are the names of the item fields, ``listed`` the fields of side history."""
    if not 0 <= history.length <= MAX_LENGTH or (history.length == 0 and (history.derive or listed)):
        yield f"length of [history] is 1 to {MAX_LENGTH}, the latest events that a request keeps"
    if history.length and not history.derive and not listed:
        yield "[history] has no derive, and no field has side history; give one of them, or leave [history] out"
    if history.derive and listed:
        yield f"field {listed[0].name} is of side history, and [history] derives it; use one of them"
    for name in history.derive:
        if name not in known:
            yield f"derive of [history] names {name!r}, no field of side item; {nearest(name, known)}"
    if len(set(history.derive)) < len(history.derive):
        yield "derive of [history] names a field twice"
