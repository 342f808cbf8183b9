"""float64 gradcheck of the losses that are smooth and have no stop-gradient. The others (lcron, arf_v2, rankflow and
fs_lambdaloss hold a part of their formula constant) are compared with numerical derivatives in test_properties."""

from typing import cast

import pytest
import torch
from torch import Tensor

from deep_components import run_train2, run_train3
from deep_components.batch import Targets
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade


@pytest.mark.parametrize("cascade", [TWO_STAGE, THREE_STAGE], ids=lambda cascade: cascade.name)
@pytest.mark.parametrize("method", ["bce", "fs_ranknet", "arf", "sorting"])
def test_gradcheck(cascade: Cascade, method: str) -> None:
    command = run_train2 if cascade is TWO_STAGE else run_train3
    options = ["--tau=2"] if method in ("arf", "sorting") else []
    loss = command.build_loss(command.parse_args([f"--loss_type={method}", "--data_dir=.", "--output_dir=.", *options]))
    generator = torch.Generator().manual_seed(1)
    num_items, stages = 6, len(cascade.stages)
    targets = Targets(
        labels=torch.tensor([[9, 8, 5, 5, 3, 3], [7, 9, 5, 5, 3, 3]]),
        mask=torch.tensor([[True] * 6, [True, True, True, False, True, True]]),
        group=torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 1, 2]]),
    )
    # Well separated scores: NeuralSort's |s_a - s_b| has a kink where two are equal.
    scores = [torch.randperm(2 * num_items, generator=generator).view(2, num_items).double() for _ in range(stages)]
    for values in scores:
        values.div_(4).requires_grad_()

    def value(*inputs: Tensor) -> Tensor:
        return cast(Tensor, loss.double()(dict(zip(cascade.stage_names, inputs, strict=True)), targets)["loss"])

    assert torch.autograd.gradcheck(value, scores)
