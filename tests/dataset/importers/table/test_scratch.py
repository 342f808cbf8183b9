"""A task whose process is killed anywhere is undone, and done again as if it had not been begun."""

from pathlib import Path

import numpy as np
import pytest

from deep_components.dataset.importers.table import scratch
from deep_components.dataset.importers.table.mapping import load_mapping
from deep_components.dataset.importers.table.plan import Plan, make_plan, needed_columns
from deep_components.dataset.importers.table.source import open_source
from tests.dataset.importers import tables

NUMBER = np.dtype(np.int64)


class KilledError(Exception):
    pass


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    mapping = load_mapping(tables.write(tmp_path, tables.table(20)))
    made = make_plan(mapping, open_source(mapping, needed_columns(mapping)), tmp_path / "scratch", strict=True)
    (made.scratch / "0").mkdir(parents=True)
    return made


def numbers(plan: Plan, name: str) -> list[int]:
    return sorted(scratch.load(plan, 0, name, NUMBER).tolist())


def move(plan: Plan, first: int, killed_after: int) -> int:
    """Appends to two files, one of them twice, and takes away what another task left."""
    total = int(scratch.load(plan, 0, "input", NUMBER).sum())
    scratch.remove(plan, 0, "input")
    for step, name in enumerate(["one", "other", "one"]):
        if step == killed_after:
            raise KilledError
        scratch.append(plan, 0, name, np.array([first + step]))
    if killed_after == 3:
        raise KilledError
    return total


@pytest.mark.parametrize("killed_after", range(4))
def test_a_task_is_done_once(killed_after: int, plan: Plan, tmp_path: Path) -> None:
    scratch.append(plan, 0, "input", np.array([3, 4]))
    scratch.append(plan, 0, "one", np.array([7]))  # of another task of this process
    journal = tmp_path / "journal"
    with pytest.raises(KilledError):
        scratch.once(move, journal, plan, 10, killed_after)
    total, unneeded = scratch.once(move, journal, plan, 10, -1)
    assert (total, numbers(plan, "one"), numbers(plan, "other")) == (7, [7, 10, 12], [11])
    total, unneeded = scratch.once(move, journal, plan, 10, -1)  # its result was lost on the way
    assert (total, numbers(plan, "one"), numbers(plan, "other")) == (7, [7, 10, 12], [11])
    assert numbers(plan, "input") == [3, 4]
    for path in unneeded:
        path.unlink()
    assert numbers(plan, "input") == []


def test_a_line_that_was_not_finished_is_of_a_file_that_was_not_written(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        scratch.once(move, tmp_path / "journal", plan, 10, 1)
    scratch.append(plan, 0, "other", np.array([9]))
    with (tmp_path / "journal").open("a") as file:
        file.write(f'["{next((plan.scratch / "0").glob("other.*"))}", 0]')
    scratch.once(move, tmp_path / "journal", plan, 10, -1)
    assert numbers(plan, "other") == [9, 11]


def test_without_a_journal_files_are_removed_at_once(plan: Plan) -> None:
    scratch.append(plan, 0, "input", np.array([3, 4]))
    assert move(plan, 10, -1) == 7
    assert numbers(plan, "input") == []
