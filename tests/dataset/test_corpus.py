"""The corpus of damaged logs: each is refused in one sentence, or read by a rule and counted."""

import shutil
from pathlib import Path

import pytest

from deep_components import run_train2
from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.dataset.days import training_days
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log
from tests.dataset.corpus import Damaged, Repaired, damaged, repaired
from tests.dataset.importers.test_recflow import compare
from tests.dataset.synthetic import DAY, random_log, write_log
from tests.helpers import leftovers

DAMAGED, REPAIRED = list(damaged()), list(repaired())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_log(tmp_path_factory.mktemp("corpus") / "log", random_log(4))
    recflow.write_origin(root, {"data": "corpus"})
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "log", copy_function=shutil.copyfile))


def train(root: Path, *flags: str) -> int:
    """The real command, as far as a log takes it."""
    sizes = ("--loss_type=bce", "--emb_dim=1", "--nn_units=4", "--batch_size=4", "--device=cpu")
    arguments = [f"--data_dir={root}", f"--output_dir={root.parent / 'run'}", f"--train_days={DAY}", *sizes, *flags]
    return run_command(run_train2.main, arguments)


def prepare(root: Path) -> int:
    """What the command does with a log, without building models, which would take most of the time."""

    def command(argv: list[str]) -> None:
        log = open_log(root)
        for day in training_days(log, [DAY]):
            log.open_day(day, TWO_STAGE)

    return run_command(command, [])


def test_the_corpus() -> None:
    names = [case.name for case in DAMAGED] + [case.name for case in REPAIRED]
    assert len(set(names)) == len(names)
    assert len(DAMAGED) >= 300


def test_the_sound_log_trains(root: Path) -> None:
    assert train(root) == 0
    assert not any(open_log(root).open_day(DAY, TWO_STAGE).repairs.values())


@pytest.mark.parametrize("case", DAMAGED, ids=[case.name for case in DAMAGED])
def test_refused_in_one_sentence(root: Path, capsys: pytest.CaptureFixture[str], case: Damaged) -> None:
    case.spoil(root)
    whole_command = case.flags or DAMAGED.index(case) % 12 == 0
    assert (train(root, *case.flags) if whole_command else prepare(root)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 1000
    for text in case.texts:
        assert text in message, message
    assert not (root / "canary").exists()
    assert leftovers(root) == [] and not list((root.parent / "run").glob("*.safetensors"))


@pytest.mark.parametrize("case", REPAIRED, ids=[case.name for case in REPAIRED])
def test_repaired_by_a_rule(root: Path, case: Repaired) -> None:
    """The reference follows the rules one item at a time, on the spoiled files."""
    case.spoil(root)
    compare(root, TWO_STAGE)
    counted = {text: count for text, count in open_log(root).open_day(DAY, TWO_STAGE).repairs.items() if count}
    found = {name: counted.pop(text) for name in case.repairs for text in list(counted) if text.startswith(name)}
    assert found == case.repairs and not counted
