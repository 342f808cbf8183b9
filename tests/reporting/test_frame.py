"""Which runs are read, left out or refused, what the frame says of them, and what their rows are called."""

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components.errors import InputError
from deep_components.reporting.frame import comparable_rows, frame, label_rows, read_runs
from tests.reporting.fake_runs import ARGUMENTS, add_requests, corpus, write_costs, write_run, write_runs, write_steps


def rows_of(*folders: Path) -> dict[str, int]:
    """Row -> number of its runs."""
    return comparable_rows(read_runs(folders).runs)["row"].value_counts(sort=False).to_dict()


def test_one_row_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0.75, name="mine", config={"commit": "abc", "train_days": ["2024-01-13"]})
    write_costs(write_steps(run, [2.0, None, 1.0]))
    write_run(tmp_path / "b", None, seed=31, arguments={"batch_size": 64}, results={"setting": "three_stage"})
    runs = frame(tmp_path).set_index("seed")
    assert runs.loc[30, ["method", "loss_type", "commit", "arguments.tau"]].to_list() == ["mine", "lcron", "abc", 50.0]
    assert runs.loc[30, "train_days"] == ["2024-01-13"]
    assert runs.loc[30, ["steps", "skipped_steps", "seconds"]].to_list() == [60, 1, 4.0]
    assert runs["joint_recall@10@20"].isna().to_list() == [False, True]
    assert runs["rank_kendall_tau"].to_list() == [0.1, 0.1]
    assert runs.loc[31, "arguments.batch_size"] == 64 and runs.loc[30, "arguments.batch_size"] is None
    assert runs.groupby("setting").size().to_dict() == {"three_stage": 1, "two_stage": 1}
    assert frame([str(tmp_path / "a"), tmp_path / "b"]).equals(frame(tmp_path))


def test_the_results_say_how_many_steps_were_skipped(tmp_path: Path) -> None:
    """The step log, which nothing protects, says it only where they do not."""
    write_steps(write_run(tmp_path / "run", results={"skipped_steps": 3}), [2.0, None, None])
    assert frame(tmp_path)["skipped_steps"].to_list() == [3]


def test_the_code_that_a_run_ran(tmp_path: Path) -> None:
    write_run(tmp_path / "known", config=CODE, results={"code": {"files": {"deep_components/metrics.py": "m"}}})
    write_run(tmp_path / "unknown", seed=31)
    runs = frame(tmp_path)
    assert runs["code"].to_list() == ["t", None]
    assert runs["run_code"][0].files == {"a.py": "1"}
    assert runs["run_code"][0].own == {"loss.py": "5", "deep_components/metrics.py": "m"}


CODE: dict[str, Any] = {"code": {"total": "t", "files": {"a.py": "1"}, "method": {"loss.py": "5"}}}


@pytest.mark.parametrize(
    ("config", "results"),
    [
        ({"train_days": 10**18}, {}),
        ({"train_days": [1]}, {}),
        ({"device": {"a": 1}}, {}),
        ({"threads": []}, {}),
        ({"commit": [1]}, {}),
        ({"data_checksums": {"2024-01-13": [1]}}, {}),
        ({}, {"test_day_checksum": {"a": 1}}),
        ({}, {"test_random_items": "1"}),
        ({}, {"joint_recall@10@20": 1e308}),
        ({}, {"rank_ndcg@10": -1e308}),
        ({}, {"bound_product": "0.5"}),
        ({}, {"corpus": [1]}),
        ({}, {"corpus": corpus(checksum=1)}),
        ({}, {"corpus": corpus("high")}),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_edited_values_leave_a_run_out(config: dict[str, Any], results: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "sound")
    write_run(tmp_path / "edited", config=config, results=results, seed=31)
    collected = read_runs([tmp_path])
    assert len(collected.runs) == 1
    (reason,) = collected.left_out.values()
    assert "is missing or damaged; evaluate the run again" in reason


def test_runs_behind_links_and_named_twice_count_once(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "down" / "seed30", 0.8)
    write_run(tmp_path / "elsewhere" / "seed31", 0.6, seed=31)
    (tmp_path / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "deep" / "down" / "loop").symlink_to(tmp_path / "deep")
    assert frame(tmp_path / "deep")["seed"].to_list() == [30, 31]
    assert len(frame([tmp_path, tmp_path / "deep", tmp_path / "deep" / "down" / ".."])) == 2


def test_names_that_would_steer_a_terminal(tmp_path: Path) -> None:
    write_run(tmp_path / "run", name="a\x1b[2Jb\nc\u202ed\ud800", results={"data": "x\x1b"})
    assert frame(tmp_path)[["method", "data"]].to_numpy().tolist() == [[r"a\x1b[2Jb\nc\u202ed\ud800", r"x\x1b"]]


def test_names_that_differ_by_what_cannot_be_shown_are_two(tmp_path: Path) -> None:
    for seed, name in ((30, "a\x1b"), (31, "a\x07")):
        write_run(tmp_path / str(seed), seed=seed, name=name)
    assert frame(tmp_path)["method"].nunique() == 2


def test_untrained_runs_of_several_methods_are_one_row_and_last(tmp_path: Path) -> None:
    write_run(tmp_path / "lcron" / "untrained", 0.2, epochs=0, name="lcron")
    write_run(tmp_path / "bce" / "untrained", 0.2, epochs=0, loss_type="bce", arguments={"tau": None, "lr": 0.02})
    write_run(tmp_path / "zzz", 0.6, loss_type="zzz")
    assert rows_of(tmp_path) == {"zzz": 1, "untrained": 1}


def test_the_rows_stand_in_the_order_given_and_have_the_script_s_name(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", name="one"), write_run(tmp_path / "b", name="two", arguments={"tau": 1.0})
    assert list(rows_of(two, one)) == ["two", "one"]


def test_the_name_of_another_training_is_refused(tmp_path: Path) -> None:
    """The folder was trained again by hand, with another loss."""
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"name": "bce", "identity": {"loss_type": "bce"}}))
    with pytest.raises(InputError, match=r"run\.json: is of a run of bce, but the folder was trained with lcron"):
        frame(tmp_path)


@pytest.mark.parametrize("name", [None, "my_script"])
@pytest.mark.parametrize("changed", [{"tau": 20.0}, {"epochs": 5}, {"weighting": "paper"}], ids=str)
def test_variants_are_told_apart(changed: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    (argument, value), *_ = changed.items()
    results = changed if argument == "epochs" else {}
    for seed in (30, 31):
        write_run(tmp_path / "one" / f"seed{seed}", seed=seed, name=name)
        write_run(tmp_path / "two" / f"seed{seed}", seed=seed, name=name, arguments=changed, results=results)
    base = name or "lcron"
    assert rows_of(tmp_path) == {f"{base} ({argument}={ARGUMENTS.get(argument)})": 2, f"{base} ({argument}={value})": 2}


def test_other_training_days_are_another_row(tmp_path: Path) -> None:
    write_run(tmp_path / "one", config={"train_days": ["2024-01-13"]})
    write_run(tmp_path / "two", seed=31, config={"train_days": ["2024-01-13", "2024-01-14"]})
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.parametrize("changed", [{"output_dir": "y"}, {"cuda": 1}, {"resume": True}, {"compile": False}], ids=str)
def test_what_does_not_make_a_method(changed: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.8)
    write_run(tmp_path / "two", 0.6, arguments=changed, seed=31)
    assert rows_of(tmp_path) == {"lcron": 2}


def test_runs_stand_in_order_of_seeds(tmp_path: Path) -> None:
    for index, seed in enumerate((100, 9, 30)):
        write_run(tmp_path / str(index), seed=seed)
    assert label_rows(frame(tmp_path))["seed"].to_list() == [9, 30, 100]


def test_runs_of_many_metrics_are_read_without_a_warning(tmp_path: Path) -> None:
    """Of more than a hundred columns; warnings are errors here."""
    many = {f"rank_recall@10@{cut}": 0.5 for cut in range(200)}
    for seed in (30, 31):
        write_run(tmp_path / str(seed), seed=seed, results=many)
    assert rows_of(tmp_path) == {"lcron": 2}


def test_a_seed_found_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed30", 0.8)
    write_run(tmp_path / "b" / "seed30", 0.8)
    with pytest.raises(InputError, match="the same seed"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("setting", "three_stage"), ("data", "simulated"), ("test_day", "2024-02-03")),
        *(("test_day_checksum", "abc"), ("num_requests", 41), ("test_random_items", 160)),
    ],
)
def test_runs_that_do_not_belong_together(field: str, value: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", results={field: value})
    with pytest.raises(InputError, match=f"the runs differ in {field}") as error:
        rows_of(tmp_path)
    assert str(tmp_path / "one") in str(error.value)
    assert f"{value} in {tmp_path / 'two'}" in str(error.value)


def test_the_one_that_differs_from_many_is_named_first(tmp_path: Path) -> None:
    write_runs(tmp_path / "many", [0.5] * 9)
    odd = write_run(tmp_path / "odd", results={"data": "simulated"})
    with pytest.raises(InputError) as error:
        rows_of(tmp_path)
    assert str(error.value).index(str(odd)) < str(error.value).index("seed30")
    assert "and 6 more" in str(error.value)


def test_runs_with_other_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", results={"joint_recall@5@20": 0.5})
    with pytest.raises(InputError, match="the runs differ in metrics"):
        rows_of(tmp_path)


def test_runs_trained_on_other_data_of_the_same_day(tmp_path: Path) -> None:
    write_run(tmp_path / "one", config={"data_checksums": {"2024-01-13": "a", "2024-01-14": "b"}})
    fewer = write_run(tmp_path / "fewer", seed=31, config={"data_checksums": {"2024-01-13": "a"}})
    write_run(tmp_path / "untrained", epochs=0, config={"data_checksums": {}})
    assert sum(rows_of(tmp_path).values()) == 3
    other = write_run(tmp_path / "two", seed=32, config={"data_checksums": {"2024-01-13": "a", "2024-01-14": "c"}})
    with pytest.raises(InputError, match="training day 2024-01-14") as error:
        rows_of(tmp_path)
    assert f"c in {other}" in str(error.value)
    assert str(fewer) not in str(error.value)


@pytest.mark.parametrize("field", ["cascade", "schema_checksum"])
def test_another_cascade_or_schema_under_one_name(field: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one", config={field: "x"})
    write_run(tmp_path / "two", seed=31, config={field: "x"})
    write_run(tmp_path / "earlier", seed=32)
    assert sum(rows_of(tmp_path).values()) == 3
    write_run(tmp_path / "odd", seed=33, config={field: "y"})
    with pytest.raises(InputError, match=f"the runs differ in {field.removesuffix('_checksum')}"):
        rows_of(tmp_path)


def test_days_of_a_stream_that_are_others(tmp_path: Path) -> None:
    for seed, content in ((30, "a"), (31, "b")):
        days = [{"test_day": "2024-01-14", "test_day_checksum": content, "joint_recall@10@20": 0.5}]
        (write_run(tmp_path / str(seed), seed=seed) / "streaming.json").write_text(json.dumps({"days": days}))
    with pytest.raises(InputError, match="the checksum of day of the stream 2024-01-14"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "field", ["cascade", "schema_checksum", "loss", "init_from_checksums", "code", "data_checksums"]
)
@pytest.mark.parametrize("value", [3, [["a"]], {"2024-01-13": ["a"]}], ids=str)
def test_any_value_is_compared(field: str, value: Any, tmp_path: Path) -> None:
    """A field that holds what it should not is no other than itself, or the run is left out."""
    write_run(tmp_path / "sound")
    for seed in (31, 32):
        write_run(tmp_path / str(seed), seed=seed, config={field: value})
    assert rows_of(tmp_path)["lcron"] in (1, 3)


def test_the_training_days_of_all_methods_are_named_where_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "one", name="bce", config={"train_days": ["2024-01-13"]})
    assert rows_of(tmp_path) == {"bce": 1}
    write_run(tmp_path / "two", name="lcron", config={"train_days": ["2024-01-13", "2024-01-14"]})
    write_run(tmp_path / "untrained", epochs=0, config={"train_days": []})
    assert rows_of(tmp_path) == {
        "bce (train_days=2024-01-13)": 1,
        "lcron (train_days=2024-01-13+2024-01-14)": 1,
        "untrained": 1,
    }


@pytest.mark.parametrize(("field", "what"), [("loss", "values of the loss"), ("init_from_checksums", "--init_from")])
def test_seeds_of_one_row_started_and_lost_alike(field: str, what: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one", config={field: {"x": 1}})
    write_run(tmp_path / "two", seed=31, config={field: {"x": 2}})
    with pytest.raises(InputError, match=what):
        rows_of(tmp_path)


def test_seeds_of_other_code_are_not_averaged(tmp_path: Path) -> None:
    """Of a row; another method's files are others anyway, and an untrained cascade has no method's."""
    write_run(tmp_path / "one", config=CODE)
    write_run(tmp_path / "bce", loss_type="bce", config={"code": CODE["code"] | {"method": {"other_loss.py": "7"}}})
    for seed in (30, 31):
        code = {"code": CODE["code"] | {"method": {"loss.py": str(seed)}}}
        write_run(tmp_path / f"untrained{seed}", seed=seed, epochs=0, config=code)
    write_run(tmp_path / "earlier", seed=32)
    assert rows_of(tmp_path) == {"bce": 1, "lcron": 2, "untrained": 2}
    other = write_run(tmp_path / "other", seed=33, config={"code": CODE["code"] | {"method": {"loss.py": "6"}}})
    with pytest.raises(
        InputError, match=r"lcron: its seeds ran different code: loss\.py, in .*--force.*--any_code"
    ) as e:
        rows_of(tmp_path)
    assert str(other) in str(e.value)
    assert len(comparable_rows(frame(tmp_path), any_code=True)) == 6


def missing(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


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


def declares(descr: str, shape: str, member: str = "joint_recall@10@20") -> Callable[[Path], None]:
    """An array that has no content, but whose header is whatever one wants."""

    def damage(run: Path) -> None:
        header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        with zipfile.ZipFile(run / "per_request.npz") as file:
            kept = {name: file.read(name) for name in file.namelist()}
        kept[f"{member}.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with zipfile.ZipFile(run / "per_request.npz", "w") as file:
            for name, written in kept.items():
                file.writestr(name, written)

    return damage


def encrypted(run: Path) -> None:
    """The flag that says so is set, in the local headers and in the directory."""
    path = run / "per_request.npz"
    data = bytearray(path.read_bytes())
    for begin, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(begin, bytes(data)):
            data[found.start() + flag] |= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "per_request.npz of 10^11 numbers": declares("<f8", "(100000000000,)"),
    "per_request.npz of 10^11 ids": declares("<i8", "(100000000000,)", "request_id"),
    "per_request.npz of 10^26 numbers": declares("<f8", "(99999999999999999999999999,)"),
    "per_request.npz of a deep expression": declares("<f8", "(" + "-" * 9000 + "1,)"),
    "per_request.npz of giant values": declares("|V2147483647", "(300,)"),
    "per_request.npz of giant texts": declares("<U999999999", "(3,)"),
    "per_request.npz encrypted": encrypted,
    "metrics.json empty": content("metrics.json", ""),
    "metrics.json cut": content("metrics.json", '{"setting": "two_'),
    "metrics.json a list": content("metrics.json", "[]"),
    "metrics.json of nothing": content("metrics.json", "{}"),
    "metrics.json nested without end": content("metrics.json", "[" * 100_000),
    "metrics.json missing": missing("metrics.json"),
    "a metric that is text": field("joint_recall@10@20", "0.5"),
    "a metric that is true": field("joint_recall@10@20", True),
    "a metric of 400 digits": field("joint_recall@10@20", 10**400),
    "a seed of 400 digits": field("seed", 10**400),
    "a metric that is NaN": field("joint_recall@10@20", float("nan")),
    "epochs that are text": field("epochs", "1"),
    "config.json missing": missing("config.json"),
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
    assert collected.runs["seed"].to_list() == [30]
    assert list(collected.left_out) == [tmp_path / "seed31"]
    assert str(tmp_path / "seed31") in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize("damage", [content("metrics.json", "{"), content("config.json", ""), cut])
def test_only_damaged_runs(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(add_requests(write_run(tmp_path / "one"), [0.5] * 40))
    with pytest.raises(InputError, match="one"):
        rows_of(tmp_path)


def test_every_named_folder_must_hold_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "seed30")
    with pytest.raises(InputError, match=r"seed31.*evaluate the runs first"):
        read_runs([tmp_path / "seed30", tmp_path / "seed31"])


def test_a_damaged_cost_does_not_remove_the_run(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "training.json").write_text('{"seconds": "x"}')
    runs = frame(tmp_path)
    assert runs["seconds"].isna().all()
    assert "training.json: a number is missing or damaged" in runs["warnings"][0][0]
