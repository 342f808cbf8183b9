"""One run: made, kept, taken up again, refused; its record; what is said when it fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deep_components.experiments import execution
from deep_components.experiments.execution import Commands, Options, Outcome, Slot, error_sentence, execute
from deep_components.experiments.plan import Run
from deep_components.files import read_json, write_json
from deep_components.runs.folder import RUNNER_LOCK_FILE
from tests.experiments.runs import CHECKSUMS, DAYS, calls, fake_run, on_days, record


def make(run: Run, slot: Slot = Slot(), **options: bool) -> Outcome:  # noqa: B008 - frozen
    return execute(run, slot, Options(**options), Commands())


def test_a_run_and_its_record(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert make(run, Slot("cuda:1", 3)).status == "finished"
    (call,) = calls(run)
    assert {"--seed=30", f"--data_dir={tmp_path}", f"--train_days={','.join(DAYS[:3])}"} <= set(call)
    assert call[-2:] == ["--device=cuda:1", "3"]
    found = record(run)
    assert (found["name"], found["setting"], found["seed"], found["status"]) == ("mine", "two_stage", 30, "finished")
    assert (found["train_days"], found["test_day"], found["data_checksums"]) == (list(DAYS[:3]), DAYS[3], CHECKSUMS)
    assert (found["seconds"], found["steps"], found["peak_memory_bytes"], found["commit"]) == (4.5, 3, 1000, "abc")
    (attempt,) = found["attempts"]
    assert (attempt["status"], attempt["device"], attempt["threads"]) == ("finished", "cuda:1", 3)


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    before = (run.folder / "run.json").read_bytes()
    assert make(run).status == "kept"
    assert len(calls(run)) == 1
    assert (run.folder / "run.json").read_bytes() == before


def test_force_makes_it_again(tmp_path: Path) -> None:
    make(fake_run(tmp_path))
    run = fake_run(tmp_path, lr=0.02)
    assert make(run, force=True).status == "finished"
    assert "--resume" not in calls(run)[-1]
    assert record(run)["identity"]["lr"] == 0.02
    assert len(record(run)["attempts"]) == 1


@pytest.mark.parametrize("missing", [["training.json", "metrics.json"], ["training.json", "metrics.json", "run.log"]])
def test_an_unfinished_training_goes_on(missing: list[str], tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    for name in missing:
        (run.folder / name).unlink()
    assert make(run).status == "finished"
    assert ["--resume" in call for call in calls(run)] == [False, True]


def test_a_training_without_a_saved_state_starts_again(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    for name in ("training.json", "training_state.safetensors"):
        (run.folder / name).unlink()
    assert make(run).status == "finished"
    assert ["--resume" in call for call in calls(run)] == [False, False]


def test_only_the_evaluation_is_missing(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    (run.folder / "metrics.json").unlink()
    assert make(run).status == "finished"
    assert len(calls(run)) == 1
    assert (run.folder / "metrics.json").exists()
    scored = replace(run, evaluation=("--save_scores",))  # scores were not saved: the evaluation is made again
    assert make(scored).status == "finished"
    assert len(calls(run)) == 1


def with_random_items(run: Run, count: int) -> Run:
    return replace(run, evaluation=(f"--test_random_items={count}",), test_random_items=count)


def test_another_number_of_random_test_items_is_an_evaluation_only(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    for status in ("finished", "kept"):
        assert make(with_random_items(run, 5)).status == status
        assert json.loads((run.folder / "metrics.json").read_text())["test_random_items"] == 5
    assert make(run).status == "finished"
    assert len(calls(run)) == 1


def test_another_test_day_is_an_evaluation_only(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(on_days(run, (DAYS[:2], DAYS[2])))
    other = on_days(run, (DAYS[:2], DAYS[3]))
    assert make(other).status == "finished"
    assert len(calls(run)) == 1
    assert json.loads((run.folder / "metrics.json").read_text())["test_day"] == DAYS[3]


def refused(run: Run) -> str:
    files = {path: path.read_bytes() for path in run.folder.iterdir()}
    outcome = make(run)
    assert (outcome.status, outcome.code) == ("failed", 2)
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == files
    assert str(run.folder) in outcome.error
    return outcome.error


def changed(run: Run, **changes: object) -> Run:
    return replace(run, config=dict(run.config) | changes)


def test_another_run_is_not_replaced(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    assert "holds a run with lr=0.01, not 0.02" in refused(fake_run(tmp_path, lr=0.02))
    assert "holds a run with tau=None, not 20" in refused(fake_run(tmp_path, tau=20))
    assert "holds a run with streaming=False, not True" in refused(fake_run(tmp_path, streaming=True))
    assert "setting=two_stage" in refused(changed(run, setting="three_stage"))
    assert f"train_days={','.join(DAYS[:3])}, not {DAYS[0]};" in refused(on_days(run, (DAYS[:1], DAYS[3])))
    assert "data=simulated, not recflow" in refused(changed(run, data="recflow"))
    assert f"another day {DAYS[1]}" in refused(changed(run, data_checksums=CHECKSUMS | {DAYS[1]: "another"}))
    assert make(run).status == "kept"


OLD, NEW = ({"total": total, "files": {"models/din.py": total}, "method": {}} for total in ("old", "new"))


def note_code(run: Run, name: str, noted: object) -> None:
    """Let a file of the run's folder say which code it is of."""
    content = json.loads((run.folder / name).read_text()) | {"code": noted}
    (run.folder / name).write_text(json.dumps(content))


def test_a_run_of_other_code_is_not_kept(tmp_path: Path) -> None:
    """It is refused by name; deliberately it is kept, and --force makes it again."""
    run = changed(fake_run(tmp_path), code=NEW)
    make(run)
    note_code(run, "config.json", OLD)
    error = refused(run)
    assert "holds a run with other code: models/din.py; --force makes it again, --any_code keeps it" in error
    assert make(run, any_code=True).status == "kept"
    assert make(run, force=True).status == "finished" and len(calls(run)) == 2


def test_an_unfinished_run_of_other_code_goes_on_deliberately(tmp_path: Path) -> None:
    run = changed(fake_run(tmp_path), code=NEW)
    make(run)
    note_code(run, "config.json", OLD)
    for name in ("training.json", "metrics.json"):
        (run.folder / name).unlink()
    refused(run)
    assert make(run, any_code=True).status == "finished"
    assert {"--resume", "--any_code"} <= set(calls(run)[-1])


def test_an_evaluation_of_other_code_is_made_again(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    old = {"files": {"deep_components/metrics.py": "old"}}
    note_code(run, "metrics.json", old)
    assert make(run, any_code=True).status == "kept"
    assert make(run).status == "finished"
    assert len(calls(run)) == 1 and "code" not in json.loads((run.folder / "metrics.json").read_text())


def test_a_stream_with_days_of_other_code_is_refused(tmp_path: Path) -> None:
    """Its earlier days cannot be evaluated again: their models are gone."""
    run = fake_run(tmp_path, streaming=True)
    make(run)
    content = read_json(run.folder / "streaming.json")
    content["days"][0]["code"] = {"files": {"deep_components/metrics.py": "old"}}
    write_json(run.folder / "streaming.json", content)
    assert "other code: the evaluation of 2024-01-14" in refused(run)
    assert make(run, any_code=True).status == "kept"


def test_a_stream_with_days_of_other_random_items_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path, streaming=True)
    make(run)
    assert "test_random_items=None, not 5" in refused(with_random_items(run, 5))


def test_a_training_by_hand_in_the_folder_is_seen(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run)
    config = json.loads((run.folder / "config.json").read_text())
    config["arguments"]["lr"] = 0.5
    (run.folder / "config.json").write_text(json.dumps(config))
    assert "lr=0.5, not 0.01" in refused(run)
    (run.folder / "run.json").unlink()
    assert "without run.json" in refused(run)
    (run.folder / "run.json").write_text("{")
    assert "not readable" in refused(run)
    assert make(run, force=True).status == "finished"


def test_a_failed_start_can_be_corrected(tmp_path: Path) -> None:
    """Nothing would be lost, so other arguments are not refused."""
    assert make(fake_run(tmp_path, lr=13)).status == "failed"
    assert make(fake_run(tmp_path)).status == "finished"


def test_extend(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(on_days(run, (DAYS[:2], DAYS[3])))
    assert "train_days=" in refused(run)
    assert make(run, extend=True).status == "finished"
    assert "--resume" in calls(run)[-1]
    longer = fake_run(tmp_path, epochs=2)
    assert "epochs=1, not 2" in refused(longer)
    assert make(longer, extend=True).status == "finished"
    assert "--resume" in calls(run)[-1]


def test_the_saved_state_can_be_discarded(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    make(run, discard_state=True)
    assert not (run.folder / "training_state.safetensors").exists()
    assert make(run).status == "kept"


def test_an_untrained_cascade(tmp_path: Path) -> None:
    run = fake_run(tmp_path, epochs=0, lr=0.5)
    assert make(run).status == "finished"
    other = fake_run(tmp_path, epochs=0, tau=5, loss_type="icc")  # the same cascade beside another method
    assert make(replace(other, training=run.training)).status == "kept"


@pytest.mark.parametrize(
    ("lr", "code", "error"), [(13, 1, "step 7: the loss is nan; lower --lr"), (14, 1, "RuntimeError: no memory")]
)
def test_a_failing_command(lr: int, code: int, error: str, tmp_path: Path) -> None:
    run = fake_run(tmp_path, lr=lr)
    outcome = make(run)
    assert (outcome.status, outcome.code, outcome.error, outcome.log) == ("failed", code, error, run.folder / "run.log")
    assert error in (run.folder / "run.log").read_text()
    assert record(run)["status"] == "failed"
    assert record(run)["attempts"][0]["error"] == error


def test_error_sentences() -> None:
    assert error_sentence("loading\nerror: no such file\n", 2) == "no such file"
    assert error_sentence("usage: a\nrun_train2.py: error: unrecognized arguments: --x\n", 2).startswith("unrecognized")
    assert error_sentence("Traceback\nValueError: an error: of a kind\n", 1) == "ValueError: an error: of a kind"
    assert "memory" in error_sentence("", -9)
    assert error_sentence("", 3) == "ended with exit code 3"


def test_a_folder_has_one_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SECONDS_TO_END", 0.2)
    run = fake_run(tmp_path)
    run.folder.mkdir()
    hold = f"""
import fcntl, sys
file = open({str(run.folder / RUNNER_LOCK_FILE)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        outcome = make(run)
        assert (outcome.status, outcome.code) == ("failed", 2)
        assert "another process is making this run" in outcome.error
        holder.kill()
    assert make(run).status == "finished"


def streamed(run: Run) -> list[tuple[str, float]]:
    days = json.loads((run.folder / "streaming.json").read_text())["days"]
    return [(day["test_day"], day["joint_recall@10@20"]) for day in days]


WHOLE = [(DAYS[1], 0.1), (DAYS[2], 0.2), (DAYS[3], 0.3)]


def test_a_stream_is_one_training_tested_day_by_day(tmp_path: Path) -> None:
    run = fake_run(tmp_path, streaming=True)
    assert make(run).status == "finished"
    assert streamed(run) == WHOLE
    assert ["--resume" in call for call in calls(run)] == [False, True, True]
    assert (record(run)["steps"], record(run)["seconds"]) == (3, 4.5)
    assert make(run).status == "kept"


def test_a_stream_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run = fake_run(tmp_path, streaming=True)
    make(on_days(run, *((part.train_days, part.test_day) for part in run.parts[:1])))
    assert streamed(run) == WHOLE[:1]
    assert make(run).status == "finished"
    assert streamed(run) == WHOLE
    assert ["--resume" in call for call in calls(run)] == [False, True, True]


def test_a_stream_stopped_between_training_and_test(tmp_path: Path) -> None:
    run = fake_run(tmp_path, streaming=True)
    make(run)
    content = read_json(run.folder / "streaming.json")
    write_json(run.folder / "streaming.json", content | {"days": content["days"][:2]})
    (run.folder / "metrics.json").unlink()
    assert make(run).status == "finished"
    assert streamed(run) == WHOLE
    assert len(calls(run)) == 3
