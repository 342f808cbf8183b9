"""A simulated multi-stage recommender that writes its log in RecFlow's layout.

    python -m deep_components.dataset.simulate --output_dir=data/simulated

A request draws NUM_CANDIDATES distinct videos from a Zipf-like law over popularity ranks. Four stages thin them out,
each by its own view of the true utility of a video v for a user u at time t::

    utility(u, v, t) = w_pop pop(v) + quality(v) + fresh(v, t) + sum_f p_u[f] q_v[f] / sqrt(F)
    view(u, v, t)    = the same with the stage's own w_pop, only its first factors f, and normal noise

    candidates 120 -> prerank 70 -> coarse 42 -> rank 20 -> rerank 10 (exposed)

``quality`` and the factors q_v are sums of parts shared by a category, an author and the video; p_u is a sum of parts
shared by a (gender, age) cell, a province, a device and the user. Re-ranking also pushes apart videos of one category.
Of the videos a stage drops, GROUP_SIZE random ones are logged, best first.

No array has the size of a vocabulary: every property of an id is a hash of (seed, property, id), and ids are drawn by
inverting the law in closed form. A day's own draws depend on the seed, the vocabularies, the first day (which dates the
uploads) and its own date; what a day takes from the days before it is the histories.
"""

import argparse
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta, timezone
from enum import IntEnum, auto
from itertools import pairwise
from pathlib import Path

import numpy as np

from deep_components.cascade import THREE_STAGE
from deep_components.cli import progress, run_command
from deep_components.dataset.importers.recflow_files import (
    GROUP_NAMES,
    HISTORY_COLUMNS,
    HISTORY_LENGTH,
    ITEM_COLUMNS,
    ORIGIN_FILE,
    DayLog,
    feather_path,
    history_path,
    request_path,
    write_day,
    write_id_counts,
    write_origin,
)
from deep_components.errors import InputError
from deep_components.files import write_atomically

logger = logging.getLogger(__name__)

FIRST_TRAINING_DAY = date(2024, 1, 13)
TEST_DAY = date(2024, 2, 4)
MAX_DAYS = (TEST_DAY - FIRST_TRAINING_DAY).days + 1  # every day of Period 1 before the test day, and the test day
LOCAL_TIME = timezone(timedelta(hours=8))  # Asia/Shanghai, which has no summer time

MIN_VIDEOS = 200
MAX_IDS = 2**31  # the rank -> id map multiplies two numbers below this in int64
MAX_REQUESTS_PER_DAY = 86_400_000  # request times of a day are distinct milliseconds

AGES, GENDERS, PROVINCES, UPLOAD_TYPES = 7, 3, 34, 10
CATEGORIES_ONE, CATEGORIES_TWO = 40, 200
CATEGORY_ONE_PADDING = 2  # readers pad category_level_one with 2, so no video has it

GROUP_SIZE = 10
NUM_CANDIDATES = 120
REQUESTS_PER_CHUNK = 1024  # candidates are scored in chunks: about 100 MB of temporaries, whatever the day's size
NUM_FACTORS = 8

UNFINISHED_FILE = "others/simulation_unfinished.json"

# Relative traffic of the 24 local hours: a low at 4, a peak at 21.
HOURLY_TRAFFIC = (5, 3, 2, 1, 1, 1, 2, 4, 5, 5, 6, 7, 9, 9, 7, 6, 6, 7, 8, 10, 12, 13, 12, 9)
GENDER_SHARES = (0.49, 0.49, 0.02)
AGE_SHARES = (0.10, 0.24, 0.22, 0.18, 0.13, 0.08, 0.05)

SHARED_DEVICE = 0.1  # share of users on their neighbour's device
HOME_CATEGORY = 0.8  # share of an author's videos in the author's own category
HOME_UPLOAD_TYPE = 0.6

# Shares of variance; those of one quantity sum to 1.
USER_PARTS = {"cell": 0.55, "province": 0.1, "device": 0.1, "user": 0.25}
VIDEO_PARTS = {"category_one": 0.35, "category_two": 0.25, "author": 0.25, "video": 0.15}
CATEGORY_ONE_SHARE = VIDEO_PARTS["category_one"] / (VIDEO_PARTS["category_one"] + VIDEO_PARTS["category_two"])

# Standard deviations, beside 1 for the taste term (freshness: the bonus of a video that is just uploaded).
QUALITY_WEIGHT = 0.3
POPULARITY_WEIGHT = 0.15
FRESHNESS_WEIGHT = 0.2
FRESHNESS_DAYS = 14.0  # a video's bonus falls by a factor e in this time
MEAN_AGE_DAYS = 60.0  # of a video when the log begins
SECONDS_PER_DAY = 86_400

DIVERSITY_PENALTY = 0.25  # per better-placed video of the same category_level_one
MEDIAN_DURATION_MS, DURATION_SPREAD = 30_000.0, 0.8
VIEW_SLOPE, VIEW_THRESHOLD = 1.5, 1.0  # P(effective view) = sigmoid(slope * (utility - threshold))
MIN_PLAYED = 0.3  # an effective view plays at least this share of the video


@dataclass(frozen=True)
class StageView:
    """What a stage sees of the utility."""

    factors: int
    popularity: float
    noise: float


PRERANK = StageView(factors=3, popularity=0.5, noise=1.2)
COARSE = StageView(factors=5, popularity=0.3, noise=1.1)
RANK = StageView(factors=NUM_FACTORS, popularity=POPULARITY_WEIGHT, noise=1.0)
RERANK = StageView(factors=NUM_FACTORS, popularity=0.0, noise=0.8)
TRUTH = StageView(factors=NUM_FACTORS, popularity=POPULARITY_WEIGHT, noise=0.0)

# Group of the videos a stage drops, its view, how many videos it keeps.
FUNNEL = (("prerank_neg", PRERANK, 70), ("coarse_neg", COARSE, 42), ("rank_neg", RANK, 2 * GROUP_SIZE))


class _Stream(IntEnum):
    """One independent stream of random numbers per purpose."""

    REQUESTS = auto()
    CANDIDATES = auto()
    VIEWS = auto()
    USER_IDS = auto()
    DEVICE_IDS = auto()
    VIDEO_IDS = auto()
    AUTHOR_IDS = auto()
    GENDER = auto()
    AGE = auto()
    PROVINCE = auto()
    SHARED_DEVICE = auto()
    CELL_TASTE = auto()
    PROVINCE_TASTE = auto()
    DEVICE_TASTE = auto()
    USER_TASTE = auto()
    AUTHOR = auto()
    AUTHOR_CATEGORY = auto()
    AUTHOR_UPLOAD_TYPE = auto()
    AT_HOME = auto()
    OWN_CATEGORY = auto()
    HOME_UPLOAD_TYPE = auto()
    OWN_UPLOAD_TYPE = auto()
    UPLOAD_AGE = auto()
    DURATION = auto()
    CATEGORY_ONE_TRAITS = auto()
    CATEGORY_TWO_TRAITS = auto()
    AUTHOR_TRAITS = auto()
    VIDEO_TRAITS = auto()


@dataclass(frozen=True)
class SimulationSettings:
    """The command's arguments. Raises InputError for values that make no log."""

    days: tuple[str, ...] = ("2024-01-13", "2024-01-14", "2024-01-15", "2024-01-16", "2024-02-04")
    requests_per_day: int = 4096
    users: int = 2000
    videos: int = 4000
    authors: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        _check_days(self.days)
        _check_range("requests_per_day", self.requests_per_day, 1, MAX_REQUESTS_PER_DAY)
        _check_range("users", self.users, 1, MAX_IDS)
        _check_range("videos", self.videos, MIN_VIDEOS, MAX_IDS)
        _check_range("authors", self.authors, 1, MAX_IDS)
        _check_range("seed", self.seed, 0, 2**63 - 1)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"--{name}={value}: out of range; give a whole number from {low:,} to {high:,}")


def _check_days(days: tuple[str, ...]) -> None:
    for day in days:
        try:
            known = date.fromisoformat(day).isoformat() == day
        except ValueError:
            known = False
        if not known:
            raise InputError(f"--days: {day!r} is not a date; write days as YYYY-MM-DD, separated by commas")
    if not days or any(later <= earlier for earlier, later in pairwise(days)):
        raise InputError(f"--days={','.join(days)}: is not in order; name each day once, earliest first")


def parse_days(text: str) -> tuple[str, ...]:
    """Dates separated by commas, or a number N: N - 1 days from FIRST_TRAINING_DAY, then TEST_DAY."""
    if not text.strip().isdecimal():
        return tuple(day.strip() for day in text.split(","))
    count = int(text)
    if not 1 <= count <= MAX_DAYS:
        raise InputError(
            f"--days={count}: a number means training days from {FIRST_TRAINING_DAY} and then the test day {TEST_DAY}, "
            f"which more than {MAX_DAYS} would reach; give a number from 1 to {MAX_DAYS}, or list dates"
        )
    training = [FIRST_TRAINING_DAY + timedelta(days=place) for place in range(count - 1)]
    return tuple(day.isoformat() for day in [*training, TEST_DAY])


# ---------------------------------------------------------------------------------------------- hashes and laws


def _stream_key(seed: int, stream: _Stream) -> np.ndarray:
    """A 64-bit key, shape [1]; an array, because uint64 arrays wrap silently and scalars warn."""
    return np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)


def _hash(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """splitmix64's output number ``counter`` after state ``key``: uint64, the counter's shape."""
    mixed = counter.astype(np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _hash_uniform(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (_hash(key, counter) >> np.uint64(11)) * 2.0**-53


def _hash_normal(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """float32, nearly N(0, 1): the standardised sum of the hash's four 16-bit words (Irwin-Hall of order 4)."""
    words = np.ascontiguousarray(_hash(key, counter)).view(np.uint16).reshape(*counter.shape, 4)
    total = words[..., 0].astype(np.float32)
    for place in range(1, 4):
        total += words[..., place]
    return (total - 4 * 32767.5) / np.float32(math.sqrt(4 / 12) * 65536)


def _pick(uniform: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Index i with probability shares[i]."""
    edges = np.cumsum(shares)[:-1] / sum(shares)
    return np.searchsorted(edges, uniform, side="right")


@dataclass(frozen=True)
class _PowerLaw:
    """Ranks 0 .. count-1 with density proportional to (rank + offset) ** -exponent, exponent < 1.

    Its integral is F(x) = ((x + offset)^e - offset^e) / ((count + offset)^e - offset^e), e = 1 - exponent.
    """

    count: int
    exponent: float
    offset: float

    def rank(self, uniform: np.ndarray) -> np.ndarray:
        """floor(F^-1(uniform)): int64."""
        power = 1 - self.exponent
        low, high = self.offset**power, (self.count + self.offset) ** power
        place = (low + uniform * (high - low)) ** (1 / power) - self.offset
        return np.clip(place.astype(np.int64), 0, self.count - 1)

    def share(self, rank: np.ndarray) -> np.ndarray:
        """F at the middle of a rank: about uniform on [0, 1] for ranks drawn from the law."""
        power = 1 - self.exponent
        low, high = self.offset**power, (self.count + self.offset) ** power
        return ((rank + 0.5 + self.offset) ** power - low) / (high - low)


@dataclass(frozen=True)
class _Shuffle:
    """x -> (multiplier x + shift) mod count: one-to-one on [0, count), so that an id does not tell its popularity."""

    count: int
    multiplier: int
    shift: int

    @classmethod
    def of(cls, count: int, seed: int, stream: _Stream) -> "_Shuffle":
        draw = int(_stream_key(seed, stream)[0])
        multiplier = draw % count
        while math.gcd(multiplier, count) != 1:
            multiplier += 1
        return cls(count, multiplier % count, (draw >> 32) % count)

    def __call__(self, rank: np.ndarray) -> np.ndarray:
        return (rank * self.multiplier + self.shift) % self.count


# ---------------------------------------------------------------------------------------------- users and videos


@dataclass(frozen=True)
class _Videos:
    """Candidates of R requests; every array is [R, C] but rows [R, C, 8] (ITEM_COLUMNS) and factors [R, C, F]."""

    rows: np.ndarray
    popularity: np.ndarray
    quality: np.ndarray
    factors: np.ndarray


class _World:
    """Users and videos: pure functions of (seed, id)."""

    def __init__(self, settings: SimulationSettings) -> None:
        seed = settings.seed
        self.settings = settings
        self.keys = {stream: _stream_key(seed, stream) for stream in _Stream}
        self.user_law = _PowerLaw(settings.users, exponent=0.6, offset=20)
        self.video_law = _PowerLaw(settings.videos, exponent=0.7, offset=50)
        self.author_law = _PowerLaw(settings.authors, exponent=0.6, offset=10)
        self.category_law = _PowerLaw(CATEGORIES_TWO, exponent=0.5, offset=10)
        self.user_ids = _Shuffle.of(settings.users, seed, _Stream.USER_IDS)
        self.device_ids = _Shuffle.of(settings.users, seed, _Stream.DEVICE_IDS)
        self.video_ids = _Shuffle.of(settings.videos, seed, _Stream.VIDEO_IDS)
        self.author_ids = _Shuffle.of(settings.authors, seed, _Stream.AUTHOR_IDS)
        self.log_begin = _day_begin_ms(settings.days[0]) // 1000
        self.category_traits = self._category_traits()

    def uniform(self, stream: _Stream, ids: np.ndarray) -> np.ndarray:
        return _hash_uniform(self.keys[stream], ids)

    def traits(self, stream: _Stream, ids: np.ndarray, count: int) -> np.ndarray:
        """``count`` independent normals for each id: float32 [..., count]."""
        return _hash_normal(self.keys[stream], ids[..., None] * count + np.arange(count))

    def _category_traits(self) -> np.ndarray:
        """Quality, then factors, of each category_level_two, its parent's part included: [CATEGORIES_TWO, 1 + F]."""
        category = np.arange(CATEGORIES_TWO)
        parent = self.traits(_Stream.CATEGORY_ONE_TRAITS, category_one(category), 1 + NUM_FACTORS)
        own = self.traits(_Stream.CATEGORY_TWO_TRAITS, category, 1 + NUM_FACTORS)
        return math.sqrt(CATEGORY_ONE_SHARE) * parent + math.sqrt(1 - CATEGORY_ONE_SHARE) * own

    def profiles(self, users: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of users [R] that a request carries."""
        shared = (self.uniform(_Stream.SHARED_DEVICE, users) < SHARED_DEVICE) & (users > 0)
        provinces = tuple(1 / (place + 5) for place in range(PROVINCES))
        return {
            "user_id": users,
            "device_id": self.device_ids(users - shared),
            "age": _pick(self.uniform(_Stream.AGE, users), AGE_SHARES),
            "gender": _pick(self.uniform(_Stream.GENDER, users), GENDER_SHARES),
            "province": _pick(self.uniform(_Stream.PROVINCE, users), provinces),
        }

    def tastes(self, profiles: dict[str, np.ndarray]) -> np.ndarray:
        """p_u: [R, F], of unit variance."""
        parts = {
            "cell": self.traits(_Stream.CELL_TASTE, profiles["gender"] * AGES + profiles["age"], NUM_FACTORS),
            "province": self.traits(_Stream.PROVINCE_TASTE, profiles["province"], NUM_FACTORS),
            "device": self.traits(_Stream.DEVICE_TASTE, profiles["device_id"], NUM_FACTORS),
            "user": self.traits(_Stream.USER_TASTE, profiles["user_id"], NUM_FACTORS),
        }
        return np.sum([math.sqrt(USER_PARTS[name]) * part for name, part in parts.items()], axis=0)

    def videos(self, ranks: np.ndarray) -> _Videos:
        """Everything about the videos of popularity ``ranks`` [R, C]."""
        video = self.video_ids(ranks)
        author = self.author_ids(self.author_law.rank(self.uniform(_Stream.AUTHOR, video)))
        category = self._category(video, author)
        columns = {
            "video_id": video,
            "author_id": author,
            "duration": self._duration(video),
            "category_level_two": category,
            "upload_type": self._upload_type(video, author),
            "upload_timestamp": self._upload_timestamp(video),
            "category_level_one": category_one(category),
            "effective_view": np.zeros_like(video),
        }
        traits = (
            math.sqrt(VIDEO_PARTS["category_one"] + VIDEO_PARTS["category_two"]) * self.category_traits[category]
            + math.sqrt(VIDEO_PARTS["author"]) * self.traits(_Stream.AUTHOR_TRAITS, author, 1 + NUM_FACTORS)
            + math.sqrt(VIDEO_PARTS["video"]) * self.traits(_Stream.VIDEO_TRAITS, video, 1 + NUM_FACTORS)
        )
        return _Videos(
            rows=np.stack([columns[name] for name in ITEM_COLUMNS], axis=-1),
            popularity=math.sqrt(12) * (0.5 - self.video_law.share(ranks)),
            quality=QUALITY_WEIGHT * traits[..., 0],
            factors=traits[..., 1:],
        )

    def _category(self, video: np.ndarray, author: np.ndarray) -> np.ndarray:
        home = self.uniform(_Stream.AT_HOME, video) < HOME_CATEGORY
        own, of_author = self.uniform(_Stream.OWN_CATEGORY, video), self.uniform(_Stream.AUTHOR_CATEGORY, author)
        return self.category_law.rank(np.where(home, of_author, own))

    def _upload_type(self, video: np.ndarray, author: np.ndarray) -> np.ndarray:
        home = self.uniform(_Stream.HOME_UPLOAD_TYPE, video) < HOME_UPLOAD_TYPE
        own, of_author = self.uniform(_Stream.OWN_UPLOAD_TYPE, video), self.uniform(_Stream.AUTHOR_UPLOAD_TYPE, author)
        return (np.where(home, of_author, own) * UPLOAD_TYPES).astype(np.int64)

    def _upload_timestamp(self, video: np.ndarray) -> np.ndarray:
        """Seconds; exponential age at the log's beginning, at least one second, so always before the request."""
        age_days = -MEAN_AGE_DAYS * np.log1p(-self.uniform(_Stream.UPLOAD_AGE, video))
        return self.log_begin - 1 - (age_days * SECONDS_PER_DAY).astype(np.int64)

    def _duration(self, video: np.ndarray) -> np.ndarray:
        """Milliseconds, log-normal."""
        spread = DURATION_SPREAD * self.traits(_Stream.DURATION, video, 1)[..., 0]
        return (MEDIAN_DURATION_MS * np.exp(spread)).astype(np.int64)


def category_one(category_two: np.ndarray) -> np.ndarray:
    """The parent of each category_level_two: every id below CATEGORIES_ONE but the readers' padding index."""
    parent = category_two % (CATEGORIES_ONE - 1)
    return parent + (parent >= CATEGORY_ONE_PADDING)


# ---------------------------------------------------------------------------------------------- a day's requests


def _day_begin_ms(day: str) -> int:
    begin = datetime.combine(date.fromisoformat(day), datetime.min.time(), LOCAL_TIME)
    return int(begin.timestamp()) * 1000


def _distinct(sorted_values: np.ndarray, count: int) -> np.ndarray:
    """Shift sorted integers [..., n] of [0, count) so that they increase strictly; n <= count."""
    steps = np.arange(sorted_values.shape[-1])
    shifted = np.maximum.accumulate(sorted_values - steps, axis=-1)
    return np.clip(shifted, 0, count - sorted_values.shape[-1]) + steps


def _request_times(rng: np.random.Generator, day: str, num_requests: int) -> np.ndarray:
    """Distinct, increasing milliseconds of the local ``day`` [R], with HOURLY_TRAFFIC's rhythm."""
    edges = np.concatenate([[0.0], np.cumsum(HOURLY_TRAFFIC)]) / sum(HOURLY_TRAFFIC)
    hours = np.interp(np.sort(rng.random(num_requests)), edges, np.arange(25))
    milliseconds = (hours * 3_600_000).astype(np.int64)
    return _day_begin_ms(day) + _distinct(milliseconds, MAX_REQUESTS_PER_DAY)


def _draw_candidates(rng: np.random.Generator, law: _PowerLaw, num_requests: int) -> np.ndarray:
    """NUM_CANDIDATES distinct popularity ranks for each request: [R, C]."""
    ranks = np.sort(law.rank(rng.random((num_requests, NUM_CANDIDATES))), axis=1)
    return _distinct(ranks, law.count)


def _freshness(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """exp(-age / FRESHNESS_DAYS) of videos at their request's time: [R, C]."""
    seconds = times[:, None] / 1000 - rows[..., ITEM_COLUMNS.index("upload_timestamp")]
    return np.exp(-seconds / (FRESHNESS_DAYS * SECONDS_PER_DAY))


def _view(view: StageView, videos: _Videos, tastes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The noiseless part of a stage's score (module docstring): [R, C]."""
    taste = np.einsum("rf,rcf->rc", tastes[:, : view.factors], videos.factors[..., : view.factors])
    return (
        view.popularity * videos.popularity
        + videos.quality
        + FRESHNESS_WEIGHT * _freshness(videos.rows, times)
        + taste / math.sqrt(NUM_FACTORS)
    )


def _sort_by(score: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The candidates ``alive`` [R, n] by falling score [R, C]."""
    order = np.argsort(-np.take_along_axis(score, alive, axis=1), axis=1)
    return np.take_along_axis(alive, order, axis=1)


def _sample_dropped(rng: np.random.Generator, dropped: np.ndarray) -> np.ndarray:
    """GROUP_SIZE random ones of dropped [R, n], in their order."""
    places = np.argpartition(rng.random(dropped.shape, np.float32), GROUP_SIZE, axis=1)[:, :GROUP_SIZE]
    return np.take_along_axis(dropped, np.sort(places, axis=1), axis=1)


def _same_category_before(rows: np.ndarray) -> np.ndarray:
    """For videos in order [R, n, 8]: how many earlier ones have the same category_level_one [R, n]."""
    category = rows[..., ITEM_COLUMNS.index("category_level_one")]
    same = category[:, :, None] == category[:, None, :]
    return np.tril(same, -1).sum(axis=2)


def _ranks(order: np.ndarray, of: np.ndarray) -> np.ndarray:
    """1-based place in ``order`` [R, n] of each candidate of ``of`` [R, m]."""
    place = np.zeros((len(order), NUM_CANDIDATES), np.int64)
    np.put_along_axis(place, order, np.arange(1, order.shape[1] + 1)[None], axis=1)
    return np.take_along_axis(place, of, axis=1)


@dataclass(frozen=True)
class _Funnel:
    """Where the candidates of R requests went: candidate places, best first."""

    rank_order: np.ndarray  # [R, 20]
    rerank_order: np.ndarray  # [R, 20]
    dropped: dict[str, np.ndarray]  # {rank_neg, coarse_neg, prerank_neg: [R, 10]}


def _run_stages(rng: np.random.Generator, videos: _Videos, tastes: np.ndarray, times: np.ndarray) -> _Funnel:
    """Thin out the candidates stage by stage."""
    shape = videos.popularity.shape
    alive = np.broadcast_to(np.arange(NUM_CANDIDATES), shape)
    dropped = {}
    for name, view, keep in FUNNEL:
        score = _view(view, videos, tastes, times) + view.noise * rng.standard_normal(shape, np.float32)
        order = _sort_by(score, alive)
        alive, dropped[name] = order[:, :keep], _sample_dropped(rng, order[:, keep:])
    score = _view(RERANK, videos, tastes, times) + RERANK.noise * rng.standard_normal(shape, np.float32)
    first = _sort_by(score, alive)
    crowded = _same_category_before(_take_rows(videos.rows, first))
    diverse = np.take_along_axis(score, first, axis=1) - DIVERSITY_PENALTY * crowded
    rerank_order = np.take_along_axis(first, np.argsort(-diverse, axis=1), axis=1)
    return _Funnel(rank_order=alive, rerank_order=rerank_order, dropped=dropped)


def _take_rows(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.take_along_axis(rows, places[..., None], axis=1)


def _mark_views(rng: np.random.Generator, videos: _Videos, utility: np.ndarray, exposed: np.ndarray) -> None:
    """Draw effective views of the ``exposed`` places [R, 10] into ``videos.rows``; nothing else was viewed."""
    logit = VIEW_SLOPE * (np.take_along_axis(utility, exposed, axis=1) - VIEW_THRESHOLD)
    viewed = rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
    np.put_along_axis(videos.rows[..., ITEM_COLUMNS.index("effective_view")], exposed, viewed.astype(np.int64), axis=1)


def _chunk(
    rng: np.random.Generator, world: _World, profiles: dict[str, np.ndarray], times: np.ndarray
) -> dict[str, np.ndarray]:
    """The groups [R, 10, 8] of R requests, and their rank_index [R, 10] and rerank_index [R, 20]."""
    tastes = world.tastes(profiles)
    videos = world.videos(_draw_candidates(rng, world.video_law, len(times)))
    funnel = _run_stages(rng, videos, tastes, times)
    places = {
        "rank_pos": funnel.rank_order[:, :GROUP_SIZE],
        "rerank_pos": funnel.rerank_order[:, :GROUP_SIZE],
        "rerank_neg": funnel.rerank_order[:, GROUP_SIZE:],
        **funnel.dropped,
    }
    _mark_views(rng, videos, _view(TRUTH, videos, tastes, times), places["rerank_pos"])
    groups = {name: _take_rows(videos.rows, places[name]) for name in GROUP_NAMES}
    rank_index = _ranks(funnel.rank_order, of=places["rank_pos"])
    return groups | {"rank_index": rank_index, "rerank_index": _ranks(funnel.rerank_order, of=funnel.rerank_order)}


def _requests(world: _World, place: int) -> dict[str, np.ndarray]:
    """The request columns of day number ``place``; every array [R]."""
    settings = world.settings
    rng = _day_rng(settings, _Stream.REQUESTS, settings.days[place])
    times = _request_times(rng, settings.days[place], settings.requests_per_day)
    users = world.user_ids(world.user_law.rank(rng.random(len(times))))
    ids = 1 + place * settings.requests_per_day + np.arange(len(times))
    return {"request_id": ids, "request_timestamp": times, **world.profiles(users)}


def _day_rng(settings: SimulationSettings, stream: _Stream, day: str) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream, date.fromisoformat(day).toordinal()])


def _day_items(world: _World, day: str, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """_chunk's arrays for the whole day, computed REQUESTS_PER_CHUNK requests at a time."""
    rng = _day_rng(world.settings, _Stream.CANDIDATES, day)
    num_requests = len(request["request_id"])
    whole: dict[str, np.ndarray] = {}
    for start in progress(range(0, num_requests, REQUESTS_PER_CHUNK), day, unit="chunk"):
        part = {field: values[start : start + REQUESTS_PER_CHUNK] for field, values in request.items()}
        for name, values in _chunk(rng, world, part, part["request_timestamp"]).items():
            whole.setdefault(name, np.empty((num_requests, *values.shape[1:]), np.int64))
            whole[name][start : start + len(values)] = values
    return whole


# ---------------------------------------------------------------------------------------------- histories


class _Histories:
    """The last HISTORY_LENGTH effective views of every user seen so far, in one array ordered by user, then time."""

    def __init__(self) -> None:
        self.users = np.zeros(0, np.int64)  # [E]
        self.rows = np.zeros((0, len(HISTORY_COLUMNS)), np.int64)  # [E, 10]

    def advance(self, request: dict[str, np.ndarray], viewed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Histories [R, 50, 10] of a day's requests; then remember the day.

        ``rows`` [E', 10] are the day's views in time order, ``viewed`` [E'] the places of their requests. A key
        (user, 0 for a kept view or 1 + place of its request) sorts all views; those of a user before the request at
        place i have keys in [(user, 0), (user, 1 + i)).
        """
        num_requests = len(request["user_id"])
        owners = np.concatenate([self.users, request["user_id"][viewed]])
        turn = np.concatenate([np.zeros(len(self.users), np.int64), 1 + viewed])
        keys = owners * (num_requests + 1) + turn
        order = np.argsort(keys, kind="stable")
        keys, owners, rows = keys[order], owners[order], np.concatenate([self.rows, rows])[order]
        begin = request["user_id"] * (num_requests + 1)
        low = np.searchsorted(keys, begin)
        high = np.searchsorted(keys, begin + 1 + np.arange(num_requests))
        history = _last_rows(rows, low, high)
        self._keep(owners, rows)
        return history

    def _keep(self, owners: np.ndarray, rows: np.ndarray) -> None:
        """Drop all but the last HISTORY_LENGTH rows of each owner; owners are sorted."""
        from_end = np.searchsorted(owners, owners, side="right") - np.arange(len(owners))
        last = from_end <= HISTORY_LENGTH
        self.users, self.rows = owners[last], rows[last]


def _last_rows(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """rows[max(low, high - 50) : high] for each of R spans, left-padded with zero rows: [R, 50, 10]."""
    history = np.zeros((len(low), HISTORY_LENGTH, rows.shape[1]), np.int64)
    for start in range(0, len(low), REQUESTS_PER_CHUNK):
        span = slice(start, start + REQUESTS_PER_CHUNK)
        places = high[span, None] - np.arange(HISTORY_LENGTH, 0, -1)
        valid = places >= low[span, None]
        history[span][valid] = rows[places[valid]]
    return history


def _view_rows(
    rng: np.random.Generator, request: dict[str, np.ndarray], exposed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of exposed [R, 10, 8] the views [E', 10] (HISTORY_COLUMNS), and the place of each one's request [E']."""
    viewed, position = np.nonzero(exposed[..., ITEM_COLUMNS.index("effective_view")])
    items = exposed[viewed, position]
    columns = {name: items[:, place] for place, name in enumerate(ITEM_COLUMNS)}
    columns["request_timestamp"] = request["request_timestamp"][viewed]
    columns["request_id"] = request["request_id"][viewed]
    played = rng.uniform(MIN_PLAYED, 1.0, len(items))
    columns["playing_time"] = np.maximum(1, columns["duration"] * played).astype(np.int64)
    return np.stack([columns[name] for name in HISTORY_COLUMNS], axis=1), viewed


# ---------------------------------------------------------------------------------------------- the log


def _day_log(world: _World, histories: _Histories, place: int) -> DayLog:
    """Day number ``place`` of the log; ``histories`` must have seen the days before it, and sees this one."""
    day = world.settings.days[place]
    request = _requests(world, place)
    items = _day_items(world, day, request)
    rows, viewed = _view_rows(_day_rng(world.settings, _Stream.VIEWS, day), request, items["rerank_pos"])
    return DayLog(
        request=request,
        groups={name: items[name] for name in GROUP_NAMES},
        rank_index=items["rank_index"],
        rerank_index=items["rerank_index"],
        history=histories.advance(request, viewed, rows),
    )


def simulate(output_dir: Path, settings: SimulationSettings) -> None:
    """Write the log of ``settings`` under ``output_dir``; a folder with ``others/origin.json`` is complete.

    A simulated log already there is replaced, any other content refused (InputError).
    """
    _prepare(output_dir, settings)
    world, histories = _World(settings), _Histories()
    for place, day in enumerate(settings.days):
        # No name holds the day's arrays, so they are freed before the next day's are made.
        write_day(output_dir, day, _day_log(world, histories, place))
        logger.info("%s: %s requests written", day, f"{settings.requests_per_day:,}")
    write_id_counts(output_dir, id_counts(settings))
    note = "drawn by deep_components.dataset.simulate: shows that the software works, says nothing about real users"
    write_origin(output_dir, {"data": "simulated", "note": note, **asdict(settings)})
    (output_dir / UNFINISHED_FILE).unlink()


def id_counts(settings: SimulationSettings) -> dict[str, int]:
    """Every field's vocabulary size, used or not."""
    return {
        "user_id": settings.users,
        "device_id": settings.users,
        "age": AGES,
        "gender": GENDERS,
        "province": PROVINCES,
        "video_id": settings.videos,
        "author_id": settings.authors,
        "category_level_one": CATEGORIES_ONE,
        "category_level_two": CATEGORIES_TWO,
        "upload_type": UPLOAD_TYPES,
    }


def _prepare(output_dir: Path, settings: SimulationSettings) -> None:
    """Refuse a folder of anything but a simulated log; mark it unfinished, and drop days that will not be replaced."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is a file; name a folder")
    if output_dir.exists() and any(output_dir.iterdir()) and not _is_simulated(output_dir):
        raise InputError(f"--output_dir={output_dir}: holds something other than a simulated log; name an empty folder")
    text = json.dumps(asdict(settings), indent=2, sort_keys=True) + "\n"
    write_atomically(output_dir / UNFINISHED_FILE, lambda file: file.write(text.encode()))
    (output_dir / ORIGIN_FILE).unlink(missing_ok=True)
    for path_of in (feather_path, request_path, history_path):
        pattern = path_of(output_dir, "*")
        for path in pattern.parent.glob(pattern.name):
            if path.stem not in settings.days:
                path.unlink()


def _is_simulated(root: Path) -> bool:
    """Whether a finished or an unfinished run of this module filled the folder."""
    if (root / UNFINISHED_FILE).exists():
        return True
    try:
        origin = json.loads((root / ORIGIN_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(origin, dict) and origin.get("data") == "simulated"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The output, and the size of what is simulated."""
    defaults = SimulationSettings()
    parser = argparse.ArgumentParser(
        prog="python -m deep_components.dataset.simulate",
        description="Write a simulated multi-stage recommender's log in RecFlow's layout.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the log; a simulated one is replaced")
    parser.add_argument(
        "--days",
        default=",".join(defaults.days),
        help=f"dates separated by commas, or N: N - 1 days from {FIRST_TRAINING_DAY}, then {TEST_DAY} (%(default)s)",
    )
    parser.add_argument("--requests_per_day", type=int, default=defaults.requests_per_day, help="(%(default)s)")
    parser.add_argument("--users", type=int, default=defaults.users, help="number of user ids (%(default)s)")
    parser.add_argument("--videos", type=int, default=defaults.videos, help="number of video ids (%(default)s)")
    parser.add_argument("--authors", type=int, default=defaults.authors, help="number of author ids (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="same arguments, same bytes (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = vars(parse_args(argv))
    output_dir = args.pop("output_dir")
    simulate(output_dir, SimulationSettings(**args | {"days": parse_days(args["days"])}))


if __name__ == "__main__":
    sys.exit(run_command(main))
