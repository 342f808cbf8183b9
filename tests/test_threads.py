"""How threads wait: set before PyTorch is loaded, in commands and in what the runner starts; never against the user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deep_components import ray_cluster
from deep_components.threads import SPINS, short_waits

PROJECT = Path(__file__).parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "7")])
def test_the_user_s_choice_is_kept(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert short_waits() == {"GOMP_SPINCOUNT": str(SPINS)}
    assert ray_cluster.environment()["GOMP_SPINCOUNT"] == str(SPINS)
    monkeypatch.setenv(name, value)
    assert short_waits() == {}
    assert "GOMP_SPINCOUNT" not in ray_cluster.environment()  # it inherits what is there


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "7"}])
def test_the_openmp_library_of_a_command_has_it(said: dict[str, str]) -> None:
    """As OMP_DISPLAY_ENV has the library itself say when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | said
    done = subprocess.run(
        [sys.executable, "-m", "deep_components", "doctor"], cwd=PROJECT, capture_output=True, text=True, check=False,
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("PyTorch does not use the GNU OpenMP library here")
    assert f"GOMP_SPINCOUNT = '{said.get('GOMP_SPINCOUNT', SPINS)}'" in done.stderr
