"""A shop's log, made up: one row a candidate of a request, a Parquet folder per day.

    python examples/shop/make_rows.py --output_dir=shop/rows

Every user likes some brands and a price level, and some items are liked by all. The shop's own cascade of four stages
guessed this with less and less noise: of 20 to 60 retrieved items pre-ranking kept 60 %, ranking half of those, eight
were shown, and the user bought one to four of them. Prices and stocks are partly unknown, as in a real catalogue.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS, BRANDS, SHOPS, TASTES = 400, 1200, 30, 60, 6
SHOWN = 8
FIRST_DAY = "2025-03-03"
STAGES = ("retrieved", "preranked", "ranked", "shown", "bought")


def make_items(rng: np.random.Generator) -> pd.DataFrame:
    """The catalogue; `appeal` and `level` (of the price) are what nobody logs."""
    level = rng.normal(size=ITEMS)
    brand = rng.integers(BRANDS, size=ITEMS)
    return pd.DataFrame(
        {
            "item": [f"sku-{number:05d}" for number in rng.choice(100_000, ITEMS, replace=False)],
            "brand": brand,
            "shop": (brand * 2 + rng.integers(6, size=ITEMS)) % SHOPS,
            "price": np.where(rng.random(ITEMS) < 0.08, np.nan, (30 * np.exp(0.8 * level)).round(2)),
            "level": level,
            "appeal": rng.normal(scale=0.8, size=ITEMS),
        }
    )


def make_tastes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How much each user likes each brand, [USERS, BRANDS], and the price level each one looks for, [USERS]."""
    taste = rng.integers(TASTES, size=USERS)
    of_taste = taste[:, None] == np.arange(BRANDS) % TASTES
    favourite = of_taste & (rng.random((USERS, BRANDS)) < 0.5)
    return 1.2 * of_taste + 1.2 * favourite, rng.normal(size=USERS)


def where_they_left(utility: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The index in STAGES of the last stage that each candidate reached, by the shop's own, noisy cascade."""
    alive = np.arange(len(utility))
    left_at = np.zeros(len(utility), int)
    keep = (int(0.6 * len(alive)), int(0.3 * len(alive)), min(SHOWN, len(alive) // 3))
    for stage, (number, noise) in enumerate(zip(keep, (1.5, 1.0, 0.7), strict=True), start=1):
        seen = utility[alive] + noise * rng.normal(size=len(alive))
        alive = alive[np.argsort(-seen)[:number]]
        left_at[alive] = stage
    wanted = utility[alive] + 0.5 * rng.gumbel(size=len(alive))
    left_at[alive[np.argsort(-wanted)[: rng.integers(1, 5)]]] = STAGES.index("bought")
    return left_at


def make_day(
    day: pd.Timestamp,
    requests: int,
    items: pd.DataFrame,
    tastes: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """All candidates of a day's requests, in order of time."""
    likes, wanted_level = tastes
    brand, level, appeal = (items[name].to_numpy() for name in ("brand", "level", "appeal"))
    stock = np.where(rng.random(ITEMS) < 0.15, np.nan, rng.poisson(3, ITEMS) * rng.integers(1, 20, ITEMS))
    often = np.exp(0.5 * appeal) / np.exp(0.5 * appeal).sum()
    user = rng.integers(USERS, size=requests)
    candidates = [rng.choice(ITEMS, size, replace=False, p=often) for size in rng.integers(20, 61, requests)]
    left_at = []
    for one, rows in zip(user, candidates, strict=True):
        utility = likes[one, brand[rows]] - 0.5 * (level[rows] - wanted_level[one]) ** 2 + appeal[rows]
        left_at.append(where_they_left(utility - 2.0 * (stock[rows] == 0), rng))
    request = np.repeat(np.arange(requests), [len(rows) for rows in candidates])
    row = np.concatenate(candidates)
    seconds = np.sort(rng.integers(6 * 3600, 24 * 3600, requests))
    return pd.DataFrame(
        {
            "request": [f"{day:%m%d}-{number:05d}" for number in request],
            "time": day + pd.to_timedelta(seconds, unit="s")[request],
            "user": [f"user-{number:03d}" for number in user[request]],
            "device": np.where(rng.random(requests) < 0.7, "app", "web")[request],
            "item": items["item"].to_numpy()[row],
            "brand": [f"brand-{number:02d}" for number in brand[row]],
            "shop": [f"shop-{number:02d}" for number in items["shop"].to_numpy()[row]],
            "price": items["price"].to_numpy()[row],
            "stock": pd.array(stock[row], dtype="Int64"),
            "left_at": np.array(STAGES)[np.concatenate(left_at)],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make up a shop's log.")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the days")
    parser.add_argument("--days", type=int, default=8)
    parser.add_argument("--requests", type=int, default=600, help="a day")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    items, tastes = make_items(rng), make_tastes(rng)
    for day in pd.date_range(FIRST_DAY, periods=args.days, tz="Europe/Berlin"):
        folder = args.output_dir / f"day={day:%Y-%m-%d}"
        folder.mkdir(parents=True)
        make_day(day, args.requests, items, tastes, rng).to_parquet(folder / "part-0.parquet", index=False)


if __name__ == "__main__":
    main()
