"""What goes over HTTP: the body of POST /recommend, its limits, and the answers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from deep_components.cli import printable
from deep_components.errors import InputError

_LEVELS = 4  # a request's field may be a list of events, whose fields may be lists
_WORDS = {  # pydantic's kind of error -> what to say
    "missing": "is missing",
    "extra_forbidden": "is no such field; the body takes requests, k, filter_seen, return_scores, explain, columns",
    "bool_type": "is not true or false",
    "int_type": "is not a whole number",
    "list_type": "is not a list",
    "dict_type": "is not an object of raw columns",
    "string_type": "is not a text",
    "too_short": "is empty",
}


@dataclass(frozen=True)
class Limits:
    """What a body may hold at the most."""

    body_bytes: int = 1 << 20
    requests: int = 64  # in one body
    history: int = 1000  # events of a history, values of any list
    k: int = 1000
    text: int = 1024  # letters of a text or a name
    columns: int = 32


class Options(NamedTuple):
    """What the requests of one batch have in common: the arguments of ``recommend``."""

    k: int
    filter_seen: bool
    return_scores: bool
    explain: bool


class Ask(BaseModel):
    """The body of POST /recommend."""

    model_config = ConfigDict(extra="forbid", strict=True, title="Requests")

    requests: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="One object a request: raw columns of the log, and history, a list of events, the latest last. "
        "An event is an object of raw columns, or an item's raw id. What is missing comes from the feature store."
    )
    k: int = Field(20, ge=1, description="Items to return; at most as many as the last stage keeps.")
    filter_seen: bool = Field(True, description="Leave out the items of the history.")
    return_scores: bool = Field(True, description="Return the last stage's scores.")
    explain: bool = Field(False, description="Return every candidate, where it fell out, its scores and ranks.")
    columns: list[str] = Field([], description="Columns of the corpus to return for each item, such as its title.")

    @property
    def options(self) -> Options:
        return Options(self.k, self.filter_seen, self.return_scores, self.explain)


EXAMPLE = {
    "requests": [{"user_id": 7, "history": [1021, 877, {"video_id": 31}]}],
    "k": 10,
    "explain": False,
    "columns": ["title"],
}  # fmt: skip


class CandidateAnswer(BaseModel):
    """An item that the first stage kept, and its way through the cascade."""

    item: Any = Field(description="Its raw id.")
    left_at: str | None = Field(description="The stage that dropped it; null: none did.")
    scores: dict[str, float] = Field(description="Of the stages that it reached.")
    ranks: dict[str, int] = Field(description="Among what reached the stage; 1 is the best.")
    columns: dict[str, Any] = Field({}, description="The columns that were asked for.")


class ListAnswer(BaseModel):
    """The list for one request, best first. It has fewer than k items where fewer are left."""

    items: list[Any] = Field(description="Raw ids.")
    scores: list[float] | None = Field(None, description="The last stage's.")
    columns: dict[str, list[Any]] = Field({}, description="Column that was asked for: its value for each item.")
    candidates: list[CandidateAnswer] | None = Field(None, description="With explain: what the first stage kept.")


class Answer(BaseModel):
    """One list a request, in the order of the requests."""

    version: str = Field(description="Of the bundle that made all lists.")
    results: list[ListAnswer] = Field(description="A list a request, in their order.")


class ErrorAnswer(BaseModel):
    """One sentence, and the id under which the server's log has the request."""

    error: str
    request_id: str


class Stage(BaseModel):
    """A stage of the cascade: it keeps its best ``keep`` items."""

    name: str
    keep: int
    model: str


class About(BaseModel):
    """What is served."""

    version: str
    created: str = Field(description="When the version was made.")
    items: int = Field(description="Of the corpus.")
    stages: list[Stage] = Field(description="In serving order.")
    item: str = Field(description="The raw column that names an item.")
    user: str = Field(description="The raw column that names a user; empty where there is none.")
    user_is_number: bool = Field(description="Whether that column holds whole numbers.")
    columns: list[str] = Field(description="Of the corpus.")
    request_columns: list[str] = Field(description="Raw columns that a request may have.")
    history_columns: list[str] = Field(description="Raw columns that an event of a history may have.")
    features: bool = Field(description="Whether there is a feature store.")


class Users(BaseModel):
    """Users of the feature store."""

    users: list[int | str]


def parse_json(body: bytes) -> Any:
    """The body's JSON; ValueError where it is none, or deeper than 200 levels."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from None


def checked_ask(content: Any, limits: Limits) -> Ask:
    """InputError, a sentence with the request's number (the first is 0) and the field, for what is no :class:`Ask`, or
    beyond the limits."""
    try:
        ask = Ask.model_validate(content)
    except ValidationError as error:
        raise InputError(sentence(error.errors(include_url=False, include_input=False)[0])) from None
    for problem in _problems(ask, limits):
        raise InputError(problem)
    return ask


def sentence(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words."""
    where = [part for part in error["loc"] if part not in ("body", "query")]
    words = _WORDS.get(error["type"]) or error["msg"][:1].lower() + error["msg"][1:]
    if not where:
        return 'the body is not an object such as {"requests": [{}]}'
    name, numbers = shown(str(where[0]))[1:-1], "".join(f"[{part}]" for part in where[1:2])
    return f"{name}{numbers}: {words}"


def shown(name: str) -> str:
    """A name that a client sent, for a message."""
    return repr(printable(name if len(name) <= 60 else f"{name[:57]}..."))


def _problems(ask: Ask, limits: Limits) -> Iterator[str]:
    """What is beyond the limits, a sentence each."""
    if len(ask.requests) > limits.requests:
        yield f"requests: there are {len(ask.requests)}, and a body has at most {limits.requests}; send several bodies"
    if ask.k > limits.k:
        yield f"k: {ask.k} is more than the {limits.k} that may be asked for"
    if len(ask.columns) > limits.columns:
        yield f"columns: there are {len(ask.columns)}, and at most {limits.columns} may be asked for"
    for number, request in enumerate(ask.requests):
        for name, value in request.items():
            for problem in _value_problems(name, value, limits, _LEVELS):
                yield f"requests[{number}]: {shown(name)}: {problem}"


def _value_problems(name: str, value: Any, limits: Limits, levels: int) -> Iterator[str]:
    if len(name) > limits.text:
        yield f"its name has more than {limits.text} letters"
    elif isinstance(value, str):
        if len(value) > limits.text:
            yield f"a text of {len(value)} letters; at most {limits.text} are taken"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield "a number is too large"
    elif isinstance(value, int):
        if value.bit_length() > 63:
            yield "a whole number has more than 64 bits"
    elif isinstance(value, dict | list):
        if len(value) > limits.history:
            yield f"{len(value)} values; at most {limits.history} are taken, so send the latest"
        elif not levels:
            yield "is nested too deep"
        else:
            parts = value.items() if isinstance(value, dict) else ((name, part) for part in value)
            for inner, part in parts:
                yield from _value_problems(inner, part, limits, levels - 1)
