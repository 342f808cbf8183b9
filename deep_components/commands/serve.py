"""Answer requests over HTTP by a bundle, with a page that shows where items fall out.

    python -m deep_components serve --bundle=BUNDLE --port=8080

SIGHUP, or POST /reload with the token of LCRON_RELOAD_TOKEN, serves the bundle's current version. docs/serving.md says
how to operate it.
"""

import argparse
import logging
import math
import os
import signal
import socket
import sys
from typing import Any

from deep_components.arguments import choose_device, folder, number, positive_int
from deep_components.cascade import named_cascade
from deep_components.cli import Parser
from deep_components.errors import InputError

TOKEN = "LCRON_RELOAD_TOKEN"
_TOKEN_LETTERS = 16  # at least
_KEEP_ALIVE = 20  # seconds that a connection may idle
_CONNECTIONS = 900  # at a time, those that idle too: below the usual limit of 1,024 open files
_MAX_HEAD = 32 << 10  # bytes of a request's head

_port = number(int, lambda value: 0 <= value <= 65535, "a whole number from 0 to 65535")
_seconds = number(float, lambda value: 0 < value <= 3600, "a number of seconds up to 3600")

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Answer requests over HTTP by a bundle.")
    parser.add_argument("--bundle", type=folder, required=True, help="what lcron export wrote")
    parser.add_argument("--port", type=_port, default=8080, help="default 8080; 0: any free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--features", metavar="FILE|redis://...", help="the feature store (default: "
                        "BUNDLE/features.sqlite, where there is one)")  # fmt: skip
    parser.add_argument("--cascade", metavar="FILE", help="the cascade's file, for models of your own")
    parser.add_argument("--max_waiting", type=positive_int, default=64, help="requests that may wait; more get 503")
    parser.add_argument("--max_body_bytes", type=positive_int, default=1 << 20, help="of a request (default 1 MiB)")
    parser.add_argument("--max_requests", type=positive_int, default=64, help="in one body (default 64)")
    parser.add_argument("--max_history", type=positive_int, default=1000, help="events of a history (default 1000)")
    parser.add_argument("--max_k", type=positive_int, default=1000, help="items to ask for (default 1000)")
    parser.add_argument("--timeout_s", type=_seconds, default=5.0, help="to read a body, and to answer (default 5)")
    parser.add_argument(
        "--no_page", action="store_true", help="neither the page at / nor GET /users, which lists users"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:K (default cpu)", default="cpu")
    parser.set_defaults(cuda=None)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; then answer what waits."""
    args = parse_args(argv)
    try:
        import uvicorn

        from deep_components.serving.features import FEATURES_FILE, open_features
        from deep_components.serving.recommender import Recommender
        from deep_components.serving.service import Limits, Settings, make_app
    except ModuleNotFoundError as error:
        raise InputError(
            f"the package {error.name} is missing; pip install 'lcron[serve]', or -r requirements-serve.txt"
        ) from error
    device = str(choose_device(args))
    where = args.features or (path if (path := args.bundle / FEATURES_FILE).exists() else None)
    features = open_features(where) if where else None
    limits = Limits(args.max_body_bytes, args.max_requests, args.max_history, args.max_k)
    settings = Settings(
        limits, args.max_waiting, seconds=args.timeout_s, reload_token=reload_token(), page=not args.no_page
    )

    def load() -> Recommender:
        cascade = named_cascade(args.cascade) if args.cascade else None
        return Recommender.load(args.bundle, cascade, device)

    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = make_app(load, settings, features, failed)
    server = uvicorn.Server(uvicorn.Config(app, **server_settings(args.timeout_s)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before the server handles it, and once it has ended
    with listen(args.host, args.port) as listening:
        host, port = listening.getsockname()[:2]
        logger.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
        server.run([listening])
    if failures:
        raise failures[0]


def server_settings(seconds: float) -> dict[str, Any]:
    """Of uvicorn: its limits, and nothing of its own in the log but warnings."""
    return {
        "http": "h11",
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "limit_concurrency": _CONNECTIONS,
        "timeout_keep_alive": _KEEP_ALIVE,
        "timeout_graceful_shutdown": math.ceil(seconds) + 5,
        "h11_max_incomplete_event_size": _MAX_HEAD,
    }


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. InputError when that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--host={host} --port={port}: cannot be listened at ({reason}); free the port or name another one"
        ) from error
    # Connections inherit it; asyncio does not set it on these. Without it an answer's second packet waits 40 ms for
    # the client's acknowledgement of the first.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def reload_token() -> str | None:
    """The environment's. InputError for one that could be guessed."""
    token = os.environ.get(TOKEN) or None
    if token and (len(token) < _TOKEN_LETTERS or not token.isascii() or not token.isprintable()):
        raise InputError(f"{TOKEN}: at least {_TOKEN_LETTERS} ASCII letters and digits, e.g. of openssl rand -hex 16")
    return token
