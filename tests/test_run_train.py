"""lcron train and test with cascades of one's own: the four stages of examples/, the paper's settings, mistakes."""

from pathlib import Path

import pytest

from deep_components import run_test, run_train, run_train2, run_train3
from deep_components.arguments import hyper_parameters
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade
from deep_components.errors import InputError
from deep_components.files import read_json
from tests.helpers import config, evaluation_arguments, train, training_arguments

FOUR_STAGE = Path(__file__).parents[1] / "examples/four_stage.toml"
METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron", "sorting")


def run(log: Path, folder: Path, *flags: str) -> Path:
    run_train.main(training_arguments(log, folder, *flags))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_four_stages_train_and_evaluate(method: str, log: Path, tmp_path: Path) -> None:
    folder = run(log, tmp_path, f"--cascade={FOUR_STAGE}", f"--loss_type={method}")
    run_test.main(evaluation_arguments(log, folder))
    results, cascade = read_json(folder / "metrics.json"), Cascade.from_toml(FOUR_STAGE)
    assert results["setting"] == "four_stage"
    assert 0 < results["joint_recall@10@10"] < 1
    survival = [results[f"survival_after_{stage}"] for stage in cascade.stage_names]
    assert survival == sorted(survival, reverse=True)
    assert survival[-1] == results["joint_recall@10@10"]
    assert {path.stem for path in folder.glob("*.safetensors")} == {*cascade.stage_names, "training_state"}


def test_a_run_keeps_its_cascade_not_its_file(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FOUR_STAGE.read_text())
    folder = run(log, tmp_path / "run", f"--cascade={file}", "--epochs=0")
    file.unlink()
    run_test.main(evaluation_arguments(log, folder))
    assert Cascade.from_json(config(folder)["cascade"], "") == Cascade.from_toml(FOUR_STAGE)
    assert "cascade" not in config(folder)["arguments"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", [run_train2, run_train3])
def test_the_papers_settings_are_those_of_their_own_commands(command: object, method: str) -> None:
    own, name = (run_train2, "two_stage") if command is run_train2 else (run_train3, "three_stage")
    words = [f"--loss_type={method}", "--data_dir=D", "--output_dir=O"]
    theirs = own.build_loss(own.parse_args(words))
    ours = run_train.build_loss(run_train.parse_args([*words, f"--cascade={name}"]))
    assert type(ours) is type(theirs)
    assert hyper_parameters(ours) == hyper_parameters(theirs)


def test_the_command_of_a_setting_and_this_one_make_the_same_run(log: Path, tmp_path: Path) -> None:
    ours, theirs = run(log, tmp_path / "ours", "--cascade=two_stage"), train(log, tmp_path / "theirs")
    for name in ("retrieval.safetensors", "rank.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    one, other = (config(folder)["arguments"] | {"output_dir": ""} for folder in (ours, theirs))
    assert one == other


@pytest.mark.parametrize("name", [TWO_STAGE.name, THREE_STAGE.name])
def test_a_setting_has_its_name(name: str) -> None:
    args = run_train.parse_args(["--loss_type=bce", "--data_dir=D", "--output_dir=O", f"--cascade={name}"])
    assert args.cascade.name == name


def test_mistakes(tmp_path: Path) -> None:
    words = ["--loss_type=bce", "--data_dir=D", "--output_dir=O"]
    with pytest.raises(InputError, match=r"two_stages: cannot be read .*--cascade names a TOML file"):
        run_train.parse_args([*words, "--cascade=two_stages"])
    (tmp_path / "c.toml").write_text(FOUR_STAGE.read_text().replace("keep = 10", "keep = 21"))
    with pytest.raises(InputError, match=r"c.toml: stage rerank keeps 21; it is reached by 20 items"):
        run_train.parse_args([*words, f"--cascade={tmp_path / 'c.toml'}"])
    for name in ("values", "type", "training"):  # attributes of the loss's nn.ParameterDict
        (tmp_path / "c.toml").write_text(FOUR_STAGE.read_text().replace('name = "rerank"', f'name = "{name}"'))
        with pytest.raises(InputError, match=f"stage '{name}': PyTorch uses this name"):
            run_train.parse_args([*words, f"--cascade={tmp_path / 'c.toml'}"])
    with pytest.raises(InputError, match="no such method; choose one of: arf, "):
        run_train.build_loss(run_train.parse_args([*words, "--cascade=two_stage", "--loss_type=mine"]))
