"""The statistics against computations of their own, by hand, and on data whose truth is known."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from deep_components.reporting import statistics
from deep_components.reporting.statistics import bootstrap_intervals, holm, t_test, t_test_over_requests

A, B = (0.8732, 0.8735, 0.8729, 0.8741, 0.8728), (0.8678, 0.8690, 0.8671, 0.8685, 0.8669)


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| > t) of Student's distribution, by the incomplete beta function."""
    return float(special.betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))


def test_welch_by_its_formula() -> None:
    errors = [np.var(values, ddof=1) / len(values) for values in (A, B[:4])]
    t = (np.mean(A) - np.mean(B[:4])) / math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 4 + errors[1] ** 2 / 3)
    assert t_test(A, B[:4]) == pytest.approx(two_sided_p(t, float(freedom)), rel=1e-9)


def test_paired_by_its_formula() -> None:
    differences = np.subtract(A, B)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(5))
    assert t_test(A, B, "paired") == pytest.approx(two_sided_p(t, 4), rel=1e-9)


@pytest.mark.parametrize("test", ["welch", "paired"])
def test_a_textbook_value(test: statistics.Test) -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.46, with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    ours, theirs = ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert t_test(ours, theirs, test) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)


def test_the_p_value_has_no_direction() -> None:
    assert t_test(A, B) == t_test(B, A)


@pytest.mark.parametrize("test", ["welch", "paired"])
def test_pairing_uses_what_seeds_share(test: statistics.Test) -> None:
    """Seeds that move both methods alike hide the difference from Welch's test alone."""
    seeds = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    p = t_test(tuple(seeds + 0.01 + 0.001 * np.cos(seeds * 70)), tuple(seeds), test)
    assert p is not None and (p < 0.01) == (test == "paired")


@pytest.mark.parametrize("test", ["welch", "paired"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param([0.5], [0.4], id="one seed each"),
        pytest.param([0.5, 0.6], [], id="no seed"),
        pytest.param([0.5, 0.5], [0.4, 0.4], id="no spread"),
        pytest.param([0.5, 0.5], [0.5, 0.5], id="no spread, no difference"),
        pytest.param([0.1 + 0.2, 0.3, 0.3], [0.4, 0.4, 0.4], id="spread of rounding"),
        pytest.param([0.0, 0.0], [0.0, 0.0], id="zero"),
    ],
)
def test_nothing_to_test_by(ours: list[float], theirs: list[float], test: statistics.Test) -> None:
    assert t_test(ours, theirs, test) is None


def test_paired_differences_without_spread() -> None:
    assert t_test([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], "paired") is None


def test_one_method_without_spread() -> None:
    # Only the other's variance counts: t = 0.05 / (0.05 / sqrt(3)) with 2 degrees of freedom.
    assert t_test([0.5, 0.5, 0.5], [0.4, 0.45, 0.5]) == pytest.approx(two_sided_p(math.sqrt(3), 2), rel=1e-9)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.2: 4 * 0.01, 3 * 0.02, 2 * 0.03 (not below 0.06), 1 * 0.2
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.6, 0.5]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    for level in (0.01, 0.05, 0.5):
        rejected, order = set(), sorted(range(len(p_values)), key=lambda index: p_values[index])
        for step, index in enumerate(order):
            if (len(p_values) - step) * p_values[index] > level:
                break
            rejected.add(index)
        adjusted = holm(p_values)
        assert {index for index, p in enumerate(adjusted) if p <= level} == rejected
        assert all(p <= corrected <= 1 for p, corrected in zip(p_values, adjusted, strict=True))


def test_over_requests_by_hand() -> None:
    """t = mean / (standard deviation / sqrt(R)), over the requests that have a value."""
    values = np.random.default_rng(7).normal(0.1, 1, size=300)
    t = values.mean() / (values.std(ddof=1) / math.sqrt(300))
    expected = two_sided_p(t, 299)
    assert 0.001 < expected < 0.9
    assert t_test_over_requests(values) == pytest.approx(expected)
    assert t_test_over_requests(-values) == pytest.approx(expected)
    assert t_test_over_requests([*values, math.nan]) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.1] * 50, [0.1, 0.1], [0.0] * 50, [0.1], [0.1, math.nan], []])
def test_requests_that_tell_nothing(values: list[float]) -> None:
    """Few requests may well have the same difference by chance."""
    assert t_test_over_requests(values) is None


def test_the_interval_is_that_of_a_bootstrap_by_hand() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=300)
    draws = np.random.default_rng(2).integers(0, 300, size=(20_000, 300))
    expected = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    assert bootstrap_intervals(values[None])[0] == pytest.approx(expected, abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Skewed differences on a coarse grid, as those of recalls are; 400 repetitions: 0.95 +- 3 * 0.011."""
    generator = np.random.default_rng(3)
    values = np.round(generator.exponential(size=(400, 200)), 1)
    truth = np.round(np.random.default_rng(4).exponential(size=2_000_000), 1).mean()
    covered = [low <= truth <= high for low, high in filter(None, bootstrap_intervals(values))]
    assert len(covered) == 400
    assert 0.95 - 0.035 < np.mean(covered) < 0.95 + 0.033


def test_blocks_of_requests_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(5, 1, size=(3, 2999))  # the last block is shorter
    alone = bootstrap_intervals(values)
    monkeypatch.setattr(statistics, "MOST_UNITS", 700)
    blocks = bootstrap_intervals(values)
    for one, other in zip(alone, blocks, strict=True):
        assert one is not None and other is not None
        assert other == pytest.approx(one, abs=0.012)  # 0.07 wide; 5 around it
        assert other[1] - other[0] == pytest.approx(one[1] - one[0], rel=0.15)


def test_blocks_see_that_neighbouring_requests_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=(1, 400)).repeat(10, axis=1)
    monkeypatch.setattr(statistics, "MOST_UNITS", 400)
    low, high = bootstrap_intervals(values)[0] or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.2)


def test_rows_do_not_change_each_other_and_draws_are_fixed() -> None:
    values = np.random.default_rng(7).normal(size=(4, 50))
    together = bootstrap_intervals(values)
    assert together == bootstrap_intervals(values)
    for row in range(4):
        assert bootstrap_intervals(values[row : row + 1])[0] == pytest.approx(together[row], abs=1e-12)


def test_requests_without_a_value_are_left_out() -> None:
    values = np.random.default_rng(8).normal(size=(3, 50))
    values[0, [3, 7]] = np.nan
    values[1] = np.nan
    intervals = bootstrap_intervals(values)
    kept = np.delete(values[0], [3, 7])
    assert intervals[0] == pytest.approx(bootstrap_intervals(kept[None])[0])
    assert intervals[1] is None
    assert intervals[2] == pytest.approx(bootstrap_intervals(values[2:])[0])


@pytest.mark.parametrize("requests", [0, 1])
def test_too_few_requests(requests: int) -> None:
    assert bootstrap_intervals(np.zeros((2, requests))) == [None, None]


@settings(max_examples=20, deadline=None)
@given(st.floats(-1, 1), st.integers(2, 30))
def test_equal_differences_have_an_interval_of_no_width(value: float, requests: int) -> None:
    (interval,) = bootstrap_intervals(np.full((1, requests), value))
    assert interval == pytest.approx((value, value), abs=1e-12)


def test_many_requests_need_little_memory() -> None:
    """A day of RecFlow; seven baselines."""
    values = np.random.default_rng(9).normal(size=(7, 270_000))
    tracemalloc.start()
    intervals = bootstrap_intervals(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for row, interval in zip(values, intervals, strict=True):
        assert interval is not None
        half = 1.96 * row.std() / math.sqrt(row.size)
        assert interval == pytest.approx((row.mean() - half, row.mean() + half), abs=half / 5)
    assert peak < 8 * values.nbytes
