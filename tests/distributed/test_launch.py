"""Where a training is started is no part of the run; several processes that nothing starts are refused."""

import sys
from pathlib import Path

import pytest

from deep_components.errors import InputError
from deep_components.training.signals import ask_to_stop, stop_signals
from tests.helpers import train


@pytest.mark.parametrize("word", ["--engine=slurm", "--processes=0", "--max_restarts=-1", "--timeout=0"])
def test_mistakes(word: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train(log, tmp_path / "run", word)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word.partition("=")[0] in said
    assert list(tmp_path.iterdir()) == []


def test_without_ray_a_sentence(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"lacks ray; run: .* -m pip install -r requirements-ray.txt"):
        train(log, tmp_path / "run", "--engine=ray", "--processes=2")
    assert list(tmp_path.iterdir()) == []


def test_a_stop_that_is_asked_for() -> None:
    with stop_signals() as outer, stop_signals() as inner:
        ask_to_stop(15)
    assert (outer, inner) == ([15], [15])
    ask_to_stop(2)
    assert outer == [15]
