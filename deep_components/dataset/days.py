"""Which days train and which day tests (spec section 5)."""

import logging
from collections.abc import Sequence

from deep_components.dataset.log import Log
from deep_components.errors import InputError

logger = logging.getLogger(__name__)


def training_days(log: Log, wanted: Sequence[str] | None) -> list[str]:
    """The days to train on: ``wanted``, or the days of the published protocol but the last where all of them are there,
    or all days but the log's last ``test_days``. InputError for a day that is not there or is named twice, or when
    no day is left; a warning for wanted days that are not in the order of time."""
    days = log.days(named=wanted is not None)
    if wanted is not None:
        missing = [day for day in wanted if day not in days]
        if missing or not wanted:
            raise InputError(f"--train_days={','.join(wanted)}: {log.folder} has only {', '.join(days)}")
        if repeated := sorted({day for day in wanted if wanted.count(day) > 1}):
            raise InputError(f"--train_days: names {', '.join(repeated)} more than once; name each day once")
        if list(wanted) != sorted(wanted):
            logger.warning("--train_days=%s: not in the order of time; they train as they are named", ",".join(wanted))
        return list(wanted)
    protocol = _protocol(log, days)
    if len(protocol) <= log.test_days:
        tested = (
            f"the one day {days[0]}, which is the test day" if len(days) == 1 else f"{len(days)} days, all for tests"
        )
        raise InputError(f"{log.folder}: has {tested}; add days or give --train_days")
    return protocol[: -log.test_days]


def hold_out_last(log: Log, days: Sequence[str], option: str) -> tuple[list[str], str]:
    """The training days but the last, and the last, the validation day. InputError, which names the ``option`` that
    asked for it, when no day is left to train on."""
    if len(days) < 2:
        raise InputError(f"{log.folder}: {option} wants two training days or more, and there is only {days[0]}")
    return list(days[:-1]), days[-1]


def test_day(log: Log, wanted: str | None) -> str:
    """The day to evaluate on: ``wanted``, or the last of the published protocol where all of its days are there, or the
    last day."""
    days = log.days(named=wanted is not None)
    if wanted is not None and wanted not in days:
        raise InputError(f"--test_day={wanted}: {log.folder} has only {', '.join(days)}")
    return wanted or _protocol(log, days)[-1]


def missing_days(log: Log) -> list[str]:
    """Days of the published protocol that the log lacks; none where it has none of them, or says what else made it."""
    days = log.days(named=True)
    absent = [day for day in log.protocol_days if day not in days]
    return absent if log.origin == "unlabelled" and len(absent) < len(log.protocol_days) else []


def _protocol(log: Log, days: list[str]) -> list[str]:
    """The published protocol's days where the log has all of them, else the log's."""
    return list(log.protocol_days) if log.protocol_days and set(log.protocol_days) <= set(days) else days
