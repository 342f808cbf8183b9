"""What a log's requests consist of: named fields on three sides, their kinds, and the embedding tables they look up.

Importers write a schema beside the data, models take their widths from it, and a run keeps it: two logs with one
checksum of the schema have the same columns with the same meaning.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from deep_components.errors import InputError

SIDES = ("request", "history", "item")
KINDS = ("id", "time", "number")
MAX_LIST_LENGTH = 1 << 16
_RESERVED = ("mask", "label", "group", "offset")  # columns that every log has or may have


@dataclass(frozen=True)
class Field:
    """One column of a side."""

    name: str  # unique on its side, an identifier
    side: str  # "request" (one value a request), "history" (one a past event) or "item" (one a candidate)
    kind: str = "id"  # "id" and "time" are indices into a table; "number" is a float that models get as it is
    size: int = 1  # rows of the table, so indices are 0 .. size - 1; 1 for numbers
    padding: int = 0  # the index whose row is zero and stays zero
    unknown: int | None = None  # stands for ids that the training days do not have; None where each has its own row
    table: str = ""  # fields with one table share its rows; by default the field's own name. Empty for numbers
    length: int = 0  # a list field holds so many indices, padding where there are fewer; 0 = a single value

    def __post_init__(self) -> None:
        if self.kind != "number" and not self.table:
            object.__setattr__(self, "table", self.name)


@dataclass(frozen=True)
class Table:
    """One embedding table: its rows, and the indices of padding and of unknown ids."""

    size: int
    padding: int = 0
    unknown: int | None = None


@dataclass(frozen=True)
class Schema:
    """The fields of a log, in the order in which models concatenate them.

    ValueError when fields contradict each other.
    """

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        for problem in _problems(self.fields):
            raise ValueError(problem)

    def side(self, side: str) -> tuple[Field, ...]:
        """The fields of "request", "history" or "item"."""
        return tuple(field for field in self.fields if field.side == side)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Table name -> its rows, in the order of first use."""
        return {f.table: Table(f.size, f.padding, f.unknown) for f in self.fields if f.table}

    def width(self, side: str, dim: int) -> int:
        """Numbers per element of a side once ids are embedded in ``dim`` numbers each; a list field takes as many as a
        single value."""
        return sum(dim if field.table else 1 for field in self.side(side))

    def slices(self, side: str, dim: int) -> dict[str, slice]:
        """Field name -> where it lies in the concatenated embeddings of its side."""
        found, start = {}, 0
        for field in self.side(side):
            stop = start + (dim if field.table else 1)
            found[field.name], start = slice(start, stop), stop
        return found

    def to_json(self) -> dict[str, Any]:
        """The schema as plain JSON values."""
        listed = [asdict(field) for field in self.fields]
        for entry, field in zip(listed, self.fields, strict=True):
            if not field.length:  # checksums of schemas without list fields stay what they were
                del entry["length"]
        return {"fields": listed}

    @classmethod
    def from_json(cls, content: Any, source: str) -> "Schema":
        """The reverse of :meth:`to_json`; ``source`` names the file in the InputError for what is no schema."""
        try:
            known = {f.name for f in fields(Field)}
            listed = content["fields"]
            if not isinstance(listed, Sequence) or any(set(entry) - known for entry in listed):
                raise ValueError("an entry of fields has a key that is none of " + ", ".join(sorted(known)))
            return cls(tuple(Field(**entry) for entry in listed))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: not a schema ({error}); see docs/format.md") from error

    @property
    def checksum(self) -> str:
        """SHA-256 of the schema."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _problems(listed: Sequence[Field]) -> Iterator[str]:
    """What is wrong with the fields of a schema, a sentence each."""
    tables, seen = dict[str, Table](), set[tuple[str, str]]()
    for field in listed:
        what = f"field {field.name!r} of side {field.side!r}"
        if not isinstance(field.name, str) or not field.name.isidentifier() or field.name in _RESERVED:
            yield f"{what}: the name is no identifier, or is reserved"
        if field.side not in SIDES or field.kind not in KINDS:
            yield f"{what}: side is one of {', '.join(SIDES)} and kind one of {', '.join(KINDS)}"
        if (field.side, field.name) in seen:
            yield f"{what} is there twice"
        seen.add((field.side, field.name))
        if type(field.size) is not int or type(field.padding) is not int or not 0 <= field.padding < field.size:
            yield f"{what}: size and padding are whole numbers with 0 <= padding < size"
        if type(field.length) is not int or not 0 <= field.length <= MAX_LIST_LENGTH:
            yield f"{what}: length is 0 for a single value, or 1 to {MAX_LIST_LENGTH} for a list"
        if field.unknown is not None and not (type(field.unknown) is int and 0 <= field.unknown < field.size):
            yield f"{what}: unknown is an index below size"
        if field.kind == "number":
            if field.table:
                yield f"{what}: a number has no table"
            if field.length:
                yield f"{what}: a list is of ids; give each number a field of its own"
        elif not isinstance(field.table, str) or not field.table.isidentifier():
            yield f"{what}: table {field.table!r} is no identifier"
        elif (table := Table(field.size, field.padding, field.unknown)) != tables.setdefault(field.table, table):
            yield f"{what}: table {field.table} has another size, padding or unknown in another field"
    if not any(field.side == "item" for field in listed):
        yield "there is no field of side 'item', so all items of a request would be alike"


_RECFLOW_REQUEST = ("weekday", "hour", "minute", "user", "device", "gender", "age", "province")
_RECFLOW_HISTORY = ("video", "author", "category_two", "category_one", "upload_type")
_RECFLOW_ITEM = (*_RECFLOW_HISTORY, "weekday", "hour", "minute")
_TIME_ROWS = {"weekday": 9, "hour": 26, "minute": 62}  # shared by request time and upload time
RECFLOW_IDS = ("user", "device", "gender", "age", "province", *_RECFLOW_HISTORY)


def recflow_schema(counts: Mapping[str, int]) -> Schema:
    """RecFlow's schema (spec sections 2 and 3) for the number of distinct ids of every field of RECFLOW_IDS.

    A table has count + 2 rows. Every id has its own row, so none is unknown. category_one is not shifted, and its
    padding index is 2.
    """

    def field(name: str, side: str) -> Field:
        size = _TIME_ROWS[name] if name in _TIME_ROWS else counts[name] + 2
        return Field(name, side, "time" if name in _TIME_ROWS else "id", size, 2 if name == "category_one" else 0)

    sides = {"request": _RECFLOW_REQUEST, "history": _RECFLOW_HISTORY, "item": _RECFLOW_ITEM}
    return Schema(tuple(field(name, side) for side, names in sides.items() for name in names))
