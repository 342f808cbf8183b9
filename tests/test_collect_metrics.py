"""The table of many runs: means and deviations by hand, methods told apart, what does not belong together refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deep_components import collect_metrics
from deep_components.cli import run_command
from deep_components.errors import InputError

ARGUMENTS = {"loss_type": "lcron", "seed": 30, "tau": 50.0, "epochs": 1, "lr": 0.01, "output_dir": "x", "cuda": None}
RESULTS = {
    "joint_recall@10@20": 0.5,
    "rank_ndcg@10": 0.25,
    "rank_kendall_tau": 0.1,
    "num_requests": 40,
    "test_day": "2024-02-04",
    "setting": "two_stage",
    "loss_type": "lcron",
    "seed": 30,
    "epochs": 1,
    "data": "recflow",
}


def write_run(
    folder: Path,
    recall: float | None = 0.5,
    arguments: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    **both: Any,
) -> Path:
    """A run's folder; ``both`` goes into the arguments and into the results, as the seed does."""
    folder.mkdir(parents=True)
    all_arguments = ARGUMENTS | {"output_dir": str(folder)} | both | dict(arguments or {})
    (folder / "config.json").write_text(json.dumps({"arguments": all_arguments}))
    all_results = RESULTS | {"joint_recall@10@20": recall} | both | dict(results or {})
    (folder / "metrics.json").write_text(json.dumps(all_results))
    return folder


def table_of(*folders: Path) -> str:
    return collect_metrics.table(collect_metrics.read_runs(folders))


def rows(table: str) -> dict[str, list[str]]:
    """The table's rows by method, cells separated by two blanks or more."""
    lines = table.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("method"))
    split = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start:]]
    return {cells[0]: cells[1:] for cells in split if cells and not cells[0].startswith("---")}


def test_mean_and_sample_deviation(tmp_path: Path) -> None:
    for seed, recall in ((30, 0.8), (31, 0.9), (32, 0.7)):
        write_run(tmp_path / f"seed{seed}", recall, seed=seed)
    table = rows(table_of(tmp_path))
    assert table["method"] == ["joint_recall@10@20", "rank_ndcg@10", "seeds"]
    # mean 0.8; deviations 0, 0.1, -0.1: sqrt((0.01 + 0.01) / (3 - 1)) = 0.1
    assert table["lcron"] == ["0.8000 +- 0.1000", "0.2500 +- 0.0000", "3"]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30", 0.875)
    assert rows(table_of(tmp_path))["lcron"] == ["0.8750", "0.2500", "1"]


def test_the_head_says_what_the_numbers_are(tmp_path: Path) -> None:
    write_run(tmp_path / "a", results={"data": "simulated", "warning": "SIMULATED DATA: means nothing"})
    head = table_of(tmp_path).splitlines()
    assert head[0].startswith("two_stage, data: simulated, test day 2024-02-04, 40 requests")
    assert head[1] == "SIMULATED DATA: means nothing"


def test_untrained_runs_have_a_row_of_their_own_and_stand_last(tmp_path: Path) -> None:
    write_run(tmp_path / "untrained" / "seed30", 0.2, epochs=0)
    write_run(tmp_path / "zzz", 0.6, loss_type="zzz")
    write_run(tmp_path / "seed30", 0.6)
    table = rows(table_of(tmp_path))
    assert list(table) == ["method", "lcron", "zzz", "untrained"]
    assert table["untrained"][0] == "0.2000"


def test_untrained_runs_of_several_methods_are_one_row(tmp_path: Path) -> None:
    write_run(tmp_path / "lcron" / "untrained", 0.2, epochs=0)
    write_run(tmp_path / "bce" / "untrained", 0.2, epochs=0, loss_type="bce", arguments={"tau": None, "lr": 0.02})
    assert [name for name in rows(table_of(tmp_path)) if name.startswith("untrained")] == ["untrained"]


def test_a_seed_found_twice_is_refused_or_counted_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed30", 0.8)
    write_run(tmp_path / "b" / "seed30", 0.8)
    write_run(tmp_path / "b" / "seed31", 0.6, seed=31)
    try:
        table = rows(table_of(tmp_path))
    except InputError as error:
        assert "seed" in str(error)
    else:
        assert table["lcron"][-1] == "2"


@pytest.mark.parametrize("changed", [{"tau": 20.0}, {"lr": 0.02}, {"weighting": "paper"}], ids=str)
def test_variants_are_told_apart(changed: dict[str, Any], tmp_path: Path) -> None:
    (name, value), *_ = changed.items()
    for seed in (30, 31):
        write_run(tmp_path / "one" / f"seed{seed}", 0.8, seed=seed, arguments={name: ARGUMENTS.get(name)})
        write_run(tmp_path / "two" / f"seed{seed}", 0.6, seed=seed, arguments=changed)
    table = rows(table_of(tmp_path))
    assert set(table) == {"method", f"lcron ({name}={ARGUMENTS.get(name)})", f"lcron ({name}={value})"}
    assert table[f"lcron ({name}={value})"] == ["0.6000 +- 0.0000", "0.2500 +- 0.0000", "2"]


def test_other_numbers_of_epochs_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.8)
    write_run(tmp_path / "two", 0.6, epochs=5, seed=31)
    assert set(rows(table_of(tmp_path))) == {"method", "lcron (epochs=1)", "lcron (epochs=5)"}


@pytest.mark.parametrize("changed", [{"seed": 31}, {"output_dir": "y"}, {"cuda": 1}, {"resume": True}], ids=str)
def test_what_does_not_make_a_method(changed: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.8, arguments={"resume": False})
    write_run(tmp_path / "two", 0.6, arguments={"resume": False} | changed, results={"seed": 31})
    assert list(rows(table_of(tmp_path))) == ["method", "lcron"]


@pytest.mark.parametrize(
    ("field", "value"), [("setting", "three_stage"), ("data", "simulated"), ("test_day", "2024-02-03")]
)
def test_runs_that_do_not_belong_together(field: str, value: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", results={field: value})
    with pytest.raises(InputError, match=f"the runs differ in {field}") as error:
        table_of(tmp_path)
    assert str(tmp_path / "one") in str(error.value)
    assert str(tmp_path / "two") in str(error.value)


def test_nested_folders_named_twice_count_once(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "down" / "seed30", 0.8)
    write_run(tmp_path / "deep" / "seed31", 0.6, seed=31)
    assert rows(table_of(tmp_path, tmp_path / "deep", tmp_path / "deep" / "down" / ".."))["lcron"][-1] == "2"


def test_an_undefined_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "one", None)
    write_run(tmp_path / "two", 0.5, seed=31)
    assert rows(table_of(tmp_path))["lcron"][0] == "undefined"


def test_every_named_folder_must_hold_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30")
    with pytest.raises(InputError, match="seed31"):
        table_of(tmp_path / "seed30", tmp_path / "seed31")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluate the runs first"):
        table_of(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_results(content: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "one" / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=r"metrics.json"):
        table_of(tmp_path)


def test_results_without_a_config(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "one" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json"):
        table_of(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "with blanks", 0.8)
    assert run_command(collect_metrics.main, [str(tmp_path / "with blanks")]) == 0
    captured = capsys.readouterr()
    assert captured.out == table_of(tmp_path)
    assert captured.err == ""
    assert run_command(collect_metrics.main, [str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
