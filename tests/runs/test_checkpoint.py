"""Checkpoints: what is written comes back exactly; what does not fit is a sentence."""

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from deep_components.cascade import TWO_STAGE
from deep_components.errors import InputError
from deep_components.files import read_json
from deep_components.models import build_models
from deep_components.runs import checkpoint
from deep_components.tables.embedding import ID_FIELDS
from deep_components.tables.id_set import IdSet


def models(seed: int, width: int = 3) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"retrieval": nn.Linear(2, width), "rank": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, width))}


def states(stages: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    return {stage: model.state_dict() for stage, model in stages.items()}


def same(one: dict[str, nn.Module], other: dict[str, nn.Module]) -> bool:
    return all(
        torch.equal(value, other[stage].state_dict()[name])
        for stage, model in one.items()
        for name, value in model.state_dict().items()
    )


def test_models_come_back(tmp_path: Path) -> None:
    ours, theirs = models(0), models(1)
    assert not same(ours, theirs)
    checkpoint.save_models(tmp_path / "run", states(ours), {"data": "simulated", "loss_type": "lcron"})
    checkpoint.load_models(tmp_path / "run", theirs)
    assert same(ours, theirs)
    for stage in ours:
        with safe_open(tmp_path / "run" / f"{stage}.safetensors", framework="pt") as file:
            metadata = str(file.metadata())
        assert "simulated" in metadata and "lcron" in metadata


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    note = {"data": "simulated", "loss_type": "lcron", "more": "x", "and": "y"}
    for run in range(3):
        checkpoint.save_models(tmp_path / str(run), states(models(0)), note)
    for stage in models(0):
        assert len({(tmp_path / str(run) / f"{stage}.safetensors").read_bytes() for run in range(3)}) == 1


def test_loading_casts_to_the_models_type(tmp_path: Path) -> None:
    ours = models(0)
    checkpoint.save_models(tmp_path, states(ours), {})
    theirs = {stage: model.double() for stage, model in models(1).items()}
    checkpoint.load_models(tmp_path, theirs)
    assert all(p.dtype == torch.float64 for model in theirs.values() for p in model.parameters())
    assert same({stage: model.double() for stage, model in ours.items()}, theirs)


def test_another_shape(tmp_path: Path) -> None:
    checkpoint.save_models(tmp_path, states(models(0)), {})
    with pytest.raises(InputError, match=r"retrieval.*bias has shape \(3,\), but the model wants \(4,\).*--emb_dim"):
        checkpoint.load_models(tmp_path, models(0, width=4))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_another_set_of_parameters(change: str, tmp_path: Path) -> None:
    checkpoint.save_models(tmp_path, states(models(0)), {})
    tensors = dict(models(0)["retrieval"].state_dict())
    if change == "missing":
        del tensors["bias"]
    else:
        tensors["stranger"] = torch.zeros(1)
    save_file(tensors, tmp_path / "retrieval.safetensors")
    with pytest.raises(InputError, match=r"parameter (bias|stranger) has shape"):
        checkpoint.load_models(tmp_path, models(0))


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"retrieval.safetensors: no such file"):
        checkpoint.load_models(tmp_path, models(0))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "folder"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    checkpoint.save_models(tmp_path, states(models(0)), {})
    path = tmp_path / "rank.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-5], "garbage": b"\xff" * len(whole)}[damage])
    with pytest.raises(InputError, match=r"rank.safetensors: not a readable checkpoint"):
        checkpoint.load_models(tmp_path, models(0))


def test_the_state_comes_back(tmp_path: Path) -> None:
    tensors = {"parameter/a": torch.arange(6.0).view(2, 3), "optimizer/a/step": torch.tensor(3.0)}
    position = {"epoch": 1, "day": 2, "batch": 4, "step": 3}
    checkpoint.save_state(tmp_path / "state", tensors, position)
    loaded, where = checkpoint.load_state(tmp_path / "state")
    assert where == position
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_file_half_written_by_a_killed_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes to a file of its own naming first: that too must lie where it is looked for."""
    seen: list[Path] = []

    def watched(*args: Any, **options: Any) -> None:
        save_file(*args, **options)
        seen.extend(path for path in tmp_path.rglob("*") if not path.is_dir())

    monkeypatch.setattr(checkpoint, "save_file", watched)
    checkpoint.save_state(tmp_path / checkpoint.STATE_FILE, {"a": torch.zeros(2)}, {})
    [written] = seen
    assert written.parent.parent == tmp_path and written.parent.name.startswith(f".{checkpoint.STATE_FILE}.")
    assert list(tmp_path.iterdir()) == [tmp_path / checkpoint.STATE_FILE]


def test_checkpoints_may_be_read_by_whom_other_files_may_be(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    checkpoint.save_state(tmp_path / "state", {"a": torch.zeros(2)}, {})
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_state_without_a_position(tmp_path: Path) -> None:
    save_file({"parameter/a": torch.zeros(1)}, tmp_path / "state")
    with pytest.raises(InputError, match="not the state of a training run"):
        checkpoint.load_state(tmp_path / "state")


def test_a_transposed_parameter_is_written_by_value(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3).T
    checkpoint.save_state(tmp_path / "state", {"a": value}, {"epoch": 0, "day": 0, "batch": 0, "step": 0})
    assert torch.equal(checkpoint.load_state(tmp_path / "state")[0]["a"], value)


def test_json_comes_back(tmp_path: Path) -> None:
    content = {"arguments": {"lr": 0.1, "days": ["a"], "none": None}, "text": "ä"}
    checkpoint.write_json(tmp_path / "run" / checkpoint.CONFIG_FILE, content)
    assert checkpoint.read_config(tmp_path / "run") == content


def test_json_without_nan(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "file", {"a": float("nan")})
    assert read_json(tmp_path / "file") == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    (tmp_path / checkpoint.CONFIG_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config.json: not "):
        checkpoint.read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a training run"):
        checkpoint.read_config(tmp_path)


# ---- compacted tables ------------------------------------------------------------------------------------------------

VOCABULARY, ROWS = dict.fromkeys(ID_FIELDS, 20) | {"video": 100}, 102
some = settings(max_examples=15, deadline=None, derandomize=True, database=None)
videos = st.sets(st.integers(1, ROWS - 1), max_size=12).map(lambda ids: np.array(sorted({0, *ids})))


def cascade_models(seed: int | None, video_ids: np.ndarray | None = None) -> dict[str, nn.Module]:
    ids = {} if video_ids is None else {"video": IdSet.of([video_ids], ROWS)}
    return build_models(TWO_STAGE, VOCABULARY, 3, 8, seed, ids)


def videos_of(model: nn.Module) -> torch.Tensor:
    return model.get_parameter("embedding.video").detach()


def saved(folder: Path, video_ids: np.ndarray | None) -> dict[str, nn.Module]:
    """Models of seed 5 whose video rows have moved, written with their seed."""
    stages = cascade_models(5, video_ids)
    with torch.no_grad():
        for model in stages.values():
            model.get_parameter("embedding.video").add_(1)
    listed = None if video_ids is None else {"video": video_ids}
    checkpoint.save_models(folder, states(stages), {"initial_seed": 5}, listed)
    return stages


@some
@given(before=videos, after=videos)
def test_rows_go_to_their_ids_and_missing_ids_get_the_checkpoint_s_initial_values(
    before: np.ndarray, after: np.ndarray
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, loaded = saved(Path(folder), before), cascade_models(9, after)
        assert checkpoint.load_models(Path(folder), loaded) == 5
        assert np.array_equal(checkpoint.saved_ids(Path(folder), "rank")["video"], before)
    initial = cascade_models(5)
    for stage, model in loaded.items():
        for row, one in enumerate(after):
            expected = (
                videos_of(source[stage])[np.searchsorted(before, one)]
                if one in before
                else videos_of(initial[stage])[one]
            )
            assert torch.equal(videos_of(model)[row], expected)


@some
@given(after=videos)
def test_a_whole_table_gives_a_compacted_one_its_rows(after: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, loaded = saved(Path(folder), None), cascade_models(9, after)
        checkpoint.load_models(Path(folder), loaded)
        assert checkpoint.saved_ids(Path(folder), "rank") == {}
    for stage, model in loaded.items():
        assert torch.equal(videos_of(model), videos_of(source[stage])[after])


def test_a_compacted_table_fills_a_whole_one(tmp_path: Path) -> None:
    chosen = np.array([0, 4, 101])
    source, loaded, initial = saved(tmp_path, chosen), cascade_models(9), cascade_models(5)
    checkpoint.load_models(tmp_path, loaded)
    for stage, model in loaded.items():
        expected = videos_of(initial[stage]).clone()
        expected[chosen] = videos_of(source[stage])
        assert torch.equal(videos_of(model), expected)


def test_an_id_that_a_checkpoint_without_a_seed_lacks(tmp_path: Path) -> None:
    stages = cascade_models(5, np.array([0, 4]))
    checkpoint.save_models(tmp_path, states(stages), {}, {"video": np.array([0, 4])})
    with pytest.raises(InputError, match=r"table retrieval\.video lacks id 7"):
        checkpoint.load_models(tmp_path, cascade_models(9, np.array([0, 4, 7])))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([4, 0, 7]),
        torch.tensor([0, 4, 4]),
        torch.tensor([-1, 0, 4]),
        torch.tensor([0.0, 4.0, 7.0]),
        torch.tensor([[0, 4, 7]]),
        torch.tensor([0, 4]),
    ],
    ids=["unsorted", "repeated", "negative", "fractions", "a matrix", "too few"],
)
def test_damaged_ids(ids: torch.Tensor, tmp_path: Path) -> None:
    stages = cascade_models(5, np.array([0, 4, 7]))
    for stage, state in states(stages).items():
        save_file(state | {"ids.video": ids}, tmp_path / f"{stage}.safetensors")
    with pytest.raises(InputError, match=r"retrieval\.safetensors: .*ids.*train again"):
        checkpoint.load_models(tmp_path, cascade_models(9, np.array([0, 4, 7])))
    if len(ids) == 3 or ids.ndim > 1:
        with pytest.raises(InputError, match=r"rank\.safetensors: ids\.video is not a list of ascending ids"):
            checkpoint.saved_ids(tmp_path, "rank")


def test_metadata_that_are_no_object(tmp_path: Path) -> None:
    for stage, state in states(models(0)).items():
        save_file(state, tmp_path / f"{stage}.safetensors", metadata={"run": "[1]"})
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load_models(tmp_path, models(0))
