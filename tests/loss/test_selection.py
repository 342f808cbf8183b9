"""The relaxed sorting operators and the label matrix."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_components.loss.sorting import SORTING_OPERATORS, label_permutation, label_split, neural_sort, soft_sort
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


def test_names_on_the_command_line() -> None:
    assert {"neural_sort": neural_sort, "soft_sort": soft_sort} == SORTING_OPERATORS
