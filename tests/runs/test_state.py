"""A run's safetensors files: what is written comes back exactly; what is damaged or does not fit is a sentence."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from deep_components.errors import InputError
from deep_components.files import temporaries
from deep_components.runs import checked, state
from deep_components.runs.checked import Blocks
from deep_components.runs.folder import STATE_FILE
from deep_components.runs.state import (
    OpenModel,
    load,
    load_model,
    load_state,
    model_checksum,
    save,
    save_models,
    save_state,
    saved_ids,
    saved_shapes,
)

MODELS: dict[str, dict[str, np.ndarray]] = {
    "retrieval": {"tower.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, np.float32)},
    "rank": {"tower.0.weight": np.arange(4.0)},
}
POSITION = {"epoch": 1, "day": 2, "batch": 4, "step": 3, "skipped": 1}


def test_models_come_back(tmp_path: Path) -> None:
    save_models(tmp_path / "run", MODELS, {"data": "simulated", "initial_seed": 5})
    for stage, arrays in MODELS.items():
        loaded = load_model(tmp_path / "run", stage)
        assert loaded.arrays.keys() == arrays.keys() and loaded.ids == {} and loaded.initial_seed == 5
        assert all(np.array_equal(loaded.arrays[name], values) for name, values in arrays.items())
        assert all(loaded.arrays[name].dtype == values.dtype for name, values in arrays.items())
        assert load(tmp_path / "run" / f"{stage}.safetensors")[1]["data"] == "simulated"


@pytest.mark.parametrize(
    "position",
    [
        None, [], "x", {}, POSITION | {"day": -1}, POSITION | {"day": "2"}, POSITION | {"step": 1.5},
        POSITION | {"step": True}, POSITION | {"batch": 1 << 70}, POSITION | {"more": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_a_forged_position(position: Any, tmp_path: Path) -> None:
    save(tmp_path / STATE_FILE, {"a": np.ones(2)}, {"position": position})
    with pytest.raises(InputError, match="not the state of a training run; train again without --resume"):
        load_state(tmp_path / STATE_FILE)


def test_the_shapes_alone(tmp_path: Path) -> None:
    save_models(tmp_path, MODELS, {})
    assert saved_shapes(tmp_path, "retrieval") == {"tower.0.weight": (2, 3), "bias": (2,)}
    with pytest.raises(InputError, match=r"prerank.safetensors: no such file"):
        saved_shapes(tmp_path, "prerank")


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    for run in range(3):
        save_models(tmp_path / str(run), MODELS, {"data": "simulated", "loss_type": "lcron", "more": "x"})
    for stage in MODELS:
        assert len({(tmp_path / str(run) / f"{stage}.safetensors").read_bytes() for run in range(3)}) == 1


def test_the_state_comes_back(tmp_path: Path) -> None:
    """Also what lies transposed in memory, is of one value, or of none."""
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "step": np.array(3.0), "none": np.zeros((0, 4), np.float32)}
    save_state(tmp_path / "state", arrays, POSITION)
    loaded, position = load_state(tmp_path / "state")
    assert position == POSITION and loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], values) for name, values in arrays.items())
    assert all(loaded[name].shape == values.shape for name, values in arrays.items())


def test_a_state_that_does_not_count_what_was_skipped(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    save_state(tmp_path / "state", {}, {name: value for name, value in POSITION.items() if name != "skipped"})
    assert load_state(tmp_path / "state")[1] == POSITION | {"skipped": 0}


def test_a_model_s_checksum_tells_its_content(tmp_path: Path) -> None:
    for name, rank in (("one", np.arange(4.0)), ("same", np.arange(4.0)), ("other", np.arange(1.0, 5.0))):
        save_models(tmp_path / name, {"rank": {"bias": rank}}, {})
    one, same, other = (model_checksum(tmp_path / name, "rank") for name in ("one", "same", "other"))
    assert one == same != other
    save_file({"bias": np.arange(4.0)}, tmp_path / "one" / "rank.safetensors")  # by others, without checksums
    foreign = model_checksum(tmp_path / "one", "rank")
    save_file({"bias": np.arange(5.0)}, tmp_path / "one" / "rank.safetensors")
    assert model_checksum(tmp_path / "one", "rank") != foreign
    with pytest.raises(InputError, match="no such file; train first"):
        model_checksum(tmp_path, "rank")


def test_a_state_without_a_position(tmp_path: Path) -> None:
    save_file(MODELS["rank"], tmp_path / "state")
    with pytest.raises(InputError, match="not the state of a training run"):
        load_state(tmp_path / "state")


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """The checksums cover a type under PyTorch's name for it, as when PyTorch wrote the files."""
    torch = pytest.importorskip("torch")
    types = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
    save(tmp_path / "file", {str(kind): torch.zeros(2, dtype=kind).numpy() for kind in types}, {})
    assert all(str(values.dtype) == name.removeprefix("torch.") for name, values in load(tmp_path / "file")[0].items())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"retrieval.safetensors: no such file"):
        load_model(tmp_path, "retrieval")


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "folder"])
def test_a_damaged_file(damage: str, tmp_path: Path) -> None:
    save_models(tmp_path, MODELS, {})
    path = tmp_path / "rank.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-5], "garbage": b"\xff" * len(whole)}[damage])
    with pytest.raises(InputError, match=r"rank.safetensors: not a readable checkpoint"):
        load_model(tmp_path, "rank")


@pytest.mark.parametrize("text", ["[1]", "{", '{"sha256": 1}'])
def test_metadata_that_are_not_ours(text: str, tmp_path: Path) -> None:
    save_file(MODELS["rank"], tmp_path / "rank.safetensors", metadata={"run": text})
    with pytest.raises(InputError, match=r"not a readable checkpoint|damaged: its metadata"):
        load_model(tmp_path, "rank")


def test_a_file_half_written_by_a_killed_process_is_found(tmp_path: Path) -> None:
    """It must lie where it is looked for."""
    seen: list[list[Path]] = []

    def blocks() -> Iterator[np.ndarray]:
        seen.append(list(tmp_path.iterdir()))
        yield np.zeros(2)

    save(tmp_path / STATE_FILE, {"a": Blocks((2,), np.dtype(float), blocks())}, {})
    assert [[path] for path in tmp_path.iterdir()] == [[tmp_path / STATE_FILE]]
    [[written]] = seen
    written.touch()
    assert temporaries(tmp_path / STATE_FILE) == [written]


def test_files_may_be_read_by_whom_other_files_may_be(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    save_state(tmp_path / "state", {"a": np.zeros(2)}, {})
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_runs_are_read_without_torch() -> None:
    modules = "deep_components.runs.folder, deep_components.runs.identity, deep_components.runs.state"
    code = f"import sys, deep_components.runs.records, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ---- compacted tables ------------------------------------------------------------------------------------------------

ROWS = 102
some = settings(max_examples=30, deadline=None, derandomize=True, database=None)
listed = st.sets(st.integers(0, ROWS - 1), max_size=12).map(lambda ids: np.array(sorted(ids), np.int64))


def initial(table: str, ids: np.ndarray) -> np.ndarray:
    assert table == "video"
    return np.stack([-ids, -ids], axis=1).astype(float)


def compacted(folder: Path, ids: np.ndarray, seed: int | None = 5) -> OpenModel:
    """A saved table in which id i has the row (i, i)."""
    table = np.stack([ids, ids], axis=1).astype(float)
    save_models(folder, {"rank": {"embedding.video": table}}, {"initial_seed": seed}, {"video": ids})
    return OpenModel(folder, "rank")


@some
@given(saved=listed, wanted=listed)
def test_the_rows_of_ids(saved: np.ndarray, wanted: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those of the file, and initial values for ids that it lacks; asked for in any order, and many at a time."""
    folder = tmp_path_factory.mktemp("rows")
    model, backwards = compacted(folder, saved), wanted[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_ROWS_AT_A_TIME", 3)
        patch.setattr(checked, "_BLOCK_BYTES", 2 * 2 * 8)  # two rows
        rows = model.rows("video", backwards, initial)
    assert rows.tolist() == [[i, i] if i in saved else [-i, -i] for i in backwards]
    found, seed = saved_ids(folder, "rank")
    assert np.array_equal(found["video"], saved) and seed == 5


def test_the_rows_of_a_whole_table(tmp_path: Path) -> None:
    save_models(tmp_path, {"rank": {"embedding.video": np.arange(10.0).reshape(5, 2)}}, {})
    model = OpenModel(tmp_path, "rank")
    assert model.rows("video", np.array([4, 1]), initial).tolist() == [[8, 9], [2, 3]]
    with pytest.raises(InputError, match="table video lacks id 5"):
        model.rows("video", np.array([4, 5]), initial)


def test_an_id_whose_initial_value_nothing_tells(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="table video lacks id 7"):
        compacted(tmp_path, np.array([0, 4]), seed=None).rows("video", np.array([0, 7]), initial)


@pytest.mark.parametrize(
    "ids",
    [[4, 0, 7], [0, 4, 4], [-1, 0, 4], [0.0, 4.0, 7.0], [[0, 4, 7]], [0, 4]],
    ids=["unsorted", "repeated", "negative", "fractions", "a matrix", "too few"],
)
def test_damaged_ids(ids: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rank.safetensors"
    compacted(tmp_path, np.array([0, 4, 7]))
    save_file(load_file(path) | {"ids.video": np.array(ids)}, path)
    with pytest.raises(InputError, match=r"rank\.safetensors: .*ids.*train again"):
        OpenModel(tmp_path, "rank").rows("video", np.array([0]), initial)
