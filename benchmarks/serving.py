"""A served cascade: latency in the process and over HTTP, what an approximate index loses, and memory.

    python -m benchmarks.serving [--items=1000000] [--index=auto] [--compared=flat,ivf,hnsw] [--concurrency=1,4,16]

A table is simulated (benchmarks/serving_data.py) and imported, a cascade of 400 -> 100 -> 20 items (DSSM with vectors
of 32 numbers, MLP, DIN) is trained on it for a pass, and exported with the corpus, all by ``lcron``'s own commands.
Then requests with histories of 50 items are answered one by one by a ``Recommender`` in a process of its own, and over
HTTP by ``lcron serve``, with a load from benchmarks/load.py in a third process. Times are in milliseconds. "index" has
each index's build and search with one thread, and the share of the exact best 400 that it finds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, load, serving_data
from deep_components.cli import run_command
from deep_components.dataset.simulate import World
from deep_components.errors import InputError
from deep_components.serving.bundle import QUERIES_FILE, VERSIONS
from deep_components.serving.index import build_index
from deep_components.serving.recommender import Recommender
from deep_components.threads import short_waits

K, RETRIEVED = 20, 400
WARM_UP = 50
QUERIES = 256  # with which indexes are compared
QUERIED = ("vectors", "queries", "users", "exact")  # what write_queries leaves for compare
START_SECONDS = 600.0
LCRON = (sys.executable, "-m", "deep_components")


# ---- what is served --------------------------------------------------------------------------------------------------


def lcron(*words: str) -> dict[str, float]:
    """Run a command of ``lcron``; its seconds, and the peak of its memory, files that it mapped included."""
    started = time.perf_counter()
    process = subprocess.Popen([*LCRON, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"lcron {' '.join(words)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": used.ru_maxrss * 1024.0}


def make_bundle(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Simulate, import, train and export; what the commands took. Leaves ``bundle`` and ``requests.json``."""
    settings = serving_data.settings_of(args.items, args.log_requests)
    serving_data.write_all(folder, settings)
    requests = serving_data.raw_requests(World(settings), args.requests)
    (folder / "requests.json").write_text(json.dumps(requests))
    log, run = f"--data_dir={folder / 'log'}", folder / "run"
    trained = [
        f"--cascade={folder / 'cascade.toml'}",
        f"--train_days={','.join(serving_data.DAYS[:2])}",
        "--loss_type=bce",
    ]
    trained += [f"--batch_size={args.batch_size}", f"--epochs={args.epochs}", "--device=cpu", "--nn_units=128"]
    exported = [f"--corpus={folder / 'items.parquet'}", f"--index={args.index}", f"--output={folder / 'bundle'}"]
    return {
        "import": lcron("import", f"--mapping={folder / 'log.toml'}", f"--output_dir={folder / 'log'}"),
        "train": lcron("train", log, f"--output_dir={run}", *trained),
        "export": lcron("export", log, f"--run={run}", *exported),
    }


# ---- in a process of its own -----------------------------------------------------------------------------------------


def answer(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A Recommender answers the requests one by one: percentiles of all and of each part, and the process's memory."""
    started = time.perf_counter()
    recommender = Recommender.load(folder / "bundle")
    loaded = time.perf_counter() - started
    requests = json.loads((folder / "requests.json").read_text())
    whole, parts, before = list[float](), dict[str, list[float]](), time.process_time()
    for request in [*requests[:WARM_UP], *requests]:
        timings: dict[str, float] = {}
        started = time.perf_counter()
        (found,) = recommender.recommend([request], k=K, timings=timings)
        whole.append(time.perf_counter() - started)
        for part, seconds in timings.items():
            parts.setdefault(part, []).append(seconds)
        if len(found.items) != min(K, len(recommender.bundle.corpus)):
            raise InputError(f"{len(found.items)} items are an answer, not {K}")
    return {
        "load_seconds": loaded,
        "milliseconds": load.summary(whole[-len(requests) :]),
        "cpu_milliseconds": 1e3 * (time.process_time() - before) / len(whole),
        "milliseconds_per_part": {name: load.summary(seconds[-len(requests) :]) for name, seconds in parts.items()},
        "index": recommender.bundle.manifest["index"],
        "memory": memory("self"),
    }


def compare(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Build an index of the bundle's item vectors and search it with users' vectors one by one."""
    vectors, queries, users, exact = (np.load(folder / f"{name}.npy") for name in QUERIED)
    before = memory("self")["anonymous_bytes"]
    started = time.perf_counter()
    index = build_index(vectors, kind, queries, RETRIEVED)
    built, took = time.perf_counter() - started, list[float]()
    after, shares = memory("self")["anonymous_bytes"], list[float]()
    for user, best in zip(users, exact, strict=True):
        started = time.perf_counter()
        _, rows = index.search(user[None], RETRIEVED)
        took.append(time.perf_counter() - started)
        shares.append(len(np.intersect1d(rows[0], best)) / len(best))
    return {
        "choice": index.choice.to_json(),
        "build_seconds": built,
        "search_milliseconds": load.summary(took),
        f"recall@{RETRIEVED}": float(np.mean(shares)),
        "bytes": after - before,
        "vectors_bytes": vectors.nbytes,
    }


def write_queries(folder: Path, args: argparse.Namespace) -> None:
    """Leave the bundle's item vectors and the users' vectors that its index was measured on; and the vectors of some of
    the requests' users with their best RETRIEVED items."""
    recommender = Recommender.load(folder / "bundle")
    bundle = recommender.bundle
    requests = json.loads((folder / "requests.json").read_text())[:QUERIES]
    encoded = recommender.encoder.encode(recommender.encoder.rows_of(requests), 0, 0.0)
    users = bundle.scorer.user_vectors(encoded.request, encoded.history)
    vectors = np.asarray(bundle.index.vectors)
    best = np.stack(
        [np.argpartition(-(vectors @ user), min(RETRIEVED, len(vectors)) - 1)[:RETRIEVED] for user in users]
    )
    queries = np.load(bundle.folder / VERSIONS / bundle.version / QUERIES_FILE)
    for name, array in zip(QUERIED, (vectors, queries, users, best), strict=True):
        np.save(folder / f"{name}.npy", array)


def memory(process: int | str) -> dict[str, float]:
    """Of a process now and at its peak, in bytes: all that lies in memory, and what of it is no file's page."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    named = {"resident_bytes": "VmRSS", "peak_bytes": "VmHWM", "anonymous_bytes": "RssAnon"}
    return {name: int(lines[key].split()[0]) * 1024.0 for name, key in named.items()}


def cpu_seconds(process: int) -> float:
    """What a process has used of the cores so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def apart(args: argparse.Namespace, *words: str, threads: int | None = None) -> dict[str, Any]:
    """Do a part of the work in a process of its own, whose memory is its own; what it says."""
    environment = {**os.environ, **short_waits(), **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    command = [sys.executable, "-m", "benchmarks.serving", f"--folder={args.folder}", f"--part={','.join(words)}"]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    result: dict[str, Any] = json.loads(said)
    return result


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """``lcron serve`` on a free port of this machine: its address, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "serve.log").open("w") as log:
        words = ["serve", f"--bundle={folder / 'bundle'}", f"--port={port}"]
        process = subprocess.Popen([*LCRON, *words], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise InputError(f"lcron serve did not start: {(folder / 'serve.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def over_http(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Latency and throughput at every concurrency, and the service's memory after that."""
    bodies = folder / "bodies.jsonl"
    requests = json.loads((folder / "requests.json").read_text())
    bodies.write_text("".join(json.dumps({"requests": [request], "k": K}) + "\n" for request in requests))
    results: dict[str, Any] = {}
    with served(folder) as (url, process):
        for concurrency in map(int, args.concurrency):
            before = cpu_seconds(process)
            flags = [f"--url={url}/recommend", f"--bodies={bodies}", f"--concurrency={concurrency}"]
            flags += [f"--requests={args.requests}", f"--warm_up={max(WARM_UP, concurrency)}"]
            command = [sys.executable, "-m", "benchmarks.load", *flags]
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            used = (cpu_seconds(process) - before) / (args.requests + max(WARM_UP, concurrency))
            results[str(concurrency)] = json.loads(said) | {"cpu_milliseconds_of_service": 1e3 * used}
        results["memory"] = memory(process)
    return results


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    args.folder = folder
    results: dict[str, Any] = {"commands": make_bundle(args, folder)} if args.make else {}
    results["in_process"] = apart(args, "answer")
    if args.concurrency:
        results["http"] = over_http(args, folder)
    if args.compared:
        apart(args, "write_queries")
        results["index"] = {kind: apart(args, "compare", kind, threads=1) for kind in args.compared}
    return results


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the corpus")
    parser.add_argument("--index", default="auto", help="of the bundle")
    parser.add_argument(
        "--compared", type=_words, default=["flat", "ivf", "hnsw"], help="indexes measured by themselves"
    )
    parser.add_argument("--concurrency", type=_words, default=["1", "4", "16"], help="empty: no HTTP")
    parser.add_argument("--requests", type=int, default=1000, help="of each measurement")
    parser.add_argument("--log_requests", type=int, default=2048, help="of the days for training and testing")
    parser.add_argument("--batch_size", type=int, default=64, help="of the training")
    parser.add_argument("--epochs", type=int, default=1, help="of the training; 0: untrained")
    parser.add_argument("--folder", type=Path, help="where everything lies, and stays; by default a temporary folder")
    parser.add_argument("--make", action=argparse.BooleanOptionalAction, default=True, help="the bundle in --folder")
    parser.add_argument("--part", type=_words, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args(argv)
    args.device = "cpu"
    if args.part is not None:
        sys.stdout.write(json.dumps(part(args)) + "\n")
    elif args.folder is not None:
        common.report(args, measure(args, args.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            common.report(args, measure(args, Path(folder)))


def part(args: argparse.Namespace) -> Any:
    """What :func:`apart` asks for."""
    name, *words = args.part
    works = {"answer": answer, "write_queries": write_queries, "compare": compare}
    return works[name](*words, args.folder, args)  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(run_command(main))
