"""The kernels the losses share, on cases small enough to work out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from deep_components.batch import Targets
from deep_components.loss.functional import (
    ground_truth_bce,
    groupwise_ranknet,
    lambda_loss,
    masked_mean,
    num_ground_truth,
    pairs,
    pairwise_bce,
    ranking_distillation,
    soft_top_k,
    squared_error,
    sum_of_terms,
    top_k_mask,
    without_missing,
)

NAN = float("nan")


def floats(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bools(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def make_targets(group: list[list[int]], mask: list[list[int]], labels: list[list[int]] | None = None) -> Targets:
    return Targets(labels=torch.tensor(labels or group), mask=bools(mask), group=torch.tensor(group))


def gradient(value: Tensor, leaf: Tensor) -> list[list[float]]:
    (grad,) = torch.autograd.grad(value, leaf)
    return grad.tolist()


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# ---- reductions ------------------------------------------------------------------------------------------------------


def test_masked_mean_pools_the_batch() -> None:
    assert masked_mean(floats([[1, 2, NAN], [6, NAN, NAN]]), bools([[1, 1, 0], [1, 0, 0]])).item() == 3


def test_masked_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    values = floats([[1, NAN]]).requires_grad_()
    mean = masked_mean(values, bools([[0, 0]]))
    assert mean.item() == 0
    assert gradient(mean, values) == [[0, 0]]


def test_masked_mean_counts_a_mask_that_it_broadcasts() -> None:
    assert masked_mean(floats([[1, 2], [3, 4]]), torch.tensor([True, False])).item() == 2


def test_without_missing_replaces_missing_scores() -> None:
    scores = floats([[1, NAN, -math.inf]]).requires_grad_()
    clean = without_missing(scores, bools([[1, 0, 0]]))
    assert clean.tolist() == [[1, 0, 0]]
    assert gradient(clean.sum(), scores) == [[1, 0, 0]]


def test_num_ground_truth_counts_present_items_up_to_the_limit() -> None:
    targets = make_targets([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]])
    assert num_ground_truth(targets, 10).tolist() == [3, 2, 1]
    assert num_ground_truth(targets, 2).tolist() == [2, 2, 1]


def test_sum_of_terms_keeps_the_terms_without_gradient() -> None:
    one, two = floats(1.5).requires_grad_(), floats(2.5)
    terms = sum_of_terms({"one": one, "two": two})
    assert {name: (term.item(), term.requires_grad) for name, term in terms.items()} == {
        "loss": (4, True), "one": (1.5, False), "two": (2.5, False)
    }  # fmt: skip


# ---- top k of the scores ---------------------------------------------------------------------------------------------


def test_top_k_mask_takes_candidates_only_and_all_where_there_are_fewer() -> None:
    scores, candidates = floats([[5, NAN, 3, 4], [1, 2, 3, 4]]), bools([[1, 0, 1, 1], [0, 1, 0, 0]])
    assert top_k_mask(scores, candidates, 2).tolist() == [[True, False, False, True], [False, True, False, False]]
    assert torch.equal(top_k_mask(scores, candidates, 30), candidates)
    assert not top_k_mask(scores, candidates & False, 2).any()


def test_top_k_mask_of_equal_scores_are_the_first() -> None:
    assert top_k_mask(torch.zeros(1, 40), torch.ones(1, 40, dtype=torch.bool), 3)[0].nonzero().flatten().tolist() == [
        0,
        1,
        2,
    ]


def test_soft_top_k_by_hand() -> None:
    scores = floats([[5, 1, 3]])
    expected = [[1 / (1 + math.exp(-(score - 3) / 2)) for score in (5, 1, 3)]]
    torch.testing.assert_close(soft_top_k(scores, bools([[1, 1, 1]]), 2, 2.0), floats(expected))


def test_soft_top_k_cuts_at_the_smallest_where_fewer_are_present() -> None:
    chosen = soft_top_k(floats([[5, -9, 3]]), bools([[1, 0, 1]]), 30, 2.0)
    torch.testing.assert_close(chosen, floats([[1 / (1 + math.exp(-1)), 0, 0.5]]))
    assert soft_top_k(floats([[5, 3]]), bools([[0, 0]]), 1, 1e-3).tolist() == [[0, 0]]


def test_soft_top_k_has_a_gradient_through_its_threshold() -> None:
    scores = floats([[5, 1, 3]]).requires_grad_()
    first = soft_top_k(scores, bools([[1, 1, 1]]), 2, 2.0)[0, 0]
    slope = first.item() * (1 - first.item()) / 2
    torch.testing.assert_close(floats(gradient(first, scores)), floats([[slope, 0, -slope]]))


@pytest.mark.parametrize("num_missing", [1, 15, 30])
def test_missing_items_do_not_choose_the_threshold_among_equal_scores(num_missing: int) -> None:
    def slopes(scores: Tensor, mask: Tensor) -> Tensor:
        leaf = scores.clone().requires_grad_()
        soft_top_k(leaf, mask, 1, 2.0).sum().backward()
        assert leaf.grad is not None
        return leaf.grad[:, -4:]

    tied = floats([[1, 1, 0.5, 1]])
    scores = torch.cat([torch.zeros(1, num_missing, dtype=torch.float64), tied], dim=-1)
    mask = torch.arange(num_missing + 4).unsqueeze(0) >= num_missing
    torch.testing.assert_close(slopes(scores, mask), slopes(tied, torch.ones_like(tied, dtype=torch.bool)))


# ---- pointwise -------------------------------------------------------------------------------------------------------


def test_ground_truth_bce_is_a_mean_over_the_visible_items() -> None:
    targets = make_targets([[0, 1, 1], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]])
    scores, visible = floats([[2, -1, NAN], [0.5, NAN, NAN]]), bools([[1, 1, 0], [1, 0, 0]])
    expected = (softplus(-2) + softplus(-1) + softplus(0.5)) / 3
    assert ground_truth_bce(scores, targets, visible).item() == pytest.approx(expected, rel=1e-12)


def test_squared_error_teaches_the_student_only() -> None:
    student, teacher = floats([[1, 2, NAN]]).requires_grad_(), floats([[4, 2.5, 7]]).requires_grad_()
    error = squared_error(student, teacher, bools([[1, 1, 0]]))
    assert error.item() == (9 + 0.25) / 2
    assert gradient(error, student) == [[-3, -0.5, 0]]
    assert not torch.autograd.grad(squared_error(student, teacher, bools([[1, 1, 0]])), teacher, allow_unused=True)[0]


def test_ranking_distillation_by_hand() -> None:
    # Candidates 0..3; the teacher orders them 3, 1, 0, 2. Best two: 3 and 1; worst: 2.
    student, teacher = floats([[1, 2, 4, 8, 100]]).requires_grad_(), floats([[0.3, 0.5, 0.1, 0.9, 2]]).requires_grad_()
    distilled = ranking_distillation(student, teacher, bools([[1, 1, 1, 1, 0]]), num_best=2, num_worst=1)
    margin = (8 + 2) / 2 - 4
    assert distilled.item() == pytest.approx(softplus(-margin), rel=1e-12)
    slope = -1 / (1 + math.exp(margin))
    torch.testing.assert_close(floats(gradient(distilled, student)), slope * floats([[0, 0.5, -1, 0.5, 0]]))


def test_ranking_distillation_takes_all_of_few_candidates_and_skips_requests_without() -> None:
    student, teacher = floats([[3, 1, 7], [NAN, NAN, NAN]]), floats([[1, 2, 3], [NAN, NAN, NAN]])
    candidates = bools([[1, 1, 0], [0, 0, 0]])
    # Best and worst are both the same two items: margin 0 in the one request that counts.
    assert ranking_distillation(student, teacher, candidates, 20, 10).item() == pytest.approx(math.log(2))
    assert ranking_distillation(student, teacher, candidates & False, 20, 10).item() == 0


# ---- pairwise --------------------------------------------------------------------------------------------------------


def test_pairs_are_of_two_present_items() -> None:
    assert pairs(bools([[1, 0, 1]])).tolist() == [[[True, False, True], [False] * 3, [True, False, True]]]


def test_pairwise_bce_by_hand() -> None:
    losses = pairwise_bce(floats([[3, 1]]), torch.tensor([[4, 4]]))
    torch.testing.assert_close(losses, floats([[[softplus(0), softplus(2)], [softplus(-2), softplus(0)]]]))
    losses = pairwise_bce(floats([[3, 1]]), torch.tensor([[5, 4]]))
    torch.testing.assert_close(losses, floats([[[softplus(0), softplus(-2)], [softplus(-2), softplus(0)]]]))


def test_groupwise_ranknet_by_hand() -> None:
    # Groups 0: {5}, 1: {1, 2}, 2: {4}. Means over the pairs of each group but the last.
    targets = make_targets([[0, 1, 1, 2]], [[1, 1, 1, 1]])
    first = (softplus(1 - 5) + softplus(2 - 5) + softplus(4 - 5)) / 3
    second = (softplus(4 - 1) + softplus(4 - 2)) / 2
    assert groupwise_ranknet(floats([[5, 1, 2, 4]]), targets).item() == pytest.approx(first + second, rel=1e-12)


def test_groupwise_ranknet_pools_the_pairs_of_a_group_over_the_batch() -> None:
    # The second request's items are of other groups, its missing item of none.
    targets = make_targets([[0, 1, 1], [2, -1, 0]], [[1, 1, 1], [1, 0, 1]])
    expected = (softplus(1 - 5) + softplus(2 - 5) + softplus(3 - 4)) / 3
    assert groupwise_ranknet(floats([[5, 1, 2], [3, NAN, 4]]), targets).item() == pytest.approx(expected, rel=1e-12)


def test_groupwise_ranknet_where_all_requests_share_a_row_of_groups() -> None:
    # float32 sums slot by slot, bit for bit; the same numbers up to rounding where each request has a row of its own.
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor([0] * 10 + [1] * 10 + [2] * 10 + [3] * 10)
    mask = torch.rand(32, 40, generator=generator) < 0.9
    scores = torch.randn(32, 40, generator=generator).requires_grad_()
    clean = torch.where(mask, scores, 0)
    ordered = mask.unsqueeze(-1) & mask.unsqueeze(-2) & (row.unsqueeze(-1) < row)
    same = (row.unsqueeze(-1) == row).float()
    total = torch.where(ordered, nn.functional.softplus(clean.unsqueeze(-2) - clean.unsqueeze(-1)), 0).sum(dim=(0, 2))
    expected = (total @ same / (ordered.sum(dim=(0, 2)).float() @ same).clamp(min=1) / same.sum(dim=-1)).sum()
    slope = torch.autograd.grad(expected, scores)[0]

    shared = groupwise_ranknet(scores, Targets(torch.zeros(32, 40), mask, row.expand(32, -1)))
    assert torch.equal(shared, expected)
    assert torch.equal(torch.autograd.grad(shared, scores)[0], slope)
    own = groupwise_ranknet(scores, Targets(torch.zeros(32, 40), mask, row.expand(32, -1).clone()))
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(torch.autograd.grad(own, scores)[0], slope)


def test_groupwise_ranknet_of_one_group_is_zero() -> None:
    scores = floats([[1, 2]]).requires_grad_()
    loss = groupwise_ranknet(scores, make_targets([[0, 0]], [[1, 1]]))
    assert loss.item() == 0
    assert gradient(loss, scores) == [[0, 0]]


def discount(x: float) -> float:
    return 1 / math.log(x + 1)


def test_lambda_loss_by_hand() -> None:
    # Labels 3 and 1; the scores order them the wrong way round: ranks 2 and 1.
    ideal = 3 * discount(1) + 1 * discount(2)
    u, v = discount(1) - discount(2), discount(1) - discount(2)
    w = (3 - 1) / ideal * (0.2 * u + 0.8 * v)
    expected = w * (softplus(-(1 - 2)) + softplus(2 - 1))  # both orders of the pair
    targets = make_targets([[0, 1]], [[1, 1]], [[3, 1]])
    assert lambda_loss(floats([[1, 2]]), targets, 30).item() == pytest.approx(expected, rel=1e-12)


def test_lambda_loss_beyond_the_cutoff() -> None:
    # Three items ranked 1, 2, 3 and a cutoff of 1: pairs with rank 1 have u and v; of the pair (2, 3) neither.
    y, ideal = (0, 4, 2), 4 * discount(1) + 2 * discount(2)
    one_two = (4 / ideal) * (0.2 * (discount(1) - discount(2)) + 0.8 * discount(1))
    one_three = (2 / ideal) * (0.2 * (discount(2) - discount(3)) + 0.8 * discount(1))
    scores = (3.0, 2.0, 1.0)
    expected = 2 * one_two * softplus(scores[0] - scores[1]) + 2 * one_three * softplus(scores[0] - scores[2])
    targets = make_targets([[0, 0, 1]], [[1, 1, 1]], [list(y)])
    assert lambda_loss(floats([scores]), targets, 1).item() == pytest.approx(expected, rel=1e-12)


def test_lambda_loss_is_a_mean_over_requests_with_items() -> None:
    one = make_targets([[0, 1]], [[1, 1]], [[3, 1]])
    three = make_targets([[0, 1]] * 3, [[1, 1], [0, 0], [1, 0]], [[3, 1], [3, 1], [3, 1]])
    alone = lambda_loss(floats([[1, 2]]), one, 30).item()
    # The second request is empty and does not count; the third has no pair and counts as 0.
    assert lambda_loss(floats([[1, 2], [NAN, NAN], [1, NAN]]), three, 30).item() == pytest.approx(alone / 2, rel=1e-12)


def test_lambda_loss_without_any_gain_is_zero() -> None:
    targets = make_targets([[0, 1]], [[1, 1]], [[0, 0]])
    assert lambda_loss(floats([[1, 2]]), targets, 30).item() == 0


def test_lambda_loss_a_negative_label_has_no_gain_and_still_its_order() -> None:
    scores = floats([[1, 2, 3]])
    negative, zero = (make_targets([[0, 1, 1]], [[1, 1, 1]], [[3, 1, last]]) for last in (-5, 0))
    assert lambda_loss(scores, negative, 30).item() == lambda_loss(scores, zero, 30).item()
