"""Where the days of a log that must be encoded first are kept: each is built once, and used by every later process.

``cache_dir/<cascade>/<day>-<log>-<key>/`` is a day as ``columnar`` writes it. The key is a digest of all that the
content depends on, so a stale day is never opened; a damaged one is built anew.

Processes share caches: each holds a lock of the day, shared while it opens, exclusive while it builds or removes. So a
second process waits for the first one's day, and a temporary folder whose day can be locked is one that a killed
process has left.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError
from deep_components.files import locked

logger = logging.getLogger(__name__)


def default_cache_dir(data_dir: Path) -> Path:
    """``data_dir/cache``; for a folder marked read-only, a folder of its own under the user's cache directory.

    InputError when the user has none."""
    writable = os.access(data_dir, os.W_OK) and data_dir.stat().st_mode & 0o222
    if writable:
        return data_dir / "cache"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and the user is in no list of users
        raise InputError(f"{data_dir}: is read-only, and there is no HOME; name a folder with --cache_dir") from None
    return home / "lcron" / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]


def cached_day(
    parent: Path,
    day_and_log: str,
    identity: Mapping[str, Any],
    read: Callable[[Path], DayCache],
    build: Callable[[Path], None],
) -> DayCache:
    """The day that ``identity``, all that its content depends on, describes: built when there is none or it is damaged.

    ``parent`` is where the cascade's days lie; others of the same ``day_and_log`` are removed when one is built.
    ``read`` opens the day in a folder, with an InputError when it is damaged; ``build`` writes it to a new folder.

    Raises InputError when the day cannot be built, or the cache cannot be written.
    """
    folder = day_folder(parent, day_and_log, identity)
    with locked(_lock_path(parent, day_and_log), shared=True):
        if folder.exists():
            try:
                return read(folder)
            except InputError:
                pass  # said below, once nobody else uses the folder
    try:
        with locked(_lock_path(parent, day_and_log)):
            day = None  # unless another process has built it meanwhile
            try:
                day = read(folder) if folder.exists() else None
            except InputError as damage:
                logger.warning("%s: the cache is damaged and is built anew (%s)", folder, damage)
                shutil.rmtree(folder)
            if day is None:
                build(folder)
                for stale in parent.glob(f"{day_and_log}-*"):
                    if stale != folder:
                        shutil.rmtree(stale)
                day = read(folder)
        _remove_leftovers(parent)
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); name another folder with --cache_dir"
        ) from error
    return day


def day_folder(parent: Path, day_and_log: str, identity: Mapping[str, Any]) -> Path:
    """Where the day lies, or will lie once it is built; arguments as of :func:`cached_day`."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return parent / f"{day_and_log}-{key}"


def _lock_path(parent: Path, day_and_log: str) -> Path:
    return parent.parent / ".locks" / f"{parent.name}-{day_and_log}"


def _remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed: of those at work, the day is locked."""
    for leftover in parent.glob(".*.tmp"):
        day_and_log = leftover.name[1:].partition(".")[0].rpartition("-")[0]
        with locked(_lock_path(parent, day_and_log), wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
