"""What a server tells Prometheus, in a registry of its own."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Monitor:
    """The metrics of one server; ``waiting`` says how many requests wait."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.responses = Counter(
            "lcron_http_requests", "HTTP requests by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "lcron_recommend_seconds", "POST /recommend, from a request's head to its answer", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.parts = Histogram(
            "lcron_part_seconds", "Of a batch: features, encode, each stage, answer", ["part"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "lcron_batch_requests", "Requests computed together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.errors = Counter(
            "lcron_errors",
            "By reason: input, not_ready, full, timeout, features, internal",
            ["reason"],
            registry=registry,
        )
        self.reloads = Counter("lcron_reloads", "Versions loaded, and those refused", ["outcome"], registry=registry)
        self.bundle = Info("lcron_bundle", "The version that is served", registry=registry)
        self.items = Gauge("lcron_bundle_items", "Items of the corpus that is served", registry=registry)
        Gauge("lcron_waiting_requests", "Requests that wait", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
