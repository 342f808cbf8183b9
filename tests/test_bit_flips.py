"""A flipped bit, anywhere in what a run or a cache leaves on the disk, is never used silently."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deep_components.cascade import TWO_STAGE
from deep_components.dataset.columnar import read_day
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.runs.records import read_folder
from deep_components.runs.state import load
from tests.dataset.synthetic import DAY, random_log, write_log
from tests.helpers import evaluate, train

FLIPS_OF_DAYS, FLIPS_OF_CHECKPOINTS, FLIPS_OF_RESULTS = 400, 350, 250


def flips(files: list[Path], count: int) -> Iterator[Path]:
    """The files by turns, small ones as often as large ones, each time with one bit flipped; put right afterwards."""
    rng = np.random.default_rng(0)
    originals = [path.read_bytes() for path in files]
    for turn in range(count):
        path, original = files[turn % len(files)], originals[turn % len(files)]
        bit = int(rng.integers(len(original) * 8))
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield path
        path.write_bytes(original)


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train(log, tmp_path_factory.mktemp("flips") / "run")
    evaluate(log, folder)
    return folder


def test_days(tmp_path: Path) -> None:
    """Refused; a cache is built anew then (tests/dataset)."""
    root = write_log(tmp_path / "log", random_log(6))
    sound = open_log(root).open_day(DAY, TWO_STAGE)
    (folder,) = (root / "cache" / "two_stage").iterdir()
    for _ in flips(sorted(folder.iterdir()), FLIPS_OF_DAYS):
        with pytest.raises(InputError):
            read_day(folder, DAY, TWO_STAGE)
    again = read_day(folder, DAY, TWO_STAGE)
    assert all(np.array_equal(again.columns[name], values) for name, values in sound.columns.items())


def test_checkpoints(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, or read as it was written: of a lost checksum the user is told."""
    files = sorted(run.glob("*.safetensors"))
    assert len(files) == 3
    sound = {path: load(path)[0] for path in files}
    refused = 0
    for path in flips(files, FLIPS_OF_CHECKPOINTS):
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                arrays, _ = load(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert "has no checksums" in caplog.text
            assert arrays.keys() == sound[path].keys()
            assert all(np.array_equal(values, sound[path][name]) for name, values in arrays.items())
    assert refused > 0.98 * FLIPS_OF_CHECKPOINTS


def test_part_of_a_checkpoint(run: Path) -> None:
    path = run / "rank.safetensors"
    whole, part = load(path)[0], load(path, prefix="embedding.user")[0]
    assert part.keys() == {"embedding.user"} and np.array_equal(part["embedding.user"], whole["embedding.user"])


def test_an_array_that_was_taken_away_or_exchanged(run: Path, tmp_path: Path) -> None:
    arrays = load_file(run / "rank.safetensors")
    with safe_open(run / "rank.safetensors", framework="np") as file:
        metadata = file.metadata()
    first = min(arrays)
    forged = {
        "taken away": {name: values for name, values in arrays.items() if name != first},
        "added": arrays | {"another": np.zeros(1)},
        "exchanged": arrays | {first: np.zeros_like(arrays[first])},
        "of another type": arrays | {first: arrays[first].view(np.int32)},
    }
    for what, changed in forged.items():
        save_file(changed, tmp_path / what, metadata=metadata)
        with pytest.raises(InputError, match="damaged: "):
            load(tmp_path / what)


def test_results(run: Path) -> None:
    """config.json and metrics.json: refused, or what they say is unchanged."""
    sound = read_folder(run)
    refused = 0
    for _ in flips([run / "config.json", run / "metrics.json"], FLIPS_OF_RESULTS):
        try:
            read = read_folder(run)
        except InputError as error:
            assert str(run) in str(error)
            refused += 1
        else:
            assert without_checksum(read.config) == sound.config
            assert without_checksum(read.metrics) == sound.metrics
    assert refused > 0.9 * FLIPS_OF_RESULTS


def without_checksum(content: Any) -> dict[str, Any]:
    """Without the checksum under a name that a flipped bit has changed, which so checks nothing."""
    return {
        name: value
        for name, value in content.items()
        if not (len(name) == len("checksum") and sum(a != b for a, b in zip(name, "checksum", strict=True)) == 1)
    }
