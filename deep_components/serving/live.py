"""What is served now: a loaded version of the bundle, the requests that wait for it, and a new version beside it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from deep_components.cli import nearest
from deep_components.errors import InputError
from deep_components.serving.batches import Batches
from deep_components.serving.features import FeatureStore, FeaturesUnavailableError, merged, user_of
from deep_components.serving.monitor import Monitor
from deep_components.serving.wire import About, Ask, Options, Stage, shown

_LONGEST_USER = 511  # bytes; the feature stores take no longer ones

logger = logging.getLogger(__name__)


class NotReadyError(Exception):
    """No version is loaded yet."""


class Recommender(Protocol):
    """What answers: :class:`deep_components.serving.recommender.Recommender`."""

    bundle: Any
    encoder: Any

    def recommend(
        self,
        requests: Sequence[dict[str, Any]],
        k: int = 20,
        filter_seen: bool = True,
        return_scores: bool = True,
        explain: bool = False,
        timings: dict[str, float] | None = None,
    ) -> list[Any]: ...


class Computed(NamedTuple):
    """The version that computed, and its recommendations."""

    recommender: Recommender
    found: list[Any]


class Live:
    """Lives in an event loop, but for the computing, which has a thread of its own.

    Args:
        load: the bundle's current version; InputError when it cannot be served.
        features: the feature store.
        max_waiting, max_batch: requests that may wait, and that are computed together.
        seconds: a request that waited longer is not computed.
    """

    def __init__(
        self,
        load: Callable[[], Recommender],
        features: FeatureStore | None,
        max_waiting: int,
        max_batch: int,
        seconds: float,
    ) -> None:
        self.features = features
        self.recommender: Recommender | None = None
        self.batches = Batches[Options, list[dict[str, Any]], Computed](self._compute, max_waiting, max_batch)
        self.monitor = Monitor(lambda: self.batches.waiting)
        self._load, self._seconds, self._one_load = load, seconds, asyncio.Lock()

    @property
    def ready(self) -> Recommender:
        """The version that is served. NotReadyError while there is none."""
        if self.recommender is None:
            raise NotReadyError
        return self.recommender

    @property
    def version(self) -> str | None:
        return None if self.recommender is None else str(self.recommender.bundle.version)

    # ---- versions ----

    async def reload(self) -> str:
        """Load the bundle's current version beside the one that is served, try it, and serve it from the next batch on;
        its name. With an error, the old version stays."""
        async with self._one_load:
            outcome = "failed"
            try:
                loaded = await asyncio.to_thread(self._loaded)
                outcome = "ok"
            finally:
                self.monitor.reloads.labels(outcome).inc()
            self.recommender, bundle = loaded, loaded.bundle
        self.monitor.bundle.info({"version": bundle.version})
        self.monitor.items.set(len(bundle.corpus))
        logger.info("serving version %s: %d items", bundle.version, len(bundle.corpus))
        return str(bundle.version)

    def _loaded(self) -> Recommender:
        loaded = self._load()
        loaded.recommend([{}], k=1, explain=True)  # what cannot answer is not served; and the first call is slow
        return loaded

    # ---- answers ----

    async def answer(self, ask: Ask) -> Computed:
        """The version that answered, and its recommendations.

        NotReadyError, FullError, TimeoutError, FeaturesUnavailableError; InputError for what the client did wrong.
        """
        check_columns(self.ready, ask.columns)
        computed = await self.batches.ask(ask.options, ask.requests, len(ask.requests), self._seconds)
        check_columns(computed.recommender, ask.columns)  # another version may have answered
        return computed

    def _compute(self, options: Options, bodies: Sequence[list[dict[str, Any]]]) -> Sequence[Computed | Exception]:
        """In the thread: all requests of the bodies at once, by the version that is served now."""
        recommender, timings = self.ready, dict[str, float]()
        began = perf_counter()
        try:
            requests = self._completed(recommender, [request for body in bodies for request in body])
        except FeaturesUnavailableError as error:
            return [error] * len(bodies)
        timings["features"] = perf_counter() - began
        found = iter(recommender.recommend(requests, **options._asdict(), timings=timings))
        for part, seconds in timings.items():
            self.monitor.parts.labels(part).observe(seconds)
        self.monitor.batch.observe(len(requests))
        return [Computed(recommender, [next(found) for _ in body]) for body in bodies]

    def _completed(self, recommender: Recommender, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The requests with what the feature store knows of their users."""
        encoding = recommender.bundle.encoding
        if self.features is None or not encoding.user:
            return requests
        named = [user_of(encoding, encoding.user, request.get(encoding.user)) for request in requests]
        users = [user if _is_user(user) else None for user in named]
        try:
            stored = self.features.get(users)
        except InputError as error:  # no mistake of the client: only sound ids are asked for
            raise FeaturesUnavailableError(str(error)) from error
        known = recommender.encoder.known  # a store may hold columns that this version does not take
        records = [{name: value for name, value in (record or {}).items() if name in known} for record in stored]
        events = set(encoding.columns("history")) - set(encoding.columns("request"))  # at the top of a request
        return [merged(request, record, events) for request, record in zip(requests, records, strict=True)]

    def about(self) -> About:
        """NotReadyError while no version is loaded."""
        bundle = self.ready.bundle
        encoding, table = bundle.encoding, bundle.corpus.table
        columns = encoding.columns("request")
        user = columns.get(encoding.user)
        return About(
            version=bundle.version,
            created=str(bundle.manifest.get("created", "")),
            items=len(bundle.corpus),
            stages=[Stage(name=s.name, keep=s.keep, model=s.model) for s in bundle.cascade.stages],
            item=encoding.item,
            user=encoding.user,
            user_is_number=user is not None and pa.types.is_integer(user),
            columns=table.column_names,
            request_columns=list(columns),
            history_columns=list(encoding.columns("history")),
            features=self.features is not None,
        )


def _is_user(user: Any) -> bool:
    return type(user) is int or (isinstance(user, str) and len(user.encode()) <= _LONGEST_USER)


def check_columns(recommender: Recommender, columns: Sequence[str]) -> None:
    """InputError for a column that the corpus does not have."""
    known = recommender.bundle.corpus.table.column_names
    for name in columns:
        if name not in known:
            raise InputError(f"columns: the corpus has no column {shown(name)}{nearest(name, known)}")


def answer_of(recommender: Recommender, found: Sequence[Any], columns: Sequence[str]) -> dict[str, Any]:
    """As :class:`~deep_components.serving.wire.Answer` says, but plain dicts: thousands of candidates need no
    validation."""
    bundle = recommender.bundle
    return {"version": bundle.version, "results": [_list_answer(bundle.corpus, one, columns) for one in found]}


def _list_answer(corpus: Any, found: Any, columns: Sequence[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {"items": found.items, "scores": found.scores}
    answer["columns"] = _values(corpus, found.items, columns)
    if found.candidates is not None:
        values = _values(corpus, [one.item for one in found.candidates], columns)
        answer["candidates"] = [
            {"item": one.item, "left_at": one.left_at, "scores": one.scores, "ranks": one.ranks,
             "columns": {name: values[name][number] for name in columns}}
            for number, one in enumerate(found.candidates)
        ]  # fmt: skip
    return answer


def _values(corpus: Any, items: Sequence[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Column -> its value for each of the items."""
    if not columns or not items:
        return {name: [] for name in columns}
    rows = corpus.rows_of(pa.array(items)).tolist()  # then a value at a time: take() would copy whole columns
    return {name: [corpus.table.column(name)[row].as_py() for row in rows] for name in columns}
