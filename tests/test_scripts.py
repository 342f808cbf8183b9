"""The bash scripts: where they run, what they pass on, what they do when something is wrong.

Most tests run the scripts with a stand-in for Python that only writes down how it was called; one trains in earnest.
What the runner makes of its arguments is tested in test_run_experiments.py.
"""

import argparse
import csv
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deep_components import run_experiments, run_train2, run_train3
from deep_components.experiments.plan import Method
from tests.helpers import DAYS, SMALL, config, same_parameters, small_log, train, wait_for

PROJECT = Path(__file__).parents[1]

# Writes its arguments to $CALLS; fails with $CODE when one of them is $FAIL_ON; passes the check of the packages, and
# that of arguments to $CHECKS if that is an interpreter. As the runner, it names two finished runs, unless $NO_RUNS.
RECORDER = """#!/usr/bin/env bash
if [ "$1" = - ]; then cat >/dev/null; exit 0; fi
if [ "$2" = deep_components.experiments.attached ]; then set -- -m "${@:4}"; fi
{ printf '%s\\x1f' "$@"; printf '\\x1e'; } >>"$CALLS"
if [ "${CHECKS:-}" ] && [ "${4:-}" = --check ]; then exec "$CHECKS" "$@"; fi
for argument in "$@"; do
    case $argument in --run_list=*) [ "${NO_RUNS:-}" ] || printf '%s\\0' 'run 1' 'run 2' >"${argument#*=}" ;; esac
    if [ "$argument" = "${FAIL_ON:-}" ]; then echo "error: told to fail" >&2; exit "${CODE:-2}"; fi
done
case $3 in table) echo "the table" ;; esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def environment(**changes: str) -> dict[str, str]:
    """This process's, without an active or named interpreter."""
    ours = ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "REQUIREMENTS", "UNTRAINED", "PYTHONPATH", "PYTHONSAFEPATH")
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
        scripts = ("run_cascade.sh", "run_all.sh", "setup.sh", "requirements.txt", "two_stage", "three_stage", "paper")
        for name in scripts:
            source = PROJECT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.project / name)

    def run(self, *arguments: str, script: str = "two_stage/lcron", check: bool = True, **changes: str) -> str:
        """Its standard output."""
        self.calls_file.unlink(missing_ok=True)
        env = environment(PYTHON=str(self.python), CALLS=str(self.calls_file), **changes)
        path = self.project / f"{script}.sh"
        self.result = bash(path, *arguments, cwd=self.folder, env=env, check=check)
        return self.result.stdout

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of the calls of a command of deep_components."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        every = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call[3:] for call in every if call[:3] == ["-m", "deep_components", command]]

    def plan(self) -> tuple[argparse.Namespace, list[Method], list[str]]:
        """What the one call of the runner asks for."""
        *_, call = self.calls("experiments")  # one with --check may precede it
        return run_experiments.parse_args(call)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    (tmp_path / "the project").mkdir()
    return Recorded(tmp_path)


# ---- what is passed on -----------------------------------------------------------------------------------------------


def test_a_method_with_its_hyper_parameters(recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", "--output_dir=O", "--lr=0.02", "--tau", "20", "--no-shuffle") == "the table\n"
    args, methods, training = recorded.plan()
    assert methods == [Method("lcron", ("--loss_type=lcron", "--tau=50", "--lr=0.01", "--batch_size=1024"))]
    assert training == ["--lr=0.02", "--tau", "20", "--no-shuffle"]
    assert (args.setting, args.data_dir, args.output_dir) == ("two_stage", Path("D"), Path("O"))
    assert (args.train, args.evaluate) == ("deep_components.run_train2", "deep_components.run_test2")
    assert args.seeds == [30, 31, 32, 33, 34]
    assert args.runs_dir == recorded.project / "runs"
    assert (args.untrained, args.several, args.jobs, args.force, args.batch_divisor) == (True, False, 1, False, 1)


def test_any_code_is_for_the_table_too(recorded: Recorded) -> None:
    recorded.run("--data_dir=D")
    assert "--any_code" not in recorded.calls("table")[0]
    recorded.run("--data_dir=D", "--any_code")
    assert recorded.plan()[0].any_code
    assert recorded.calls("table")[0][:2] == ["--kind=metrics", "--any_code"]


@pytest.mark.parametrize("arguments", [["--data_dir=a log"], ["--data_dir", "a log"]])
def test_a_named_log(arguments: list[str], recorded: Recorded) -> None:
    recorded.run(*arguments)
    assert recorded.plan()[0].data_dir == Path("a log")
    assert "SIMULATED" not in recorded.result.stderr


def test_the_runs_go_into_the_table(recorded: Recorded) -> None:
    recorded.run("--data_dir=D")
    assert recorded.calls("table") == [["--kind=metrics", "run 1", "run 2"]]


def test_without_data_a_log_is_simulated(recorded: Recorded) -> None:
    recorded.run()
    simulated = recorded.project / "data/simulated"
    assert recorded.calls("simulate") == [[f"--output_dir={simulated}"]]
    assert "SIMULATED" in recorded.result.stderr
    args, _, _ = recorded.plan()
    assert (args.data_dir, args.batch_divisor) == (simulated, 8)


def test_a_simulated_log_is_made_once(recorded: Recorded) -> None:
    origin = recorded.project / "data/simulated/others/origin.json"
    origin.parent.mkdir(parents=True)
    origin.write_text('{"data": "simulated"}')
    recorded.run()
    assert recorded.calls("simulate") == []
    assert "SIMULATED" in recorded.result.stderr


def test_recflow_in_the_data_folder_is_used(recorded: Recorded) -> None:
    (recorded.project / "data/all_stage").mkdir(parents=True)
    recorded.run()
    assert "SIMULATED" not in recorded.result.stderr
    args, _, _ = recorded.plan()
    assert (args.data_dir, args.batch_divisor) == (recorded.project / "data", 1)


def test_untrained_can_be_left_out(recorded: Recorded) -> None:
    recorded.run("--data_dir=D", UNTRAINED="no")
    assert not recorded.plan()[0].untrained


def test_help(recorded: Recorded) -> None:
    assert "--validation" in recorded.run("--help", script="paper/table_2")
    assert recorded.calls("experiments") == []


def scripts(folder: str) -> list[str]:
    return sorted(
        f"{folder}/{path.stem}" for path in (PROJECT / folder).glob("*.sh") if path.stem not in ("run", "all")
    )


COMMANDS = {"two_stage": run_train2, "three_stage": run_train3}


@pytest.mark.parametrize("script", scripts("two_stage") + scripts("three_stage"))
def test_every_script_names_a_method_and_arguments_that_exist(script: str, recorded: Recorded) -> None:
    recorded.run("--data_dir=D", script=script)
    _, (method,), _ = recorded.plan()
    setting, name = script.split("/")
    args = COMMANDS[setting].parse_args([*method.arguments, "--data_dir=D", "--output_dir=O"])
    COMMANDS[setting].build_loss(args)
    assert (args.lr, args.batch_size) == (0.01, 1024)
    assert method.name == name
    assert name.startswith(args.loss_type) or args.loss_type == "sorting"


# ---- the paper's tables ----------------------------------------------------------------------------------------------


def paper_rows(table: str) -> set[tuple[str, str]]:
    """Setting and method of each row of a table of the paper."""
    with (PROJECT / "deep_components/reporting/paper_tables.csv").open() as file:
        return {(row["setting"], row["method"]) for row in csv.DictReader(file) if row["table"] == table}


@pytest.mark.parametrize("table", ["2", "3", "4", "6", "7", "8", "9", "10", "11", "12"])
def test_a_table_has_the_papers_rows(table: str, recorded: Recorded) -> None:
    recorded.run("--data_dir=D", "--seeds=30", script=f"paper/table_{table}")
    args, methods, training = recorded.plan()
    variants = {"9": "lr0.001_bs512", "10": "lr0.001_bs2048", "11": "lr0.02_bs512", "12": "lr0.02_bs2048"}
    assert (args.variant or None) == variants.get(table)
    assert {(args.setting, method.name) for method in methods} == paper_rows(table)
    assert (args.seeds, training, args.streaming) == ([30], [], False)
    assert recorded.calls("table") == [["--kind=metrics", "run 1", "run 2"]]


@pytest.mark.parametrize(
    ("table", "lr", "batch_size"),
    [(2, 0.01, 1024), (9, 0.001, 512), (10, 0.001, 2048), (11, 0.02, 512), (12, 0.02, 2048)],
)
def test_learning_rate_and_batch_size_of_a_table(table: int, lr: float, batch_size: int, recorded: Recorded) -> None:
    recorded.run("--data_dir=D", script=f"paper/table_{table}")
    args, methods, _ = recorded.plan()
    for method in methods:
        known = run_train2.parse_args([*method.arguments, "--data_dir=D", "--output_dir=O"])
        assert (known.lr, known.batch_size) == (lr, batch_size)
    assert args.variant == ("" if table == 2 else f"lr{lr:g}_bs{batch_size}")


def test_the_other_scripts_of_the_paper(recorded: Recorded) -> None:
    recorded.run("--data_dir=D", script="paper/figure_2")
    args, methods, _ = recorded.plan()
    assert (args.streaming, len(methods)) == (True, 8)
    assert [call[0] for call in recorded.calls("table")] == ["--kind=streaming"]
    recorded.run("--data_dir=D", "--output_dir=O", script="paper/section_d")
    calls = [run_experiments.parse_args(call)[0] for call in recorded.calls("experiments")]
    assert [(args.setting, args.seeds, args.untrained) for args in calls] == [
        ("two_stage", [30], False), ("three_stage", [30], False)
    ]  # fmt: skip
    assert all(args.by_setting for args in calls)
    assert [call[0] for call in recorded.calls("table")] == ["--kind=costs"] * 2
    recorded.run("--data_dir=D", script="paper/appendix_e1")
    assert [method.name for method in recorded.plan()[1]] == ["lcron", "lcron_q_30_20"]


@pytest.mark.parametrize("folder", ["two_stage", "three_stage"])
def test_all_is_the_table_of_the_eight_methods(folder: str, recorded: Recorded) -> None:
    recorded.run("--data_dir=D", script=f"{folder}/all")
    args, methods, _ = recorded.plan()
    assert args.setting == folder
    names = ["bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron"]
    assert [method.name for method in methods] == names


# ---- wherever it is called from, in any environment ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"PRINT_METHOD": "yes"},
        {"table_kind": "costs"},
        {"setting": "x", "options": "x", "runs": "x", "list": "x", "root": "/", "collect": "x", "name": "x"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variables_of_the_environment_change_nothing(changes: Any, recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", "--output_dir=O") == "the table\n"
    wanted = recorded.plan()
    recorded.run("--data_dir=D", "--output_dir=O", **changes)
    found, methods, training = recorded.plan()
    found.run_list = wanted[0].run_list  # a temporary file
    assert (found, methods, training) == wanted
    assert recorded.calls("table") == [["--kind=metrics", "run 1", "run 2"]]


def test_without_a_home(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert recorded.run("--data_dir=D") == "the table\n"


@pytest.mark.parametrize("name", ["two_stage/lcron", "two_stage/all", "paper/table_2", "paper/figure_2"])
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_called_by_sh_through_a_link_with_cdpath(shell: str, name: str, recorded: Recorded) -> None:
    """CDPATH, by which cd may go elsewhere, and print where."""
    (recorded.folder / "elsewhere/two_stage").mkdir(parents=True)
    link = recorded.folder / "a link"
    link.symlink_to(recorded.project / f"{name}.sh")
    env = environment(
        PYTHON=str(recorded.python), CALLS=str(recorded.calls_file), CDPATH=str(recorded.folder / "elsewhere")
    )
    for script, cwd in ((link, recorded.folder), (Path(f"{name}.sh"), recorded.project)):
        recorded.calls_file.unlink(missing_ok=True)
        done = subprocess.run(
            [shell, str(script), "--data_dir=D"], cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "the table\n"), done.stderr
        assert recorded.plan()[0].runs_dir == recorded.project / "runs"


def test_the_setup_says_that_it_wants_bash(recorded: Recorded) -> None:
    script = recorded.project / "setup.sh"
    done = subprocess.run(["sh", str(script)], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) in [(2, ""), (0, "")]  # sh may be bash under another name
    assert done.returncode == 0 or done.stderr == "error: setup.sh is written for bash; run: bash setup.sh\n"


@pytest.mark.parametrize("name", ["a\nproject", "a project\n", "-n", "$(touch x)", "'\""])
def test_the_project_in_a_folder_of_any_name(name: str, recorded: Recorded) -> None:
    recorded.project = recorded.project.rename(recorded.folder / name)
    assert recorded.run("--data_dir=D") == "the table\n"
    assert recorded.plan()[0].runs_dir == recorded.project / "runs"
    assert recorded.run("--data_dir=D", script="paper/table_2") == "the table\n"
    assert not list(recorded.folder.glob("x"))


# ---- when something is wrong -----------------------------------------------------------------------------------------


def test_a_mistake_is_said_before_a_log_is_simulated(recorded: Recorded) -> None:
    assert recorded.run("--tau=x", check=False, FAIL_ON="--tau=x") == ""
    assert recorded.result.returncode == 2
    assert recorded.calls("simulate") == []
    assert [call[0] for call in recorded.calls("experiments")] == ["--check"]


def test_a_failing_simulation_ends_the_script(recorded: Recorded) -> None:
    assert recorded.run(check=False, FAIL_ON="simulate") == ""
    assert recorded.result.returncode == 2
    assert "told to fail" in recorded.result.stderr
    assert [call[0] for call in recorded.calls("experiments")] == ["--check"]


def test_some_runs_fail(recorded: Recorded) -> None:
    """The finished ones make a table, and the script fails."""
    assert recorded.run("--data_dir=D", "--lr=abc", check=False, FAIL_ON="--lr=abc") == "the table\n"
    assert recorded.result.returncode == 2


def test_the_table_of_both_settings_is_stopped_once(recorded: Recorded) -> None:
    """Ctrl-C in its first setting does not begin the second one."""
    arguments = ("--data_dir=D", "--lr=0.5")
    recorded.run(*arguments, script="paper/section_d", check=False, FAIL_ON="--lr=0.5", CODE="130")
    assert recorded.result.returncode == 130
    assert len(recorded.calls("experiments")) == 1
    recorded.run(*arguments, script="paper/section_d", check=False, FAIL_ON="--lr=0.5", CODE="1")
    assert len(recorded.calls("experiments")) == 2


SLEEPER = """import os, time
from pathlib import Path

try:
    Path("runner").write_text(str(os.getpid()))
    time.sleep(600)
except KeyboardInterrupt:
    Path("stopped").touch()
"""


@pytest.mark.parametrize("script", ["two_stage/lcron", "paper/section_d", "paper/operators"])
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_runner_ends_with_its_script(script: str, ending: signal.Signals, recorded: Recorded) -> None:
    """A script that is killed alone, not with its children as Ctrl-C does, leaves nothing that goes on training."""
    (recorded.folder / "sleeper.py").write_text(SLEEPER)
    attached = f'exec {shlex.quote(sys.executable)} "${{@:1:3}}" sleeper; fi'
    passes = 'if [ "$1" = - ]; then cat >/dev/null; exit 0; fi'
    check = f'{passes}; if [ "$2" = deep_components.experiments.attached ]; then {attached}'
    python = executable(recorded.folder / "real", f"#!/usr/bin/env bash\n{check}\n")
    env = environment(PYTHON=str(python), PYTHONPATH=f"{PROJECT}:{recorded.folder}")
    command = ["bash", str(recorded.project / f"{script}.sh"), "--data_dir=D"]
    with subprocess.Popen(command, cwd=recorded.folder, env=env, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: (recorded.folder / "runner").exists() and (recorded.folder / "runner").read_text() != "")
        process.send_signal(ending)
    wait_for((recorded.folder / "stopped").exists)


def test_all_runs_fail(recorded: Recorded) -> None:
    assert recorded.run("--data_dir=D", "--lr=abc", check=False, FAIL_ON="--lr=abc", NO_RUNS="yes") == ""
    assert recorded.result.returncode == 2
    assert recorded.calls("table") == []


def test_a_row_of_a_table_without_a_script(recorded: Recorded) -> None:
    (recorded.project / "two_stage/icc.sh").unlink()
    recorded.run("--data_dir=D", script="paper/table_2", check=False)
    assert recorded.result.returncode != 0
    assert recorded.calls("experiments") == []


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
    assert result.stderr == (
        f"error: {tmp_path / 'python'}: no such program; name a Python 3.11 or later with PYTHON=/path/to/python\n"
    )


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
    """From another folder, with blanks in every path; the second time it is kept, and not replaced by another."""
    log = small_log(tmp_path_factory)
    (tmp_path / "my data").symlink_to(log)
    sizes = [argument for argument in SMALL if not argument.startswith("--loss_type")]
    arguments = ["--data_dir=my data", "--output_dir=my runs", "--seeds=30", "--tau", "20", "--device=cpu", *sizes]
    script, env = PROJECT / "two_stage/lcron.sh", environment(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    result = bash(script, *arguments, "--lr=0.02", cwd=tmp_path, env=env)
    run = tmp_path / "my runs/seed30"
    assert (config(run)["arguments"]["lr"], config(run)["arguments"]["tau"]) == (0.02, 20.0)
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"two_stage, data: simulated, test day {DAYS[-1]}, 40 requests")
    assert {"method", "lcron", "untrained"} <= {line.split("  ")[0] for line in lines}
    # The same run inside this process gives the same parameters: nothing of a process matters.
    assert same_parameters(run, train(log, tmp_path / "here", "--lr=0.02", "--tau=20"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "my data", "my runs"]
    before = (run / "rank.safetensors").stat().st_mtime_ns
    assert bash(script, *arguments, "--lr=0.02", cwd=tmp_path, env=env).stdout == result.stdout
    refused = bash(script, *arguments, "--lr=0.03", cwd=tmp_path, env=env, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"error: {run}: holds a run with lr=0.02, not 0.03; name another --output_dir, or --force to make it again\n"
    )
    assert (run / "rank.safetensors").stat().st_mtime_ns == before


def test_a_real_mistake(tmp_path: Path) -> None:
    env = environment(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    result = bash(PROJECT / "two_stage/lcron.sh", "--data_dir=D", "--lr=abc", cwd=tmp_path, env=env, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "--lr" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
