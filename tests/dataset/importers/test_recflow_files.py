"""RecFlow's files: what is read, how little of it, and what is refused."""

import json
import tracemalloc
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow_files import GROUP_NAMES, REQUEST_COLUMNS, Requests, read_requests
from deep_components.errors import InputError
from tests.dataset.synthetic import COUNTS, DAY, edit_table, random_log, read_plain, write_log, write_plain

READ = (*REQUEST_COLUMNS, "video_id", "rank_pos", "rank_index")


def table_of(request_ids: list[int], **more: Any) -> pa.Table:
    """A row for each of the ids; every other column holds the row's number, rank_pos whether that is even."""
    rows = np.arange(len(request_ids))
    columns: dict[str, Any] = dict.fromkeys(READ, rows) | {"request_id": np.array(request_ids, np.int64)}
    return pa.table(columns | {"rank_pos": 1 - rows % 2} | more)


def read(folder: Path, table: pa.Table, chunksize: int = 1 << 16, **options: Any) -> Requests:
    path = folder / "day.feather"
    pyarrow.feather.write_feather(table, path, chunksize=chunksize, **options)
    return read_requests(path, "rank_pos", "rank_index")


def write_batches(path: Path, table: pa.Table, sizes: list[int]) -> None:
    """Record batches of the given sizes, empty ones too."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        first = 0
        for size in sizes:
            for batch in table.slice(first, size).combine_chunks().to_batches() or [
                pa.RecordBatch.from_pylist([], schema=table.schema)
            ]:
                writer.write_batch(batch)
            first += size


# ---------------------------------------------------------------------------------------------- all_stage


@pytest.mark.parametrize("chunksize", [1, 3, 4, 100])
@pytest.mark.parametrize("compression", ["lz4", "zstd", "uncompressed"])
def test_requests_stand_in_order_of_first_appearance(tmp_path: Path, chunksize: int, compression: str) -> None:
    ids = [50, 50, -7, 50, 9, 9, -7, 1 << 62, 9, 50, 3, 3]
    found = read(tmp_path, table_of(ids), chunksize, compression=compression)
    assert found.fields["request_id"].tolist() == [50, -7, 9, 1 << 62, 3]
    for name in REQUEST_COLUMNS[1:]:
        assert found.fields[name].tolist() == [0, 2, 4, 7, 10]  # of each request's first row
    assert found.truth_request_id.tolist() == ids[::2]
    assert found.truth_video_id.tolist() == found.truth_index.tolist() == list(range(0, 12, 2))
    assert list(found.fields) == list(REQUEST_COLUMNS)


def test_random_rows_against_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 2 if name == "rank_pos" else 40, 500) for name in READ}
    found = read(tmp_path, pa.table(columns), 64)
    rows = pa.table(columns).to_pylist()
    first: dict[int, dict[str, int]] = {}
    for row in rows:
        first.setdefault(row["request_id"], row)
    for name in REQUEST_COLUMNS:
        assert found.fields[name].tolist() == [row[name] for row in first.values()]
    truth = [(row["request_id"], row["video_id"], row["rank_index"]) for row in rows if row["rank_pos"] == 1]
    pairs = zip(*(a.tolist() for a in (found.truth_request_id, found.truth_video_id, found.truth_index)), strict=True)
    assert list(pairs) == truth


def test_without_positions_their_columns_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "day.feather"
    pyarrow.feather.write_feather(table_of([4, 4, 2]).drop_columns(["rank_pos", "rank_index", "video_id"]), path)
    found = read_requests(path, "rank_pos", None)
    assert found.fields["request_id"].tolist() == [4, 2] and len(found.truth_index) == 0


def test_empty_record_batches(tmp_path: Path) -> None:
    path = tmp_path / "day.feather"
    write_batches(path, table_of([4, 4, 2]), [0, 2, 0, 1, 0])
    assert read_requests(path, "rank_pos", "rank_index").fields["request_id"].tolist() == [4, 2]
    write_batches(path, table_of([4]).slice(0, 0), [0, 0])
    with pytest.raises(InputError, match=rf"{path}: holds no request"):
        read_requests(path, "rank_pos", "rank_index")


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.uint32(), pa.uint64()])
def test_every_type_of_integer(tmp_path: Path, kind: pa.DataType) -> None:
    table = table_of([5, 6, 5])
    table = table.cast(pa.schema([(name, kind) for name in table.column_names]))
    found = read(tmp_path, table)
    for array in (*found.fields.values(), found.truth_request_id, found.truth_video_id, found.truth_index):
        assert array.dtype == np.int64
    assert found.fields["request_id"].tolist() == [5, 6]


def test_what_is_no_feather_file(tmp_path: Path) -> None:
    path = tmp_path / "day.feather"
    with pytest.raises(InputError, match=rf"{path}: no such file; see data/README.md"):
        read_requests(path, "rank_pos", "rank_index")
    for content in (b"", b"ARROW1", b"FEA1" + bytes(100), bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{path}: not a readable Feather"):
            read_requests(path, "rank_pos", "rank_index")
    with pytest.raises(InputError, match=str(tmp_path)):
        read_requests(tmp_path, "rank_pos", "rank_index")


def test_a_cut_file(tmp_path: Path) -> None:
    read(tmp_path, table_of(list(range(200))), 50)
    content = (tmp_path / "day.feather").read_bytes()
    path = tmp_path / "cut.feather"
    for length in range(0, len(content), 97):
        path.unlink(missing_ok=True)
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"{path}: not a readable Feather"):
            read_requests(path, "rank_pos", "rank_index")


@pytest.mark.parametrize("compression", ["lz4", "uncompressed"])
def test_a_damaged_file(tmp_path: Path, compression: str) -> None:
    rng = np.random.default_rng(0)
    read(tmp_path, table_of(rng.integers(0, 50, 400).tolist()), 100, compression=compression)
    content = bytearray((tmp_path / "day.feather").read_bytes())
    path = tmp_path / "damaged.feather"
    refused = 0
    for number in [*range(0, len(content), 97), *range(len(content) - 1500, len(content), 11)]:
        content[number] ^= 0xFF
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        content[number] ^= 0xFF
        try:
            read_requests(path, "rank_pos", "rank_index")
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("rows", [1238, 100_000, 1 << 40])
@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_more_rows_than_the_file_holds(tmp_path: Path, rows: int, compression: str) -> None:
    """What lies behind the buffers in memory would be read."""
    path = tmp_path / "day.feather"
    columns = dict.fromkeys(READ, np.arange(1237) % 2)
    pyarrow.feather.write_feather(pa.table(columns), path, compression=compression)
    content = path.read_bytes()
    declared = content.replace((1237).to_bytes(8, "little"), rows.to_bytes(8, "little"))
    assert declared != content
    path.write_bytes(declared)
    with pytest.raises(InputError, match=r"day.feather: not a readable Feather"):
        read_requests(path, "rank_pos", "rank_index")


# ---------------------------------------------------------------------------------------------- memory


def peak_memory(path: Path) -> tuple[int, int]:
    """The bytes that reading ``path`` takes at most, of Arrow and of Python and numpy."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        read_requests(path, "rank_pos", "rank_index")
        return pool.max_memory(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def columns_of(rows: int, rows_per_request: int) -> dict[str, np.ndarray]:
    numbers = np.arange(rows)
    columns = dict.fromkeys(READ, numbers // rows_per_request)
    return columns | {"rank_pos": (numbers % rows_per_request == 0).astype(np.int64)}


def test_one_record_batch_is_in_memory_at_a_time(tmp_path: Path) -> None:
    rows, chunksize = 2_000_000, 1 << 15
    path = tmp_path / "day.feather"
    pyarrow.feather.write_feather(pa.table(columns_of(rows, 1000)), path, compression="lz4", chunksize=chunksize)
    of_arrow, of_python = peak_memory(path)
    column_of_a_batch = chunksize * 8
    assert 0 < of_arrow < 12 * column_of_a_batch  # the 10 columns of one batch, where one would do
    assert of_python < 12 * column_of_a_batch  # of 61 * 10 in the file


def test_only_the_columns_needed_are_read(tmp_path: Path) -> None:
    rows = 200_000
    others = {f"other_{number}": np.zeros(rows, np.int64) for number in range(30)}
    path = tmp_path / "day.feather"
    table = pa.table(others | columns_of(rows, 100))
    pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=rows)
    of_arrow, _ = peak_memory(path)
    assert 0 < of_arrow < 5 * rows * 8  # one column after the other, of 40


# ---------------------------------------------------------------------------------------------- counts, origin, layout


def counts(folder: Path, content: Any) -> dict[str, int]:
    write_plain(recflow.id_count_path(folder), content)
    return recflow.read_id_counts(folder)


def test_id_counts_by_the_names_of_the_released_file(tmp_path: Path) -> None:
    released: dict[str, Any] = dict(COUNTS)
    released["photo_id"] = released.pop("video_id")
    released[" category_level_two"] = np.int64(released.pop("category_level_two"))
    released["tag"] = "not read"
    assert counts(tmp_path, released) == COUNTS
    assert counts(tmp_path, COUNTS) == COUNTS


def test_the_origin(tmp_path: Path) -> None:
    assert recflow.read_origin(tmp_path) == "unlabelled"
    for day in recflow.PERIOD_1:
        assert recflow.read_origin(tmp_path) == "unlabelled"
        for path in recflow.day_paths(tmp_path, day):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert recflow.read_origin(tmp_path) == "recflow"
    recflow.write_origin(tmp_path, {"data": "simulated", "seed": 3})
    assert recflow.read_origin(tmp_path) == "simulated"
    assert json.loads((tmp_path / recflow.ORIGIN_FILE).read_text()) == {"data": "simulated", "seed": 3}
    for content in ("", "{}", "[]", "3", '{"date": 1}'):
        (tmp_path / recflow.ORIGIN_FILE).write_text(content)
        with pytest.raises(InputError, match=r"others/origin.json: not readable"):
            recflow.read_origin(tmp_path)


def distinct_pairs(log: recflow.DayLog) -> Mapping[tuple[int, int], dict[str, int]]:
    """For every (request, video) its flags and indices, by a loop over the log's items."""
    pairs: dict[tuple[int, int], dict[str, int]] = {}
    for request, request_id in enumerate(log.request["request_id"].tolist()):
        for group in GROUP_NAMES:
            for number, item in enumerate(log.groups[group][request].tolist()):
                row = pairs.setdefault((request_id, item[0]), dict.fromkeys(GROUP_NAMES, 0))
                row[group] = 1
                if group == "rank_pos":
                    row["rank_index"] = int(log.rank_index[request, number])
                if group.startswith("rerank"):
                    at = number + 10 * (group == "rerank_neg")
                    row["rerank_index"] = int(log.rerank_index[request, at])
    return pairs


def test_a_written_day_reads_back(tmp_path: Path) -> None:
    log = random_log(6)
    log.groups["rank_pos"][:, :5] = log.groups["rerank_pos"][:, 5:]  # videos that stand in two groups
    write_log(tmp_path, log)
    requests = dict(chain.from_iterable(recflow.read_request_dict(recflow.request_path(tmp_path, DAY))))
    histories = dict(chain.from_iterable(recflow.read_history_dict(recflow.history_path(tmp_path, DAY))))
    assert list(requests) == list(histories) == log.request["request_id"].tolist()
    for number, (groups, history) in enumerate(zip(requests.values(), histories.values(), strict=True)):
        np.testing.assert_array_equal(history.to_numpy(), log.history[number])
        assert set(groups) == set(GROUP_NAMES)
        for name in GROUP_NAMES:
            np.testing.assert_array_equal(groups[name].to_numpy(), log.groups[name][number])
    rows = pyarrow.feather.read_table(recflow.feather_path(tmp_path, DAY), memory_map=False).to_pylist()
    pairs = distinct_pairs(log)
    assert len(rows) == len(pairs) == 6 * 55
    for row in rows:
        expected = {"rank_index": 0, "rerank_index": 0} | pairs[row["request_id"], row["video_id"]]
        assert {name: row[name] for name in expected} == expected
    found = read_requests(recflow.feather_path(tmp_path, DAY), "rerank_pos", "rerank_index")
    for name in REQUEST_COLUMNS:
        np.testing.assert_array_equal(found.fields[name], log.request[name])


def test_days_that_are_there(tmp_path: Path) -> None:
    for day in ("2024-02-01", "2024-01-31"):
        write_log(tmp_path, random_log(1), day)
    assert recflow.available_days(tmp_path) == ["2024-01-31", "2024-02-01"]
    assert read_plain(recflow.id_count_path(tmp_path)) == COUNTS
    edit_table(recflow.feather_path(tmp_path, "2024-02-01"), lambda table: table)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]  # no temporary file is left
