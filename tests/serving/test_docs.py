"""The code of docs/serving.md, run word for word on the shop's bundle."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from deep_components.commands import COMMANDS, main

PAGE = Path(__file__).parents[2] / "docs/serving.md"


def blocks(heading: str, language: str) -> list[str]:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(shop_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with shop/bundle."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/bundle").symlink_to(shop_bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "serving"}
    for number, block in enumerate(blocks("Python", "python"), 1):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    first, second, best, fell, of_frame = capsys.readouterr().out.splitlines()
    assert first.count("sku-") == second.count("sku-") == 3 and of_frame.count("sku-") == 6
    assert best.startswith("sku-") and "'retrieval': " in best and "'rerank': 1" in best
    assert fell == "Counter({'prerank': 8, None: 6, 'rank': 6, 'rerank': 4})"  # keeps of 24, 16, 10, 6


def test_the_command_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"user": ["user-001", "user-002"], "history": [["sku-00012"], []]}).to_parquet("requests.parquet")
    (block,) = blocks("Python", "bash")
    name, *arguments = block.split()[1:]
    assert block.startswith("lcron ") and name in COMMANDS
    assert main([name, *arguments]) == 0
    assert pd.read_parquet("lists.parquet")["items"].map(len).tolist() == [6, 6]


def test_the_package_loads_the_models_libraries_only_for_a_recommender() -> None:
    seen = "print('torch' in sys.modules)"
    script = f"import sys, deep_components.serving as serving; {seen}; serving.Recommender; {seen}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PAGE.parents[1])
    assert done.stdout.split() == ["False", "True"]
