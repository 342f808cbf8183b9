"""Plans: the methods of a command line, the days of each protocol."""

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.experiments.plan import Method, Part, methods_of, schedule
from tests.helpers import DAYS


def test_methods_of_a_command_line() -> None:
    argv = ["--method=lcron", "--loss_type=lcron", "--tau", "50", "--method=bce", "--loss_type=bce"]
    assert methods_of(argv) == [
        Method("lcron", ("--loss_type=lcron", "--tau", "50")), Method("bce", ("--loss_type=bce",))
    ]  # fmt: skip


def test_the_main_protocol(log: Path) -> None:
    assert schedule(open_log(log), None, None) == (Part(DAYS[:2], DAYS[2]),)
    assert schedule(open_log(log), [DAYS[1]], DAYS[0]) == (Part((DAYS[1],), DAYS[0]),)


def test_the_validation_day_is_the_last_training_day(log: Path) -> None:
    assert schedule(open_log(log), None, None, validation=True) == (Part(DAYS[:1], DAYS[1]),)
    with pytest.raises(InputError, match="--validation tests on the last training day"):
        schedule(open_log(log), None, DAYS[2], validation=True)
    with pytest.raises(InputError, match=f"--train_days names {DAYS[2]}, the day of the tests"):
        schedule(open_log(log), DAYS, None, validation=True)
    with pytest.raises(InputError, match="two training days or more"):
        schedule(open_log(log), [DAYS[0]], None, validation=True)


def test_validation_on_recflow() -> None:
    """Train .. 2024-02-02, validate 2024-02-03: the protocol's days, where the log has more."""
    days = [str(datetime.date(2024, 1, 13) + datetime.timedelta(offset)) for offset in range(37)]
    log: Any = SimpleNamespace(folder=Path("log"), days=lambda named: days, protocol_days=tuple(days[:23]), test_days=1)
    (part,) = schedule(log, None, None, validation=True)
    assert (part.train_days[0], part.train_days[-1], part.test_day) == ("2024-01-13", "2024-02-02", "2024-02-03")
    assert len(schedule(log, None, None, streaming=True)) == 22


def test_a_stream_goes_through_all_test_days() -> None:
    """Of a log that holds back its last three: nothing was learnt from them, but the stream trains on them."""
    days = [f"2026-02-0{day}" for day in range(1, 6)]
    log: Any = SimpleNamespace(folder=Path("log"), days=lambda named: days, protocol_days=(), test_days=3)
    assert schedule(log, None, None) == (Part(tuple(days[:2]), days[4]),)
    assert schedule(log, None, None, streaming=True) == tuple(Part(tuple(days[:n]), days[n]) for n in range(1, 5))
    assert schedule(log, days[:1], days[4], streaming=True) == (Part((days[0],), days[4]),)
    assert schedule(log, None, None, validation=True, streaming=True) == (Part((days[0],), days[1]),)


def test_a_stream_tests_every_day_from_the_second(log: Path) -> None:
    assert schedule(open_log(log), None, None, streaming=True) == (Part(DAYS[:1], DAYS[1]), Part(DAYS[:2], DAYS[2]))
    assert schedule(open_log(log), None, None, validation=True, streaming=True) == (Part(DAYS[:1], DAYS[1]),)
    with pytest.raises(InputError, match="takes its days in order, each once"):
        schedule(open_log(log), None, DAYS[0], streaming=True)
    with pytest.raises(InputError, match="takes its days in order, each once"):
        schedule(open_log(log), [DAYS[1], DAYS[0]], DAYS[2], streaming=True)
