"""Logs as the importer of tables makes them: an encoding that every run keeps, an unknown row, other days and zones."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deep_components import run_test, run_train
from deep_components.dataset.log import write_log_file
from deep_components.errors import InputError
from deep_components.files import folder_checksum, read_json
from deep_components.runs.folder import STATE_FILE
from tests.test_own_cascade import DAYS, arguments, write_log

SMALL = ("--emb_dim=4", "--nn_units=8", "--batch_size=20", "--loss_type=bce")
STAGES = ("recall", "coarse", "fine", "final")


def encoded(folder: Path, product: Callable[[str, np.ndarray], np.ndarray] = lambda day, ids: ids) -> Path:
    """The shop's log with an encoding, and times in New York."""
    write_log(folder, product)
    write_log_file(folder, origin="a shop", time_zone="America/New_York")
    (folder / "encoding").mkdir()
    (folder / "encoding/encoding.json").write_text("{}")
    np.save(folder / "encoding/product.npy", np.arange(10, dtype=np.uint64))
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return encoded(tmp_path / "log")


def train(log: Path, run: Path, *flags: str) -> Path:
    run_train.main(arguments(log, run, *SMALL, f"--cascade={log / 'shop.toml'}", *flags))
    return run


def test_a_run_keeps_the_encoding(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path / "run")
    checksum = folder_checksum(log / "encoding")
    assert folder_checksum(run / "encoding") == checksum == read_json(run / "config.json")["encoding_checksum"]
    run_test.main(arguments(log, run))
    train(log, run, "--resume", "--epochs=2")  # the folder is made again
    assert folder_checksum(run / "encoding") == checksum
    assert not [path for path in run.iterdir() if path.suffix == ".tmp"]
    plain = write_log(tmp_path / "plain")
    train(plain, run)  # another training in the folder, of a log without one
    assert read_json(run / "config.json")["encoding_checksum"] is None and not (run / "encoding").exists()
    run_test.main(arguments(plain, run))


def test_another_encoding_is_another_run(log: Path, tmp_path: Path) -> None:
    """The same indices would stand for other values."""
    run = train(log, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    np.save(log / "encoding/product.npy", np.arange(1, 11, dtype=np.uint64))
    with pytest.raises(InputError, match="holds a run with another encoding"):
        train(log, run, "--resume", "--epochs=2")
    with pytest.raises(InputError, match="log/encoding: maps values to other ids than the run's data did"):
        run_test.main(arguments(log, run))
    with pytest.raises(InputError, match=r"--init_from=.*: trained on a log with another encoding than"):
        train(log, tmp_path / "second", f"--init_from={run}")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert not (tmp_path / "second").exists()
    shutil.rmtree(log / "encoding")
    with pytest.raises(InputError, match="log/encoding: maps values to other ids"):
        run_test.main(arguments(log, run))


@pytest.mark.parametrize("damage", ["a bit", "a file less", "all"])
def test_a_damaged_copy_is_not_evaluated(damage: str, log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path / "run")
    path = run / "encoding/product.npy"
    if damage == "a bit":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    else:
        path.unlink() if damage == "a file less" else shutil.rmtree(run / "encoding")
    with pytest.raises(InputError, match="run/encoding: missing or damaged; copy it again, or train again"):
        run_test.main(arguments(log, run))
    assert not (run / "metrics.json").exists()
    train(log, run, "--resume", "--epochs=2")
    run_test.main(arguments(log, run))


def test_an_encoding_is_plain_files(log: Path, tmp_path: Path) -> None:
    (log / "encoding/other.npy").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"other.npy: not a plain file"):
        train(log, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_leftovers_of_a_killed_copy_are_removed(log: Path, tmp_path: Path) -> None:
    left = tmp_path / "run/.encoding.1.tmp"
    left.mkdir(parents=True)
    (left / "product.npy").touch()
    run = train(log, tmp_path / "run")
    assert not left.exists() and (run / STATE_FILE).exists()


def test_the_logs_time_zone(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path / "run")
    assert read_json(run / "config.json")["arguments"]["time_zone"] == "America/New_York"
    train(log, run, "--resume", "--epochs=2", "--time_zone=America/New_York")
    with pytest.raises(
        InputError, match=r"--time_zone=UTC: the days of .* were made in America/New_York; leave it out"
    ):
        train(log, run, "--time_zone=UTC")


def test_the_last_days_that_the_log_names_are_not_trained_on(log: Path, tmp_path: Path) -> None:
    write_log_file(log, origin="a shop", test_days=2)
    run = train(log, tmp_path / "run")
    assert read_json(run / "config.json")["train_days"] == [DAYS[0]]
    run_test.main(arguments(log, run))
    assert read_json(run / "metrics.json")["test_day"] == DAYS[2]


def test_the_unknown_row_is_trained_where_training_days_use_it(tmp_path: Path) -> None:
    """Rare products are index 1 in the training days. Its row moves, and is that of a test day's index 1 and of the
    indices from 8 on, which no training day names; without a use in training it stays as it began."""

    def rare(day: str, ids: np.ndarray) -> np.ndarray:
        return np.where(ids == 2, 1, np.where(ids < 8, ids, 3)) if day != DAYS[-1] else np.where(ids == 1, 8, ids)

    def as_one(day: str, ids: np.ndarray) -> np.ndarray:
        return rare(day, ids) if day != DAYS[-1] else np.where((ids == 8) | (ids == 2), 1, rare(day, ids))

    def never(day: str, ids: np.ndarray) -> np.ndarray:
        return np.where(rare(day, ids) == 1, 4, rare(day, ids)) if day != DAYS[-1] else ids

    rows, scores = {}, {}
    for name, product in {"rare": rare, "as_one": as_one, "never": never}.items():
        log = encoded(tmp_path / name, product)
        before = train(log, tmp_path / f"{name}_untrained", "--epochs=0", f"--train_days={DAYS[0]}")
        run = train(log, tmp_path / f"{name}_run")
        run_test.main(arguments(log, run, "--save_scores"))
        with np.load(run / "scores.npz") as arrays:
            scores[name] = {stage: arrays[stage] for stage in STAGES}
        for stage in STAGES:
            trained, initial = (load_file(folder / f"{stage}.safetensors") for folder in (run, before))
            rows[name, stage] = trained["embedding.product"][trained["ids.product"] == 1]
            moved = rows[name, stage] - initial["embedding.product"][initial["ids.product"] == 1]
            assert moved.any() == (name != "never")
    for stage in STAGES:
        assert np.array_equal(scores["rare"][stage], scores["as_one"][stage])
        assert np.array_equal(rows["rare", stage], rows["as_one", stage])
