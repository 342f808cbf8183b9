"""A log with fields of its own, numbers among them, and a cascade of four stages: the code of the paper's settings."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deep_components import run_test, run_train
from deep_components.cascade import Cascade
from deep_components.dataset.columnar import write_day
from deep_components.dataset.log import write_log_file
from deep_components.errors import InputError
from deep_components.files import read_json
from tests.schemas import OWN, random_batch

METHODS = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting"]
DAYS = ("2026-03-01", "2026-03-02", "2026-03-03")
CASCADE = """
num_relevant = 2
stages = [
    {name = "recall", keep = 8, model = "dssm"},
    {name = "coarse", keep = 6, model = "mlp"},
    {name = "fine", keep = 5, model = "din", exposed_groups = 2},
    {name = "final", keep = 3, model = "din", exposed_groups = 1},
]
groups = [{name = "bought", size = 2}, {name = "clicked", size = 3}, {name = "shown", size = 5}]
"""


def write_log(
    folder: Path,
    product: Callable[[str, np.ndarray], np.ndarray] = lambda day, ids: ids,
    sizes: tuple[int, int, int] = (2, 3, 5),
) -> Path:
    """A log and a cascade file; the items' groups differ from request to request. ``product`` changes a day's products,
    given the day; ``sizes`` are those of the groups."""
    folder.mkdir(exist_ok=True)
    (folder / "shop.toml").write_text(CASCADE)
    rng = np.random.default_rng(0)
    for number, day in enumerate(DAYS):
        batch = random_batch(OWN, requests=40, num_items=sum(sizes), length=4, seed=number)
        group = rng.permuted(np.tile(np.repeat([0, 1, 2], sizes), (40, 1)), axis=1)
        with write_day(folder / day, OWN, requests=40) as columns:
            for field in OWN.fields:
                values = getattr(batch.features, field.side)[field.name].numpy()
                columns.write(f"{field.side}.{field.name}", product(day, values) if field.name == "product" else values)
            columns.write("request_id", np.arange(40))
            columns.write("history.mask", batch.features.history_mask.numpy())
            columns.write("item.mask", batch.targets.mask.numpy())
            columns.write("item.group", group)
            columns.write("item.label", 20 - 5 * group)
    write_log_file(folder, origin="a shop")
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("shop"))


def arguments(shop: Path, run: Path, *flags: str) -> list[str]:
    return ["--device=cpu", f"--data_dir={shop}", f"--output_dir={run}", *flags]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(shop: Path, tmp_path: Path, method: str) -> None:
    sizes = ("--emb_dim=4", "--nn_units=32", "--batch_size=20", f"--cascade={shop / 'shop.toml'}")
    run_train.main(arguments(shop, tmp_path, *sizes, f"--loss_type={method}"))
    run_test.main(arguments(shop, tmp_path, "--save_scores"))
    metrics, config = read_json(tmp_path / "metrics.json"), read_json(tmp_path / "config.json")
    assert metrics["setting"] == "shop" and metrics["data"] == "a shop" and metrics["num_requests"] == 40
    assert config["cascade"] == Cascade.from_toml(shop / "shop.toml").to_json()
    assert config["schema"] == OWN.to_json()
    for stage, quota in {"recall": 8, "coarse": 6, "fine": 5, "final": 3}.items():
        assert 0 <= metrics[f"{stage}_recall@2@{quota}"] <= 1
    with np.load(tmp_path / "scores.npz") as scores:
        assert {scores[stage].shape for stage in ("recall", "coarse", "fine", "final")} == {(40, 10)}
        alive = scores["mask"].copy()
        for stage, quota in {"recall": 8, "coarse": 6, "fine": 5, "final": 3}.items():  # the cascade, written out
            order = np.argsort(np.where(alive, -scores[stage], np.inf), axis=1, kind="stable")
            kept = np.zeros_like(alive)
            np.put_along_axis(kept, order[:, :quota], values=True, axis=1)
            alive &= kept
        truth = (scores["group"] == 0) & scores["mask"]
    with_truth = truth.any(axis=1)
    recall = ((alive & truth).sum(axis=1)[with_truth] / truth.sum(axis=1)[with_truth]).mean()
    assert metrics["joint_recall@2@3"] == pytest.approx(recall, abs=1e-9)
    assert metrics["num_requests_without_ground_truth"] == int((~with_truth).sum())
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two days of two batches


def test_training_lowers_the_loss(shop: Path, tmp_path: Path) -> None:
    """Labels here are random, so what can be learnt is the training days themselves."""
    sizes = ("--emb_dim=8", "--nn_units=32", "--batch_size=40", f"--cascade={shop / 'shop.toml'}", "--epochs=25")
    run_train.main(arguments(shop, tmp_path, *sizes, "--loss_type=fs_ranknet", "--train_days=2026-03-01"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.7 * losses[0]


def test_ids_that_the_training_days_lack_take_the_unknown_row(tmp_path: Path) -> None:
    """Products from 8 on are in the test day alone; in another log of the same training days they are the unknown 1."""
    sizes = ("--emb_dim=4", "--nn_units=32", "--batch_size=20", "--loss_type=bce")
    scores = []
    for name, stand_in in (("as_they_are", None), ("replaced", 1)):

        def product(day: str, ids: np.ndarray, stand_in: int | None = stand_in) -> np.ndarray:
            if day != DAYS[-1]:
                return np.where(ids < 8, ids, 2)
            return ids if stand_in is None else np.where(ids < 8, ids, stand_in)

        log, run = write_log(tmp_path / name, product), tmp_path / f"run_{name}"
        run_train.main(arguments(log, run, *sizes, f"--cascade={log / 'shop.toml'}"))
        run_test.main(arguments(log, run, "--save_scores"))
        with np.load(run / "scores.npz") as arrays:
            scores.append({stage: arrays[stage] for stage in ("recall", "coarse", "fine", "final")})
    for stage, found in scores[0].items():
        assert np.array_equal(found, scores[1][stage])


def test_a_model_of_ones_own(shop: Path, tmp_path: Path) -> None:
    """The run's folder names it, but only the user's cascade file has it imported: a run may be somebody else's."""
    own = tmp_path / "own.toml"
    own.write_text(CASCADE.replace('"mlp"', '"tests.models.own_models:Bilinear", nn_units = 6'))
    sizes = ("--emb_dim=4", "--nn_units=32", "--batch_size=20", f"--cascade={own}")
    run_train.main(arguments(shop, tmp_path / "run", *sizes, "--loss_type=lcron"))
    with pytest.raises(InputError, match=r"names 'tests\.models\.own_models:Bilinear', which is none of .* --cascade"):
        run_test.main(arguments(shop, tmp_path / "run"))
    with pytest.raises(InputError, match="a run of own; use the command or the --cascade"):
        run_test.main(arguments(shop, tmp_path / "run", f"--cascade={shop / 'shop.toml'}"))
    run_test.main(arguments(shop, tmp_path / "run", f"--cascade={own}"))
    assert 0 <= read_json(tmp_path / "run/metrics.json")["coarse_recall@2@6"] <= 1
    assert load_file(tmp_path / "run/coarse.safetensors")["item.weight"].shape[0] == 6
    run_train.main(arguments(shop, tmp_path / "run", *sizes, "--loss_type=lcron", "--resume", "--epochs=2"))
    run_train.main(arguments(shop, tmp_path / "whole", *sizes, "--loss_type=lcron", "--epochs=2"))
    resumed, whole = (load_file(tmp_path / name / "coarse.safetensors") for name in ("run", "whole"))
    assert whole["norm.num_batches_tracked"] == 8  # dropout and the means of the batches go on where they were, too
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
