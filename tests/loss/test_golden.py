"""The losses against the paper authors' code: values, gradients, gradients of the weights (tests/golden)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deep_components.batch import Targets
from tests.loss.methods import STAGES, Batch, Method, set_weights, step

LOSS_TOLERANCE = 1e-5  # of the sum of the parts
GRADIENT_TOLERANCE = 1e-4  # of the norm
GRADIENT_FLOOR = 1e-9  # where the original's gradient is exactly 0; the gradients of other cases are 1e-3 and more

CASES = ("recflow", "small", "large", "zeros")
TIED = ("icc", "rankflow", "fs_lambdaloss")  # the golden file leaves these out of zeros: nothing orders equal scores
METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron")
NAMES = {
    "two_stage": (*METHODS, "lcron_soft_sort"),
    "three_stage": METHODS,
}
EVERY = [
    (setting, name, case)
    for setting, names in NAMES.items()
    for name in names
    for case in CASES
    if not (case == "zeros" and name in TIED)
]
everywhere = pytest.mark.parametrize(("setting", "name", "case"), EVERY)


class Golden:
    """What the golden file of a setting holds for one method and case."""

    def __init__(self, folder: Path, setting: str, name: str, case: str) -> None:
        self.setting, self.name = setting, name
        self._file: dict[str, NDArray[np.float32]] = load(folder / f"losses_{setting}.npz")
        self._case = case

    def named(self, kind: str) -> dict[str, NDArray[np.float32]]:
        """Stage (or part of the loss) -> array."""
        prefix = f"{self._case}/{self.name}/{kind}/"
        return {key.removeprefix(prefix): value for key, value in self._file.items() if key.startswith(prefix)}

    @property
    def loss(self) -> float:
        """The sum of the method's parts."""
        return sum(float(part) for part in self.named("loss").values())

    @property
    def batch(self) -> Batch:
        labels = torch.from_numpy(self._file[f"{self._case}/labels"])
        mask = torch.from_numpy(self._file[f"{self._case}/mask"]).bool()
        scores = {s: torch.from_numpy(self._file[f"{self._case}/logits/{s}"]) for s in STAGES[self.setting]}
        return Batch(scores, Targets(labels, mask, (torch.arange(labels.shape[-1]) // 10).expand_as(labels)))

    @property
    def weights(self) -> dict[str, float]:
        return {stage: float(value) for stage, value in self.named("weight").items()}

    @property
    def method(self) -> Method:
        flags = "--loss_type=lcron --sort=soft_sort" if self.name == "lcron_soft_sort" else f"--loss_type={self.name}"
        return Method(self.setting, flags)

    def build(self) -> nn.Module:
        return set_weights(self.method.build(), self.weights)


loaded: dict[Path, dict[str, NDArray[np.float32]]] = {}


def load(path: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays of a golden file, read once."""
    if path not in loaded:
        with np.load(path) as file:
            loaded[path] = dict(file)
    return loaded[path]


def distance(ours: Tensor, theirs: NDArray[np.float32]) -> float:
    """Norm of the difference, as a share of the original's norm; small beyond compare where both are 0."""
    allowed = max(float(np.linalg.norm(theirs)), GRADIENT_FLOOR / GRADIENT_TOLERANCE)
    return float(np.linalg.norm(ours.numpy().reshape(-1) - theirs.reshape(-1))) / allowed


def test_all_of_the_file_is_compared(golden: Path) -> None:
    for setting, names in NAMES.items():
        inputs = {"labels", "mask", "logits"}
        there = {tuple(key.split("/")[:2]) for key in load(golden / f"losses_{setting}.npz")}
        there = {(case, name) for case, name in there if name not in inputs}
        assert there == {(case, name) for of, name, case in EVERY if of == setting}
        assert {name for _, name in there} == set(names)


@everywhere
def test_loss(golden: Path, setting: str, name: str, case: str) -> None:
    original = Golden(golden, setting, name, case)
    loss = step(original.build(), original.batch).loss
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(original.loss, rel=LOSS_TOLERANCE)


@everywhere
def test_gradients(golden: Path, setting: str, name: str, case: str) -> None:
    original = Golden(golden, setting, name, case)
    grads = step(original.build(), original.batch).grads
    theirs = original.named("grad")
    assert grads.keys() == theirs.keys()
    assert {stage: distance(grads[stage], theirs[stage]) for stage in grads} == pytest.approx(
        dict.fromkeys(grads, 0.0), abs=GRADIENT_TOLERANCE
    )


@everywhere
def test_gradients_of_the_weights(golden: Path, setting: str, name: str, case: str) -> None:
    original = Golden(golden, setting, name, case)
    grads = step(original.build(), original.batch).weight_grads
    theirs = original.named("weight_grad")
    assert grads.keys() == theirs.keys()
    for stage, grad in grads.items():
        assert distance(grad, theirs[stage]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("setting", "name", "case"), [every for every in EVERY if every[1] in ("bce", "fs_ranknet", "arf", "arf_v2")]
)
def test_each_stage_of_a_stagewise_loss(golden: Path, setting: str, name: str, case: str) -> None:
    original = Golden(golden, setting, name, case)
    terms = step(original.build(), original.batch).terms
    for stage, part in original.named("loss").items():
        if name.startswith("arf"):
            weight = torch.tensor(original.weights[stage])
            ours = weight.log() + terms[f"order.{stage}"] / (2 * weight**2) + terms[f"top.{stage}"]
        else:
            ours = terms[stage]
        assert float(ours) == pytest.approx(float(part), rel=LOSS_TOLERANCE)


@everywhere
def test_the_reference_agrees_too(golden: Path, setting: str, name: str, case: str) -> None:
    original = Golden(golden, setting, name, case)
    ours = original.method.reference(original.batch, original.weights)["loss"]
    assert ours == pytest.approx(original.loss, rel=LOSS_TOLERANCE)
