"""Around every HTTP request: its id, a line in the log, metrics, and the headers that protect the page."""

import json
import logging
import re
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deep_components.serving.monitor import Monitor

ID_HEADER = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked every few seconds: logged only when they fail

logger = logging.getLogger(__name__)


class Watch:
    """ASGI middleware. ``paths`` are those that have a metric of their own; all others share one."""

    def __init__(self, app: ASGIApp, monitor: Monitor, paths: Collection[str]) -> None:
        self.app, self.monitor, self.paths = app, monitor, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, began_answer, state = perf_counter(), 500, False, scope.setdefault("state", {})
        given = Request(scope).headers.get(ID_HEADER, "")
        state["id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex

        async def watched(message: Message) -> None:
            nonlocal status, began_answer
            if message["type"] == "http.response.start":
                status, began_answer = message["status"], True
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = state["id"]
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:  # a defect: the log gets the traceback, the client a sentence
            logger.exception("request %s failed", state["id"])
            self.monitor.errors.labels("internal").inc()
            if began_answer:
                raise
            answer = refusal(Request(scope), 500, "the server failed; its log has the reason under this request's id")
            await answer(scope, receive, watched)
        finally:
            self._note(scope, status, perf_counter() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.monitor.responses.labels(path, str(status)).inc()
        if path == "/recommend":
            self.monitor.seconds.observe(seconds)
        if status < 400 and path in _QUIET:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": now, "id": scope["state"]["id"], "method": scope["method"]}
        line |= {"path": scope["path"][:200], "status": status, "ms": round(1000 * seconds, 1)}
        line |= {"requests": scope["state"].get("requests", 0)}
        logger.info("%s", json.dumps(line))


def refusal(request: Request, status: int, text: str, headers: Any = None) -> Response:
    """A sentence as :class:`~deep_components.serving.wire.ErrorAnswer`."""
    return JSONResponse({"error": text, "request_id": request.state.id}, status, headers)
