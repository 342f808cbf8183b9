"""MovieLens-1M as a full-stage log (``lcron import movielens --help``).

A request is a window of 30 consecutive ratings of one user; what the user thought of them orders rank_pos, rerank_neg
and rank_neg, and movies the user had not rated by the window's end are sampled as coarse_neg and prerank_neg.

Nothing later than a request enters it: its history and its popularity count ratings of strictly earlier seconds only,
its sampled movies depend on its own id and the seed alone. So ratings after a window's end cannot change the request
(:func:`build_requests`); only the split into days looks at all requests.
"""

import argparse
import io
import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from deep_components.cli import Parser, progress, run_command
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.errors import InputError
from deep_components.files import read_bytes

GROUP_SIZE = 10
WINDOW = 3 * GROUP_SIZE  # ratings of one request: rank_pos, rerank_neg, rank_neg
MAX_WINDOW_SECONDS = 7 * 24 * 3600
LIKED = 4  # stars from which a rated movie enters the history
TEST_DAY = recflow.PERIOD_1[-1]
DEFAULT_DAYS = 12
DEFAULT_TEST_SHARE = 0.1535  # of users 1-2999 of the published file: 2,048 of 13,345 requests
UPLOAD_SHIFT_YEARS = 60
FIRST_YEAR, LAST_YEAR = 1971 - UPLOAD_SHIFT_YEARS, 2100  # a shifted upload_timestamp must be positive
MAX_ID = 10_000_000  # embedding tables have a row for every id up to the largest
MAX_TIME = 10**10 - 1  # in seconds the year 2286; a larger value is in milliseconds
MAX_OCCUPATION = 20
MAX_SEED = 2**63 - 1

_SEPARATOR = b"\x1f"  # stands for `::`, as pandas splits fast only at one byte
_UNRATED_LAST = 1e6  # far above any Exp(1) draw: never-rated movies come after all rated ones

# Of every file its fields: an integer's range, or a regular expression and what it asks for.
Rule = tuple[int, int] | tuple[str, str]
USER_FIELDS: dict[str, Rule] = {
    "UserID": (1, MAX_ID),
    "Gender": ("[FM]", "F or M"),
    "Age": (0, 120),
    "Occupation": (0, MAX_OCCUPATION),
    "Zip-code": (r".*\S.*", "a zip code"),
}
MOVIE_FIELDS: dict[str, Rule] = {
    "MovieID": (1, MAX_ID),
    "Title": (r".*\([0-9]{4}\)\s*", "a title that ends in its year, such as (1995)"),
    "Genres": (r"[^|]*[^|\s][^|]*(\|[^|]*[^|\s][^|]*)*", "genres separated by |"),
}
RATING_FIELDS: dict[str, Rule] = {
    "UserID": (1, MAX_ID),
    "MovieID": (1, MAX_ID),
    "Rating": (1, 5),
    "Timestamp": (1, MAX_TIME),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A row per user or movie, in file order: ``ids`` as published (UserID, MovieID), ``fields`` of the log, int64, and
    of each id field the number of ids."""

    ids: pd.Index
    fields: pd.DataFrame
    counts: dict[str, int]


@dataclass(frozen=True)
class Requests:
    """R requests; users and movies are row numbers of users.dat and movies.dat, times are seconds.

    ``request_id``, ``user``, ``time`` (of the window's first rating) and ``end`` (of its last) are [R]; ``rated``
    [R, 30] is the window, best first; ``coarse_neg`` and ``prerank_neg`` are [R, 10]; ``history`` and ``history_time``
    are [R, 50], oldest first, -1 and 0 where the history is shorter.
    """

    request_id: np.ndarray
    user: np.ndarray
    time: np.ndarray
    end: np.ndarray
    rated: np.ndarray
    coarse_neg: np.ndarray
    prerank_neg: np.ndarray
    history: np.ndarray
    history_time: np.ndarray

    def __len__(self) -> int:
        return len(self.request_id)

    def take(self, rows: np.ndarray) -> "Requests":
        return Requests(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


# ---- reading the published files -------------------------------------------------------------------------------------


def read_users(path: Path) -> Encoded:
    """Read users.dat (``UserID::Gender::Age::Occupation::Zip-code``)."""
    table = _read(path, USER_FIELDS)
    _require(path, table["UserID"], ~table["UserID"].duplicated(), "new, an earlier line has it")
    columns = {
        "user_id": table["UserID"] - 1,
        "device_id": _codes(table["Zip-code"]),
        "age": _codes(table["Age"]),
        "gender": table["Gender"] == "M",
        "province": table["Occupation"],
    }
    return _encode(table["UserID"], columns, {"gender": 2, "province": MAX_OCCUPATION + 1})


def read_movies(path: Path) -> Encoded:
    """Read movies.dat (``MovieID::Title (year)::Genre|Genre``)."""
    table = _read(path, MOVIE_FIELDS)
    _require(path, table["MovieID"], ~table["MovieID"].duplicated(), "new, an earlier line has it")
    year = table["Title"].str.extract(r"\(([0-9]{4})\)\s*$", expand=False).astype("int64")
    _require(path, table["Title"], year.between(FIRST_YEAR, LAST_YEAR), f"of a year {FIRST_YEAR} to {LAST_YEAR}")
    first_genre = _codes(table["Genres"].str.split("|").str[0])
    new_year = (year.to_numpy() + UPLOAD_SHIFT_YEARS - 1970).astype("datetime64[Y]")
    columns = {
        "video_id": np.arange(len(table)),
        "author_id": _codes(year),
        "duration": 0,  # MovieLens has none, nor effective_view
        "category_level_two": _codes(table["Genres"]),
        "upload_type": _codes(year // 10),
        "upload_timestamp": new_year.astype("datetime64[s]").astype("int64"),
        "category_level_one": first_genre + (first_genre >= recflow.CATEGORY_ONE_PADDING),
        "effective_view": 0,
    }
    return _encode(table["MovieID"], columns, {})


def read_ratings(path: Path, user_ids: pd.Index, movie_ids: pd.Index) -> pd.DataFrame:
    """Read ratings.dat (``UserID::MovieID::Rating::Timestamp``), in file order: int64 columns user and movie (row
    numbers of users.dat and movies.dat), stars and time (seconds)."""
    table = _read(path, RATING_FIELDS)
    user, movie = user_ids.get_indexer(pd.Index(table["UserID"])), movie_ids.get_indexer(pd.Index(table["MovieID"]))
    _require(path, table["UserID"], user >= 0, "in users.dat")
    _require(path, table["MovieID"], movie >= 0, "in movies.dat")
    again = table.duplicated(["UserID", "MovieID"])
    _require(path, table["MovieID"], ~again, "new to this user, who rated it on an earlier line")
    columns = {"user": user, "movie": movie, "stars": table["Rating"], "time": table["Timestamp"]}
    return pd.DataFrame(columns).astype("int64")


def _read(path: Path, rules: dict[str, Rule]) -> pd.DataFrame:
    """The file's fields, int64 or text, every one as its rule wants it."""
    try:
        data = read_bytes(path).replace(b"::", _SEPARATOR)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); unpack ml-1m.zip of grouplens.org there"
        ) from None
    if not data.strip():
        raise InputError(f"{path}: is empty; unpack ml-1m.zip of grouplens.org there")
    for number, line in enumerate(data.splitlines(), start=1):
        if line.count(_SEPARATOR) != len(rules) - 1 or b"\0" in line:
            raise InputError(
                f"{path}: line {number}: has {line.count(_SEPARATOR) + 1} fields or a zero byte, not the {len(rules)} "
                f"fields {'::'.join(rules)}; correct the line or unpack ml-1m.zip again"
            )
    table = pd.read_csv(
        io.BytesIO(data),
        sep=_SEPARATOR.decode(),
        names=list(rules),
        dtype=str,
        encoding="latin-1",
        quoting=3,  # csv.QUOTE_NONE
        na_filter=False,
        skip_blank_lines=False,
    )
    for field, rule in rules.items():
        if isinstance(rule[0], str):
            _require(path, table[field], table[field].str.fullmatch(rule[0]), str(rule[1]))
            continue
        low, high = rule
        digits = table[field].str.fullmatch("[0-9]{1,18}")  # such a number fits int64
        numbers = table[field].where(digits, "-1").astype("int64")
        _require(path, table[field], numbers.between(low, high), f"an integer from {low} to {high}")
        table[field] = numbers
    return table


def _require(path: Path, column: pd.Series, good: pd.Series | np.ndarray, expected: str) -> None:
    """Refuse the first line whose value is not ``good``."""
    bad = ~np.asarray(good, bool)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}: line {row + 1}: field {column.name} is '{column.iloc[row]}', not {expected}; correct the line or "
            "unpack ml-1m.zip again"
        )


def _codes(values: pd.Series) -> np.ndarray:
    """Each value's number among the distinct ones, which are sorted."""
    return pd.factorize(values, sort=True)[0]


def _encode(ids: pd.Series, columns: dict, counts: dict[str, int]) -> Encoded:
    """``counts`` of the fields whose number of ids is not the largest one plus 1."""
    table = pd.DataFrame(columns).astype("int64")
    return Encoded(pd.Index(ids), table, {str(name): int(values.max()) + 1 for name, values in table.items()} | counts)


# ---- building requests -----------------------------------------------------------------------------------------------


def build_requests(ratings: pd.DataFrame, num_movies: int, seed: int) -> Requests:
    """All requests that the ratings (of :func:`read_ratings`) make, by (time, user, window).

    An incomplete window makes none, nor does one of more than MAX_WINDOW_SECONDS. A request is the same whatever
    ratings there are after its window's end, its id included.
    """
    ratings = ratings.sort_values(["user", "time"], kind="stable")  # equal seconds stay in file order
    by_user = ratings.groupby("user")["user"]
    window = by_user.cumcount() // WINDOW
    complete = ratings.assign(window=window)[window < by_user.transform("size") // WINDOW]
    windows = {str(name): values.to_numpy().reshape(-1, WINDOW) for name, values in complete.items()}
    kept = np.flatnonzero(windows["time"][:, -1] - windows["time"][:, 0] <= MAX_WINDOW_SECONDS)
    kept = kept[np.argsort(windows["time"][kept, 0], kind="stable")]
    windows = {name: values[kept] for name, values in windows.items()}
    user, time, end = windows["user"][:, 0], windows["time"][:, 0], windows["time"][:, -1]
    # The id depends on nothing later: the user, the number of the window, and a bound on windows per user.
    request_id = 1 + user * (num_movies // WINDOW + 1) + windows["window"][:, 0]
    history, history_time = _histories(ratings[ratings["stars"] >= LIKED], user, time)
    rated_rows = _rows_before(ratings, user, end + 1)  # the window's last second counts as rated
    negatives = _sample_negatives(ratings, request_id, time, rated_rows, num_movies, seed)
    best_first = np.argsort(-windows["stars"], axis=1, kind="stable")  # equal ratings stay in order of time
    return Requests(
        request_id=request_id,
        user=user,
        time=time,
        end=end,
        rated=np.take_along_axis(windows["movie"], best_first, axis=1),
        coarse_neg=negatives[:, 0],
        prerank_neg=negatives[:, 1],
        history=history,
        history_time=history_time,
    )


def _rows_before(ratings: pd.DataFrame, user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """First and last + 1 row of the users' ratings of seconds below ``time``, in ratings by (user, time): [R, 2]."""
    period = MAX_TIME + 2  # user and time in one sortable number: below 1e7 * 1e10
    keys = (ratings["user"] * period + ratings["time"]).to_numpy()
    return np.searchsorted(keys, user[:, None] * period + np.stack([np.zeros_like(time), time], axis=1))


def _histories(liked: pd.DataFrame, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last movies that the user liked strictly before ``time``, and when: [R, 50], left-padded with -1 and 0."""
    begin, end = np.hsplit(_rows_before(liked, user, time), 2)
    rows = end - np.arange(recflow.HISTORY_LENGTH, 0, -1)
    valid = rows >= begin
    movies, times = np.full(rows.shape, -1, np.int64), np.zeros(rows.shape, np.int64)
    movies[valid], times[valid] = liked[["movie", "time"]].to_numpy()[rows[valid]].T
    return movies, times


def _sample_negatives(
    ratings: pd.DataFrame, request_id: np.ndarray, time: np.ndarray, rated_rows: np.ndarray, num_movies: int, seed: int
) -> np.ndarray:
    """coarse_neg and prerank_neg, [R, 2, 10], of requests in order of time; ``rated_rows`` [R, 2]: first and last + 1
    row of what the user has rated."""
    by_time = ratings.sort_values("time")
    num_earlier = np.searchsorted(by_time["time"], time)  # ratings strictly before the request
    movie, movie_by_time = ratings["movie"].to_numpy(), by_time["movie"].to_numpy()
    popularity, counted = np.zeros(num_movies, np.int64), 0
    drawn = np.empty((len(time), 2, GROUP_SIZE), np.int64)
    for row in progress(range(len(time)), "sampling", "request"):
        popularity += np.bincount(movie_by_time[counted : num_earlier[row]], minlength=num_movies)
        counted = num_earlier[row]
        rated = movie[slice(*rated_rows[row])]
        if num_movies - len(rated) < 2 * GROUP_SIZE:
            raise InputError(
                f"movies.dat: has {num_movies} movies, of which some user leaves fewer than the {2 * GROUP_SIZE} "
                "unrated that a request needs; give the whole catalogue"
            )
        drawn[row] = _draw(popularity, rated, seed, int(request_id[row]))
    return drawn


def _draw(popularity: np.ndarray, rated: np.ndarray, seed: int, request_id: int) -> tuple[np.ndarray, np.ndarray]:
    """coarse_neg with probability proportional to popularity, prerank_neg uniformly; neither rated, nor both.

    The k smallest of E_m / weight_m, E_m ~ Exp(1), are k draws without replacement with probability proportional to
    weight (the Gumbel top-k trick in another guise). Movies of weight 0 come last, in uniform order.
    """
    stream = np.random.Philox(key=np.array([seed, request_id], np.uint64))  # every request has its own
    by_popularity, uniform = np.random.Generator(stream).standard_exponential((2, len(popularity)))
    arrival = np.where(popularity > 0, by_popularity / np.maximum(popularity, 1), _UNRATED_LAST + by_popularity)
    arrival[rated] = uniform[rated] = np.inf
    coarse_neg = _smallest(arrival)
    uniform[coarse_neg] = np.inf
    return coarse_neg, _smallest(uniform)


def _smallest(values: np.ndarray) -> np.ndarray:
    """Indices of the GROUP_SIZE smallest values, ascending."""
    smallest = np.argpartition(values, GROUP_SIZE - 1)[:GROUP_SIZE]
    return smallest[np.argsort(values[smallest])]


# ---- days, and the log -----------------------------------------------------------------------------------------------


def split_days(requests: Requests, num_days: int, test_share: float) -> dict[str, Requests]:
    """Cut requests, which are in order of time, into ``num_days - 1`` training days of equal size and the test day.

    The test day is the last ``test_share`` of the requests. A training request whose window reaches its first second
    is dropped: its ratings would tell of the test period.
    """
    first_test = len(requests) - max(round(len(requests) * test_share), 1)
    training = np.flatnonzero(requests.end[:first_test] < requests.time[first_test]) if first_test > 0 else np.arange(0)
    if len(training) < num_days - 1:
        raise InputError(
            f"ratings.dat: makes {len(training)} training requests of {WINDOW} ratings, too few for --days={num_days} "
            f"and --test_share={test_share}; lower one of them or give more ratings"
        )
    parts = np.array_split(training, num_days - 1)
    days = {day: requests.take(rows) for day, rows in zip(recflow.PERIOD_1, parts, strict=False)}
    return days | {TEST_DAY: requests.take(np.arange(first_test, len(requests)))}


def day_log(requests: Requests, users: Encoded, movies: Encoded) -> recflow.DayLog:
    """The requests with the fields of their users and movies, as RecFlow has them."""
    items = movies.fields[list(recflow.ITEM_COLUMNS)].to_numpy()
    rank_pos, rerank_neg, rank_neg = np.split(items[requests.rated], 3, axis=1)
    of_user = {str(name): values.to_numpy()[requests.user] for name, values in users.fields.items()}
    # MovieLens has no duration, playing time or request of a past view: they are 0, as padding is.
    columns = {str(name): values.to_numpy()[requests.history] for name, values in movies.fields.items()}
    columns["request_timestamp"] = requests.history_time * 1000
    nothing = np.zeros_like(requests.history)
    history = np.stack([columns.get(name, nothing) for name in recflow.HISTORY_COLUMNS], axis=2)
    history[requests.history < 0] = 0
    return recflow.DayLog(
        request={"request_id": requests.request_id, "request_timestamp": requests.time * 1000, **of_user},
        groups={
            "rank_pos": rank_pos,
            "rank_neg": rank_neg,
            "coarse_neg": items[requests.coarse_neg],
            "prerank_neg": items[requests.prerank_neg],
            "rerank_pos": rank_pos,
            "rerank_neg": rerank_neg,
        },
        rank_index=np.tile(np.arange(1, GROUP_SIZE + 1), (len(requests), 1)),
        rerank_index=np.tile(np.arange(1, 2 * GROUP_SIZE + 1), (len(requests), 1)),
        history=history,
    )


def _check_arguments(output_dir: Path, num_days: int, test_share: float, seed: int) -> None:
    if not 2 <= num_days <= len(recflow.PERIOD_1):
        raise InputError(
            f"--days={num_days}: must be from 2 to {len(recflow.PERIOD_1)}, the test day included; give fewer days"
        )
    if not 0 < test_share < 1:
        raise InputError(f"--test_share={test_share}: must be between 0 and 1; give the share of the last requests")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"--seed={seed}: must be from 0 to {MAX_SEED}; give a small positive integer")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is not a folder; name a new folder")
    # Day files of another log would silently become part of this one.
    for folder in {path.parent for path in (*recflow.day_paths(output_dir, "any"), recflow.id_count_path(output_dir))}:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"--output_dir={output_dir}: {folder} is not empty; empty it or name a new folder")


def convert(input_dir: Path, output_dir: Path, num_days: int, test_share: float, seed: int) -> None:
    """Write the MovieLens-1M in ``input_dir`` under ``output_dir`` in RecFlow's layout, origin.json last."""
    _check_arguments(output_dir, num_days, test_share, seed)
    users, movies = read_users(input_dir / "users.dat"), read_movies(input_dir / "movies.dat")
    ratings = read_ratings(input_dir / "ratings.dat", users.ids, movies.ids)
    days = split_days(build_requests(ratings, len(movies.ids), seed), num_days, test_share)
    for day, requests in progress(days.items(), "writing", "day"):
        recflow.write_day(output_dir, day, day_log(requests, users, movies))
    recflow.write_id_counts(output_dir, users.counts | movies.counts)
    num_test = len(days[TEST_DAY])
    num_training = sum(map(len, days.values())) - num_test
    note = (
        f"Genuine MovieLens-1M ratings of {ratings['user'].nunique()} users, cut into {num_training} training and "
        f"{num_test} test requests; coarse_neg and prerank_neg are sampled. Written by the importer of MovieLens; the "
        "data's own terms of use apply."
    )
    arguments = {"input": str(input_dir), "output_dir": str(output_dir), "days": num_days, "test_share": test_share}
    recflow.write_origin(output_dir, {"data": "movielens-1m", "note": note, "seed": seed, **arguments})
    logger.info("%s: %d training and %d test requests, %d days", output_dir, num_training, num_test, num_days)


def main(argv: list[str]) -> None:
    parser = Parser(
        description="Convert MovieLens-1M as published into a log in RecFlow's layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of users.dat, movies.dat and ratings.dat")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the log; it must not hold one yet")
    parser.add_argument("--days", type=int, default=DEFAULT_DAYS, help="days, the test day included")
    parser.add_argument(
        "--test_share", type=float, default=DEFAULT_TEST_SHARE, help="share of the requests, the last ones, to test on"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled movies")
    args = parser.parse_args(argv)
    convert(args.input, args.output_dir, args.days, args.test_share, args.seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
