"""MovieLens-1M's own files -> a long table: one row a movie of a request, a CSV file a day.

    python examples/movielens/make_rows.py --input=ml-1m --output_dir=movielens/rows

A request is 30 consecutive ratings that a user made on one day: the ten best are its ground truth ("liked"), the others
are "rated". Twenty movies that the user had not rated by then are added: ten drawn by how often they were rated on
earlier days ("popular"), ten drawn from the whole catalogue ("random").

The requests are those of --first_day to --last_day, the weeks in which most users rated: a day needs as many requests
as a training step takes, and the last day is tested on. Earlier ratings count as rated and make movies popular.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd

ZONE = "America/Chicago"  # MovieLens is in Minnesota
WINDOW, LIKED, DRAWN = 30, 10, 10


def read(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    text = (folder / name).read_text(encoding="latin-1").replace("::", "\t")  # pandas is fast at one character
    return pd.read_csv(io.StringIO(text), sep="\t", names=columns, dtype=str, quoting=csv.QUOTE_NONE)


def read_movies(folder: Path) -> pd.DataFrame:
    movies = read(folder, "movies.dat", ["MovieID", "Title", "Genres"])
    return movies.assign(Year=movies["Title"].str.extract(r"\((\d{4})\)$")[0]).astype({"MovieID": int})


def read_users(folder: Path) -> pd.DataFrame:
    users = read(folder, "users.dat", ["UserID", "Gender", "Age", "Occupation", "Zip"])
    return users.assign(Zip=users["Zip"].str[:3]).astype({"UserID": int})


def read_ratings(folder: Path, last_day: str) -> pd.DataFrame:
    """All ratings until the end of the last day, by user and time."""
    ratings = read(folder, "ratings.dat", ["UserID", "MovieID", "Rating", "Timestamp"]).astype(int)
    times = pd.to_datetime(ratings["Timestamp"], unit="s", utc=True).dt.tz_convert(ZONE)
    ratings = ratings.assign(Day=times.dt.strftime("%Y-%m-%d"))
    return ratings[ratings["Day"] <= last_day].sort_values(["UserID", "Timestamp"], kind="stable", ignore_index=True)


def cut_into_requests(ratings: pd.DataFrame) -> pd.DataFrame:
    """The ratings of complete windows, with RequestID, the request's time, and Outcome."""
    by_day = ratings.groupby(["UserID", "Day"])["MovieID"]
    number = by_day.cumcount() // WINDOW
    rated = ratings.assign(RatedBefore=ratings.groupby("UserID").cumcount(), Number=number)
    rated = rated[number < by_day.transform("size") // WINDOW]
    window = rated.groupby(["UserID", "Day", "Number"])
    rated = rated.assign(
        RequestID=rated["UserID"].astype(str) + "-" + (window["RatedBefore"].transform("min")).astype(str),
        Seen=window["RatedBefore"].transform("max") + 1,  # how many movies the user has rated by the window's end
        Timestamp=window["Timestamp"].transform("min"),
    )
    order = rated.sort_values(["RequestID", "Rating"], ascending=[True, False], kind="stable")  # equal: early first
    rank = order.groupby("RequestID").cumcount()
    return order.assign(Outcome=np.where(rank < LIKED, "liked", "rated"))


def draw_unrated(requests: pd.DataFrame, ratings: pd.DataFrame, movies: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Twenty rows for each of the ``requests`` (one row each, by day): popular and random movies."""
    catalogue = pd.Index(movies["MovieID"])
    rated_by = {user: catalogue.get_indexer(ids) for user, ids in ratings.groupby("UserID")["MovieID"]}
    times_rated, popularity = np.zeros(len(catalogue)), {}
    for day, ids in ratings.groupby("Day")["MovieID"]:
        popularity[day] = times_rated.copy()  # on earlier days
        np.add.at(times_rated, catalogue.get_indexer(ids), 1)
    rng, drawn = np.random.default_rng(seed), []
    for user, day, seen in requests[["UserID", "Day", "Seen"]].itertuples(index=False):
        # The first to come of clocks that ring at such rates are drawn in proportion to them, none twice.
        waiting, uniform = rng.standard_exponential((2, len(catalogue)))
        waiting /= popularity[day] + 1e-9
        waiting[rated_by[user][:seen]] = uniform[rated_by[user][:seen]] = np.inf
        popular = np.argpartition(waiting, DRAWN)[:DRAWN]
        uniform[popular] = np.inf
        drawn.append(np.concatenate([popular, np.argpartition(uniform, DRAWN)[:DRAWN]]))
    rows = requests.loc[requests.index.repeat(2 * DRAWN)].drop(columns=["Rating", "Outcome", "MovieID"])
    outcome = np.tile(np.repeat(["popular", "random"], DRAWN), len(requests))
    return rows.assign(MovieID=catalogue[np.concatenate(drawn)], Outcome=outcome)


def main() -> None:
    parser = argparse.ArgumentParser(description="MovieLens-1M as a long table of requests and candidates.")
    parser.add_argument("--input", type=Path, required=True, help="folder of ratings.dat, movies.dat and users.dat")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for a CSV file a day")
    parser.add_argument("--first_day", default="2000-11-12")
    parser.add_argument("--last_day", default="2000-12-07")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn movies")
    args = parser.parse_args()
    movies, users = read_movies(args.input), read_users(args.input)
    ratings = read_ratings(args.input, args.last_day)
    rated = cut_into_requests(ratings)
    rated = rated[rated["Day"] >= args.first_day]
    requests = rated.drop_duplicates("RequestID").sort_values(["Timestamp", "RequestID"])
    table = pd.concat([rated, draw_unrated(requests, ratings, movies, args.seed)])
    table = table.merge(users, on="UserID").merge(movies, on="MovieID")
    table = table.sort_values(["Timestamp", "RequestID", "MovieID"])
    columns = ["RequestID", "Timestamp", *users.columns, "MovieID", "Genres", "Year", "Rating", "Outcome"]
    args.output_dir.mkdir(parents=True)
    for day, rows in table.astype({"Rating": "Int64"}).groupby("Day"):
        rows[columns].to_csv(args.output_dir / f"{day}.csv", index=False)


if __name__ == "__main__":
    main()
