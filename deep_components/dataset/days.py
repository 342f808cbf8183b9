"""Which days train and which day tests (spec section 5)."""

from collections.abc import Sequence
from pathlib import Path

from deep_components.dataset.importers.recflow_files import PERIOD_1, available_days
from deep_components.errors import InputError


def training_days(data_dir: Path, wanted: Sequence[str] | None) -> list[str]:
    """The days to train on: ``wanted``, or Period 1 but its last day where all of it is there, or all days but the
    last. InputError for a day that is not there, or when no day is left."""
    days = available_days(data_dir, named=wanted is not None)
    if wanted is not None:
        missing = [day for day in wanted if day not in days]
        if missing or not wanted:
            raise InputError(f"--train_days={','.join(wanted)}: {data_dir} has only {', '.join(days)}")
        return list(wanted)
    if set(PERIOD_1) <= set(days):
        return list(PERIOD_1[:-1])
    if len(days) < 2:
        raise InputError(f"{data_dir}: has the one day {days[0]}, which is the test day; add days or give --train_days")
    return days[:-1]


def test_day(data_dir: Path, wanted: str | None) -> str:
    """The day to evaluate on: ``wanted``, or the last of Period 1 where all of it is there, or the last day."""
    days = available_days(data_dir, named=wanted is not None)
    if wanted is not None:
        if wanted not in days:
            raise InputError(f"--test_day={wanted}: {data_dir} has only {', '.join(days)}")
        return wanted
    return PERIOD_1[-1] if set(PERIOD_1) <= set(days) else days[-1]
