"""Last pass: a day of the log from its cleaned buckets, encoded."""

import shutil
from pathlib import Path

import numpy as np

from deep_components.dataset.columnar import ColumnFiles, write_day
from deep_components.dataset.encoding import Encoding, FieldEncoding
from deep_components.dataset.importers.table.clean import clean_request_record
from deep_components.dataset.importers.table.plan import Plan
from deep_components.dataset.importers.table.scratch import load, remove
from deep_components.files import temporaries

_ROWS_AT_ONCE = 1 << 17


def assemble(plan: Plan, folder: Path, day: str, repairs: dict[str, int]) -> str:
    """Write the day to the log in ``folder``, whose encoding is there; requests by rising key. Returns the day."""
    encoding = Encoding.load(folder / "encoding")
    kind = clean_request_record(plan)
    lengths = [load(plan, bucket, f"{day}.clean_requests", kind)["items"].copy() for bucket in range(plan.buckets)]
    counts = np.concatenate(lengths)
    offset = np.concatenate([[0], np.cumsum(counts)])
    for leftover in (folder / day, *temporaries(folder / day)):  # of a worker that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with write_day(folder / day, encoding.schema, len(counts), offset=offset) as files:
        files.repairs |= repairs
        request = row = 0
        for bucket, some in enumerate(lengths):
            if len(some):
                _write_bucket(plan, encoding, files, bucket, day, request, row)
                request, row = request + len(some), row + int(some.sum())
    return day


def _write_bucket(
    plan: Plan, encoding: Encoding, files: ColumnFiles, bucket: int, day: str, request: int, row: int
) -> None:
    """Write a bucket's requests from row ``request`` on, and their items from row ``row`` on."""
    requests = load(plan, bucket, f"{day}.clean_requests", clean_request_record(plan))
    rows = slice(request, request + len(requests))
    files.write("request_id", requests["raw"], rows)
    for entry in encoding.side("request"):
        _write(encoding, files, entry, requests[f"request.{entry.name}"], rows)
    _write_histories(plan, encoding, files, _histories(plan, requests, bucket, day), request)
    items = load(plan, bucket, f"{day}.clean_items", plan.item_record)
    rows = slice(row, row + len(items))
    files.write("item.label", items["order"].astype(np.int32), rows)
    files.write("item.group", items["group"], rows)
    for entry in encoding.side("item"):
        _write(encoding, files, entry, items[plan.stored(entry)], rows)
    for name in ("clean_requests", "clean_items", "history"):
        remove(plan, bucket, f"{day}.{name}")


def _histories(plan: Plan, requests: np.ndarray, bucket: int, day: str) -> np.ndarray:
    """The records that have the histories of the requests, in their order."""
    if not plan.derived:
        return requests
    histories = load(plan, bucket, f"{day}.history", plan.history_record)
    return histories[np.argsort(histories["request"], kind="stable")]


def _write_histories(plan: Plan, encoding: Encoding, files: ColumnFiles, records: np.ndarray, first: int) -> None:
    step = max(1, _ROWS_AT_ONCE // max(plan.length, 1))
    for low in range(0, len(records), step):
        some = records[low : low + step]
        rows = slice(first + low, first + low + len(some))
        there = np.arange(plan.length, 0, -1) <= some["events"][:, None]
        files.write("history.mask", there, rows)
        for entry in encoding.side("history"):
            _write(encoding, files, entry, some[f"history.{entry.name}"], rows, there)


def _write(
    encoding: Encoding,
    files: ColumnFiles,
    entry: FieldEncoding,
    raw: np.ndarray,
    rows: slice,
    there: np.ndarray | None = None,
) -> None:
    """Encode raw values and write them to ``rows``; where ``there`` is False stands padding."""
    step = max(1, _ROWS_AT_ONCE * len(raw) // max(raw.size, 1))
    for low in range(0, len(raw), step):
        some = slice(rows.start + low, min(rows.start + low + step, rows.stop))
        for name, values in encoding.finished(entry, np.ascontiguousarray(raw[low : low + step])).items():
            if there is not None:
                values[~there[low : low + step]] = 0
            files.write(f"{entry.side}.{name}", values, some)
