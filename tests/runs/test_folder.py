"""A run's folder: its JSON files, what is removed, and its locks."""

from pathlib import Path
from typing import Any

import pytest

from deep_components.cascade import TWO_STAGE, Cascade
from deep_components.errors import InputError
from deep_components.runs import folder
from deep_components.runs.folder import (
    CONFIG_FILE,
    LOCK_FILE,
    cascade_of,
    only_user,
    read_config,
    read_json,
    read_training,
    remove_results,
    remove_run,
    write_json,
)
from deep_components.runs.records import read_folder

ARGUMENTS: dict[str, Any] = {"emb_dim": 8, "nn_units": 128, "seq_len": 50, "dtype": "float32"}
ARGUMENTS |= {"time_zone": "Asia/Shanghai", "loss_type": "lcron", "seed": 30, "epochs": 1}
CONFIG = {"setting": "two_stage", "data": "simulated", "arguments": ARGUMENTS, "train_days": ["a"]}


def test_json_comes_back(tmp_path: Path) -> None:
    content = {"arguments": {"lr": 0.1, "days": ["a"], "none": None}, "text": "ä"}
    write_json(tmp_path / "run" / CONFIG_FILE, content)
    assert read_config(tmp_path / "run") == content


@pytest.mark.parametrize("field", ["data_checksums", "init_from_checksums"])
def test_a_field_that_holds_no_checksums(field: str, tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG_FILE, {field: ["a"]})
    for read in (read_config, read_folder):
        with pytest.raises(InputError, match=f"config.json: field {field} is damaged"):
            read(tmp_path)


def test_json_without_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"a": float("nan")})
    assert read_json(tmp_path / "file") == {"a": 1}
    assert read_json(tmp_path / "another") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config.json: not "):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a training run"):
        read_config(tmp_path)


@pytest.mark.parametrize("change", [{"arguments": {}}, {"arguments": None}, {"data": 1}, {"train_days": None}], ids=str)
def test_a_config_that_lacks_fields(change: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG_FILE, CONFIG)
    assert read_training(tmp_path) == CONFIG
    write_json(tmp_path / CONFIG_FILE, CONFIG | change)
    with pytest.raises(InputError, match=r"config.json: field .* train again"):
        read_training(tmp_path)


EDITED: dict[str, list[Any]] = {
    "emb_dim": [None, 0, -8, 8.0, "8", True, 10**9, 1e308, []],
    "nn_units": [None, 0, 6, -4, 1e308, 10**30, "128"],
    "seq_len": [None, -1, 0.5, "x", 10**30],
    "dtype": [None, "float16", 1, [], {}],
    "time_zone": [None, 1],
    "loss_type": [None, [], 1e308],
    "seed": [-1, 0.5, "30", 1 << 63],
    "epochs": [-1, 1e308, "1", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDITED.items() for value in values])
def test_an_argument_that_no_training_has(name: str, value: Any, tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG_FILE, CONFIG | {"arguments": ARGUMENTS | {name: value}})
    with pytest.raises(InputError, match=rf"config.json: field arguments: {name} is .*; train again"):
        read_training(tmp_path)


def test_the_cascade_of_a_run(tmp_path: Path) -> None:
    own = Cascade(TWO_STAGE.stages, TWO_STAGE.groups, num_relevant=5, name="mine")
    assert cascade_of(tmp_path, {"setting": "mine", "cascade": own.to_json()}) == own
    assert cascade_of(tmp_path, {"setting": "two_stage"}) == TWO_STAGE  # of an earlier version
    for config in ({"setting": "mine"}, {"cascade": {"stages": 1}}):
        with pytest.raises(InputError, match=str(tmp_path / CONFIG_FILE)):
            cascade_of(tmp_path, config)


def test_removing(tmp_path: Path) -> None:
    """The models of the cascade that will be trained, and of the one that was; nothing that is not a run's."""
    write_json(tmp_path / CONFIG_FILE, CONFIG)
    results = ["retrieval.safetensors", "rank.safetensors", "new.safetensors", *("metrics.json", "training.json")]
    records = ["training_state.safetensors", "train.jsonl", "run.json", "streaming.json"]
    for name in (*results, *records, "mine.safetensors", "notes"):
        (tmp_path / name).touch()
    remove_results(tmp_path, ["new"])
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, *records, "mine.safetensors", "notes"}
    remove_run(tmp_path, [])
    assert {path.name for path in tmp_path.iterdir()} == {"mine.safetensors", "notes"}


def test_one_user_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with only_user(run, LOCK_FILE, "training in this folder"):
        with (
            pytest.raises(InputError, match="another process is training in this folder; wait for it"),
            only_user(run, LOCK_FILE, "training in this folder", wait=0.15),
        ):
            pass
        with only_user(run, folder.RUNNER_LOCK_FILE, "making this run"):
            pass
    with only_user(run, LOCK_FILE, "training in this folder"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot be written"), only_user(tmp_path / "file", LOCK_FILE, ""):
        pass
