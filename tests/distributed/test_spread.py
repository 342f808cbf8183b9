"""What two processes do together beside steps equals what one does: validations, evaluations, days, --init_from.

The processes are started once, by a fixture, and go through all scenarios (spreading.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_components import run_test, run_train
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.importers.table import command as importing
from deep_components.dataset.log import open_log
from deep_components.evaluation import day as evaluation
from deep_components.schema import Field, Schema
from deep_components.training import validation
from tests.distributed.spreading import BATCH, EVALUATIONS, SHOP, STARTED
from tests.helpers import DAYS, REQUESTS_PER_DAY, contents, evaluate, logged_steps, parameters, train
from tests.test_own_cascade import arguments, write_log

pytestmark = pytest.mark.usefixtures("short_rules")

VALIDATED = "2026-03-02"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its validation day has products that the training day has not."""
    return write_log(tmp_path_factory.mktemp("shop"), lambda day, ids: ids % (5 if day == "2026-03-01" else 10))


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory, short_rules: None) -> Path:
    return train(log, tmp_path_factory.mktemp("trained"), "--compact_from=1", "--train_days=2024-01-13")


@pytest.fixture(scope="module")
def together(log: Path, shop: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done everything."""
    folder = tmp_path_factory.mktemp("together")
    for name in (*EVALUATIONS, "refused"):
        shutil.copytree(trained, folder / name)
    root, environment = Path(__file__).parents[2], os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.spreading", *map(str, (folder, log, shop, trained))]
    running = [
        subprocess.Popen(command, cwd=root, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0], ended[0][0] + ended[1][0]
    return folder


@pytest.fixture(scope="module")
def seen(together: Path) -> list[dict[str, Any]]:
    """What each process noted."""
    return [json.loads((together / f"{rank}.json").read_text()) for rank in range(2)]


# ---- days ------------------------------------------------------------------------------------------------------------


def test_days_are_built_and_verified_once(seen: list[dict[str, Any]]) -> None:
    first, second = (process["days"] for process in seen)
    assert first["opened"] == second["opened"] == [*DAYS]
    assert first["requests"] == second["requests"] == [REQUESTS_PER_DAY] * len(DAYS)
    assert sorted(first["built"] + second["built"]) == [*DAYS] and first["built"] and second["built"]
    verified = {day: [process["days"]["verified"].get(day, 0) for process in seen] for day in DAYS}
    assert verified == {day: [1 - number % 2, number % 2] for number, day in enumerate(DAYS)}


def test_all_refuse_a_day_that_one_cannot_open(seen: list[dict[str, Any]]) -> None:
    assert [process["refusal"] for process in seen] == [f"{DAYS[1]} is damaged here"] * 2


def test_nobody_waits_in_a_collective_for_a_long_build(seen: list[dict[str, Any]]) -> None:
    """The first was at work until the second, which had done its part, came to meet it for the fourth time."""
    assert [process["meetings"] for process in seen] == [0, 0]


def day_of(ragged: bool) -> DayCache:
    """A day of four requests of the cities 9 to 12, with two items each, of the products 1 to 8."""
    shape = (-1,) if ragged else (4, 2)
    columns = {"request_id": np.arange(4), "request.city": np.arange(9, 13), "item.product": np.arange(1, 9)}
    columns["item.product"] = columns["item.product"].reshape(shape)
    columns |= {"item.offset": np.arange(0, 10, 2)} if ragged else {}
    schema = Schema((Field("city", "request", size=20), Field("product", "item", size=20)))
    return DayCache("2024-01-13", columns, schema, np.zeros(2, np.int64), 0)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_ids_of_some_requests(ragged: bool) -> None:
    day = day_of(ragged)
    assert day.ids("product", slice(1, 3)).ids().tolist() == [0, 3, 4, 5, 6]
    assert day.ids("city", slice(1, 3)).ids().tolist() == [0, 10, 11]
    assert day.ids("product", slice(2, 2)).ids().tolist() == [0]
    assert day.ids("product", slice(0, 4)) == day.ids("product")


# ---- validation ------------------------------------------------------------------------------------------------------


def test_a_validation_by_two_is_that_by_one(
    shop: Path, together: Path, seen: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table in shards, with a row for unknown products, and of others; all processes find the same."""
    monkeypatch.setattr(validation, "BATCH_SIZE", BATCH)
    cascade = f"--cascade={shop / 'shop.toml'}"
    run_train.main(arguments(shop, tmp_path / "alone", *SHOP, cascade))
    alone, ours = logged_steps(tmp_path / "alone"), logged_steps(together / "shop")
    assert len(ours) == len(alone) == 4
    for one, other in zip(alone, ours, strict=True):
        assert one.keys() == other.keys() and any(name.startswith("validation.joint") for name in one)
        for name, value in one.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name
    assert seen[0]["measured"] == seen[1]["measured"] and len(seen[0]["measured"]) == 4
    recall, metrics = seen[0]["measured"][-1]
    assert {f"validation.{name}": value for name, value in metrics.items()}.items() <= ours[-1].items()
    assert recall == metrics["joint_recall@2@3"]


def test_it_is_what_testing_the_models_finds(shop: Path, together: Path, seen: list[dict[str, Any]]) -> None:
    """To the bit: by one process, from the final files."""
    run = together / "shop"
    run_test.main(arguments(shop, run, f"--test_day={VALIDATED}", f"--batch_size={BATCH}"))
    tested = json.loads((run / "metrics.json").read_text())
    metrics = seen[1]["measured"][-1][1]
    assert metrics == {name: tested[name] for name in metrics}


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_by_two_is_that_by_one(
    name: str, log: Path, trained: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "COMPACT_FROM", 1)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    evaluate(log, run, f"--batch_size={BATCH}", "--save_scores", *EVALUATIONS[name])
    files = ("metrics.json", "per_request.npz", "scores.npz")
    assert contents(together / name, *files) == contents(run, *files)


def test_each_loads_the_rows_of_its_requests(log: Path, together: Path, seen: list[dict[str, Any]]) -> None:
    whole = len(open_log(log).open_day(DAYS[-1], TWO_STAGE, together / "cache").ids("video"))
    parts = [process["rows"]["plain"]["video"] for process in seen]
    assert max(parts) < whole < sum(parts)
    assert [process["rows"]["random items"]["video"] for process in seen] == [whole, whole]


def test_all_refuse_scores_that_one_finds(together: Path, seen: list[dict[str, Any]]) -> None:
    assert [process["scores"].partition(";")[0] for process in seen] == [
        "rank.safetensors gives scores that are not finite"
    ] * 2
    assert not (together / "refused/metrics.json").exists()


def test_rows_are_gathered_in_order(seen: list[dict[str, Any]]) -> None:
    one = {"mask": [[True, False]], "id": [7], "score": [[0.5, -0.0]]}
    both = {
        "mask": [[True, False], [True, False], [True, False]],
        "id": [7, 8, 9],
        "score": [[0.5, -0.0], [float(np.float32(1e-40)), 0.0], [3.0, 0.0]],
    }
    assert seen[0]["gathered"] == {"one": one, "both": both, "first": both, "none": {}}
    assert seen[1]["gathered"] == {"one": one, "both": both, "first": {}, "none": {}}


# ---- the start -------------------------------------------------------------------------------------------------------


def test_models_to_start_from_are_read_into_shards(log: Path, trained: Path, together: Path, tmp_path: Path) -> None:
    """Among them rows of ids that the models have not, which the training's days name."""
    train(log, tmp_path, "--epochs=0", f"--init_from={trained}", *STARTED)
    alone, ours = parameters(tmp_path), parameters(together / "started")
    assert alone.keys() == ours.keys()
    assert all(np.array_equal(alone[name], ours[name]) for name in alone)


# ---- what is not shared out ------------------------------------------------------------------------------------------


def test_an_import_is_not_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(importing.main, ["--mapping=log.toml", f"--output_dir={tmp_path / 'log'}"]) == 2
    assert "start one, with --jobs on one machine, --engine=ray on several" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
