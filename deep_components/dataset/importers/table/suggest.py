"""A first log.toml for a table (``lcron import --suggest``): guesses from a sample of its rows, each with its reason.

Names and contents decide together: a request's column is one whose values come in runs, an item's is one that never
repeats within a request, an outcome is what differs between two requests for the same item. What the sample cannot
tell is a commented line. The result is TOML whatever the columns are called.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa

from deep_components.dataset.encoding import first_line
from deep_components.dataset.importers.table.mapping import Groups, LogMapping, Rows
from deep_components.dataset.importers.table.source import Piece, SourceFile, batches, open_source
from deep_components.errors import InputError

SAMPLE_ROWS = 10_000
SAMPLE_FILES = 5
RESERVED = ("mask", "label", "group", "offset")  # columns that every log has
FEW_VALUES = 12  # so many groups at most
MANY_VALUES = 50  # an integer column of more different values is a number, unless it is called an id
SKEWED = 2.0  # from this skewness on a number is cut into buckets
SEPARATORS = "|;,"
DELIMITERS = ",;\t|"
_HEADER_BYTES = 1 << 20

WORDS = {
    "request": {"request", "req", "query", "search", "impression", "session", "auction", "slate"},
    "item": {"item", "product", "movie", "video", "doc", "document", "sku", "ad", "article", "candidate", "listing"},
    "user": {"user", "customer", "member", "visitor", "client", "account", "buyer", "viewer"},
    "time": {"time", "timestamp", "ts", "date", "datetime", "at"},
    "group": {"stage", "group", "outcome", "status", "left", "result", "action", "event", "state"},
    "label": {"rating", "label", "grade", "stars", "relevance", "gain"},
    "rank": {"rank", "position", "pos"},
    "id": {"id", "ids", "code", "zip", "key", "uuid", "hash"},
}
# The unit of a number that counts from 1970, by its size: from 1973 to 2286 each.
UNITS = {"s": (10**8, 10**10), "ms": (10**11, 10**13), "us": (10**14, 10**16), "ns": (10**17, 10**19)}


@dataclass(frozen=True, eq=False)
class Column:
    """One column of the sample."""

    name: str
    kind: str  # "text", "integer", "number", "boolean", "time", "list" or "other"
    values: pd.Series  # hashable; None or NaN where missing

    def called(self, what: str) -> bool:
        """Whether a word of its name stands for ``what``, a key of WORDS."""
        return bool(set(_snake(self.name).split("_")) & WORDS[what])

    @cached_property
    def known(self) -> pd.Series:
        return self.values.dropna()

    @cached_property
    def distinct(self) -> int:
        return int(self.known.nunique())

    @cached_property
    def missing(self) -> float:
        return float(self.values.isna().mean())

    @property
    def is_flag(self) -> bool:
        return self.kind == "boolean" or (self.kind == "integer" and set(self.known.unique()) == {0, 1})


@dataclass(frozen=True)
class Sample:
    """Some rows of a table, and what the columns seem to be."""

    columns: dict[str, Column]
    rows: int
    source: str
    delimiter: str = ","  # of CSV

    @cached_property
    def names(self) -> dict[str, str]:
        """The fields' names, by column; "when" is the time of the request."""
        made: dict[str, str] = {}
        for column in self.columns:
            name = _snake(column)
            name = f"field_{name}" if name in RESERVED else name
            while name in made.values() or name == "when":
                name += "_2"
            made[column] = name
        return made

    @cached_property
    def request(self) -> Column | None:
        """The column whose values come in runs of several rows, else one that is called so."""
        usable = [c for c in self.columns.values() if c.name and c.kind in ("text", "integer") and not c.missing]
        several = [c for c in usable if 2 * c.distinct <= self.rows and c.distinct > 1]
        in_runs = [c for c in several if int((c.values != c.values.shift()).sum()) <= c.distinct + SAMPLE_FILES]
        named = [c for c in several if c.called("request")]
        return _best(in_runs, "request") or _best(named, "request")

    @cached_property
    def item(self) -> Column | None:
        """The column that never repeats within a request."""
        if self.request is None:
            return None
        usable = [c for c in self.columns.values() if c.name and c.kind in ("text", "integer") and not c.missing]
        once = [c for c in usable if not c.called("rank") and not self._repeats_in_request(c) and c is not self.request]
        return _best(once, "item")

    @cached_property
    def user(self) -> Column | None:
        named = [c for c in self.columns.values() if c.called("user") and c.kind in ("text", "integer")]
        return _best([c for c in named if self.per_request(c) and c is not self.request], "user")

    @cached_property
    def time(self) -> Column | None:
        """A column of points in time that is the same for all rows of a request."""
        kinds = [c for c in self.columns.values() if c.kind == "time" or (c.called("time") and time_unit(c))]
        return _best([c for c in kinds if self.per_request(c) and not c.missing and c is not self.request], "time")

    @cached_property
    def group(self) -> Column | None:
        """The text column with few values that says where an item left the cascade."""
        few = [c for c in self._outcomes if c.kind == "text" and 2 <= c.distinct <= FEW_VALUES and not c.missing]
        return _best(few, "group")

    @cached_property
    def flags(self) -> list[Column]:
        """Boolean columns that differ within a request, the rarest first."""
        return sorted((c for c in self._outcomes if c.is_flag), key=lambda c: float(c.known.astype(float).mean()))

    @cached_property
    def position(self) -> Column | None:
        ranks = [c for c in self._outcomes if c.kind == "integer" and c.called("rank")]
        return next((c for c in ranks if c.known.min() == 1 and not self._repeats_in_request(c)), None)

    @cached_property
    def grades(self) -> Column | None:
        """The number that is called a rating or so, if it is no property of the item."""
        numbers = [c for c in self._outcomes if c.kind in ("integer", "number") and c.called("label")]
        return _best(numbers, "label")

    @cached_property
    def label(self) -> Column | None:
        """The grades, where every row of the best group has one."""
        best = self._best_rows
        return None if self.grades is None or best is None or self.grades.values[best].isna().any() else self.grades

    @cached_property
    def group_order(self) -> list[str]:
        """The groups, the better graded first; without grades the rarest first."""
        assert self.group is not None
        rarest = list(self.group.known.value_counts().index[::-1])
        if self.grades is None:
            return rarest
        by_group = self.grades.values.astype(float).groupby(self.group.values)
        grade = by_group.mean() * by_group.count().gt(0)
        known = by_group.count() / by_group.size()
        return sorted(rarest, key=lambda name: (-round(known[name], 1), -grade.fillna(0)[name]))

    @cached_property
    def outcomes(self) -> list[Column]:
        """Columns that are known only afterwards: they would tell the models the answer."""
        chosen = [c for c in (self.group, self.position, self.grades) if c is not None] + self.flags
        return [c for c in self._outcomes if c in chosen or self._told_by_missing(c)]

    @cached_property
    def _outcomes(self) -> list[Column]:
        roles = (self.request, self.item, self.user, self.time)
        single = ("text", "integer", "number", "boolean")
        free = [c for c in self.columns.values() if c.name and c not in roles and c.kind in single]
        return [c for c in free if not self.per_request(c) and not self._of_the_item(c)]

    def per_request(self, column: Column) -> bool:
        """Whether all rows of a request have the same value."""
        if self.request is None:
            return False
        return int(column.values.groupby(self.request.values).nunique(dropna=False).max()) == 1

    def _repeats_in_request(self, column: Column) -> bool:
        assert self.request is not None
        rows = pd.DataFrame({"request": self.request.values, "value": column.values})[column.values.notna()]
        return float(rows.duplicated().mean()) > 0.001  # a log may hold a row twice

    def _of_the_item(self, column: Column) -> bool:
        """Whether an item has one value in nearly all of its requests, as brand or price do."""
        if self.item is None:
            return False
        values = column.values.groupby(self.item.values).agg(["size", lambda v: v.nunique(dropna=False)])
        several = values[values["size"] > 1]
        return len(several) > 0 and float((several.iloc[:, 1] > 1).mean()) < 0.05

    @cached_property
    def _best_rows(self) -> pd.Series | None:
        """Which rows are of the group that is taken for the best."""
        if self.group is not None:
            return self.group.values == self.group_order[0]
        return self.flags[0].values.fillna(0).astype(bool) if self.flags else None

    def _told_by_missing(self, column: Column) -> bool:
        best = self._best_rows
        if best is None or not column.missing:
            return False
        return bool(column.values[~best].isna().mean() - column.values[best].isna().mean() > 0.5)


def suggest(path: Path) -> str:
    """The text of a first log.toml for the table ``path``, a file or a folder of them.

    Reads at most SAMPLE_ROWS rows of SAMPLE_FILES files, whatever the table's size. InputError when it cannot be read.
    """
    sample = read_sample(path)
    split = "[split]\ntest_days = 1  # the last so many days: nothing is learnt from them"
    blocks = [_head(sample), _rows(sample, path), _groups(sample), _history(sample), split]
    return "\n\n".join(blocks + list(_fields(sample))) + "\n"


def read_sample(path: Path) -> Sample:
    """The first rows of some files, spread evenly over the table's."""
    mapping, files = _files(path)
    number = min(SAMPLE_FILES, len(files))
    chosen = [files[i * (len(files) - 1) // max(number - 1, 1)] for i in range(number)]  # the first and the last too
    parts = [_first_rows(mapping, file, SAMPLE_ROWS // number) for file in chosen]
    try:
        rows = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{path}: {first_line(error)}; write each column with one type in all files") from None
    if not rows.num_rows:
        raise InputError(f"{path}: has no rows; name the file or the folder that holds the table")
    columns = {name: _column(name, rows.column(name)) for name in rows.column_names}
    source = f"{rows.num_rows:,} rows of {len(chosen)} of {len(files)} files"
    return Sample(columns, rows.num_rows, source, mapping.rows.delimiter)


def _files(path: Path) -> tuple[LogMapping, list[SourceFile]]:
    """The table's files, and a mapping that says how they are read and nothing else."""
    mapping = LogMapping(path, Rows(str(path.resolve()), "", "", ""), Groups(()), ())
    source = open_source(mapping, {})
    if source.problems:
        raise InputError(source.problems[0])
    if source.files[0].format == "csv":
        with source.files[0].path.open("rb") as file:
            header = file.readline(_HEADER_BYTES)
        delimiter = max(DELIMITERS, key=lambda sign: header.count(sign.encode()))
        mapping = replace(mapping, rows=replace(mapping.rows, delimiter=delimiter))
        source = open_source(mapping, {})
    return mapping, source.files


def _first_rows(mapping: LogMapping, file: SourceFile, number: int) -> pa.Table:
    """At most so many rows of a file, without columns whose names it has twice."""
    names = [name for name, count in Counter(file.names).items() if count == 1]
    parts: list[pa.Table] = []
    for batch in batches(mapping, Piece(file, 0, len(file.pieces)), dict.fromkeys(names, pa.string()), number):
        parts.append(pa.table(batch))
        if sum(part.num_rows for part in parts) >= number:
            break
    rows = pa.concat_tables(parts).slice(0, number) if parts else pa.table({})
    if file.format == "csv":
        return pa.table({name: _inferred(rows.column(name)) for name in rows.column_names})
    return rows


def _inferred(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of CSV as the first type that all of them can be."""
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    return texts


def _column(name: str, values: pa.ChunkedArray) -> Column:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = _kind(values.type)
    series = values.to_pandas() if kind != "other" else pd.Series([None] * len(values))
    if kind == "list":
        series = series.map(lambda entry: None if entry is None else tuple(entry))
    return Column(name, kind, series.reset_index(drop=True))


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list" if _kind(kind.value_type) in ("text", "integer") else "other"
    tests = {
        "boolean": (pa.types.is_boolean,),
        "integer": (pa.types.is_integer,),
        "number": (pa.types.is_floating, pa.types.is_decimal),
        "time": (pa.types.is_timestamp, pa.types.is_date),
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    }
    return next((name for name, holds in tests.items() if any(test(kind) for test in holds)), "other")


def time_unit(column: Column) -> str | None:
    """The unit of a column that counts from 1970, "text" for ISO text, None for no time."""
    if column.kind == "text":
        return "text" if column.known.str.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d").all() else None
    if column.kind not in ("integer", "number") or not len(column.known):
        return None
    low, high = column.known.min(), column.known.max()
    return next((unit for unit, (least, most) in UNITS.items() if least <= low and high < most), None)


def _best(columns: Sequence[Column], what: str) -> Column | None:
    """The one that is called so, or has the most values."""
    return max(columns, key=lambda c: (c.called(what), c.distinct), default=None)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _head(sample: Sample) -> str:
    return (
        f"# A first mapping, guessed from {sample.source}. Read every line: a comment says why it stands there;\n"
        "# what could not be guessed is commented out. docs/own_log.md explains the keys."
    )


def _rows(sample: Sample, path: Path) -> str:
    lines = ["[rows]", f"path = {_text(str(path.resolve()))}  # a relative path counts from this file's folder"]
    if sample.delimiter != ",":
        lines.append(f"delimiter = {_text(sample.delimiter)}")
    request, item, user, time = sample.request, sample.item, sample.user, sample.time
    lines.append(_role("request", request, f"{_count(request, sample)}" if request else ""))
    lines.append(_role("item", item, f"never twice in a request; {_count(item, sample)}" if item else ""))
    lines.append(_role("time", time, f"from {time.known.min()} to {time.known.max()}" if time else ""))
    unit = time_unit(time) if time is not None else None
    if unit not in (None, "text"):
        lines.append(f'time_unit = "{unit}"  # by the size of the numbers')
    lines.append(_zone(time))
    lines.append(_role("user", user, f"the same within a request; {_count(user, sample)}" if user else ""))
    return "\n".join(lines)


def _zone(time: Column | None) -> str:
    zone = str(getattr(time.values.dtype, "tz", None) or "UTC") if time is not None else "UTC"
    if zone.startswith("UTC"):  # or an offset from it, which is no zone of a place
        return '# time_zone = "Europe/Berlin"  # a day begins at midnight there; without this line, in UTC'
    return f"time_zone = {_text(zone)}  # the column's own; a day begins at midnight there"


def _role(key: str, column: Column | None, reason: str) -> str:
    if column is None:
        return f'# {key} = "..."  # not recognised: name the column'
    return f"{key} = {_text(column.name)}  # {reason}"


def _groups(sample: Sample) -> str:
    lines = ["[groups]", *_group_lines(sample)]
    if sample.label is not None:
        lines.append(f"label = {_text(sample.label.name)}  # the order of the ground truth: higher is better")
    else:
        lines.append('# label = "..."  # a number that orders the ground truth, higher is better; or rank')
    return "\n".join(lines)


def _group_lines(sample: Sample) -> Iterator[str]:
    if (group := sample.group) is not None:
        counts, order = group.values.value_counts(), sample.group_order
        shares = ", ".join(f"{_text(name)} {counts[name] / sample.rows:.1%}" for name in order)
        why = "the rarest first" if sample.grades is None else f"by the mean of {_text(sample.grades.name)}"
        yield f"order = {_texts(order)}  # CHECK: from best to worst; here {why}"
        yield f"column = {_text(group.name)}  # its values' shares: {shares}"
    elif flags := sample.flags:
        rest = next(name for name in ("rest", "candidates") if name not in {c.name for c in flags})
        shares = ", ".join(f"{_text(c.name)} {c.known.astype(float).mean():.1%}" for c in flags)
        names = _texts([_snake(c.name) for c in flags] + [rest])
        yield f"order = {names}  # CHECK: from best to worst; here the rarest first"
        yield f"flags = {_texts([c.name for c in flags])}  # true in: {shares}"
    elif (position := sample.position) is not None:
        last = int(position.known.max())
        yield 'order = ["best", "good", "rest"]  # CHECK: the names are yours'
        yield f"position = {_text(position.name)}  # from 1 to {last} within a request"
        yield f"cuts = [{max(last // 10, 1)}, {max(last // 3, 2)}]  # CHECK: each group's last position"
    else:
        yield '# order = ["bought", "shown", "retrieved"]  # from best to worst; the first is the ground truth'
        yield '# column = "..."  # which one names these? Or flags = ["is_bought", "is_shown"], or position and cuts'


def _history(sample: Sample) -> str:
    if lists := _history_columns(sample):
        longest = max(int(column.known.map(len).max()) for column in lists)
        return f"[history]  # from the list columns below\nlength = {max(longest, 1)}  # the latest at most"
    if sample.user is None or sample.item is None:
        return '# [history]  # needs user, or list columns\n# length = 50\n# derive = ["item"]'
    return (
        "[history]\nlength = 50  # the latest at most\n"
        f"derive = [{_text(sample.names[sample.item.name])}]  # of the user's earlier ground truth; add fields of items"
    )


def _history_columns(sample: Sample) -> list[Column]:
    """List columns of a request that hold items."""
    if sample.item is None:
        return []
    items = set(sample.item.known)
    lists = [c for c in sample.columns.values() if c.kind == "list" and sample.per_request(c)]
    return [c for c in lists if items & {value for entry in c.known for value in entry}]


def _fields(sample: Sample) -> Iterator[str]:
    if sample.time is not None:
        yield _field("when", {"side": "request", "kind": "time", "parts": ["weekday", "hour"]},
                     {"kind": "the request's own time"})  # fmt: skip
    for column in sample.columns.values():
        if column in (sample.request, sample.time):
            continue
        reason = _left_out(column, sample)
        yield f"# {_text(column.name)}: {reason}" if reason else _own_field(column, sample)


def _left_out(column: Column, sample: Sample) -> str | None:
    """Why a column makes no field."""
    if not column.name:
        return "without a name no field can be made of it; left out"
    if column.kind == "other":
        return "of a type that makes no field; left out"
    if column in sample.outcomes:
        return "says what became of the item, so it is no field"
    if column.kind == "time":
        return 'a time; parts of it can be fields: kind = "time", parts = ["month", "weekday"]'
    if column.distinct < 2:
        return f"one value in the sample{', and missing ones' if column.missing else ''}; left out"
    if column.kind == "text" and column.distinct > 0.9 * sample.rows and column is not sample.item:
        return "nearly every row has a text of its own; left out"
    return None


def _own_field(column: Column, sample: Sample) -> str:
    history = column in _history_columns(sample)
    request = sample.per_request(column)
    keys: dict[str, object] = {"side": "history" if history else "request" if request else "item"}
    same = "the same within a request" if request else "differs within a request"
    reasons = {"side": "lists of items" if history else same}
    keys, why = keys | {"column": column.name}, _count(column, sample)
    separator = _separator(column)
    if column.kind == "number" or (column.kind == "integer" and not _is_id(column, sample)):
        keys |= _number_keys(column)
        reasons["scale"] = f"skewness {float(column.known.astype(float).skew()):.1f}"
    else:
        keys["kind"] = "id"
        if history or column in (sample.item, sample.user):
            keys["min_count"], reasons["min_count"] = 2, "rarer ones share the unknown row, which is so trained"
        if history and sample.item is not None:
            keys["table"] = sample.names[sample.item.name]
    if (column.kind == "list" and not history) or separator:
        lists = column.known.str.split(separator, regex=False) if separator else column.known
        keys["length"], reasons["length"] = max(int(lists.map(len).max()), 1), "the longest list in the sample"
    if separator:
        keys["separator"] = separator
    return _field(sample.names[column.name], keys, reasons | {"kind": why})


def _is_id(column: Column, sample: Sample) -> bool:
    return column in (sample.item, sample.user) or column.called("id") or column.distinct <= MANY_VALUES


def _number_keys(column: Column) -> dict[str, object]:
    if abs(float(column.known.astype(float).skew())) > SKEWED:
        return {"kind": "number", "scale": "quantile", "buckets": 16}
    return {"kind": "number", "scale": "standard"}


def _separator(column: Column) -> str | None:
    """What the texts of a list are separated by: the texts are few parts in many combinations."""
    if column.kind != "text" or not column.distinct:
        return None
    for separator in SEPARATORS:
        together = column.known.drop_duplicates()
        if float(together.str.contains(separator, regex=False).mean()) < 0.2:
            continue
        if together.str.split(separator, regex=False).explode().nunique() < len(together):
            return separator
    return None


def _count(column: Column, sample: Sample) -> str:
    what = {"text": "texts", "list": "lists", "boolean": "values"}.get(column.kind, "numbers")
    missing = f", missing in {column.missing:.1%}" if column.missing else ""
    return f"{column.distinct:,} different {what} in {sample.rows:,} rows{missing}"


def _field(name: str, keys: dict[str, object], reasons: dict[str, str]) -> str:
    lines = ["[[fields]]", f"name = {_text(name)}"]
    for key, value in keys.items():
        comment = f"  # {reasons[key]}" if key in reasons else ""
        lines.append(f"{key} = {_value(value)}{comment}")
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, list):
        return _texts(value)
    return str(value) if isinstance(value, int) else _text(str(value))


def _texts(values: Sequence[object]) -> str:
    return f"[{', '.join(_text(str(value)) for value in values)}]"


def _text(text: str) -> str:
    """A TOML string, in which a line of a comment cannot end either."""
    return json.dumps(text, ensure_ascii=True).replace("\x7f", "\\u007f")


def _snake(name: str) -> str:
    """An identifier: MovieID -> movie_id."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    plain = re.sub(r"[^a-z0-9]+", "_", parted.lower()).strip("_")
    return plain if plain[:1].isalpha() else f"field_{plain}".rstrip("_")
