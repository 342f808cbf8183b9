"""The HTTP service around a recommender whose answers are known; test_serve.py has a real bundle and the command."""

import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from deep_components.errors import InputError
from deep_components.serving.features import FeaturesUnavailableError, open_features
from deep_components.serving.service import FILES, PAGE, Settings, make_app
from deep_components.serving.wire import EXAMPLE, Ask, Limits
from tests.serving.fake import EVIL, ITEMS, KEEPS, FakeRecommender, expected, retrieved, served

TOKEN = "a token of many letters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}


class Server:
    """A served recommender and a client of it."""

    def __init__(self, load: Callable[[], Any], features: Any = None, **settings: Any) -> None:
        self.stack = ExitStack()
        self.app = make_app(load, Settings(**settings), features)
        self.live = self.app.state.live
        self.url = self.stack.enter_context(served(self.app))
        self.client = self.stack.enter_context(httpx.Client(base_url=self.url, timeout=60))

    def ready(self) -> "Server":
        wait(lambda: self.client.get("/readyz").status_code == 200)
        return self

    def ask(self, *requests: Any, **options: Any) -> httpx.Response:
        return self.client.post("/recommend", json={"requests": list(requests), **options})

    def post(self, body: bytes, **headers: str) -> httpx.Response:
        return self.client.post("/recommend", content=body, headers=JSON | headers)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """(name, label values by the labels' names) -> value."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def wait(holds: Callable[[], Any]) -> None:
    for _ in range(60_000):
        if holds():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came to hold")


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    """Makes servers, which end with the test."""
    with ExitStack() as stack:

        def make(load: Callable[[], Any], features: Any = None, **settings: Any) -> Server:
            made = Server(load, features, **settings)
            stack.push(made.stack)
            return made

        yield make


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    one = Server(FakeRecommender, limits=Limits(body_bytes=20_000, requests=4, history=5, k=50, text=10, columns=2))
    with one.stack:
        yield one.ready()


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_lists_in_the_order_of_the_requests(shared: Server) -> None:
    requests: list[dict[str, Any]] = [{"user_id": 1}, {"user_id": 2, "history": [39, 7]}]
    answer = shared.ask(*requests, k=5, columns=["title", "price"]).json()
    assert answer["version"] == "one"
    assert [found["items"] for found in answer["results"]] == [expected(request, 5) for request in requests]
    first = answer["results"][0]
    assert first["scores"] == [float(item) for item in first["items"]]
    assert first["columns"]["price"] == [item / 4 for item in first["items"]]
    assert [found["items"] for found in shared.ask(requests[1], k=5, filter_seen=False).json()["results"]] == [
        expected({}, 5)
    ]
    assert shared.ask({}, return_scores=False).json()["results"][0]["scores"] is None
    assert len(shared.ask({}, k=50).json()["results"][0]["items"]) == KEEPS["rank"]


def test_explained(shared: Server) -> None:
    [found] = shared.ask({}, k=3, explain=True, columns=["title"]).json()["results"]
    assert [one["item"] for one in found["candidates"]] == retrieved({})
    left = [one["left_at"] for one in found["candidates"]]
    assert [left.count(stage) for stage in (None, "rank", "prerank")] == [12, 8, 20]
    assert EVIL in [one["columns"]["title"] for one in found["candidates"]]
    assert found["candidates"][0]["ranks"] == {"retrieval": 40, "prerank": 1, "rank": 1}


def test_what_is_served(shared: Server) -> None:
    about = shared.client.get("/about").json()
    assert (about["version"], about["items"], about["columns"]) == ("one", ITEMS, ["video_id", "title", "price"])
    assert {stage["name"]: stage["keep"] for stage in about["stages"]} == KEEPS
    assert (about["user"], about["user_is_number"], about["features"]) == ("user_id", True, False)


# ---- refusals --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[bytes, int, str]] = [
    (b"", 400, "the body is not JSON"),
    (b"\xff\xfe", 400, "the body is not JSON"),
    (b'{"requests": [{}]', 400, "the body is not JSON"),
    (b'{"requests": [{}], "k": NaN}', 400, "the body is not JSON"),
    (b'{"requests": [{"age": Infinity}]}', 400, "the body is not JSON"),
    (b'{"requests": [{"age": "\\ud800"}]}', 400, "the body is not JSON"),
    (b"[" * 10_000, 400, "recursion"),
    (b"[]", 422, "the body is not an object"),
    (b"7", 422, "the body is not an object"),
    (b"{}", 422, "requests: is missing"),
    (b'{"requests": {}}', 422, "requests: is not a list"),
    (b'{"requests": []}', 422, "requests: is empty"),
    (b'{"requests": [{}, 7]}', 422, "requests[1]: is not an object"),
    (b'{"requests": [{}], "k": "7"}', 422, "k: is not a whole number"),
    (b'{"requests": [{}], "k": 0}', 422, "k: "),
    (b'{"requests": [{}], "k": 51}', 422, "k: 51 is more than the 50"),
    (b'{"requests": [{}], "explain": 1}', 422, "explain: is not true or false"),
    (b'{"requests": [{}], "explian": true}', 422, "explian: is no such field"),
    (b'{"requests": [{}], "columns": [7]}', 422, "columns[0]: is not a text"),
    (b'{"requests": [{}], "columns": ["titel"]}', 422, "did you mean title"),
    (b'{"requests": [{}], "columns": ["title", "title", "title"]}', 422, "columns: there are 3"),
    (b'{"requests": [{}, {}, {}, {}, {}]}', 422, "requests: there are 5"),
    (b'{"requests": [{}, {"history": [1, 2, 3, 4, 5, 6]}]}', 422, "requests[1]: 'history': 6 values"),
    (b'{"requests": [{"age": "12345678901"}]}', 422, "requests[0]: 'age': a text of 11 letters"),
    (b'{"requests": [{"12345678901": 1}]}', 422, "its name has more than 10 letters"),
    (b'{"requests": [{"age": 1e999}]}', 422, "requests[0]: 'age': a number is too large"),
    (b'{"requests": [{"age": 18446744073709551616}]}', 422, "requests[0]: 'age': a whole number has more"),
    (b'{"requests": [{"age": [[[[[7]]]]]}]}', 422, "requests[0]: 'age': is nested too deep"),
    (b'{"requests": [{"history": [{"a": "12345678901"}]}]}', 422, "requests[0]: 'history': a text of 11"),
    (b'{"requests": [{}, {"age": 999}]}', 422, "requests[1]: age: 999 is too old"),
]


@pytest.mark.parametrize(("body", "status", "words"), WRONG)
def test_one_sentence(body: bytes, status: int, words: str, shared: Server) -> None:
    answer = shared.post(body)
    assert answer.status_code == status
    content = answer.json()
    assert content.keys() == {"error", "request_id"} and words in content["error"]
    assert "\n" not in content["error"] and "Traceback" not in content["error"]


def test_other_paths_methods_and_types(shared: Server) -> None:
    assert shared.client.get("/nothing").json()["error"] == "no such path"
    assert shared.client.get("/recommend").status_code == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert shared.client.post("/recommend", content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert shared.client.post("/recommend", content=b"{}").status_code == 415
    assert shared.post(b'{"requests": [{}]}', **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200
    assert shared.client.get("/users", params={"limit": "many"}).status_code == 422
    assert shared.client.get("/users").status_code == 404  # there is no feature store


def test_a_body_that_is_too_large(shared: Server) -> None:
    large = b'{"requests": [{}]}' + b" " * 20_000
    for body in (large, iter([large[:10_000], large[10_000:]])):  # an iterator is sent in chunks, without a length
        answer = shared.post(body)  # type: ignore[arg-type]
        assert answer.status_code == 413 and "20000 bytes" in answer.json()["error"]


def connected(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    assert url.port is not None
    return socket.create_connection((url.host, url.port), timeout=60)


def test_a_body_without_end_is_not_read(shared: Server) -> None:
    with connected(shared) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        piece, sent = b"10000\r\n" + b" " * 0x10000 + b"\r\n", 0
        with pytest.raises(OSError):  # reset, or a broken pipe
            while sent < 1 << 30:
                sent += connection.send(piece)
        assert sent < 1 << 28
    assert shared.ask({}).status_code == 200


def test_a_body_that_never_ends_in_time(server: Callable[..., Server]) -> None:
    one = server(FakeRecommender, seconds=0.2).ready()
    with connected(one) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_few_bodies_are_read_at_a_time(server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    """Who sends slowly, or goes away, holds up the others no longer than that."""
    one = server(FakeRecommender, max_waiting=1).ready()
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(connected(one))
            connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: 100\r\n\r\n{")
        wait(lambda: one.ask({}).status_code == 503)
        assert one.ask({}).headers["Retry-After"] == "1"
        assert one.client.get("/healthz").status_code == 200
    wait(lambda: one.ask({}).status_code == 200)
    assert "Traceback" not in caplog.text and ("lcron_errors_total", "internal") not in one.metrics()


def test_a_defect_is_not_shown(server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    one = server(FakeRecommender).ready()
    answer = one.ask({"age": 666})
    assert answer.status_code == 500
    assert "a defect" not in answer.text and "Traceback" not in answer.text and ".py" not in answer.text
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"]
    assert "a defect" in caplog.text  # the log has the traceback
    assert one.metrics()["lcron_errors_total", "internal"] == 1
    assert one.ask({}).status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
names = st.sampled_from(["requests", "k", "explain", "columns", "filter_seen", "user_id", "age", "history"])
bodies = st.dictionaries(names, values) | values
asks = st.fixed_dictionaries({"requests": st.lists(st.dictionaries(names, values, max_size=3), max_size=5)})


FUZZ: dict[str, Any] = {"deadline": None, "database": None, "phases": [Phase.generate], "derandomize": True}


@settings(max_examples=120, **FUZZ)
@given(content=bodies | asks, cut=st.integers(0, 3))
def test_no_body_is_a_defect(shared: Server, content: Any, cut: int) -> None:
    body = json.dumps(content).encode()
    assert shared.post(body[: len(body) - cut]).status_code in (200, 400, 413, 422)


@settings(max_examples=60, **FUZZ)
@given(body=st.binary(max_size=200))
def test_no_bytes_are_a_defect(shared: Server, body: bytes) -> None:
    assert shared.post(body).status_code in (400, 422)


# ---- request ids, log, metrics, headers ------------------------------------------------------------------------------


def test_request_ids(shared: Server) -> None:
    given = "abc-123_x.Y:z"
    assert shared.client.get("/healthz", headers={"X-Request-ID": given}).headers["X-Request-ID"] == given
    for bad in ("", "a b", "<script>", "x" * 65, 'a"b'):
        made = shared.client.get("/healthz", headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_a_line_in_the_log(shared: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deep_components"):
        shared.ask({}, {}, k=1)
        shared.client.get("/no/%E2%80%AE%0Athing", headers={"X-Request-ID": "mine"})
        shared.client.get("/healthz")
        wait(lambda: sum(record.name.endswith("watch") for record in caplog.records) == 2)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("watch")]
    assert [(line["path"], line["status"], line["requests"]) for line in lines] == [
        ("/recommend", 200, 2), ("/no/\u202e\nthing", 404, 0)
    ]  # fmt: skip
    assert lines[1]["id"] == "mine" and lines[0]["ms"] > 0
    assert not [record for record in caplog.records if not record.getMessage().isascii()]


def test_metrics(server: Callable[..., Server]) -> None:
    one = server(FakeRecommender).ready()
    assert [one.ask({}, {}).status_code, one.ask({"age": 999}).status_code, one.ask(7).status_code] == [200, 422, 422]
    one.client.get("/a/path/nobody/knows")
    found = one.metrics()
    assert found["lcron_http_requests_total", "/recommend", "200"] == 1
    assert found["lcron_http_requests_total", "/recommend", "422"] == 2
    assert found["lcron_http_requests_total", "other", "404"] == 1
    assert found["lcron_errors_total", "input"] == 2
    assert found["lcron_recommend_seconds_count",] == 3
    assert {part: found["lcron_part_seconds_count", part] for part in ("encode", *KEEPS)} == dict.fromkeys(
        ("encode", *KEEPS), 1
    )
    assert found["lcron_bundle_info", "one"] == 1 and found["lcron_bundle_items",] == ITEMS
    assert found["lcron_batch_requests_sum",] == 2 and found["lcron_waiting_requests",] == 0
    assert found["lcron_reloads_total", "ok"] == 1


def test_headers_that_protect_the_page(shared: Server) -> None:
    for path in ("/", "/docs", "/page.js", "/style.css", "/openapi.json", "/about", "/nothing"):
        headers = shared.client.get(path, headers={"Origin": "https://elsewhere.example"}).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in headers if name.lower().startswith("access-control")]
    ask = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    assert shared.client.options("/recommend", headers=ask).status_code == 405


def test_pages_name_no_other_address(shared: Server) -> None:
    for path, (name, kind) in FILES.items():
        answer = shared.client.get(path)
        assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert answer.text == (PAGE / name).read_text()
        assert "//" not in re.sub(r"^\s*//.*|; // .*|\{ // .*", "", answer.text, flags=re.MULTILINE)
    assert {file.name for file in PAGE.iterdir()} == {name for name, _ in FILES.values()}


def test_the_description_of_the_interface(shared: Server) -> None:
    described = shared.client.get("/openapi.json").json()
    assert {"/recommend", "/healthz", "/readyz", "/metrics", "/reload", "/about", "/users"} == set(described["paths"])
    body = described["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"] == EXAMPLE and Ask.model_validate(body["example"])
    assert set(body["schema"]["properties"]) == set(Ask.model_fields)
    answers = described["paths"]["/recommend"]["post"]["responses"]
    assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Answer")
    assert answers["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")


def test_without_the_page(server: Callable[..., Server], tmp_path: Path) -> None:
    store = open_features(tmp_path / "features.sqlite", create=True)
    one = server(FakeRecommender, store, page=False).ready()
    assert {one.client.get(path).status_code for path in (*FILES, "/users")} == {404}
    assert one.ask({}).status_code == 200
    store.close()


# ---- batches, the queue, time ----------------------------------------------------------------------------------------


class Held:
    """A server whose model is computing, and requests that arrive meanwhile."""

    def __init__(self, make: Callable[..., Server], **settings: Any) -> None:
        self.model = FakeRecommender()
        self.server = make(lambda: self.model, **settings).ready()
        self.model.calls.clear()
        self.model.free.clear()
        self.threads = ThreadPoolExecutor(32)
        self.first = self.send({"user_id": 0}, computing=True)

    def send(self, *requests: Any, computing: bool = False, **options: Any) -> Any:
        waiting = self.server.live.batches.waiting
        sent = self.threads.submit(self.server.ask, *requests, **options)
        wait(lambda: self.model.calls if computing else self.server.live.batches.waiting > waiting)
        return sent

    def users(self) -> list[list[Any]]:
        return [[request.get("user_id") for request in call] for call in self.model.calls]


def test_what_waits_is_computed_together(server: Callable[..., Server]) -> None:
    held = Held(server, max_batch=4)
    sent = [held.send({"user_id": user}, k=2 if user == 3 else 5) for user in range(1, 7)]
    held.model.free.set()
    assert [one.result().json()["results"][0]["items"] for one in sent] == [
        expected({}, 2 if user == 3 else 5) for user in range(1, 7)
    ]
    assert held.users() == [[0], [1, 2, 4, 5], [3], [6]]  # by options, the first that waits first, at most four


def test_a_bad_request_fails_alone(server: Callable[..., Server]) -> None:
    held = Held(server)
    sent = [held.send({"user_id": user, "age": age}) for user, age in enumerate((1, 999, 2, 666, 3))]
    held.model.free.set()
    assert [one.result().status_code for one in sent] == [200, 422, 200, 500, 200]
    assert "requests[0]: age" in sent[1].result().json()["error"]  # its own number, not that in the batch


def test_a_full_queue_refuses_at_once(server: Callable[..., Server]) -> None:
    held = Held(server, max_waiting=3)
    waiting = [held.send({"user_id": 1}, {"user_id": 2}), held.send({"user_id": 3})]
    refused = held.server.ask({"user_id": 4})
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
    assert held.server.metrics()["lcron_waiting_requests",] == 3
    assert held.server.metrics()["lcron_errors_total", "full"] == 1
    held.model.free.set()
    assert [one.result().status_code for one in (held.first, *waiting)] == [200, 200, 200]
    assert held.server.ask({"user_id": 5}).status_code == 200
    assert [4] not in held.users()


def test_what_waited_too_long_is_not_computed(server: Callable[..., Server]) -> None:
    held = Held(server, seconds=0.3)
    late = held.send({"user_id": 1})
    assert late.result().status_code == 504 and late.result().headers["Retry-After"] == "1"
    assert held.first.result().status_code == 504  # who computes is late too
    assert held.server.live.batches.waiting == 0
    held.model.free.set()
    assert held.server.ask({"user_id": 2}).status_code == 200
    assert held.users() == [[0], [2]]


def test_what_waits_is_answered_before_the_end(server: Callable[..., Server]) -> None:
    held = Held(server)
    waiting = [held.send({"user_id": user}) for user in range(3)]
    held.server.app.state.server.should_exit = True  # what SIGTERM does
    wait(lambda: _refused(held.server))
    assert not any(one.done() for one in waiting)
    held.model.free.set()
    assert [one.result().status_code for one in (held.first, *waiting)] == [200] * 4


def _refused(server: Server) -> bool:
    try:
        connected(server).close()
    except ConnectionRefusedError:
        return True
    return False


# ---- loading and reloading -------------------------------------------------------------------------------------------


class Versions:
    """What a server loads: ``current``, or the error that it is."""

    def __init__(self) -> None:
        self.current: Any = FakeRecommender("one")
        self.free = threading.Event()
        self.free.set()

    def __call__(self) -> Any:
        assert self.free.wait(60)
        if isinstance(self.current, Exception):
            raise self.current
        return self.current


def test_ready_when_loaded(server: Callable[..., Server]) -> None:
    versions = Versions()
    versions.free.clear()
    one = server(versions)
    assert one.client.get("/healthz").status_code == 200
    for answer in (one.client.get("/readyz"), one.client.get("/about"), one.ask({})):
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
    versions.free.set()
    assert one.ready().client.get("/readyz").json() == {"status": "ready", "version": "one"}


def test_a_token_is_needed(server: Callable[..., Server]) -> None:
    assert server(Versions()).client.post("/reload", headers=BEARER).status_code == 404  # none is set
    one = server(Versions(), reload_token=TOKEN).ready()
    for header in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"}):
        answer = one.client.post("/reload", headers=header)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert one.metrics()["lcron_reloads_total", "ok"] == 1  # the first load


def test_a_new_version(server: Callable[..., Server]) -> None:
    """A request under way is answered by the version that it began with."""
    versions = Versions()
    old = versions.current
    one = server(versions, reload_token=TOKEN).ready()
    old.calls.clear()
    old.free.clear()
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(one.ask, {})
        wait(lambda: old.calls)
        versions.current = FakeRecommender("two")
        assert one.client.post("/reload", headers=BEARER).json() == {"version": "two", "previous": "one"}
        assert one.client.get("/readyz").json()["version"] == "two"
        old.free.set()
        assert sent.result().json()["version"] == "one"
    assert one.ask({}).json()["version"] == "two"
    found = one.metrics()
    assert ("lcron_bundle_info", "one") not in found and found["lcron_bundle_info", "two"] == 1


@pytest.mark.parametrize("answers", [False, True])
def test_a_damaged_version_is_not_served(
    answers: bool, server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """One that cannot be loaded, and one that can but does not answer."""
    versions = Versions()
    one = server(versions, reload_token=TOKEN).ready()
    error = InputError("two/vectors.npy: does not match its checksum; export the run again")
    versions.current = FakeRecommender("two") if answers else error
    if answers:
        versions.current.recommend = lambda *_, **__: (_ for _ in ()).throw(error)
    answer = one.client.post("/reload", headers=BEARER)
    assert answer.status_code == 409
    assert "vectors.npy: does not match" in answer.json()["error"] and "version one is served" in answer.text
    assert "vectors.npy: does not match" in caplog.text
    assert one.metrics()["lcron_reloads_total", "failed"] == 1
    assert one.ask({}).json()["version"] == one.client.get("/readyz").json()["version"] == "one"
    versions.current = FakeRecommender("three")
    assert one.client.post("/reload", headers=BEARER).status_code == 200


def test_no_request_fails_during_reloads(server: Callable[..., Server]) -> None:
    versions, done = Versions(), threading.Event()
    one = server(versions, reload_token=TOKEN, seconds=60.0).ready()

    def hammer(user: int) -> list[tuple[int, str]]:
        found = []
        with httpx.Client(base_url=one.url, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/recommend", json={"requests": [{"user_id": user}]})
                found.append((answer.status_code, answer.json().get("version", answer.text)))
        return found

    with ThreadPoolExecutor(4) as threads:
        hammering = [threads.submit(hammer, user) for user in range(4)]
        for number in range(20):
            versions.current = InputError("damaged") if number % 5 == 4 else FakeRecommender(f"v{number}")
            assert one.client.post("/reload", headers=BEARER).status_code == (409 if number % 5 == 4 else 200)
        done.set()
        answers = [answer for found in hammering for answer in found.result()]
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} <= {"one", *(f"v{number}" for number in range(20))}


def test_a_first_load_that_fails_is_told() -> None:
    told: list[BaseException] = []
    versions = Versions()
    versions.current = InputError("no such bundle")
    with served(make_app(versions, failed=told.append)) as url:
        wait(lambda: told)
        assert httpx.get(f"{url}/readyz").status_code == 503
    assert told == [versions.current]


# ---- the feature store -----------------------------------------------------------------------------------------------


def test_stored_features_are_added(server: Callable[..., Server], tmp_path: Path) -> None:
    store = open_features(tmp_path / "features.sqlite", create=True)
    store.put({7: {"age": 30, "other": 1, "history": [41, 40]}, 71: {"age": 31, "history": []}, "x": {}})
    model = FakeRecommender()
    one = server(lambda: model, store).ready()
    requests = [{"user_id": 7}, {"user_id": 7, "age": 50, "history": []}, {"user_id": 8}, {"user_id": None}, {}]
    answer = one.ask(*requests, {"user_id": [7]}, {"user_id": "x" * 600}, k=3).json()
    assert model.calls[-1][:5] == [
        {"user_id": 7, "age": 30, "history": [41, 40]},  # what the version does not take is left out
        {"user_id": 7, "age": 50, "history": []},  # the request's own fields win
        {"user_id": 8}, {"user_id": None}, {},
    ]  # fmt: skip
    assert answer["results"][0]["items"] == expected({"history": [41, 40]}, 3)
    one.ask({"user_id": "7"}, {"user_id": 7, "video_id": [39]}, k=3)  # the log's users are whole numbers
    assert [request.get("history") for request in model.calls[-1]] == [[41, 40], None]  # the second has one of its own
    assert one.client.get("/users", params={"prefix": "7"}).json() == {"users": [7, 71]}
    assert one.client.get("/users", params={"limit": 1}).json() == {"users": [7]}
    assert one.client.get("/about").json()["features"] is True
    store.close()


class BrokenStore:
    """A store that does not answer, and asks to wait."""

    def get(self, *_: Any) -> Any:
        raise FeaturesUnavailableError("redis://secret.example: does not answer")

    users = get


def test_a_store_that_does_not_answer(server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    one = server(FakeRecommender, BrokenStore()).ready()
    for answer in (one.ask({"user_id": 7}), one.client.get("/users")):
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        assert "secret" not in answer.text
    assert "secret.example: does not answer" in caplog.text
    assert one.metrics()["lcron_errors_total", "features"] == 2
