"""What docs/determinism.md promises: the same seed gives the same bytes on a CPU, and of what they do not depend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.soak import results
from deep_components.cascade import TWO_STAGE
from deep_components.dataset.log import open_log
from deep_components.loss.lcron import LCRON
from deep_components.models import build_models
from deep_components.tables.store import build_stores
from deep_components.training.step import Trainer
from tests.helpers import DAYS, train

pytestmark = pytest.mark.usefixtures("short_rules")
VARIANTS = {"compiled": (), "pytorch": ("--no-compile",), "deferred": ("--compact_from=1", "--pull_from=1")}


class Course:
    """Trainings of one variant, all with one seed."""

    def __init__(self, log: Path, folder: Path, flags: tuple[str, ...]) -> None:
        self.log, self.folder, self.flags, self.made = log, folder, flags, 0
        self.expected = self.train()

    def train(self, *flags: str, threads: int = 1) -> dict[str, Any]:
        self.made += 1
        return self.again(*flags, threads=threads)

    def again(self, *flags: str, threads: int = 1) -> dict[str, Any]:
        torch.set_num_threads(threads)
        try:
            return results(train(self.log, self.run, *self.flags, *flags))
        finally:
            torch.set_num_threads(1)

    @property
    def run(self) -> Path:
        return self.folder / str(self.made)


@pytest.fixture(params=VARIANTS)
def course(request: pytest.FixtureRequest, log: Path, tmp_path: Path) -> Iterator[Course]:
    yield Course(log, tmp_path, VARIANTS[request.param])


def test_the_bytes_depend_on_the_seed_alone(course: Course, tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002 (the process's global generators must not matter)
    assert course.train() == course.expected
    assert course.train(f"--cache_dir={tmp_path / 'cold'}") == course.expected
    assert course.train("--day_on_device") == course.expected
    assert course.train("--print_freq=1", "--save_minutes=1e-9") == course.expected
    other = course.train("--seed=31")
    assert all(other[name] != course.expected[name] for name in other if name.endswith(".safetensors"))


def test_stopping_and_resuming_does_not_matter(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    step, made = Trainer.step, 0

    def stops(self: Trainer, batch: Any) -> Any:
        nonlocal made
        made += 1
        if made in (2, 4):  # in a day, and at the beginning of the rest of it
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        course.train("--save_minutes=1e-9")
    with pytest.raises(KeyboardInterrupt):
        course.again("--resume", "--save_minutes=0", "--day_on_device")
    assert course.again("--resume") == course.expected


def test_one_number_of_threads_gives_one_result(course: Course) -> None:
    assert course.train(threads=2) == course.train(threads=2)


def test_another_number_of_threads_gives_the_same_gradients(log: Path) -> None:
    """Of one step, to rounding. Over several steps Adam can make a whole step of lr out of a rounding error."""
    several, single = gradients(log, threads=2), gradients(log, threads=1)
    assert several.keys() == single.keys() and len(single) > 10
    norm = torch.stack([gradient.norm() for gradient in single.values()]).norm()
    for name, expected in single.items():  # one of them alone may be nothing but rounding, as that of a last bias
        assert (several[name] - expected).norm() <= 1e-5 * norm, name


def gradients(log: Path, threads: int) -> dict[str, torch.Tensor]:
    """Of the first step's loss, for every parameter and table."""
    day = open_log(log).open_day(DAYS[0], TWO_STAGE)
    torch.set_num_threads(threads)
    try:
        models = build_models(TWO_STAGE, day.schema, 8, 64, seed=30)
        stores = build_stores(TWO_STAGE, day.schema, 8, seed=30)
        trainer = Trainer(models, stores, LCRON(TWO_STAGE.stage_names, TWO_STAGE.num_relevant), lr=1e-30)
        trainer.step(trainer.prepare(day.batch(np.arange(len(day)))))
        return {name: p.grad.double() for name, p in trainer.parameters.items() if p.grad is not None}
    finally:
        torch.set_num_threads(1)


def test_resuming_elsewhere_is_said(log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    course = Course(log, tmp_path, (f"--train_days={DAYS[0]}",))
    assert "the last digits will differ" not in caplog.text
    course.again("--resume")
    assert "the last digits will differ" not in caplog.text
    course.again("--resume", threads=2)
    assert "was trained with threads=1, not 2: the last digits will differ" in caplog.text


def test_resuming_with_other_kernels_says_so(log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on a machine without a compiler: it goes on, but not to the same bytes."""
    run = train(log, tmp_path / "run", f"--train_days={DAYS[0]}", "--compile")
    train(log, run, "--train_days=" + ",".join(DAYS[:2]), "--no-compile", "--resume")
    assert "was trained with kernels=compiled, not pytorch: the last digits will differ" in caplog.text
