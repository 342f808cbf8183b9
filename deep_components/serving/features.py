"""The feature store: what is known of a user between requests, the fields of the latest one and the history.

:class:`SqliteFeatures` is a file for the servers of one machine, :class:`RedisFeatures` a Redis that servers share.

A user's record is a text of lines: the request's fields as a JSON object, then a line of JSON for every event, oldest
first. So an event is appended, and the oldest are dropped, without parsing what is there. Users are known by a key: "i"
and the digits of a whole number, or "s" and the UTF-8 of a text.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np

from deep_components.errors import InputError
from deep_components.files import make_folder, regular

User = int | str
Record = dict[str, Any]  # raw fields of a request, and "history": its events

FEATURES_FILE = "features.sqlite"  # the default, in a bundle's folder
HISTORY = "history"
_MAX_KEY = 512  # bytes
_SECONDS_TO_WAIT = 5  # for a file that another process writes
_REDIS_SECONDS = 2  # for a connection, and for an answer
_REDIS_SCHEMES = ("redis", "rediss")
_APPLICATION, _VERSION = 0x4C43524E, 1  # in the file's header: "LCRN"
_TABLE = "CREATE TABLE records (user BLOB PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID"
_ROWS_PER_QUERY = 500


class FeaturesUnavailableError(InputError):
    """The store does not answer; it may later. The message never has a password."""


class FeatureStore(Protocol):
    """Records by user. May be used by several threads, and the records by several processes at once. ``name`` says
    which store it is, without a password.

    InputError for a user that is no whole number of 64 bits and no text of up to 511 bytes, and for what cannot be
    stored; FeaturesUnavailableError where the store does not answer.
    """

    name: str

    def get(self, users: Sequence[User | None]) -> list[Record | None]:
        """The record of each user, which always has "history"; None where there is none."""

    def put(self, records: Mapping[User, Mapping[str, Any]]) -> None:
        """Replace the records of these users, all of them or none."""

    def append(self, user: User, events: Sequence[Any], keep: int) -> None:
        """Add events to the end of a user's history and keep the latest ``keep`` of it; atomic. Makes a record where
        there is none."""

    def users(self, prefix: str = "", limit: int = 20) -> list[User]:
        """Users whose number or text begins so, whole numbers first, in the order of their digits and letters."""

    def close(self) -> None:
        """Nothing else may be called afterwards."""


def open_features(where: Path | str, create: bool = False) -> FeatureStore:
    """The store at ``redis://[user:password@]host[:port][/db][?prefix=NAME]`` (``rediss://``: with TLS) or in a file.

    A URL without a password takes that of LCRON_REDIS_PASSWORD. ``create``: make the file where there is none.
    InputError when it cannot be opened or is no such store; FeaturesUnavailableError when a server does not answer.
    """
    scheme, separator, _ = str(where).partition("://")
    if scheme in _REDIS_SCHEMES and separator:
        return RedisFeatures(str(where))
    if separator and not isinstance(where, Path):
        raise InputError(f"--features={scheme}://...: no such kind of store; give redis://host:port/db or a file")
    return SqliteFeatures(Path(where), create)


def merged(request: Mapping[str, Any], stored: Mapping[str, Any] | None, events: Iterable[str] = ()) -> Record:
    """The request with what the store knows of its user; the request's own fields win, its history too, also where it
    has that in lists of its own, the columns ``events``."""
    known = dict(stored or {})
    if any(request.get(column) is not None for column in events):
        known.pop(HISTORY, None)
    return {**known, **request}


# ---- records ---------------------------------------------------------------------------------------------------------


def _key(user: User) -> bytes:
    if isinstance(user, np.integer):
        user = int(user)
    if type(user) is int and user.bit_length() < 64:
        return b"i%d" % user
    if isinstance(user, str) and len(key := b"s" + _utf8(user)) <= _MAX_KEY:
        return key
    shown = str(user)[:40] if isinstance(user, str) else type(user).__name__
    raise InputError(
        f"user {shown!r}: a user is a whole number of 64 bits or a text of up to {_MAX_KEY - 1} bytes; give its raw id"
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"user {text[:40]!a}: not text that UTF-8 can hold; give its raw id") from error


def _user(key: bytes) -> User:
    return int(key[1:]) if key[:1] == b"i" else key[1:].decode()


def _ranges(prefix: str) -> list[tuple[bytes, bytes]]:
    """First and last key, the last not included, of whole numbers and of texts; UTF-8 has no byte 0xff."""
    return [(tag + _utf8(prefix), tag + _utf8(prefix) + b"\xff") for tag in (b"i", b"s")]


def _json(user: User, value: Any) -> str:
    """One line. InputError for what JSON cannot hold."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"user {user!r}: cannot be stored ({error}); give texts, finite numbers and lists") from error


def _plain(value: Any) -> Any:
    """What JSON has for a value of Arrow or NumPy; times as ISO texts, which an encoding reads."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _events(user: User, events: Any) -> list[str]:
    if not isinstance(events, Sequence) or isinstance(events, str | bytes):
        raise InputError(f"user {user!r}: the history is no list of events; give the latest event last")
    return [_json(user, event) for event in events]


def _text(user: User, record: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in record.items() if name != HISTORY}
    return "\n".join([_json(user, fields), *_events(user, record.get(HISTORY) or [])])


def _record(store: str, user: User | None, text: str | bytes) -> Record:
    """The reverse of :func:`_text`. InputError, which begins with ``store``, for what is none."""
    try:
        fields, *events = (json.loads(line) for line in text.splitlines())
        return {**fields, HISTORY: events}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{store}: the record of user {user!r} is damaged; fill it again with lcron features"
        ) from error


def _check_keep(keep: int) -> None:
    if keep < 1:
        raise InputError(f"keep is {keep}; a history keeps 1 event or more")


# ---- SQLite ----------------------------------------------------------------------------------------------------------


class SqliteFeatures:
    """A :class:`FeatureStore` in a file. A connection a thread, so that a thread that waits to write holds up no other.

    A file in a folder that is marked read-only can be read."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path, self.name = path, str(path)
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        if create and not path.exists():
            make_folder(path.parent)
        elif not path.exists():
            raise InputError(f"{path}: no such file; lcron features fills one, or name another with --features")
        self._read_only = path.exists() and not (_writable(path) and _writable(path.parent))
        self._check_files()
        try:
            with self._sentences():
                _prepare(self._connection("rwc" if create else "rw"), path, create, self._read_only)
        except InputError:
            self.close()
            raise

    def get(self, users: Sequence[User | None]) -> list[Record | None]:
        keys = [None if user is None else _key(user) for user in users]
        found: dict[bytes, str] = {}
        with self._sentences():
            for some in _chunks(sorted({key for key in keys if key is not None}), _ROWS_PER_QUERY):
                marks = ",".join("?" * len(some))
                found |= self._connection().execute(f"SELECT user, record FROM records WHERE user IN ({marks})", some)
        return [
            _record(self.name, user, found[key]) if key is not None and key in found else None
            for user, key in zip(users, keys, strict=True)
        ]

    def put(self, records: Mapping[User, Mapping[str, Any]]) -> None:
        rows = [(_key(user), _text(user, record)) for user, record in records.items()]
        with self._writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", rows)

    def append(self, user: User, events: Sequence[Any], keep: int) -> None:
        _check_keep(keep)
        key, lines = _key(user), _events(user, events)
        with self._writing() as connection:
            row = connection.execute("SELECT record FROM records WHERE user = ?", (key,)).fetchone()
            fields, *before = row[0].split("\n") if row else ["{}"]
            record = "\n".join([fields, *[*before, *lines][-keep:]])
            connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (key, record))

    def users(self, prefix: str = "", limit: int = 20) -> list[User]:
        found: list[User] = []
        query = "SELECT user FROM records WHERE user >= ? AND user < ? ORDER BY user LIMIT ?"
        with self._sentences():
            for first, stop in _ranges(prefix):
                rows = self._connection().execute(query, (first, stop, max(limit - len(found), 0)))
                found += [_user(key) for (key,) in rows]
        return found

    def close(self) -> None:
        for (process, _), connection in self._connections.items():
            if process == os.getpid():  # a child must not touch those of its parent
                connection.close()
        self._connections.clear()

    def _check_files(self) -> None:
        """InputError unless the file can be opened as the store needs it."""
        log = self.path.with_name(f"{self.path.name}-wal")
        if self._read_only and log.exists() and log.stat().st_size:
            raise InputError(f"{log}: has changes that are only read where the folder can be written; copy the folder")
        try:
            if self.path.exists():
                os.close(regular(str(self.path), os.O_RDONLY))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); name another with --features") from error

    def _connection(self, mode: str = "rw") -> sqlite3.Connection:
        """This thread's."""
        own = (os.getpid(), threading.get_ident())
        if own not in self._connections:
            mode = "ro&immutable=1" if self._read_only else mode
            uri = f"file:{quote(str(self.path.absolute()))}?mode={mode}"
            connection = sqlite3.connect(
                uri, uri=True, timeout=_SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False
            )
            self._connections[own] = connection
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: what was written survives a killed process
        return self._connections[own]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._sentences(), self._connection() as connection:  # commits, or takes back
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _sentence(self.path, error) from error


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and bool(path.stat().st_mode & 0o222)


def _chunks(values: list[bytes], size: int) -> Iterable[list[bytes]]:
    return (values[first : first + size] for first in range(0, len(values), size))


def _prepare(connection: sqlite3.Connection, path: Path, create: bool, read_only: bool) -> None:
    """Make the table in a new file; InputError for a file that holds anything else than this table, which could make
    queries do other things than they say."""
    if create and not _tables(connection):
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))  # another process may be first
    marks = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if marks[0] == _APPLICATION and marks[1] > _VERSION:
        raise InputError(f"{path}: version {marks[1]} of the format; this program knows {_VERSION}: use a later one")
    if marks != [_APPLICATION, _VERSION] or _tables(connection) != [(_TABLE,)]:
        raise InputError(f"{path}: not a feature store; name another file with --features")
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")


def _tables(connection: sqlite3.Connection) -> list[tuple[str]]:
    return connection.execute("SELECT sql FROM sqlite_master").fetchall()


def _sentence(path: Path, error: sqlite3.Error) -> InputError:
    name = getattr(error, "sqlite_errorname", "")  # none in errors of the module itself
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return FeaturesUnavailableError(f"{path}: another process has been writing for {_SECONDS_TO_WAIT} s; try again")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_PERM")):
        return InputError(f"{path}: cannot be written ({error}); free the space, or name another file with --features")
    return InputError(f"{path}: not a feature store, or damaged ({error}); fill a new one with lcron features")


# ---- Redis -----------------------------------------------------------------------------------------------------------

# Lines are added to a record, and the oldest events dropped, without parsing them.
_APPEND = """
local lines = {}
for line in string.gmatch(redis.call('GET', KEYS[1]) or '{}', '[^\\n]+') do lines[#lines + 1] = line end
for i = 3, #ARGV do lines[#lines + 1] = ARGV[i] end
local record = {lines[1]}
for i = math.max(2, #lines - tonumber(ARGV[1]) + 1), #lines do record[#record + 1] = lines[i] end
redis.call('SET', KEYS[1], table.concat(record, '\\n'))
redis.call('ZADD', KEYS[2], 0, ARGV[2])
"""


class RedisFeatures:
    """A :class:`FeatureStore` in a Redis 5 or later: a key a user, and a sorted set of all users.

    Each method is one round trip. Nothing is tried twice: an append whose answer was lost may have taken place."""

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise InputError(
                "--features=redis://...: the package redis is missing; pip install -r requirements-serve.txt"
            ) from error
        at = _redis_address(url)
        self._errors: Any = redis.exceptions
        self.name = at.name
        self._prefix = f"{at.prefix}:v{_VERSION}:".encode()
        self._client: Any = redis.Redis(
            host=at.host, port=at.port, db=at.db, username=at.username, password=at.password, ssl=at.tls,
            socket_connect_timeout=_REDIS_SECONDS, socket_timeout=_REDIS_SECONDS, retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
        self._append = self._client.register_script(_APPEND)
        try:
            with self._sentences():
                self._client.ping()
        except InputError:
            self.close()
            raise

    def get(self, users: Sequence[User | None]) -> list[Record | None]:
        keys = [self._at(b"" if user is None else _key(user)) for user in users]  # nothing is ever kept under ""
        with self._sentences():
            found = self._client.mget(keys) if keys else []
        return [
            None if text is None else _record(self.name, user, text) for user, text in zip(users, found, strict=True)
        ]

    def put(self, records: Mapping[User, Mapping[str, Any]]) -> None:
        texts = {_key(user): _text(user, record) for user, record in records.items()}
        if not texts:
            return
        with self._sentences(), self._client.pipeline(transaction=True) as pipeline:
            pipeline.mset({self._at(key): text for key, text in texts.items()})
            pipeline.zadd(self._index, dict.fromkeys(texts, 0))
            pipeline.execute()

    def append(self, user: User, events: Sequence[Any], keep: int) -> None:
        _check_keep(keep)
        key, lines = _key(user), _events(user, events)
        with self._sentences():
            self._append(keys=[self._at(key), self._index], args=[keep, key, *lines[-keep:]])

    def users(self, prefix: str = "", limit: int = 20) -> list[User]:
        found: list[User] = []
        with self._sentences(), self._client.pipeline(transaction=False) as pipeline:
            for first, stop in _ranges(prefix):
                pipeline.zrangebylex(self._index, b"[" + first, b"(" + stop, 0, max(limit, 0))
            for keys in pipeline.execute():
                found += map(_user, keys)
        return found[: max(limit, 0)]

    def close(self) -> None:
        self._client.close()

    @property
    def _index(self) -> bytes:
        return self._prefix + b"users"

    def _at(self, key: bytes) -> bytes:
        return self._prefix + b"user:" + key

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """What a server says is not repeated but for its first word: it may hold what it was sent, the password."""
        try:
            yield
        except (self._errors.AuthenticationError, self._errors.NoPermissionError):
            raise InputError(
                f"{self.name}: refuses the user or password; give them in the URL, or in LCRON_REDIS_PASSWORD"
            ) from None
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            kind = type(error).__name__
            raise FeaturesUnavailableError(f"{self.name}: does not answer ({kind}); is the server up?") from None
        except self._errors.RedisError as error:
            word = str(error).split(" ", 1)[0]
            code = word if word.isupper() and word.isalpha() else type(error).__name__
            raise FeaturesUnavailableError(f"{self.name}: the Redis refuses ({code}); look at its log") from None


class _RedisAddress(NamedTuple):
    name: str  # for messages
    host: str
    port: int
    db: int
    username: str | None
    password: str | None
    tls: bool
    prefix: str


def _redis_address(url: str) -> _RedisAddress:
    """InputError, without the URL, which may have a password, when it is none."""
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, strict_parsing=bool(parts.query))
        host, port, db = parts.hostname or "localhost", parts.port or 6379, int(parts.path.strip("/") or 0)
        if parts.fragment or db < 0 or set(options) - {"prefix"}:
            raise ValueError
    except ValueError:
        raise InputError(
            "--features=redis://...: not redis://[user:password@]host[:port][/number][?prefix=NAME]; write @ : / ? # "
            "in a password as %40 %3A %2F %3F %23"
        ) from None
    password = unquote(parts.password) if parts.password else os.environ.get("LCRON_REDIS_PASSWORD")
    username = unquote(parts.username) if parts.username else None
    prefix = options.get("prefix", ["lcron"])[0]
    name = f"{parts.scheme}://{host}:{port}/{db}"
    return _RedisAddress(name, host, port, db, username, password, parts.scheme == "rediss", prefix)
