"""Curves over time: every step counts once, skipped ones not at all, damaged logs are named."""

import json
from pathlib import Path

import pytest

from deep_components.reporting import curves
from deep_components.reporting.curves import learning_curves, streaming_curves, validation_curves
from deep_components.reporting.figures import charts_of
from deep_components.reporting.frame import label_rows, read_runs
from deep_components.reporting.page import render
from deep_components.reporting.results import build_results
from tests.reporting.fake_runs import write_run, write_steps, write_streaming

JOINT = "joint_recall@10@20"


def learned(folder: Path, problems: list[str] | None = None) -> dict[str, list[tuple[float, ...]]]:
    """Term -> (requests, mean, low, high) of each point."""
    found = learning_curves(read_runs([folder]).runs, [] if problems is None else problems)
    return {name: [tuple(point) for point in curve.itertuples()] for name, curve in found.items()}


def test_mean_and_band_over_seeds(tmp_path: Path) -> None:
    for seed, shift in ((30, 0.0), (31, 1.0), (32, 5.0)):
        run = write_run(tmp_path / str(seed), seed=seed, arguments={"batch_size": 10})
        write_steps(run, [4 + shift, 3 + shift, 2 + shift], **{"weight.rank": [1.0, 0.9, 0.8]})
    found = learned(tmp_path)
    assert found["loss"] == [(10, 6, 4, 9), (20, 5, 3, 8), (30, 4, 2, 7)]  # requests after each step
    assert [mean for _, mean, *_ in found["weight.rank"]] == pytest.approx([1.0, 0.9, 0.8])


@pytest.mark.parametrize("steps", [1, 99, 100, 101, 1234])
def test_every_step_counts_once(steps: int, tmp_path: Path) -> None:
    """A step's loss is its number, so a part's mean is its middle."""
    write_steps(write_run(tmp_path / "run"), [float(step) for step in range(steps)])
    points = learned(tmp_path)["loss"]
    assert len(points) == min(steps, curves.POINTS)
    assert [mean for _, mean, *_ in points] == pytest.approx([x - 1 for x, *_ in points])


def test_skipped_steps_have_no_value_and_seeds_are_cut_to_the_shortest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are null in the log; a part of nothing else has no point."""
    monkeypatch.setattr(curves, "POINTS", 3)
    write_steps(write_run(tmp_path / "a"), [4, None, None, None, 1, 3, 99, 99])
    write_steps(write_run(tmp_path / "b", seed=31), [2, 4, 1, 1, None, 5])
    assert learned(tmp_path)["loss"] == [(1.5, 3.5, 3, 4), (5.5, 3.5, 2, 5)]


def test_nothing_to_draw(tmp_path: Path) -> None:
    write_run(tmp_path / "without a log")
    (write_run(tmp_path / "empty", seed=31) / "train.jsonl").write_text("")
    write_steps(write_run(tmp_path / "all skipped", seed=32), [None, None])
    assert learned(tmp_path) == {}


@pytest.mark.parametrize("content", ['{"step": 1', "[]", '{"step": 1}', '{"loss": "1"}', '{"loss": NaN}', "\xff"])
def test_a_damaged_log_is_named_and_left_out(content: str, tmp_path: Path) -> None:
    write_steps(write_run(tmp_path / "a"), [1, 2])
    (write_run(tmp_path / "b", seed=31) / "train.jsonl").write_bytes(content.encode("latin-1"))
    problems: list[str] = []
    assert learned(tmp_path, problems)["loss"] == [(1, 1, 1, 1), (2, 2, 2, 2)]
    assert len(problems) == 1 and str(tmp_path / "b") in problems[0]


def test_the_validation_day(tmp_path: Path) -> None:
    """A seed that was stopped early ends the curve; a run without validations has none."""
    for seed, recalls in ((30, {2: 0.5, 4: 0.7, 6: 0.6}), (31, {2: 0.6, 4: 0.9})):
        run = write_steps(
            write_run(tmp_path / str(seed), seed=seed, arguments={"batch_size": 10}), [1.0] * max(recalls)
        )
        records = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
        for step, recall in recalls.items():
            records[step - 1][f"validation.{JOINT}"] = recall
        (run / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_steps(write_run(tmp_path / "other", name="other"), [1, 2])
    runs, problems = label_rows(read_runs([tmp_path]).runs), list[str]()
    (curve,) = validation_curves(runs, JOINT, problems).values()
    assert [tuple(point) for point in curve.itertuples()] == [
        pytest.approx((20, 0.55, 0.5, 0.6)), pytest.approx((40, 0.8, 0.7, 0.9))
    ]  # fmt: skip
    assert list(learned(tmp_path / "30")) == ["loss"]
    results = build_results(read_runs([tmp_path]))
    (chart,) = [chart for chart in charts_of(results, []) if chart.kind == "validation"]
    assert "on the validation day" in render(results, [chart], [])
    (tmp_path / "31/train.jsonl").write_text(f'{{"step": "x", "loss": 1, "validation.{JOINT}": 0.5}}\n')
    validation_curves(runs, JOINT, problems)
    assert len(problems) == 1 and str(tmp_path / "31") in problems[0]


def test_a_stream_has_the_days_that_all_seeds_have(tmp_path: Path) -> None:
    days = {"2024-01-15": 0.6, "2024-01-14": 0.5, "2024-01-16": None, "2024-01-17": 0.1}  # in any order
    write_streaming(write_run(tmp_path / "a"), days)
    write_streaming(write_run(tmp_path / "b", seed=31), {"2024-01-14": 0.7, "2024-01-15": 0.8, "2024-01-16": 0.9})
    write_run(tmp_path / "not streamed", seed=32)
    (curve,) = streaming_curves(label_rows(read_runs([tmp_path]).runs), JOINT, []).values()
    assert curve["mean"].to_dict() == pytest.approx({"2024-01-14": 0.6, "2024-01-15": 0.7})
    assert curve["low"].to_list() == [0.5, 0.6] and curve["high"].to_list() == [0.7, 0.8]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"days": [1]}', '{"days": [{"test_day": 1}]}'])
def test_a_damaged_stream(content: str, tmp_path: Path) -> None:
    (write_run(tmp_path / "a") / "streaming.json").write_text(content)
    problems: list[str] = []
    assert streaming_curves(label_rows(read_runs([tmp_path]).runs), JOINT, problems) == {}
    assert len(problems) == 1 and "streaming.json" in problems[0]
