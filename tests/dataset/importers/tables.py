"""A small table of requests and candidates, its mapping, and a log of it as pandas and loops would make it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

ORDER = ("bought", "shown", "ranked", "retrieved")
LENGTH = 4  # of a history
GENRES = 2  # of an item at the most
FIRST_SECOND = 1_704_067_200  # 2024-01-01 UTC
ZONE = "Asia/Shanghai"
MAPPING = f"""
[rows]
path = "rows"
request = "query"
item = "product"
time = "ts"
time_unit = "s"
time_zone = "{ZONE}"
user = "customer"

[groups]
order = ["bought", "shown", "ranked", "retrieved"]
column = "left_at"
label = "gain"

[history]
length = {LENGTH}
derive = ["item", "genres"]

[[fields]]
name = "user"
column = "customer"
side = "request"
kind = "id"

[[fields]]
name = "when"
side = "request"
kind = "time"
parts = ["weekday", "hour"]

[[fields]]
name = "item"
column = "product"
side = "item"
kind = "id"
type = "integer"
min_count = 4

[[fields]]
name = "brand"
column = "brand"
side = "item"
kind = "id"

[[fields]]
name = "genres"
column = "genres"
side = "item"
kind = "id"
length = {GENRES}
separator = "|"

[[fields]]
name = "price"
column = "price"
side = "item"
kind = "number"

[[fields]]
name = "stock"
column = "stock"
side = "item"
kind = "number"
scale = "quantile"
buckets = 4
"""


def table(requests: int = 200, seed: int = 0) -> pd.DataFrame:
    """Rows of four days, the rows of a request together."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(requests):
        # Days begin at 16:00 UTC; few seconds, so that requests of one user share some.
        second = FIRST_SECOND + 57_600 + int(rng.integers(0, 4)) * 86_400 + int(rng.integers(0, 40)) * 1800
        for product in rng.choice(60, rng.integers(1, 9), replace=False):
            genres = [f"g{genre}" for genre in rng.integers(0, 5, rng.integers(0, 4))]
            rows.append(
                {
                    "query": f"q{number}",
                    "ts": second,
                    "customer": f"c{number % 11}",
                    "product": int(product),
                    "brand": None if product % 17 == 0 else f"b{product % 7}",
                    "genres": "|".join(genres),
                    "price": None if rng.random() < 0.15 else float(np.round(rng.lognormal(2, 1), 3)),
                    "stock": int(rng.integers(0, 30)),
                    "left_at": ORDER[int(rng.choice(4, p=[0.25, 0.25, 0.25, 0.25]))],
                    "gain": int(rng.integers(1, 4)),
                }
            )
    return pd.DataFrame(rows)


def write(folder: Path, rows: pd.DataFrame, mapping: str = MAPPING, files: int = 1, kind: str = "parquet") -> Path:
    """The table in so many files, and its mapping; the path of that."""
    (folder / "rows").mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        some = rows.iloc[part]
        path = folder / "rows" / f"part-{number}.{kind}"
        if kind == "csv":
            some.to_csv(path, index=False)
        elif kind == "feather":
            pa.feather.write_feather(pa.Table.from_pandas(some, preserve_index=False), path, chunksize=50)
        else:
            pa.parquet.write_table(pa.Table.from_pandas(some, preserve_index=False), path, row_group_size=70)
    (folder / "log.toml").write_text(mapping)
    return folder / "log.toml"


def contents(folder: Path) -> dict[str, bytes]:
    """File -> bytes of a log."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def columns(folder: Path, day: str) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in (folder / day).glob("*.npy") if not path.name.startswith("ids.")}


def encoding(folder: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads((folder / "encoding" / "encoding.json").read_text())
    return content


# ---- the same, slowly ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request as the log should have it: values, not indices; None stands for the unknown row."""

    day: str
    weekday: int
    hour: int
    user: str
    items: dict[int, dict[str, Any]]  # product -> its fields, group and label
    history: list[tuple[int, list[str]]]  # the latest last: product and genres


def requests_of(rows: pd.DataFrame) -> dict[str, Request]:
    """Requests with ground truth and two items, by id."""
    events = [
        (row.customer, row.ts, row.query, row.gain, row.product, row.genres)
        for row in rows.itertuples()
        if row.left_at == "bought"
    ]
    made = {}
    for query, some in rows.groupby("query"):
        if len(some) < 2 or not (some.left_at == "bought").any():
            continue
        first = some.iloc[0]
        local = datetime.fromtimestamp(int(first.ts), UTC).astimezone(ZoneInfo(ZONE))
        gains = sorted(set(some.gain[some.left_at == "bought"]))
        items = {}
        for row in some.itertuples():
            group = ORDER.index(row.left_at)
            label = 3 - group + (gains.index(row.gain) if group == 0 else 0)
            items[row.product] = {
                "group": group,
                "label": label,
                "brand": None if row.brand is None or row.brand != row.brand else row.brand,
                "genres": _genres(row.genres),
                "price": row.price,
                "stock": row.stock,
            }
        earlier = [event for event in events if event[0] == first.customer and event[1] < first.ts]
        made[str(query)] = Request(
            str(local.date()),
            local.weekday(),
            local.hour,
            first.customer,
            items,
            [(event[4], _genres(event[5])) for event in sorted(earlier, key=lambda event: event[1])],
        )
    return made


def _genres(text: str) -> list[str]:
    return text.split("|")[:GENRES] if text else []
