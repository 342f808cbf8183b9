"""lcron table --kind=choices: what sweeps have chosen, tested; the numbers are computed here from the runs' own."""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deep_components.cli import run_command
from deep_components.commands import table
from deep_components.files import read_json, write_json
from deep_components.reporting.choices import choices_document, step_seconds
from deep_components.reporting.tables import csv as as_csv
from deep_components.reporting.tables import markdown
from tests.reporting.fake_runs import add_requests, write_run

SEEDS = (30, 31, 32, 33)
REQUESTS = 50
GRID = [{"lr": lr, "tau": tau} for lr in ("0.005", "0.01", "0.02") for tau in ("1", "5", "25")]

# loss -> operator -> (the index of its setting, recall of each seed)
RECALLS: dict[str, dict[str, tuple[int, tuple[float, ...]]]] = {
    "lcron": {
        "neural_sort": (4, (0.50, 0.52, 0.51, 0.53)),
        "lml": (5, (0.60, 0.6201, 0.61, 0.63)),  # higher for every seed, and by nearly the same
        "dftopk": (0, (0.51, 0.50, 0.53, 0.51)),
    },
    "arf_v2": {
        "neural_sort": (4, (0.70, 0.71, 0.72, 0.70)),
        "lml": (4, (0.695, 0.7045, 0.7155, 0.6949)),  # lower, by little
    },
}


def of_requests(recall: float, operator: str, spread: float = 0.001) -> np.ndarray:
    """Values of a run's requests: their mean is its recall."""
    noise = np.random.default_rng(len(operator)).normal(size=REQUESTS)
    return recall + spread * (noise - noise.mean())


def over_requests(loss: str, operator: str, spread: float = 0.001) -> float:
    """The p-value of an operator's difference over requests."""
    ours, baseline = (float(np.mean(RECALLS[loss][name][1])) for name in (operator, "neural_sort"))
    difference = of_requests(ours, operator, spread) - of_requests(baseline, "neural_sort")
    return float(stats.ttest_1samp(difference, 0).pvalue)


def write_sweep(folder: Path, loss: str, tests: int = len(SEEDS), items: int = 0, of_test: int = 0) -> Path:
    """A sweep's folder with sweep.json, and its choices' first ``tests`` tests beside it."""
    trials = []
    for operator, (chosen, recalls) in RECALLS[loss].items():
        setting = GRID[chosen]
        name = f"{operator}_lr{setting['lr']}_tau{setting['tau']}"
        arguments = {"tau": float(setting["tau"]), "lr": float(setting["lr"]), "topk_op": operator, "loss_type": loss}
        if items:
            arguments["num_random_items"] = items
        for seed, recall in list(zip(SEEDS, recalls, strict=True))[:tests]:
            results = {"loss_type": loss, "test_random_items": of_test}
            run = folder.with_name(f"{folder.name}_test") / name / f"seed{seed}"
            written = write_run(run, recall, arguments, results, operator, seed=seed)
            add_requests(written, of_requests(recall, operator))
        trials += [
            {"method": operator, "arguments": one, "mean": 0.25, "chosen": index == chosen}
            | {"tested": [f"{name}/seed{seed}" for seed in SEEDS] if index == chosen else []}
            for index, one in enumerate(GRID)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {"trials": trials, "budget": 9})
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for loss in RECALLS:
        write_sweep(tmp_path / "study" / loss, loss)
    return tmp_path / "study"


def rows(paths: Sequence[Path], steps: Mapping[tuple[str, str, int], float] | None = None) -> dict[Any, dict[str, str]]:
    content = as_csv(partial(choices_document, paths, "neural_sort", "paired", steps or {}))
    return {(row["loss"], row["method"]): row for row in csv.DictReader(io.StringIO(content))}


def step_down(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's adjusted p-values, by their definition: the largest of (m - j + 1) p_(j) over j up to the value's rank."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    steps = [min(1.0, (len(ordered) - j) * p_values[name]) for j, name in enumerate(ordered)]
    return {name: max(steps[: rank + 1]) for rank, name in enumerate(ordered)}


def test_the_numbers(study: Path) -> None:
    found = rows([study])
    p_values: dict[tuple[str, str], float] = {}
    for loss, operators in RECALLS.items():
        baseline = np.array(operators["neural_sort"][1])
        for operator, (chosen, recalls) in operators.items():
            row = found.pop((loss, operator))
            assert (row["chosen.lr"], row["chosen.tau"]) == (GRID[chosen]["lr"], GRID[chosen]["tau"])
            assert float(row["mean"]) == pytest.approx(np.mean(recalls))
            assert float(row["std"]) == pytest.approx(np.std(recalls, ddof=1))
            assert (row["seeds"], row["settings"], row["validation"]) == ("4", "9", "0.25")
            if operator == "neural_sort":
                assert (row["difference"], row["p"], row["p_holm_all"], row["verdict"]) == ("", "", "", "")
                continue
            difference = np.mean(recalls) - np.mean(baseline)
            assert float(row["difference"]) == pytest.approx(difference)
            assert float(row["interval_low"]) < difference < float(row["interval_high"])
            assert float(row["interval_high"]) - float(row["interval_low"]) < 0.002  # as requests hardly vary
            assert float(row["p_requests"]) == pytest.approx(over_requests(loss, operator))
            p_values[loss, operator] = stats.ttest_rel(recalls, baseline).pvalue
            assert float(row["p"]) == pytest.approx(p_values[loss, operator])
    assert found == {}
    found = rows([study])
    for key, adjusted in step_down(p_values).items():
        own = step_down({other: p for other, p in p_values.items() if other[0] == key[0]})
        assert float(found[key]["p_holm_all"]) == pytest.approx(adjusted)
        assert float(found[key]["p_holm"]) == pytest.approx(own[key])
    assert float(found["arf_v2", "lml"]["p_holm_all"]) > float(found["arf_v2", "lml"]["p_holm"])
    verdicts = {key: found[key]["verdict"] for key in p_values}
    assert verdicts == {("lcron", "lml"): "higher", ("lcron", "dftopk"): "not shown", ("arf_v2", "lml"): "lower"}


def test_sweeps_of_several_folders_are_corrected_together(tmp_path: Path) -> None:
    """Also where they have the same name."""
    folders = [write_sweep(tmp_path / log / "lcron", "lcron").parent for log in ("a", "b")]
    content = as_csv(partial(choices_document, folders, "neural_sort", "paired", {}))
    found = [row for row in csv.DictReader(io.StringIO(content)) if row["method"] == "lml"]
    assert [row["sweep"] for row in found] == [str(folder / "lcron") for folder in folders]
    for (
        row
    ) in found:  # two comparisons of a sweep, four in all; the equal p of the other log comes right before or after
        assert [float(row[name]) for name in ("p_holm", "p_holm_all")] == pytest.approx(
            [2 * float(row["p"]), 4 * float(row["p"])]
        )


def vary_over_requests(study: Path, loss: str, operator: str, spread: float) -> float:
    """Other values of an operator's requests, with the same mean; the p-value of its difference over them."""
    for run in (study / f"{loss}_test").glob(f"{operator}_*/seed*"):
        add_requests(run, of_requests(read_json(run / "metrics.json")["joint_recall@10@20"], operator, spread))
    return over_requests(loss, operator, spread)


def test_requests_that_show_nothing(study: Path) -> None:
    """The seeds alone would show a difference."""
    assert rows([study])["lcron", "lml"]["verdict"] == "higher"
    p = vary_over_requests(study, "lcron", "lml", 10)
    row = rows([study])["lcron", "lml"]
    assert float(row["p_requests"]) == pytest.approx(p) and p > 0.05
    assert float(row["p_holm_all"]) < 0.05 and float(row["interval_low"]) < 0 < float(row["interval_high"])
    assert row["verdict"] == "not shown"


def test_requests_are_corrected_over_all_comparisons(study: Path) -> None:
    """They would show a difference, were it the only one that is asked for."""
    p_values = {
        ("lcron", "lml"): vary_over_requests(study, "lcron", "lml", 0.28),
        ("lcron", "dftopk"): vary_over_requests(study, "lcron", "dftopk", 100),
        ("arf_v2", "lml"): vary_over_requests(study, "arf_v2", "lml", 100),
    }
    found = rows([study])
    for key, adjusted in step_down(p_values).items():
        assert float(found[key]["p_requests"]) == pytest.approx(p_values[key])
        assert float(found[key]["p_requests_holm_all"]) == pytest.approx(adjusted)
    row = found["lcron", "lml"]
    assert float(row["p_holm_all"]) < 0.05 and float(row["interval_low"]) > 0
    assert float(row["p_requests"]) < 0.05 < float(row["p_requests_holm_all"])
    assert row["verdict"] == "not shown"


def test_a_test_that_is_missing_leaves_its_seed_out(study: Path) -> None:
    """Difference, p and interval are of the seeds that both have, so that none of them points elsewhere."""
    (missing,) = (study / "lcron_test").glob("lml*/seed33")
    shutil.rmtree(missing)
    (outlier,) = (study / "lcron_test").glob("neural_sort*/seed33")
    metrics = read_json(outlier / "metrics.json")
    write_json(outlier / "metrics.json", metrics | {"joint_recall@10@20": 0.99})
    add_requests(outlier, np.full(REQUESTS, 0.99))
    row = rows([study])["lcron", "lml"]
    expected = np.mean(RECALLS["lcron"]["lml"][1][:3]) - np.mean(RECALLS["lcron"]["neural_sort"][1][:3])
    assert float(row["difference"]) == pytest.approx(expected)
    for end in ("interval_low", "interval_high"):
        assert float(row[end]) == pytest.approx(expected, abs=0.001)
    assert row["verdict"] == "higher"


def test_nothing_is_said_of_metrics_that_are_not_shown(study: Path) -> None:
    """All values of the others are alike, so that there is no test of them."""
    content = markdown(partial(choices_document, [study], "neural_sort", "paired", {}))
    assert "No t-test" not in content
    for run in (study / "lcron_test").glob("*/seed*"):
        write_json(run / "metrics.json", read_json(run / "metrics.json") | {"joint_recall@10@20": 0.5})
        add_requests(run, np.full(REQUESTS, 0.5))
    content = markdown(partial(choices_document, [study], "neural_sort", "paired", {})).replace("\\", "")
    assert "No t-test of some metrics against lml, dftopk: the values do not vary over seeds" in content


def test_a_method_that_is_not_there(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else takes the place of the compared one."""
    content = read_json(study / "lcron/sweep.json")
    for trial in content["trials"]:
        trial["method"] = {"neural_sort": "lcron"}.get(trial["method"], trial["method"])
    write_json(study / "lcron/sweep.json", content)
    for run in (study / "lcron_test").glob("neural_sort*/seed*"):
        write_json(run / "run.json", read_json(run / "run.json") | {"name": "lcron"})
    found = rows([study])
    assert {row["p"] for (loss, _), row in found.items() if loss == "lcron"} == {""}
    assert found["arf_v2", "lml"]["p"] != ""
    assert run_command(table.main, [str(study), "--kind=choices", "--compare=neural_sort"]) == 0
    assert "No row is called neural_sort" in capsys.readouterr().out
    assert run_command(table.main, [str(study), "--kind=choices", "--compare=neuralsort"]) == 2
    assert "--compare=neuralsort: no such method is tested; those that are: " in capsys.readouterr().err


def test_two_paths_to_one_sweep_count_once(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent)
    assert len(rows([study, Path(study.name)])) == len(rows([study]))
    for key, row in rows([study, Path(study.name)]).items():
        assert row["p_holm_all"] == rows([study])[key]["p_holm_all"]


def test_values_at_the_end_of_the_grid_are_marked(study: Path) -> None:
    ends = {key: row["at_end"] for key, row in rows([study]).items()}
    assert ends["lcron", "neural_sort"] == ends["arf_v2", "lml"] == ""
    assert (ends["lcron", "lml"], ends["lcron", "dftopk"]) == ("tau", "lr,tau")
    content = markdown(partial(choices_document, [study], "neural_sort", "paired", {}))
    assert "| lml | 0.01 | 25 (end) |" in content and "| dftopk | 0.005 (end) | 1 (end) |" in content


def test_parts_that_are_not_done(tmp_path: Path) -> None:
    """What is there is shown, what is missing is said, and runs that were not chosen do not count."""
    folder = write_sweep(tmp_path / "O/lcron", "lcron", tests=2)
    write_sweep(tmp_path / "O/arf_v2", "arf_v2", tests=0)
    write_run(tmp_path / "O/lcron_test/lml_lr0.02_tau1/seed30", 0.9, {"topk_op": "lml"}, name="lml", seed=30)
    content = markdown(partial(choices_document, [tmp_path], "neural_sort", "paired", {}))
    notes = content.replace("\\", "").splitlines()
    assert {"O/lcron: 6 of 12 tests are done.", "O/arf_v2: 0 of 8 tests are done."} <= {*notes}
    assert str(tmp_path) not in content
    assert "0.9000" not in content and content.count("| 2 |\n") == 3
    assert rows([folder])["lcron", "lml"]["seeds"] == "2"


def test_seconds_of_a_step(tmp_path: Path) -> None:
    """Of the same setting, loss, operator and number of random items in the training, whatever the test's."""
    sweep = write_sweep(tmp_path / "lcron", "lcron", items=160, of_test=80)
    lengths = {"40": {"random_items": 0, "seconds": 0.25}, "200": {"random_items": 160, "seconds": 0.5}}
    files = [tmp_path / "two_stage.json", tmp_path / "three_stage.json"]
    for file, method in zip(files, ("lcron_lml", "lcron_dftopk"), strict=True):
        measured = {"arguments": {"setting": file.stem}, "results": {method: lengths, "arf_v2_dftopk": lengths}}
        file.write_text(json.dumps(measured))
    steps = step_seconds(files)
    found = {method: row["step_seconds"] for (_, method), row in rows([sweep], steps).items()}
    assert found == {"neural_sort": "", "lml": "0.5", "dftopk": ""}
    content = markdown(partial(choices_document, [sweep], "neural_sort", "paired", steps))
    assert "random items: 160 in training, 80 in the test" in content and "| 500.0 |" in content


DAMAGES: dict[str, dict[str, Any]] = {
    "another folder": {"tested": ["../elsewhere/seed30"]},
    "a folder of the machine": {"tested": ["/etc"]},
    "no list": {"tested": 3},
    "no name": {"method": None},
    "no setting": {"arguments": []},
    "no number": {"mean": "high"},
    "no choice": {"chosen": "yes"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sweep_is_refused(damage: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "lcron/sweep.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    content["trials"][4] |= DAMAGES[damage]
    path.write_text(json.dumps(content))
    assert run_command(table.main, [str(study), "--kind=choices"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"error: {path}: not a sweep's results" in captured.err


def test_what_is_no_study(tmp_path: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_command(table.main, [str(tmp_path / "empty"), "--kind=choices"]) == 2
    assert "no sweep.json; name folders of lcron sweep" in capsys.readouterr().err
    sweep = write_sweep(tmp_path / "untested/lcron", "lcron", tests=0)
    assert run_command(table.main, [str(sweep), "--kind=choices"]) == 2
    assert "no chosen setting is tested" in capsys.readouterr().err
    (tmp_path / "steps.json").write_text("[1]")
    assert run_command(table.main, [str(study), "--kind=choices", f"--steps={tmp_path / 'steps.json'}"]) == 2
    assert "steps.json: not the --output of python -m benchmarks.long_lists" in capsys.readouterr().err
