"""Which runs are read, left out or refused, and what their rows are called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components.errors import InputError
from deep_components.reporting.runs import Run, read_runs, rows
from tests.reporting.fake_runs import ARGUMENTS, add_requests, write_run, write_runs


def rows_of(*folders: Path) -> dict[str, list[Run]]:
    return rows(read_runs(folders).runs)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_untrained_runs_have_a_row_of_their_own_and_stand_last(tmp_path: Path) -> None:
    write_run(tmp_path / "untrained" / "seed30", 0.2, epochs=0)
    write_run(tmp_path / "zzz", 0.6, loss_type="zzz")
    write_run(tmp_path / "seed30", 0.6)
    assert list(rows_of(tmp_path)) == ["lcron", "zzz", "untrained"]


def test_untrained_runs_of_several_methods_are_one_row(tmp_path: Path) -> None:
    write_run(tmp_path / "lcron" / "untrained", 0.2, epochs=0, name="lcron")
    write_run(tmp_path / "bce" / "untrained", 0.2, epochs=0, loss_type="bce", arguments={"tau": None, "lr": 0.02})
    assert {name: len(runs) for name, runs in rows_of(tmp_path).items()} == {"untrained": 1}


def test_the_rows_stand_in_the_order_given(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", name="one"), write_run(tmp_path / "b", name="two")
    assert list(rows_of(two, one)) == ["two", "one"]


def test_a_script_s_name_is_the_row_s(tmp_path: Path) -> None:
    for seed in (30, 31):
        write_run(tmp_path / f"tau1-{seed}", seed=seed, name="lcron_tau_1", arguments={"tau": 1.0})
        write_run(tmp_path / f"lcron-{seed}", seed=seed, name="lcron")
    assert {name: len(runs) for name, runs in rows_of(tmp_path).items()} == {"lcron": 2, "lcron_tau_1": 2}


@pytest.mark.parametrize("name", [None, "my_script"])
@pytest.mark.parametrize("changed", [{"tau": 20.0}, {"lr": 0.02}, {"weighting": "paper"}], ids=str)
def test_variants_are_told_apart(changed: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    (argument, value), *_ = changed.items()
    for seed in (30, 31):
        same = {argument: ARGUMENTS.get(argument)}
        write_run(tmp_path / "one" / f"seed{seed}", seed=seed, name=name, arguments=same)
        write_run(tmp_path / "two" / f"seed{seed}", seed=seed, name=name, arguments=changed)
    base = name or "lcron"
    expected = {f"{base} ({argument}={ARGUMENTS.get(argument)})": 2, f"{base} ({argument}={value})": 2}
    assert {row: len(runs) for row, runs in rows_of(tmp_path).items()} == expected


def test_other_numbers_of_epochs_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.8)
    write_run(tmp_path / "two", 0.6, epochs=5, seed=31)
    assert list(rows_of(tmp_path)) == ["lcron (epochs=1)", "lcron (epochs=5)"]


@pytest.mark.parametrize(
    "changed",
    [
        *({"seed": 31}, {"output_dir": "y"}, {"data_dir": "z"}, {"cuda": 1}, {"resume": True}),
        *({"compile": False}, {"tensorboard": True}),
    ],
    ids=str,
)
def test_what_does_not_make_a_method(changed: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.8, arguments={"resume": False, "data_dir": "a"})
    write_run(tmp_path / "two", 0.6, arguments={"resume": False, "data_dir": "a"} | changed, results={"seed": 31})
    assert list(rows_of(tmp_path)) == ["lcron"]


def test_runs_stand_in_order_of_seeds(tmp_path: Path) -> None:
    for place, seed in enumerate((100, 9, 30)):
        write_run(tmp_path / str(place), seed=seed)
    assert [run.seed for run in rows_of(tmp_path)["lcron"]] == [9, 30, 100]


def test_a_seed_found_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed30", 0.8)
    write_run(tmp_path / "b" / "seed30", 0.8)
    with pytest.raises(InputError, match="a seed stands twice"):
        rows_of(tmp_path)


def test_nested_folders_named_twice_count_once(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "down" / "seed30", 0.8)
    write_run(tmp_path / "deep" / "seed31", 0.6, seed=31)
    found = rows_of(tmp_path, tmp_path / "deep", tmp_path / "deep" / "down" / "..")
    assert [run.seed for run in found["lcron"]] == [30, 31]


def test_names_that_would_steer_a_terminal(tmp_path: Path) -> None:
    write_run(tmp_path / "run", name="a\x1b[2Jb\nc\u202ed\ud800")
    assert list(rows_of(tmp_path)) == ["a?[2Jb?c?d?"]


# ---- runs that do not belong together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("setting", "three_stage"), ("data", "simulated"), ("test_day", "2024-02-03")),
        *(("test_day_checksum", "abc"), ("num_requests", 41)),
    ],
)
def test_runs_that_do_not_belong_together(field: str, value: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", results={field: value})
    with pytest.raises(InputError, match=f"the runs differ in {field}") as error:
        read_runs([tmp_path])
    assert str(tmp_path / "one") in str(error.value)
    assert f"{value} in {tmp_path / 'two'}" in str(error.value)


def test_the_one_that_differs_from_many_is_named_first(tmp_path: Path) -> None:
    write_runs(tmp_path / "many", [0.5] * 9)
    odd = write_run(tmp_path / "odd", results={"data": "simulated"})
    with pytest.raises(InputError) as error:
        read_runs([tmp_path])
    assert str(error.value).index(str(odd)) < str(error.value).index("seed30")
    assert "and 6 more" in str(error.value)


def test_runs_with_other_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", results={"joint_recall@5@20": 0.5})
    with pytest.raises(InputError, match="the runs differ in metrics"):
        read_runs([tmp_path])


def test_runs_trained_on_other_data_of_the_same_day(tmp_path: Path) -> None:
    write_run(tmp_path / "one", config={"data_checksums": {"2024-01-13": "a", "2024-01-14": "b"}})
    fewer = write_run(tmp_path / "fewer", seed=31, config={"data_checksums": {"2024-01-13": "a"}})
    write_run(tmp_path / "untrained", epochs=0, config={"data_checksums": {}})
    assert len(read_runs([tmp_path]).runs) == 3
    other = write_run(tmp_path / "two", seed=32, config={"data_checksums": {"2024-01-13": "a", "2024-01-14": "c"}})
    with pytest.raises(InputError, match="training day 2024-01-14") as error:
        read_runs([tmp_path])
    assert f"c in {other}" in str(error.value)
    assert str(fewer) not in str(error.value)


# ---- damaged runs ----------------------------------------------------------------------------------------------------


def no_config(run: Path) -> None:
    (run / "config.json").unlink()


def no_metrics(run: Path) -> None:
    (run / "metrics.json").unlink()


def content(name: str, text: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_text(text)

    return damage


def field(name: str, value: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return damage


def cut(run: Path) -> None:
    path = run / "per_request.npz"
    path.write_bytes(path.read_bytes()[:-30])


def flipped(run: Path) -> None:
    path = run / "per_request.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def pickled(run: Path) -> None:
    np.savez(run / "per_request.npz", request_id=np.array([print] * 40, dtype=object))


def arrays(**changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        with np.load(run / "per_request.npz") as file:
            kept = {name.replace("@", "_"): values for name, values in file.items()} | changes
        kept = {name.replace("_10", "@10").replace("_20", "@20"): v for name, v in kept.items() if v is not None}
        np.savez(run / "per_request.npz", **kept)

    return damage


DAMAGES = {
    "metrics.json empty": content("metrics.json", ""),
    "metrics.json cut": content("metrics.json", '{"setting": "two_'),
    "metrics.json a list": content("metrics.json", "[]"),
    "metrics.json of nothing": content("metrics.json", "{}"),
    "metrics.json nested without end": content("metrics.json", "[" * 100_000),
    "metrics.json missing": no_metrics,
    "a metric that is text": field("joint_recall@10@20", "0.5"),
    "a metric that is true": field("joint_recall@10@20", True),
    "a metric that is NaN": field("joint_recall@10@20", float("nan")),
    "no epochs": field("epochs", None),
    "config.json missing": no_config,
    "config.json empty": content("config.json", ""),
    "config.json without arguments": content("config.json", '{"arguments": []}'),
    "run.json damaged": content("run.json", "{"),
    "run.json without a name": content("run.json", "{}"),
    "per_request.npz empty": content("per_request.npz", ""),
    "per_request.npz cut": cut,
    "per_request.npz with a flipped byte": flipped,
    "per_request.npz with pickled objects": pickled,
    "per_request.npz of other values": arrays(joint_recall_10_20=np.full(40, 0.25)),
    "per_request.npz of other length": arrays(joint_recall_10_20=np.full(39, 0.5)),
    "per_request.npz without a metric": arrays(rank_ndcg_10=None),
    "per_request.npz all undefined": arrays(joint_recall_10_20=np.full(40, np.nan)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_named_and_left_out(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in (30, 31):
        add_requests(write_run(tmp_path / f"seed{seed}", seed=seed), [0.5] * 40)
    assert len(read_runs([tmp_path]).runs) == 2
    damage(tmp_path / "seed31")
    collected = read_runs([tmp_path])
    assert [run.seed for run in collected.runs] == [30]
    assert list(collected.left_out) == [tmp_path / "seed31"]
    assert str(tmp_path / "seed31") in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize("damage", [content("metrics.json", "{"), content("config.json", ""), cut])
def test_only_damaged_runs(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(add_requests(write_run(tmp_path / "one"), [0.5] * 40))
    with pytest.raises(InputError, match="one"):
        read_runs([tmp_path])


def test_every_named_folder_must_hold_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30")
    with pytest.raises(InputError, match=r"seed31.*evaluate the runs first"):
        read_runs([tmp_path / "seed30", tmp_path / "seed31"])
