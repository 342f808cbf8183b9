"""Whether two methods differ: t-tests over seeds and over requests, Holm's correction, and a bootstrap interval over
requests."""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

SIGNIFICANCE = 0.05  # the paper's level
CONFIDENCE = 0.95
RESAMPLES = 2000
# Above so many requests, blocks of consecutive ones are drawn. The interval's width is then known to
# sqrt(1 / (2 * 5000)), one per cent, whatever the number of requests, at a cost that no longer grows.
MOST_UNITS = 5000

_NUMBERS_AT_A_TIME = 1_000_000  # bounds the memory of the bootstrap
_ROUNDING = 1e-12  # relative; values whose standard deviation is smaller differ by rounding alone

Test = Literal["welch", "paired"]


def t_test(ours: ArrayLike, theirs: ArrayLike, test: Test = "welch") -> float | None:
    """Two-sided p-value of the hypothesis that both methods have the same mean over seeds.

    Two-sided, so that the sign of the difference says which is better: no result can be taken for its opposite.

    Args:
        ours: a value per seed.
        theirs: a value per seed; for "paired" of the same seeds in the same order.
        test: "welch" takes the two sets of runs for independent and their deviations for different, as they are by
            factors of up to 37 in the paper's Table 2. "paired" tests the differences seed by seed: a seed fixes the
            initial models and the order of the requests, which two methods share.

    Returns:
        None when there is nothing to test by: fewer than two seeds, or values that do not vary over seeds.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        return None
    deviation = np.std(a - b) if test == "paired" else max(np.std(a), np.std(b))
    if deviation <= _ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        return None
    with warnings.catch_warnings():  # scipy warns where the values of one method are all but equal, which is fine
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        result = stats.ttest_rel(a, b) if test == "paired" else stats.ttest_ind(a, b, equal_var=False)
    return float(result.pvalue)


def t_test_over_requests(differences: ArrayLike) -> float | None:
    """Two-sided p-value of the hypothesis that a difference is 0 in the mean over requests, of which the log's are a
    sample: a t-test paired by request.

    Args:
        differences: [R], a request's value of one method minus that of the other; NaN where it has none.

    Returns:
        None when there is nothing to test by: fewer than two requests, or differences that do not vary over them.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    return t_test(values, np.zeros_like(values), "paired")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the adjusted p-values, in the order given.

    The i-th smallest of m is multiplied by m - i + 1, and is at least the one before it. Rejecting those of at most
    0.05 keeps the chance of any false rejection among the m at 5 %.
    """
    p, order = np.asarray(p_values, dtype=np.float64), np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return [float(value) for value in adjusted]


def bootstrap_intervals(differences: np.ndarray, seed: int = 0) -> list[tuple[float, float] | None]:
    """95 % percentile bootstrap intervals of mean differences over requests (Efron, 1979), paired: a request is drawn
    with the values of both methods.

    Every row is resampled by the same draws. With thousands of requests the percentile interval of a mean needs no
    correction of bias or skewness.

    Args:
        differences: [M, R], of M comparisons over R requests in the log's order; NaN where a request has no value.

    Returns:
        (low, high) per row; None for a row of fewer than two requests.
    """
    intervals: list[tuple[float, float] | None] = [None] * len(differences)
    alike: dict[bytes, list[int]] = {}  # rows by where they are defined: one group, as a rule
    for row, undefined in enumerate(np.isnan(differences)):
        alike.setdefault(undefined.tobytes(), []).append(row)
    for rows in alike.values():
        requests = np.flatnonzero(~np.isnan(differences[rows[0]]))
        if len(requests) < 2:
            continue
        lows, highs = _interval(differences[rows][:, requests], seed)
        for row, low, high in zip(rows, lows, highs, strict=True):
            intervals[row] = (float(low), float(high))
    return intervals


def _interval(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends [M] for values [M, R] without NaN."""
    means = values.mean(axis=1)
    units = values - means[:, None]  # centred, so that a shorter last block does not matter
    size = -(-values.shape[1] // MOST_UNITS)
    if size > 1:
        starts = np.arange(0, values.shape[1], size)
        units = np.add.reduceat(units, starts, axis=1) * (len(starts) / values.shape[1])
    batch = max(1, _NUMBERS_AT_A_TIME // units.size)
    found = stats.bootstrap(
        (units,), np.mean, axis=-1, vectorized=True, n_resamples=RESAMPLES, batch=batch, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return means + found.low, means + found.high
