"""The bound: the sampled cascade against closed forms, and what metrics.json says of a run."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_components import run_test2
from deep_components.cascade import Cascade, Group, Stage
from deep_components.cli import run_command
from deep_components.evaluation import bound as module
from deep_components.evaluation.bound import Bound, keep_some, sampled_cascade, violated
from deep_components.evaluation.day import whole_day
from deep_components.metrics import survival_by_stage
from tests.helpers import config, evaluate, evaluation_arguments, small_log, train
from tests.loss import reference

STAGES = ("retrieval", "rank")
MEANS = (
    *("bound_product", "bound_product_at_quotas", "bound_sampled_product", "bound_sampled", "bound_hard"),
    *("bound_violated", "bound_violated_at_quotas", "bound_sampled_error"),
)
KEYS = {*MEANS, "bound_noise", "bound_samples", "bound_requests", "bound_items"}
SMALL = Cascade(
    stages=(Stage("retrieval", keep=4, model="dssm"), Stage("rank", keep=2, model="dssm")),
    groups=(Group("best", 3), Group("others", 5, position=9)),
    num_relevant=2,
)


def shares(scores: Sequence[Sequence[float]], quotas: Sequence[int], noise: float = 1.0, samples: int = 4000) -> Tensor:
    """How often each item of one request survived. [N]"""
    rows, mask = (
        [torch.tensor([s], dtype=torch.float64) for s in scores],
        torch.ones(1, len(scores[0]), dtype=torch.bool),
    )
    return sampled_cascade(rows, mask, quotas, noise, samples, torch.tensor([5]))[0][0].double().mean(dim=0)


def exact(scores: Sequence[Sequence[float]], quotas: Sequence[int], noise: float = 1.0) -> list[float]:
    """The same probability: with Gumbel noise a stage orders its items as Plackett and Luce draw them, one after
    another with probabilities softmax(s / t) of those that are left."""
    left = {tuple(range(len(scores[0]))): 1.0}
    for stage, quota in zip(scores, quotas, strict=True):
        after: dict[tuple[int, ...], float] = {}
        for items, probability in left.items():
            for order in itertools.permutations(items, min(quota, len(items))):
                chance, rest = probability, set(items)
                for item in order:
                    chance /= sum(math.exp((stage[other] - stage[item]) / noise) for other in rest)
                    rest.remove(item)
                after[tuple(sorted(order))] = after.get(tuple(sorted(order)), 0.0) + chance
        left = after
    return [sum(chance for items, chance in left.items() if item in items) for item in range(len(scores[0]))]


def assert_sampled(sampled: Tensor, expected: Sequence[float], samples: int = 4000) -> None:
    """Within four standard errors."""
    for share, probability in zip(sampled.tolist(), expected, strict=True):
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / samples) + 1e-12


# ---- the sampled cascade ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.5, 1.0, 20.0])
def test_of_two_items_the_better_survives_with_the_logistic_of_their_difference(noise: float) -> None:
    better = 1 / (1 + math.exp(-1.5 / noise))
    assert_sampled(shares([[2.0, 0.5]], [1], noise), [better, 1 - better])


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_the_first_of_one_stage_is_drawn_by_softmax(noise: float) -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 1.9, 0.0], dtype=torch.float64)
    assert_sampled(shares([scores.tolist()], [1], noise), (scores / noise).softmax(dim=-1).tolist())


@pytest.mark.parametrize("quotas", [[3, 1], [2, 2], [1, 1], [4, 2], [3, 2, 1]])
def test_a_cascade_of_four_items_survives_as_often_as_plackett_and_luce_say(quotas: list[int]) -> None:
    scores = [[1.0, 0.2, -0.5, 0.7], [-0.3, 1.1, 0.4, 0.0], [0.6, 0.1, 0.9, -1.0]][: len(quotas)]
    assert_sampled(shares(scores, quotas, 0.8), exact(scores, quotas, 0.8))


def day(requests: int = 9, items: int = 8, seed: int = 0, missing: float = 0.2) -> dict[str, Tensor]:
    """A day of SMALL."""
    rng = np.random.default_rng(seed)
    scores = {stage: torch.from_numpy(rng.normal(size=(requests, items)).astype(np.float32)) for stage in STAGES}
    columns = {"mask": rng.random((requests, items)) >= missing, "labels": rng.integers(0, 30, (requests, items))}
    columns |= {"group": np.tile(np.arange(items) >= 3, (requests, 1)).astype(np.int64)}
    columns |= {"request_id": rng.integers(0, 1 << 60, requests)}
    return scores | {name: torch.from_numpy(values) for name, values in columns.items()}


def sampled(batch: dict[str, Tensor], noise: float = 1.0, samples: int = 20) -> tuple[Tensor, list[Tensor]]:
    scores = [batch[stage] for stage in STAGES]
    return sampled_cascade(scores, batch["mask"], [4, 2], noise, samples, batch["request_id"])


def test_without_noise_every_sample_is_the_hard_cascade() -> None:
    batch = day(40)
    alive, alone = sampled(batch, noise=1e-9)
    hard = survival_by_stage([batch[stage] for stage in STAGES], batch["mask"], [4, 2])[-1]
    assert torch.equal(alive.double(), hard.unsqueeze(1).expand_as(alive))
    of_rank = survival_by_stage([batch["rank"]], batch["mask"], [2])[-1]
    assert torch.equal(alone[1].double(), of_rank.unsqueeze(1).expand_as(alive))


def test_who_is_among_the_best_of_all_in_every_stage_survives() -> None:
    """The bound's proof, sample by sample; and each stage keeps as many as it may."""
    batch = day(40)
    alive, (first, last) = sampled(batch)
    assert not (first & last & ~alive).any()
    assert (alive & ~(first & last)).any()  # and others survive as well
    assert torch.equal(alive.sum(dim=-1), batch["mask"].sum(dim=-1, keepdim=True).clamp(max=2).expand(-1, 20))


def test_constant_scores_and_much_noise_give_chance() -> None:
    assert_sampled(shares([[7.0] * 8, [7.0] * 8], [4, 2]), [2 / 8] * 8)
    assert_sampled(shares([[3.0, *range(7)], [5.0] * 8], [4, 2], 1e9), [2 / 8] * 8)


def test_a_missing_item_is_as_if_removed() -> None:
    batch = day(1, missing=0.0)
    present = torch.tensor([True, True, False, True, False, True, True, True])
    holes = batch | {"mask": present.unsqueeze(0)}
    for stage in STAGES:
        holes[stage] = torch.where(present, batch[stage], torch.nan)
    without = {name: v[:, present] if v.dim() == 2 else v for name, v in batch.items()}
    (alive, alone), (fewer, fewer_alone) = sampled(holes), sampled(without)
    assert not alive[..., ~present].any()
    assert torch.equal(alive[..., present], fewer)
    assert all(torch.equal(a[..., present], b) for a, b in zip(alone, fewer_alone, strict=True))


def test_nothing_present() -> None:
    alive, _ = sampled(day() | {"mask": torch.zeros(9, 8, dtype=torch.bool)})
    assert not alive.any()


def test_requests_do_not_share_noise_and_keep_theirs_in_any_order() -> None:
    batch, order = day(), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    alive, _ = sampled(batch)
    moved, _ = sampled({name: values[order] for name, values in batch.items()})
    assert torch.equal(moved, alive[order])
    alike = {name: values[:1].expand(2, *values.shape[1:]) for name, values in batch.items()}
    one, other = sampled(alike | {"request_id": torch.tensor([1, 2])})[0]
    assert not torch.equal(one, other)


# ---- violations ------------------------------------------------------------------------------------------------------


def test_a_bound_is_violated_where_no_chance_explains_it() -> None:
    product = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 0.01, 0.9])
    share = torch.tensor([0.5, 0.4, 0.2, 1.0, 0.9, 0.00, 1.0])  # of 64; three standard errors of a half are 0.19
    assert violated(product, share, 64).tolist() == [False, False, True, False, True, False, False]


def test_a_tight_bound_is_hardly_ever_violated() -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.rand(20_000, generator=generator, dtype=torch.float64)
    drawn = torch.rand(20_000, 64, generator=generator, dtype=torch.float64) < product.unsqueeze(1)
    assert violated(product, drawn.double().mean(dim=1), 64).double().mean() < 0.004


# ---- a day, batch by batch -------------------------------------------------------------------------------------------


def measure(columns: dict[str, Tensor], batch_size: int = 100, **changes: Any) -> dict[str, Any]:
    """The numbers of a day that comes in batches, each as wide as its longest request."""
    options: dict[str, Any] = {
        "operator": "lml",
        "temperature": 0.7,
        "cuts": None,
        "noise": 0.7,
        "samples": 32,
        "every": 1,
    }
    bound, kept = Bound(SMALL, **(options | changes)), list[Mapping[str, Tensor]]()

    def batches() -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(columns["mask"]), batch_size):
            batch = {name: values[first : first + batch_size] for name, values in columns.items()}
            width = int(batch["mask"].any(dim=0).nonzero().amax()) + 1
            yield {name: values[:, :width] if values.dim() > 1 else values for name, values in batch.items()}

    passed = list(keep_some(batches(), bound.every, kept))
    assert torch.equal(torch.cat([batch["request_id"] for batch in passed]), columns["request_id"])
    return bound.measure(whole_day(kept))


@pytest.mark.parametrize("every", [1, 4])
def test_the_digits_do_not_depend_on_the_batches(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = day(23)
    whole = measure(columns, every=every)
    assert whole["bound_requests"] == -(-23 // every)
    for batch_size in (1, 2, 7, 22):
        assert measure(columns, batch_size, every=every) == whole
    monkeypatch.setattr(module, "_ENTRIES_PER_CHUNK", 1)
    assert measure(columns, every=every) == pytest.approx(whole, rel=1e-12)


def test_the_digits_do_not_depend_on_the_threads() -> None:
    columns, threads, found = day(40, items=60), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(measure(columns, operator="neural_sort"))
    finally:
        torch.set_num_threads(threads)
    one, other = found
    assert one == pytest.approx(other, rel=1e-12)  # shares are sums of numbers of [R, N, N]
    of_samples = one.keys() - {"bound_product", "bound_product_at_quotas"}
    assert {name: one[name] for name in of_samples} == {name: other[name] for name in of_samples}


def test_all_numbers_by_hand_in_a_stage_of_two_items() -> None:
    """One ground-truth item beside another, in two stages that keep one: it survives when it survives the first."""
    cascade = Cascade(
        stages=(Stage("retrieval", keep=1, model="dssm"), Stage("rank", keep=1, model="dssm")),
        groups=(Group("best", 1), Group("other", 1, position=9)), num_relevant=1,
    )  # fmt: skip
    columns = {
        "retrieval": torch.tensor([[1.0, 0.0]]), "rank": torch.tensor([[0.0, 2.0]]), "labels": torch.tensor([[3, 0]]),
        "group": torch.tensor([[0, 1]]), "mask": torch.ones(1, 2, dtype=torch.bool), "request_id": torch.tensor([8]),
    }  # fmt: skip
    found = Bound(cascade, "lml", 2.0, None, 1.0, 4000, 1).measure(columns)
    # Of two items lml's threshold is in the middle; the noise has another scale here.
    product = reference.sigmoid(0.5 / 2) * reference.sigmoid(-1 / 2)
    first, last = reference.sigmoid(1), reference.sigmoid(-2)
    assert found["bound_product"] == found["bound_product_at_quotas"] == pytest.approx(product, abs=1e-9)
    assert found["bound_sampled"] == pytest.approx(first, abs=0.03)
    assert found["bound_sampled_product"] == pytest.approx(first * last, abs=0.03)
    share = found["bound_sampled"]
    assert found["bound_sampled_error"] == pytest.approx(math.sqrt(share * (1 - share) / 3999), rel=1e-9)
    assert (found["bound_hard"], found["bound_violated"]) == (1.0, 0.0)
    assert (found["bound_items"], found["bound_requests"], found["bound_samples"], found["bound_noise"]) == (
        1,
        1,
        4000,
        1,
    )


def test_three_stages_by_hand() -> None:
    keep, tau = {"first": 3, "second": 2, "third": 1}, 0.8
    cascade = Cascade(
        stages=tuple(Stage(name, keep=number, model="dssm") for name, number in keep.items()),
        groups=(Group("best", 2), Group("others", 2, position=9)), num_relevant=2,
    )  # fmt: skip
    scores = {"first": [1.0, 0.2, -0.5, 0.7], "second": [-0.3, 1.1, 0.4, 0.0], "third": [0.6, 0.1, 0.9, -1.0]}
    columns = {"labels": torch.tensor([[3, 2, 0, 0]]), "group": torch.tensor([[0, 0, 1, 1]])}
    columns |= {"mask": torch.ones(1, 4, dtype=torch.bool), "request_id": torch.tensor([8])}
    columns |= {stage: torch.tensor([values], dtype=torch.float64) for stage, values in scores.items()}
    found = Bound(cascade, "lapsum", tau, None, tau, 4000, 1).measure(columns)
    for name, cuts in (("bound_product", [2, 2, 2]), ("bound_product_at_quotas", [3, 2, 1])):
        parts = [reference.by_threshold("lapsum", s, tau, k).top for s, k in zip(scores.values(), cuts, strict=True)]
        assert found[name] == pytest.approx(np.prod(parts, axis=0)[:2].mean(), rel=1e-9)
    survives = exact(list(scores.values()), list(keep.values()), tau)[:2]
    assert abs(found["bound_sampled"] - np.mean(survives)) < 4 * found["bound_sampled_error"]
    alone = [exact([s], [k], tau)[:2] for s, k in zip(scores.values(), keep.values(), strict=True)]
    assert found["bound_sampled_product"] == pytest.approx(np.prod(alone, axis=0).mean(), abs=0.03)
    assert found["bound_hard"] == 0.5  # the first item beats the second at last


def test_a_product_that_is_no_bound_is_seen() -> None:
    """Shares of a far lower temperature than the noise has are nearly those of the hard cascade."""
    found = measure(day(40), temperature=0.01, cuts=(4, 2), noise=100.0)
    assert found["bound_product"] == found["bound_product_at_quotas"]
    assert found["bound_violated"] > 0.1
    assert found["bound_sampled_product"] < found["bound_sampled"]


def test_more_samples_have_less_error() -> None:
    columns, errors = day(40), []
    for samples in (16, 1024):
        found = measure(columns, samples=samples)
        exactly = measure(columns, samples=4096)["bound_sampled"]
        assert abs(found["bound_sampled"] - exactly) < 4 * found["bound_sampled_error"]
        errors.append(found["bound_sampled_error"])
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.25)


def test_without_ground_truth_nothing_is_known() -> None:
    columns = day(3)
    found = measure(columns | {"group": torch.ones_like(columns["group"])})
    assert {found[name] for name in MEANS} == {None}
    assert found["bound_items"] == 0


# ---- metrics.json ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory)


@pytest.fixture(scope="module")
def lcron(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("--topk_op=lapsum", "--tau=0.5", "--end_to_end_quotas=12,15", "--epochs=1")
    return train(log, tmp_path_factory.mktemp("lcron"), *flags)


@pytest.fixture
def run(lcron: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lcron, tmp_path / "run"))


def test_the_numbers_are_those_of_the_scores(log: Path, run: Path) -> None:
    """By the slow formulas of the operator, from scores.npz."""
    results = evaluate(log, run, "--save_scores")
    with np.load(run / "scores.npz") as scores:
        products: dict[str, list[float]] = {"bound_product": [], "bound_product_at_quotas": []}
        for request in range(len(scores["request_id"])):
            for name, cuts in zip(products, ((12, 15), (30, 20)), strict=True):
                parts = [reference.by_threshold("lapsum", scores[stage][request], 0.5, cut).top
                         for stage, cut in zip(STAGES, cuts, strict=True)]  # fmt: skip
                products[name] += list(np.prod(parts, axis=0)[:10])
    assert {name: results[name] for name in products} == {
        name: pytest.approx(np.mean(values), rel=1e-6) for name, values in products.items()
    }
    assert results["bound_hard"] == pytest.approx(results["joint_recall@10@20"], abs=1e-12)
    assert (results["bound_requests"], results["bound_items"], results["bound_samples"]) == (40, 400, 64)
    assert results["bound_noise"] == 0.5
    assert results["bound_sampled_product"] < results["bound_sampled"]
    assert all(0 <= results[name] <= 1 for name in MEANS)


def test_a_sample_of_a_long_day(log: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITEMS", 40 * 40 // 3)
    monkeypatch.setattr(module, "REQUESTS", 10)
    assert evaluate(log, run)["bound_requests"] == 14  # every third
    assert evaluate(log, run, "--test_random_items=20")["bound_requests"] == 14
    monkeypatch.setattr(module, "REQUESTS", 20)
    assert evaluate(log, run)["bound_requests"] == 20  # every second: long lists leave at least so many


def test_no_bound_and_nothing_else_changes(log: Path, run: Path) -> None:
    with_it, without = evaluate(log, run), evaluate(log, run, "--bound_samples=0")
    assert with_it.keys() - without.keys() == KEYS
    assert without == {name: value for name, value in with_it.items() if name not in KEYS}


def test_the_scale_of_the_noise(log: Path, run: Path) -> None:
    quiet, loud = (evaluate(log, run, f"--bound_noise={noise}") for noise in ("1e-9", "1e6"))
    assert (quiet["bound_noise"], loud["bound_noise"]) == (1e-9, 1e6)
    assert quiet["bound_sampled"] == pytest.approx(quiet["bound_hard"], abs=1e-12)
    assert quiet["bound_sampled_error"] == 0
    assert loud["bound_sampled"] == pytest.approx(0.5, abs=4 * loud["bound_sampled_error"])  # chance: 20 of 40
    assert quiet["bound_product"] == loud["bound_product"]


def test_a_loss_without_operator_has_no_bound(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(log, tmp_path, "--loss_type=bce", "--epochs=0")
    assert not [name for name in evaluate(log, run) if name.startswith("bound")]
    assert run_command(run_test2.main, evaluation_arguments(log, run, "--bound_noise=2")) == 2
    assert "--bound_noise=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("tau", value) for value in (0, -1.0, "50", True, 10**400, [1])],
        *[("topk_op", value) for value in ("quick_sort", 3, ["lml"])],
        *[("end_to_end_quotas", value) for value in ([30], [30, 0], [30, 1 << 63], "30,20", {"rank": 3}, [30.0, 20.0])],
    ],
)
def test_a_damaged_argument(
    name: str, value: object, log: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(run)
    content["arguments"][name] = value
    (run / "config.json").write_text(json.dumps(content))
    assert run_command(run_test2.main, evaluation_arguments(log, run)) == 2
    error = capsys.readouterr().err
    assert "config.json" in error and name in error and error.count("\n") == 1
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize("flag", ["--bound_samples=-1", "--bound_samples=4097", "--bound_noise=0", "--bound_noise=nan"])
def test_refused_values(flag: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate(log, run, flag)
    assert error.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
