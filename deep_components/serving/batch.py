"""Many requests from a table to a table, a few at a time, whatever their number."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from deep_components.dataset.rows import RawRows
from deep_components.errors import InputError
from deep_components.files import atomic_path
from deep_components.serving.recommender import Recommendation, Recommender

_BYTES_AT_ONCE = 1 << 24  # of answers that are written together
_MADE = ("items", "scores", "candidates")


def recommend_table(
    recommender: Recommender,
    requests: RawRows,
    output: Path,
    ids: Sequence[str] = (),
    batch_size: int = 256,
    explain: bool = False,
    **options: Any,
) -> int:
    """Answer all requests of a table and write the answers to ``output``, whole or not at all; returns their number.

    A row has the request's user, the columns ``ids``, and the lists ``items`` and ``scores``; with ``explain`` the list
    ``candidates`` of structs. The ending of ``output`` is one of WRITERS; in CSV lists are JSON.

    Args:
        batch_size: requests that are held at a time.
        options: others of :meth:`Recommender.recommend`.

    Raises:
        InputError: a file or a request is wrong, a column of ``ids`` is missing, or ``output`` cannot be written.
    """
    schema = _schema(recommender, requests, ids, explain)
    kept = [name for name in schema.names if name not in _MADE]
    wanted = [name for name in requests.schema.names if name in {*recommender.encoder.known, *kept}]
    done = 0
    with atomic_path(output) as path, writer_of(output)(path, schema) as write:
        for piece in requests.pieces(wanted):
            for start in range(0, len(piece), batch_size):
                some = piece.slice(start, batch_size)
                try:
                    answers = recommender.recommend(some, explain=explain, first=done, **options)
                except InputError as error:
                    raise InputError(f"{requests.name}: {error}") from error
                done += len(some)
                write(_batch(schema, [some.column(name) for name in kept], answers))
    return done


def _schema(recommender: Recommender, requests: RawRows, ids: Sequence[str], explain: bool) -> pa.Schema:
    bundle = recommender.bundle
    for name in ids:
        if name not in requests.schema.names:
            raise InputError(
                f"--id={name}: {requests.name} has no such column; it has {', '.join(requests.schema.names)}"
            )
    user = [bundle.encoding.user] if bundle.encoding.user in requests.schema.names else []
    kept = list(dict.fromkeys([*user, *ids]))
    if clash := [name for name in kept if name in _MADE]:
        raise InputError(f"{requests.name}: column {clash[0]} has the name of a column of the output; rename it")
    item = bundle.corpus.table.schema.field(bundle.corpus.item).type
    item = item.value_type if pa.types.is_dictionary(item) else item
    fields = [requests.schema.field(name) for name in kept]
    fields += [pa.field("items", pa.list_(item)), pa.field("scores", pa.list_(pa.float32()))]
    if explain:
        stages = bundle.cascade.stage_names
        candidate = {"item": item, "left_at": pa.string()}
        candidate |= {
            name: pa.struct([(stage, kind) for stage in stages])
            for name, kind in (("scores", pa.float32()), ("ranks", pa.int32()))
        }
        fields.append(pa.field("candidates", pa.list_(pa.struct(list(candidate.items())))))
    return pa.schema(fields)


def _batch(schema: pa.Schema, kept: Sequence[pa.Array], answers: Sequence[Recommendation]) -> pa.RecordBatch:
    made: dict[str, list[Any]] = {name: [getattr(answer, name) for answer in answers] for name in _MADE[:2]}
    if "candidates" in schema.names:
        made["candidates"] = [[vars(candidate) for candidate in answer.candidates or ()] for answer in answers]
    columns = [pa.array(values, schema.field(name).type) for name, values in made.items()]
    return pa.record_batch([*kept, *columns], schema=schema)


# ---- formats ---------------------------------------------------------------------------------------------------------

Write = Callable[[pa.RecordBatch], None]


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Write]:
    with pa.parquet.ParquetWriter(path, schema) as writer, _together(schema, writer.write_table) as write:
        yield write


@contextmanager
def _feather(path: Path, schema: pa.Schema) -> Iterator[Write]:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(str(path), schema, options=options) as writer, _together(schema, writer.write_table) as write:
        yield write


@contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[Write]:
    """Lists as JSON."""
    flat = pa.schema([pa.field(f.name, pa.string() if pa.types.is_nested(f.type) else f.type) for f in schema])

    def texts(batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = zip(schema, batch.columns, strict=True)
        return pa.record_batch(
            [_json(values) if pa.types.is_nested(field.type) else values for field, values in columns], schema=flat
        )

    with pa.csv.CSVWriter(path, flat) as writer:
        yield lambda batch: writer.write_batch(texts(batch))


def _json(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else json.dumps(value, default=str) for value in column.to_pylist()])


@contextmanager
def _together(schema: pa.Schema, write: Callable[[pa.Table], None]) -> Iterator[Write]:
    """Writes batches once they are worth a row group."""
    waiting: list[pa.RecordBatch] = []

    def flush() -> None:
        if waiting:
            write(pa.Table.from_batches(waiting, schema).combine_chunks())
            waiting.clear()

    def take(batch: pa.RecordBatch) -> None:
        waiting.append(batch)
        if sum(part.nbytes for part in waiting) > _BYTES_AT_ONCE:
            flush()

    yield take
    flush()


WRITERS: Mapping[str, Callable[[Path, pa.Schema], AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".feather": _feather,
    ".arrow": _feather,
}


def writer_of(output: Path) -> Callable[[Path, pa.Schema], AbstractContextManager[Write]]:
    """How a file is written, by its ending. InputError when that is none of WRITERS."""
    if output.suffix.lower() not in WRITERS:
        raise InputError(f"--output={output}: its ending is none of {', '.join(WRITERS)}")
    return WRITERS[output.suffix.lower()]
