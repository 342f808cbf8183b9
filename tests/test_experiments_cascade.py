"""The runner on a cascade and a log of one's own: what it does for the paper's settings."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from deep_components import run_experiments
from deep_components.cli import run_command
from deep_components.dataset.log import write_log_file
from deep_components.errors import InputError
from deep_components.experiments.execution import Commands, Options, Outcome, Slot, execute
from deep_components.experiments.plan import Run
from deep_components.files import read_json
from deep_components.reporting.curves import streaming_curves
from deep_components.reporting.frame import frame, label_rows
from deep_components.runs.identity import first_difference
from tests.test_own_cascade import CASCADE, DAYS, write_log

SMALL = ("--batch_size=20", "--emb_dim=4", "--nn_units=8", "--device=cpu")
EIGHT = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = write_log(tmp_path_factory.mktemp("shop"))
    write_log_file(log, origin="a shop", time_zone="Europe/Berlin")
    return log


class Here(Commands):
    """The commands, run inside this process."""

    def run(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path, lock: int) -> None:
        importlib.import_module(command[0]).main(list(command[1:]))


Runner = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def runner(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Give the command; its exit code, and how each run ended."""

    def give(*words: str, cascade: Path = shop / "shop.toml") -> tuple[int, list[str]]:
        ended = []

        def engine(args: object, runs: Sequence[Run]) -> Iterator[list[Outcome]]:
            for run in runs:
                outcome = execute(run, Slot(), Options(), Here())
                ended.append(f"{run.name} {outcome.status} {outcome.error}".strip())
                yield [outcome]

        monkeypatch.setattr(run_experiments, "_engine", engine)
        argv = [f"--cascade={cascade}", f"--data_dir={shop}", f"--output_dir={tmp_path / 'runs'}", *SMALL, *words]
        return run_command(run_experiments.main, argv), ended

    return give


def plan(*words: str) -> list[Run]:
    return run_experiments.make_plan(*run_experiments.parse_args(list(words)))


def test_the_eight_methods_with_their_defaults(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cascade is named by its whole path, so that every process finds it."""
    monkeypatch.chdir(shop)
    runs = plan("--cascade=shop.toml", f"--data_dir={shop}", "--seeds=30", *SMALL)
    assert [run.name for run in runs] == ["untrained", *EIGHT]
    assert runs[-1].folder == shop / f"runs/shop/lcron/{shop.name}/seed30"
    for run in runs:
        train, test = run.train_command(run.parts[0], resume=False), run.test_command(run.parts[0])
        assert (train[0], test[0]) == ("deep_components.run_train", "deep_components.run_test")
        assert f"--cascade={shop / 'shop.toml'}" in train and f"--cascade={shop / 'shop.toml'}" in test
        assert "cascade" not in run.config["arguments"] and run.config["cascade"]["name"] == "shop"
        assert run.config["arguments"]["time_zone"] == "Europe/Berlin"
    assert {run.name: run.config["arguments"]["tau"] for run in runs[-3:]} == {"arf": 200, "arf_v2": 200, "lcron": 50}


def test_other_methods_and_hyper_parameters(shop: Path) -> None:
    data = f"--data_dir={shop}"
    words = [f"--cascade={shop / 'shop.toml'}", data, "--seeds=30", *SMALL]
    assert [run.name for run in plan(*words, "--methods=sorting,lcron")] == ["untrained", "lcron", "sorting"]
    stated = ["--method=lcron", "--tau=20", "--method=soft", "--loss_type=sorting", "--sort=soft_sort"]
    runs = plan(words[0], "--no-untrained", *stated, "--", *words[1:])
    options = [run.config["arguments"] for run in runs]
    assert [(run.name, o["loss_type"], o["tau"], o["sort"]) for run, o in zip(runs, options, strict=True)] == [
        ("lcron", "lcron", 20, "neural_sort"), ("soft", "sorting", 50, "soft_sort")
    ]  # fmt: skip


def test_a_setting_by_its_name_is_the_scripts(log: Path) -> None:
    """The same folder and the same run: what one has made the other keeps."""
    user = [f"--data_dir={log}", "--seeds=30", "--batch_size=16", "--runs_dir=R"]
    commands = ["--train=deep_components.run_train2", "--evaluate=deep_components.run_test2"]
    scripts = plan("--setting=two_stage", *commands, "--method=lcron", "--loss_type=lcron", "--tau=50", "--", *user)
    ours = plan("--cascade=two_stage", *user, "--methods=lcron")
    assert [run.folder for run in ours] == [run.folder for run in scripts]
    for one, other in zip(ours, scripts, strict=True):
        assert first_difference(one.config, other.config) is first_difference(other.config, one.config) is None


def test_a_table_of_ones_own_cascade(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, ended = runner("--methods=lcron,bce", "--seeds=30,31", "--validation")
    assert (code, ended) == (0, ["untrained finished", "bce finished", "lcron finished"] * 2)
    heading, _, header, *_ = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"shop, data: a shop, test day {DAYS[1]}, 40 requests; mean +- standard deviation")
    metrics = ["joint_recall@2@3", "recall_recall@2@8", "coarse_recall@2@6", "fine_recall@2@5", "final_recall@2@3"]
    assert header.split() == [
        "method", metrics[0], *(word for m in metrics[1:] for word in (m, f"{m.partition('_')[0]}_ndcg@2")), "seeds"
    ]  # fmt: skip
    assert runner("--methods=lcron,bce", "--seeds=30,31", "--validation")[1] == [
        "untrained kept", "bce kept", "lcron kept", *["untrained kept", "bce kept", "lcron kept"]
    ]  # fmt: skip
    assert "lcron minus each baseline" in capsys.readouterr().out
    trained = read_json(tmp_path / "runs/lcron_validation/seed30/config.json")
    assert trained["train_days"] == [DAYS[0]]


def test_another_cascade_of_the_name_is_refused(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when only a width or a model differs, which no metric's name shows."""
    changed = tmp_path / "shop.toml"
    runner("--methods=bce", "--seeds=30")
    changed.write_text(CASCADE.replace('"mlp"', '"mlp", nn_units = 16'))
    assert runner("--methods=bce", "--seeds=30", cascade=changed) == (2, [])
    assert "untrained/seed30: holds a run with another cascade; name another --output_dir" in capsys.readouterr().err


def test_a_stream(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("--methods=lcron", "--seeds=30", "--streaming")[0] == 0
    head, *_, last = [line for line in capsys.readouterr().out.splitlines() if line]
    assert head.startswith("shop, data: a shop, joint_recall@2@3 of each day") and last.startswith(DAYS[2])
    curves = streaming_curves(label_rows(frame(tmp_path / "runs")), "joint_recall@2@3", [])
    assert list(curves["lcron"].index) == list(DAYS[1:])


def test_a_model_of_ones_own_in_the_runner(runner: Runner, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(CASCADE.replace('"mlp"', '"tests.models.own_models:Bilinear"'))
    assert runner("--methods=lcron", "--seeds=30", cascade=own) == (0, ["untrained finished", "lcron finished"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cascade=absent.toml"], "absent.toml: cannot be read"),
        (["--cascade={shop}/shop.toml", "--methods=lcron,mine"], "--methods=mine: choose from bce, icc"),
        (["--cascade={shop}/shop.toml", "--method=mine"], "--loss_type=mine: no such method"),
    ],
)
def test_mistakes(words: list[str], sentence: str, shop: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        plan(f"--data_dir={shop}", *(word.format(shop=shop) for word in words))


def test_a_setting_or_a_cascade(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--setting=two_stage", "--cascade=two_stage"]):
        with pytest.raises(SystemExit):
            plan(*words, f"--data_dir={shop}")
        assert "--cascade" in capsys.readouterr().err
