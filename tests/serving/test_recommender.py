"""Served lists: the scores are those of an evaluation, the lists those of the cascade, whatever the request."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from deep_components.errors import InputError
from deep_components.metrics import survival_by_stage
from deep_components.serving.export import export_run, index_corpus
from deep_components.serving.index import build_index
from deep_components.serving.recommender import Recommendation, Recommender
from tests.serving.logs import Asked, Trained, trained


@pytest.fixture(scope="module", params=[(log, stages) for log in ("simulated", "imported") for stages in (2, 3, 4)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory, *request.param)


def without_ties(case: Trained) -> Iterator[tuple[Asked, list[torch.Tensor], dict[str, torch.Tensor]]]:
    """Requests in whose cascade no lots are drawn, what is left of their items after each stage, and the scores."""
    mask = torch.from_numpy(case.scores["mask"])
    scores = {stage: torch.from_numpy(case.scores[stage]) for stage in case.cascade.stage_names}
    left = survival_by_stage(list(scores.values()), mask, list(case.cascade.quotas.values()))
    for asked in case.asked:
        row = asked.number
        there = mask[row]
        if all(((alive[row] == 0) | (alive[row] == 1)).all() for alive in left) and there.sum() > left[-1][row].sum():
            own = {stage: values[row][there] for stage, values in scores.items()}
            yield asked, [alive[row][there] == 1 for alive in left], own


def test_a_request_s_candidates_are_served_as_an_evaluation_ranks_them(case: Trained, tmp_path: Path) -> None:
    """With a corpus of the request's own candidates: all scores to 1e-6, and what each stage keeps."""
    bundle, checked = tmp_path / "bundle", 0
    for asked, left, scores in without_ties(case):
        corpus = tmp_path / f"{asked.number}.parquet"
        pa.parquet.write_table(asked.items, corpus)
        if not checked:
            export_run(case.run, bundle, corpus, case.log)
        else:
            index_corpus(bundle, corpus)
        (answer,) = Recommender.load(bundle).recommend(asked.request, k=100, filter_seen=False, explain=True)
        check(case, answer, left, scores)
        checked += 1
        if checked == 3:
            break
    assert checked == 3


def check(case: Trained, answer: Recommendation, left: list[torch.Tensor], scores: dict[str, torch.Tensor]) -> None:
    first, *_, last = case.cascade.stage_names
    assert answer.candidates is not None and answer.scores is not None
    by_first = scores[first].sort(descending=True, stable=True).indices  # the n-th candidate of the first stage
    items = {candidate.ranks[first]: candidate for candidate in answer.candidates}
    assert sorted(items) == list(range(1, min(case.cascade.quotas[first], len(by_first)) + 1))
    for rank, candidate in items.items():
        item = by_first[rank - 1]
        for stage, score in candidate.scores.items():
            assert score == pytest.approx(scores[stage][item].item(), rel=1e-6, abs=1e-6)
        kept = [bool(alive[item]) for alive in left]
        reached = kept.index(False) + 1 if False in kept else len(kept)
        assert list(candidate.scores) == list(candidate.ranks) == list(case.cascade.stage_names[:reached])
        assert candidate.left_at == (case.cascade.stage_names[reached - 1] if False in kept else None)
    served = scores[last][left[-1]].sort(descending=True).values
    assert answer.scores == pytest.approx(served.tolist(), rel=1e-6, abs=1e-6)
    assert answer.items == [candidate.item for candidate in answer.candidates[: len(answer.items)]]
    assert [candidate.ranks.get(last) for candidate in answer.candidates[: len(answer.items)]] == list(
        range(1, len(answer.items) + 1)
    )


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Recommender]:
    """Three stages that keep 40, 30 and 20 of all videos of the simulated log."""
    case, bundle = trained(tmp_path_factory, "simulated", 3), tmp_path_factory.mktemp("videos") / "bundle"
    export_run(case.run, bundle, data_dir=case.log)
    return case, Recommender.load(bundle)


def same(one: Recommendation, other: Recommendation) -> None:
    assert one.items == other.items
    assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-6)


def some_request(case: Trained) -> dict[str, Any]:
    return next(dict(asked.request) for asked in case.asked if len(asked.request["history"]) > 5)


def test_the_lists_of_many_requests_are_those_of_each(
    videos: tuple[Trained, Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of any size, in any form, with requests that are there twice, in several threads."""
    case, recommender = videos
    requests = [asked.request for asked in case.asked]
    together = recommender.recommend([*requests, *requests])
    for one, other in zip(together[: len(requests)], together[len(requests) :], strict=True):
        same(one, other)
    alone = [recommender.recommend(request)[0] for request in requests]
    monkeypatch.setattr("deep_components.serving.recommender._CANDIDATES_AT_ONCE", 300)
    table = pa.Table.from_pylist([dict(request) for request in requests])
    with ThreadPoolExecutor(2) as threads:
        forms = threads.map(recommender.recommend, [requests, tuple(requests), table, table.to_pandas()])
        for answers in (together[: len(requests)], *forms):
            for one, other in zip(answers, alone, strict=True):
                same(one, other)
    assert recommender.recommend([]) == recommender.recommend(table.slice(0, 0)) == []


def test_what_was_seen_is_left_out(videos: tuple[Trained, Recommender]) -> None:
    """Also what is too old for the models; the first stage's quota is filled all the same."""
    case, recommender = videos
    best = recommender.recommend(some_request(case), filter_seen=False)[0].items
    request = some_request(case) | {"history": [*best, *some_request(case)["history"]]}
    (answer,) = recommender.recommend(request, explain=True)
    assert answer.candidates is not None
    seen = {*best, *(event["video_id"] for event in some_request(case)["history"])}
    assert len(answer.items) == 20 and len(answer.candidates) == 40
    assert seen.isdisjoint(candidate.item for candidate in answer.candidates)
    (all_items,) = recommender.recommend(request, filter_seen=False, explain=True)
    assert all_items.candidates is not None
    assert seen & {candidate.item for candidate in all_items.candidates}


def test_of_a_long_history_the_latest_events_count(videos: tuple[Trained, Recommender]) -> None:
    case, recommender = videos
    request, length = some_request(case), recommender.bundle.encoding.history_length
    assert len(request["history"]) > length == 5
    whole = recommender.recommend(request, filter_seen=False)
    cut = recommender.recommend(request | {"history": request["history"][-length:]}, filter_seen=False)
    same(whole[0], cut[0])
    first = recommender.recommend(request | {"history": request["history"][:length]}, filter_seen=False)
    assert whole[0].scores != pytest.approx(first[0].scores, abs=1e-6)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"user_id": 10**9, "device_id": 10**12, "age": -1, "gender": None},
        {"user_id": -(2**63), "province": 2**63 - 1},
        {"history": []},
        {"history": None},
        {"history": [None, {}, {"video_id": None}, 10**15, -1]},
        {"history": [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]},
        {"user_id": float("nan"), "request_timestamp": float("nan")},
        {"request_timestamp": 0},
    ],
)
def test_whatever_is_missing_or_unknown_there_is_a_list(
    request_: dict[str, Any], videos: tuple[Trained, Recommender]
) -> None:
    (answer,) = videos[1].recommend(request_)
    assert len(answer.items) == len(set(answer.items)) == 20
    assert (
        answer.scores is not None and np.isfinite(answer.scores).all() and sorted(answer.scores)[::-1] == answer.scores
    )


def test_a_missing_time_is_now(videos: tuple[Trained, Recommender]) -> None:
    case, recommender = videos
    request, seconds = some_request(case), 1_706_000_000
    given = recommender.recommend(request | {"request_timestamp": seconds * 1000})
    same(recommender.recommend(request | {"request_timestamp": None}, now=seconds)[0], given[0])
    del request["request_timestamp"]
    same(recommender.recommend(request, now=seconds)[0], given[0])


@pytest.mark.parametrize("k", [1, 5, 20, 21, 1000])
def test_k(k: int, videos: tuple[Trained, Recommender]) -> None:
    """At most what the last stage keeps; the list is the beginning of a longer one."""
    case, recommender = videos
    (whole,) = recommender.recommend(some_request(case))
    (answer,) = recommender.recommend(some_request(case), k=k)
    assert answer.items == whole.items[:k] and whole.scores is not None and answer.scores == whole.scores[:k]


@pytest.mark.parametrize("k", [0, -1, True, 2.0, "5", None])
def test_no_k(k: Any, videos: tuple[Trained, Recommender]) -> None:
    with pytest.raises(InputError, match=r"^k is .*; ask for a whole number of items, 1 or more"):
        videos[1].recommend({}, k=k)


def test_what_an_answer_has(videos: tuple[Trained, Recommender]) -> None:
    case, recommender = videos
    timings: dict[str, float] = {"encode": 1000.0}
    answers = recommender.recommend([some_request(case)] * 2, return_scores=False, timings=timings)
    assert [answer.scores for answer in answers] == [answer.candidates for answer in answers] == [None, None]
    assert list(timings) == ["encode", *case.cascade.stage_names, "answer"]
    assert timings["encode"] > 1000 and all(seconds > 0 for seconds in timings.values())
    assert all(isinstance(item, int) for item in answers[0].items)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """Two stages that keep 6 and 3, of four products: one without features, one that is there twice."""
    rows = pa.table(
        {
            "product": [7, 8, 9, 8, 10_000],
            "brand": ["b1", None, None, "b2", "new"],
            "genres": ["g1|g2", None, None, "", "g9"],
            "price": [3.5, None, None, 1e9, -4.0],
            "stock": pa.array([3, 4, None, 5, 10**6]),
        }
    )
    case, folder = trained(tmp_path_factory, "imported", 2), tmp_path_factory.mktemp("small")
    pa.parquet.write_table(rows, folder / "items.parquet")
    export_run(case.run, folder / "bundle", folder / "items.parquet")
    return Recommender.load(folder / "bundle")


def test_a_corpus_smaller_than_the_quotas(small: Recommender) -> None:
    (answer,) = small.recommend({"customer": "c1", "history": [5]}, k=50, explain=True)
    assert answer.candidates is not None
    assert sorted(candidate.item for candidate in answer.candidates) == [7, 8, 9, 10_000]
    assert len(answer.items) == 3  # what the last stage keeps
    assert [candidate.left_at for candidate in answer.candidates] == [None, None, None, "stage1"]
    assert all(np.isfinite(list(candidate.scores.values())).all() for candidate in answer.candidates)


def test_events_without_features(small: Recommender) -> None:
    """An item that has none is its id alone, and one that the corpus does not have too."""
    asked = [{"history": [9, 8]}, {"history": [{"product": 9}, {"product": 8, "genres": ""}]}]
    one, other = small.recommend(asked, filter_seen=False)
    same(one, other)
    (answer,) = small.recommend({"history": [9, 8, 4711]})
    assert sorted(answer.items) == [7, 10_000]


def test_nothing_is_left(small: Recommender) -> None:
    everything = {"history": [7, 8, 9, 10_000, 9]}
    (answer,) = small.recommend(everything, explain=True)
    assert answer == Recommendation([], [], [])
    nothing, one, all_items = small.recommend([everything, {"history": [7, 8, 10_000]}, {"history": []}])
    assert (nothing.items, one.items, len(all_items.items)) == ([], [9], 3)
    alone = small.recommend({"history": [7, 8, 10_000]})
    same(one, alone[0])


class Sparse:
    """An approximate index that finds few: every other row of what it is asked for is -1."""

    def __init__(self, index: Any, found: int) -> None:
        self.index, self.found = index, found

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.index.search(queries, k)
        scores[:, self.found :], rows[:, self.found :] = -np.inf, -1
        return scores, rows


@pytest.mark.parametrize("found", [0, 1, 7, 25])
def test_an_index_that_finds_too_few(found: int, videos: tuple[Trained, Recommender]) -> None:
    case, recommender = videos
    whole = recommender.bundle
    fewer = Recommender(replace(whole, index=Sparse(whole.index, found)))  # type: ignore[arg-type]
    request = some_request(case) | {"history": []}
    (answer,) = fewer.recommend(request, explain=True)
    (exact,) = recommender.recommend(request, k=100, explain=True)
    assert answer.candidates is not None and exact.candidates is not None
    first = case.cascade.stage_names[0]
    best = {candidate.item for candidate in exact.candidates if candidate.ranks[first] <= found}
    assert {candidate.item for candidate in answer.candidates} == best
    assert len(answer.items) == min(found, 20)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_that_finds_all(kind: str, videos: tuple[Trained, Recommender]) -> None:
    case, recommender = videos
    bundle = recommender.bundle
    index = build_index(bundle.index.vectors, kind, k=len(bundle.corpus), target=1.0)
    approximate = Recommender(replace(bundle, index=index))
    requests = [asked.request for asked in case.asked[:10]]
    for one, other in zip(approximate.recommend(requests), recommender.recommend(requests), strict=True):
        same(one, other)


def test_scores_that_are_not_finite_are_refused(videos: tuple[Trained, Recommender]) -> None:
    class Broken:
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.full((len(queries), k), np.nan, np.float32), np.tile(np.arange(k), (len(queries), 1))

    broken = Recommender(replace(videos[1].bundle, index=Broken()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stage retrieval gives scores that are not finite"):
        broken.recommend({})


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"user": 3}, r"'user' is no column of its log \(did you mean user_id\?\)"),
        ({"user_id": "seven"}, "column user_id: "),
        ({"request_timestamp": "noon"}, "column request_timestamp: "),
        ({"request_timestamp": 10**17}, "column request_timestamp: "),
        ({"age": [1]}, "column age: "),
        ({"history": 5}, "column history: 5, not a list of events"),
        ({"history": ["x"]}, "column video_id: "),
        ({"history": [{"video_id": 1, "author_id": "x"}]}, "column author_id: "),
    ],
)
def test_mistakes_name_request_and_column(
    request_: dict[str, Any], sentence: str, videos: tuple[Trained, Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deep_components.serving.recommender._CANDIDATES_AT_ONCE", 100)
    with pytest.raises(InputError, match=rf"^requests\[5\]: .*{sentence}"):
        videos[1].recommend([{"user_id": 1}] * 5 + [request_])


def test_the_library_s_name() -> None:
    from deep_components.serving import Recommender as Exported

    assert Exported is Recommender
