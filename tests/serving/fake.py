"""A recommender without models, for tests of what stands around one: its answers are known, and it can be slow or fail.

Retrieval scores item n as -n, later stages as n, so that they keep the retrieved items with the highest numbers.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI

from deep_components.cascade import Cascade, Group, Stage
from deep_components.errors import InputError

ITEMS = 500
EVIL = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
CASCADE = Cascade(
    (Stage("retrieval", 40, "dssm"), Stage("prerank", 20, "mlp"), Stage("rank", 12, "din")),
    (Group("shown"), Group("others")),
)
KEEPS = CASCADE.quotas


class FakeCorpus:
    def __init__(self, items: int = ITEMS) -> None:
        titles = [EVIL if item == 39 else f"Title {item:03d}" for item in range(items)]
        self.table = pa.table({"video_id": np.arange(items), "title": titles, "price": np.arange(items) / 4})

    def __len__(self) -> int:
        return len(self.table)

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        return ids.to_numpy(zero_copy_only=False)


class FakeRecommender:
    """Refuses a request whose "age" is 999 and breaks down where it is 666. ``hold`` waits until it is released."""

    def __init__(self, version: str = "one") -> None:
        columns = {"request": {"user_id": pa.int64(), "age": pa.int64()}, "history": {"video_id": pa.int64()}}
        self.bundle = SimpleNamespace(
            version=version, manifest={"created": "20260101T000000Z"}, cascade=CASCADE, corpus=FakeCorpus(),
            encoding=SimpleNamespace(item="video_id", user="user_id", columns=columns.__getitem__),
        )  # fmt: skip
        self.encoder = SimpleNamespace(known={"user_id", "age", "history"})
        self.calls: list[list[dict[str, Any]]] = []
        self.free = threading.Event()
        self.free.set()

    def recommend(
        self, requests: Sequence[dict[str, Any]], k: int = 20, filter_seen: bool = True, return_scores: bool = True,
        explain: bool = False, timings: dict[str, float] | None = None,
    ) -> list[Any]:  # fmt: skip
        self.calls.append(list(requests))
        assert self.free.wait(60)
        for number, request in enumerate(requests):
            if request.get("age") == 999:
                raise InputError(f"requests[{number}]: age: 999 is too old")
            history = request.get("history", [])
            if not isinstance(history, list) or any(type(event) is not int for event in history):
                raise InputError(f"requests[{number}]: history: not a list of items")
            if request.get("age") == 666:
                raise RuntimeError("a defect")
        if timings is not None:
            timings.update({"encode": 0.001, **dict.fromkeys(KEEPS, 0.002)})
        return [_answer(request, k, filter_seen, return_scores, explain) for request in requests]


def retrieved(request: dict[str, Any], filter_seen: bool = True) -> list[int]:
    """What the first stage keeps, the last stage's best first."""
    seen = set(request.get("history", [])) if filter_seen else set()
    return [item for item in range(ITEMS) if item not in seen][: KEEPS["retrieval"]][::-1]


def expected(request: dict[str, Any], k: int, filter_seen: bool = True) -> list[int]:
    """The list for a request."""
    return retrieved(request, filter_seen)[: min(k, KEEPS["rank"])]


def _answer(request: dict[str, Any], k: int, filter_seen: bool, return_scores: bool, explain: bool) -> Any:
    items, found = expected(request, k, filter_seen), retrieved(request, filter_seen)
    candidates = [_candidate(item, rank, len(found)) for rank, item in enumerate(found, 1)]
    scores = [float(item) for item in items]
    return SimpleNamespace(
        items=items, scores=scores if return_scores else None, candidates=candidates if explain else None
    )


def _candidate(item: int, rank: int, found: int) -> Any:
    reached = ["retrieval", "prerank", *(["rank"] if rank <= KEEPS["prerank"] else [])]
    left = None if rank <= KEEPS["rank"] else reached[-1]
    scores = {stage: float(-item if stage == "retrieval" else item) for stage in reached}
    ranks = {stage: found + 1 - rank if stage == "retrieval" else rank for stage in reached}
    return SimpleNamespace(item=item, left_at=left, scores=scores, ranks=ranks)


@contextmanager
def served(app: FastAPI, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread; it has ended when the block has."""
    config = uvicorn.Config(app, port=0, http="h11", log_config=None, access_log=False, lifespan="on", **settings)
    app.state.server = server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
