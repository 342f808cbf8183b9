"""A simulated multi-stage recommender that writes its log in RecFlow's layout.

    lcron simulate --output_dir=data/simulated

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

import logging
import math
import sys
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime, timedelta, timezone
from enum import IntEnum
from itertools import pairwise
from pathlib import Path

import numpy as np

from deep_components.cli import Parser, progress, run_command
from deep_components.dataset.clock import is_date
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.errors import InputError
from deep_components.files import write_atomically

logger = logging.getLogger(__name__)

FIRST_DAY, TEST_DAY = recflow.PERIOD_1[0], recflow.PERIOD_1[-1]
LOCAL_TIME = timezone(timedelta(hours=8))  # Asia/Shanghai, which has no summer time

MAX_IDS = 2**31  # the rank -> id map multiplies two numbers below this in int64
MILLISECONDS_PER_DAY, SECONDS_PER_DAY = 86_400_000, 86_400
LIMITS = {
    "requests_per_day": (1, MILLISECONDS_PER_DAY),  # request times of a day are distinct milliseconds
    "users": (1, MAX_IDS),
    "videos": (200, MAX_IDS),
    "authors": (1, MAX_IDS),
    "seed": (0, 2**63 - 1),
}

AGES, GENDERS, PROVINCES, UPLOAD_TYPES = 7, 3, 34, 10
CATEGORIES_ONE, CATEGORIES_TWO = 40, 200

GROUP_SIZE, NUM_CANDIDATES, NUM_FACTORS = 10, 120, 8
REQUESTS_PER_CHUNK = 1024  # candidates are scored in chunks: about 100 MB of temporaries, whatever the day's size
UNFINISHED_FILE = "others/simulation_unfinished.json"

# Relative traffic of the 24 local hours: a low at 4, a peak at 21.
HOURLY_TRAFFIC = (5, 3, 2, 1, 1, 1, 2, 4, 5, 5, 6, 7, 9, 9, 7, 6, 6, 7, 8, 10, 12, 13, 12, 9)
GENDER_SHARES = (0.49, 0.49, 0.02)
AGE_SHARES = (0.10, 0.24, 0.22, 0.18, 0.13, 0.08, 0.05)
PROVINCE_SHARES = tuple(1 / (province + 5) for province in range(PROVINCES))
SHARED_DEVICE = 0.1  # share of users on their neighbour's device
HOME_CATEGORY, HOME_UPLOAD_TYPE = 0.8, 0.6  # share of an author's videos in the author's own category, upload type

# Shares of variance; those of one quantity sum to 1.
USER_PARTS = {"cell": 0.55, "province": 0.1, "device": 0.1, "user": 0.25}
VIDEO_PARTS = {"category": 0.6, "author": 0.25, "video": 0.15}
CATEGORY_ONE_SHARE = 0.35 / (0.35 + 0.25)  # of a category's part; the rest is that of category_level_two

# Standard deviations, beside 1 for the taste term (freshness: the bonus of a video that is just uploaded).
QUALITY_WEIGHT, POPULARITY_WEIGHT, FRESHNESS_WEIGHT = 0.3, 0.15, 0.2
FRESHNESS_DAYS = 14.0  # a video's bonus falls by a factor e in this time
MEAN_AGE_DAYS = 60.0  # of a video when the log begins

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

# One independent stream of random numbers per purpose; their numbers, hence their order, are part of the log's bytes.
Stream = IntEnum(
    "Stream",
    "REQUESTS CANDIDATES VIEWS USER_IDS DEVICE_IDS VIDEO_IDS AUTHOR_IDS GENDER AGE PROVINCE SHARED_DEVICE CELL_TASTE "
    "PROVINCE_TASTE DEVICE_TASTE USER_TASTE AUTHOR AUTHOR_CATEGORY AUTHOR_UPLOAD_TYPE AT_HOME OWN_CATEGORY "
    "HOME_UPLOAD_TYPE OWN_UPLOAD_TYPE UPLOAD_AGE DURATION CATEGORY_ONE_TRAITS CATEGORY_TWO_TRAITS AUTHOR_TRAITS "
    "VIDEO_TRAITS",
)

Columns = dict[str, np.ndarray]


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
        days = self.days
        if not days or not all(map(is_date, days)) or any(later <= earlier for earlier, later in pairwise(days)):
            raise InputError(
                f"--days={','.join(days)}: not dates in order; write days as YYYY-MM-DD, each once, earliest first, "
                "separated by commas"
            )
        for name, (low, high) in LIMITS.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"--{name}={value}: out of range; give a whole number from {low:,} to {high:,}")


def parse_days(text: str) -> tuple[str, ...]:
    """Dates separated by commas, or a number N: the first N - 1 days of Period 1, then its last, the test day."""
    if not text.strip().isdecimal():
        return tuple(day.strip() for day in text.split(","))
    if not 1 <= int(text) <= len(recflow.PERIOD_1):
        raise InputError(
            f"--days={text}: a number means training days from {FIRST_DAY} and then the test day {TEST_DAY}; give a "
            f"number from 1 to {len(recflow.PERIOD_1)}, or list dates"
        )
    return *recflow.PERIOD_1[: int(text) - 1], TEST_DAY


# ---------------------------------------------------------------------------------------------- hashes and laws


def stream_key(seed: int, stream: Stream) -> np.ndarray:
    """A 64-bit key, shape [1]; an array, because uint64 arrays wrap silently and scalars warn."""
    return np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)


def splitmix64(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
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


def hashed_normal(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """float32, nearly N(0, 1): the standardised sum of the hash's four 16-bit words (Irwin-Hall of order 4)."""
    words = np.ascontiguousarray(splitmix64(key, counter)).view(np.uint16).reshape(*counter.shape, 4)
    total = words[..., 0].astype(np.float32)
    for word in range(1, 4):  # sums are exact: below 2^24
        total += words[..., word]
    return (total - 4 * 32767.5) / np.float32(math.sqrt(4 / 12) * 65536)


def _pick(uniform: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Index i with probability proportional to shares[i]."""
    edges = np.cumsum(shares)[:-1] / sum(shares)
    return np.searchsorted(edges, uniform, side="right")


@dataclass(frozen=True)
class PowerLaw:
    """Ranks 0 .. count-1 with density proportional to (rank + offset) ** -exponent, exponent < 1.

    Its integral is F(x) = ((x + offset)^e - offset^e) / ((count + offset)^e - offset^e), e = 1 - exponent.
    """

    count: int
    exponent: float
    offset: float

    def _constants(self) -> tuple[float, float, float]:
        power = 1 - self.exponent
        return power, self.offset**power, (self.count + self.offset) ** power

    def rank(self, uniform: np.ndarray) -> np.ndarray:
        """floor(F^-1(uniform)): int64."""
        power, low, high = self._constants()
        rank = (low + uniform * (high - low)) ** (1 / power) - self.offset
        return np.clip(rank.astype(np.int64), 0, self.count - 1)

    def share(self, rank: np.ndarray) -> np.ndarray:
        """F at the middle of a rank: about uniform on [0, 1] for ranks drawn from the law."""
        power, low, high = self._constants()
        return ((rank + 0.5 + self.offset) ** power - low) / (high - low)


def shuffled(rank: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """(multiplier * rank + shift) mod count: one-to-one on [0, count), so that an id does not tell its popularity."""
    draw = int(key[0])
    multiplier = draw % count
    while math.gcd(multiplier, count) != 1:
        multiplier += 1
    return (rank * (multiplier % count) + (draw >> 32) % count) % count


# ---------------------------------------------------------------------------------------------- users and videos


@dataclass(frozen=True)
class Videos:
    """Candidates of R requests: the columns of ``items`` (ITEM_COLUMNS) and all else [R, C], but factors [R, C, F]."""

    items: Columns
    popularity: np.ndarray
    quality: np.ndarray
    factors: np.ndarray


class World:
    """Users and videos: pure functions of (seed, id)."""

    def __init__(self, settings: SimulationSettings) -> None:
        self.settings = settings
        self.keys = {stream: stream_key(settings.seed, stream) for stream in Stream}
        self.user_law = PowerLaw(settings.users, exponent=0.6, offset=20)
        self.video_law = PowerLaw(settings.videos, exponent=0.7, offset=50)
        self.author_law = PowerLaw(settings.authors, exponent=0.6, offset=10)
        self.category_law = PowerLaw(CATEGORIES_TWO, exponent=0.5, offset=10)
        category = np.arange(CATEGORIES_TWO)  # the traits of each, its parent's part included: [CATEGORIES_TWO, 1 + F]
        self.category_traits = math.sqrt(CATEGORY_ONE_SHARE) * self.traits(
            Stream.CATEGORY_ONE_TRAITS, category_one(category)
        ) + math.sqrt(1 - CATEGORY_ONE_SHARE) * self.traits(Stream.CATEGORY_TWO_TRAITS, category)

    def uniform(self, stream: Stream, ids: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each id: float64."""
        return (splitmix64(self.keys[stream], ids) >> np.uint64(11)) * 2.0**-53

    def normals(self, stream: Stream, ids: np.ndarray, count: int) -> np.ndarray:
        """``count`` independent normals for each id: float32 [..., count]."""
        return hashed_normal(self.keys[stream], ids[..., None] * count + np.arange(count))

    def traits(self, stream: Stream, ids: np.ndarray) -> np.ndarray:
        """Quality, then factors: float32 [..., 1 + F]."""
        return self.normals(stream, ids, 1 + NUM_FACTORS)

    def users(self, uniform: np.ndarray) -> Columns:
        """The fields that requests of users drawn by ``uniform`` [R] carry."""
        count = self.settings.users
        user = shuffled(self.user_law.rank(uniform), count, self.keys[Stream.USER_IDS])
        on_neighbours = (self.uniform(Stream.SHARED_DEVICE, user) < SHARED_DEVICE) & (user > 0)
        return {
            "user_id": user,
            "device_id": shuffled(user - on_neighbours, count, self.keys[Stream.DEVICE_IDS]),
            "age": _pick(self.uniform(Stream.AGE, user), AGE_SHARES),
            "gender": _pick(self.uniform(Stream.GENDER, user), GENDER_SHARES),
            "province": _pick(self.uniform(Stream.PROVINCE, user), PROVINCE_SHARES),
        }

    def tastes(self, users: Columns) -> np.ndarray:
        """p_u: [R, F], of unit variance."""
        parts = {
            "cell": self.normals(Stream.CELL_TASTE, users["gender"] * AGES + users["age"], NUM_FACTORS),
            "province": self.normals(Stream.PROVINCE_TASTE, users["province"], NUM_FACTORS),
            "device": self.normals(Stream.DEVICE_TASTE, users["device_id"], NUM_FACTORS),
            "user": self.normals(Stream.USER_TASTE, users["user_id"], NUM_FACTORS),
        }
        return np.sum([math.sqrt(USER_PARTS[name]) * part for name, part in parts.items()], axis=0)

    def videos(self, ranks: np.ndarray) -> Videos:
        """Everything about the videos of popularity ``ranks`` [R, C]."""
        video = shuffled(ranks, self.settings.videos, self.keys[Stream.VIDEO_IDS])
        author_rank = self.author_law.rank(self.uniform(Stream.AUTHOR, video))
        author = shuffled(author_rank, self.settings.authors, self.keys[Stream.AUTHOR_IDS])

        def trait(home_share: float, home: Stream, of_author: Stream, own: Stream) -> np.ndarray:
            """The author's number for a share of the videos, elsewhere the video's own."""
            at_home = self.uniform(home, video) < home_share
            return np.where(at_home, self.uniform(of_author, author), self.uniform(own, video))

        category = self.category_law.rank(
            trait(HOME_CATEGORY, Stream.AT_HOME, Stream.AUTHOR_CATEGORY, Stream.OWN_CATEGORY)
        )
        upload_type = trait(
            HOME_UPLOAD_TYPE, Stream.HOME_UPLOAD_TYPE, Stream.AUTHOR_UPLOAD_TYPE, Stream.OWN_UPLOAD_TYPE
        )
        # Exponential age at the log's beginning, at least one second, so that the upload is always before the request.
        age_days = -MEAN_AGE_DAYS * np.log1p(-self.uniform(Stream.UPLOAD_AGE, video))
        newest = _day_begin_ms(self.settings.days[0]) // 1000 - 1
        log_duration = DURATION_SPREAD * self.normals(Stream.DURATION, video, 1)[..., 0]
        traits = (
            math.sqrt(VIDEO_PARTS["category"]) * self.category_traits[category]
            + math.sqrt(VIDEO_PARTS["author"]) * self.traits(Stream.AUTHOR_TRAITS, author)
            + math.sqrt(VIDEO_PARTS["video"]) * self.traits(Stream.VIDEO_TRAITS, video)
        )
        items = {
            "video_id": video,
            "author_id": author,
            "duration": (MEDIAN_DURATION_MS * np.exp(log_duration)).astype(np.int64),
            "category_level_two": category,
            "upload_type": (upload_type * UPLOAD_TYPES).astype(np.int64),
            "upload_timestamp": newest - (age_days * SECONDS_PER_DAY).astype(np.int64),
            "category_level_one": category_one(category),
            "effective_view": np.zeros_like(video),
        }
        popularity = math.sqrt(12) * (0.5 - self.video_law.share(ranks))
        return Videos(items, popularity, quality=QUALITY_WEIGHT * traits[..., 0], factors=traits[..., 1:])


def category_one(category_two: np.ndarray) -> np.ndarray:
    """The parent of each category_level_two: every id below CATEGORIES_ONE but the readers' padding index."""
    parent = category_two % (CATEGORIES_ONE - 1)
    return parent + (parent >= recflow.CATEGORY_ONE_PADDING)


# ---------------------------------------------------------------------------------------------- a day's requests


def _day_begin_ms(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=LOCAL_TIME).timestamp()) * 1000


def _day_rng(settings: SimulationSettings, stream: Stream, day: str) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream, date.fromisoformat(day).toordinal()])


def distinct(sorted_values: np.ndarray, count: int) -> np.ndarray:
    """Shift sorted integers [..., n] of [0, count) so that they increase strictly; n <= count."""
    steps = np.arange(sorted_values.shape[-1])
    shifted = np.maximum.accumulate(sorted_values - steps, axis=-1)
    return np.clip(shifted, 0, count - sorted_values.shape[-1]) + steps


def requests_of(world: World, day: str) -> Columns:
    """The request columns of a day, in order of time, with HOURLY_TRAFFIC's rhythm; every array [R]."""
    settings = world.settings
    rng = _day_rng(settings, Stream.REQUESTS, day)
    edges = np.concatenate([[0.0], np.cumsum(HOURLY_TRAFFIC)]) / sum(HOURLY_TRAFFIC)
    hours = np.interp(np.sort(rng.random(settings.requests_per_day)), edges, np.arange(25))
    times = _day_begin_ms(day) + distinct((hours * 3_600_000).astype(np.int64), MILLISECONDS_PER_DAY)
    ids = 1 + settings.days.index(day) * settings.requests_per_day + np.arange(len(times))
    return {"request_id": ids, "request_timestamp": times, **world.users(rng.random(len(times)))}


def draw_candidates(rng: np.random.Generator, law: PowerLaw, num_requests: int) -> np.ndarray:
    """NUM_CANDIDATES distinct popularity ranks for each request: [R, C]."""
    ranks = np.sort(law.rank(rng.random((num_requests, NUM_CANDIDATES))), axis=1)
    return distinct(ranks, law.count)


def seen_by(view: StageView, videos: Videos, tastes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The noiseless part of a stage's score (module docstring): [R, C]."""
    age_seconds = times[:, None] / 1000 - videos.items["upload_timestamp"]
    taste = np.einsum("rf,rcf->rc", tastes[:, : view.factors], videos.factors[..., : view.factors])
    return (
        view.popularity * videos.popularity
        + videos.quality
        + FRESHNESS_WEIGHT * np.exp(-age_seconds / (FRESHNESS_DAYS * SECONDS_PER_DAY))
        + taste / math.sqrt(NUM_FACTORS)
    )


def _sort_by(score: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidates [R, n] by falling score [R, C]."""
    order = np.argsort(-np.take_along_axis(score, candidates, axis=1), axis=1)
    return np.take_along_axis(candidates, order, axis=1)


def _sample(rng: np.random.Generator, dropped: np.ndarray) -> np.ndarray:
    """GROUP_SIZE random ones of dropped [R, n], in their order."""
    chosen = np.argpartition(rng.random(dropped.shape, np.float32), GROUP_SIZE, axis=1)[:, :GROUP_SIZE]
    return np.take_along_axis(dropped, np.sort(chosen, axis=1), axis=1)


def _run_stages(rng: np.random.Generator, videos: Videos, tastes: np.ndarray, times: np.ndarray) -> Columns:
    """Thin out the candidates stage by stage: for each group the indices of its candidates, best first, [R, 10]."""

    def scores(view: StageView) -> np.ndarray:
        noise = rng.standard_normal(videos.popularity.shape, np.float32)
        return seen_by(view, videos, tastes, times) + view.noise * noise

    groups = {}
    kept = np.broadcast_to(np.arange(NUM_CANDIDATES), videos.popularity.shape)
    for name, view, keep in FUNNEL:
        order = _sort_by(scores(view), kept)
        kept, groups[name] = order[:, :keep], _sample(rng, order[:, keep:])
    score = scores(RERANK)
    reranked = _sort_by(score, kept)
    category = np.take_along_axis(videos.items["category_level_one"], reranked, axis=1)
    same_before = np.tril(category[:, :, None] == category[:, None, :], -1).sum(axis=2)
    diverse = np.take_along_axis(score, reranked, axis=1) - DIVERSITY_PENALTY * same_before
    reranked = np.take_along_axis(reranked, np.argsort(-diverse, axis=1), axis=1)
    head = slice(None), slice(GROUP_SIZE)
    return groups | {"rank_pos": kept[head], "rerank_pos": reranked[head], "rerank_neg": reranked[:, GROUP_SIZE:]}


def _chunk(rng: np.random.Generator, world: World, request: Columns) -> np.ndarray:
    """The videos of R requests, as GROUP_NAMES and ITEM_COLUMNS have them: [R, 6, 10, 8]."""
    tastes, times = world.tastes(request), request["request_timestamp"]
    videos = world.videos(draw_candidates(rng, world.video_law, len(times)))
    groups = _run_stages(rng, videos, tastes, times)
    exposed = groups["rerank_pos"]  # nothing else is viewed
    utility = np.take_along_axis(seen_by(TRUTH, videos, tastes, times), exposed, axis=1)
    viewed = rng.random(exposed.shape) < 1 / (1 + np.exp(-VIEW_SLOPE * (utility - VIEW_THRESHOLD)))
    np.put_along_axis(videos.items["effective_view"], exposed, viewed.astype(np.int64), axis=1)
    chosen = np.concatenate([groups[name] for name in recflow.GROUP_NAMES], axis=1)
    columns = [np.take_along_axis(videos.items[name], chosen, axis=1) for name in recflow.ITEM_COLUMNS]
    return np.stack(columns, axis=-1).reshape(
        len(times), len(recflow.GROUP_NAMES), GROUP_SIZE, len(recflow.ITEM_COLUMNS)
    )


def _day_items(world: World, day: str, request: Columns) -> np.ndarray:
    """_chunk's array for the whole day, computed REQUESTS_PER_CHUNK requests at a time."""
    rng = _day_rng(world.settings, Stream.CANDIDATES, day)
    num_requests = len(request["request_id"])
    items = np.empty((num_requests, len(recflow.GROUP_NAMES), GROUP_SIZE, len(recflow.ITEM_COLUMNS)), np.int64)
    for start in progress(range(0, num_requests, REQUESTS_PER_CHUNK), day, unit="chunk"):
        span = slice(start, start + REQUESTS_PER_CHUNK)
        items[span] = _chunk(rng, world, {field: values[span] for field, values in request.items()})
    return items


# ---------------------------------------------------------------------------------------------- histories


class Histories:
    """The last HISTORY_LENGTH effective views of every user seen so far, in one array ordered by user, then time."""

    def __init__(self) -> None:
        self.users = np.zeros(0, np.int64)  # [E]
        self.rows = np.zeros((0, len(recflow.HISTORY_COLUMNS)), np.int64)  # [E, 10]

    def advance(self, users: np.ndarray, viewed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Histories [R, 50, 10] of a day's requests, made by ``users`` [R]; then remember the day.

        ``rows`` [E', 10] are the day's views in time order, ``viewed`` [E'] the numbers of their requests. A key
        (user, 0 for a kept view or 1 + number of its request) sorts all views; those of a user before request i have
        keys in [(user, 0), (user, 1 + i)).
        """
        period = len(users) + 1
        owners = np.concatenate([self.users, users[viewed]])
        keys = owners * period + np.concatenate([np.zeros(len(self.users), np.int64), 1 + viewed])
        order = np.argsort(keys, kind="stable")
        keys, owners, rows = keys[order], owners[order], np.concatenate([self.rows, rows])[order]
        low = np.searchsorted(keys, users * period)
        high = np.searchsorted(keys, users * period + 1 + np.arange(len(users)))
        last = np.searchsorted(owners, owners, side="right") - np.arange(len(owners)) <= recflow.HISTORY_LENGTH
        self.users, self.rows = owners[last], rows[last]
        return _last_rows(rows, low, high)


def _last_rows(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """rows[max(low, high - 50) : high] for each of R spans, left-padded with zero rows: [R, 50, 10]."""
    history = np.zeros((len(low), recflow.HISTORY_LENGTH, rows.shape[1]), np.int64)
    for start in range(0, len(low), REQUESTS_PER_CHUNK):
        span = slice(start, start + REQUESTS_PER_CHUNK)
        wanted = high[span, None] - np.arange(recflow.HISTORY_LENGTH, 0, -1)
        valid = wanted >= low[span, None]
        history[span][valid] = rows[wanted[valid]]
    return history


def _views(rng: np.random.Generator, request: Columns, exposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of exposed [R, 10, 8] the numbers of the viewed ones' requests [E'], and their rows [E', 10] of a history."""
    viewed, position = np.nonzero(exposed[..., recflow.ITEM_COLUMNS.index("effective_view")])
    columns = dict(zip(recflow.ITEM_COLUMNS, exposed[viewed, position].T, strict=True))
    columns |= {name: request[name][viewed] for name in ("request_timestamp", "request_id")}
    played = rng.uniform(MIN_PLAYED, 1.0, len(viewed))
    columns["playing_time"] = np.maximum(1, columns["duration"] * played).astype(np.int64)
    return viewed, np.stack([columns[name] for name in recflow.HISTORY_COLUMNS], axis=1)


# ---------------------------------------------------------------------------------------------- the log


def _day_log(world: World, histories: Histories, day: str) -> recflow.DayLog:
    """A day of the log; ``histories`` must have seen the days before it, and sees this one."""
    request = requests_of(world, day)
    items = _day_items(world, day, request)
    groups = {name: items[:, number] for number, name in enumerate(recflow.GROUP_NAMES)}
    viewed, rows = _views(_day_rng(world.settings, Stream.VIEWS, day), request, groups["rerank_pos"])
    return recflow.DayLog(
        request=request,
        groups=groups,
        rank_index=np.tile(np.arange(1, GROUP_SIZE + 1), (len(items), 1)),
        rerank_index=np.tile(np.arange(1, 2 * GROUP_SIZE + 1), (len(items), 1)),
        history=histories.advance(request["user_id"], viewed, rows),
    )


def simulate(output_dir: Path, settings: SimulationSettings) -> None:
    """Write the log of ``settings`` under ``output_dir``; a folder with ``others/origin.json`` is complete.

    A simulated log already there is replaced, any other content refused (InputError).
    """
    _prepare(output_dir, settings)
    world, histories = World(settings), Histories()
    for day in settings.days:
        # No name holds the day's arrays, so they are freed before the next day's are made.
        recflow.write_day(output_dir, day, _day_log(world, histories, day))
        logger.info("%s: %s requests written", day, f"{settings.requests_per_day:,}")
    counts = {"user_id": settings.users, "device_id": settings.users, "age": AGES, "gender": GENDERS}
    counts |= {"province": PROVINCES, "video_id": settings.videos, "author_id": settings.authors}
    counts |= {"category_level_one": CATEGORIES_ONE, "category_level_two": CATEGORIES_TWO, "upload_type": UPLOAD_TYPES}
    recflow.write_id_counts(output_dir, counts)
    note = "drawn by deep_components.dataset.simulate: shows that the software works, says nothing about real users"
    recflow.write_origin(output_dir, {"data": "simulated", "note": note, **asdict(settings)})
    (output_dir / UNFINISHED_FILE).unlink()


def _prepare(output_dir: Path, settings: SimulationSettings) -> None:
    """Refuse a folder of anything but a simulated log; mark it unfinished, and drop days that will not be replaced."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is a file; name a folder")
    if output_dir.exists() and any(output_dir.iterdir()) and not _is_simulated(output_dir):
        raise InputError(f"--output_dir={output_dir}: holds something other than a simulated log; name an empty folder")
    write_atomically(output_dir / UNFINISHED_FILE, lambda file: None)
    (output_dir / recflow.ORIGIN_FILE).unlink(missing_ok=True)
    for pattern in recflow.day_paths(output_dir, "*"):
        for path in pattern.parent.glob(pattern.name):
            if path.stem not in settings.days:
                path.unlink()


def _is_simulated(root: Path) -> bool:
    """Whether a finished or an unfinished run of this module filled the folder."""
    try:
        return (root / UNFINISHED_FILE).exists() or recflow.origin_in(root / recflow.ORIGIN_FILE, "data") == "simulated"
    except InputError:
        return False


def main(argv: list[str]) -> None:
    parser = Parser(
        description="Write a simulated multi-stage recommender's log in RecFlow's layout; same arguments, same bytes."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the log; a simulated one is replaced")
    days = f"dates separated by commas, or N: N - 1 days from {FIRST_DAY}, then {TEST_DAY} (%(default)s)"
    parser.add_argument("--days", default=",".join(SimulationSettings.days), help=days)
    for field in fields(SimulationSettings)[1:]:
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="(%(default)s)")
    args = vars(parser.parse_args(argv))
    simulate(args.pop("output_dir"), SimulationSettings(**args | {"days": parse_days(args["days"])}))


if __name__ == "__main__":
    sys.exit(run_command(main))
