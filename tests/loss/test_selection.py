"""The operators, the label matrix, and the cross-entropies between the two."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_components.loss import selection
from deep_components.loss.selection import (
    EPSILON,
    PERMUTATION_OPERATORS,
    SELECTION_OPERATORS,
    Selection,
    end_to_end_cross_entropy,
    label_permutation,
    label_split,
    mean_of_rows,
    neural_sort,
    select,
    selection_cross_entropy,
    soft_sort,
    sorting_cross_entropy,
    split,
)
from tests.loss import reference

Sort = Callable[[Tensor, Tensor, float], Tensor]
each_sort = pytest.mark.parametrize("sort", [neural_sort, soft_sort])
sizes = pytest.mark.parametrize("num_items", [1, 2, 5, 40, 200])
NAIVE: dict[Sort, Callable[[list[float], float], np.ndarray]] = {
    neural_sort: reference.neural_sort,
    soft_sort: reference.soft_sort,
}


def random_scores(num_items: int, num_requests: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(num_requests, num_items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_mask(num_items: int, num_requests: int = 3, seed: int = 1) -> Tensor:
    """Of the requests, the first is complete and the last empty."""
    mask = torch.rand(num_requests, num_items, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0], mask[-1] = True, False
    return mask


def tied_labels(num_items: int, num_requests: int = 3, seed: int = 2) -> Tensor:
    return torch.randint(0, 6, (num_requests, num_items), generator=torch.Generator().manual_seed(seed))


def permutation_matrix(scores: Tensor) -> Tensor:
    """[N, N] of one request: row j has its 1 at the j-th largest."""
    return torch.eye(len(scores), dtype=scores.dtype)[scores.argsort(descending=True)]


PERMUTATION = [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]]  # columns sum to 1.1, 1.0, 0.9


def floats(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bools(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


# ---- hand-made -------------------------------------------------------------------------------------------------------


def test_neural_sort_of_two() -> None:
    # N = 2: A = |s_1 - s_2| for both, scaling 1 and -1: softmax(s / t) and softmax(-s / t).
    permutation = neural_sort(torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), 2.0)
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(permutation, torch.tensor([[[first, 1 - first], [1 - first, first]]]))


def test_soft_sort_of_two() -> None:
    # Rows: softmax(-|3 - (1, 3)| / 2) and softmax(-|1 - (1, 3)| / 2).
    permutation = soft_sort(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), 2.0)
    near = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(permutation, torch.tensor([[[1 - near, near], [near, 1 - near]]]))


def test_label_matrix_shares_the_rows_of_ties() -> None:
    labels, mask = torch.tensor([[5, 9, 5, 7]]), torch.tensor([[True, True, True, True]])
    expected = [[0, 1, 0, 0], [0, 0, 0, 1], [0.5, 0, 0.5, 0], [0.5, 0, 0.5, 0]]
    assert label_permutation(labels, mask, torch.float32).tolist() == [expected]


def test_label_matrix_leaves_out_missing_items() -> None:
    labels, mask = torch.tensor([[5, 9, 5, 9]]), torch.tensor([[True, True, True, False]])
    expected = [[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]]
    assert label_permutation(labels, mask, torch.float32).tolist() == [expected]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("num_items", [1, 7, 40])
def test_label_split_sums_the_rows_of_the_label_matrix(num_items: int, repeated: bool) -> None:
    labels, mask = tied_labels(num_items), ragged_mask(num_items)
    matrix = label_permutation(labels, mask, torch.float64)
    matrix = (matrix > 1e-3).double() if repeated else matrix  # spec: Y > 1e-3
    for k in (0, 1, 3, num_items + 2):
        first = torch.full((len(labels),), k)
        split = label_split(labels, mask, first, torch.float64, repeated)
        torch.testing.assert_close(split.top, matrix[:, :k].sum(dim=1), rtol=0, atol=1e-12)
        torch.testing.assert_close(split.rest, matrix[:, k:].sum(dim=1), rtol=0, atol=1e-12)


# ---- against the plain formulas --------------------------------------------------------------------------------------


@each_sort
@sizes
@pytest.mark.parametrize("tau", [0.1, 1.0, 50.0])
def test_equals_the_formula(sort: Sort, num_items: int, tau: float) -> None:
    scores, mask = random_scores(num_items), ragged_mask(num_items)
    for row, permutation in enumerate(sort(scores, mask, tau)):
        present, n = mask[row].numpy(), int(mask[row].sum())
        expected = np.zeros((num_items, num_items))
        if n:
            expected[:n, present] = NAIVE[sort](scores[row, present].tolist(), tau)
        np.testing.assert_allclose(permutation.numpy(), expected, rtol=1e-9, atol=1e-12)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_matrix_is_neural_sort_of_the_labels(num_items: int, dtype: torch.dtype) -> None:
    labels, mask = tied_labels(num_items), ragged_mask(num_items)
    assert torch.equal(label_permutation(labels, mask, dtype), neural_sort(labels.to(dtype), mask, 1e-4))


# ---- properties ------------------------------------------------------------------------------------------------------


@each_sort
@sizes
def test_rows_are_distributions_over_the_present_items(sort: Sort, num_items: int) -> None:
    mask = ragged_mask(num_items)
    permutation = sort(random_scores(num_items), mask, 1.0)
    rows = torch.arange(num_items) < mask.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(permutation.sum(dim=-1), rows.double())
    assert (permutation >= 0).all()
    assert (permutation[~rows] == 0).all()
    assert (permutation.transpose(-1, -2)[~mask] == 0).all()


@sizes
def test_rows_and_columns_of_the_label_matrix_sum_to_one(num_items: int) -> None:
    mask = ragged_mask(num_items)
    matrix = label_permutation(tied_labels(num_items), mask, torch.float64)
    torch.testing.assert_close(matrix.sum(dim=-2), mask.double())
    torch.testing.assert_close(matrix.sum(dim=-1), mask.double().sort(dim=-1, descending=True).values)


@each_sort
@sizes
def test_tends_to_the_permutation_as_tau_tends_to_zero(sort: Sort, num_items: int) -> None:
    scores = torch.randperm(num_items, generator=torch.Generator().manual_seed(0)).double().unsqueeze(0)
    permutation = sort(scores, torch.ones_like(scores, dtype=torch.bool), 1e-3)
    assert torch.equal(permutation[0], permutation_matrix(scores[0]))


@each_sort
def test_tends_to_uniform_rows_as_tau_grows(sort: Sort) -> None:
    scores = random_scores(5)
    permutation = sort(scores, torch.ones_like(scores, dtype=torch.bool), 1e9)
    torch.testing.assert_close(permutation, torch.full_like(permutation, 1 / 5), rtol=0, atol=1e-7)


@each_sort
def test_only_differences_of_scores_count(sort: Sort) -> None:
    scores, mask = random_scores(12), ragged_mask(12)
    torch.testing.assert_close(sort(scores + 100, mask, 1.0), sort(scores, mask, 1.0), rtol=1e-9, atol=1e-12)


@each_sort
def test_tau_is_in_the_unit_of_the_scores(sort: Sort) -> None:
    scores, mask = random_scores(12), ragged_mask(12)
    torch.testing.assert_close(sort(scores * 8, mask, 8.0), sort(scores, mask, 1.0))


@each_sort
def test_columns_follow_the_items(sort: Sort) -> None:
    scores, mask, order = random_scores(12), ragged_mask(12), torch.randperm(12)
    permuted = sort(scores[:, order], mask[:, order], 1.0)
    torch.testing.assert_close(permuted, sort(scores, mask, 1.0)[..., order], rtol=1e-9, atol=1e-12)


@each_sort
def test_missing_scores_have_no_influence(sort: Sort) -> None:
    scores, mask = random_scores(12), ragged_mask(12)
    for junk in (float("nan"), float("inf"), -float("inf"), 1e300):
        spoilt = torch.where(mask, scores, junk).requires_grad_()
        permutation = sort(spoilt, mask, 1.0)
        assert torch.equal(permutation, sort(scores, mask, 1.0))
        (permutation**2).sum().backward()
        assert spoilt.grad is not None
        assert spoilt.grad.isfinite().all()
        assert (spoilt.grad[~mask] == 0).all()


@each_sort
@pytest.mark.parametrize("num_missing", [1, 15, 30])
def test_missing_items_do_not_order_the_equal_scores(sort: Sort, num_missing: int) -> None:
    tied = torch.tensor([[1.0, 1.0, 0.5, 1.0]], dtype=torch.float64)
    scores = torch.cat([torch.zeros(1, num_missing, dtype=torch.float64), tied], dim=-1)
    mask = torch.arange(num_missing + 4).unsqueeze(0) >= num_missing
    weights = torch.arange(1, 5).double() ** 2

    def of_first_row(scores: Tensor, mask: Tensor) -> Tensor:
        leaf = scores.clone().requires_grad_()
        (sort(leaf, mask, 1.0)[:, 0, -4:] * weights).sum().backward()
        assert leaf.grad is not None
        return leaf.grad[:, -4:]

    torch.testing.assert_close(of_first_row(scores, mask), of_first_row(tied, torch.ones_like(tied, dtype=torch.bool)))


@each_sort
def test_gradients(sort: Sort) -> None:
    scores, mask = random_scores(5, seed=3).requires_grad_(), ragged_mask(5)
    assert torch.autograd.gradcheck(lambda values: sort(values, mask, 1.0), (scores,))


def written_out(scores: Tensor, mask: Tensor) -> Tensor:
    """NeuralSort of complete requests by its formula, which autograd differentiates; |x| has the gradient 0 at 0."""
    num_items = scores.shape[-1]
    scaling = num_items + 1 - 2 * torch.arange(1, num_items + 1, dtype=scores.dtype)
    distances = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs().sum(dim=-1)
    return (scaling.unsqueeze(-1) * scores.unsqueeze(-2) - distances.unsqueeze(-2)).softmax(dim=-1)


@pytest.mark.parametrize("num_items", [1, 2, 5, 40, 200])
def test_the_gradient_of_neural_sort_is_that_of_its_formula_with_ties_too(num_items: int) -> None:
    tied = (3 * random_scores(num_items)).round() / 3
    tied[1] = 0.25  # all of them
    weights = random_scores(num_items**2, seed=5).view(3, num_items, num_items)
    complete, grads = torch.ones_like(tied, dtype=torch.bool), list[Tensor]()
    for sort in (lambda scores, mask: neural_sort(scores, mask, 1.0), written_out):
        scores = tied.clone().requires_grad_()
        (sort(scores, complete) * weights).sum().backward()
        assert scores.grad is not None
        grads.append(scores.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@each_sort
def test_scores_that_are_no_numbers_are_not_hidden(sort: Sort) -> None:
    scores, mask = random_scores(12), ragged_mask(12)
    scores[:, 3] = math.nan
    mask[:2, 3] = True
    first_rows = sort(scores, mask, 1.0)[:2, 0]
    assert first_rows[mask[:2]].isnan().all()


@each_sort
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(sort: Sort, dtype: torch.dtype) -> None:
    assert sort(random_scores(4).to(dtype), ragged_mask(4), 1.0).dtype == dtype
    assert label_permutation(tied_labels(4), ragged_mask(4), dtype).dtype == dtype


@each_sort
def test_extreme_scores_in_single_precision(sort: Sort) -> None:
    scores = (1e4 * random_scores(40).sign()).float().requires_grad_()
    permutation = sort(scores, ragged_mask(40), 1.0)
    (permutation**2).sum().backward()
    assert permutation.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_label_matrix_ignores_missing_labels_and_has_no_gradient() -> None:
    labels, mask = tied_labels(12), ragged_mask(12)
    for junk in (2**63 - 1, -(2**63), 3):
        spoilt = torch.where(mask, labels, junk)
        assert torch.equal(
            label_permutation(spoilt, mask, torch.float64), label_permutation(labels, mask, torch.float64)
        )
    assert not label_permutation(labels, mask, torch.float64).requires_grad


# ---- selections ------------------------------------------------------------------------------------------------------

each_operator = pytest.mark.parametrize("name", SELECTION_OPERATORS)


@each_operator
def test_a_selection_is_about_the_present_items(name: str) -> None:
    scores, mask, k = random_scores(12), ragged_mask(12), torch.tensor([1, 3, 20])
    chosen = SELECTION_OPERATORS[name](torch.where(mask, scores, math.nan), mask, k, 1.0)
    torch.testing.assert_close(chosen.top + chosen.rest, mask.double(), rtol=0, atol=1e-4)
    assert (chosen.top[~mask] == 0).all()
    assert (chosen.rest[~mask] == 0).all()


@each_operator
def test_a_selection_tends_to_the_k_best(name: str) -> None:
    scores, mask = random_scores(12), ragged_mask(12)
    hard = SELECTION_OPERATORS[name](scores, mask, torch.tensor([1, 3, 20]), 1e-4).top
    for row, k in enumerate([1, 3, 20]):
        expected = sorted(scores[row, mask[row]].tolist(), reverse=True)[:k]
        assert sorted(scores[row, hard[row] > 0.5].tolist(), reverse=True) == expected


@pytest.mark.parametrize("name", PERMUTATION_OPERATORS)
def test_select_at_several_cuts_sorts_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, mask, sorted_scores = random_scores(7), ragged_mask(7), []
    cuts = [torch.tensor([1, 2, 0]), torch.tensor([4, 4, 4])]
    expected = [SELECTION_OPERATORS[name](scores, mask, k, 0.5) for k in cuts]
    operator = PERMUTATION_OPERATORS[name]

    def counting(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
        sorted_scores.append(scores)
        return operator(scores, mask, temperature)

    monkeypatch.setitem(selection.PERMUTATION_OPERATORS, name, counting)
    for chosen, alone in zip(select(name, scores, mask, cuts, 0.5), expected, strict=True):
        assert torch.equal(chosen.top, alone.top)
        assert torch.equal(chosen.rest, alone.rest)
    assert len(sorted_scores) == 1


def test_split_of_every_k() -> None:
    chosen = split(floats([PERMUTATION] * 5), torch.tensor([0, 1, 2, 3, 9]))
    columns = floats([1.1, 1, 0.9]) + EPSILON
    top = floats([[0, 0, 0], [0.7, 0.2, 0.1], [0.9, 0.7, 0.4], [1.1, 1, 0.9], [1.1, 1, 0.9]])
    rest = floats([[1.1, 1, 0.9], [0.4, 0.8, 0.8], [0.2, 0.3, 0.5], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(chosen.top, top / columns)
    torch.testing.assert_close(chosen.rest, rest / columns)


def test_split_has_no_gradient_through_its_divisor() -> None:
    permutation = floats([PERMUTATION]).requires_grad_()
    (grad,) = torch.autograd.grad(split(permutation, torch.tensor([1])).top.sum(), permutation)
    torch.testing.assert_close(grad[0, 0], 1 / (floats([1.1, 1, 0.9]) + EPSILON))
    assert (grad[0, 1:] == 0).all()


def test_epsilon_is_that_of_the_specification() -> None:
    assert EPSILON == 1e-6


def test_mean_of_rows_takes_the_rows_there_are() -> None:
    permutation, mask = floats([PERMUTATION]), bools([[1, 1, 1]])
    torch.testing.assert_close(mean_of_rows(permutation, mask, 2), floats([[0.45, 0.35, 0.2]]))
    torch.testing.assert_close(mean_of_rows(permutation, mask, 30), floats([[1.1 / 3, 1 / 3, 0.9 / 3]]))
    two_of_three = floats([[[0.6, 0, 0.4], [0.4, 0, 0.6], [0, 0, 0]]])
    torch.testing.assert_close(mean_of_rows(two_of_three, bools([[1, 0, 1]]), 30), floats([[0.5, 0, 0.5]]))
    assert mean_of_rows(torch.zeros(1, 3, 3), bools([[0, 0, 0]]), 2).tolist() == [[0, 0, 0]]


def test_selection_cross_entropy() -> None:
    predicted, target = Selection(floats([[0.8]]), floats([[0.3]])), Selection(floats([[0.25]]), floats([[7.0]]))
    expected = -0.25 * math.log(0.8 + 1e-6) - 7 * math.log(0.3 + 1e-6)
    assert selection_cross_entropy(predicted, target).item() == pytest.approx(expected, rel=1e-12)


def test_selection_cross_entropy_of_an_impossible_choice_is_finite() -> None:
    zero, one = floats([[0.0]]), floats([[1.0]])
    assert selection_cross_entropy(Selection(zero, one), Selection(one, zero)).item() == pytest.approx(-math.log(1e-6))


@pytest.mark.parametrize(("gt", "negative"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (3.0, 0.0)])
def test_end_to_end_cross_entropy(gt: float, negative: float) -> None:
    stages = [Selection(floats([[0.8]]), floats([[0.3]])), Selection(floats([[0.5]]), floats([[0.6]]))]
    survives, dropped = 0.8 * 0.5, 1 - (1 - 0.3) * (1 - 0.6)
    expected = -gt * math.log(survives + 1e-6) - negative * math.log(dropped + 1e-6)
    result = end_to_end_cross_entropy(stages, Selection(floats([[gt]]), floats([[9.0]])))
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_sorting_cross_entropy_is_a_mean_over_the_entries_of_the_present() -> None:
    label_rows = floats([[[0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    expected = -(math.log(0.2 + 1e-6) + math.log(0.2 + 1e-6) + math.log(0.5 + 1e-6)) / 9
    total, count = sorting_cross_entropy(floats([PERMUTATION]), label_rows, bools([[1, 1, 1]]))
    assert (total / count).item() == pytest.approx(expected, rel=1e-12)


def test_sorting_cross_entropy_of_two_of_three_items_divides_by_four() -> None:
    permutation, label_rows = (
        floats([[[0.6, 0, 0.4], [0.4, 0, 0.6], [0, 0, 0]]]),
        floats([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]]),
    )
    expected = -2 * math.log(0.4 + 1e-6) / 4
    total, count = sorting_cross_entropy(permutation, label_rows, bools([[1, 0, 1]]))
    assert (total / count).item() == pytest.approx(expected, rel=1e-12)
