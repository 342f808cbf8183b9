"""What benchmarks/serving.py serves: a simulated world's table, its mapping, a cascade, the corpus and requests.

The corpus is every video of the simulation with RecFlow's columns. Authors and categories follow power laws, a video
shares most of its properties with its author's others, and users like what their tastes and popularity say; so the item
vectors of a model that was trained on the table lie in groups, as those of a real catalogue do.

The table's first day shows every video once, so that each has a trained row of its own in the model's tables; on the
second one users choose among popular videos. The third day is served, with histories of HISTORY_LENGTH videos.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deep_components.dataset.simulate import (
    TRUTH,
    Columns,
    SimulationSettings,
    World,
    draw_candidates,
    requests_of,
    seen_by,
)

DAYS = ("2024-01-13", "2024-01-14", "2024-01-15")
HISTORY_LENGTH = 50
LIKED, SHOWN = 10, 30  # of a request's candidates the best so many, and the next
ITEMS_PER_PIECE, ITEMS_PER_REQUEST = 100_000, 500  # the latter on the first day
ITEM_IDS = ("video_id", "author_id", "category_level_two", "category_level_one", "upload_type")
ITEM_COLUMNS = (*ITEM_IDS, "upload_timestamp")
REQUEST_IDS = ("user_id", "device_id", "gender", "age", "province")
CASCADE = """
name = "served"
stages = [
    {name = "retrieval", model = "dssm", keep = 400},
    {name = "prerank", model = "mlp", keep = 100},
    {name = "rank", model = "din", keep = 20},
]
groups = [{name = "liked"}, {name = "shown"}, {name = "retrieved"}]
"""
MAPPING = f"""
[rows]
path = "rows"
request = "request_id"
item = "video_id"
time = "request_timestamp"
time_unit = "ms"
time_zone = "Asia/Shanghai"
user = "user_id"

[groups]
order = ["liked", "shown", "retrieved"]
column = "left_at"

[history]
length = {HISTORY_LENGTH}
derive = ["{'", "'.join(name.removesuffix("_id") for name in ITEM_IDS)}"]
"""


def mapping() -> str:
    """``log.toml``: RecFlow's fields."""
    entries = [("request", name, 'kind = "id"') for name in REQUEST_IDS]
    entries += [("item", name, 'kind = "id"') for name in ITEM_IDS]
    parts = 'kind = "time"\nparts = ["weekday", "hour", "minute"]\ntime_unit = '
    entries += [("request", "request_timestamp", f'{parts}"ms"'), ("item", "upload_timestamp", f'{parts}"s"')]
    fields = [
        f'[[fields]]\nname = "{column.removesuffix("_id")}"\nside = "{side}"\ncolumn = "{column}"\n{rest}\n'
        for side, column, rest in entries
    ]
    return "\n".join([MAPPING, *fields])


def settings_of(items: int, requests: int) -> SimulationSettings:
    """A world with so many videos, 100 of an author, and ``requests`` requests on each of the last two days; a user
    makes ten or more on each."""
    return SimulationSettings(
        days=DAYS, requests_per_day=requests, users=max(1, requests // 16), videos=items, authors=max(20, items // 100)
    )


def write_all(folder: Path, settings: SimulationSettings) -> None:
    """Write ``cascade.toml``, ``log.toml`` and its table ``rows/``, and ``items.parquet``."""
    world = World(settings)
    (folder / "rows").mkdir(parents=True)
    (folder / "cascade.toml").write_text(CASCADE)
    (folder / "log.toml").write_text(mapping())
    _write(folder / "items.parquet", corpus(world))
    _write(folder / "rows" / "all.parquet", _rows(world))


def _write(path: Path, pieces: Iterator[pa.Table]) -> None:
    first = next(pieces)
    with pa.parquet.ParquetWriter(path, first.schema) as file:
        for piece in itertools.chain([first], pieces):
            file.write_table(piece)


def corpus(world: World) -> Iterator[pa.Table]:
    """Every video, ITEMS_PER_PIECE at a time, the most popular first."""
    count = world.settings.videos
    for first in range(0, count, ITEMS_PER_PIECE):
        items = world.videos(np.arange(first, min(first + ITEMS_PER_PIECE, count))[None]).items
        yield pa.table({name: items[name][0] for name in ITEM_COLUMNS})


def _rows(world: World) -> Iterator[pa.Table]:
    """The table: a row a candidate."""
    count = world.settings.videos
    per_request = min(ITEMS_PER_REQUEST, count // 32)  # so that a day of few items still has some batches
    order = np.random.default_rng(0).permutation(count)[: count // per_request * per_request].reshape(-1, per_request)
    step = max(1, ITEMS_PER_PIECE // per_request)
    requests = {name: np.resize(values, len(order)) for name, values in requests_of(world, DAYS[0]).items()}
    requests["request_id"] = 10**9 + np.arange(len(order))
    for first in range(0, len(order), step):
        span = slice(first, first + step)
        yield _table(world, {name: values[span] for name, values in requests.items()}, order[span])
    for number, day in enumerate(DAYS[1:], 1):
        requests = requests_of(world, day)
        rng = np.random.default_rng(number)
        for first in range(0, len(requests["request_id"]), step):
            part = {name: values[first : first + step] for name, values in requests.items()}
            yield _table(world, part, draw_candidates(rng, world.video_law, len(part["request_id"])))


def _table(world: World, requests: Columns, ranks: np.ndarray) -> pa.Table:
    """The rows of requests whose candidates have these popularity ranks [R, C], sorted by what their users like."""
    videos = world.videos(ranks)
    utility = seen_by(TRUTH, videos, world.tastes(requests), requests["request_timestamp"])
    position = np.argsort(np.argsort(-utility, axis=1), axis=1)
    left = np.digitize(position, (LIKED, LIKED + SHOWN)).ravel()
    names = pa.array(["liked", "shown", "retrieved"])
    columns = {name: np.repeat(requests[name], ranks.shape[1]) for name in ("request_id", *REQUEST_IDS)}
    columns["request_timestamp"] = np.repeat(requests["request_timestamp"], ranks.shape[1])
    columns |= {name: videos.items[name].ravel() for name in ITEM_COLUMNS}
    groups = pa.DictionaryArray.from_arrays(left.astype(np.int8), names).dictionary_decode()
    return pa.table({**columns, "left_at": groups})


def raw_requests(world: World, count: int) -> list[dict[str, Any]]:
    """Requests of the last day with histories of HISTORY_LENGTH video ids: of videos drawn by popularity those that the
    user likes best."""
    found = requests_of(world, DAYS[-1])
    rng = np.random.default_rng(world.settings.seed)
    chosen = rng.permutation(len(found["user_id"]))[:count]
    request = {name: found[name][chosen] for name in (*REQUEST_IDS, "request_timestamp")}
    videos = world.videos(draw_candidates(rng, world.video_law, len(chosen)))
    utility = seen_by(TRUTH, videos, world.tastes(request), request["request_timestamp"])
    liked = np.sort(np.argsort(-utility, axis=1)[:, :HISTORY_LENGTH], axis=1)
    histories = np.take_along_axis(videos.items["video_id"], liked, axis=1).tolist()
    columns = {name: values.tolist() for name, values in request.items()}
    return [
        {name: values[number] for name, values in columns.items()} | {"history": history}
        for number, history in enumerate(histories)
    ]
