"""Metrics against the paper's code, scikit-learn, SciPy, hand-made cases, and their properties."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.stats import hypergeom, kendalltau
from sklearn.metrics import ndcg_score
from torch import Tensor

from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade
from deep_components.metrics import (
    cascade_metrics,
    cascade_survival,
    joint_recall,
    kendall_tau,
    ndcg,
    recall,
    survival,
    survival_by_stage,
)

quick = settings(deadline=None, max_examples=60)


def tensor(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class Request(NamedTuple):
    """One request, [1, N] each."""

    scores: dict[str, Tensor]
    labels: Tensor
    mask: Tensor
    relevant: Tensor


QUOTAS = {"first": 5, "second": 3}


def metrics_of(request: Request) -> dict[str, Tensor]:
    return cascade_metrics(*request, quotas=QUOTAS, num_relevant=4)


@st.composite
def requests(draw: st.DrawFn, distinct: bool = False, masked: bool = True) -> Request:
    """Up to 12 items; scores on a coarse grid, so that ties are common, or all distinct."""
    size = draw(st.integers(1, 12))

    def scores() -> Tensor:
        if distinct:
            return tensor([draw(st.permutations(range(size)))])
        return torch.from_numpy(draw(arrays(np.float32, (1, size), elements=st.integers(-2, 2))))

    def flags() -> Tensor:
        return torch.from_numpy(draw(arrays(np.bool_, (1, size))))

    labels = torch.from_numpy(draw(arrays(np.int64, (1, size), elements=st.integers(0, 4))))
    mask = flags() if masked else torch.ones(1, size, dtype=torch.bool)
    return Request({"first": scores(), "second": scores()}, labels, mask, flags())


def rearranged(request: Request, order: Tensor) -> Request:
    """The request with its items in the given order; items may be left out."""
    return Request(
        {stage: scores[:, order] for stage, scores in request.scores.items()},
        *(values[:, order] for values in request[1:]),
    )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


# ---- against other computations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cascade", [TWO_STAGE, THREE_STAGE], ids=lambda cascade: cascade.name)
def test_golden(cascade: Cascade, golden: Path) -> None:
    with np.load(golden / "metrics.npz") as arrays_of:
        prefix = f"{cascade.name}/complete/"
        case = {key.removeprefix(prefix): arrays_of[key] for key in arrays_of if key.startswith(prefix)}
    scores = {stage: torch.from_numpy(case[f"logits/{stage}"]) for stage in cascade.stage_names}
    mask = torch.from_numpy(case["mask"]).bool()
    relevant = torch.from_numpy(cascade.group_of_item == 0).expand_as(mask)
    quotas = {stage.name: stage.keep for stage in cascade.stages}
    actual = cascade_metrics(scores, torch.from_numpy(case["labels"]), mask, relevant, quotas, cascade.num_relevant)
    np.testing.assert_allclose(actual["joint_recall@10@20"], case["joint_recall@10@20"], rtol=0, atol=1e-6)
    for stage, quota in quotas.items():
        for name in (f"recall@10@{quota}", "ndcg@10", "kendall_tau"):
            assert actual[f"{stage}_{name}"].mean().item() == pytest.approx(case[f"{name}/{stage}"], abs=1e-6), name


@quick
@given(requests(masked=False), st.integers(1, 12))
def test_ndcg_equals_scikit_learn(request: Request, k: int) -> None:
    scores = request.scores["first"]
    if scores.shape[1] == 1:
        return  # not defined by scikit-learn
    expected = ndcg_score(request.labels.numpy(), scores.numpy(), k=k)
    assert ndcg(scores, request.labels, request.mask, k).item() == pytest.approx(expected, abs=1e-12)


@quick
@given(requests(masked=False))
def test_kendall_tau_equals_scipy(request: Request) -> None:
    scores = request.scores["first"]
    expected = kendalltau(scores.numpy()[0], request.labels.numpy()[0]).statistic if scores.shape[1] > 1 else np.nan
    actual = kendall_tau(scores, request.labels, request.mask).item()
    assert actual == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_kendall_tau_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 9, generator=generator)
    labels = torch.randint(0, 5, (7, 9), generator=generator)
    monkeypatch.setattr("deep_components.metrics._REQUESTS_PER_CHUNK", 3)
    actual = kendall_tau(scores, labels, torch.ones(7, 9, dtype=torch.bool))
    expected = [kendalltau(scores[row], labels[row]).statistic for row in range(7)]
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    monkeypatch.setattr("deep_components.metrics._PAIRS_PER_CHUNK", 4 * 9 + 3)  # four items of a request
    assert torch.equal(kendall_tau(scores, labels, torch.ones(7, 9, dtype=torch.bool)), actual)
    assert kendall_tau(scores[:0], labels[:0], torch.ones(0, 9, dtype=torch.bool)).shape == (0,)


@quick
@given(requests(distinct=True))
def test_joint_recall_equals_a_simulated_cascade(request: Request) -> None:
    alive = [item for item in range(request.mask.shape[1]) if request.mask[0, item]]
    truth = {item for item in alive if request.relevant[0, item]}
    for stage, quota in QUOTAS.items():
        alive = sorted(alive, key=lambda item, stage=stage: -request.scores[stage][0, item].item())[:quota]  # type: ignore[misc]
    expected = len(truth & set(alive)) / len(truth) if truth else np.nan
    actual = joint_recall(list(request.scores.values()), request.mask, request.relevant, list(QUOTAS.values()))
    assert actual.item() == pytest.approx(expected, nan_ok=True)


# ---- by hand ---------------------------------------------------------------------------------------------------------

FOUR = torch.ones(1, 4, dtype=torch.bool)
FIRST_TWO = tensor([[1, 1, 0, 0]], torch.bool)


@pytest.mark.parametrize(
    ("first", "second", "quotas", "expected"),
    [
        pytest.param([4, 3, 2, 1], [4, 3, 2, 1], [2, 2], 1.0, id="both stages right"),
        pytest.param([4, 1, 3, 2], [1, 9, 2, 9], [2, 1], 0.0, id="the second stage loses what the first kept"),
        pytest.param([4, 1, 3, 2], [3, 9, 2, 9], [2, 1], 0.5, id="what the first stage lost does not come back"),
        pytest.param([1, 2, 3, 4], [4, 3, 2, 1], [2, 2], 0.0, id="the first stage loses all"),
        pytest.param([1, 2, 3, 4], [4, 3, 2, 1], [3, 1], 0.5, id="one survives both"),
        pytest.param([1, 2, 3, 4], [1, 2, 3, 4], [4, 4], 1.0, id="nothing is dropped"),
        pytest.param([1, 2, 3, 4], [1, 2, 3, 4], [9, 9], 1.0, id="quotas above the number of items"),
        pytest.param([0, 0, 0, 0], [4, 3, 2, 1], [2, 2], 0.5, id="a constant first stage"),
        pytest.param([4, 3, 2, 1], [0, 0, 0, 0], [3, 1], 1 / 3, id="a constant second stage"),
        pytest.param([4, 3, 2, 1], [0, 0, 0, 0], [3, 2], 2 / 3, id="a constant second stage that keeps two of three"),
    ],
)
def test_joint_recall_by_hand(first: list[int], second: list[int], quotas: list[int], expected: float) -> None:
    recalled = joint_recall([tensor([first]), tensor([second])], FOUR, FIRST_TWO, quotas)
    assert recalled.tolist() == pytest.approx([expected])


def test_what_is_left_after_each_stage_by_hand() -> None:
    # The first stage keeps items 0, 2 and 3 of four, of which only 0 is relevant; the second keeps 2 and 3.
    left = cascade_survival([tensor([[4, 1, 3, 2]]), tensor([[1, 9, 2, 3]])], FOUR, FIRST_TWO, [3, 2])
    assert [share.tolist() for share in left] == [[0.5], [0.0]]


def test_ndcg_by_hand() -> None:
    # Items in the order of the scores have labels 1, 3, 2; cut at 2: DCG = 1 + 3 / log2(3), ideal = 3 + 2 / log2(3).
    value = ndcg(tensor([[1.0, 2.0, 0.5]]), tensor([[3, 1, 2]], torch.int64), FOUR[:, :3], k=2)
    assert value.item() == pytest.approx((1 + 3 / np.log2(3)) / (3 + 2 / np.log2(3)), abs=1e-12)


def test_survival_takes_the_best_of_what_is_alive() -> None:
    scores, alive = tensor([[1.0, 9.0, 3.0, 2.0]]), tensor([[1.0, 0.0, 1.0, 1.0]])
    assert survival(scores, alive, quota=2).tolist() == [[0, 0, 1, 1]]
    assert survival(scores, alive, quota=4).equal(alive.double())


def test_tied_items_share_the_places_left() -> None:
    tied = tensor([[5.0, 1.0, 1.0, 1.0]])
    assert survival(tied, torch.ones(1, 4, dtype=torch.float64), quota=2)[0].tolist() == pytest.approx(
        [1, *[1 / 3] * 3]
    )
    # What is half gone takes half a place: 1 + 0.5 + 0.5 are before the cut, 0.5 of the next block's 1 is left.
    alive = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    shares = survival(tensor([[4.0, 3.0, 2.0, 1.0, 1.0]]), alive, quota=2)
    assert shares[0].tolist() == pytest.approx([1, 0.5, 0.5, 0, 0])
    assert survival(tensor([[4.0, 3.0, 1.0, 1.0, 0.0]]), alive, quota=2)[0].tolist() == pytest.approx(
        [1, 0.5, 0.25, 0.25, 0]
    )


def outcomes(scores: list[list[int]], present: set[int], quotas: list[int]) -> list[dict[int, float]]:
    """The probability of each item to be left after each stage: every stage draws among all choices of its tied."""
    sets, left = {frozenset(present): 1.0}, []
    for values, quota in zip(scores, quotas, strict=True):
        following: dict[frozenset[int], float] = defaultdict(float)
        for alive, probability in sets.items():
            last = sorted((values[item] for item in alive), reverse=True)[:quota][-1] if alive else 0
            above = {item for item in alive if values[item] > last}
            tied = [item for item in alive if values[item] == last]
            choices = list(itertools.combinations(tied, min(quota - len(above), len(tied))))
            for choice in choices:
                following[frozenset(above | {*choice})] += probability / len(choices)
        sets = following
        left.append({item: sum(p for alive, p in sets.items() if item in alive) for item in range(len(values))})
    return left


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_ties_at_the_cuts_of_several_stages_are_drawn_in_every_way(data: st.DataObject) -> None:
    size, stages = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 4))
    scores = data.draw(arrays(np.float32, (stages, 1, size), elements=st.integers(0, data.draw(st.integers(0, 3)))))
    mask = data.draw(arrays(np.bool_, (1, size)))
    quotas = data.draw(st.lists(st.integers(1, size), min_size=stages, max_size=stages))
    present = {int(item) for item in np.flatnonzero(mask)}
    expected = outcomes(scores[:, 0].tolist(), present, quotas)
    actual = survival_by_stage([*torch.from_numpy(scores)], torch.from_numpy(mask), quotas)
    for probabilities, values in zip(expected, actual, strict=True):
        np.testing.assert_allclose(values[0], [probabilities[item] for item in range(size)], atol=1e-12)


def test_chance_ties_at_two_cuts_by_hand() -> None:
    # The first stage keeps item 2 and one of the items 0 and 1; the second keeps item 1 if it is there, else draws from
    # 0 and 2. So item 2 is left with probability 1/2 * 1/2; 1/3 if the halves of 0 and 1 counted as one item's.
    scores, ones = [tensor([[0, 0, 1]]), tensor([[0, 1, 0]])], torch.ones(1, 3, dtype=torch.bool)
    assert survival_by_stage(scores, ones, [2, 1])[-1][0].tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-15)
    assert joint_recall(scores, ones, tensor([[0, 0, 1]], torch.bool), [2, 1]).item() == pytest.approx(0.25, abs=1e-15)


def test_a_dead_stage_before_another_gives_chance() -> None:
    # Item j of 40 by the second stage is left when it is among 30 drawn, with at most 19 of the j better ones.
    generator = torch.Generator().manual_seed(0)
    second, ones = torch.randn(1, 40, generator=generator), torch.ones(1, 40, dtype=torch.bool)
    left = survival_by_stage([torch.zeros(1, 40), second], ones, [30, 20])[-1]
    better = second[0].argsort(descending=True).argsort().tolist()
    expected = [30 / 40 * hypergeom(39, j, 29).cdf(19) for j in better]
    np.testing.assert_allclose(left[0], expected, atol=1e-12)
    dead = survival_by_stage([torch.zeros(1, 40)] * 2, ones, [30, 20])
    np.testing.assert_allclose(torch.cat(dead), np.tile([[0.75], [0.5]], (1, 40)), atol=1e-12)


@pytest.mark.parametrize("size", [64, 200])
def test_beyond_what_can_be_followed_stages_divide_their_quotas_in_proportion(size: int) -> None:
    # 64 items of two scores at each of four stages have too many outcomes, 200 items are too many.
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, 2, (3, size), generator=generator).float() for _ in range(4)]
    mask, quotas = torch.ones(3, size, dtype=torch.bool), [size * 3 // 4, size // 2, size // 3, size // 4]
    alive = mask.double()
    for values, quota, left in zip(scores, quotas, survival_by_stage(scores, mask, quotas), strict=True):
        alive = survival(values, alive, quota)
        torch.testing.assert_close(left, alive, rtol=0, atol=0)


def test_a_request_with_too_many_outcomes_changes_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, 2, (2, 64), generator=generator).float() for _ in range(4)]
    mask, quotas = torch.ones(2, 64, dtype=torch.bool), [48, 32, 24, 12]
    mask[1, 8:] = False
    few = [value[:, :8] for value in scores]
    together = survival_by_stage(scores, mask, quotas)
    alone = survival_by_stage([value[1:] for value in few], mask[1:, :8], quotas)
    for left, own in zip(together, alone, strict=True):
        torch.testing.assert_close(left[1:, :8], own, rtol=0, atol=1e-12)


def test_negative_labels_are_refused_where_they_would_be_gains() -> None:
    scores, labels = tensor([[1.0, 2.0]]), tensor([[1, -1]], torch.int64)
    with pytest.raises(ValueError, match="labels are gains, 0 or more, and hold -1"):
        ndcg(scores, labels, FOUR[:, :2], 10)
    assert ndcg(scores, labels, tensor([[1, 0]], torch.bool), 10).item() == 1  # a missing item's does not matter


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": tensor([[1, 1, 0]])}, TypeError, "mask holds torch.float32, not bool"),
        ({"mask": [[True, True, False]]}, TypeError, "mask is a list"),
        ({"relevant": tensor([[1, 0, 0]], torch.int64)}, TypeError, "relevant holds torch.int64, not bool"),
        ({"labels": [[3, 2, 1]]}, TypeError, "labels is a list"),
        ({"labels": tensor([[3, 2]], torch.int64)}, ValueError, r"labels has shape \(1, 2\), not \[R, N\] = \(1, 3\)"),
        ({"scores": {"first": tensor([[1, 2, 3]])}}, ValueError, "scores lacks stage 'second'"),
        ({"scores": dict.fromkeys(QUOTAS, tensor([1, 2, 3]))}, ValueError, r"has shape \(3,\)"),
        ({"scores": dict.fromkeys(QUOTAS, tensor([[1, np.nan, 3]]))}, ValueError, "holds NaN where mask is True"),
    ],
)
def test_what_are_no_arrays_of_a_cascade_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    sound: dict[str, Any] = {
        "scores": dict.fromkeys(QUOTAS, tensor([[1, 2, np.nan]])),
        "labels": tensor([[3, 2, 1]], torch.int64),
        "mask": tensor([[1, 1, 0]], torch.bool),
        "relevant": tensor([[1, 0, 0]], torch.bool),
    }
    assert cascade_metrics(**sound, quotas=QUOTAS, num_relevant=4)["joint_recall@4@3"].item() == 1
    with pytest.raises(error, match=text):
        cascade_metrics(**sound | change, quotas=QUOTAS, num_relevant=4)


def test_infinite_scores_are_scores() -> None:
    """A present item with -inf is behind all others, but before those that are missing."""
    scores, mask = tensor([[-torch.inf, 5, 1, -torch.inf]]), torch.tensor([[True, False, True, True]])
    relevant = torch.tensor([[True, False, False, False]])
    assert recall(scores, mask, relevant, 2).item() == 0.5  # the two with -inf share the second of two
    assert recall(scores[:, [0, 2, 3]], mask[:, [0, 2, 3]], relevant[:, [0, 2, 3]], 2).item() == 0.5
    labels = torch.tensor([[3, 9, 2, 1]])
    with_missing, without = (ndcg(s, y, m, 2) for s, y, m in (
        (scores, labels, mask), (scores[:, [0, 2, 3]], labels[:, [0, 2, 3]], mask[:, [0, 2, 3]])
    ))  # fmt: skip
    assert (
        with_missing.item()
        == without.item()
        == pytest.approx((2 + (3 + 1) / 2 / np.log2(3)) / (3 + 2 / np.log2(3)), rel=1e-12)
    )
    # Of the three pairs one agrees, one does not, and one is tied in the scores.
    assert kendall_tau(scores, labels, mask).item() == pytest.approx((1 - 1) / (2 * 3) ** 0.5, abs=1e-12)


def test_the_best_of_the_ground_truth_count() -> None:
    """K = 2 of three relevant items: the best label, and half of each of two that tie behind it."""
    scores, mask = tensor([[4, 3, 2, 1]]), torch.ones(1, 4, dtype=torch.bool)
    relevant, labels = torch.tensor([[False, True, True, True]]), torch.tensor([[0, 5, 7, 5]])
    found = cascade_metrics({"only": scores}, labels, mask, relevant, {"only": 2}, num_relevant=2)
    assert found["joint_recall@2@2"].item() == 0.5 / 2  # kept: the item of no worth, and one of the tied
    found = cascade_metrics({"only": scores}, labels, mask, relevant, {"only": 3}, num_relevant=2)
    assert found["only_recall@2@3"].item() == found["survival_after_only"].item() == 1.5 / 2


def test_labels_are_compared_as_whole_numbers() -> None:
    labels, mask = torch.tensor([[2**53 + 1, 2**53, 0]]), torch.ones(1, 3, dtype=torch.bool)
    assert kendall_tau(tensor([[3, 2, 1]]), labels, mask).item() == 1


@pytest.mark.parametrize("cut", [0, -1, 1.5, True])
def test_cuts_are_whole_numbers_above_0(cut: Any) -> None:
    scores, mask = tensor([[3, 2, 1]]), torch.ones(1, 3, dtype=torch.bool)
    for metric in (lambda: recall(scores, mask, mask, cut), lambda: ndcg(scores, mask.long(), mask, cut)):
        with pytest.raises(ValueError, match="not a whole number above 0"):
            metric()
    with pytest.raises(TypeError, match=r"scores\[0\] holds torch.int64, not a floating type"):
        recall(scores.long(), mask, mask, 1)


def test_requests_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {stage: torch.randn(5, 8, generator=generator) for stage in QUOTAS}
    labels = torch.randint(0, 4, (5, 8), generator=generator)
    mask, relevant = (torch.rand(5, 8, generator=generator) < 0.6 for _ in range(2))
    together = metrics_of(Request(scores, labels, mask, relevant))
    for row in range(5):
        one = slice(row, row + 1)
        alone = Request({stage: values[one] for stage, values in scores.items()}, labels[one], mask[one], relevant[one])
        assert_same({name: values[one] for name, values in together.items()}, metrics_of(alone))


# ---- properties ------------------------------------------------------------------------------------------------------


@quick
@given(requests(), st.sampled_from([np.nan, np.inf, -np.inf, 7.0]), st.sampled_from([-(2**62), 0, 2**62]))
def test_masked_is_removed(request: Request, score: float, label: int) -> None:
    hidden = request._replace(
        scores={stage: values.masked_fill(~request.mask, score) for stage, values in request.scores.items()},
        labels=request.labels.masked_fill(~request.mask, label),
    )
    present = request.mask[0].nonzero().squeeze(-1)
    if len(present):
        assert_same(metrics_of(hidden), metrics_of(rearranged(request, present)))
    else:
        assert all(values.isnan().all() for values in metrics_of(hidden).values())


@quick
@given(requests(), st.randoms(use_true_random=False))
def test_permuting_the_items_changes_nothing(request: Request, random: "np.random.Generator") -> None:
    order = list(range(request.mask.shape[1]))
    random.shuffle(order)
    assert_same(metrics_of(rearranged(request, torch.tensor(order))), metrics_of(request))


@quick
@given(requests(), st.integers(1, 6))
def test_tied_recall_is_the_mean_over_all_orders_of_the_tied(request: Request, quota: int) -> None:
    """Some places are hidden, so that at most five are ordered in every way."""
    mask = request.mask & (torch.arange(request.mask.shape[1]) < 5)
    scores, places = request.scores["first"], range(min(5, request.mask.shape[1]))
    shared = recall(scores, mask, request.relevant, quota)
    nudges = torch.zeros_like(scores, dtype=torch.float64)
    recalls = []
    for order in itertools.permutations(places):
        nudges[0, list(order)] = 1e-6 * torch.arange(len(order), dtype=torch.float64)
        recalls.append(recall(scores.double() + nudges, mask, request.relevant, quota))
    torch.testing.assert_close(shared, torch.stack(recalls).mean(dim=0), equal_nan=True)


@quick
@given(requests(), st.integers(1, 12))
def test_constant_scores_give_chance(request: Request, quota: int) -> None:
    constant = recall(torch.zeros_like(request.scores["first"]), request.mask, request.relevant, quota)
    if (request.mask & request.relevant).any():
        assert constant.item() == pytest.approx(min(quota / int(request.mask.sum()), 1))


@quick
@given(requests())
def test_recall_is_the_cascade_of_one_stage_and_only_falls_with_more_stages(request: Request) -> None:
    values = metrics_of(request)
    joint, alone = values["joint_recall@4@3"], values["first_recall@4@5"]
    assert not (joint > alone + 1e-12).any()
    if (request.mask & request.relevant).any():
        assert 0 <= joint.item() <= alone.item() <= 1
    else:
        assert joint.isnan() and alone.isnan()


@quick
@given(requests())
def test_ground_truth_is_only_lost_along_the_cascade(request: Request) -> None:
    values = metrics_of(request)
    after_first, after_last = values["survival_after_first"], values["survival_after_second"]
    assert not (after_last > after_first + 1e-12).any()
    assert_same({"first": after_first}, {"first": values["first_recall@4@5"]})  # it sees all items
    assert_same({"last": after_last}, {"last": values["joint_recall@4@3"]})


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_only_the_order_of_the_scores_counts(scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.stack([torch.randperm(10, generator=generator) for _ in range(3)]).float()
    labels = torch.randint(0, 5, (3, 10), generator=generator)
    ones = torch.ones(3, 10, dtype=torch.bool)
    relevant = torch.rand(3, 10, generator=generator) < 0.5
    scaled = Request(dict.fromkeys(QUOTAS, base * scale), labels, ones, relevant)
    assert_same(metrics_of(scaled), metrics_of(scaled._replace(scores=dict.fromkeys(QUOTAS, base))))


def test_without_ground_truth_recall_is_not_defined() -> None:
    nothing = torch.zeros_like(FOUR)
    scores = tensor([[4.0, 3.0, 2.0, 1.0]])
    assert recall(scores, FOUR, nothing, 2).isnan().all()
    assert recall(scores, ~FIRST_TWO, FIRST_TWO, 2).isnan().all()  # all of the ground truth is missing
    assert joint_recall([scores, scores], FOUR, nothing, [3, 2]).isnan().all()


@pytest.mark.parametrize("metric", [ndcg, lambda scores, labels, mask, _: kendall_tau(scores, labels, mask)])
def test_all_masked_is_not_defined(metric: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    labels = tensor([[1, 2, 3, 4]], torch.int64)
    assert metric(tensor([[1.0, 2.0, 3.0, torch.nan]]), labels, torch.zeros_like(FOUR), 10).isnan().all()


def test_equal_labels() -> None:
    scores, ones = tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4, dtype=torch.int64)
    assert kendall_tau(scores, ones, FOUR).isnan().all()
    assert kendall_tau(torch.zeros_like(scores), tensor([[1, 2, 3, 4]], torch.int64), FOUR).isnan().all()
    assert ndcg(scores, ones, FOUR, 10).tolist() == [1.0]
    assert ndcg(scores, 0 * ones, FOUR, 10).tolist() == [0.0]


def test_names_of_the_tables() -> None:
    ones = torch.ones(1, 40, dtype=torch.bool)
    scores = dict.fromkeys(TWO_STAGE.stage_names, torch.rand(1, 40))
    quotas = {stage.name: stage.keep for stage in TWO_STAGE.stages}
    names = list(cascade_metrics(scores, torch.zeros(1, 40, dtype=torch.int64), ones, ones, quotas, 10))
    assert names == [
        "joint_recall@10@20",
        "retrieval_recall@10@30",
        "retrieval_ndcg@10",
        "retrieval_kendall_tau",
        "rank_recall@10@20",
        "rank_ndcg@10",
        "rank_kendall_tau",
        "survival_after_retrieval",
        "survival_after_rank",
    ]
