"""The bash scripts: where they run, what they pass on, what they do when something is wrong.

Most tests run the scripts with a stand-in for Python that only writes down how it was called; one trains in earnest.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import pytest

from deep_components import run_train2
from tests.helpers import DAYS, SMALL, config, evaluate, same_parameters, small_log, train

PROJECT = Path(__file__).parents[1]

# Writes its arguments to $CALLS; fails when one of them is $FAIL_ON; passes the check of the packages.
RECORDER = """#!/usr/bin/env bash
if [ "$1" = - ]; then cat >/dev/null; exit 0; fi
{ printf '%s\\x1f' "$@"; printf '\\x1e'; } >>"$CALLS"
for argument in "$@"; do
    if [ "$argument" = "${FAIL_ON:-}" ]; then echo "error: told to fail" >&2; exit 2; fi
done
case $2 in *.collect_metrics) echo "the table" ;; esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def environment(**changes: str) -> dict[str, str]:
    """This process's, without an active or named interpreter."""
    ours = ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "REQUIREMENTS", "UNTRAINED", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in ours} | changes


def bash(
    script: Path, *arguments: str, cwd: Path, env: Mapping[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=dict(env), capture_output=True, text=True, check=False
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


class Recorded:
    """A copy of the scripts in a folder with blanks, run with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "the project"
        self.calls_file = folder / "calls"
        self.python = executable(folder / "python", RECORDER)
        for name in ("run_cascade.sh", "run_all.sh", "setup.sh", "requirements.txt", "two_stage"):
            source = PROJECT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.project / name)

    def run(self, *arguments: str, script: str = "lcron", check: bool = True, **changes: str) -> str:
        """Its standard output."""
        self.calls_file.unlink(missing_ok=True)
        env = environment(PYTHON=str(self.python), CALLS=str(self.calls_file), **changes)
        path = self.project / "two_stage" / f"{script}.sh"
        self.result = bash(path, *arguments, cwd=self.folder, env=env, check=check)
        return self.result.stdout

    def calls(self, module: str) -> list[list[str]]:
        """The arguments of the calls of a module whose name ends so."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        every = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call[2:] for call in every if call[0] == "-m" and call[1].endswith(module)]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    (tmp_path / "the project").mkdir()
    return Recorded(tmp_path)


def value(call: Sequence[str], option: str) -> str:
    """The value that counts: the last one given."""
    return [argument for argument in call if argument.startswith(option + "=")][-1].split("=", 1)[1]


# ---- what is passed on -----------------------------------------------------------------------------------------------


def test_five_seeds_untrained_and_trained(recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", "--output_dir=O") == "the table\n"
    runs = [f"O/{kind}seed{seed}" for seed in range(30, 35) for kind in ("untrained/", "")]
    for module in ("run_train2", "run_test2"):
        calls = recorded.calls(module)
        assert [value(call, "--output_dir") for call in calls] == runs
        assert {value(call, "--data_dir") for call in calls} == {"D"}
    for run, call in zip(runs, recorded.calls("run_train2"), strict=True):
        assert value(call, "--seed") == run[-2:]
        assert ("--epochs=0" in call) == ("untrained" in run)
        assert "--loss_type=lcron" in call
        assert "--tau=50" in call
    assert recorded.calls("collect_metrics") == [runs]


@pytest.mark.parametrize("arguments", [["--seeds=30"], ["--seeds", "30"], ["--seed=30"]])
def test_one_seed(arguments: list[str], recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--output_dir=O", *arguments)
    assert recorded.calls("collect_metrics") == [["O/untrained/seed30", "O/seed30"]]


def test_the_users_arguments_win(recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--seeds=30", "--lr=0.02", "--tau", "20", "--no-shuffle")
    for call in recorded.calls("run_train2"):
        assert call.index("--lr=0.02") > call.index("--lr=0.01")
        assert call[call.index("--tau") + 1] == "20"
        assert call.index("--tau") > call.index("--tau=50")
        assert "--no-shuffle" in call
    assert not any({"--lr=0.02", "--tau", "--no-shuffle"} & set(call) for call in recorded.calls("run_test2"))


@pytest.mark.parametrize("joined", [True, False])
def test_which_command_gets_which_argument(joined: bool, recorded: Recorded) -> None:
    given = {"--test_day": "2024-02-03", "--cache_dir": "a cache", "--time_zone": "UTC", "--device": "cpu"}
    pairs = [[f"{name}={text}"] if joined else [name, text] for name, text in given.items()]
    recorded.run("--data_dir=a log", "--output_dir=an output", "--seeds=30", "--save_scores", *chain(*pairs))
    trainings, evaluations = recorded.calls("run_train2"), recorded.calls("run_test2")
    for call in trainings + evaluations:
        assert {f"{name}={given[name]}" for name in ("--cache_dir", "--time_zone", "--device")} <= set(call)
        assert value(call, "--data_dir") == "a log"
        assert value(call, "--output_dir") in ("an output/seed30", "an output/untrained/seed30")
    for call in evaluations:
        assert {"--test_day=2024-02-03", "--save_scores"} <= set(call)
    for call in trainings:
        assert not {"--test_day=2024-02-03", "--test_day", "--save_scores"} & set(call)


def test_the_default_output_folder(recorded: Recorded) -> None:
    recorded.run("--data_dir=some/where/my log", "--seeds=30")
    (call,) = recorded.calls("collect_metrics")
    assert call[-1] == str(recorded.project / "runs/two_stage/lcron/my log/seed30")


def test_without_data_a_log_is_simulated(recorded: Recorded) -> None:
    recorded.run("--seeds=30")
    simulated = str(recorded.project / "data/simulated")
    assert recorded.calls("dataset.simulate") == [[f"--output_dir={simulated}"]]
    assert "SIMULATED" in recorded.result.stderr
    for call in recorded.calls("run_train2"):
        assert value(call, "--data_dir") == simulated
        assert value(call, "--batch_size") == "128"
    recorded.run("--seeds=30", "--batch_size=64")
    assert {value(call, "--batch_size") for call in recorded.calls("run_train2")} == {"64"}


def test_a_simulated_log_is_made_once(recorded: Recorded) -> None:
    origin = recorded.project / "data/simulated/others/origin.json"
    origin.parent.mkdir(parents=True)
    origin.write_text('{"data": "simulated"}')
    recorded.run("--seeds=30")
    assert recorded.calls("dataset.simulate") == []
    assert "SIMULATED" in recorded.result.stderr


def test_recflow_in_the_data_folder_is_used(recorded: Recorded) -> None:
    (recorded.project / "data/all_stage").mkdir(parents=True)
    recorded.run("--seeds=30")
    assert "SIMULATED" not in recorded.result.stderr
    for call in recorded.calls("run_train2"):
        assert value(call, "--data_dir") == str(recorded.project / "data")
        assert value(call, "--batch_size") == "1024"


def test_untrained_can_be_left_out(recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--output_dir=O", "--seeds=30", UNTRAINED="no")
    assert recorded.calls("collect_metrics") == [["O/seed30"]]


def test_resume_goes_to_the_runs_that_have_a_state(recorded: Recorded) -> None:
    state = recorded.folder / "O/seed30/training_state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"")
    recorded.run("--data_dir=D", "--output_dir=O", "--seeds=30,31", "--resume")
    resumed = [value(call, "--output_dir") for call in recorded.calls("run_train2") if "--resume" in call]
    assert resumed == ["O/seed30"]


def test_all_methods_and_one_table(recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--output_dir", "all of them", "--seeds=30", script="all")
    folders = [value(call, "--output_dir") for call in recorded.calls("run_train2")]
    methods = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron")
    assert folders == ["all of them/bce/untrained/seed30", *(f"all of them/{method}/seed30" for method in methods)]
    losses = [value(call, "--loss_type") for call in recorded.calls("run_train2")]
    assert losses == ["bce", *methods]
    assert recorded.calls("collect_metrics")[-1] == folders


METHOD_SCRIPTS = sorted(path.stem for path in (PROJECT / "two_stage").glob("*.sh") if path.stem not in ("run", "all"))


@pytest.mark.parametrize("script", METHOD_SCRIPTS)
def test_every_script_names_a_method_and_arguments_that_exist(script: str, recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--output_dir=O", "--seeds=30", script=script, UNTRAINED="no")
    (call,) = recorded.calls("run_train2")
    args = run_train2.parse_args(call)
    run_train2.build_loss(args)
    assert (args.lr, args.batch_size) == (0.01, 1024)
    assert script.startswith(args.loss_type) or args.loss_type == "sorting"


# ---- when something is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "fail_on", "after"),
    [
        ("run_train2", "--lr=abc", "run_test2"),
        ("run_test2", "--test_day=never", "collect_metrics"),
        ("dataset.simulate", "deep_components.dataset.simulate", "run_train2"),
    ],
)
def test_a_failing_step_ends_the_script(module: str, fail_on: str, after: str, recorded: Recorded) -> None:
    arguments = ["--seeds=30", *([fail_on] if fail_on.startswith("--") else [])]
    assert recorded.run(*arguments, check=False, FAIL_ON=fail_on) == ""
    assert recorded.result.returncode == 2
    assert "told to fail" in recorded.result.stderr
    assert len(recorded.calls(module)) == 1
    assert recorded.calls(after) == []
    assert recorded.calls("collect_metrics") == []


@pytest.mark.parametrize("option", ["--seeds", "--data_dir", "--output_dir", "--test_day", "--device"])
def test_an_option_without_its_value(option: str, recorded: Recorded) -> None:
    assert recorded.run(option, check=False) == ""
    assert recorded.result.returncode == 2
    assert recorded.result.stderr == f"error: {option} needs a value\n"
    assert not recorded.calls_file.exists()


def test_an_interpreter_without_the_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare/bin/python"
    result = bash(
        PROJECT / "two_stage/lcron.sh", "--data_dir=D", cwd=tmp_path, env=environment(PYTHON=str(python)), check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"{python} lacks torch, numpy" in result.stderr
    assert "pip install -r" in result.stderr
    assert result.stderr.count("\n") == 1
    active = environment(VIRTUAL_ENV=str(tmp_path / "bare"))  # an active environment is not changed either
    result = bash(PROJECT / "two_stage/lcron.sh", "--data_dir=D", cwd=tmp_path, env=active, check=False)
    assert result.returncode == 2
    assert "lacks torch" in result.stderr


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    env = environment(PYTHON=str(tmp_path / "python"))
    result = bash(PROJECT / "two_stage/lcron.sh", "--data_dir=D", cwd=tmp_path, env=env, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert str(tmp_path / "python") in result.stderr


# ---- the environment that setup.sh makes -----------------------------------------------------------------------------

# A Python 3.11 of which only what setup.sh uses works. It writes down installations; they fail while $BROKEN exists.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2 $3" in
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip --version") exit 0 ;;
    "-m pip install") echo "$0 $*" >>"$INSTALLED"; [ ! -e "$BROKEN" ] ;;
    "-c "*) exit "${TOO_OLD:-0}" ;;
    *) exit 9 ;;
esac
"""


class FakeSetup:
    """setup.sh in a folder of its own, sourced with a fake Python first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder, folder / "the project"
        self.project.mkdir()
        for name in ("setup.sh", "requirements.txt", "requirements-test.txt"):
            shutil.copy(PROJECT / name, self.project)
        for name in ("python3.11", "python3", "python"):
            executable(folder / "bin" / name, FAKE_PYTHON)
        self.caller = executable(folder / "caller.sh", 'set -eu\nsource "$1/setup.sh"\necho "$PYTHON"\n')
        self.broken = folder / "broken"

    def source(self, **changes: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        env = environment(PATH=path, INSTALLED=str(self.folder / "installed"), BROKEN=str(self.broken), **changes)
        return bash(self.caller, str(self.project), cwd=self.folder, env=env, check=False)

    def installations(self) -> list[str]:
        path = self.folder / "installed"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> FakeSetup:
    return FakeSetup(tmp_path)


def test_the_environment_is_made_once(fake: FakeSetup) -> None:
    python = fake.project / ".venv/bin/python"
    for _ in range(2):
        result = fake.source()
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{python}\n"
    (installation,) = fake.installations()
    assert installation.startswith(str(python))
    assert installation.endswith(f"-r {fake.project / 'requirements.txt'}")


def test_an_interrupted_installation_is_taken_up_again(fake: FakeSetup) -> None:
    fake.broken.touch()
    result = fake.source()
    assert result.returncode == 2
    assert result.stdout == ""
    fake.broken.unlink()
    assert fake.source().returncode == 0
    assert len(fake.installations()) == 2


def test_other_requirements_are_installed(fake: FakeSetup) -> None:
    fake.source()
    with (fake.project / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert fake.source().returncode == 0
    assert fake.source(REQUIREMENTS="requirements-test.txt").returncode == 0
    assert fake.source(REQUIREMENTS="requirements-test.txt").returncode == 0
    assert [line.rpartition("/")[2] for line in fake.installations()] == [
        *("requirements.txt", "requirements.txt", "requirements-test.txt"),
    ]  # fmt: skip


def test_two_scripts_at_once_install_once(fake: FakeSetup) -> None:
    if shutil.which("flock") is None:
        pytest.skip("there is no flock here")
    path = f"{fake.folder / 'bin'}:{os.environ['PATH']}"
    env = environment(PATH=path, INSTALLED=str(fake.folder / "installed"), BROKEN=str(fake.broken))
    command = ["bash", str(fake.caller), str(fake.project)]
    together = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in "ab"]
    assert [process.wait() for process in together] == [0, 0]
    assert len(fake.installations()) == 1


def test_no_python_of_the_right_version(fake: FakeSetup) -> None:
    result = fake.source(TOO_OLD="1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: no Python 3.11 or later on the PATH; install one, or name it: PYTHON=/path/to/python\n"
    )
    assert not (fake.project / ".venv").exists()


def test_what_the_setup_leaves_is_ignored_by_git(fake: FakeSetup) -> None:
    fake.source()
    ignored = (PROJECT / ".gitignore").read_text().splitlines()
    kept = {path.name for path in fake.project.iterdir()} - {"setup.sh", "requirements.txt", "requirements-test.txt"}
    assert {name for name in kept if name not in ignored and f"{name}/" not in ignored} == set()


# ---- in earnest ------------------------------------------------------------------------------------------------------


def test_a_real_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From another folder, with blanks in every path, over the results of an earlier run."""
    log = small_log(tmp_path_factory)
    (tmp_path / "my data").symlink_to(log)
    run = train(log, tmp_path / "my runs/seed30", "--seed=99", "--epochs=2")
    evaluate(log, run, "--save_scores")
    sizes = [argument for argument in SMALL if not argument.startswith("--loss_type")]
    arguments = ["--data_dir=my data", "--output_dir=my runs", "--seeds=30", "--lr=0.02", "--tau", "20", "--device=cpu"]
    script, env = PROJECT / "two_stage/lcron.sh", environment(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    result = bash(script, *arguments, *sizes, cwd=tmp_path, env=env)
    assert (config(run)["arguments"]["lr"], config(run)["arguments"]["tau"]) == (0.02, 20.0)
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1
    assert not (run / "scores.npz").exists()
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"two_stage, data: simulated, test day {DAYS[-1]}, 40 requests")
    assert {"method", "lcron", "untrained"} <= {line.split("  ")[0] for line in lines}
    # The same run inside this process gives the same parameters: nothing of a process matters.
    assert same_parameters(run, train(log, tmp_path / "here", "--lr=0.02", "--tau=20"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "my data", "my runs"]


def test_a_real_mistake(tmp_path: Path) -> None:
    env = environment(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    result = bash(PROJECT / "two_stage/lcron.sh", "--data_dir=D", "--lr=abc", cwd=tmp_path, env=env, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "--lr" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
