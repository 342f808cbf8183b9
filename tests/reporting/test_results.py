"""Means, the best, and our method against the others: in the right direction, and only where there is something to
test by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deep_components.errors import InputError
from deep_components.reporting.frame import read_runs
from deep_components.reporting.results import Results, build_results, metric_title
from deep_components.reporting.statistics import bootstrap_intervals, holm
from tests.reporting.fake_runs import add_requests, write_run, write_runs

JOINT, INTERVAL = "joint_recall@10@20", ["interval_low", "interval_high"]
LOW, MIDDLE, HIGH = (0.70, 0.71, 0.69, 0.72), (0.75, 0.76, 0.74, 0.755), (0.80, 0.81, 0.79, 0.815)


def results_of(folder: Path, **options: Any) -> Results:
    return build_results(read_runs([folder]), **options)


def compared(results: Results, column: str = "ours_is") -> dict[str, Any]:
    """Baseline -> what is said of it in the headline."""
    cells = results.compared
    return cells[cells["metric"] == JOINT].set_index("method")[column].to_dict()


def methods(folder: Path, **recalls: tuple[float, ...]) -> Path:
    for name, values in recalls.items():
        write_runs(folder / name, values, name=name)
    return folder


def test_mean_and_sample_deviation(tmp_path: Path) -> None:
    cell = results_of(methods(tmp_path, lcron=(0.8, 0.9, 0.7))).of(JOINT).loc["lcron"]
    assert cell["mean"] == pytest.approx(0.8)
    assert cell["std"] == pytest.approx(0.1)  # deviations 0, 0.1, -0.1: sqrt((0.01 + 0.01) / (3 - 1))


def test_an_undefined_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "one", None)
    write_run(tmp_path / "two", 0.5, seed=31)
    write_runs(tmp_path / "bce", LOW, name="bce")
    results = results_of(tmp_path)
    assert np.isnan(results.of(JOINT).loc["lcron", "mean"])
    assert results.of(JOINT).loc["bce", ["difference", "p"]].isna().all()
    assert compared(results) == {"bce": "not tested"}


def best(results: Results) -> list[str]:
    return list(results.of(JOINT).query("best").index)


def test_the_best_is_marked(tmp_path: Path) -> None:
    write_runs(tmp_path / "untrained", (0.9, 0.9), epochs=0)
    assert best(results_of(methods(tmp_path, a=LOW, b=HIGH, c=MIDDLE))) == ["b"]


def test_means_that_are_printed_alike_are_both_best(tmp_path: Path) -> None:
    assert best(results_of(methods(tmp_path, a=(0.80001,), b=(0.80002,), c=(0.7999,)))) == ["a", "b"]


def test_a_single_method_is_not_the_best(tmp_path: Path) -> None:
    write_runs(tmp_path / "untrained", (0.2, 0.3), epochs=0)
    assert best(results_of(methods(tmp_path, a=LOW))) == []


def test_ours_against_each_other_trained_row(tmp_path: Path) -> None:
    write_runs(tmp_path / "untrained", (0.4, 0.5), epochs=0)
    results = results_of(methods(tmp_path, bce=LOW, lcron=HIGH, arf=MIDDLE))
    assert results.ours == "lcron"
    p_values = [stats.ttest_ind(HIGH, values, equal_var=False).pvalue for values in (MIDDLE, LOW)]
    assert compared(results, "p") == pytest.approx(dict(zip(("arf", "bce"), p_values, strict=True)))
    assert compared(results, "p_holm") == pytest.approx(dict(zip(("arf", "bce"), holm(p_values), strict=True)))
    differences = {"arf": np.mean(HIGH) - np.mean(MIDDLE), "bce": np.mean(HIGH) - np.mean(LOW)}
    assert compared(results, "difference") == pytest.approx(differences)


def test_another_row_is_compared(tmp_path: Path) -> None:
    results = results_of(methods(tmp_path, bce=LOW, lcron=HIGH), compare="bce")
    assert results.ours == "bce"
    assert compared(results, "ours") == {"lcron": "bce"}


@pytest.mark.parametrize("test", ["welch", "paired"])
def test_a_significantly_worse_result_is_never_better(test: Any, tmp_path: Path) -> None:
    """Every verdict turns round when the two methods change places."""
    folder = methods(tmp_path, low=LOW, high=HIGH, alike=(0.80, 0.807, 0.793, 0.812))
    by_high = results_of(folder, compare="high", test=test)
    assert compared(by_high) == {"alike": "no difference shown", "low": "better"}
    by_low = results_of(folder, compare="low", test=test)
    assert compared(by_low) == {"alike": "worse", "high": "worse"}
    assert max(compared(by_low, "difference").values()) < 0


def test_the_correction_decides(tmp_path: Path) -> None:
    """Alone the difference is significant, among nine baselines it is not."""
    ours, theirs = (0.80, 0.81, 0.79, 0.80), (0.785, 0.79, 0.775, 0.785)
    assert 0.01 < stats.ttest_ind(ours, theirs, equal_var=False).pvalue < 0.05
    alone = results_of(methods(tmp_path / "alone", lcron=ours, a=theirs))
    assert compared(alone) == {"a": "better"}
    among = results_of(methods(tmp_path / "among", lcron=ours, **{f"b{index}": theirs for index in range(9)}))
    assert set(compared(among).values()) == {"no difference shown"}


def test_paired_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    """Its difference is of those seeds too, so that it and the test cannot point in two directions."""
    write_runs(tmp_path / "lcron", (0.70, 0.71, 0.69, 0.99), name="lcron")
    write_runs(tmp_path / "bce", (0.5, 0.76, 0.77, 0.76), first_seed=29, name="bce")  # seeds 30, 31, 32 are common
    made = results_of(tmp_path, test="paired").of(JOINT).loc["bce"]
    expected = stats.ttest_rel((0.70, 0.71, 0.69), (0.76, 0.77, 0.76))
    assert made["p"] == pytest.approx(expected.pvalue)
    assert made["difference"] == pytest.approx(np.mean((0.70, 0.71, 0.69)) - np.mean((0.76, 0.77, 0.76)))
    assert made["ours_is"] == "worse"


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"), [(HIGH, (0.7,), "fewer than two seeds"), ((0.8, 0.8), (0.7, 0.7), "do not vary")]
)
def test_no_test_is_said(ours: tuple[float, ...], theirs: tuple[float, ...], reason: str, tmp_path: Path) -> None:
    results = results_of(methods(tmp_path, lcron=ours, bce=theirs))
    assert compared(results) == {"bce": "not tested"} and np.isnan(compared(results, "p")["bce"])
    assert any(reason in note and "bce" in note for note in results.notes)


def test_untested_baselines_do_not_count_in_the_correction(tmp_path: Path) -> None:
    results = results_of(methods(tmp_path, lcron=HIGH, bce=LOW, arf=(0.7,)))
    assert compared(results, "p_holm")["bce"] == compared(results, "p")["bce"]


def test_no_such_row(tmp_path: Path) -> None:
    write_runs(tmp_path / "untrained", (0.2, 0.3), epochs=0)
    with pytest.raises(InputError, match=r"--compare=lcorn.*bce, lcron"):
        results_of(methods(tmp_path, lcron=HIGH, bce=LOW), compare="lcorn")
    with pytest.raises(InputError, match="--compare=untrained"):
        results_of(tmp_path, compare="untrained")


def test_nothing_called_lcron(tmp_path: Path) -> None:
    results = results_of(methods(tmp_path, arf=HIGH, bce=LOW))
    assert results.ours is None and compared(results) == {}
    assert any("--compare" in note for note in results.notes)


def test_the_interval_is_of_the_means_over_seeds(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.uniform(0.5, 1, (3, 60)), generator.uniform(0, 0.9, (2, 60))
    for name, values in (("lcron", ours), ("bce", theirs)):
        for seed, per_request in enumerate(values):
            add_requests(write_run(tmp_path / name / str(seed), seed=seed, name=name), per_request)
    made = results_of(tmp_path).of(JOINT).loc["bce"]
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    assert tuple(made[INTERVAL]) == pytest.approx(bootstrap_intervals(difference[None])[0])
    assert made["difference"] == pytest.approx(difference.mean())
    assert made["interval_low"] < made["difference"] < made["interval_high"]


def test_it_is_paired(tmp_path: Path) -> None:
    """Requests differ much, methods always by the same: the interval has no width."""
    per_request = np.random.default_rng(1).uniform(0, 0.8, 60)
    for name, shift in (("lcron", 0.1), ("bce", 0.0)):
        add_requests(write_run(tmp_path / name, name=name), per_request + shift)
    made = results_of(tmp_path).of(JOINT).loc["bce"]
    assert tuple(made[INTERVAL]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("others", [range(1, 41), None], ids=["other requests", "a run of before"])
def test_no_interval_is_said(others: range | None, tmp_path: Path) -> None:
    add_requests(write_run(tmp_path / "lcron", name="lcron"), [0.5] * 40)
    run = write_run(tmp_path / "bce", name="bce")
    if others:
        add_requests(run, [0.4] * 40, ids=others)
    results = results_of(tmp_path)
    assert results.of(JOINT)[INTERVAL].isna().all(axis=None)
    assert any(note.startswith("No interval") and "bce" in note and "again" in note for note in results.notes)


def test_what_the_numbers_are_stands_beside_them(tmp_path: Path) -> None:
    write_run(tmp_path / "a", results={"data": "simulated", "warning": "SIMULATED DATA"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps({"arguments": {}}))
    results = results_of(tmp_path)
    assert results.about == {
        "setting": "two_stage",
        "data": "simulated",
        "test_day": "2024-02-04",
        "num_requests": 40,
        "test_day_checksum": None,
        "test_random_items": 0,
    }
    assert results.warnings == ["SIMULATED DATA"]
    assert list(results.left_out) == [str(tmp_path / "b")]


def test_titles() -> None:
    assert metric_title("joint_recall@10@20") == "Joint Recall@10@20"
    assert metric_title("rank_ndcg@10") == "Rank NDCG@10"
    assert metric_title("retrieval_kendall_tau") == "Retrieval Kendall tau"
