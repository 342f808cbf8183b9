"""The property matrix: what holds for every loss and variant, in two, three and four stages.

A new loss adds one line to ``VARIANTS`` (and its formula to ``reference.METHODS``).
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deep_components.batch import Targets
from deep_components.loss.selection import SELECTION_OPERATORS
from tests.loss import reference
from tests.loss.methods import NUM_GROUPS, STAGES, Batch, Method, Step, make_batch, serving_batch, step, weights_of

VARIANTS = (
    "--loss_type=bce",
    "--loss_type=icc",
    "--loss_type=rankflow",
    "--loss_type=fs_ranknet",
    "--loss_type=fs_lambdaloss",
    "--loss_type=arf",
    "--loss_type=arf --tau=5",
    "--loss_type=arf_v2",
    "--loss_type=arf_v2 --tau=5",
    "--loss_type=arf_v2 --topk_op=soft_sort --tau=5",
    "--loss_type=arf_v2 --topk_op=lml --tau=2",
    "--loss_type=lcron",
    "--loss_type=lcron --tau=1",
    "--loss_type=lcron --sort=soft_sort --tau=1",
    "--loss_type=lcron --topk_op=dftopk --tau=1",
    "--loss_type=lcron --topk_op=lapsum --tau=1",
    "--loss_type=lcron --topk_op=lml --tau=1",
    "--loss_type=lcron --topk_op=sparse_topk --tau=4",
    "--loss_type=lcron --terms=end_to_end",
    "--loss_type=lcron --terms=single",
    "--loss_type=lcron --single_weight=0.1",
    "--loss_type=lcron --weighting=paper",
    "--loss_type=lcron --weighting=paper --terms=end_to_end",
    "--loss_type=lcron --weighting=paper --terms=single",
    "--loss_type=lcron --label_ties=shared",
    "--loss_type=lcron --label_ties=repeated",
    "--loss_type=sorting",
    "--loss_type=sorting --sort=soft_sort --tau=1",
)
QUOTAS = {"two_stage": ("30,20", "4,2"), "three_stage": ("40,30,20", "6,4,2"), "four_stage": ("6,4,3,2",)}
MATRIX = (
    [Method(setting, flags) for setting in STAGES for flags in VARIANTS]
    + [
        Method(setting, f"--loss_type=lcron --end_to_end_quotas={quotas}")
        for setting, choices in QUOTAS.items()
        for quotas in choices
    ]
    + [Method("two_stage", "--loss_type=lcron --topk_op=lapsum --tau=1 --end_to_end_quotas=4,2")]
    + [Method("three_stage", "--loss_type=lcron --topk_op=lml --tau=1 --single_quotas=6,4,2 --end_to_end_quotas=5,3,2")]
)
every_loss = pytest.mark.parametrize("method", MATRIX, ids=str)
few = settings(max_examples=5, deadline=None, derandomize=True, database=None)


@st.composite
def batch_options(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Arguments of make_batch: small, uneven, ragged or complete, with ties or without, now and then long."""
    options = {
        "seed": draw(st.integers(0, 10**6)),
        "num_requests": draw(st.integers(1, 4)),
        "num_items": draw(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 12, 17, 55])),
        "present": draw(st.sampled_from([1.0, 0.8, 0.5])),
        "scale": draw(st.sampled_from([0.1, 1.0, 10.0])),
        "ties": draw(st.booleans()),
    }
    return options | fixed


def scalars(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms as numbers, without the weights, which the reference does not repeat."""
    return {name: float(term.detach()) for name, term in terms.items() if not name.startswith("weight.")}


def assert_equals_reference(method: Method, batch: Batch) -> None:
    loss = method.build_weighted()
    ours, theirs = scalars(step(loss, batch).terms), method.reference(batch, weights_of(loss))
    if not batch.targets.mask.any():
        theirs = dict.fromkeys(ours, 0.0)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def assert_same(one: Step, other: Step) -> None:
    """Equal up to the order of summation."""
    torch.testing.assert_close(one.terms, other.terms, rtol=1e-10, atol=1e-12)
    # ICC divides by 1e-3: its gradients are up to a thousand times the others'.
    torch.testing.assert_close(one.grads, other.grads, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(one.weight_grads, other.weight_grads, rtol=1e-10, atol=1e-12)


def select(grads: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {stage: grad[chosen] for stage, grad in grads.items()}


# ---- values and gradients --------------------------------------------------------------------------------------------


@every_loss
@given(options=batch_options())
@few
def test_equals_the_reference(method: Method, options: dict[str, Any]) -> None:
    assert_equals_reference(method, make_batch(method.setting, **options))


@every_loss
def test_equals_the_reference_on_requests_as_served(method: Method) -> None:
    assert_equals_reference(method, serving_batch(method.setting))


OWN_QUOTAS = {"two_stage": "7,4", "three_stage": "9,7,4", "four_stage": "9,7,5,4"}


@pytest.mark.parametrize("setting", STAGES)
@pytest.mark.parametrize("operator", SELECTION_OPERATORS)
@pytest.mark.parametrize("cut", ["--single_quotas", "--end_to_end_quotas", "both, alike", "both, apart"])
def test_every_operator_at_quotas_equals_the_reference(setting: str, operator: str, cut: str) -> None:
    own, others = OWN_QUOTAS[setting], QUOTAS[setting][-1]
    flags = {
        "both, alike": f"--single_quotas={own} --end_to_end_quotas={own}",
        "both, apart": f"--single_quotas={own} --end_to_end_quotas={others}",
    }.get(cut, f"{cut}={own}")
    method = Method(setting, f"--loss_type=lcron --topk_op={operator} --tau=2 {flags}")
    assert_equals_reference(method, make_batch(setting, seed=3, present=0.8))


@every_loss
@pytest.mark.parametrize("num_items", [1, 2, 64])
def test_equals_the_reference_for_any_number_of_items(method: Method, num_items: int) -> None:
    assert_equals_reference(method, make_batch(method.setting, num_items=num_items))


@every_loss
def test_gradients_are_the_derivatives_of_the_reference(method: Method) -> None:
    """Along two random directions of each stage's scores, and of each weight."""
    batch, loss = make_batch(method.setting, seed=5, num_items=9, present=0.8), method.build_weighted()
    ours, weights, small = step(loss, batch), weights_of(loss), 1e-6

    def slope(stage: str, direction: Tensor) -> float:
        up, down = (
            method.reference(
                batch.replace(batch.scores | {stage: batch.scores[stage] + by * direction}), weights, batch
            )
            for by in (small, -small)
        )
        return (up["loss"] - down["loss"]) / (2 * small)

    for stage in method.stages:
        for seed in (0, 1):
            direction = torch.randn(batch.targets.mask.shape, generator=torch.Generator().manual_seed(seed)).double()
            expected = slope(stage, direction)
            assert float((ours.grads[stage] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    for name, value in weights.items():
        up, down = (method.reference(batch, weights | {name: value + by}) for by in (small, -small))
        expected = (up["loss"] - down["loss"]) / (2 * small)
        assert float(ours.weight_grads[name]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


# ---- missing items ---------------------------------------------------------------------------------------------------

JUNK = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-300)
JUNK_LABELS = (2**63 - 1, -(2**63), 0, 30)
JUNK_GROUPS = (2**62, -1, 0, 1)


def with_junk(batch: Batch, seed: int) -> Batch:
    """The same batch with other scores, labels and groups at its missing items."""
    random, missing = torch.Generator().manual_seed(seed), ~batch.targets.mask

    def spoilt(values: Tensor, junk: tuple[float, ...]) -> Tensor:
        chosen = torch.randint(len(junk), values.shape, generator=random)
        return torch.where(missing, torch.tensor(junk, dtype=values.dtype)[chosen], values)

    scores = {stage: spoilt(values, JUNK) for stage, values in batch.scores.items()}
    labels, group = spoilt(batch.targets.labels, JUNK_LABELS), spoilt(batch.targets.group, JUNK_GROUPS)
    return batch.replace(scores, labels=labels, group=group)


@every_loss
@given(options=batch_options(present=0.6))
@few
def test_the_values_of_a_missing_item_do_not_matter(method: Method, options: dict[str, Any]) -> None:
    batch, loss = make_batch(method.setting, **options), method.build_weighted()
    clean, spoilt = step(loss, batch), step(loss, with_junk(batch, options["seed"]))
    torch.testing.assert_close(spoilt.terms, clean.terms, rtol=0, atol=0)
    torch.testing.assert_close(spoilt.grads, clean.grads, rtol=0, atol=0)
    torch.testing.assert_close(spoilt.weight_grads, clean.weight_grads, rtol=0, atol=0)
    for grad in spoilt.grads.values():
        assert (grad[~batch.targets.mask] == 0).all()


@every_loss
@given(options=batch_options(present=1.0), data=st.data())
@few
def test_masked_equals_removed(method: Method, options: dict[str, Any], data: st.DataObject) -> None:
    batch, loss = make_batch(method.setting, **options), method.build_weighted()
    kept = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=options["num_items"], max_size=options["num_items"]))
    )
    kept[data.draw(st.integers(0, options["num_items"] - 1))] = True
    masked = step(loss, with_junk(batch.replace(mask=kept.expand_as(batch.targets.mask)), options["seed"]))
    removed = step(loss, batch.take(items=kept))
    of_kept = {stage: grad[:, kept] for stage, grad in masked.grads.items()}
    assert_same(Step(masked.terms, of_kept, masked.weight_grads), removed)


@every_loss
def test_masked_equals_removed_among_equal_scores(method: Method) -> None:
    batch, loss = make_batch(method.setting, num_requests=4, num_items=24), method.build_weighted()
    batch = batch.replace({stage: (scores > 0).double() for stage, scores in batch.scores.items()})
    kept = torch.arange(24) >= 18
    masked = step(loss, batch.replace(mask=kept.expand_as(batch.targets.mask)))
    of_kept = {stage: grad[:, kept] for stage, grad in masked.grads.items()}
    assert_same(Step(masked.terms, of_kept, masked.weight_grads), step(loss, batch.take(items=kept)))


@every_loss
@given(options=batch_options(num_requests=3, present=0.8))
@few
def test_a_masked_request_equals_an_absent_one(method: Method, options: dict[str, Any]) -> None:
    batch, loss = make_batch(method.setting, **options), method.build_weighted()
    there = torch.tensor([True, False, True])
    masked = step(loss, with_junk(batch.replace(mask=batch.targets.mask & there.unsqueeze(-1)), options["seed"]))
    absent = step(loss, batch.take(requests=there))
    assert_same(Step(masked.terms, select(masked.grads, there), masked.weight_grads), absent)


@every_loss
@given(options=batch_options(num_requests=3, ties=False))
@few
def test_a_request_without_ground_truth(method: Method, options: dict[str, Any]) -> None:
    batch = make_batch(method.setting, **options)
    without = torch.tensor([True, False, False]).unsqueeze(-1) & (batch.targets.group == 0)
    assert_equals_reference(method, batch.replace(mask=batch.targets.mask & ~without))


@every_loss
@pytest.mark.parametrize("num_items", [1, 50])
def test_nothing_present_gives_zero(method: Method, num_items: int) -> None:
    batch = make_batch(method.setting, num_items=num_items, present=0.0)
    result = step(method.build_weighted(), with_junk(batch, seed=1))
    assert float(result.loss) == 0
    assert set(scalars(result.terms).values()) == {0.0}
    for grad in (*result.grads.values(), *result.weight_grads.values()):
        assert (grad == 0).all()


@every_loss
def test_no_request_at_all_gives_zero(method: Method) -> None:
    result = step(method.build_weighted(), make_batch(method.setting).take(requests=slice(0, 0)))
    assert float(result.loss) == 0
    for grad in result.weight_grads.values():
        assert grad == 0


# ---- robustness ------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("present", [1.0, 0.5])
def test_extreme_scores_stay_finite(method: Method, present: float) -> None:
    batch = make_batch(method.setting, seed=2, num_requests=4, num_items=10 * NUM_GROUPS[method.setting],
                       present=present, dtype=torch.float32)  # fmt: skip
    extreme = {stage: 1e4 * scores.sign() for stage, scores in batch.scores.items()}
    extreme["rank"] = torch.where(batch.scores["rank"].abs() < 0.5, 1e4 * batch.scores["rank"], extreme["rank"])
    alike = {stage: 1e4 + scores for stage, scores in batch.scores.items()}
    opposed = {
        stage: torch.full_like(scores, 1e4 * (-1) ** index) for index, (stage, scores) in enumerate(alike.items())
    }
    wrong_way = {stage: torch.linspace(-1e4, 1e4, scores.shape[1]).expand_as(scores) for stage, scores in alike.items()}
    for scores in (extreme, alike, opposed, wrong_way):
        result = step(method.build_weighted(torch.float32), batch.replace(scores))
        for value in (*result.terms.values(), *result.grads.values(), *result.weight_grads.values()):
            assert value.isfinite().all()


@every_loss
@given(options=batch_options(ties=False), data=st.data())
@few
def test_the_order_of_the_items_does_not_matter(method: Method, options: dict[str, Any], data: st.DataObject) -> None:
    batch, loss = make_batch(method.setting, **options), method.build_weighted()
    order = torch.tensor(data.draw(st.permutations(range(options["num_items"]))))
    original, permuted = step(loss, batch), step(loss, batch.take(items=order))
    of_order = {stage: grad[:, order] for stage, grad in original.grads.items()}
    assert_same(Step(original.terms, of_order, original.weight_grads), permuted)


@every_loss
def test_the_order_of_the_requests_does_not_matter(method: Method) -> None:
    batch, loss = make_batch(method.setting, num_requests=4, present=0.7), method.build_weighted()
    order = torch.tensor([2, 0, 3, 1])
    original, permuted = step(loss, batch), step(loss, batch.take(requests=order))
    assert_same(Step(original.terms, select(original.grads, order), original.weight_grads), permuted)


# ---- the interface ---------------------------------------------------------------------------------------------------


@every_loss
def test_inputs_are_not_changed(method: Method) -> None:
    batch, loss = make_batch(method.setting, present=0.7), method.build_weighted()
    inputs = {**batch.scores, **vars(batch.targets)}
    copied, weights = {name: values.clone() for name, values in inputs.items()}, weights_of(loss)
    step(loss, batch)
    loss(batch.scores, batch.targets)
    for name, values in inputs.items():
        assert torch.equal(values, copied[name]), name
    assert weights_of(loss) == weights


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_scalars_and_only_the_loss_has_a_gradient(method: Method, dtype: torch.dtype) -> None:
    batch = make_batch(method.setting, present=0.7, dtype=dtype)
    terms = step(method.build_weighted(dtype), batch).terms
    assert all(term.shape == () for term in terms.values())
    assert terms["loss"].dtype == dtype
    assert {name for name, term in terms.items() if term.requires_grad} == {"loss"}


@every_loss
def test_weights_are_named_by_stage_start_at_one_and_are_reported(method: Method) -> None:
    loss, names = method.build(), reference.weight_names(method.name, method.setting, method.options)
    assert {name: parameter.item() for name, parameter in loss.named_parameters()} == {
        f"weight.{name}": 1.0 for name in names
    }
    weighted = method.build_weighted()
    terms = step(weighted, make_batch(method.setting)).terms
    reported = {name: float(term) for name, term in terms.items() if name.startswith("weight.")}
    assert reported == {f"weight.{name}": value for name, value in weights_of(weighted).items()}


@every_loss
def test_the_weights_survive_a_checkpoint(method: Method) -> None:
    state, loss = method.build_weighted(torch.float32).state_dict(), method.build()
    loss.load_state_dict(state)
    torch.testing.assert_close(dict(loss.state_dict()), dict(state), rtol=0, atol=0)


def with_scores(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Batch], tuple[Any, Any]]:
    return lambda batch: (change(batch.scores), batch.targets)


def with_target(name: str, change: Callable[[Tensor], Any]) -> Callable[[Batch], tuple[Any, Any]]:
    return lambda batch: (batch.scores, Targets(**{**vars(batch.targets), name: change(getattr(batch.targets, name))}))


WRONG: dict[str, tuple[Callable[[Batch], tuple[Any, Any]], type[Exception], str]] = {
    "scores in a list": (with_scores(lambda s: list(s.values())), TypeError, "scores is a list, not a mapping"),
    "no scores": (with_scores(lambda s: {}), ValueError, "scores has no stage"),
    "a stage's scores as a list": (
        with_scores(lambda s: s | {"rank": s["rank"].tolist()}), TypeError, r"scores\['rank'\] is a list, not a tensor"
    ),
    "whole scores": (with_scores(lambda s: s | {"rank": s["rank"].long()}), TypeError, "int64, not floating-point"),
    "scores of one axis more": (
        with_scores(lambda s: s | {"rank": s["rank"].unsqueeze(-1)}), ValueError, r"shape \(2, 12, 1\), not \[B, N\]"
    ),
    "scores of one item": (with_scores(lambda s: s | {"rank": s["rank"][:, :1]}), ValueError, r"has shape \(2, 1\)"),
    "labels in a list": (with_target("labels", Tensor.tolist), TypeError, "targets.labels is a list, not a tensor"),
    "labels as floats": (with_target("labels", Tensor.float), TypeError, "targets.labels holds torch.float32, not int"),
    "labels of one request": (with_target("labels", lambda v: v[:1]), ValueError, r"labels has shape \(1, 12\)"),
    "a mask of numbers": (with_target("mask", Tensor.long), TypeError, "targets.mask holds torch.int64, not bool"),
    "a mask in a list": (with_target("mask", Tensor.tolist), TypeError, "targets.mask is a list, not a tensor"),
    "a row of groups": (with_target("group", lambda v: v[0]), ValueError, r"targets.group has shape \(12,\)"),
    "groups as floats": (with_target("group", Tensor.double), TypeError, "targets.group holds torch.float64, not int"),
}  # fmt: skip
METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting")
KNOW_THEIR_STAGES = ("bce", "icc", "rankflow", "arf", "arf_v2", "lcron")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_batch_is_named_in_a_sentence(name: str, case: str) -> None:
    change, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        Method("two_stage", f"--loss_type={name}").build()(*change(make_batch("two_stage")))


@pytest.mark.parametrize("name", KNOW_THEIR_STAGES)
@pytest.mark.parametrize("setting", ["two_stage", "three_stage"])
def test_scores_of_other_stages_are_refused(name: str, setting: str) -> None:
    """A stage that lacks scores would else not be trained; one too many would be left out."""
    other = {"two_stage": "three_stage", "three_stage": "two_stage"}[setting]
    batch = make_batch(other)
    with pytest.raises(ValueError, match=r"scores is of the stages .*; the loss is of retrieval, "):
        Method(setting, f"--loss_type={name}").build()(batch.scores, batch.targets)
