"""MovieLens-1M as a log: the rules of the conversion, written out again here, and what is refused."""

import datetime
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from deep_components.cli import run_command
from deep_components.dataset.importers import movielens
from deep_components.dataset.importers.movielens import (
    Requests,
    build_requests,
    convert,
    day_log,
    read_movies,
    read_ratings,
    read_users,
    split_days,
)
from deep_components.dataset.importers.recflow_files import HISTORY_COLUMNS, ID_COUNT_FIELDS, ITEM_COLUMNS
from deep_components.errors import InputError

REAL = Path(__file__).resolve().parents[3] / "../shared/ml-1m"
NUM_USERS, NUM_MOVIES = 12, 150
DAY = 24 * 3600
TEST_SHARE = 0.1535

Row = tuple[int, int, int, int]  # user, movie (row numbers of their files), stars, time


def random_rows(seed: int) -> list[Row]:
    """Ratings with many equal seconds, pauses of days, windows of all users interleaved; in random file order."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(NUM_USERS):
        number = int(rng.integers(5, 125))
        movies = rng.permutation(NUM_MOVIES)[:number]
        pauses = rng.choice([0, 0, 1, 60, 4000, DAY], size=number, p=[0.3, 0.2, 0.2, 0.2, 0.05, 0.05])
        times = 1_000_000 + int(rng.integers(0, 20_000)) + pauses.cumsum()
        stars = rng.choice([1, 3, 4, 5], size=number, p=[0.1, 0.2, 0.4, 0.3])
        rows += zip([user] * number, movies.tolist(), stars.tolist(), times.tolist(), strict=True)
    return [rows[number] for number in rng.permutation(len(rows))]


def build(rows: list[Row], seed: int = 0, num_movies: int = NUM_MOVIES) -> Requests:
    return build_requests(pd.DataFrame(rows, columns=["user", "movie", "stars", "time"]), num_movies, seed)


def assert_same_requests(left: Requests, right: Requests) -> None:
    for field in fields(Requests):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


def plain_requests(rows: list[Row]) -> list[dict[str, Any]]:
    """The rules of the conversion one by one, without the sampled groups; by (time, user, window)."""
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


def assert_by_the_rules(requests: Requests, expected: list[dict[str, Any]]) -> None:
    assert len(requests) == len(expected)
    for name in expected[0]:
        np.testing.assert_array_equal(getattr(requests, name), [request[name] for request in expected], err_msg=name)


# ---- requests --------------------------------------------------------------------------------------------------------


def test_windows_order_and_history_follow_the_rules() -> None:
    lengths = set()
    for seed in range(5):
        rows = random_rows(seed)
        requests = build(rows)
        assert_by_the_rules(requests, plain_requests(rows))
        assert requests.request_id.min() > 0 and len(set(requests.request_id.tolist())) == len(requests)
        lengths |= set((requests.history >= 0).sum(axis=1).tolist())
    assert {0, 50} <= lengths  # no history, and more than is kept


@pytest.mark.parametrize(("last", "starts"), [(1 + 7 * DAY, [1, 30 * DAY]), (2 + 7 * DAY, [30 * DAY])])
def test_a_window_over_seven_days_makes_no_request_and_the_next_one_stays(last: int, starts: list[int]) -> None:
    times = [*[1] * 29, last, *range(30 * DAY, 30 * DAY + 30)]
    assert build([(0, movie, 3, time) for movie, time in enumerate(times)]).time.tolist() == starts


@pytest.mark.parametrize("seed", range(3))
def test_negatives_are_distinct_unrated_and_popular_before(seed: int) -> None:
    rows = random_rows(seed)
    requests = build(rows, seed)
    for number in range(len(requests)):
        rated = {row[1] for row in rows if row[0] == requests.user[number] and row[3] <= requests.end[number]}
        coarse, prerank = set(requests.coarse_neg[number].tolist()), set(requests.prerank_neg[number].tolist())
        assert len(coarse | prerank) == 20 and not (coarse | prerank) & rated
        assert (coarse | prerank) <= set(range(NUM_MOVIES))
        popular = {row[1] for row in rows if row[3] < requests.time[number]} - rated
        assert coarse <= popular if len(popular) >= 10 else popular <= coarse


def test_sampling_probabilities() -> None:
    """The first coarse_neg falls on a movie in proportion to its earlier ratings, prerank_neg on each alike."""
    alike, earlier = 3000, {140: 1, 141: 2, 142: 5, 143: 12}
    rows: list[Row] = [(user, movie, 3, 1000) for user in range(alike) for movie in range(30)]
    others = [(movie, number % 10) for movie, count in earlier.items() for number in range(count)]
    rows += [(alike + user, movie, 3, 999) for movie, user in others]
    rows += [(alike + 11, movie, 3, 1000) for movie in range(100, 120)]  # the requests' own second does not count
    requests = build(rows)
    observed = [int((requests.coarse_neg[:, 0] == movie).sum()) for movie in earlier]
    assert sum(observed) == alike
    assert chisquare(observed, np.array([*earlier.values()]) / 20 * alike).pvalue > 1e-3
    # In every draw the four popular ones are in coarse_neg, so that prerank_neg comes from the 116 others.
    uniform = np.bincount(requests.prerank_neg.ravel(), minlength=NUM_MOVIES)
    assert uniform[:30].sum() == uniform[140:144].sum() == 0
    assert chisquare(np.delete(uniform[30:], range(110, 114))).pvalue > 1e-3


def test_the_seed_decides_what_is_drawn_and_nothing_else() -> None:
    rows = random_rows(1)
    once, other = build(rows, seed=7), build(rows, seed=8)
    assert_same_requests(build(rows, seed=7), once)
    assert not np.array_equal(other.coarse_neg, once.coarse_neg)
    assert not np.array_equal(other.prerank_neg, once.prerank_neg)
    np.testing.assert_array_equal(other.rated, once.rated)


def replaced_future(rows: list[Row], now: int, rng: np.random.Generator) -> list[Row]:
    """Ratings after ``now`` change stars, movie and second, vanish, or move in the file."""
    past = [row for row in rows if row[3] <= now]
    future = [
        (user, int(rng.integers(NUM_MOVIES)), int(rng.integers(1, 6)), now + 1 + int(rng.integers(2 * DAY)))
        for user, _, _, time in rows
        if time > now and rng.random() < 0.6
    ]
    # Past ratings keep their order among themselves: file order decides between equal seconds.
    past_rows = set(rng.permutation(len(past) + len(future))[: len(past)].tolist())
    earlier, later = iter(past), iter(future)
    return [next(earlier) if row in past_rows else next(later) for row in range(len(past) + len(future))]


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
    rows = [(0, movie, 3, 1 + movie) for movie in range(30)]
    assert len(build(rows, num_movies=50)) == 1
    with pytest.raises(InputError, match=r"movies\.dat: has 49 movies.*whole catalogue"):
        build(rows, num_movies=49)


# ---- days ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "kept"), [(8999, [0, 1, 2, 3, 4, 5, 6, 7]), (9000, [0, 1, 3, 4, 5, 6, 7])])
def test_training_windows_that_reach_the_test_period_are_dropped(end: int, kept: list[int]) -> None:
    rows = [(user, movie, 3, 1000 * (user + 1) + movie) for user in range(10) for movie in range(30)]
    rows[2 * 30 + 29] = (2, 29, 3, end)
    days = split_days(build(rows), num_days=3, test_share=0.2)
    assert list(days) == ["2024-01-13", "2024-01-14", "2024-02-04"]
    assert days["2024-02-04"].user.tolist() == [8, 9]
    assert [*days["2024-01-13"].user.tolist(), *days["2024-01-14"].user.tolist()] == kept


@pytest.mark.parametrize("num_days", [2, 5, 23])
def test_days_are_equal_and_in_order_of_time(num_days: int) -> None:
    requests = build(random_rows(3))
    requests = requests.take(np.repeat(np.arange(len(requests)), 3))
    days = split_days(requests, num_days, test_share=0.25)
    names = [str(datetime.date(2024, 1, 13) + datetime.timedelta(number)) for number in range(num_days - 1)]
    assert list(days) == [*names, "2024-02-04"]
    test, training = days["2024-02-04"], [days[name] for name in names]
    assert len(test) == round(0.25 * len(requests))
    assert max(map(len, training)) - min(map(len, training)) <= 1
    assert all(requests.end.max() < test.time[0] for requests in training)
    assert (np.diff(np.concatenate([requests.time for requests in days.values()])) >= 0).all()


# ---- files in the published format -----------------------------------------------------------------------------------

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
    assert users.fields.to_dict("list") == {
        "user_id": [int(line[0]) - 1 for line in lines],
        "gender": [{"F": 0, "M": 1}[line[1]] for line in lines],
        "age": [ages.index(int(line[2])) for line in lines],
        "province": [int(line[3]) for line in lines],
        "device_id": [zip_codes.index(line[4]) for line in lines],
    }
    assert users.counts == {"user_id": 12, "gender": 2, "age": 7, "province": 21, "device_id": len(zip_codes)}


def test_movies_are_encoded(tmp_path: Path) -> None:
    lines = [
        "3::Amélie 2000 (2000)::Comedy|Romance",
        "5::Dog's \"Life, A (1919)::Comedy",
        "4::12:01 (1995)::Adventure|Comedy",
        "9::Heat (1995)::Drama",
        "7::Rio Bravo (1959) ::Animation",
    ]
    (tmp_path / "movies.dat").write_bytes("\r\n".join(lines).encode("latin-1"))
    movies = read_movies(tmp_path / "movies.dat")
    assert movies.ids.tolist() == [3, 5, 4, 9, 7]
    new_years = [datetime.datetime(year + 60, 1, 1, tzinfo=datetime.UTC) for year in (2000, 1919, 1995, 1995, 1959)]
    assert movies.fields.to_dict("list") == {
        "video_id": [0, 1, 2, 3, 4],
        "author_id": [3, 0, 2, 2, 1],  # 1919, 1959, 1995, 2000
        "duration": [0] * 5,
        "category_level_two": [3, 2, 0, 4, 1],
        "upload_type": [3, 0, 2, 2, 1],  # the 1910s, 50s, 90s, 2000s
        "upload_timestamp": [int(day.timestamp()) for day in new_years],
        "category_level_one": [3, 3, 0, 4, 1],  # Adventure 0, Animation 1, no 2, Comedy 3, Drama 4
        "effective_view": [0] * 5,
    }
    assert movies.fields["upload_timestamp"].min() > 0
    ids = {"video_id": 5, "author_id": 4, "upload_type": 4, "category_level_one": 5, "category_level_two": 5}
    assert {field: movies.counts[field] for field in ids} == ids


def test_ratings_are_read_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text("9::40::5::100\n2::10::1::200\n")
    ratings = read_ratings(path, pd.Index([9, 5, 2]), pd.Index([10, 40, 20]))
    assert ratings.values.tolist() == [[0, 1, 5, 100], [2, 0, 1, 200]]


def test_the_log_says_what_was_built(published: Path, log: Path) -> None:
    users, movies = read_users(published / "users.dat"), read_movies(published / "movies.dat")
    ratings = read_ratings(published / "ratings.dat", users.ids, movies.ids)
    days = split_days(build_requests(ratings, len(movies.ids), seed=0), 4, TEST_SHARE)
    assert sorted(path.stem for path in (log / "all_stage").iterdir()) == list(days)
    for day, requests in days.items():
        table = pyarrow.feather.read_table(log / "all_stage" / f"{day}.feather").to_pandas()
        groups = pickle.loads((log / "request_id_dict" / f"{day}.pkl").read_bytes())
        histories = pickle.loads((log / "seq_effective_50_dict" / f"{day}.pkl").read_bytes())
        assert list(groups) == list(histories) == list(table["request_id"].unique()) == requests.request_id.tolist()
        for number, (request_id, rows) in enumerate(table.groupby("request_id", sort=False)):
            rated = requests.rated[number]
            assert len(rows) == 50
            for field, size in (("rank_index", 10), ("rerank_index", 20)):
                ranked = rows[rows[field] > 0].sort_values(field)
                assert ranked[field].tolist() == list(range(1, size + 1))
                assert ranked["video_id"].tolist() == rated[:size].tolist()
            assert (rows["user_id"] == requests.user[number]).all()
            assert (rows["request_timestamp"] == 1000 * requests.time[number]).all()
            sampled = {"coarse_neg": requests.coarse_neg[number], "prerank_neg": requests.prerank_neg[number]}
            expected = {"rank_pos": rated[:10], "rerank_pos": rated[:10], "rerank_neg": rated[10:20]} | sampled
            for name, chosen in (expected | {"rank_neg": rated[20:]}).items():
                items = movies.fields[list(ITEM_COLUMNS)].to_numpy()[chosen]
                np.testing.assert_array_equal(groups[request_id][name], items, err_msg=name)
            times = 1000 * requests.history_time[number]
            check_history(histories[request_id], requests.history[number], times, movies.fields)


def check_history(rows: np.ndarray, watched: np.ndarray, times: np.ndarray, movies: pd.DataFrame) -> None:
    valid = watched >= 0
    assert rows.shape == (50, 10) and not rows[~valid].any()
    for name, values in zip(HISTORY_COLUMNS, rows[valid].T, strict=True):
        known = {"request_timestamp": times[valid], "playing_time": 0, "request_id": 0}
        expected = movies[name].to_numpy()[watched[valid]] if name in movies else known[name]
        np.testing.assert_array_equal(values, expected, err_msg=name)


def test_every_id_is_below_its_count_and_origin_names_every_argument(published: Path, log: Path) -> None:
    counts = pickle.loads((log / "others" / "id_cnt.pkl").read_bytes())
    assert set(counts) == set(ID_COUNT_FIELDS)
    assert counts["user_id"] == NUM_USERS and counts["video_id"] == NUM_MOVIES
    for path in (log / "all_stage").iterdir():
        table = pyarrow.feather.read_table(path).to_pandas()
        assert all(table[field].between(0, count - 1).all() for field, count in counts.items())
    origin = json.loads((log / "others" / "origin.json").read_text())
    arguments = {"days": 4, "test_share": TEST_SHARE, "seed": 0}
    paths = {"input": str(published), "output_dir": str(log)}
    assert origin == {"data": "movielens-1m", "note": origin["note"]} | paths | arguments


def test_the_same_arguments_give_the_same_bytes(published: Path, log: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "again", 4, TEST_SHARE, 0)
    written = [path.relative_to(log) for path in log.rglob("*") if path.is_file() and path.name != "origin.json"]
    assert len(written) == 4 * 3 + 1
    for path in written:
        assert (log / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


# ---- bad input -------------------------------------------------------------------------------------------------------

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
    "a field's end": ("ratings.dat", 9, "1::11::3\x1f::978300760", "has 5 fields"),
    "zero byte": ("movies.dat", 7, "13::Bal\0to (1995)::Drama", "zero byte"),
    "rated again": ("ratings.dat", 2, "%s", "MovieID is '"),
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


@pytest.fixture
def spoilt(published: Path, tmp_path: Path) -> Path:
    """A copy of the published files, to be spoilt."""
    return Path(shutil.copytree(published, tmp_path / "in"))


def refusal(input_dir: Path, output_dir: Path) -> str:
    with pytest.raises(InputError) as caught:
        convert(input_dir, output_dir, 4, 0.2, 0)
    assert not output_dir.exists()
    message = str(caught.value)
    assert "\n" not in message and "; " in message  # one sentence, with the remedy
    return message


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(spoilt: Path, tmp_path: Path, case: str) -> None:
    name, number, text, complaint = BAD_LINES[case]
    lines = (spoilt / name).read_bytes().split(b"\n")
    lines[number - 1] = text.encode("latin-1") if text != "%s" else lines[0]
    (spoilt / name).write_bytes(b"\n".join(lines))
    message = refusal(spoilt, tmp_path / "out")
    assert message.startswith(f"{spoilt / name}: line {number}: ")
    assert complaint in message


@pytest.mark.parametrize("name", ["users.dat", "movies.dat", "ratings.dat"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(b"\n \n"), "is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["missing", "blank", "folder"],
)
def test_an_unreadable_file_is_named(
    spoilt: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(spoilt / name)
    message = refusal(spoilt, tmp_path / "out")
    assert message.startswith(f"{spoilt / name}: ") and complaint in message


@pytest.mark.parametrize("number", [1, 29, 30])
def test_too_few_ratings_are_refused(spoilt: Path, tmp_path: Path, number: int) -> None:
    lines = [f"1::{2 * movie + 1}::3::{1000 + movie}\n" for movie in range(number)]
    (spoilt / "ratings.dat").write_text("".join(lines))
    assert "makes 0 training requests" in refusal(spoilt, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--days=24", "--days=24: must be from 2 to 23"),
        ("--days=1", "--days=1: must be from 2 to 23"),
        ("--test_share=0", "--test_share=0.0: must be between 0 and 1"),
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


def test_only_a_folder_without_a_log_is_written_to(published: Path, log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not empty; empty it or name a new folder"):
        convert(published, log, 4, 0.2, 0)
    (tmp_path / "README.md").write_text("other files do not matter")
    with pytest.raises(InputError, match="is not a folder"):
        convert(published, tmp_path / "README.md", 4, 0.2, 0)
    convert(published, tmp_path, 4, 0.2, 0)


# ---- the real data ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="MovieLens-1M is not at ../shared/ml-1m")
def test_the_real_data() -> None:
    users, movies = read_users(REAL / "users.dat"), read_movies(REAL / "movies.dat")
    ratings = read_ratings(REAL / "ratings.dat", users.ids, movies.ids)
    counts = users.counts | movies.counts
    published_counts = (6040, 3439, 7, 2, 21, 3883, 81, 19, 301, 10)  # of movielens_log.tar.xz
    assert tuple(counts[field] for field in ID_COUNT_FIELDS) == published_counts
    early = ratings[ratings["time"] < ratings["time"].quantile(0.25)]
    requests = build_requests(early, len(movies.ids), seed=0)
    few = early[early["user"].isin(early["user"].unique()[:40])]
    same = requests.take(np.flatnonzero(np.isin(requests.user, few["user"])))
    assert len(same) > 40
    assert_by_the_rules(same, plain_requests(list(few.itertuples(index=False, name=None))))
    day = day_log(split_days(requests, 12, TEST_SHARE)["2024-02-04"], users, movies)
    assert (day.groups["rank_pos"][:, :, ITEM_COLUMNS.index("upload_timestamp")] > 0).all()
