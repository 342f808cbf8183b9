"""From requests to served lists: retrieval over the whole corpus, then every later stage on what is left."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.cascade import Cascade
from deep_components.errors import InputError
from deep_components.serving.bundle import Bundle
from deep_components.serving.requests import EncodedRequests, RequestEncoder, Requests

_CANDIDATES_AT_ONCE = 1 << 14  # of a block of requests, with their events


@dataclass(frozen=True)
class Candidate:
    """An item that the first stage kept, and its way through the cascade."""

    item: Any  # its raw id
    left_at: str | None  # the stage that did not keep it; None: the last one did, among the first k or beyond
    scores: dict[str, float]  # of the stages that it reached
    ranks: dict[str, int]  # in these stages, from 1


@dataclass(frozen=True)
class Recommendation:
    """The answer to a request."""

    items: list[Any]  # raw ids, the best first
    scores: list[float] | None = None  # the last stage's
    candidates: list[Candidate] | None = None  # of explain=True: the best first, those that fell out last behind


@dataclass(frozen=True)
class Ranking:
    """What reached a stage, by its scores: [B, N]; a request's candidates are its first ``counts`` [B]."""

    stage: str
    rows: np.ndarray  # of the corpus, int64
    scores: np.ndarray  # float32, falling
    counts: np.ndarray  # int64

    def best(self, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the counts of what the stage keeps."""
        counts = np.minimum(self.counts, keep)
        return self.rows[:, : counts.max(initial=0)], counts


class Recommender:
    """Answers requests with a bundle's cascade. Several threads may use one.

    Args:
        bundle: what :meth:`Bundle.load` gave.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.encoder = RequestEncoder(bundle.encoding, bundle.corpus)

    @classmethod
    def load(cls, bundle: str | Path, cascade: Cascade | None = None, device: str = "cpu") -> "Recommender":
        """The recommender of a bundle's current version. InputError when it is missing, damaged or mixed.

        ``cascade``: needed where the bundle's has models of one's own; their code is imported then.
        """
        return cls(Bundle.load(Path(bundle), cascade, device))

    def recommend(
        self,
        requests: Requests,
        k: int = 20,
        filter_seen: bool = True,
        return_scores: bool = True,
        explain: bool = False,
        timings: dict[str, float] | None = None,
        now: float | None = None,
        first: int = 0,
    ) -> list[Recommendation]:
        """The best items for each request, in the requests' order.

        A list has k items, or fewer where the last stage keeps fewer, or the index finds fewer that may be shown.

        Args:
            requests: a dict, a list of dicts, a pyarrow table or a pandas DataFrame, with raw columns and ids; see
                docs/serving.md.
            k: items of an answer.
            filter_seen: leave out the items of the request's history.
            return_scores: with the last stage's scores.
            explain: with every candidate of the first stage, its scores and ranks, and where it fell out.
            timings: seconds of "encode", of each stage, and of "answer" are added to it.
            now: the time, in seconds since 1970, of requests that have none; by default the clock's.
            first: the number of the first request, for errors.

        Raises:
            InputError: a request has what its log cannot have, by the request's number and the column.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k is {k!r}; ask for a whole number of items, 1 or more")
        timings = {} if timings is None else timings
        now = time.time() if now is None else now
        with _timed(timings, "encode"):
            rows = self.encoder.rows_of(requests)
        size = self._block_size()
        answers: list[Recommendation] = []
        for start in range(0, len(rows), size):
            with _timed(timings, "encode"):
                encoded = self.encoder.encode(rows[start : start + size], first + start, now)
            rankings = self.rank(encoded, filter_seen, timings)
            with _timed(timings, "answer"):
                answers += self._answers(rankings, k, return_scores, explain)
        return answers

    def _block_size(self) -> int:
        wide = max(self.bundle.cascade.stages[0].keep, self.bundle.encoding.history_length)
        return min(max(1, _CANDIDATES_AT_ONCE // wide), 1024)

    # ---- the cascade ----

    def rank(
        self, encoded: EncodedRequests, filter_seen: bool, timings: dict[str, float] | None = None
    ) -> list[Ranking]:
        """What each stage saw, in serving order."""
        timings = {} if timings is None else timings
        first, *later = self.bundle.cascade.stages
        with _timed(timings, first.name):
            rankings = [self._retrieve(encoded, filter_seen)]
        for before, stage in zip(self.bundle.cascade.stages, later, strict=False):
            with _timed(timings, stage.name):
                rankings.append(self._stage(stage.name, encoded, *rankings[-1].best(before.keep)))
        return rankings

    def _retrieve(self, encoded: EncodedRequests, filter_seen: bool) -> Ranking:
        """The first stage's best of the corpus, without what was seen; equal scores by row."""
        stage, corpus = self.bundle.cascade.stages[0], len(self.bundle.corpus)
        vectors = self.bundle.scorer.user_vectors(encoded.request, encoded.history)
        _check_finite(stage.name, vectors)
        keep = min(stage.keep, corpus)
        rows = np.full((len(encoded), keep), -1)
        scores = np.full((len(encoded), keep), -np.inf, np.float32)
        seen = encoded.seen if filter_seen else [np.zeros(0, np.int64)] * len(encoded)
        for more, some in _by_depth(seen).items():
            found_scores, found = self.bundle.index.search(vectors[some], min(keep + more, corpus))
            for number, request in enumerate(some):
                allowed = found[number] >= 0
                if len(seen[request]):
                    allowed &= ~np.isin(found[number], seen[request])
                best = np.flatnonzero(allowed)[:keep]
                _check_finite(stage.name, found_scores[number, best])
                rows[request, : len(best)] = found[number, best]
                scores[request, : len(best)] = found_scores[number, best]
        return _ranked(stage.name, rows, scores, (rows >= 0).sum(axis=1), np.lexsort((rows, -scores)))

    def _stage(self, name: str, encoded: EncodedRequests, rows: np.ndarray, counts: np.ndarray) -> Ranking:
        """Candidates by a later stage's scores; equal ones in the order in which they came."""
        there = np.arange(rows.shape[1]) < counts[:, None]
        if not there.any():
            return Ranking(name, rows, np.zeros(rows.shape, np.float32), counts)
        items = {field: values[np.where(there, rows, 0)] for field, values in self.bundle.corpus.features.items()}
        scorer = self.bundle.scorer
        scores = scorer.scores(name, scorer.features(encoded.request, encoded.history, items))
        _check_finite(name, scores[there])
        scores = np.where(there, scores, -np.inf)
        return _ranked(name, rows, scores, counts, np.argsort(-scores, axis=1, kind="stable"))

    # ---- answers ----

    def _answers(self, rankings: Sequence[Ranking], k: int, return_scores: bool, explain: bool) -> list[Recommendation]:
        last = rankings[-1]
        rows, counts = last.best(min(k, self.bundle.cascade.stages[-1].keep))
        items = self._ids(rows, counts)
        scores = [last.scores[request, :n].tolist() if return_scores else None for request, n in enumerate(counts)]
        candidates = self._candidates(rankings) if explain else [None] * len(counts)
        return [Recommendation(*parts) for parts in zip(items, scores, candidates, strict=True)]

    def _ids(self, rows: np.ndarray, counts: np.ndarray) -> list[list[Any]]:
        """The raw ids of each request's first ``counts`` rows."""
        ids = iter(self.bundle.corpus.ids(rows[np.arange(rows.shape[1]) < counts[:, None]]))
        return [list(islice(ids, count)) for count in counts.tolist()]

    def _candidates(self, rankings: Sequence[Ranking]) -> list[list[Candidate] | None]:
        ids = self._ids(rankings[0].rows, rankings[0].counts)
        return [self._ways(rankings, request, ids[request]) for request in range(len(ids))]

    def _ways(self, rankings: Sequence[Ranking], request: int, ids: list[Any]) -> list[Candidate]:
        """The ways of a request's candidates, from the one that came farthest."""
        scores: dict[int, dict[str, float]] = {}
        ranks: dict[int, dict[str, int]] = {}
        left: dict[int, str | None] = {}
        keeps = self.bundle.cascade.quotas
        for ranking in rankings:
            count = ranking.counts[request]
            reached = ranking.rows[request, :count].tolist()
            for rank, (row, score) in enumerate(zip(reached, ranking.scores[request, :count].tolist(), strict=True), 1):
                scores.setdefault(row, {})[ranking.stage] = score
                ranks.setdefault(row, {})[ranking.stage] = rank
                left[row] = None if rank <= keeps[ranking.stage] else ranking.stage
        named = dict(zip(rankings[0].rows[request].tolist(), ids, strict=False))
        farthest = sorted(left, key=lambda row: (-len(ranks[row]), list(ranks[row].values())[-1]))
        return [Candidate(named[row], left[row], scores[row], ranks[row]) for row in farthest]


def _by_depth(seen: Sequence[np.ndarray]) -> dict[int, list[int]]:
    """How much deeper to search -> the requests: as deep as a request's own seen items ask, whatever stands beside it,
    but in few different depths."""
    found: dict[int, list[int]] = {}
    for request, rows in enumerate(seen):
        found.setdefault(1 << (len(rows) - 1).bit_length() if len(rows) else 0, []).append(request)
    return found


def _ranked(stage: str, rows: np.ndarray, scores: np.ndarray, counts: np.ndarray, order: np.ndarray) -> Ranking:
    return Ranking(stage, np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1), counts)


def _check_finite(stage: str, numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise InputError(f"stage {stage} gives scores that are not finite; train it again with a lower --lr")


@contextmanager
def _timed(timings: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    timings[part] = timings.get(part, 0.0) + time.perf_counter() - began
