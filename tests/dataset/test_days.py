"""Which days train and which one tests."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from deep_components.dataset import days
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import RecFlowLog
from deep_components.dataset.log import ColumnarLog
from deep_components.errors import InputError
from tests.schemas import OWN, RECFLOW

PERIOD_1 = [f"2024-01-{day}" for day in range(13, 32)] + [f"2024-02-0{day}" for day in range(1, 5)]


def log_in(root: Path) -> RecFlowLog:
    """The log in a folder that has days but no id counts."""
    return RecFlowLog(root, "test", RECFLOW)


def make(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        for path in recflow.day_paths(root, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def test_all_days_but_the_last_train_where_period_1_is_not_complete(tmp_path: Path) -> None:
    present = ["2024-01-13", "2024-02-04", "2023-12-31"]
    make(tmp_path, present)
    assert days.training_days(log_in(tmp_path), None) == ["2023-12-31", "2024-01-13"]
    assert days.test_day(log_in(tmp_path), None) == "2024-02-04"


def test_a_log_says_how_many_days_test(tmp_path: Path) -> None:
    """Nothing is learnt from them; the last one is the test day."""
    for day in range(1, 6):
        (tmp_path / f"2026-02-0{day}").mkdir()
        (tmp_path / f"2026-02-0{day}/meta.json").touch()
    log = ColumnarLog(tmp_path, "a shop", OWN, test_days=3)
    assert days.training_days(log, None) == ["2026-02-01", "2026-02-02"]
    assert days.test_day(log, None) == "2026-02-05"
    assert days.training_days(log, ["2026-02-03"]) == ["2026-02-03"]
    with pytest.raises(InputError, match=r"has 5 days, all for tests; add days or give --train_days"):
        days.training_days(ColumnarLog(tmp_path, "a shop", OWN, test_days=5), None)


def test_period_1_is_taken_from_a_longer_log(tmp_path: Path) -> None:
    make(tmp_path, [*PERIOD_1, "2024-01-01", "2024-02-05", "2024-02-18"])
    assert days.training_days(log_in(tmp_path), None) == PERIOD_1[:-1]
    assert days.test_day(log_in(tmp_path), None) == "2024-02-04"


def test_one_missing_day_of_period_1_ends_the_protocol(tmp_path: Path) -> None:
    make(tmp_path, [*PERIOD_1[:5], *PERIOD_1[6:], "2024-02-05"])
    assert days.training_days(log_in(tmp_path), None) == [*PERIOD_1[:5], *PERIOD_1[6:]]
    assert days.test_day(log_in(tmp_path), None) == "2024-02-05"


def test_wanted_days_keep_their_order(tmp_path: Path) -> None:
    make(tmp_path, PERIOD_1)
    assert days.training_days(log_in(tmp_path), ("2024-01-20", "2024-01-14")) == ["2024-01-20", "2024-01-14"]
    assert days.test_day(log_in(tmp_path), "2024-01-13") == "2024-01-13"


def test_a_day_trains_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Days out of order may be meant; a day named twice would be learnt twice."""
    make(tmp_path, PERIOD_1)
    with pytest.raises(InputError, match=r"--train_days: names 2024-01-13 more than once; name each day once"):
        days.training_days(log_in(tmp_path), ["2024-01-13", "2024-01-14", "2024-01-13"])
    days.training_days(log_in(tmp_path), ["2024-01-13", "2024-01-14"])
    assert caplog.text == ""
    days.training_days(log_in(tmp_path), ["2024-01-14", "2024-01-13"])
    assert "--train_days=2024-01-14,2024-01-13: not in the order of time" in caplog.text


@pytest.mark.parametrize("wanted", [[], ["2024-01-13", "2024-01-15"], ["2024-1-13"]])
def test_wanted_days_must_be_there(tmp_path: Path, wanted: list[str]) -> None:
    make(tmp_path, ["2024-01-13", "2024-01-14"])
    with pytest.raises(InputError, match=r"--train_days=.*2024-01-13, 2024-01-14"):
        days.training_days(log_in(tmp_path), wanted)
    with pytest.raises(InputError, match=r"--test_day=2024-01-15.*2024-01-13, 2024-01-14"):
        days.test_day(log_in(tmp_path), "2024-01-15")


def test_one_day_cannot_train_and_test(tmp_path: Path) -> None:
    make(tmp_path, ["2024-01-13"])
    with pytest.raises(InputError, match=r"2024-01-13.*--train_days"):
        days.training_days(log_in(tmp_path), None)
    assert days.training_days(log_in(tmp_path), ["2024-01-13"]) == ["2024-01-13"]
    assert days.test_day(log_in(tmp_path), None) == "2024-01-13"


def test_a_day_needs_all_three_files(tmp_path: Path) -> None:
    make(tmp_path, ["2024-01-13", "2024-01-14", "2024-01-15", "2024-01-16"])
    for number, name in enumerate(("2024-01-13", "2024-01-14", "2024-01-15")):
        recflow.day_paths(tmp_path, name)[number].unlink()
    make(tmp_path, ["notes", ".2024-01-17", "2024-01-18.feather.5"])
    assert recflow.available_days(tmp_path, named=True) == ["2024-01-16"]
    assert days.training_days(log_in(tmp_path), ["2024-01-16"]) == ["2024-01-16"]
    assert days.test_day(log_in(tmp_path), "2024-01-16") == "2024-01-16"
    for function in (days.training_days, days.test_day):  # else the days would silently be others
        with pytest.raises(InputError, match=r"all_stage/2024-01-13.feather: no such file"):
            function(log_in(tmp_path), None)


@pytest.mark.parametrize("present", [False, True])
def test_a_folder_without_days(tmp_path: Path, present: bool) -> None:
    root = tmp_path / "log"
    if present:
        make(root, ["readme"])
    for function in (recflow.available_days, lambda data: days.training_days(log_in(data), None)):
        with pytest.raises(InputError, match=rf"{root}.*all_stage, request_id_dict and seq_effective_50_dict"):
            function(root)
