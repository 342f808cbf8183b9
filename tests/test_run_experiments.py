"""The runner's command: what its arguments make of a plan, what is said at the end, the exit code."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deep_components import run_experiments, run_train2
from deep_components.arguments import SCRIPT_OPTIONS
from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.experiments.execution import Outcome
from deep_components.experiments.plan import Run
from deep_components.runs.identity import first_difference
from deep_components.runs.records import read_folder
from deep_components.runs.state import save_models
from tests.helpers import DAYS

TRAIN, EVALUATE = "deep_components.run_train2", "deep_components.run_test2"
SCRIPT = ["--setting=two_stage", f"--train={TRAIN}", f"--evaluate={EVALUATE}", "--runs_dir=runs"]
LCRON = ["--method=lcron", "--loss_type=lcron", "--tau=50", "--batch_size=16"]
BCE = ["--method=bce", "--loss_type=bce", "--batch_size=16"]


def plan(log: Path, *words: str, methods: list[str] = LCRON) -> list[Run]:
    """The plan of the script's words before "--", and the user's after it."""
    script, user = (list(words[: words.index("--")]), words[words.index("--") + 1 :]) if "--" in words else ([], words)
    return run_experiments.make_plan(
        *run_experiments.parse_args([*SCRIPT, *script, *methods, "--", f"--data_dir={log}", *user])
    )


def folders(runs: list[Run]) -> list[str]:
    return [str(run.folder.relative_to(Path.cwd())) for run in runs]


def test_a_script_makes_each_seed_beside_its_untrained_cascade(log: Path) -> None:
    runs = plan(log, "--output_dir=O")
    assert folders(runs) == [f"O/{row}seed{seed}" for seed in range(30, 35) for row in ("untrained/", "")]
    assert [run.name for run in runs[:2]] == ["untrained", "lcron"]
    assert [run.seed for run in runs] == [seed for seed in range(30, 35) for _ in "ab"]


@pytest.mark.parametrize("seeds", [["--seeds=31"], ["--seeds", "31"], ["--seed=31"], ["--seeds=31,31"]])
def test_seeds(seeds: list[str], log: Path) -> None:
    assert folders(plan(log, "--output_dir=O", *seeds)) == ["O/untrained/seed31", "O/seed31"]


def test_a_table_has_one_untrained_cascade_a_seed(log: Path) -> None:
    runs = plan(log, "--output_dir=O", "--seeds=30,31", methods=LCRON + BCE)
    assert folders(runs) == [
        f"O/{row}/seed{seed}" for seed in (30, 31) for row in ("untrained", "lcron", "bce")
    ]  # fmt: skip
    assert folders(plan(log, "--output_dir=O", "--seeds=30", "--methods=bce", methods=LCRON + BCE)) == [
        "O/untrained/seed30", "O/bce/seed30"
    ]  # fmt: skip


def test_methods_of_other_sizes_have_their_own_untrained_cascade(log: Path) -> None:
    runs = plan(log, "--output_dir=O", "--seeds=30", methods=[*LCRON, *BCE, "--emb_dim=4"])
    assert folders(runs) == [
        "O/untrained/seed30", "O/lcron/seed30", "O/untrained_emb_dim4/seed30", "O/bce/seed30"
    ]  # fmt: skip


REFUSED = {
    "--taus=3": "--taus: no such option (did you mean --tau?)",
    "--job=2": "--job: no such option (did you mean --jobs?)",
    "--terms=singel": "argument --terms: invalid choice: 'singel'",
    "--loss_type=bce": "--tau is not an option of bce",
    "--loss_type=lcorn": "no such method (did you mean lcron?)",
    "--device=gpu": "--device=gpu: unknown device",
    "--batch_size=99": "has 40 requests, fewer than --batch_size=99",
    "--seq_len=51": "the histories of the log have 50 positions",
    "--methods=lcorn": "choose from lcron (did you mean lcron?)",
}


@pytest.mark.parametrize("option", REFUSED)
def test_a_mistake_is_said_before_anything_is_made(
    option: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SCRIPT, *LCRON, "--", f"--data_dir={log}", f"--output_dir={tmp_path / 'O'}", option]
    try:
        code: object = run_command(run_experiments.main, argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and REFUSED[option] in error
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked_without_a_log(tmp_path: Path) -> None:
    """So that none is simulated for a mistake."""
    argv = ["--check", *SCRIPT, *LCRON, "--", f"--data_dir={tmp_path / 'none'}"]
    run_experiments.main(argv)
    with pytest.raises(InputError, match="--tau is not an option of bce"):
        run_experiments.main([*argv, "--loss_type=bce"])
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_the_scripts_are_known_to_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose parser names the nearest of them for a misspelt one."""
    with pytest.raises(SystemExit):
        run_experiments.main(["--help"])
    users = capsys.readouterr().out.split("the user's:")[1]
    assert set(re.findall(r"--[a-z_]+", users)) == set(SCRIPT_OPTIONS)


def test_two_rows_of_one_name(log: Path) -> None:
    with pytest.raises(InputError, match="two rows of the table"):
        plan(log, "--output_dir=O", methods=[*LCRON, *LCRON, "--tau=20"])


def test_the_default_folders(log: Path) -> None:
    assert folders(plan(log, "--seeds=30")) == [
        f"runs/two_stage/untrained/{log.name}/seed30", f"runs/two_stage/lcron/{log.name}/seed30"
    ]  # fmt: skip
    variant = plan(log, "--variant=lr0.02_bs512", "--", "--seeds=30", "--validation", methods=LCRON + BCE)
    assert [path.split("/")[2] for path in folders(variant)] == [
        "untrained_validation", "lcron_lr0.02_bs512_validation", "bce_lr0.02_bs512_validation"
    ]  # fmt: skip
    assert [run.variant for run in variant][:2] == ["validation", "lr0.02_bs512_validation"]


def test_what_goes_to_which_command(log: Path, tmp_path: Path) -> None:
    both = [f"--cache_dir={tmp_path}", "--time_zone=UTC", "--device=cpu", "--no-compile"]
    untrained, run = plan(
        log, "--seeds=30", f"--test_day={DAYS[1]}", "--save_scores", "--tau", "20", "--lr=0.02", *both,
        "--num_random_items=3", "--test_random_items=4",
    )  # fmt: skip
    train, test = run.train_command(run.parts[0], resume=False), run.test_command(run.parts[0])
    assert (train[0], test[0]) == (TRAIN, EVALUATE)
    for command in (train, test):
        assert {*both, f"--data_dir={log}", f"--output_dir={run.folder}"} <= set(command)
    assert train.index("--tau") > train.index("--tau=50")
    assert {"--lr=0.02", "--seed=30"} <= set(train)
    of_test = {f"--test_day={DAYS[1]}", "--save_scores", "--test_random_items=4"}
    assert of_test <= set(test) and not of_test & set(train)
    assert "--num_random_items=3" in train
    assert not any(word.startswith(("--lr", "--tau", "--seed", "--num_random")) for word in test)
    assert "--epochs=0" in untrained.train_command(untrained.parts[0], resume=False)
    assert not any(word.startswith("--train_days") for word in train)  # the log's usual days
    (named,) = plan(log, "--no-untrained", "--", "--seeds=30", f"--train_days={DAYS[0]}")
    assert f"--train_days={DAYS[0]}" in named.train_command(named.parts[0], resume=False)


def test_the_users_batch_size_is_not_divided(log: Path) -> None:
    def batch_size(*words: str) -> int:
        return plan(log, "--batch_divisor=8", "--", "--seeds=30", *words)[-1].config["arguments"]["batch_size"]

    assert (batch_size(), batch_size("--batch_size=16")) == (2, 16)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--lr=0.5", "--seed=7"], "untrained"),
        (["--emb_dim=4", "--seq_len=5"], "untrained_emb_dim4_seq_len5"),
    ],
)
def test_the_folder_of_an_untrained_cascade(words: list[str], folder: str, log: Path) -> None:
    assert folders(plan(log, *words))[0].split("/")[2] == folder


def test_the_folder_of_an_untrained_cascade_of_another_run_s_models(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file; train first"):
        plan(log, "--init_from=a/b")
    save_models(Path("a/b"), {stage: {"bias": np.zeros(2)} for stage in ("retrieval", "rank")}, {})
    run = plan(log, "--init_from=a/b")[0]
    assert folders([run])[0].split("/")[2] == "untrained_init_froma-b"
    save_models(Path("a/b"), {"rank": {"bias": np.ones(2)}}, {})
    later = plan(log, "--init_from=a/b")[0]
    assert str(first_difference(run.config, later.config)) == "other models in --init_from: rank"


def test_a_test_day_that_is_a_copy_of_a_training_day(log: Path, tmp_path: Path) -> None:
    """Under another name; the day itself may be named for both, which its metrics say."""
    copied = shutil.copytree(log, tmp_path / "log", ignore=shutil.ignore_patterns("cache", "manifest.json"))
    for path in copied.rglob(f"*{DAYS[0]}*"):
        shutil.copy(path, path.with_name(path.name.replace(DAYS[0], DAYS[2])))
    for words in ([], ["--streaming"]):
        with pytest.raises(InputError, match=f"day {DAYS[2]}, .* the same requests as day {DAYS[0]}, which trains"):
            plan(copied, *words)
    plan(copied, f"--train_days={DAYS[0]}", f"--test_day={DAYS[0]}")


def test_a_plan_knows_what_the_training_will_write(log: Path, tmp_path: Path) -> None:
    """So the runner's comparison of a folder with its plan is that of --resume."""
    *_, run = plan(log, "--seeds=31", f"--output_dir={tmp_path}", "--emb_dim=4", "--nn_units=16", "--device=cpu")
    run_train2.main(run.train_command(run.parts[0], resume=False)[1:])
    written = read_folder(run.folder)
    assert first_difference(written.config, run.config) is first_difference(run.config, written.config) is None
    assert all(written.config[name] == value for name, value in run.config.items() if name != "arguments")
    assert run.steps == 4 and written.trained(run.parts[0].train_days, epochs=1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods=lcron,mine"], "--methods=mine: choose from lcron"),
        (["--test_day=2020-01-01"], "--test_day=2020-01-01: .* has only"),
        (["--terms=single", "--end_to_end_quotas=30,20"], "--end_to_end_quotas belongs to the end-to-end term"),
    ],
)
def test_mistakes(words: list[str], sentence: str, log: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        plan(log, *words)


@pytest.mark.parametrize("word", ["--seeds=a", "--jobs=0", "--lr=abc", "--engine=slurm", "--output_dir=", "--tua=3"])
def test_arguments_that_are_refused(word: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(log, word)
    assert ended.value.code == 2
    assert word.partition("=")[0] in capsys.readouterr().err


def finish(
    log: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *failures: tuple[str, int] | None
) -> tuple[int | str | None, list[str]]:
    """The exit code and the list of runs, when the runs end so; None for a finished one."""

    def engine(args: object, runs: list[Run]) -> Iterator[list[Outcome]]:
        for run, failure in zip(runs, failures, strict=True):
            error, code = failure or ("", 0)
            yield [Outcome(run, "failed" if failure else "finished", error=error, code=code)]

    monkeypatch.setattr(run_experiments, "_engine", engine)
    seeds = ",".join(str(30 + count) for count in range(len(failures) // 2))
    argv = [*SCRIPT, f"--run_list={folder / 'list'}", *LCRON, "--"]
    argv += [f"--data_dir={log}", f"--output_dir={folder}", f"--seeds={seeds}"]
    try:
        code: int | str | None = run_command(run_experiments.main, argv)
    except SystemExit as ended:
        code = ended.code
    return code, (folder / "list").read_text().split("\0")[:-1]


def test_all_finish(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finish(log, tmp_path, monkeypatch, None, None) == (
        0, [str(tmp_path / "untrained/seed30"), str(tmp_path / "seed30")]
    )  # fmt: skip


def test_failures_are_listed_by_their_sentence(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = (None, ("no memory", 1), None, None, ("lower --lr", 2), ("no memory", 1))
    code, listed = finish(log, tmp_path, monkeypatch, *failures)
    assert code == 1
    assert listed == [str(tmp_path / name) for name in ("untrained/seed30", "untrained/seed31", "seed31")]
    said = capsys.readouterr().err
    assert "error: 3 of 6 runs failed" in said
    assert "  lcron, seed 30; lcron, seed 32: no memory\n" in said
    assert "  untrained, seed 32: lower --lr\n" in said


def test_the_exit_code_of_a_mistake(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All failures are the user's: 2. And an untrained cascade alone makes no table."""
    assert finish(log, tmp_path, monkeypatch, None, ("--tau is not an option of bce", 2)) == (2, [])


def test_runs_of_several_codes(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "seed30").mkdir()
    (tmp_path / "seed30/run.json").write_text('{"commit": "abc"}')
    (tmp_path / "untrained/seed30").mkdir(parents=True)
    (tmp_path / "untrained/seed30/run.json").write_text('{"commit": "abc", "code": "3f"}')
    with caplog.at_level("WARNING"):
        finish(log, tmp_path, monkeypatch, None, None)
    assert "not all made by the same code: 1 by code 3f, 1 by commit abc" in caplog.text


def test_a_folder_with_another_run_is_refused_before_anything_starts(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed30").mkdir()
    (tmp_path / "seed30/metrics.json").write_text("{}")
    with pytest.raises(FileNotFoundError):  # no list: nothing was made
        finish(log, tmp_path, monkeypatch, None, None)
