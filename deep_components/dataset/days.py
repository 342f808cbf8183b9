"""Which days train and which day tests (spec section 5)."""

from collections.abc import Sequence

from deep_components.dataset.log import Log
from deep_components.errors import InputError


def training_days(log: Log, wanted: Sequence[str] | None) -> list[str]:
    """The days to train on: ``wanted``, or the days of the published protocol but the last where all of them are there,
    or all days but the log's last ``test_days``. InputError for a day that is not there, or when no day is left."""
    days = log.days(named=wanted is not None)
    if wanted is not None:
        missing = [day for day in wanted if day not in days]
        if missing or not wanted:
            raise InputError(f"--train_days={','.join(wanted)}: {log.folder} has only {', '.join(days)}")
        return list(wanted)
    protocol = _protocol(log, days)
    if len(protocol) <= log.test_days:
        tested = (
            f"the one day {days[0]}, which is the test day" if len(days) == 1 else f"{len(days)} days, all for tests"
        )
        raise InputError(f"{log.folder}: has {tested}; add days or give --train_days")
    return protocol[: -log.test_days]


def test_day(log: Log, wanted: str | None) -> str:
    """The day to evaluate on: ``wanted``, or the last of the published protocol where all of its days are there, or the
    last day."""
    days = log.days(named=wanted is not None)
    if wanted is not None and wanted not in days:
        raise InputError(f"--test_day={wanted}: {log.folder} has only {', '.join(days)}")
    return wanted or _protocol(log, days)[-1]


def _protocol(log: Log, days: list[str]) -> list[str]:
    """The published protocol's days where the log has all of them, else the log's."""
    return list(log.protocol_days) if log.protocol_days and set(log.protocol_days) <= set(days) else days
