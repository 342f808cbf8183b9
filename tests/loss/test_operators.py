"""The operators that select without sorting: against the DFTopK repository's code, and the property matrix of each."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from deep_components.batch import Targets
from deep_components.loss.selection import (
    PERMUTATION_OPERATORS,
    SELECTION_OPERATORS,
    TEMPERATURES,
    Selection,
    SelectionOperator,
    end_to_end_cross_entropy,
)
from tests.loss import reference
from tests.loss.methods import Batch, Method, step

DIRECT = tuple(SELECTION_OPERATORS.keys() - PERMUTATION_OPERATORS.keys())
FIXED_SUM = ("lapsum", "lml", "sparse_topk")
EXACT = ("dftopk", "lapsum", "lml")
each = pytest.mark.parametrize("name", sorted(DIRECT))
each_with_fixed_sum = pytest.mark.parametrize("name", FIXED_SUM)
each_exact = pytest.mark.parametrize("name", EXACT)


def scores_of(num_requests: int, num_items: int, scale: float = 1.0, ties: bool = False, seed: int = 0) -> Tensor:
    scores = torch.randn(num_requests, num_items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((2 * scores).round() / 2 if ties else scores) * scale


def some(num_requests: int, num_items: int, share: float = 0.8, seed: int = 1) -> Tensor:
    mask = torch.rand(num_requests, num_items, generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = True
    return mask


def apply(name: str, scores: Tensor, mask: Tensor | None = None, k: object = 3, tau: float = 1.0) -> Selection:
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    cuts = torch.full((len(scores),), k) if isinstance(k, int) else torch.as_tensor(k)
    return SELECTION_OPERATORS[name](scores, mask, cuts, tau)


def gradients(name: str, scores: Tensor, weights: Tensor, **options: object) -> Tensor:
    """Of the weighted sum of top, rest, and their logarithms."""
    leaf = scores.clone().requires_grad_()
    chosen = apply(name, leaf, **options)  # type: ignore[arg-type]
    parts = [chosen.top, 2 * chosen.rest, *chosen.logs()]
    (torch.stack([part.masked_fill(part.isinf(), 0) for part in parts]).sum(dim=0) * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# ---- against others' numbers -----------------------------------------------------------------------------------------


@functools.cache
def golden_file(path: Path) -> dict[str, NDArray[np.float32]]:
    with np.load(path) as file:
        return dict(file)


def test_shares_equal_the_original(golden: Path) -> None:
    file = golden_file(golden / "topk.npz")
    compared = set()
    for key, expected in file.items():
        case, what, *named = key.split("/")
        if what != "operator":
            continue
        name, k, tau = named
        scores = torch.from_numpy(file[f"{case}/logits/rank"]).double()
        ours = apply(name, scores, k=int(k.removeprefix("k")), tau=float(tau.removeprefix("tau"))).top
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)
        compared.add((case, name))
    assert compared == {(c, n) for c in ("recflow", "small", "large") for n in ("dftopk", "lapsum", "sparse_topk")}


def without_exact_logs(operator: SelectionOperator) -> SelectionOperator:
    def selection(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Selection:
        chosen = operator(scores, mask, k, temperature)
        return Selection(chosen.top, chosen.rest)

    return selection


@pytest.mark.parametrize("case", ["recflow", "small"])
@pytest.mark.parametrize(("name", "tau"), [("dftopk", "1"), ("dftopk", "500"), ("lapsum", "0.5"), ("lapsum", "5")])
def test_losses_equal_the_original(
    golden: Path, case: str, name: str, tau: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = golden_file(golden / "topk.npz")
    if name == "lapsum":  # the original adds 1e-6 inside its logarithms, as a Selection without exact ones does
        monkeypatch.setitem(SELECTION_OPERATORS, name, without_exact_logs(SELECTION_OPERATORS[name]))
    labels = torch.from_numpy(file[f"{case}/labels"])
    scores = {stage: torch.from_numpy(file[f"{case}/logits/{stage}"]) for stage in ("retrieval", "rank")}
    group = (torch.arange(labels.shape[-1]) // 10).expand_as(labels)
    batch = Batch(scores, Targets(labels, torch.ones_like(labels, dtype=torch.bool), group))
    ours = step(Method("two_stage", f"--loss_type=lcron --topk_op={name} --tau={tau}").build(), batch)
    theirs = {key.removeprefix(f"{case}/{name}/tau{tau}/"): value for key, value in file.items()}
    assert float(ours.loss) == pytest.approx(float(theirs["loss"]), rel=1e-5)
    for term in ("rank", "retrieval", "end_to_end"):
        assert float(ours.terms[term]) == pytest.approx(float(theirs[f"term/{term}"]), rel=1e-5)
    for stage in scores:
        grad, weight_grad = theirs[f"grad/{stage}"], theirs[f"weight_grad/{stage}"]
        assert np.linalg.norm(ours.grads[stage].numpy() - grad) <= 1e-4 * np.linalg.norm(grad)
        assert float(ours.weight_grads[stage]) == pytest.approx(float(weight_grad.item()), rel=1e-4)


@each
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("num_items", "tau"), [(1, 1.0), (2, 1.0), (7, 0.1), (7, 3.0), (40, 1.0), (200, 0.5)])
def test_equals_the_formula(name: str, num_items: int, tau: float, ties: bool) -> None:
    scores, mask = scores_of(4, num_items, ties=ties), some(4, num_items)
    cuts = [1, 0, num_items // 2 + 1, 3]
    chosen = apply(name, scores, mask, cuts, tau)
    for row, k in enumerate(cuts):
        present = mask[row]
        expected = reference.by_threshold(name, scores[row, present].tolist(), tau, k)
        np.testing.assert_allclose(chosen.top[row, present].numpy(), expected.top, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(chosen.rest[row, present].numpy(), expected.rest, rtol=1e-9, atol=1e-12)
        assert (chosen.top[row, ~present] == 0).all()
        assert (chosen.rest[row, ~present] == 0).all()


# ---- the property matrix ---------------------------------------------------------------------------------------------


@each_with_fixed_sum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("ties", [False, True])
def test_shares_sum_to_k(name: str, dtype: torch.dtype, scale: float, ties: bool) -> None:
    for num_items in (2, 5, 40, 1000):
        scores, mask = scores_of(6, num_items, scale, ties).to(dtype), some(6, num_items)
        k = torch.arange(6) * num_items // 6 + 1
        total = apply(name, scores, mask, k).top.sum(dim=-1)
        expected = torch.minimum(k, mask.sum(dim=-1)).to(dtype)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


@each_with_fixed_sum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("left_out", [1, 5])
def test_shares_of_long_lists_of_which_few_are_left_out(
    name: str, dtype: torch.dtype, scale: float, left_out: int
) -> None:
    """Where k is near n what the others have is thousands of times less than what the best lack at first."""
    for num_items in (200, 5000, 16384):
        scores = scores_of(1, num_items, scale).to(dtype).requires_grad_()
        chosen = apply(name, scores, k=num_items - left_out)
        k, rest = float(num_items - left_out), float(left_out)
        assert chosen.top.sum().item() == pytest.approx(k, rel=1e-5)
        # sparse_topk's rest is 1 - p, and has p's rounding.
        assert chosen.rest.sum().item() == pytest.approx(rest, rel=1e-5, abs=0 if name in EXACT else 1e-5 * k)
        log_top, log_rest = chosen.logs()
        (log_top + log_rest).sum().backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


@each
@pytest.mark.parametrize("ties", [False, True])
def test_only_differences_of_scores_count(name: str, ties: bool) -> None:
    scores, mask = scores_of(3, 12, ties=ties), some(3, 12)
    torch.testing.assert_close(apply(name, scores + 64, mask).top, apply(name, scores, mask).top, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(apply(name, scores * 8, mask, tau=8.0).top, apply(name, scores, mask).top)
    # The gradient of a shift is 0: sum_j dp_i / ds_j = 0 for every i, so for any weights of the shares.
    grad = gradients(name, scores, torch.rand(3, 12, dtype=torch.float64), mask=mask)
    torch.testing.assert_close(grad.sum(dim=-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)


@each
@pytest.mark.parametrize("ties", [False, True])
def test_rises_with_the_score(name: str, ties: bool) -> None:
    scores = scores_of(5, 30, ties=ties)
    in_order = apply(name, scores.sort(dim=-1).values, k=7)
    assert (in_order.top.diff(dim=-1) >= 0).all()
    assert (in_order.rest.diff(dim=-1) <= 0).all()
    assert ((in_order.top >= 0) & (in_order.top <= 1)).all()
    equal = scores.unsqueeze(-1) == scores.unsqueeze(-2)
    top = apply(name, scores, k=7).top
    assert (top.unsqueeze(-1) == top.unsqueeze(-2))[equal].all()


@each
def test_tends_to_the_k_best(name: str) -> None:
    scores, mask, k = scores_of(4, 20), some(4, 20), torch.tensor([1, 4, 9, 15])
    chosen = apply(name, scores, mask, k, tau=1e-5)
    best = torch.zeros_like(mask)
    for row, cut in enumerate(k.tolist()):
        best[row, scores[row].masked_fill(~mask[row], -math.inf).topk(cut).indices] = True
    torch.testing.assert_close(chosen.top, best.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(chosen.rest, (mask & ~best).double(), rtol=0, atol=1e-9)


@each
@pytest.mark.parametrize("seed", range(3))
def test_numerical_derivatives(name: str, seed: int) -> None:
    scores, mask = scores_of(4, 9, seed=seed).requires_grad_(), some(4, 9, seed=seed)

    def outputs(values: Tensor) -> tuple[Tensor, ...]:
        chosen = apply(name, values, mask, [1, 3, 20, 0], tau=0.7)
        return chosen.top, chosen.rest, *chosen.logs()

    assert torch.autograd.gradcheck(outputs, (scores,))


@each
@pytest.mark.parametrize("junk", [0.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
def test_masked_equals_removed(name: str, junk: float) -> None:
    scores, weights = scores_of(3, 6, seed=5), torch.rand(3, 6, dtype=torch.float64)
    kept = [0, 2, 3, 6, 7, 9]
    padded, mask, padded_weights = (
        torch.full((3, 10), junk).double(),
        torch.zeros(3, 10).bool(),
        torch.ones(3, 10).double(),
    )
    padded[:, kept], mask[:, kept], padded_weights[:, kept] = scores, True, weights
    cuts = torch.tensor([2, 6, 0])
    masked, removed = apply(name, padded, mask, cuts), apply(name, scores, k=cuts)
    torch.testing.assert_close(masked.top[:, kept], removed.top, rtol=0, atol=1e-14)
    torch.testing.assert_close(masked.rest[:, kept], removed.rest, rtol=0, atol=1e-14)
    of_masked = gradients(name, padded, padded_weights, mask=mask, k=cuts)
    torch.testing.assert_close(of_masked[:, kept], gradients(name, scores, weights, k=cuts), rtol=1e-12, atol=1e-14)
    assert (of_masked[~mask] == 0).all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_separated_scores_have_no_sparse_gradient(tau: float) -> None:
    """Where a gap of t or more lies at the cut the projection stays at the corner: also right at the gap's end."""
    for seed in range(50):
        scores = scores_of(1, 8, 5.0, seed=seed)
        for k in (1, 2, 5):
            ordered = scores.sort(descending=True).values[0]
            if ordered[k - 1] - ordered[k] >= 1.01 * tau:
                assert (gradients("sparse_topk", scores, torch.ones(1, 8).double(), k=k, tau=tau) == 0).all()


@each
def test_without_a_cut_there_is_no_gradient(name: str) -> None:
    scores = scores_of(3, 4)
    chosen = apply(name, scores, k=[0, 4, 9])
    assert chosen.top.tolist() == [[0.0] * 4, [1.0] * 4, [1.0] * 4]
    assert chosen.rest.tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    assert all(values.isfinite().all() for values in chosen.logs())
    assert (gradients(name, scores, torch.ones(3, 4).double(), k=[0, 4, 9]) == 0).all()


@each
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equal_scores_share_equally(name: str, k: int) -> None:
    scores, weights = torch.full((1, 6), 0.3).double(), torch.arange(6.0).double().unsqueeze(0)
    if name in FIXED_SUM:
        torch.testing.assert_close(apply(name, scores, k=k).top, torch.full((1, 6), k / 6).double())
    flipped = gradients(name, scores, weights.flip(-1), k=k).flip(-1)
    torch.testing.assert_close(gradients(name, scores, weights, k=k), flipped)


@each
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_one_k_for_all_equals_a_k_each(name: str, k: int, ties: bool) -> None:
    scores, weights = scores_of(6, 9, ties=ties), scores_of(6, 9, seed=5)
    each = torch.tensor([k] * 5 + [4 if k == 5 else 5])
    together, apart = ((apply(name, scores, k=cut).top, gradients(name, scores, weights, k=cut)) for cut in (k, each))
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours[:5], theirs[:5], rtol=1e-12, atol=1e-14)


@each
def test_no_requests(name: str) -> None:
    assert apply(name, torch.zeros(0, 5)).top.shape == (0, 5)
    empty = apply(name, torch.zeros(2, 5), torch.zeros(2, 5).bool())
    assert (empty.top == 0).all()
    assert (empty.rest == 0).all()


@each_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_are_exact_at_extreme_scores(name: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    log_top, log_rest = apply(name, scores, k=2).logs()
    # Two and two items are 2e4 apart: the threshold is midway, where it is for k of the n by symmetry.
    farther = 1e4 + (math.log(2) if name == "lapsum" else 0)
    expected = torch.tensor([[0.0, -farther, 0.0, -farther]], dtype=dtype)
    torch.testing.assert_close(log_top, expected)
    torch.testing.assert_close(log_rest, expected.roll(1, dims=-1))
    log_top.sum().backward()
    assert scores.grad is not None
    # d log top / ds = (1 - share of the threshold): the two bad items' logarithms rise with their own score, and the
    # threshold, a quarter of each score, moves both.
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.5, 0.5, -0.5, 0.5]], dtype=dtype))


@each_exact
def test_the_end_to_end_term_needs_no_epsilon(name: str) -> None:
    scores = torch.tensor([[40.0, 39.0, -40.0, -41.0]], requires_grad=True)
    stages = [apply(name, scores, k=2), apply(name, 2 * scores, k=2)]
    truth = Selection(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    terms = end_to_end_cross_entropy(stages, truth)  # the ground truth is what has the lowest scores
    tops, rests = (
        [getattr(apply(name, factor * scores.double(), k=2), of) for factor in (1, 2)] for of in ("top", "rest")
    )
    survival, dropped = tops[0] * tops[1], rests[0] + tops[0] * rests[1]
    expected = torch.cat([-dropped[:, :2].log(), -survival[:, 2:].log()], dim=-1)
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=0)
    terms.sum().backward()
    assert scores.grad is not None
    assert (scores.grad[0, :2] > 0).all()  # where the loss falls, the high scores fall and the low ones rise
    assert (scores.grad[0, 2:] < 0).all()
    assert scores.grad.isfinite().all()


@each_exact
@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_stage_that_keeps_all_changes_nothing_end_to_end(name: str, without: int) -> None:
    """Requests of n items, a stage of quota n or more: E is that of the other stages, its gradient too."""
    stages = [30 * scores_of(2, 6, seed=seed) for seed in range(3)]
    truth = Selection(torch.tensor([[0.0, 1, 1, 0, 0, 0]] * 2), torch.tensor([[1.0, 0, 0, 1, 1, 1]] * 2))
    results = []
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for chosen in (range(3), [stage for stage in range(3) if stage != without]):
            leaves = [stages[stage].clone().requires_grad_() for stage in chosen]
            cuts = [9 if stage == without else 2 for stage in chosen]
            terms = end_to_end_cross_entropy([apply(name, s, k=k) for s, k in zip(leaves, cuts, strict=True)], truth)
            terms.sum().backward()
            grads = [leaf.grad for stage, leaf in zip(chosen, leaves, strict=True) if stage != without]
            assert (terms > -2 * math.log(1e-6)).any()  # what an epsilon inside the logarithm would hide
            results.append((terms.detach(), *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@each_exact
def test_requests_that_no_stage_cuts_have_no_end_to_end_gradient(name: str) -> None:
    scores = scores_of(3, 4).requires_grad_()
    truth = Selection(torch.tensor([[1.0, 1, 0, 0]] * 3), torch.tensor([[0.0, 0, 1, 1]] * 3))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for cuts in ([4, 9, 0], [9, 0, 4]), ([4, 9, 0],):
            terms = end_to_end_cross_entropy([apply(name, scores, k=k) for k in cuts], truth)
            terms.sum().backward()
            assert terms.isfinite().all()
            assert scores.grad is not None
            assert (scores.grad == 0).all()


@each
def test_a_step_keeps_no_matrix(name: str) -> None:
    """Of what autograd saves nothing is larger than B x N: 4,000 items would take 64 MB a request otherwise."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    scores = scores_of(2, 4000).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chosen = apply(name, scores, k=10)
        total = sum(values.clamp(min=-100).sum() for values in (chosen.top, chosen.rest, *chosen.logs()))
    assert isinstance(total, Tensor)
    total.backward()
    assert sizes
    assert max(sizes) <= 2 * (4000 + 2)


@pytest.mark.parametrize("name", SELECTION_OPERATORS)
@pytest.mark.filterwarnings("ignore")  # of torch's own, as it traces
def test_can_be_compiled(name: str) -> None:
    scores, mask = scores_of(3, 12), some(3, 12)

    def weighted(values: Tensor) -> Tensor:
        chosen = SELECTION_OPERATORS[name](values, mask, torch.tensor([2, 3, 40]), 1.0)
        return (torch.stack([chosen.top, chosen.rest, *chosen.logs()]) * torch.arange(12)).sum()

    results = []
    for function in (weighted, torch.compile(weighted, backend="aot_eager", fullgraph=True)):
        leaf = scores.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_each_has_a_temperature_of_its_own() -> None:
    assert TEMPERATURES.keys() == set(DIRECT)
