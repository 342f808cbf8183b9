"""Wall-clock fields of timestamps in the log's own time zone, never the machine's."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from deep_components.errors import InputError

DEFAULT_TIME_ZONE = "Asia/Shanghai"  # RecFlow's
_QUARTER_HOUR = 900  # nearly all changes of an offset lie at multiples of it
MIN_SECONDS, MAX_SECONDS = -2_208_988_800, 7_258_118_400  # 1900-01-01 .. 2200-01-01 UTC
MIN_REQUEST_SECONDS = 631_152_000  # 1990-01-01: seconds taken for milliseconds give a day in January 1970


def time_zone(name: str) -> ZoneInfo:
    """The zone called ``name``; InputError when there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError, ValueError) as error:  # OSError: a folder of zones, such as Asia
        raise InputError(f"--time_zone={name}: unknown time zone; use a name such as Asia/Shanghai") from error


def is_date(day: str) -> bool:
    """Whether ``day`` is a date such as 2024-01-13."""
    try:
        return date.fromisoformat(day).isoformat() == day
    except ValueError:
        return False


def wall_clock(seconds: np.ndarray, zone: ZoneInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoded weekday 1..7 (Monday = 1), hour 1..24 and minute 1..60 of Unix times.

    Args:
        seconds: int64, any shape; times before 1970 are negative and encode by floor arithmetic.

    Returns:
        three uint8 arrays of the shape of ``seconds``.

    Raises:
        ValueError: a time outside 1900 .. 2200 (milliseconds given as seconds, most often).
    """
    if seconds.size and (seconds.min() < MIN_SECONDS or seconds.max() >= MAX_SECONDS):
        raise ValueError("a time outside the years 1900 to 2200; is it in the unit that data/README.md names?")
    local = local_seconds(seconds, zone)
    weekday = (local // 86_400 + 3) % 7 + 1  # 1970-01-01 was a Thursday
    hour = local // 3_600 % 24 + 1
    minute = local // 60 % 60 + 1
    return weekday.astype(np.uint8), hour.astype(np.uint8), minute.astype(np.uint8)


def local_seconds(seconds: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    """What the zone's clocks show at Unix times (int64, any shape, 1900 .. 2200), as seconds since their 1970."""
    return seconds + _by_quarter_hour(seconds, lambda some: _utc_offsets(some, zone))


def utc_seconds(local: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    """The reverse: of a time that clocks show twice the first, of one they skip that of the clock before."""
    return local - _by_quarter_hour(local, lambda some: _local_offsets(some, zone))


def _by_quarter_hour(seconds: np.ndarray, look_up: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """look_up(seconds), which costs some microseconds each, called on few."""
    buckets, inverse = np.unique(seconds // _QUARTER_HOUR, return_inverse=True)
    first, last = (look_up(buckets * _QUARTER_HOUR + second) for second in (0, _QUARTER_HOUR - 1))
    offsets = first[inverse].reshape(seconds.shape)
    changing = (first != last)[inverse].reshape(seconds.shape)  # within the quarter: look these up one by one
    offsets[changing] = look_up(seconds[changing])
    return offsets


def _local_offsets(seconds: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    offsets = (datetime.fromtimestamp(time, UTC).replace(tzinfo=zone).utcoffset() for time in seconds.tolist())
    return np.array([offset.total_seconds() for offset in offsets if offset is not None], np.int64)


def _utc_offsets(seconds: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    offsets = (datetime.fromtimestamp(time, UTC).astimezone(zone).utcoffset() for time in seconds.tolist())
    return np.array([offset.total_seconds() for offset in offsets if offset is not None], np.int64)
