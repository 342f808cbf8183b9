"""What the tests of the losses share: a loss of any setting, batches, one step with its gradients."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from deep_components import run_train2, run_train3
from deep_components.arguments import METHOD_OPTIONS
from deep_components.batch import Targets
from deep_components.cascade import THREE_STAGE, TWO_STAGE
from tests.loss import reference

# A longer cascade, of the three-stage command: a loss takes any number of stages.
RANK = THREE_STAGE.stages[-1]
LAST = (replace(RANK, exposed_groups=3), replace(RANK, name="rerank", keep=15))
FOUR_STAGE = replace(THREE_STAGE, stages=(*THREE_STAGE.stages[:2], *LAST), name="four_stage")
CASCADES = {cascade.name: cascade for cascade in (TWO_STAGE, THREE_STAGE, FOUR_STAGE)}
COMMANDS = {"two_stage": run_train2, "three_stage": run_train3, "four_stage": run_train3}
NUM_GROUPS = {name: len(cascade.groups) for name, cascade in CASCADES.items()}
STAGES = reference.STAGES
WEIGHTS = {"end_to_end": 1.1, "retrieval": 0.9, "prerank": 1.05, "rank": 1.3, "rerank": 0.8}


@dataclass(frozen=True)
class Method:
    """A loss of one setting, as the command line names it."""

    setting: str
    flags: str

    def __str__(self) -> str:
        return f"{self.setting} {self.flags.replace('--', '').removeprefix('loss_type=')}"

    @property
    def name(self) -> str:
        return self.flags.split()[0].removeprefix("--loss_type=")

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES[self.setting]

    @property
    def options(self) -> dict[str, Any]:
        """The options given in the flags."""
        args = vars(parse(self.setting, *self.flags.split()))
        return {name: args[name] for name in METHOD_OPTIONS if args[name] is not None}

    def build(self) -> nn.Module:
        """The loss as training builds it, its weights at 1."""
        return build(self.setting, *self.flags.split())

    def build_weighted(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The loss in ``dtype`` with every weight away from 1, each its own."""
        loss = self.build().to(dtype)
        return set_weights(loss, {name: WEIGHTS[name] for name in weights_of(loss)})

    def reference(self, batch: "Batch", weights: dict[str, float], still: "Batch | None" = None) -> dict[str, float]:
        """The terms by the slow formulas; ``still`` has the scores behind the stop-gradients."""
        requests = batch.requests(still or batch)
        return reference.METHODS[self.name](requests, self.setting, weights, **self.options)


def build(setting: str, *flags: str) -> nn.Module:
    """The loss as training builds it from these arguments."""
    with mock.patch.object(COMMANDS[setting], "CASCADE", CASCADES[setting]):
        return COMMANDS[setting].build_loss(parse(setting, *flags))


@cache
def parse(setting: str, *flags: str) -> argparse.Namespace:
    """The arguments of a training run. Not to be changed: parsed once, as the parser takes longer than a loss."""
    return COMMANDS[setting].parse_args([*flags, "--data_dir=D", "--output_dir=O"])


def set_weights(loss: nn.Module, weights: dict[str, float]) -> nn.Module:
    """Give the parameters ``weight.<stage>`` the values of ``weights``, which must name all of them."""
    parameters = dict(loss.named_parameters())
    assert parameters.keys() == {f"weight.{name}" for name in weights}
    with torch.no_grad():
        for name, value in weights.items():
            parameters[f"weight.{name}"].fill_(value)
    return loss


def weights_of(loss: nn.Module) -> dict[str, float]:
    """Stage -> its weight."""
    return {name.removeprefix("weight."): parameter.item() for name, parameter in loss.named_parameters()}


@dataclass(frozen=True)
class Batch:
    """Scores [B, N] by stage, and targets."""

    scores: dict[str, Tensor]
    targets: Targets

    def replace(self, scores: dict[str, Tensor] | None = None, **targets: Tensor) -> "Batch":
        return Batch(self.scores if scores is None else scores, Targets(**(vars(self.targets) | targets)))

    def take(self, requests: Tensor | slice = slice(None), items: Tensor | slice = slice(None)) -> "Batch":
        """Some requests and items only, in the order given."""

        def of(tensor: Tensor) -> Tensor:
            return tensor[requests][:, items]

        targets = Targets(**{name: of(tensor) for name, tensor in vars(self.targets).items()})
        return Batch({stage: of(scores) for stage, scores in self.scores.items()}, targets)

    def requests(self, still: "Batch") -> list[reference.Request]:
        """The requests that have items, each with its present items only."""
        chosen = []
        for row, mask in enumerate(self.targets.mask):
            if mask.any():
                chosen.append(
                    reference.Request(
                        scores={stage: scores[row, mask].tolist() for stage, scores in self.scores.items()},
                        still={stage: scores[row, mask].tolist() for stage, scores in still.scores.items()},
                        labels=self.targets.labels[row, mask].tolist(),
                        group=self.targets.group[row, mask].tolist(),
                    )
                )
        return chosen


def make_batch(
    setting: str,
    seed: int = 0,
    num_requests: int = 2,
    num_items: int = 12,
    present: float = 1.0,
    scale: float = 1.0,
    ties: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """A random batch: each item there with probability ``present``, each request with groups of its own sizes, labels
    from 0 to 29.

    ``ties``: scores and labels with many ties; else both are distinct within a request.
    """
    rng = np.random.default_rng(seed)
    shape = (num_requests, num_items)
    group = np.sort(rng.integers(NUM_GROUPS[setting], size=shape))
    labels = np.argsort(rng.random(shape)) if not ties else rng.integers(min(num_items, 30), size=shape)
    scores = {stage: rng.normal(scale=scale, size=shape) for stage in STAGES[setting]}
    if ties:
        scores = {stage: np.round(values / scale * 2) / 2 * scale for stage, values in scores.items()}
    targets = Targets(
        labels=torch.from_numpy(labels),
        mask=torch.from_numpy(rng.random(shape) < present),
        group=torch.from_numpy(group),
    )
    return Batch({stage: torch.from_numpy(values).to(dtype) for stage, values in scores.items()}, targets)


def serving_batch(setting: str, seed: int = 0, num_requests: int = 2, dtype: torch.dtype = torch.float64) -> Batch:
    """A batch of complete requests as RecFlow has them: groups of ten, the labels of the specification's section 2."""
    batch = make_batch(setting, seed, num_requests, 10 * NUM_GROUPS[setting], dtype=dtype)
    group = torch.arange(NUM_GROUPS[setting]).repeat_interleave(10)
    group, first_dropped = group.expand(num_requests, -1), 30 - 23 if setting == "two_stage" else 30 - 22
    labels = first_dropped + 1 - group
    labels[:, :10] = 29 - torch.from_numpy(np.random.default_rng(seed).random((num_requests, 20)).argsort()[:, :10])
    return batch.replace(labels=labels, group=group)


@dataclass(frozen=True)
class Step:
    """What a loss gives for a batch: its terms, and the gradients of "loss"."""

    terms: dict[str, Tensor]
    grads: dict[str, Tensor]  # by stage, [B, N]
    weight_grads: dict[str, Tensor]  # by stage

    @property
    def loss(self) -> Tensor:
        return self.terms["loss"].detach()


def step(loss: nn.Module, batch: Batch) -> Step:
    """One forward and one backward pass on copies of the scores; every score and weight must get a gradient."""
    leaves = {stage: scores.clone().requires_grad_() for stage, scores in batch.scores.items()}
    loss.zero_grad()
    terms = loss(leaves, batch.targets)
    terms["loss"].backward()
    parameters = {name.removeprefix("weight."): parameter for name, parameter in loss.named_parameters()}
    return Step(terms, _gradients(leaves), _gradients(parameters))


def _gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    grads = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        grads[name] = leaf.grad.clone()
    return grads
