"""The tables of costs and of a stream's days, from what runs wrote."""

from pathlib import Path

import pytest

from deep_components.commands import costs as collect_costs
from deep_components.commands import streaming as collect_streaming
from deep_components.errors import InputError
from deep_components.experiments.execution import Commands, Options, Slot, execute
from deep_components.experiments.tables import costs_table, streaming_table
from tests.experiments.runs import DAYS, fake_run


def rows(table: str) -> list[list[str]]:
    """The rows below the line."""
    lines = table.splitlines()
    below = next(place for place, line in enumerate(lines) if line.startswith("---")) + 1
    return [line.split() for line in lines[below:]]


def make(folder: Path, **arguments: bool) -> None:
    for seed in (30, 31):
        assert execute(fake_run(folder, seed, **arguments), Slot(), Options(), Commands()).status == "finished"


def test_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    (row,) = rows(costs_table([tmp_path]))
    assert row[:6] == ["mine", "two_stage", "2", str(3 * 1024), "4.5", str(round(3 * 1024 / 4.5))]
    collect_costs.main([str(tmp_path)])
    assert capsys.readouterr().out == costs_table([tmp_path])


def test_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, streaming=True)
    assert rows(streaming_table([tmp_path])) == [[DAYS[1], "0.1000"], [DAYS[2], "0.2000"], [DAYS[3], "0.3000"]]
    assert "simulated" in streaming_table([tmp_path]).splitlines()[0]
    collect_streaming.main([str(tmp_path)])
    assert capsys.readouterr().out == streaming_table([tmp_path])


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        costs_table([tmp_path])
    with pytest.raises(InputError, match=r"no streaming\.json"):
        streaming_table([tmp_path])
