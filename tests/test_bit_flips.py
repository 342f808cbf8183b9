"""A flipped bit, anywhere in what a run or a cache leaves on the disk, is never used silently."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deep_components.cascade import TWO_STAGE
from deep_components.dataset import columnar
from deep_components.dataset.columnar import open_day
from deep_components.errors import InputError
from deep_components.reporting.frame import read_runs
from deep_components.runs import checkpoint
from tests.dataset.synthetic import DAY, random_log, write_log
from tests.helpers import evaluate, train

FLIPS_OF_CACHES, FLIPS_OF_CHECKPOINTS, FLIPS_OF_RESULTS = 400, 350, 250


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


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flip makes the cache be built anew; a copy of the sound one saves the time that would take."""
    root = write_log(tmp_path / "log", random_log(6))
    sound = {name: np.array(values) for name, values in open_day(root, DAY, TWO_STAGE).columns.items()}
    (folder,) = (root / "cache" / "two_stage").iterdir()
    shutil.copytree(folder, tmp_path / "sound")
    built: list[Path] = []

    def copy(target: Path, *_: Any) -> None:
        built.append(target)
        shutil.copytree(tmp_path / "sound", target)

    monkeypatch.setattr(columnar, "_build_folder", copy)
    for _ in flips(sorted(folder.iterdir()), FLIPS_OF_CACHES):
        opened = open_day(root, DAY, TWO_STAGE).columns
    assert len(built) == FLIPS_OF_CACHES
    assert all(np.array_equal(opened[name], values) for name, values in sound.items())
    open_day(root, DAY, TWO_STAGE)
    assert len(built) == FLIPS_OF_CACHES


def test_checkpoints(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, or read as it was written: of a lost checksum the user is told."""
    files = sorted(run.glob("*.safetensors"))
    assert len(files) == 3
    sound = {path: checkpoint.load_tensors(path)[0] for path in files}
    refused = 0
    for path in flips(files, FLIPS_OF_CHECKPOINTS):
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                tensors, _ = checkpoint.load_tensors(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert "has no checksums" in caplog.text
            assert tensors.keys() == sound[path].keys()
            assert all(torch.equal(value, sound[path][name]) for name, value in tensors.items())
    assert refused > 0.98 * FLIPS_OF_CHECKPOINTS


def test_part_of_a_checkpoint(run: Path) -> None:
    path = run / "rank.safetensors"
    whole, _ = checkpoint.load_tensors(path)
    part, _ = checkpoint.load_tensors(path, prefix="embedding.user")
    assert part.keys() == {"embedding.user"} and torch.equal(part["embedding.user"], whole["embedding.user"])


def test_a_tensor_that_was_taken_away_or_exchanged(run: Path, tmp_path: Path) -> None:

    tensors = load_file(run / "rank.safetensors")
    with safe_open(run / "rank.safetensors", framework="pt") as file:
        metadata = file.metadata()
    names = sorted(tensors)
    same_shape = [name for name in names if tensors[name].shape == tensors["embedding.user"].shape] + names[:1]
    forged = {
        "taken away": {name: value for name, value in tensors.items() if name != names[0]},
        "added": tensors | {"stranger": torch.zeros(1)},
        "exchanged": tensors | {names[0]: torch.zeros_like(tensors[names[0]])},
        "of another type": tensors | {same_shape[0]: tensors[same_shape[0]].view(torch.int32)},
    }
    for what, changed in forged.items():
        save_file(changed, tmp_path / what, metadata=metadata)
        with pytest.raises(InputError, match="damaged: "):
            checkpoint.load_tensors(tmp_path / what)


def test_results(run: Path) -> None:
    """config.json and metrics.json: refused, or what they say is unchanged."""
    sound = read_runs([run]).runs.to_json(default_handler=str)
    refused = 0
    for _ in flips([run / "config.json", run / "metrics.json"], FLIPS_OF_RESULTS):
        try:
            read = read_runs([run]).runs.to_json(default_handler=str)
        except InputError as error:
            assert str(run) in str(error)
            refused += 1
        else:
            assert read == sound
    assert refused > 0.9 * FLIPS_OF_RESULTS
