import datetime
import json
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from deep_components.cli import run_command
from deep_components.dataset.importers import movielens
from deep_components.dataset.importers.movielens import (
    Catalogue,
    Ratings,
    Requests,
    build_requests,
    convert,
    day_log,
    parse_args,
    read_movies,
    read_ratings,
    read_users,
    split_days,
)
from deep_components.dataset.importers.recflow_files import GROUP_NAMES, HISTORY_COLUMNS, ID_COUNT_FIELDS, ITEM_COLUMNS
from deep_components.errors import InputError

REAL = Path(__file__).resolve().parents[3] / "../shared/ml-1m"
NUM_USERS, NUM_MOVIES = 12, 150
DAY = 24 * 3600

Row = tuple[int, int, int, int]  # user, movie (both positions), stars, time


def to_ratings(rows: list[Row]) -> Ratings:
    return Ratings(*np.array(rows, np.int64).reshape(-1, 4).T)


def to_rows(ratings: Ratings) -> list[Row]:
    return list(
        zip(ratings.user.tolist(), ratings.movie.tolist(), ratings.stars.tolist(), ratings.time.tolist(), strict=True)
    )


def random_rows(seed: int, num_users: int = NUM_USERS) -> list[Row]:
    """Ratings with many equal seconds, pauses of days, windows of all users interleaved; in random file order."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(num_users):
        number = int(rng.integers(5, 125))
        movies = rng.permutation(NUM_MOVIES)[:number]
        pauses = rng.choice([0, 0, 1, 60, 4000, DAY], size=number, p=[0.3, 0.2, 0.2, 0.2, 0.05, 0.05])
        times = 1_000_000 + int(rng.integers(0, 20_000)) + pauses.cumsum()
        stars = rng.integers(1, 6, size=number)
        rows += zip([user] * number, movies.tolist(), stars.tolist(), times.tolist(), strict=True)
    return [rows[place] for place in rng.permutation(len(rows))]


def build(rows: list[Row], seed: int = 0) -> Requests:
    return build_requests(to_ratings(rows), NUM_USERS, NUM_MOVIES, seed)


def one_user(stars: list[int], times: list[int]) -> list[Row]:
    return [(0, movie, star, time) for movie, (star, time) in enumerate(zip(stars, times, strict=True))]


def plain_requests(rows: list[Row]) -> list[dict[str, Any]]:
    """The rules of movielens.md word for word, without the sampled groups; by (time, user, window)."""
    requests: list[dict[str, Any]] = []
    for user in sorted({row[0] for row in rows}):
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[3])  # stable: then file order
        for first in range(0, len(own) - 29, 30):
            window = own[first : first + 30]
            if window[-1][3] - window[0][3] > 7 * DAY:
                continue
            time = window[0][3]
            liked = [(row[1], row[3]) for row in own if row[2] >= 4 and row[3] < time][-50:]
            best = sorted(window, key=lambda row: (-row[2], row[3]))
            padding = 50 - len(liked)
            requests.append(
                {
                    "user": user,
                    "time": time,
                    "end": window[-1][3],
                    "rated": [row[1] for row in best],
                    "history": [-1] * padding + [movie for movie, _ in liked],
                    "history_time": [0] * padding + [when for _, when in liked],
                }
            )
    return sorted(requests, key=lambda request: request["time"])


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_windows_order_and_history_follow_the_rules(seed: int) -> None:
    rows = random_rows(seed)
    requests = build(rows)
    expected = plain_requests(rows)
    assert len(requests) == len(expected) > 10
    for name in ("user", "time", "end", "rated", "history", "history_time"):
        np.testing.assert_array_equal(getattr(requests, name), [request[name] for request in expected], err_msg=name)


def test_an_incomplete_tail_makes_no_request() -> None:
    assert [len(build(one_user([3] * number, list(range(1, number + 1))))) for number in (29, 30, 59, 60)] == [
        0,
        1,
        1,
        2,
    ]


def test_a_window_over_seven_days_makes_no_request_and_the_next_one_stays() -> None:
    exactly = [1] * 29 + [1 + 7 * DAY]
    longer = [1] * 29 + [2 + 7 * DAY]
    after = list(range(30 * DAY, 30 * DAY + 30))
    assert build(one_user([3] * 60, exactly + after)).time.tolist() == [1, 30 * DAY]
    assert build(one_user([3] * 60, longer + after)).time.tolist() == [30 * DAY]


def test_high_ratings_first_then_early_ones() -> None:
    stars = [1] * 10 + [5] * 10 + [3] * 10
    times = list(range(100, 130))
    rated = build(one_user(stars, times)).rated[0].tolist()
    assert rated == [*range(10, 20), *range(20, 30), *range(10)]


def test_equal_rating_and_second_stay_in_file_order() -> None:
    rows = [(0, movie, 4, 77) for movie in reversed(range(30))]
    assert build(rows).rated[0].tolist() == list(reversed(range(30)))


def test_history_is_the_last_fifty_liked_of_strictly_earlier_seconds() -> None:
    # 90 ratings; the last three of the first 60 share their second with the third window.
    stars = [5, 4, 3] * 20 + [5] * 30
    times = [*range(1, 58), 100, 100, 100, *([100] * 30)]
    requests = build(one_user(stars, times))
    third = requests.take(np.flatnonzero(requests.rated[:, 0] >= 60))
    liked = [movie for movie in range(57) if movie % 3 != 2]
    assert third.history[0].tolist() == [-1] * (50 - len(liked)) + liked
    assert third.history_time[0, -1] == times[liked[-1]]


def test_history_keeps_the_last_fifty() -> None:
    requests = build(one_user([5] * 120, list(range(1, 121))))
    assert requests.history[-1].tolist() == list(range(40, 90))


@pytest.mark.parametrize("seed", range(5))
def test_negatives_are_distinct_and_not_rated_up_to_the_windows_end(seed: int) -> None:
    rows = random_rows(seed)
    requests = build(rows, seed)
    for number in range(len(requests)):
        rated = {row[1] for row in rows if row[0] == requests.user[number] and row[3] <= requests.end[number]}
        assert set(requests.rated[number].tolist()) <= rated
        sampled = [*requests.coarse_neg[number].tolist(), *requests.prerank_neg[number].tolist()]
        assert len(set(sampled)) == 20
        assert not set(sampled) & rated
        assert min(sampled) >= 0 and max(sampled) < NUM_MOVIES


@pytest.mark.parametrize("seed", range(5))
def test_coarse_negatives_have_earlier_ratings_as_long_as_there_are_any(seed: int) -> None:
    rows = random_rows(seed)
    requests = build(rows, seed)
    short = 0
    for number in range(len(requests)):
        rated = {row[1] for row in rows if row[0] == requests.user[number] and row[3] <= requests.end[number]}
        popular = {row[1] for row in rows if row[3] < requests.time[number]} - rated
        coarse = set(requests.coarse_neg[number].tolist())
        short += len(popular) < 10
        assert coarse <= popular if len(popular) >= 10 else popular <= coarse
    assert 0 < short < len(requests)


def test_sampling_probabilities() -> None:
    """The first coarse_neg falls on a movie in proportion to its earlier ratings, prerank_neg on each alike."""
    earlier = {140: 1, 141: 2, 142: 5, 143: 12}
    rows: list[Row] = [(0, movie, 3, 1000) for movie in range(30)]
    rows += [(1 + number % 10, movie, 3, 999) for movie, count in earlier.items() for number in range(count)]
    rows += [(11, movie, 3, 1000) for movie in range(100, 120)]  # the request's own second does not count
    drawn = [build(rows, seed) for seed in range(3000)]
    first = [int(requests.coarse_neg[0, 0]) for requests in drawn]
    observed = [first.count(movie) for movie in earlier]
    assert sum(observed) == len(drawn)
    assert chisquare(observed, np.array([*earlier.values()]) / 20 * len(drawn)).pvalue > 1e-3
    # In every draw the four popular ones are in coarse_neg, so that prerank_neg comes from the 116 others.
    uniform = np.bincount(np.concatenate([requests.prerank_neg[0] for requests in drawn]), minlength=NUM_MOVIES)
    assert uniform[:30].sum() == uniform[140:144].sum() == 0
    assert chisquare(np.delete(uniform[30:], range(110, 114))).pvalue > 1e-3


def test_same_seed_same_requests_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(1)
    once = build(rows, seed=7)
    monkeypatch.setattr(movielens, "_CHUNK", 3)
    assert_same_requests(build(rows, seed=7), once)
    other = build(rows, seed=8)
    assert not np.array_equal(other.coarse_neg, once.coarse_neg)
    assert not np.array_equal(other.prerank_neg, once.prerank_neg)
    np.testing.assert_array_equal(other.rated, once.rated)


def test_requests_draw_independently() -> None:
    rows = [(user, movie, 3, 1000) for user in range(NUM_USERS) for movie in range(30)]
    requests = build(rows)  # alike but for the user
    assert len({tuple(drawn) for drawn in requests.coarse_neg.tolist()}) == NUM_USERS
    assert len({tuple(drawn) for drawn in requests.prerank_neg.tolist()}) == NUM_USERS


@pytest.mark.parametrize("seed", range(3))
def test_popularity_counts_exactly_the_earlier_ratings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    movies = rng.integers(0, 5, size=40)
    num_earlier = np.sort(rng.integers(7, 41, size=10))  # of each request; the first 7 were counted before
    counted = movielens._new_counts(movies, 7, num_earlier, 5)
    expected = [np.bincount(movies[7:number], minlength=5) for number in num_earlier]
    np.testing.assert_array_equal(counted, expected)


def test_request_ids_are_positive_and_distinct() -> None:
    requests = build(random_rows(2))
    assert requests.request_id.min() > 0
    assert len(set(requests.request_id.tolist())) == len(requests)


def assert_same_requests(left: Requests, right: Requests) -> None:
    for field in fields(Requests):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


def replaced_future(rows: list[Row], now: int, rng: np.random.Generator) -> list[Row]:
    """Ratings after ``now`` change stars, movie and second, vanish, or change their place in the file."""
    past = [row for row in rows if row[3] <= now]
    future = [
        (user, int(rng.integers(NUM_MOVIES)), int(rng.integers(1, 6)), now + 1 + int(rng.integers(2 * DAY)))
        for user, _, _, time in rows
        if time > now and rng.random() < 0.6
    ]
    # Past ratings keep their order among themselves: file order decides between equal seconds.
    past_places = set(rng.permutation(len(past) + len(future))[: len(past)].tolist())
    earlier, later = iter(past), iter(future)
    return [next(earlier) if place in past_places else next(later) for place in range(len(past) + len(future))]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), quantile=st.floats(0.05, 1.0))
def test_ratings_after_a_windows_end_change_nothing(seed: int, quantile: float) -> None:
    rows = random_rows(seed)
    now = sorted(row[3] for row in rows)[int(quantile * (len(rows) - 1))]
    whole = build(rows, seed)
    ended = whole.take(np.flatnonzero(whole.end <= now))
    changed = replaced_future(rows, now, np.random.default_rng(seed))
    for other_rows in ([row for row in rows if row[3] <= now], changed):
        other = build(other_rows, seed)
        assert_same_requests(other.take(np.flatnonzero(other.end <= now)), ended)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_what_others_do_from_the_request_on_changes_nothing(seed: int) -> None:
    """Stricter than the window's end: of other users, only strictly earlier seconds count."""
    rows = random_rows(seed)
    whole = build(rows, seed)
    chosen = whole.take(np.array([len(whole) // 2]))
    user, time = chosen.user[0], chosen.time[0]
    other = build([row for row in rows if row[0] == user or row[3] < time], seed)
    same = other.take(np.flatnonzero(other.request_id == chosen.request_id[0]))
    assert_same_requests(same, chosen)


def test_a_catalogue_that_leaves_too_few_movies_is_refused() -> None:
    rows = one_user([3] * 30, list(range(1, 31)))
    assert len(build_requests(to_ratings(rows), 1, 50, 0)) == 1
    with pytest.raises(InputError, match=r"movies\.dat: has 49 movies.*whole catalogue"):
        build_requests(to_ratings(rows), 1, 49, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Days
# ---------------------------------------------------------------------------------------------------------------------


def test_training_windows_that_reach_the_test_period_are_dropped() -> None:
    rows: list[Row] = []
    for user in range(10):  # user u: window from 1000 u to 1000 u + 29
        rows += [(user, movie, 3, 1000 * (user + 1) + movie) for movie in range(30)]
    early_end = [row if row[:2] != (2, 29) else (2, 29, 3, 8999) for row in rows]
    late_end = [row if row[:2] != (2, 29) else (2, 29, 3, 9000) for row in rows]
    for changed, kept in ((early_end, [0, 1, 2, 3, 4, 5, 6, 7]), (late_end, [0, 1, 3, 4, 5, 6, 7])):
        days = split_days(build(changed), num_days=3, test_share=0.2)
        assert list(days) == ["2024-01-13", "2024-01-14", "2024-02-04"]
        assert days["2024-02-04"].user.tolist() == [8, 9]
        assert [*days["2024-01-13"].user.tolist(), *days["2024-01-14"].user.tolist()] == kept


@pytest.mark.parametrize("num_days", [2, 5, 23])
def test_days_are_equal_and_in_order_of_time(num_days: int) -> None:
    requests = build(random_rows(3))
    requests = requests.take(np.repeat(np.arange(len(requests)), 3))
    days = split_days(requests, num_days, test_share=0.25)
    assert len(days) == num_days
    assert list(days) == sorted(days)
    assert all(datetime.date.fromisoformat(day) for day in days)
    test = days["2024-02-04"]
    assert len(test) == round(0.25 * len(requests))
    training = [requests for day, requests in days.items() if day != "2024-02-04"]
    sizes = [len(requests) for requests in training]
    assert max(sizes) - min(sizes) <= 1
    assert all(requests.end.max() < test.time[0] for requests in training)
    times = np.concatenate([requests.time for requests in days.values()])
    assert (np.diff(times) >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Files in the published format
# ---------------------------------------------------------------------------------------------------------------------

GENRES = ("Action", "Adventure", "Animation", "Comedy", "Drama")


def write_movielens(folder: Path, seed: int = 0) -> Path:
    """users.dat, movies.dat and ratings.dat as published: latin-1, `::`, gaps in the MovieIDs, sorted by user."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ages, genders = (1, 18, 25, 35, 45, 50, 56), "FM"
    users = [
        f"{user + 1}::{genders[user % 2]}::{ages[user % 7]}::{user % 21}::{(user * 7919) % 8:05d}"
        for user in range(NUM_USERS)
    ]
    movies = []
    for movie in range(NUM_MOVIES):
        chosen = sorted(rng.permutation(len(GENRES))[: 1 + movie % 3].tolist())
        genres = "|".join(GENRES[genre] for genre in chosen)
        title = f"Misérables {movie}: Épisode (1920), Les ({1919 + movie % 82})"
        movies.append(f"{2 * movie + 1}::{title}::{genres}")
    rows = sorted(random_rows(seed), key=lambda row: row[0])
    ratings = [f"{user + 1}::{2 * movie + 1}::{stars}::{time}" for user, movie, stars, time in rows]
    for name, lines in (("users", users), ("movies", movies), ("ratings", ratings)):
        (folder / f"{name}.dat").write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("movielens") / "ml-1m")


@pytest.fixture(scope="module")
def log(published: Path) -> Path:
    output = published.parent / "log"
    assert run_command(movielens.main, [f"--input={published}", f"--output_dir={output}", "--days=4"]) == 0
    return output


def test_users_are_encoded(published: Path) -> None:
    users = read_users(published / "users.dat")
    lines = [line.split("::") for line in (published / "users.dat").read_text("latin-1").splitlines()]
    zip_codes, ages = sorted({line[4] for line in lines}), sorted({int(line[2]) for line in lines})
    expected = {
        "user_id": [int(line[0]) - 1 for line in lines],
        "gender": [{"F": 0, "M": 1}[line[1]] for line in lines],
        "age": [ages.index(int(line[2])) for line in lines],
        "province": [int(line[3]) for line in lines],
        "device_id": [zip_codes.index(line[4]) for line in lines],
    }
    assert {field: values.tolist() for field, values in users.features.items()} == expected
    assert users.counts == {"user_id": 12, "gender": 2, "age": 7, "province": 21, "device_id": len(zip_codes)}


def test_movies_are_encoded(tmp_path: Path) -> None:
    lines = [
        "3::Amélie 2000 (2000)::Comedy|Romance",
        "5::Dog's Life, A (1919)::Comedy",
        "4::12:01 (1995)::Adventure|Comedy",
        "9::Heat (1995)::Drama",
        "7::Rio Bravo (1959) ::Animation",
    ]
    (tmp_path / "movies.dat").write_bytes("\r\n".join(lines).encode("latin-1"))
    catalogue = read_movies(tmp_path / "movies.dat")
    columns = dict(zip(ITEM_COLUMNS, catalogue.items.T.tolist(), strict=True))
    assert catalogue.ids.tolist() == [3, 5, 4, 9, 7]
    assert columns["video_id"] == [0, 1, 2, 3, 4]
    assert columns["author_id"] == [3, 0, 2, 2, 1]  # 1919, 1959, 1995, 2000
    assert columns["upload_type"] == [3, 0, 2, 2, 1]  # the 1910s, 50s, 90s, 2000s
    assert columns["category_level_one"] == [3, 3, 0, 4, 1]  # Adventure 0, Animation 1, no 2, Comedy 3, Drama 4
    assert columns["category_level_two"] == [3, 2, 0, 4, 1]
    dates = [datetime.datetime.fromtimestamp(time, datetime.UTC) for time in columns["upload_timestamp"]]
    assert dates == [datetime.datetime(year + 60, 1, 1, tzinfo=datetime.UTC) for year in (2000, 1919, 1995, 1995, 1959)]
    assert min(columns["upload_timestamp"]) > 0
    assert catalogue.counts == {
        "video_id": 5,
        "author_id": 4,
        "upload_type": 4,
        "category_level_one": 5,
        "category_level_two": 5,
    }


@pytest.mark.parametrize(("genres", "count"), [(["A"], 1), (["A", "B"], 2), (["A", "B", "C"], 4)])
def test_the_padding_category_is_counted_only_where_ids_pass_it(tmp_path: Path, genres: list[str], count: int) -> None:
    path = tmp_path / "movies.dat"
    path.write_text("".join(f"{place + 1}::T (1990)::{genre}\n" for place, genre in enumerate(genres)))
    catalogue = read_movies(path)
    ids = catalogue.items[:, ITEM_COLUMNS.index("category_level_one")]
    assert catalogue.counts["category_level_one"] == count == ids.max() + 1
    assert 2 not in ids


def test_ratings_are_read_in_file_order(published: Path) -> None:
    users, catalogue = read_users(published / "users.dat"), read_movies(published / "movies.dat")
    ratings = read_ratings(published / "ratings.dat", users.ids, catalogue.ids)
    assert to_rows(ratings) == sorted(random_rows(0), key=lambda row: row[0])


def test_ids_may_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text("9::40::5::100\n2::10::1::200\n")
    ratings = read_ratings(path, np.array([9, 5, 2]), np.array([10, 40, 20]))
    assert to_rows(ratings) == [(0, 1, 5, 100), (2, 0, 1, 200)]


def test_the_layout_is_recflows_and_says_what_was_built(published: Path, log: Path) -> None:
    users, catalogue = read_users(published / "users.dat"), read_movies(published / "movies.dat")
    ratings = read_ratings(published / "ratings.dat", users.ids, catalogue.ids)
    requests = build_requests(ratings, len(users.ids), len(catalogue.ids), seed=0)
    days = split_days(requests, 4, movielens.DEFAULT_TEST_SHARE)
    assert sorted(path.stem for path in (log / "all_stage").iterdir()) == list(days)
    for day, expected in days.items():
        table = pyarrow.feather.read_table(log / "all_stage" / f"{day}.feather").to_pydict()
        groups = pickle.loads((log / "request_id_dict" / f"{day}.pkl").read_bytes())
        histories = pickle.loads((log / "seq_effective_50_dict" / f"{day}.pkl").read_bytes())
        assert list(groups) == list(histories) == expected.request_id.tolist()
        assert list(dict.fromkeys(table["request_id"])) == expected.request_id.tolist()
        assert len(table["request_id"]) == 50 * len(expected)
        for number, request_id in enumerate(expected.request_id.tolist()):
            check_groups(groups[request_id], expected, number, catalogue)
            check_history(histories[request_id], expected, number, catalogue)
            assert flagged(table, request_id, "rank_index", 10) == expected.rated[number, :10].tolist()
            assert flagged(table, request_id, "rerank_index", 20) == expected.rated[number, :20].tolist()
            first = table["request_id"].index(request_id)
            assert table["user_id"][first] == expected.user[number]
            assert table["request_timestamp"][first] == 1000 * expected.time[number]


def flagged(table: dict[str, list[int]], request_id: int, field: str, number: int) -> list[int]:
    """The request's videos with an index in ``field``, by that index, which must be 1, 2, ..., number."""
    rows = zip(table["request_id"], table[field], table["video_id"], strict=True)
    pairs = sorted((index, video) for request, index, video in rows if request == request_id and index > 0)
    assert [index for index, _ in pairs] == list(range(1, number + 1))
    return [video for _, video in pairs]


def check_groups(groups: dict[str, np.ndarray], requests: Requests, number: int, catalogue: Catalogue) -> None:
    rated = requests.rated[number]
    expected = {
        "rank_pos": rated[:10],
        "rerank_pos": rated[:10],
        "rerank_neg": rated[10:20],
        "rank_neg": rated[20:],
        "coarse_neg": requests.coarse_neg[number],
        "prerank_neg": requests.prerank_neg[number],
    }
    assert set(groups) == set(GROUP_NAMES) == set(expected)
    for name, movies in expected.items():
        np.testing.assert_array_equal(groups[name], catalogue.items[movies], err_msg=name)


def check_history(rows: np.ndarray, requests: Requests, number: int, catalogue: Catalogue) -> None:
    assert rows.shape == (50, 10)
    valid = requests.history[number] >= 0
    assert not rows[~valid].any()
    np.testing.assert_array_equal(
        rows[:, HISTORY_COLUMNS.index("request_timestamp")], 1000 * requests.history_time[number]
    )
    for place, column in enumerate(HISTORY_COLUMNS):
        if column in ITEM_COLUMNS:
            expected = catalogue.items[requests.history[number][valid], ITEM_COLUMNS.index(column)]
            np.testing.assert_array_equal(rows[valid, place], expected, err_msg=column)
        elif column != "request_timestamp":
            assert not rows[:, place].any()


def test_every_id_is_below_its_count(log: Path) -> None:
    counts = pickle.loads((log / "others" / "id_cnt.pkl").read_bytes())
    assert set(counts) == set(ID_COUNT_FIELDS)
    for path in (log / "all_stage").iterdir():
        table = pyarrow.feather.read_table(path).to_pydict()
        for field, count in counts.items():
            assert min(table[field]) >= 0 and max(table[field]) < count, field
    assert counts["user_id"] == NUM_USERS and counts["video_id"] == NUM_MOVIES


def test_origin_names_the_data_and_every_argument(published: Path, log: Path) -> None:
    origin = json.loads((log / "others" / "origin.json").read_text())
    assert origin.pop("note")
    assert origin == {
        "data": "movielens-1m",
        "input": str(published),
        "output_dir": str(log),
        "days": 4,
        "test_share": movielens.DEFAULT_TEST_SHARE,
        "seed": 0,
    }


def test_origin_is_written_last(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(root: Path, counts: dict[str, int]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(movielens, "write_id_counts", write_nothing)
    with pytest.raises(KeyboardInterrupt):
        convert(published, tmp_path, 3, 0.2, 0)
    assert len(list((tmp_path / "all_stage").iterdir())) == 3
    assert not (tmp_path / "others" / "origin.json").exists()


def test_the_same_arguments_give_the_same_bytes(published: Path, log: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "again", 4, movielens.DEFAULT_TEST_SHARE, 0)
    written = [path.relative_to(log) for path in log.rglob("*") if path.is_file() and path.name != "origin.json"]
    assert len(written) == 4 * 3 + 1
    for path in written:
        assert (log / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "user fields": ("users.dat", 3, "3::M::25::15", "has 4 fields"),
    "user id": ("users.dat", 3, "x::M::25::15::55117", "UserID is 'x'"),
    "user id 0": ("users.dat", 3, "0::M::25::15::55117", "UserID is '0'"),
    "huge user id": ("users.dat", 3, f"{10**17}::M::25::15::55117", "UserID is '1000"),
    "repeated user": ("users.dat", 3, "1::M::25::15::55117", "UserID is '1'"),
    "gender": ("users.dat", 3, "3::X::25::15::55117", "Gender is 'X'"),
    "age": ("users.dat", 3, "3::M::old::15::55117", "Age is 'old'"),
    "occupation": ("users.dat", 3, "3::M::25::21::55117", "Occupation is '21'"),
    "zip code": ("users.dat", 3, "3::M::25::15::", "Zip-code is ''"),
    "movie fields": ("movies.dat", 7, "13::Balto (1995)", "has 2 fields"),
    "movie id": ("movies.dat", 7, "1.5::Balto (1995)::Drama", "MovieID is '1.5'"),
    "repeated movie": ("movies.dat", 7, "3::Balto (1995)::Drama", "MovieID is '3'"),
    "no year": ("movies.dat", 7, "13::Balto::Drama", "Title is 'Balto'"),
    "no year at the end": ("movies.dat", 7, "13::Balto (1995) again::Drama", "Title is 'Balto (1995) again'"),
    "strange year": ("movies.dat", 7, "13::Balto (1195)::Drama", "Title is 'Balto (1195)'"),
    "no genres": ("movies.dat", 7, "13::Balto (1995)::", "Genres is ''"),
    "empty genre": ("movies.dat", 7, "13::Balto (1995)::Drama||War", "Genres is 'Drama||War'"),
    "rating fields": ("ratings.dat", 9, "1::11::3", "has 3 fields"),
    "more rating fields": ("ratings.dat", 9, "1::11::3::4::5", "has 5 fields"),
    "blank line": ("ratings.dat", 9, "", "has 1 fields"),
    "single colons": ("ratings.dat", 9, "1:11:3:4:5:6:7", "has 1 fields"),
    "text between colons": ("ratings.dat", 9, "1:0:11::3::978300760", "has 3 fields"),
    "rating user": ("ratings.dat", 9, "one::11::3::978300760", "UserID is 'one'"),
    "rating movie": ("ratings.dat", 9, "1::::3::978300760", "MovieID is ''"),
    "no number": ("ratings.dat", 9, "1::NA::3::978300760", "MovieID is 'NA'"),
    "half stars": ("ratings.dat", 9, "1::11::3.5::978300760", "Rating is '3.5'"),
    "six stars": ("ratings.dat", 9, "1::11::6::978300760", "Rating is '6'"),
    "no stars": ("ratings.dat", 9, "1::11::0::978300760", "Rating is '0'"),
    "negative": ("ratings.dat", 9, "1::11::-1::978300760", "Rating is '-1'"),
    "no time": ("ratings.dat", 9, "1::11::3::", "Timestamp is ''"),
    "time in milliseconds": ("ratings.dat", 9, "1::11::3::978300760000", "Timestamp is '978300760000'"),
    "number too long": ("ratings.dat", 9, "1::11::3::99999999999999999999", "Timestamp is '9999"),
    "latin-1 rating": ("ratings.dat", 9, "1::11::é::978300760", "Rating is 'é'"),
    "unknown user": ("ratings.dat", 9, "13::11::3::978300760", "UserID is '13', not in users.dat"),
    "unknown movie": ("ratings.dat", 9, "1::12::3::978300760", "MovieID is '12', not in movies.dat"),
}


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def replace_line(path: Path, line: int, text: str) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = text.encode("latin-1")
    path.write_bytes(b"\n".join(lines))


def refusal(input_dir: Path, output_dir: Path) -> str:
    with pytest.raises(InputError) as caught:
        convert(input_dir, output_dir, 4, 0.2, 0)
    assert not output_dir.exists()
    message = str(caught.value)
    assert "\n" not in message and "; " in message  # one sentence, with the remedy
    return message


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(published: Path, tmp_path: Path, case: str) -> None:
    name, line, text, complaint = BAD_LINES[case]
    folder = copy_of(published, tmp_path / "in")
    replace_line(folder / name, line, text)
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder / name}: line {line}: ")
    assert complaint in message


def test_a_movie_rated_twice_is_named(published: Path, tmp_path: Path) -> None:
    folder = copy_of(published, tmp_path / "in")
    lines = (folder / "ratings.dat").read_text().splitlines()
    replace_line(folder / "ratings.dat", 5, lines[1])
    assert f"{folder / 'ratings.dat'}: line 5: field MovieID" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["users.dat", "movies.dat", "ratings.dat"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\n \n"), "is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["missing", "empty", "blank", "folder"],
)
def test_an_unreadable_file_is_named(
    published: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], complaint: str
) -> None:
    folder = copy_of(published, tmp_path / "in")
    damage(folder / name)
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder / name}: ") and complaint in message


def test_too_few_ratings_are_refused(published: Path, tmp_path: Path) -> None:
    folder = copy_of(published, tmp_path / "in")
    for number in (1, 29, 30):
        lines = [f"1::{2 * movie + 1}::3::{1000 + movie}\n" for movie in range(number)]
        (folder / "ratings.dat").write_text("".join(lines))
        assert "makes 0 training requests" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--days=24", "--days=24: must be from 2 to 23"),
        ("--days=1", "--days=1: must be from 2 to 23"),
        ("--test_share=0", "--test_share=0.0: must be between 0 and 1"),
        ("--test_share=1", "--test_share=1.0: must be between 0 and 1"),
        ("--test_share=nan", "--test_share=nan: must be between 0 and 1"),
        ("--test_share=0.999", "too few for --days"),
        ("--seed=-1", "--seed=-1: must be from 0"),
    ],
)
def test_bad_arguments_end_the_command_with_a_sentence(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, complaint: str
) -> None:
    argv = [f"--input={published}", f"--output_dir={tmp_path / 'out'}", option]
    assert run_command(movielens.main, argv) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_log_is_refused(published: Path, log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not empty; empty it or name a new folder"):
        convert(published, log, 4, 0.2, 0)
    (tmp_path / "README.md").write_text("other files do not matter")
    convert(published, tmp_path, 4, 0.2, 0)


def test_an_output_folder_that_is_a_file_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        convert(published, tmp_path / "out", 4, 0.2, 0)


def test_defaults() -> None:
    args = parse_args(["--input=a", "--output_dir=b"])
    assert vars(args) == {
        "input": Path("a"),
        "output_dir": Path("b"),
        "days": 12,
        "test_share": movielens.DEFAULT_TEST_SHARE,
        "seed": 0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The real data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="MovieLens-1M is not at ../shared/ml-1m")
def test_the_real_data() -> None:
    users, catalogue = read_users(REAL / "users.dat"), read_movies(REAL / "movies.dat")
    ratings = read_ratings(REAL / "ratings.dat", users.ids, catalogue.ids)
    counts = {**users.counts, **catalogue.counts}
    published_counts = (6040, 3439, 7, 2, 21, 3883, 81, 19, 301, 10)  # of movielens_log.tar.xz
    assert tuple(counts[field] for field in ID_COUNT_FIELDS) == published_counts
    early = ratings.take(np.flatnonzero(ratings.time < np.sort(ratings.time)[len(ratings.time) // 4]))
    requests = build_requests(early, len(users.ids), len(catalogue.ids), seed=0)
    few = {user: number for number, user in enumerate(np.unique(early.user)[:40].tolist())}
    plain = plain_requests([row for row in to_rows(early) if row[0] in few])
    same = requests.take(np.flatnonzero(np.isin(requests.user, list(few))))
    assert len(plain) == len(same) > 40
    for name in ("user", "time", "end", "rated", "history", "history_time"):
        np.testing.assert_array_equal(getattr(same, name), [request[name] for request in plain], err_msg=name)
    days = split_days(requests, movielens.DEFAULT_DAYS, movielens.DEFAULT_TEST_SHARE)
    day = day_log(days["2024-02-04"], users, catalogue)
    assert (day.groups["rank_pos"][:, :, ITEM_COLUMNS.index("upload_timestamp")] > 0).all()
