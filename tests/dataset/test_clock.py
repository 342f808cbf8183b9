"""Wall-clock fields against zoneinfo, one time after the other."""

import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_components.dataset.clock import time_zone, wall_clock
from deep_components.errors import InputError

SHANGHAI = ZoneInfo("Asia/Shanghai")
ZONES = (
    "Asia/Shanghai",  # summer time 1986 to 1991
    "UTC",
    "America/New_York",
    "Europe/Berlin",
    "Australia/Lord_Howe",  # moves its clocks by half an hour
    "Asia/Kathmandu",  # 5:45
    "Pacific/Apia",  # left out a day
)
EARLIEST, LATEST = -2_208_988_800, 7_258_118_400 - 1


def expected(seconds: int, zone: ZoneInfo) -> tuple[int, int, int]:
    local = datetime.fromtimestamp(seconds, zone)
    return local.isoweekday(), local.hour + 1, local.minute + 1


def check(seconds: list[int], zone: ZoneInfo) -> None:
    got = wall_clock(np.array(seconds, np.int64), zone)
    assert list(zip(*(field.tolist() for field in got), strict=True)) == [expected(s, zone) for s in seconds]


def transitions(zone: ZoneInfo, first_year: int, last_year: int) -> list[int]:
    """The Unix times at which the zone's offset changes."""

    def offset(seconds: int) -> object:
        return datetime.fromtimestamp(seconds, zone).utcoffset()

    first, last = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (first_year, last_year))
    found = []
    for low in range(first, last, 86_400):
        before, after = low, low + 86_400
        if offset(before) != offset(after):
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if offset(middle) == offset(low) else (before, middle)
            found.append(after)
    return found


@given(st.lists(st.integers(EARLIEST, LATEST), max_size=20), st.sampled_from(ZONES))
@settings(max_examples=60, deadline=None)
def test_any_time_in_any_zone(seconds: list[int], zone: str) -> None:
    check(seconds, ZoneInfo(zone))


@pytest.mark.parametrize("zone", ZONES)
def test_around_every_change_of_the_clocks(zone: str) -> None:
    changes = transitions(ZoneInfo(zone), 1970, 2030)
    assert (zone == "UTC") == (not changes)
    check([change + step for change in changes for step in (-900, -1, 0, 1, 899, 900, 3599, 3600)], ZoneInfo(zone))


def test_a_change_of_the_clocks_within_a_quarter_of_an_hour() -> None:
    """St. John's changed at 00:01 local time from 1987 to 2011, Monrovia by 44.5 minutes on 1972-01-07."""
    for zone in (ZoneInfo("America/St_Johns"), ZoneInfo("Africa/Monrovia")):
        changes = transitions(zone, 1970, 2015)
        assert any(change % 900 for change in changes)
        check([change + step for change in changes for step in (-60, -30, -1, 0, 1, 30, 60, 839)], zone)


def test_monday_is_1_and_the_first_hour_and_minute_are_1() -> None:
    monday = datetime(2024, 1, 15, tzinfo=SHANGHAI)
    seconds = int(monday.timestamp()) + np.arange(7) * 86_400
    weekday, hour, minute = wall_clock(seconds, SHANGHAI)
    assert weekday.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert hour.tolist() == minute.tolist() == [1] * 7
    last = wall_clock(seconds[-1:] + 86_399, SHANGHAI)
    assert [field.item() for field in last] == [7, 24, 60]


def test_before_1970() -> None:
    assert [field.item() for field in wall_clock(np.array([-1]), ZoneInfo("UTC"))] == [3, 24, 60]  # a Wednesday
    check([-1, -59, -60, -61, -3_600, -3_601, -86_400, -86_401, EARLIEST], SHANGHAI)


def test_shape_and_type_are_kept() -> None:
    seconds = np.arange(24, dtype=np.int64).reshape(2, 3, 4) * 100_003
    for field, flat in zip(wall_clock(seconds, SHANGHAI), wall_clock(seconds.ravel(), SHANGHAI), strict=True):
        assert field.shape == seconds.shape and field.dtype == np.uint8
        np.testing.assert_array_equal(field.ravel(), flat)
    for empty in (np.zeros(0, np.int64), np.zeros((0, 40), np.int64)):
        assert [field.shape for field in wall_clock(empty, SHANGHAI)] == [empty.shape] * 3


@pytest.mark.parametrize("seconds", [EARLIEST - 1, LATEST + 1, 1_705_248_000_000, -(1 << 63), (1 << 63) - 1])
def test_a_time_in_another_unit_is_refused(seconds: int) -> None:
    with pytest.raises(ValueError, match="1900 to 2200"):
        wall_clock(np.array([0, seconds]), SHANGHAI)


def test_the_machine_s_own_zone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = np.arange(0, 1_700_000_000, 86_413_007)
    fields = []
    try:
        for machine in ("America/New_York", "Asia/Tokyo"):
            monkeypatch.setenv("TZ", machine)
            time.tzset()
            fields.append(np.stack(wall_clock(seconds, SHANGHAI)))
    finally:
        monkeypatch.undo()
        time.tzset()
    np.testing.assert_array_equal(fields[0], fields[1])


def test_a_zone_by_name() -> None:
    assert time_zone("Asia/Shanghai").key == "Asia/Shanghai"


@pytest.mark.parametrize(
    "name",
    ["", "Asia/Nowhere", "../etc/passwd", "/etc/localtime", "a\0b", "Asia", pytest.param("x" * 5000, id="over-long")],
)
def test_an_unknown_zone_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--time_zone=.*Asia/Shanghai"):
        time_zone(name)
