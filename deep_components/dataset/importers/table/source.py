"""The files of a table, and their rows a batch at a time. Files are untrusted.

pyarrow.dataset's own scanner decodes a Parquet file's row group as a whole, which may be the whole file; the readers
used here give batches, so that memory does not depend on how a table was written (a Feather file's record batch
excepted).
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from deep_components.dataset.encoding import combined, first_line
from deep_components.dataset.importers.table.mapping import FORMATS, LogMapping, nearest
from deep_components.errors import InputError

NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
ROWS_PER_PIECE = 1 << 20
_CSV_BLOCK = 1 << 22
_CSV_BYTES_PER_ROW = 64
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_CSV_COLUMN = re.compile(r"In CSV column #(\d+): ")


@dataclass(frozen=True)
class SourceFile:
    """One file; ``types`` are those of all its columns, ``partition`` what the names of its folders say (key=value)."""

    path: Path
    format: str
    names: tuple[str, ...]  # of its columns, without partition
    types: Mapping[str, str]  # column -> Arrow's name of its type
    partition: Mapping[str, str]
    pieces: tuple[int, ...]  # rows of each row group or record batch; of CSV one entry, estimated


@dataclass(frozen=True)
class Piece:
    """A part of a file that one worker reads: its row groups or record batches first .. stop."""

    file: SourceFile
    first: int
    stop: int


@dataclass
class Source:
    """All files, in order of their names, and what is wrong with them."""

    files: list[SourceFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)  # the columns that some of the problems are about

    @property
    def rows(self) -> int:
        """Rows of the table; of CSV an estimate."""
        return sum(sum(file.pieces) for file in self.files)

    def pieces(self) -> list[Piece]:
        found = []
        for file in self.files:
            first = rows = 0
            for number, count in enumerate(file.pieces, 1):
                rows += count
                if rows >= ROWS_PER_PIECE or number == len(file.pieces):
                    found.append(Piece(file, first, number))
                    first, rows = number, 0
        return found

    def kind(self, column: str) -> str:
        """The kind (:func:`kind_of`) of a column, "null" where it is nowhere."""
        kinds = (kind_of(file.types[column]) for file in self.files if column in file.types)
        return next((kind for kind in kinds if kind != "null"), "null")


def kind_of(name: str) -> str:
    """What a type, by Arrow's name, holds: numbers, text, times, wall-clock times, lists of these, null; its name for
    anything else. Columns of one kind read alike."""
    if inner := re.fullmatch(r"(?:large_|fixed_size_)?list<\w+: (.*?)(?: not null)?>(?:\[\d+\])?", name):
        return f"lists of {kind_of(inner[1])}"
    if inner := re.match(r"dictionary<values=([^,]+),", name):
        return kind_of(inner[1])
    if re.fullmatch(r"u?int\d+|(?:half)?float|double|bool|decimal\d+\(.*\)", name):
        return "numbers"
    if name in ("string", "large_string", "string_view"):
        return "text"
    if name.startswith(("timestamp", "date")):
        return "times" if "tz=" in name else "wall-clock times"
    return name


def open_source(mapping: LogMapping, columns: Mapping[str, str]) -> Source:
    """The files of the mapping's table; ``columns`` are those that are needed, and what they are for."""
    source = Source()
    for path in _paths(mapping, source.problems):
        try:
            source.files.append(_opened(mapping, path))
        except InputError as error:
            source.problems.append(str(error))
    if not source.files and not source.problems:
        source.problems.append(f"{mapping.source}: holds no table; path of [rows] names a file, or a folder of them")
    for file in source.files:
        for column, problem in _column_problems(file, columns, source):
            source.problems.append(problem)
            source.faulty.add(column)
    return source


def _column_problems(file: SourceFile, columns: Mapping[str, str], source: Source) -> Iterator[tuple[str, str]]:
    for column, what in columns.items():
        if column not in file.types:
            yield column, f"{file.path}: column {column}, {what}, is missing; {nearest(column, list(file.types))}"
        elif file.names.count(column) > 1:
            yield column, f"{file.path}: column {column} is there twice; give one of them another name"
        elif kind_of(file.types[column]) not in ("null", source.kind(column)):
            first = next(f for f in source.files if column in f.types and kind_of(f.types[column]) != "null")
            yield (
                column,
                f"{file.path}: column {column} holds {file.types[column]}, but {first.types[column]} in "
                f"{first.path.name}; write it with one type in all files",
            )


def _paths(mapping: LogMapping, problems: list[str]) -> list[Path]:
    """The regular files of the table; a folder's without those whose names begin with a dot or _."""
    top = mapping.source
    if not top.is_dir():
        return [top]
    root, found = top.resolve(), []
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in (*folders, *sorted(names)):
            path = Path(folder) / name
            if name.startswith((".", "_")):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                problems.append(f"{path}: a link out of the folder; put the file itself there")
            elif path.is_symlink() and path.is_dir():
                problems.append(f"{path}: a link to a folder; put the folder itself there")
            elif name in names:
                found.append(path)
    formats = {_format(mapping, path) for path in found}
    if len(formats) > 1:
        odd = next(path for path in found if _format(mapping, path) != _format(mapping, found[0]))
        problems.append(f"{odd}: not of the format of {found[0].name}; move it out of the folder of the table")
        return []
    return found


def _format(mapping: LogMapping, path: Path) -> str | None:
    return mapping.rows.format or FORMATS.get(path.suffix.lower())


def _opened(mapping: LogMapping, path: Path) -> SourceFile:
    """What a file holds. InputError when it is none of the formats, or cannot be read."""
    kind = _format(mapping, path)
    if kind is None:
        raise InputError(
            f"{path}: its ending is none of {', '.join(FORMATS)}; name the format of [rows], or move the file away"
        )
    with readable(path, kind):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise OSError("not a regular file")
        if kind == "parquet":
            with pa.parquet.ParquetFile(path) as parquet:
                schema, groups = parquet.schema_arrow, parquet.metadata
                pieces = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        elif kind == "feather":
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                schema = reader.schema
                # The rows of a record batch are only known when it is read.
                pieces = [1 << 16] * reader.num_record_batches
        else:
            with pa.csv.open_csv(path, parse_options=_parse_options(mapping)) as reader:
                schema = pa.schema([pa.field(name, pa.string()) for name in reader.schema.names])
                pieces = [path.stat().st_size // _CSV_BYTES_PER_ROW + 1]
        partition = _partition(mapping.source, path)
        types = dict.fromkeys(partition, "string") | {entry.name: str(entry.type) for entry in schema}
        return SourceFile(path, kind, tuple(schema.names), types, partition, tuple(pieces))


def _partition(top: Path, path: Path) -> dict[str, str]:
    folders = path.relative_to(top).parts[:-1]
    return {key: unquote(value) for key, equal, value in (name.partition("=") for name in folders) if equal}


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Says in one sentence why a file cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; path of [rows] names a file, or a folder of them") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: not a readable {kind} file ({reason}); write it again") from error


# ---- batches ---------------------------------------------------------------------------------------------------------


def batches(
    mapping: LogMapping, piece: Piece, columns: Mapping[str, pa.DataType | None], rows: int
) -> Iterator[dict[str, pa.Array]]:
    """The columns, which map to the types that CSV is read with, at most ``rows`` rows at a time. InputError when the
    file is damaged."""
    file = piece.file
    names = [name for name in columns if name in file.names]
    read = {"parquet": _parquet, "feather": _feather, "csv": _csv}[file.format]
    with readable(file.path, file.format):
        for batch in read(mapping, piece, names, columns, rows):
            for first in range(0, batch.num_rows, rows):
                part = batch.slice(first, rows)
                made = {name: combined(part.column(name)) for name in names}
                for name in columns:
                    if name not in made:
                        value = file.partition[name]
                        made[name] = pa.repeat(
                            pa.scalar(None if value == NO_PARTITION else value, pa.string()), len(part)
                        )
                yield made


_Types = Mapping[str, pa.DataType | None]


def _parquet(
    mapping: LogMapping, piece: Piece, names: Sequence[str], columns: _Types, rows: int
) -> Iterator[pa.RecordBatch]:
    with pa.parquet.ParquetFile(piece.file.path, buffer_size=1 << 18, pre_buffer=False) as file:
        groups = list(range(piece.first, piece.stop))
        yield from file.iter_batches(rows, row_groups=groups, columns=list(names), use_threads=False)


def _feather(
    mapping: LogMapping, piece: Piece, names: Sequence[str], columns: _Types, rows: int
) -> Iterator[pa.RecordBatch]:
    numbers = [piece.file.names.index(name) for name in names]
    with pa.OSFile(str(piece.file.path)) as file:  # read, not mapped: mapped pages would count as memory too
        options = pa.ipc.IpcReadOptions(included_fields=numbers, use_threads=False)
        with pa.ipc.open_file(file, options=options) as reader:
            for number in range(piece.first, piece.stop):
                batch = reader.get_batch(number)
                batch.validate(full=True)  # that its buffers hold what it declares: else memory behind them is read
                yield batch


def _csv(
    mapping: LogMapping, piece: Piece, names: Sequence[str], columns: _Types, rows: int
) -> Iterator[pa.RecordBatch]:
    convert = pa.csv.ConvertOptions(
        column_types={name: columns[name] for name in names},
        include_columns=list(names),
        null_values=list(mapping.rows.null_values),
        strings_can_be_null=True,
    )
    read = pa.csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False)
    try:
        with pa.csv.open_csv(piece.file.path, read, _parse_options(mapping), convert) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(
            _CSV_COLUMN.sub(lambda m: f"column {piece.file.names[int(m[1])]}: ", str(error))
        ) from error


def _parse_options(mapping: LogMapping) -> pa.csv.ParseOptions:
    return pa.csv.ParseOptions(delimiter=mapping.rows.delimiter, newlines_in_values=True)
