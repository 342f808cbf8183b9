"""A log of one's own whose requests have lists of items of varying length, and list fields: trained and evaluated."""

from pathlib import Path

import numpy as np
import pytest

from deep_components import run_test, run_train
from deep_components.dataset.columnar import write_day
from deep_components.dataset.log import write_log_file
from deep_components.evaluation import bound
from deep_components.files import read_json
from deep_components.schema import Field, Schema
from tests.helpers import logged_steps
from tests.test_own_cascade import METHODS

DAYS = ("2026-03-01", "2026-03-02", "2026-03-03")
REQUESTS, LENGTH, LONGEST = 24, 3, 60
SCHEMA = Schema(
    (
        Field("user", "request", size=20),
        Field("genres", "history", size=12, table="genre", length=3),
        Field("product", "history", size=90, unknown=1),
        Field("price", "item", "number"),
        Field("genres", "item", size=12, table="genre", length=3),
        Field("product", "item", size=90, unknown=1),
    )
)
STAGES = """
num_relevant = 2
stages = [
    {name = "recall", keep = 12, model = "dssm"},
    {name = "coarse", keep = 6, model = "mlp", exposed_groups = 2},
    {name = "fine", keep = 3, model = "din", exposed_groups = 1},
]
"""
QUOTAS = {"recall": 12, "coarse": 6, "fine": 3}
GROUPS = 'groups = [{name = "bought"}, {name = "clicked"}, {name = "shown"}]\n'
SIZES = (2, 3, 5)  # of the groups, where all lists are of one length
SIZED = 'groups = [{name = "bought", size = 2}, {name = "clicked", size = 3}, {name = "shown", size = 5}]\n'
FLAGS = ("--emb_dim=4", "--nn_units=64", "--batch_size=8", "--device=cpu")


def day_columns(counts: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    total, genre = counts.sum(), rng.integers(0, 12, (3000, 3))
    group = np.concatenate([np.minimum(np.arange(count) // 2, 2) for count in counts])
    if (counts == sum(SIZES)).all():
        group = np.tile(np.repeat(np.arange(3), SIZES), len(counts))
    mask = rng.random((REQUESTS, LENGTH)) < 0.7
    return {
        "request_id": np.arange(REQUESTS),
        "request.user": rng.integers(1, 20, REQUESTS),
        "history.genres": genre[rng.integers(0, 3000, (REQUESTS, LENGTH))],
        "history.product": np.where(mask, rng.integers(1, 90, mask.shape), 0),
        "history.mask": mask,
        "item.price": rng.standard_normal(total),
        "item.genres": genre[:total],
        "item.product": rng.integers(1, 90, total),
        "item.label": 20 - 5 * group,
        "item.group": group,
    }


def write_log(folder: Path, counts: np.ndarray, ragged: bool = True) -> Path:
    """A log and a cascade file. Days that are not ``ragged`` have the same content in rectangles."""
    for number, day in enumerate(DAYS):
        columns = day_columns(counts, seed=number)
        offset = np.concatenate([[0], np.cumsum(counts)]) if ragged else None
        with write_day(folder / day, SCHEMA, REQUESTS, offset=offset) as files:
            for name, values in columns.items():
                whole = not ragged and name.startswith("item.")
                files.write(name, values.reshape(REQUESTS, counts[0], *values.shape[1:]) if whole else values)
            if not ragged:
                files.write("item.mask", np.ones((REQUESTS, counts[0]), bool))
    write_log_file(folder, "a shop", groups=("bought", "clicked", "shown"))
    (folder / "shop.toml").write_text(STAGES + GROUPS)
    return folder


def run_on(log: Path, run: Path, *flags: str) -> dict[str, float]:
    """Train and evaluate; metrics.json."""
    data = (f"--data_dir={log}", f"--output_dir={run}")
    run_train.main([*data, f"--cascade={log / 'shop.toml'}", *FLAGS, *flags])
    run_test.main([*data, "--device=cpu", "--save_scores", "--batch_size=7"])
    metrics: dict[str, float] = read_json(run / "metrics.json")
    return metrics


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """Lists of one to many items: shorter than every quota, and longer than all of them."""
    found = np.random.default_rng(5).integers(1, 30, REQUESTS)
    found[:4] = 1, 2, LONGEST, 4
    return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, counts: np.ndarray) -> Path:
    return write_log(tmp_path_factory.mktemp("shop"), counts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(shop: Path, tmp_path: Path, counts: np.ndarray, method: str) -> None:
    metrics = run_on(shop, tmp_path, f"--loss_type={method}")
    steps = logged_steps(tmp_path)
    assert len(steps) == 2 * REQUESTS // 8 and all(np.isfinite(step["loss"]) for step in steps)
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["mask"].sum(axis=1).tolist() == counts.tolist()
        assert {scores[stage].shape for stage in QUOTAS} == {(REQUESTS, LONGEST)}
        recalls = []
        for r, count in enumerate(counts):  # the cascade, served request by request
            alive, truth = np.arange(count), np.flatnonzero(scores["group"][r, :count] == 0)
            for stage, quota in QUOTAS.items():
                alive = alive[np.argsort(-scores[stage][r, alive], kind="stable")[:quota]]
            recalls.append(np.isin(truth, alive).mean())
    with np.load(tmp_path / "per_request.npz") as arrays:
        np.testing.assert_allclose(arrays["joint_recall@2@3"], recalls, atol=1e-12)
    assert metrics["joint_recall@2@3"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert recalls[0] == recalls[1] == 1  # of one and of two items: all are kept


def test_one_long_list_leaves_the_bound_its_sample(
    shop: Path, tmp_path: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "ITEMS", counts.sum() / 2)
    monkeypatch.setattr(bound, "REQUESTS", 1)
    assert run_on(shop, tmp_path, "--loss_type=lcron", "--topk_op=lml")["bound_requests"] == REQUESTS / 2


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("method", ["lcron", "fs_ranknet"])
def test_lists_of_one_length_give_the_numbers_of_a_rectangular_log(tmp_path: Path, method: str) -> None:
    counts = np.full(REQUESTS, sum(SIZES))
    found = []
    for name, ragged, groups in (("ragged", True, GROUPS), ("sized", True, SIZED), ("plain", False, SIZED)):
        log = write_log(tmp_path / name, counts, ragged)
        (log / "shop.toml").write_text((STAGES + groups).replace("keep = 12", "keep = 10"))
        run_on(log, tmp_path / f"run_{name}", f"--loss_type={method}")
        run = tmp_path / f"run_{name}"
        found.append((logged_steps(run), arrays_of(run / "scores.npz") | arrays_of(run / "per_request.npz")))
    for steps, arrays in found[1:]:
        assert steps == found[0][0] and arrays.keys() == found[0][1].keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, found[0][1][name], err_msg=name)


@pytest.mark.parametrize("method", ["bce", "fs_ranknet", "lcron"])
def test_random_items_join_lists_of_any_length(shop: Path, tmp_path: Path, counts: np.ndarray, method: str) -> None:
    runs = {}
    for name, flags in (("streamed", ()), ("resident", ("--day_on_device",))):
        run_on(shop, tmp_path / name, f"--loss_type={method}", "--num_random_items=9", *flags)
        runs[name] = logged_steps(tmp_path / name)
    assert runs["resident"] == runs["streamed"]
    assert all(np.isfinite(value) for step in runs["streamed"] for value in step.values() if isinstance(value, float))
    data = (f"--data_dir={shop}", f"--output_dir={tmp_path / 'streamed'}", "--device=cpu", "--save_scores")
    run_test.main([*data, "--test_random_items=15"])
    scores = arrays_of(tmp_path / "streamed" / "scores.npz")
    assert scores["mask"].sum(axis=1).tolist() == (counts + 15).tolist()
    assert ((scores["group"] == 3) & scores["mask"]).sum(axis=1).tolist() == [15] * REQUESTS
    assert np.isfinite(scores["recall"][scores["mask"]]).all()


def test_a_day_on_the_device_and_the_plain_look_up_give_the_same_run(shop: Path, tmp_path: Path) -> None:
    """In float64: Adam makes whole steps of what float32 leaves of gradients that are zero."""
    streamed, resident, plain = (
        run_on(shop, tmp_path / name, "--loss_type=lcron", "--dtype=float64", *flags)
        for name, flags in (("streamed", ()), ("resident", ("--day_on_device",)), ("plain", ("--no-compile",)))
    )
    for name, value in streamed.items():
        assert resident[name] == value
        assert plain[name] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value)
    for stage in QUOTAS:
        mine, theirs = (arrays_of(tmp_path / run / "scores.npz")[stage] for run in ("streamed", "plain"))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
