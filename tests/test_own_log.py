"""docs/own_log.md: its commands, run as they stand there in a folder of their own, on smaller tables."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from deep_components.dataset.importers.table import command
from deep_components.dataset.importers.table.mapping import FieldRule, Groups, History, Rows
from deep_components.files import read_json

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs/own_log.md"
MOVIELENS = next((path for path in (PROJECT / "../shared/ml-1m", PROJECT / "ml-1m") if path.is_dir()), None)
SMALLER = {  # what is added to a script's arguments
    "examples/shop/make_rows.py": "--days=4 --requests=150",
    "examples/movielens/make_rows.py": "--first_day=2000-11-18 --last_day=2000-11-20",
    "import": "--jobs=1",
    "experiments": "--no-untrained --seeds=30 --epochs=2 --batch_size=16 --emb_dim=4 --nn_units=32 --device=cpu",
}
USERS_KEPT = 12  # every twelfth


def commands(heading: str) -> list[str]:
    """The bash blocks of a section, in order."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the examples, and with commands lcron and python."""
    (tmp_path / "examples").symlink_to(PROJECT / "examples")
    added = "\n".join(f'  {name}) set -- "$@" {words} ;;' for name, words in SMALLER.items())
    choice = f'case "$1" in\n{added}\nesac\n'
    (tmp_path / "bin").mkdir()
    for name, start in (("python", ""), ("lcron", "-m deep_components")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\n{choice}exec "{sys.executable}" {start} "$@"\n')
        script.chmod(0o755)
    return tmp_path


def bash(folder: Path, script: str) -> str:
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(folder: Path, heading: str) -> str:
    """What all commands of a section print."""
    return "".join(bash(folder, block) for block in commands(heading))


def chance(printed: str) -> float:
    """What examples/popularity.py says of a random order."""
    return float(printed.split("\nchance ")[1].split()[0])


def assert_learns(run: Path) -> None:
    """The loss falls. What a tenth of the data's few steps reach differs too much between processors to be compared."""
    losses = [json.loads(line)["loss"] for line in (run / "train.jsonl").read_text().splitlines()]
    tenth = max(len(losses) // 10, 1)
    assert sum(losses[-tenth:]) < sum(losses[:tenth])


def imported(suggested: Path, before: str, after: str) -> dict[str, int]:
    """Import by the suggested mapping with one edit; the fields that the log has, with their list lengths."""
    text = suggested.read_text()
    assert before in text
    suggested.write_text(text.replace(before, after))
    log = suggested.with_name("suggested_log")
    command.main([f"--mapping={suggested}", f"--output_dir={log}", "--jobs=1"])
    day = min(log.glob("2*"))
    return {field["name"]: field.get("length", 0) for field in read_json(day / "meta.json")["schema"]["fields"]}


def test_the_shop(folder: Path) -> None:
    printed = follow(folder, "A shop")
    assert "field price of side item: " in printed  # the check's report
    assert "joint_recall@4@6" in printed  # the table
    assert (folder / "shop/report.html").stat().st_size > 10_000
    encoding = read_json(folder / "shop/log/encoding/encoding.json")
    assert encoding == read_json(folder / "shop/runs/lcron/seed30/encoding/encoding.json")
    assert 0 < chance(printed) < read_json(folder / "shop/runs/lcron/seed30/metrics.json")["joint_recall@4@6"] + 0.1
    assert_learns(folder / "shop/runs/lcron/seed30")
    made = imported(folder / "shop/suggested.toml", '"ranked", "shown"', '"shown", "ranked"')
    assert {"when_hour", "user", "item", "price", "stock", "stock_missing"} <= set(made)


@pytest.mark.skipif(MOVIELENS is None, reason="needs MovieLens-1M in ../shared/ml-1m, which is not part of the project")
def test_movielens(folder: Path) -> None:
    assert MOVIELENS is not None
    (folder / "ml-1m").mkdir()
    for path in MOVIELENS.glob("*.dat"):
        lines = path.read_text(encoding="latin-1").splitlines(keepends=True)
        if path.name == "ratings.dat":
            lines = [line for line in lines if int(line.split("::")[0]) % USERS_KEPT == 0]
        (folder / "ml-1m" / path.name).write_text("".join(lines), encoding="latin-1")
    printed = follow(folder, "MovieLens")
    assert "joint_recall@10@15" in printed
    assert (
        0 < chance(printed) < read_json(folder / "movielens/runs/lcron/seed30/metrics.json")["joint_recall@10@15"] + 0.1
    )
    assert_learns(folder / "movielens/runs/lcron/seed30")
    suggested = folder / "movielens/suggested.toml"
    assert tomllib.loads(suggested.read_text())["groups"]["order"][:2] == ["liked", "rated"]
    made = imported(suggested, '# time_zone = "Europe/Berlin"', 'time_zone = "America/Chicago"')
    assert made["genres"] == 6


def test_the_page_names_every_key() -> None:
    """The reference is about the keys that there are."""
    reference = PAGE.read_text().split("\n## The reference: log.toml\n")[1]
    listed = set(re.findall(r"^\| `(\w+)`", reference, re.MULTILINE))
    assert {field.name for kind in (Rows, Groups, History, FieldRule) for field in fields(kind)} <= listed
