"""examples/quickstart.ipynb: its cells run in their order, in an interpreter of their own, and it was saved without
output. examples/popularity.py; the others are run by test_own_log.py."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deep_components.dataset.columnar import write_day
from deep_components.dataset.log import write_log_file
from deep_components.errors import InputError
from deep_components.schema import Field, Schema

PROJECT = Path(__file__).parents[1]
NOTEBOOK = PROJECT / "examples/quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    environment = {"PYTHONPATH": str(PROJECT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "joint_recall@10@20" in done.stdout
    (made,) = tmp_path.glob("lcron-*")
    assert {path.name for path in made.glob("*.png")} == {"recall.png", "loss.png"}


def test_popularity_counts_the_ground_truth_of_the_training_days(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items 1 and 2 are bought on the training day, 1 alone on the test day: stages that keep three and two of four
    items keep it, by chance in two cases of four."""
    schema = Schema((Field("sku", "item", size=5),))
    for day, bought in (("2024-01-01", [0, 0, 1, 1]), ("2024-01-02", [0, 1, 1, 1])):
        with write_day(tmp_path / day, schema, requests=3) as columns:
            columns.write("request_id", np.arange(3))
            columns.write("history.mask", np.ones((3, 0), bool))
            columns.write("item.sku", np.tile([1, 2, 3, 4], (3, 1)))
            columns.write("item.label", np.tile(1 - np.array(bought), (3, 1)))
            columns.write("item.mask", np.ones((3, 4), bool))
            columns.write("item.group", np.tile(bought, (3, 1)))
    write_log_file(tmp_path, "a test")
    stages = "".join(f'[[stages]]\nname = "s{keep}"\nmodel = "dssm"\nkeep = {keep}\n' for keep in (3, 2))
    (tmp_path / "c.toml").write_text(stages + '[[groups]]\nname = "bought"\n[[groups]]\nname = "not"\n')
    arguments = [f"--data_dir={tmp_path}", f"--cascade={tmp_path / 'c.toml'}", "--field=sku"]
    popularity = runpy.run_path(str(PROJECT / "examples/popularity.py"))
    popularity["main"](arguments)
    expected = {"popularity": 1, "chance": 2 / 4}
    assert capsys.readouterr().out == "".join(f"{name:<10}  {value:.4f}\n" for name, value in expected.items())
    with pytest.raises(InputError, match="choose one of sku"):
        popularity["main"]([*arguments[:2], "--field=item"])
