"""Checkpoints of the original code: read, scored, written back."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from deep_components import run_test2, run_test3, run_train2
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.commands import export_checkpoint, import_checkpoint
from deep_components.runs import state
from deep_components.runs.folder import read_config
from deep_components.runs.state import load, save
from tests.helpers import DAYS, evaluate, small_log, train, training_arguments

ORIGINAL_MODEL = {"retrieval": "dssm", "prerank": "mlp", "rank": "din"}


def original_files(golden: Path, folder: Path, prefix: str = "") -> dict[str, Path]:
    """The golden parameters as the original saves them."""
    arrays = np.load(golden / "models.npz")
    files = {}
    for stage, kind in ORIGINAL_MODEL.items():
        names = [name for name in arrays.files if name.startswith(f"{kind}/state/")]
        state = {prefix + name.split("/")[-1]: torch.from_numpy(arrays[name]) for name in names}
        files[stage] = folder / f"{stage}.pth"
        torch.save(state, files[stage])
    return files


def arguments(setting: str, files: dict[str, Path], run: Path) -> list[str]:
    stages = SETTINGS[setting].stage_names
    return [f"--setting={setting}", f"--output_dir={run}", *(f"--{stage}={files[stage]}" for stage in stages)]


@pytest.mark.parametrize("setting", ["two_stage", "three_stage"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_imported_run_scores_as_the_original_does(golden: Path, tmp_path: Path, setting: str, prefix: str) -> None:
    files, run = original_files(golden, tmp_path, prefix), tmp_path / "run"
    import_checkpoint.main(arguments(setting, files, run))
    evaluation = run_test2 if setting == "two_stage" else run_test3
    where = [f"--data_dir={golden / 'recflow_mini'}", f"--output_dir={run}", f"--cache_dir={tmp_path / 'cache'}"]
    evaluation.main([*where, "--test_day=2024-01-13", "--save_scores", "--device=cpu"])
    scores, expected = np.load(run / "scores.npz"), np.load(golden / "models.npz")
    for stage in SETTINGS[setting].stage_names:
        wanted = expected[f"{ORIGINAL_MODEL[stage]}/{setting}/logits"]
        np.testing.assert_allclose(scores[stage], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).mean())


def test_nothing_of_the_run_before_stays(golden: Path, tmp_path: Path) -> None:
    """Its record would give the imported models its name."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "streaming.json", "train.jsonl", "training_state.safetensors", "metrics.json"):
        (run / name).touch()
    import_checkpoint.main(arguments("two_stage", original_files(golden, tmp_path), run))
    assert {path.name for path in run.iterdir()} == {"config.json", "retrieval.safetensors", "rank.safetensors"}


def test_a_run_exported_and_imported_again_is_the_same(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = small_log(tmp_path_factory)
    run = train(log, tmp_path / "run")
    export_checkpoint.main([f"--run={run}", f"--output_dir={tmp_path / 'exported'}"])
    exported = torch.load(tmp_path / "exported" / "rank.pt", weights_only=True)
    assert {"vid_emb.weight", "din_mlp.0.weight", "mlp.6.bias"} <= exported.keys()
    files = {stage: tmp_path / "exported" / f"{stage}.pt" for stage in ("retrieval", "rank")}
    again = tmp_path / "again"
    import_checkpoint.main(arguments("two_stage", files, again))
    for stage in files:
        ours, theirs = load(run / f"{stage}.safetensors")[0], load(again / f"{stage}.safetensors")[0]
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert read_config(again)["arguments"]["emb_dim"] == read_config(run)["arguments"]["emb_dim"]
    # history length is not written in the original's files: 50 is assumed, and the small run used 5
    started = tmp_path / "started"
    run_train2.main(training_arguments(log, started, f"--init_from={again}", "--epochs=0"))
    first, second = (load(folder / "rank.safetensors")[0]["tower.0.weight"] for folder in (started, run))
    assert np.array_equal(first, second)
    assert evaluate(log, started)["rank_ndcg@10"] == evaluate(log, run)["rank_ndcg@10"]


def exported(run: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    export_checkpoint.main([f"--run={run}", f"--output_dir={folder}"])
    return {stage: torch.load(folder / f"{stage}.pt", weights_only=True) for stage in ("retrieval", "rank")}


@pytest.mark.parametrize("rows_at_a_time", [7, 1 << 20])
def test_a_compacted_run_is_exported_with_whole_tables(
    rows_at_a_time: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original has a row for every id: those that no request named are at their initial values."""
    monkeypatch.setattr(state, "_ROWS_AT_A_TIME", rows_at_a_time)
    log = small_log(tmp_path_factory)
    one_day = f"--train_days={DAYS[0]}"
    whole = exported(train(log, tmp_path / "whole", one_day), tmp_path / "a")
    run = train(log, tmp_path / "compacted", one_day, "--compact_from=1")
    compacted = exported(run, tmp_path / "b")
    small = load(run / "rank.safetensors")[0]["embedding.video"]
    assert len(small) < len(whole["rank"]["vid_emb.weight"])
    for stage, tensors in whole.items():
        assert tensors.keys() == compacted[stage].keys()
        assert all(torch.equal(value, compacted[stage][name]) for name, value in tensors.items())


@pytest.mark.parametrize("damage", ["memory", "seed"])
def test_tables_that_cannot_be_made_whole(
    damage: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log = small_log(tmp_path_factory)
    run = train(log, tmp_path / "run", "--compact_from=1", f"--train_days={DAYS[0]}")
    tensors, note = load(run / "retrieval.safetensors")
    if damage == "memory":
        monkeypatch.setattr(export_checkpoint, "available", lambda device: 1000)
    else:
        note["initial_seed"] = None
    save(run / "retrieval.safetensors", tensors, note)
    assert run_command(export_checkpoint.main, [f"--run={run}", f"--output_dir={tmp_path / 'out'}"]) == 2
    wanted = {"memory": "GB of memory", "seed": "lacks id"}[damage]
    message = capsys.readouterr().err
    assert "retrieval.safetensors: " in message and wanted in message
    assert not (tmp_path / "out").exists()


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command(import_checkpoint.main, argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_files_that_are_no_checkpoints_are_refused_unexecuted(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, run = original_files(golden, tmp_path), tmp_path / "run"
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch '{canary}'",)

    for content in (b"", b"garbage", pickle.dumps(Attack(), protocol=2), files["rank"].read_bytes()[:1000]):
        files["rank"].write_bytes(content)
        assert "rank.pth" in refused(arguments("two_stage", files, run), capsys)
    torch.save({"vid_emb.weight": Attack()}, files["rank"])
    assert "rank.pth" in refused(arguments("two_stage", files, run), capsys)
    torch.save([torch.zeros(1)], files["rank"])
    assert "rank.pth" in refused(arguments("two_stage", files, run), capsys)
    files["rank"].unlink()
    assert "no such file" in refused(arguments("two_stage", files, run), capsys)
    assert not canary.exists() and not run.exists()


def test_a_stage_given_the_file_of_another_is_refused(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = original_files(golden, tmp_path)
    swapped = files | {"rank": files["retrieval"]}
    assert "user_encoder" in refused(arguments("two_stage", swapped, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_the_stages_must_be_those_of_the_setting(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = original_files(golden, tmp_path)
    extra = [*arguments("two_stage", files, tmp_path / "run"), f"--prerank={files['prerank']}"]
    assert "--retrieval=FILE, --rank=FILE" in refused(extra, capsys)
    missing = ["--setting=three_stage", f"--output_dir={tmp_path / 'run'}", f"--rank={files['rank']}"]
    assert "--prerank=FILE" in refused(missing, capsys)
