"""``lcron serve`` as a process, and the service on real bundles."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from deep_components.cli import run_command
from deep_components.commands import serve
from deep_components.serving.bundle import current_version
from deep_components.serving.export import index_corpus
from deep_components.serving.features import FEATURES_FILE, open_features
from deep_components.serving.recommender import Recommender
from deep_components.serving.service import make_app
from tests.serving.fake import served
from tests.serving.test_service import BEARER, TOKEN, wait

ROOT = Path(__file__).parents[2]


class Process:
    """``lcron serve`` and what it wrote so far."""

    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), serve.TOKEN: TOKEN}
        command = [sys.executable, "-m", "deep_components", "serve", "--port=0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        wait(lambda: self.said("listening at") or self.process.poll() is not None)
        self.client = httpx.Client(base_url=re.findall(r"http://\S+", self.said("listening at"))[0], timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)

    def said(self, words: str) -> str:
        return next((line for line in self.lines if words in line), "")

    def ready(self) -> "Process":
        wait(lambda: self.client.get("/readyz").status_code == 200)
        return self

    def ask(self, request: Any, **options: Any) -> httpx.Response:
        return self.client.post("/recommend", json={"requests": [request], **options})


@contextmanager
def running(*arguments: str) -> Iterator[Process]:
    one = Process(*arguments)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        one.reader.join()
        one.client.close()


@pytest.fixture
def bundle(recflow_bundle: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    return shutil.copytree(recflow_bundle, tmp_path / "bundle")


def test_from_the_start_to_the_end(bundle: Path, tmp_path: Path) -> None:
    """Answers as in Python; new versions by SIGHUP and by the token, a damaged one is refused; SIGTERM."""
    with closing(open_features(bundle / FEATURES_FILE, create=True)) as store:  # found there
        store.put({1: {"history": []}, 12: {}})
    first = current_version(bundle)
    request = {"user_id": 1, "request_timestamp": 1_705_312_800_000}
    [expected] = Recommender.load(bundle).recommend(request, k=3)
    with running(f"--bundle={bundle}", "--timeout_s=60") as server:
        answer = server.ready().ask(request, k=3).json()
        assert answer["version"] == first and answer["results"][0]["items"] == expected.items
        assert answer["results"][0]["scores"] == pytest.approx(expected.scores)

        assert server.client.get("/users").json() == {"users": [1, 12]}

        items = Recommender.load(bundle).bundle.corpus.table.slice(0, 50)
        pa.parquet.write_table(items, tmp_path / "items.parquet")
        second = index_corpus(bundle, tmp_path / "items.parquet")
        assert server.ask({}).json()["version"] == first
        server.process.send_signal(signal.SIGHUP)
        wait(lambda: server.ask({}).json()["version"] == second)
        assert server.client.get("/about").json()["items"] == 50

        damaged = bundle / "versions" / index_corpus(bundle, tmp_path / "items.parquet") / "vectors.npy"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        refused = server.client.post("/reload", headers=BEARER)
        assert refused.status_code == 409 and "vectors.npy" in refused.json()["error"]
        server.process.send_signal(signal.SIGHUP)
        wait(lambda: sum("vectors.npy" in line for line in server.lines) == 2)
        assert server.ask({}).json()["version"] == second

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "Traceback" not in "".join(server.lines)


def test_refusals_at_the_start(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command(serve.main, [f"--bundle={bundle}", f"--port={port}"]) == 2
    assert re.fullmatch(rf"error: .*--port={port}: cannot be listened at .*\n", capsys.readouterr().err)
    for arguments, words in (
        ([f"--bundle={bundle}", "--host=no.such.host.invalid"], "no.such.host.invalid"),
        ([f"--bundle={bundle}", f"--features={tmp_path / 'nothing.sqlite'}"], "nothing.sqlite"),
        ([f"--bundle={bundle}", "--device=tpu"], "tpu"),
        ([f"--bundle={tmp_path / 'nothing'}", "--port=0"], "nothing"),
    ):
        assert run_command(serve.main, arguments) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--port=99999", "from 0 to 65535"), ("--max_waiting=0", "above 0"), ("--timeout_s=nan", "seconds"),
        ("--reload_token=x", "no such option"),
    ],
)  # fmt: skip
def test_wrong_arguments(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        serve.parse_args(["--bundle=b", argument])
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("token", ["short", "a token with a newline\n", "ein Schlüssel mit Umlaut"])
def test_a_token_that_is_none(token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(serve.TOKEN, token)
    assert run_command(serve.main, ["--bundle=b"]) == 2
    said = capsys.readouterr().err
    assert serve.TOKEN in said and token not in said


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_command(serve.main, ["--bundle=b"]) == 2
    assert "the package uvicorn is missing; pip install 'lcron[serve]'" in capsys.readouterr().err


# ---- real bundles, in this process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop_server(shop_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A bundle of four stages whose ids are texts, and a feature store."""
    recommender = Recommender.load(shop_bundle)
    store = open_features(tmp_path_factory.mktemp("features") / "features.sqlite", create=True)
    items = recommender.bundle.corpus.ids(np.arange(3))
    store.put({"u1": {"history": items, "from another version": 1}})
    app = make_app(lambda: recommender, features=store)
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
        yield client
    store.close()


def test_the_store_s_history_is_filtered(shop_server: httpx.Client, shop_bundle: Path) -> None:
    recommender = Recommender.load(shop_bundle)
    bundle, user = recommender.bundle, recommender.bundle.encoding.user
    history = bundle.corpus.ids(np.arange(3))
    columns = bundle.corpus.table.column_names
    asked = {user: "u1", bundle.encoding.time: "2025-03-06T12:00:00"}
    body = {"requests": [asked], "k": 1000, "explain": True, "columns": columns}
    [found] = shop_server.post("/recommend", json=body).json()["results"]
    [expected] = recommender.recommend({**asked, "history": history}, k=1000)
    assert found["items"] == expected.items and not set(history) & set(found["items"])
    rows = bundle.corpus.rows_of(pa.array(found["items"]))
    assert found["columns"][bundle.encoding.item] == found["items"]
    assert found["columns"][columns[-1]] == bundle.corpus.table.take(rows).column(columns[-1]).to_pylist()
    assert shop_server.get("/about").json()["user_is_number"] is False
    parts = [f'lcron_part_seconds_count{{part="{part}"}}' for part in ("encode", *bundle.cascade.stage_names, "answer")]
    text = shop_server.get("/metrics").text
    assert all(part in text for part in parts)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


def requests_of(recommender: Recommender) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Requests of known columns, whatever their values."""
    names = st.sampled_from(sorted(recommender.encoder.known))
    events = st.dictionaries(st.sampled_from([*recommender.encoder.history_columns, "x"]), values, max_size=3)
    history = st.fixed_dictionaries({"history": st.lists(events | values, max_size=4)})
    return st.lists(history | st.dictionaries(names, values, max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("which", ["recflow_bundle", "shop_bundle"])
def test_no_request_is_a_defect(which: str, request: pytest.FixtureRequest) -> None:
    recommender = Recommender.load(request.getfixturevalue(which))

    @settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate], derandomize=True)
    @given(requests=requests_of(recommender))
    def check(requests: list[dict[str, Any]]) -> None:
        answer = client.post("/recommend", json={"requests": requests, "explain": True})
        assert answer.status_code in (200, 422), (requests, answer.text)
        if answer.status_code == 422:
            assert answer.json()["error"].startswith("requests[")

    with served(make_app(lambda: recommender)) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
        check()


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """A connection sends each packet at once: Nagle's algorithm would add 40 ms to every answer."""
    with serve.listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()):
        accepted, _ = server.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
