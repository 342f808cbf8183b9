"""The paper's numbers: the same as in its tables, and beside the runs that are made as the paper's were."""

import csv
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_components import run_train2, run_train3
from deep_components.arguments import recorded_arguments
from deep_components.dataset.importers.recflow_files import PERIOD_1
from deep_components.reporting.frame import read_runs
from deep_components.reporting.paper import TABLES, follows_protocol, paper_name, paper_number
from deep_components.reporting.results import build_results
from tests.reporting.fake_runs import ARGUMENTS, RESULTS, write_run

COMMANDS: dict[str, ModuleType] = {"two_stage": run_train2, "three_stage": run_train3}
PAPER_ARGUMENTS = {
    "lr": 0.01,
    "batch_size": 1024,
    "epochs": 1,
    "emb_dim": 8,
    "nn_units": 128,
    "seq_len": 50,
    "init_from": None,
    "tau": 50.0,
    "topk_op": "neural_sort",
    "terms": "both",
    "single_weight": None,
    "weighting": "original",
    "end_to_end_quotas": None,
    "label_ties": "shared",
    "optimizer": "deferred_adam",
}
PAPER_CONFIG = {"train_days": list(PERIOD_1[:-1])}


def script_arguments(setting: str, method: str) -> list[str]:
    """The hyper-parameters that the method's script states."""
    script = Path(__file__).parents[2] / setting / f"{method}.sh"
    printed = subprocess.run(["bash", str(script), "--print_method"], capture_output=True, text=True, check=True)
    return [line for line in printed.stdout.splitlines() if not line.startswith("--method=")]


def table_rows() -> list[dict[str, str]]:
    with TABLES.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("setting", "method"), sorted({(row["setting"], row["method"]) for row in table_rows()}))
def test_every_script_of_the_paper_finds_its_numbers(setting: str, method: str) -> None:
    """With the arguments that the script gives and the method fills in."""
    arguments = script_arguments(setting, method)
    args = COMMANDS[setting].parse_args([*arguments, "--data_dir=D", "--output_dir=O"])
    recorded = recorded_arguments(args, COMMANDS[setting].build_loss(args))
    expected = [row for row in table_rows() if (row["setting"], row["method"]) == (setting, method)]
    for row in expected:
        found = paper_number(setting, method, recorded, row["metric"])
        assert found is not None
    first = expected[0]
    found = paper_number(setting, method, recorded, first["metric"])
    assert found is not None and (found.mean, found.table) == (float(first["mean"]), first["table"])


def test_other_learning_rates_have_tables_of_their_own() -> None:
    other = PAPER_ARGUMENTS | {"lr": 0.001, "batch_size": 512}
    plain = paper_number("two_stage", "lcron", PAPER_ARGUMENTS, "joint_recall@10@20")
    found = paper_number("two_stage", "lcron", other, "joint_recall@10@20")
    assert plain is not None and found is not None
    assert (plain.mean, plain.std, plain.table) == (0.8732, 0.0005, "2")
    assert found.table == "9" and found.mean != plain.mean


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.05},
        {"batch_size": 64},
        {"tau": 20.0},
        {"single_weight": 1.0},
        {"end_to_end_quotas": [30, 20]},
        {"single_quotas": [30, 20]},
    ],
    ids=str,
)
def test_a_name_alone_is_not_the_paper_s_method(changed: dict[str, Any]) -> None:
    assert paper_number("two_stage", "lcron", PAPER_ARGUMENTS | changed, "joint_recall@10@20") is None


@pytest.mark.parametrize(
    ("results", "config", "arguments"),
    [
        ({"data": "simulated"}, {}, {}),
        ({"test_day": "2024-02-03"}, {}, {}),
        ({}, {"train_days": list(PERIOD_1[:-2])}, {}),
        ({}, {}, {"epochs": 2}),
        ({}, {}, {"emb_dim": 16}),
        ({}, {}, {"init_from": "elsewhere"}),
        ({}, {}, {"num_random_items": 160}),
        ({"test_random_items": 160}, {}, {}),
        ({}, {}, {"optimizer": "sparse_adam"}),
    ],
    ids=str,
)
def test_another_protocol_is_not_compared(
    results: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    usual = RESULTS | PAPER_CONFIG
    assert follows_protocol(usual, PAPER_ARGUMENTS)
    assert not follows_protocol(usual | results | config, PAPER_ARGUMENTS | arguments)
    assert not follows_protocol(usual, ARGUMENTS)


@pytest.mark.parametrize(("data", "shown"), [("recflow", True), ("movielens", False)])
def test_our_difference_stands_beside(data: str, shown: bool, tmp_path: Path) -> None:
    for seed, recall in ((30, 0.87), (31, 0.89)):
        made_like: dict[str, Any] = {"arguments": PAPER_ARGUMENTS, "config": PAPER_CONFIG}
        write_run(tmp_path / str(seed), recall, seed=seed, results={"data": data}, **made_like)
    cell = build_results(read_runs([tmp_path])).of("joint_recall@10@20").loc["lcron"]
    assert cell["difference_to_paper"] == pytest.approx(0.88 - 0.8732 if shown else float("nan"), nan_ok=True)


def test_names_as_in_the_paper() -> None:
    names = {"lcron": "LCRON", "arf_v2": "ARF-v2", "fs_ranknet": "FS-RankNet", "untrained": "untrained"}
    names |= {
        "lcron_tau_1": "LCRON tau 1",
        "arf (lr=0.1)": "ARF (lr=0.1)",
        "lcronic": "lcronic",
        "my_lcron": "my_lcron",
    }
    assert {name: paper_name(name) for name in names} == names
