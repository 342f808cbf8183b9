"""Curves from what runs logged: means of parts by hand, seeds as a band, damaged logs named."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deep_components.reporting import series
from deep_components.reporting.results import Row, build_results
from deep_components.reporting.runs import read_runs
from deep_components.reporting.series import learning_curves, streaming_curves
from tests.reporting.fake_runs import write_run


def write_steps(run: Path, losses: Sequence[float | None], **terms: list[float]) -> Path:
    records = [
        {"step": step, "day": "2024-01-13", "loss": loss, **{name: values[step - 1] for name, values in terms.items()}}
        | {"seconds": 0.1, "data": "simulated"}
        for step, loss in enumerate(losses, start=1)
    ]
    (run / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def row_of(folder: Path) -> Row:
    return build_results(read_runs([folder])).rows[0]


def test_mean_and_band_over_seeds(tmp_path: Path) -> None:
    for seed, shift in ((30, 0.0), (31, 1.0), (32, 5.0)):
        run = write_run(tmp_path / str(seed), seed=seed, arguments={"batch_size": 10})
        write_steps(run, [4 + shift, 3 + shift, 2 + shift])
    curve = learning_curves(row_of(tmp_path), [])["loss"]
    assert (curve.mean, curve.low, curve.high, curve.seeds) == ([6, 5, 4], [4, 3, 2], [9, 8, 7], 3)
    assert curve.x == [10, 20, 30]  # requests after each step


def test_long_trainings_are_averaged_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "POINTS", 2)
    write_steps(write_run(tmp_path / "run"), [1, 3, 5, 9])
    curve = learning_curves(row_of(tmp_path), [])["loss"]
    assert curve.mean == [2, 7]
    assert curve.x == [1.5, 3.5]


@pytest.mark.parametrize("steps", [1, 99, 100, 101, 1234])
def test_every_step_counts_once(steps: int, tmp_path: Path) -> None:
    """The mean of the points, each weighted by its part, is the mean of the steps."""
    write_steps(write_run(tmp_path / "run"), [float(step) for step in range(steps)])
    curve = learning_curves(row_of(tmp_path), [])["loss"]
    assert len(curve.x) == min(steps, series.POINTS)
    assert curve.mean == pytest.approx([x - 1 for x in curve.x])  # a step's loss is its number


def test_terms_and_weights_have_curves(tmp_path: Path) -> None:
    write_steps(write_run(tmp_path / "run"), [2, 1], **{"weight.rank": [1.0, 0.9], "rank": [0.5, 0.4]})
    curves = learning_curves(row_of(tmp_path), [])
    assert set(curves) == {"loss", "weight.rank", "rank"}
    assert curves["weight.rank"].mean == [1.0, 0.9]


def test_seeds_of_different_length_are_cut_to_the_shortest(tmp_path: Path) -> None:
    write_steps(write_run(tmp_path / "a"), [1, 1, 1])
    write_steps(write_run(tmp_path / "b", seed=31), [3, 3])
    assert learning_curves(row_of(tmp_path), [])["loss"].mean == [2, 2]


def test_skipped_steps_have_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are null in the log; a part of nothing else has no point."""
    monkeypatch.setattr(series, "POINTS", 3)
    write_steps(write_run(tmp_path / "a"), [4, None, None, None, 1, 3])
    write_steps(write_run(tmp_path / "b", seed=31), [2, 4, 1, 1, None, 5])
    problems: list[str] = []
    curve = learning_curves(row_of(tmp_path), problems)["loss"]
    assert (curve.mean, curve.low, curve.high) == ([3.5, 3.5], [3, 2], [4, 5])
    assert curve.x == [1.5, 5.5] and problems == []


def test_only_skipped_steps(tmp_path: Path) -> None:
    write_steps(write_run(tmp_path / "a"), [None, None])
    assert learning_curves(row_of(tmp_path), []) == {}


@pytest.mark.parametrize("content", ['{"step": 1', "[]", '{"step": 1}', '{"loss": "1"}', '{"loss": NaN}', "\xff"])
def test_a_damaged_log_is_named_and_left_out(content: str, tmp_path: Path) -> None:
    write_steps(write_run(tmp_path / "a"), [1, 2])
    (write_run(tmp_path / "b", seed=31) / "train.jsonl").write_bytes(content.encode("latin-1"))
    problems: list[str] = []
    curve = learning_curves(row_of(tmp_path), problems)["loss"]
    assert (curve.mean, curve.seeds) == ([1, 2], 1)
    assert len(problems) == 1 and str(tmp_path / "b") in problems[0]


def test_no_log(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b", seed=31) / "train.jsonl").write_text("")
    problems: list[str] = []
    assert learning_curves(row_of(tmp_path), problems) == {}
    assert problems == []


def write_streaming(run: Path, days: Any) -> None:
    (run / "streaming.json").write_text(json.dumps({"days": days}))


def day(date: str, recall: float | None) -> dict[str, Any]:
    return {"test_day": date, "joint_recall@10@20": recall}


def test_streaming_day_by_day(tmp_path: Path) -> None:
    for name, recalls in (("bce", (0.5, 0.6)), ("lcron", (0.7, 0.9))):
        for seed in (30, 31):
            run = write_run(tmp_path / f"{name}{seed}", seed=seed, name=name)
            dates = ("2024-01-15", "2024-01-14") if seed == 31 else ("2024-01-14", "2024-01-15")  # any order
            values = dict(zip(("2024-01-14", "2024-01-15"), recalls, strict=True))
            write_streaming(run, [day(date, values[date] + (seed - 30) / 10) for date in dates])
    days, curves = streaming_curves(build_results(read_runs([tmp_path])).rows, "joint_recall@10@20", [])
    assert days == ["2024-01-14", "2024-01-15"]
    assert [curve.name for curve in curves] == ["bce", "lcron"]
    assert curves[0].mean == pytest.approx([0.55, 0.65]) and curves[0].x == [0, 1]
    assert curves[1].low == pytest.approx([0.7, 0.9]) and curves[1].high == pytest.approx([0.8, 1.0])


def test_only_days_that_all_seeds_have(tmp_path: Path) -> None:
    first = [day("2024-01-14", 0.5), day("2024-01-15", 0.6), day("2024-01-16", None)]
    write_streaming(write_run(tmp_path / "a"), first)
    write_streaming(write_run(tmp_path / "b", seed=31), [day("2024-01-15", 0.8), day("2024-01-16", 0.9)])
    days, (curve,) = streaming_curves([row_of(tmp_path)], "joint_recall@10@20", [])
    assert [days[int(place)] for place in curve.x] == ["2024-01-15"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"days": [1]}', '{"days": [{"test_day": 1}]}'])
def test_a_damaged_streaming_file(content: str, tmp_path: Path) -> None:
    (write_run(tmp_path / "a") / "streaming.json").write_text(content)
    problems: list[str] = []
    assert streaming_curves([row_of(tmp_path)], "joint_recall@10@20", problems) == ([], [])
    assert len(problems) == 1 and "streaming.json" in problems[0]
