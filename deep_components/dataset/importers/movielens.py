"""MovieLens-1M as a full-stage log (``python -m deep_components.dataset.importers.movielens --help``).

A request is a window of 30 consecutive ratings of one user; what the user thought of them orders rank_pos, rerank_neg
and rank_neg, and movies the user had not rated by the window's end are sampled as coarse_neg and prerank_neg.

Nothing later than a request enters it: its history and its popularity count ratings of strictly earlier seconds only,
its sampled movies depend on its own id and the seed alone. So ratings after a window's end cannot change the request
(:func:`build_requests`); only the split into days looks at all requests.
"""

import argparse
import datetime
import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from deep_components.cli import progress, run_command
from deep_components.dataset.importers.recflow_files import (
    GROUP_NAMES,
    HISTORY_COLUMNS,
    HISTORY_LENGTH,
    ITEM_COLUMNS,
    DayLog,
    feather_path,
    history_path,
    id_count_path,
    request_path,
    write_day,
    write_id_counts,
    write_origin,
)
from deep_components.errors import InputError

GROUP_SIZE = 10
WINDOW = 3 * GROUP_SIZE  # ratings of one request: rank_pos, rerank_neg, rank_neg
MAX_WINDOW_SECONDS = 7 * 24 * 3600
LIKED = 4  # stars from which a rated movie enters the history
FIRST_DAY = datetime.date(2024, 1, 13)
TEST_DAY = datetime.date(2024, 2, 4)
MAX_DAYS = (TEST_DAY - FIRST_DAY).days + 1
DEFAULT_DAYS = 12
DEFAULT_TEST_SHARE = 0.1535  # of users 1-2999 of the published file: 2,048 of 13,345 requests
CATEGORY_PADDING = 2  # category_level_one is not shifted by its readers; they take id 2 for a missing item
UPLOAD_SHIFT_YEARS = 60

_REMEDY = "correct the line or unpack ml-1m.zip again"
_UNPACK = "unpack ml-1m.zip of grouplens.org there"
_YEAR = re.compile(r"\((\d{4})\)\s*$", re.ASCII)
_YEARS = (1971 - UPLOAD_SHIFT_YEARS, 2100)  # a shifted upload_timestamp must be positive
_DIGITS = re.compile(r"\d{1,18}", re.ASCII)  # such a number fits int64
_MAX_ID = 10_000_000  # embedding tables have a row for every id up to the largest
_MAX_TIME = 10**10 - 1  # in seconds the year 2286; a larger value is in milliseconds
_MAX_AGE = 120
_MAX_OCCUPATION = 20
_MAX_SEED = 2**63 - 1
_GENDERS = ("F", "M")
_USER_FIELDS = ("UserID", "Gender", "Age", "Occupation", "Zip-code")
_MOVIE_FIELDS = ("MovieID", "Title", "Genres")
_RATING_FIELDS = {"UserID": (1, _MAX_ID), "MovieID": (1, _MAX_ID), "Rating": (1, 5), "Timestamp": (1, _MAX_TIME)}
_CHUNK = 256  # requests sampled at once: a few arrays of [chunk, movies]
_UNRATED_LAST = 1e6  # far above any Exp(1) draw: never-rated movies come after all rated ones

_NOTE = (
    "Genuine MovieLens-1M ratings of {users} users, cut into {training} training and {test} test requests; coarse_neg "
    "and prerank_neg are sampled. Written by the importer of MovieLens; the data's own terms of use apply."
)

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Users:
    """users.dat, in file order: ``ids`` (UserID) [U]; ``features``: the user's part of recflow.REQUEST_COLUMNS, each
    [U]; ``counts``: number of ids per field."""

    ids: np.ndarray
    features: Mapping[str, np.ndarray]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Catalogue:
    """movies.dat, in file order: ``ids`` (MovieID) [M], ``items`` [M, 8] (ITEM_COLUMNS), number of ids per field."""

    ids: np.ndarray
    items: np.ndarray
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Ratings:
    """Ratings, all arrays int64 [n]. ``user`` and ``movie`` are positions in Users and Catalogue; time in seconds."""

    user: np.ndarray
    movie: np.ndarray
    stars: np.ndarray
    time: np.ndarray

    def take(self, rows: np.ndarray) -> "Ratings":
        return Ratings(self.user[rows], self.movie[rows], self.stars[rows], self.time[rows])


@dataclass(frozen=True)
class Requests:
    """R requests; users and movies are positions in Users and Catalogue, times are seconds.

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


# ---------------------------------------------------------------------------------------------------------------------
# Reading the published files
# ---------------------------------------------------------------------------------------------------------------------


def read_users(path: Path) -> Users:
    """Read users.dat (``UserID::Gender::Age::Occupation::Zip-code``)."""
    rows = _read_rows(path, _USER_FIELDS)
    columns = dict(zip(_USER_FIELDS, zip(*rows, strict=True), strict=True))
    ids = _integers(path, "UserID", columns["UserID"], 1, _MAX_ID)
    _refuse_repeated(path, "UserID", ids)
    for line, gender in enumerate(columns["Gender"], start=1):
        if gender not in _GENDERS:
            raise _bad_field(path, line, "Gender", gender, "F or M")
    ages = _integers(path, "Age", columns["Age"], 0, _MAX_AGE)
    for line, zip_code in enumerate(columns["Zip-code"], start=1):
        if not zip_code.strip():
            raise _bad_field(path, line, "Zip-code", zip_code, "a zip code")
    zip_codes, device = np.unique(np.array(columns["Zip-code"]), return_inverse=True)
    age_codes, age = np.unique(ages, return_inverse=True)
    features = {
        "user_id": ids - 1,
        "device_id": device.astype(np.int64),
        "age": age.astype(np.int64),
        "gender": np.array([_GENDERS.index(gender) for gender in columns["Gender"]], np.int64),
        "province": _integers(path, "Occupation", columns["Occupation"], 0, _MAX_OCCUPATION),
    }
    counts = {
        "user_id": int(ids.max()),
        "device_id": len(zip_codes),
        "age": len(age_codes),
        "gender": len(_GENDERS),
        "province": _MAX_OCCUPATION + 1,
    }
    return Users(ids, features, counts)


def read_movies(path: Path) -> Catalogue:
    """Read movies.dat (``MovieID::Title (year)::Genre|Genre``)."""
    rows = _read_rows(path, _MOVIE_FIELDS)
    texts, titles, genres = zip(*rows, strict=True)
    ids = _integers(path, "MovieID", texts, 1, _MAX_ID)
    _refuse_repeated(path, "MovieID", ids)
    years = _release_years(path, titles)
    for line, combination in enumerate(genres, start=1):
        if not all(genre.strip() for genre in combination.split("|")):
            raise _bad_field(path, line, "Genres", combination, "genres separated by |")
    year_values, author = np.unique(years, return_inverse=True)
    decades, upload_type = np.unique(years // 10, return_inverse=True)
    combinations, category_two = np.unique(np.array(genres), return_inverse=True)
    category_one, num_category_one = _first_genres(genres)
    values = {
        "video_id": np.arange(len(ids)),
        "author_id": author,
        "category_level_two": category_two,
        "upload_type": upload_type,
        "upload_timestamp": _shifted_new_year(years),
        "category_level_one": category_one,
    }
    nothing = np.zeros(len(ids), np.int64)  # MovieLens has no duration and no effective_view
    items = np.stack([values.get(column, nothing) for column in ITEM_COLUMNS], axis=1).astype(np.int64)
    counts = {
        "video_id": len(ids),
        "author_id": len(year_values),
        "category_level_one": num_category_one,
        "category_level_two": len(combinations),
        "upload_type": len(decades),
    }
    return Catalogue(ids, items, counts)


def read_ratings(path: Path, user_ids: np.ndarray, movie_ids: np.ndarray) -> Ratings:
    """Read ratings.dat (``UserID::MovieID::Rating::Timestamp``), in file order."""
    columns = _read_rating_columns(path)
    for (field, (low, high)), values in zip(_RATING_FIELDS.items(), columns, strict=True):
        _refuse(path, field, values, (values < low) | (values > high), _integer_from(low, high))
    user_id, movie_id, stars, time = columns
    user, movie = _positions(user_ids, user_id), _positions(movie_ids, movie_id)
    _refuse(path, "UserID", user_id, user < 0, "in users.dat")
    _refuse(path, "MovieID", movie_id, movie < 0, "in movies.dat")
    repeated = _repeats(user * len(movie_ids) + movie)
    if len(repeated):
        first = int(repeated[0])
        raise InputError(
            f"{path}: line {first + 1}: field MovieID is '{movie_id[first]}', which user {user_id[first]} rated on an "
            f"earlier line; keep one rating per user and movie"
        )
    return Ratings(user, movie, stars, time)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_UNPACK}") from error
    if not data.strip():
        raise InputError(f"{path}: is empty; {_UNPACK}")
    return data


def _split_rows(path: Path, data: bytes, names: Sequence[str]) -> list[list[str]]:
    # Lines are split as bytes: str.splitlines would also split at characters that latin-1 titles may hold.
    rows = [line.decode("latin-1").split("::") for line in data.splitlines()]
    for line, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise InputError(
                f"{path}: line {line}: has {len(row)} fields, not the {len(names)} of {'::'.join(names)}; {_REMEDY}"
            )
    return rows


def _read_rows(path: Path, names: Sequence[str]) -> list[list[str]]:
    return _split_rows(path, _read_bytes(path), names)


def _read_rating_columns(path: Path) -> tuple[np.ndarray, ...]:
    """The four integer columns. Arrow reads the file at once; only if it balks, Python looks for the line at fault."""
    data = _read_bytes(path)
    names = [name for field in _RATING_FIELDS for name in (field, f"between {field}")][:-1]  # `::` is two separators
    types = {name: pa.int64() if name in _RATING_FIELDS else pa.null() for name in names}
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(column_names=names),
            parse_options=pyarrow.csv.ParseOptions(delimiter=":", quote_char=False, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""]),
        )
    except pa.ArrowInvalid:
        return _read_rating_columns_by_line(path, data)
    columns = [table[field] for field in _RATING_FIELDS]
    if any(column.null_count for column in columns):
        return _read_rating_columns_by_line(path, data)
    return tuple(column.to_numpy() for column in columns)


def _read_rating_columns_by_line(path: Path, data: bytes) -> tuple[np.ndarray, ...]:
    rows = _split_rows(path, data, list(_RATING_FIELDS))
    columns = zip(*rows, strict=True)
    return tuple(
        _integers(path, field, texts, low, high)
        for (field, (low, high)), texts in zip(_RATING_FIELDS.items(), columns, strict=True)
    )


def _bad_field(path: Path, line: int, field: str, value: object, expected: str) -> InputError:
    return InputError(f"{path}: line {line}: field {field} is '{value}', not {expected}; {_REMEDY}")


def _integer_from(low: int, high: int) -> str:
    return f"an integer from {low} to {high}"


def _integers(path: Path, field: str, texts: Sequence[str], low: int, high: int) -> np.ndarray:
    """``texts`` (one a line) as int64; the first that is no integer from low to high is refused."""
    for line, text in enumerate(texts, start=1):
        if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
            raise _bad_field(path, line, field, text, _integer_from(low, high))
    return np.array([int(text) for text in texts], np.int64)


def _refuse(path: Path, field: str, values: np.ndarray, bad: np.ndarray, expected: str) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise _bad_field(path, first + 1, field, values[first], expected)


def _repeats(values: np.ndarray) -> np.ndarray:
    """Positions, ascending, of the values that already stood earlier."""
    order = np.argsort(values, kind="stable")
    return np.sort(order[1:][np.diff(values[order]) == 0])


def _refuse_repeated(path: Path, field: str, ids: np.ndarray) -> None:
    repeated = _repeats(ids)
    if len(repeated):
        first = int(repeated[0])
        raise _bad_field(path, first + 1, field, ids[first], "new, an earlier line has it")


def _positions(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where each value stands in ``known`` (distinct, any order); -1 if nowhere."""
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    return np.where(known[order[place]] == values, order[place], -1)


def _release_years(path: Path, titles: Sequence[str]) -> np.ndarray:
    years = []
    for line, title in enumerate(titles, start=1):
        match = _YEAR.search(title)
        if match is None or not _YEARS[0] <= int(match[1]) <= _YEARS[1]:
            expected = f"a title that ends in its year, ({_YEARS[0]}) to ({_YEARS[1]})"
            raise _bad_field(path, line, "Title", title, expected)
        years.append(int(match[1]))
    return np.array(years, np.int64)


def _first_genres(genres: Sequence[str]) -> tuple[np.ndarray, int]:
    """Ids of the first genres (alphabetical, CATEGORY_PADDING left out) and the number of ids including that one."""
    names, index = np.unique(np.array([combination.split("|")[0] for combination in genres]), return_inverse=True)
    ids = index + (index >= CATEGORY_PADDING)
    return ids, len(names) + (len(names) > CATEGORY_PADDING)


def _shifted_new_year(years: np.ndarray) -> np.ndarray:
    """Seconds from 1970 to 1 January, UTC, of UPLOAD_SHIFT_YEARS after each year."""
    new_year = (years + UPLOAD_SHIFT_YEARS - 1970).astype("datetime64[Y]")
    return new_year.astype("datetime64[s]").astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Building requests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Timeline:
    """Ratings by (user, time, file order); ``first`` [U + 1]: where each user's begin."""

    ratings: Ratings
    first: np.ndarray

    def position(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Where the user's ratings of this second or later begin."""
        period = _MAX_TIME + 2  # user and time in one sortable number: below 1e7 * 1e10
        return np.searchsorted(self.ratings.user * period + self.ratings.time, user * period + time)


def build_requests(ratings: Ratings, num_users: int, num_movies: int, seed: int) -> Requests:
    """All requests that the ratings make, by (time, user, window).

    A request is the same whatever ratings there are after its window's end, its id included.
    """
    order = np.lexsort((ratings.time, ratings.user))  # stable: equal seconds stay in file order
    timeline = _Timeline(ratings.take(order), np.searchsorted(ratings.user[order], np.arange(num_users + 1)))
    starts = _window_starts(timeline)
    user, time = timeline.ratings.user[starts], timeline.ratings.time[starts]
    end = timeline.ratings.time[starts + WINDOW - 1]
    # The id depends on nothing later: the user's place, the window's place, and a bound on windows per user.
    window = (starts - timeline.first[user]) // WINDOW
    request_id = 1 + user * (num_movies // WINDOW + 1) + window
    history, history_time = _histories(timeline, user, time)
    coarse_neg, prerank_neg = _sample_negatives(timeline, request_id, user, time, end, num_movies, seed)
    return Requests(
        request_id=request_id,
        user=user,
        time=time,
        end=end,
        rated=_best_first(timeline.ratings, starts),
        coarse_neg=coarse_neg,
        prerank_neg=prerank_neg,
        history=history,
        history_time=history_time,
    )


def _window_starts(timeline: _Timeline) -> np.ndarray:
    """Where the windows begin that make a request, by (time, user, window). An incomplete tail makes none, nor does a
    window of more than MAX_WINDOW_SECONDS."""
    user, time = timeline.ratings.user, timeline.ratings.time
    place = np.arange(len(user)) - timeline.first[user]
    length = np.diff(timeline.first)[user]
    starts = np.flatnonzero((place % WINDOW == 0) & (place + WINDOW <= length))
    starts = starts[time[starts + WINDOW - 1] - time[starts] <= MAX_WINDOW_SECONDS]
    return starts[np.argsort(time[starts], kind="stable")]


def _best_first(ratings: Ratings, starts: np.ndarray) -> np.ndarray:
    """The movies of each window [R, 30]: high ratings first, equal ratings in order of time."""
    window = starts[:, None] + np.arange(WINDOW)
    order = np.argsort(-ratings.stars[window], axis=1, kind="stable")
    return np.take_along_axis(ratings.movie[window], order, axis=1)


def _histories(timeline: _Timeline, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last movies that the user liked strictly before ``time``, and when: [R, 50], left-padded with -1 and 0."""
    liked = timeline.ratings.take(np.flatnonzero(timeline.ratings.stars >= LIKED))
    liked_before = np.concatenate([[0], np.cumsum(timeline.ratings.stars >= LIKED)])
    begin, stop = liked_before[timeline.first[user]], liked_before[timeline.position(user, time)]
    place = stop[:, None] - HISTORY_LENGTH + np.arange(HISTORY_LENGTH)
    valid = place >= begin[:, None]
    movies, times = np.full(place.shape, -1, np.int64), np.zeros(place.shape, np.int64)
    movies[valid], times[valid] = liked.movie[place[valid]], liked.time[place[valid]]
    return movies, times


def _sample_negatives(
    timeline: _Timeline,
    request_id: np.ndarray,
    user: np.ndarray,
    time: np.ndarray,
    end: np.ndarray,
    num_movies: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """coarse_neg and prerank_neg, [R, 10] each, of requests in order of time."""
    by_time = timeline.ratings.take(np.argsort(timeline.ratings.time, kind="stable"))
    num_earlier = np.searchsorted(by_time.time, time)  # ratings strictly before the request
    rated_until = timeline.position(user, end + 1)  # the window's last second counts as rated
    counts, counted = np.zeros(num_movies, np.int64), 0
    coarse_neg = np.empty((len(user), GROUP_SIZE), np.int64)
    prerank_neg = np.empty_like(coarse_neg)
    for start in progress(range(0, len(user), _CHUNK), "sampling", "chunk"):
        rows = slice(start, start + _CHUNK)
        popularity = counts + _new_counts(by_time.movie, counted, num_earlier[rows], num_movies)
        counts, counted = popularity[-1], int(num_earlier[rows][-1])
        rated = _rated_mask(timeline, timeline.first[user[rows]], rated_until[rows], num_movies)
        coarse_neg[rows], prerank_neg[rows] = _draw(popularity, rated, request_id[rows], seed)
    return coarse_neg, prerank_neg


def _new_counts(movies: np.ndarray, counted: int, num_earlier: np.ndarray, num_movies: int) -> np.ndarray:
    """[C, M]: how often each movie stands in ``movies[counted : num_earlier[c]]``, for ascending num_earlier [C]."""
    new = np.arange(counted, num_earlier[-1])
    first_request = np.searchsorted(num_earlier, new, side="right")  # the first that has this rating behind it
    cells = first_request * num_movies + movies[new]
    increments = np.bincount(cells, minlength=len(num_earlier) * num_movies)
    return increments.reshape(-1, num_movies).cumsum(axis=0)


def _rated_mask(timeline: _Timeline, begin: np.ndarray, stop: np.ndarray, num_movies: int) -> np.ndarray:
    """[C, M]: which movies stand at the positions begin[c] .. stop[c] - 1 of the timeline."""
    length = stop - begin
    row = np.repeat(np.arange(len(begin)), length)
    place = np.arange(len(row)) + np.repeat(begin - (np.cumsum(length) - length), length)
    mask = np.zeros((len(begin), num_movies), bool)
    mask[row, timeline.ratings.movie[place]] = True
    if int((~mask).sum(axis=1).min()) < 2 * GROUP_SIZE:
        raise InputError(
            f"movies.dat: has {num_movies} movies, of which some user leaves fewer than the {2 * GROUP_SIZE} unrated "
            f"that a request needs; give the whole catalogue"
        )
    return mask


def _draw(
    popularity: np.ndarray, rated: np.ndarray, request_id: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """coarse_neg with probability proportional to popularity, prerank_neg uniformly; neither rated, nor both.

    The k smallest of E_m / weight_m, E_m ~ Exp(1), are k draws without replacement with probability proportional to
    weight (the Gumbel top-k trick in another guise). Movies of weight 0 come last, in uniform order.
    """
    noise = np.empty((len(request_id), 2, rated.shape[1]))
    for row, key in zip(noise, request_id.tolist(), strict=True):  # a stream per request: chunks do not matter
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
        generator.standard_exponential(out=row)
    by_popularity, uniform = noise[:, 0], noise[:, 1]
    arrival = np.where(popularity > 0, by_popularity / np.maximum(popularity, 1), _UNRATED_LAST + by_popularity)
    arrival[rated] = np.inf
    coarse_neg = _smallest(arrival)
    uniform[rated] = np.inf
    np.put_along_axis(uniform, coarse_neg, np.inf, axis=1)
    return coarse_neg, _smallest(uniform)


def _smallest(values: np.ndarray) -> np.ndarray:
    """[C, 10]: places of the smallest values of each row, ascending."""
    best = np.argpartition(values, GROUP_SIZE - 1, axis=1)[:, :GROUP_SIZE]
    order = np.argsort(np.take_along_axis(values, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Days, and the log
# ---------------------------------------------------------------------------------------------------------------------


def split_days(requests: Requests, num_days: int, test_share: float) -> dict[str, Requests]:
    """Cut requests, which are in order of time, into ``num_days - 1`` training days of equal size and the test day.

    The test day is the last ``test_share`` of the requests. A training request whose window reaches its first second
    is dropped: its ratings would tell of the test period.
    """
    first_test = len(requests) - max(round(len(requests) * test_share), 1)
    training = np.empty(0, np.int64)
    if first_test > 0:
        training = np.flatnonzero(requests.end[:first_test] < requests.time[first_test])
    if len(training) < num_days - 1:
        raise InputError(
            f"ratings.dat: makes {len(training)} training requests of {WINDOW} ratings, too few for --days={num_days} "
            f"and --test_share={test_share}; lower one of them or give more ratings"
        )
    days = {
        (FIRST_DAY + datetime.timedelta(days=number)).isoformat(): requests.take(rows)
        for number, rows in enumerate(np.array_split(training, num_days - 1))
    }
    days[TEST_DAY.isoformat()] = requests.take(np.arange(first_test, len(requests)))
    return days


def day_log(requests: Requests, users: Users, catalogue: Catalogue) -> DayLog:
    """The requests with the fields of their users and movies, as RecFlow has them."""
    request = {
        "request_id": requests.request_id,
        "request_timestamp": requests.time * 1000,
        **{field: values[requests.user] for field, values in users.features.items()},
    }
    rank_pos, rerank_neg, rank_neg = np.split(requests.rated, 3, axis=1)
    movies = {
        "rank_pos": rank_pos,
        "rank_neg": rank_neg,
        "coarse_neg": requests.coarse_neg,
        "prerank_neg": requests.prerank_neg,
        "rerank_pos": rank_pos,
        "rerank_neg": rerank_neg,
    }
    num_requests = len(requests)
    return DayLog(
        request=request,
        groups={name: catalogue.items[movies[name]] for name in GROUP_NAMES},
        rank_index=np.tile(np.arange(1, GROUP_SIZE + 1), (num_requests, 1)),
        rerank_index=np.tile(np.arange(1, 2 * GROUP_SIZE + 1), (num_requests, 1)),
        history=_history_rows(requests, catalogue),
    )


def _history_rows(requests: Requests, catalogue: Catalogue) -> np.ndarray:
    """[R, 50, 10] (HISTORY_COLUMNS). MovieLens has no duration, playing time or request of a past view: they are 0."""
    valid = requests.history >= 0
    rows = np.zeros((*requests.history.shape, len(HISTORY_COLUMNS)), np.int64)
    items = catalogue.items[requests.history[valid]]
    for place, column in enumerate(HISTORY_COLUMNS):
        if column in ITEM_COLUMNS:
            rows[valid, place] = items[:, ITEM_COLUMNS.index(column)]
    rows[:, :, HISTORY_COLUMNS.index("request_timestamp")] = requests.history_time * 1000
    return rows


def _check_arguments(output_dir: Path, num_days: int, test_share: float, seed: int) -> None:
    if not 2 <= num_days <= MAX_DAYS:
        raise InputError(
            f"--days={num_days}: must be from 2 to {MAX_DAYS}, the test day included, for days run from {FIRST_DAY} to "
            f"{TEST_DAY}; give fewer, larger days"
        )
    if not 0 < test_share < 1:
        raise InputError(f"--test_share={test_share}: must be between 0 and 1; give the share of the last requests")
    if not 0 <= seed <= _MAX_SEED:
        raise InputError(f"--seed={seed}: must be from 0 to {_MAX_SEED}; give a small positive integer")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is not a folder; name a new folder")
    # Day files of another log would silently become part of this one.
    layout = [path(output_dir, "any").parent for path in (feather_path, request_path, history_path)]
    for folder in (*layout, id_count_path(output_dir).parent):
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"--output_dir={output_dir}: {folder} is not empty; empty it or name a new folder")


def convert(input_dir: Path, output_dir: Path, num_days: int, test_share: float, seed: int) -> None:
    """Write the MovieLens-1M in ``input_dir`` under ``output_dir`` in RecFlow's layout, origin.json last."""
    _check_arguments(output_dir, num_days, test_share, seed)
    users = read_users(input_dir / "users.dat")
    catalogue = read_movies(input_dir / "movies.dat")
    ratings = read_ratings(input_dir / "ratings.dat", users.ids, catalogue.ids)
    requests = build_requests(ratings, len(users.ids), len(catalogue.ids), seed)
    days = split_days(requests, num_days, test_share)
    for day, of_day in progress(days.items(), "writing", "day"):
        write_day(output_dir, day, day_log(of_day, users, catalogue))
    write_id_counts(output_dir, {**users.counts, **catalogue.counts})
    num_test = len(days[TEST_DAY.isoformat()])
    num_training = sum(map(len, days.values())) - num_test
    origin = {
        "data": "movielens-1m",
        "note": _NOTE.format(users=len(np.unique(ratings.user)), training=num_training, test=num_test),
        "input": str(input_dir),
        "output_dir": str(output_dir),
        "days": num_days,
        "test_share": test_share,
        "seed": seed,
    }
    write_origin(output_dir, origin)
    _LOGGER.info("%s: %d training and %d test requests, %d days", output_dir, num_training, num_test, num_days)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The input, the output, and how the requests are cut into days."""
    parser = argparse.ArgumentParser(
        prog="python -m deep_components.dataset.importers.movielens",
        description="Convert MovieLens-1M as published into a log in RecFlow's layout.",
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of users.dat, movies.dat and ratings.dat")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the log; it must not hold one yet")
    parser.add_argument(
        "--days", type=int, default=DEFAULT_DAYS, help="days, the test day included (default: %(default)s)"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=DEFAULT_TEST_SHARE,
        help="share of the requests, the last ones, in the test day (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled movies (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    convert(args.input, args.output_dir, args.days, args.test_share, args.seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
