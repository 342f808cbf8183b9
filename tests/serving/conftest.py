"""Trained runs that the tests of serving share: one of RecFlow's layout, one of a table; and their bundles."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from deep_components import run_test, run_train
from deep_components.cascade import Cascade
from deep_components.dataset.importers.table.command import import_table
from deep_components.serving.export import export_run
from examples.shop.make_rows import make_day, make_items, make_tastes
from tests.helpers import evaluate, small_log, train

SHOP = Path(__file__).parents[2] / "examples/shop"
SHOP_DAYS = pd.date_range("2025-03-03", periods=3, tz="Europe/Berlin")


class Trained(NamedTuple):
    """A run, evaluated with --save_scores, and what it was made of."""

    run: Path
    log: Path
    corpus: Path | None  # a table of the items; None where the log has them

    def scores(self) -> dict[str, np.ndarray]:
        """scores.npz of the last day: stage -> [R, N], and request_id, labels, mask, group."""
        with np.load(self.run / "scores.npz") as arrays:
            return dict(arrays)


@pytest.fixture(scope="session")
def recflow(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two stages on a simulated log. All tables are compacted: the test day has ids that were never trained."""
    log, run = small_log(tmp_path_factory), tmp_path_factory.mktemp("served") / "run"
    train(log, run, "--compact_from=1", "--epochs=2")
    evaluate(log, run, "--save_scores")
    return Trained(run, log, None)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four stages on an imported table, whose ids are texts and whose numbers are partly missing."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copy(SHOP / "log.toml", folder)
    rng = np.random.default_rng(0)
    items, tastes = make_items(rng), make_tastes(rng)
    for day in SHOP_DAYS:
        (folder / f"rows/day={day:%Y-%m-%d}").mkdir(parents=True)
        path = folder / f"rows/day={day:%Y-%m-%d}/part-0.parquet"
        make_day(day, 40, items, tastes, rng).to_parquet(path, index=False)
    import_table(folder / "log.toml", folder / "log")
    arguments = [f"--data_dir={folder / 'log'}", f"--output_dir={folder / 'run'}", "--device=cpu"]
    sizes = ["--loss_type=lcron", "--batch_size=16", "--emb_dim=4", "--nn_units=16", "--seq_len=5"]
    run_train.main([*arguments, *sizes, f"--cascade={SHOP / 'cascade.toml'}"])
    run_test.main([*arguments, "--save_scores"])
    return Trained(folder / "run", folder / "log", folder / "rows")


@pytest.fixture(scope="session")
def shop_cascade() -> Cascade:
    return Cascade.from_toml(SHOP / "cascade.toml")


@pytest.fixture(scope="session")
def recflow_bundle(recflow: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the run with the log's items; not to be changed."""
    folder = tmp_path_factory.mktemp("recflow_bundle") / "bundle"
    export_run(recflow.run, folder, data_dir=recflow.log)
    return folder


@pytest.fixture(scope="session")
def shop_bundle(shop: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the run with the items of the imported table; not to be changed."""
    folder = tmp_path_factory.mktemp("shop_bundle") / "bundle"
    export_run(shop.run, folder, corpus=shop.corpus, data_dir=shop.log)
    return folder
