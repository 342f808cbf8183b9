"""The HTTP service: a bundle answers POST /recommend. docs/serving.md, *HTTP*, says what it promises.

The event loop reads, checks and writes; one thread computes (:mod:`deep_components.serving.batches`).
"""

import asyncio
import hmac
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deep_components.errors import InputError
from deep_components.serving.batches import FullError
from deep_components.serving.features import FeatureStore, FeaturesUnavailableError
from deep_components.serving.live import Computed, Live, NotReadyError, Recommender, answer_of
from deep_components.serving.monitor import Monitor
from deep_components.serving.watch import Watch, refusal
from deep_components.serving.wire import (
    EXAMPLE,
    About,
    Answer,
    Ask,
    ErrorAnswer,
    Limits,
    Users,
    checked_ask,
    parse_json,
    sentence,
)

PAGE = Path(__file__).with_name("page")
FILES = {  # path -> the file of the page, its type
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/docs.js": ("docs.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_DROPPED = 4  # times the limit: of a body that is too large so much is read, as who still sends reads no answer
_READING = 4  # times the requests that may wait
_BUSY = {"Retry-After": "1"}
_NO_TELEMETRY: Any = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How the service behaves."""

    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 64  # requests; more are refused
    max_batch: int = 32  # requests computed together
    seconds: float = 5.0  # to read a body, and from then to its answer
    reload_token: str | None = None  # None: no POST /reload
    page: bool = True  # serve the page, and GET /users for it


def make_app(
    load: Callable[[], Recommender],
    settings: Settings | None = None,
    features: FeatureStore | None = None,
    failed: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The service as an ASGI application; ``app.state.live`` is what it serves.

    Args:
        load: the bundle's current version; InputError when it cannot be served. Called at the start and for a reload.
        features: the feature store.
        failed: gets what the first load raised (default: the log); the application stays not ready.
    """
    settings = settings or Settings()
    live = Live(load, features, settings.max_waiting, settings.max_batch, settings.seconds)
    app = FastAPI(
        title="lcron", version="1", summary="A trained cascade answers requests over its whole corpus.",
        lifespan=partial(_life, live, failed or partial(logger.error, "%s")), docs_url=None, redoc_url=None,
        responses={"default": {"model": ErrorAnswer}}, telemetry=_NO_TELEMETRY,
    )  # fmt: skip
    app.state.live = live
    _add_answers(app, live, settings)
    _add_operation(app, live, settings.reload_token)
    if settings.page:
        _add_page(app, live)
    _add_refusals(app, live.monitor)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Watch, monitor=live.monitor, paths=paths)
    return app


# ---- its life --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _life(live: Live, failed: Callable[[BaseException], None], _: FastAPI) -> AsyncIterator[None]:
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[Any]]()

    def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        tasks.add(task := loop.create_task(work))
        task.add_done_callback(tasks.discard)
        return task

    begin(live.batches.work())
    begin(live.reload()).add_done_callback(partial(_first_loaded, failed))
    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, lambda: begin(_hangup(live)))
    yield
    for task in tasks:
        task.cancel()


def _first_loaded(failed: Callable[[BaseException], None], task: "asyncio.Task[str]") -> None:
    if not task.cancelled() and (error := task.exception()):
        failed(error)


async def _hangup(live: Live) -> None:
    """Reload on SIGHUP. What is no InputError is a defect, which the event loop logs."""
    try:
        await live.reload()
    except InputError as error:
        logger.error("%s", _not_reloaded(live, error))


def _not_reloaded(live: Live, error: InputError) -> str:
    return f"reload: {error}; {'nothing' if live.version is None else f'version {live.version}'} is served as before"


# ---- paths -----------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, live: Live, settings: Settings) -> None:
    reading = asyncio.Semaphore(_READING * settings.max_waiting)  # so many bodies at a time

    async def read_ask(request: Request) -> Ask:
        if reading.locked():
            raise FullError
        async with reading:
            body = await read_body(request, settings.limits.body_bytes, settings.seconds)
        try:
            content = parse_json(body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        ask = checked_ask(content, settings.limits)
        request.state.requests = len(ask.requests)
        return ask

    body = {"schema": Ask.model_json_schema(), "example": EXAMPLE}
    extra = {"requestBody": {"required": True, "content": {"application/json": body}}}

    @app.post("/recommend", openapi_extra=extra, response_model=Answer, summary="Lists for one or more requests")
    async def recommend(ask: Annotated[Ask, Depends(read_ask)]) -> Response:
        write = partial(_written, await live.answer(ask), ask.columns)
        content = await asyncio.to_thread(write) if ask.explain else write()  # all candidates hold up the loop
        return Response(content, media_type="application/json")

    @app.get("/about", summary="What is served")
    async def about() -> About:
        return live.about()


def _written(computed: Computed, columns: Sequence[str]) -> bytes:
    return to_json(answer_of(*computed, columns), inf_nan_mode="null", bytes_mode="base64")


def _add_operation(app: FastAPI, live: Live, token: str | None) -> None:
    @app.get("/healthz", summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="A version of the bundle is loaded; 503 while none is")
    async def readyz() -> dict[str, str]:
        return {"status": "ready", "version": live.ready.bundle.version}

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(live.monitor.text(), media_type="text/plain; version=0.0.4")

    @app.post("/reload", summary="Serve the bundle's current version; needs the token")
    async def reload(request: Request) -> dict[str, str | None]:
        check_token(request.headers.get("Authorization", ""), token)
        previous = live.version
        try:
            return {"version": await live.reload(), "previous": previous}
        except InputError as error:
            text = _not_reloaded(live, error)
            logger.error("%s", text)
            raise HTTPException(409, text) from error


def _add_page(app: FastAPI, live: Live) -> None:
    @app.get("/users", summary="Users of the feature store")
    async def users(
        prefix: Annotated[str, Query(max_length=200, description="How their ids begin.")] = "",
        limit: Annotated[int, Query(ge=1, le=100, description="How many.")] = 20,
    ) -> Users:
        if live.features is None:
            raise HTTPException(404, "there is no feature store; lcron features fills one")
        try:
            return Users(users=await asyncio.to_thread(live.features.users, prefix, limit))
        except InputError as error:
            raise FeaturesUnavailableError(str(error)) from error

    for path, (name, kind) in FILES.items():
        file = partial(_file, (PAGE / name).read_bytes(), f"{kind}; charset=utf-8")
        app.add_api_route(path, file, include_in_schema=False, response_class=Response)


async def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body. HTTPException for another type than JSON, for more than ``most`` bytes, of which no more are kept, and
    when it takes longer than ``seconds``."""
    kind = request.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "the body is not JSON; send it with Content-Type: application/json")
    closing = {"Connection": "close"}
    too_large = HTTPException(413, f"the body is larger than {most} bytes; send fewer requests at a time", closing)
    declared, size, body = request.headers.get("Content-Length", "0"), 0, bytearray()
    if declared.isdigit() and int(declared) > _DROPPED * most:
        raise too_large
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > _DROPPED * most:
                    break
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {seconds:g} s", closing) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early", closing) from None
    if size > most:
        raise too_large
    return bytes(body)


def check_token(header: str, token: str | None) -> None:
    """HTTPException unless the header is ``Bearer`` and the token; 404 where there is none."""
    if token is None:
        raise HTTPException(404)
    kind, _, given = header.partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})


# ---- refusals --------------------------------------------------------------------------------------------------------

_STATUS_WORDS = {404: "no such path", 405: "this path takes another method"}
_REFUSALS: Mapping[type[Exception], tuple[int, str, str]] = {
    NotReadyError: (503, "not_ready", "the bundle is being loaded; try again"),
    FullError: (503, "full", "too many requests are waiting; try again"),
    TimeoutError: (504, "timeout", "there was no answer in time; try again"),
    FeaturesUnavailableError: (503, "features", "the feature store does not answer; try again"),
}  # exception -> status, reason in the metrics, sentence


def _add_refusals(app: FastAPI, monitor: Monitor) -> None:
    """One sentence for whatever goes wrong; what is no mistake of the client and no lack of room is Watch's."""

    async def refuse(request: Request, error: Exception) -> Response:
        kind = next(kind for kind in type(error).__mro__ if kind in _REFUSALS)
        status, reason, text = _REFUSALS[kind]
        monitor.errors.labels(reason).inc()
        if kind is FeaturesUnavailableError:
            logger.error("request %s: %s", request.state.id, error)
        return refusal(request, status, text, _BUSY)

    for kind in _REFUSALS:
        app.add_exception_handler(kind, refuse)

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> Response:
        monitor.errors.labels("input").inc()
        return refusal(request, 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def parameters(request: Request, error: RequestValidationError) -> Response:
        monitor.errors.labels("input").inc()
        return refusal(request, 422, sentence(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def status(request: Request, error: HTTPException) -> Response:
        if error.status_code in (400, 408, 413, 415):
            monitor.errors.labels("input").inc()
        own = error.detail[:1].islower()  # the framework's begin with a capital letter
        text = error.detail if own else _STATUS_WORDS.get(error.status_code, error.detail)
        return refusal(request, error.status_code, text, error.headers)
