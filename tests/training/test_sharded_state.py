"""One process goes on from the state that several saved, to the bytes of a training that was always alone."""

from pathlib import Path

import numpy as np
import pytest

from deep_components.runs.folder import STATE_FILE, shard_file
from deep_components.runs.shards import save_shard
from deep_components.runs.state import load_state, run_note, save_state
from tests.helpers import config, contents, train

FILES = ("retrieval.safetensors", "rank.safetensors", STATE_FILE)
COUNT, FLAGS = 3, ("--compact_from=1", "--pull_from=1")

pytestmark = pytest.mark.usefixtures("short_rules")


def is_own(name: str, values: np.ndarray) -> bool:
    return name.startswith(("ids/", "generator/")) or ("/embedding." in name and values.ndim > 0)


def shard(run: Path) -> None:
    """Save the state again, as processes do that hold the rows of all tables between them."""
    arrays, position = load_state(run / STATE_FILE)
    note = run_note(config(run))
    own = {name: values for name, values in arrays.items() if is_own(name, values)}
    checksums = [
        save_shard(
            run, position["step"], rank, COUNT,
            {name: v if name.startswith("generator/") else v[rank::COUNT] for name, v in own.items()}, note,
        )
        for rank in range(COUNT)
    ]  # fmt: skip
    shared = {name: values for name, values in arrays.items() if name not in own}
    save_state(run / STATE_FILE, shared, position, note, checksums)


def test_one_process_resumes_what_several_saved(log: Path, tmp_path: Path) -> None:
    alone, run = train(log, tmp_path / "alone", "--epochs=2", *FLAGS), train(log, tmp_path / "run", *FLAGS)
    before = load_state(run / STATE_FILE)[0]
    shard(run)
    assert len(list(run.glob("training_state.*-of-*"))) == COUNT
    after, position = load_state(run / STATE_FILE)
    assert (run / shard_file(position["step"], COUNT - 1, COUNT)).exists() and after.keys() == before.keys()
    assert all(np.array_equal(after[name], values) for name, values in before.items())
    train(log, run, "--epochs=2", "--resume", *FLAGS)
    assert contents(run, *FILES) == contents(alone, *FILES)
    assert not list(run.glob("training_state.*-of-*"))
