"""A bounded load on a served cascade: clients that each keep a connection open and wait for an answer.

    python -m benchmarks.load --url=http://127.0.0.1:8080/recommend --bodies=bodies.jsonl [--concurrency=4]

Needs nothing but Python, so that a process of its own takes little from the service. Seconds are those from the first
byte sent to the last byte received; the first ``--warm_up`` requests do not count. Printed is one line of JSON.
"""

import argparse
import http.client
import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 60.0  # seconds


def measured(url: str, bodies: Sequence[bytes], concurrency: int, requests: int, warm_up: int) -> dict[str, Any]:
    """What ``requests`` requests took, after ``warm_up`` others."""
    _load(url, bodies, concurrency, warm_up)
    started = time.perf_counter()
    answers = _load(url, bodies, concurrency, requests)
    elapsed = time.perf_counter() - started
    seconds = [took for status, took in answers if status == 200]
    refused = Counter(str(status) for status, _ in answers if status != 200)
    return {"requests_per_second": len(seconds) / elapsed, **summary(seconds), "refused": dict(refused)}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds, each the smallest value that so many do not exceed; none of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    ranks = {f"p{share}": -(-share * len(ordered) // 100) - 1 for share in (50, 90, 99)}
    return {"mean": 1e3 * fmean(ordered), **{name: 1e3 * ordered[rank] for name, rank in ranks.items()}}


def _load(url: str, bodies: Sequence[bytes], concurrency: int, requests: int) -> list[tuple[int, float]]:
    """(status, seconds) of each request; the clients take the next one as soon as they have an answer."""
    answers: list[tuple[int, float]] = []
    waiting = itertools.cycle(bodies)
    tickets, lock = iter(range(requests)), threading.Lock()

    def client() -> None:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT)
        while True:
            with lock:
                if next(tickets, None) is None:
                    break
                body = next(waiting)
            started = time.perf_counter()
            connection.request("POST", address.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            answers.append((response.status, time.perf_counter() - started))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--bodies", type=Path, required=True, help="a request's JSON a line")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--warm_up", type=int, default=100)
    args: Mapping[str, Any] = vars(parser.parse_args(argv))
    bodies = args["bodies"].read_bytes().splitlines()
    numbers = {name: args[name] for name in ("concurrency", "requests", "warm_up")}
    sys.stdout.write(json.dumps(measured(args["url"], bodies, **numbers)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
