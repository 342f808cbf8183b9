"""Losses whose matrices N x N are made a few requests at a time: the same numbers, and none of the matrices kept."""

import pytest
import torch
from torch import Tensor

from deep_components.loss import functional
from deep_components.loss.functional import in_blocks
from tests.loss.methods import Batch, Method, make_batch, serving_batch, step

WITH_MATRICES = (
    *("icc", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "arf_v2 --topk_op=soft_sort --tau=5"),
    *("arf_v2 --topk_op=lml --tau=2", "lcron", "lcron --topk_op=soft_sort --tau=1", "lcron --end_to_end_quotas=6,4,2"),
    *("sorting", "sorting --topk_op=soft_sort --tau=1"),
)
WITHOUT = ("bce", "rankflow", *(f"lcron --topk_op={name}" for name in ("dftopk", "lapsum", "lml", "sparse_topk")))


def expanded(batch: Batch) -> Batch:
    """With one row of groups for all requests, as the paper's settings have it."""
    return batch.replace(group=batch.targets.group[:1].expand_as(batch.targets.group))


def batches() -> list[Batch]:
    ragged = make_batch("three_stage", seed=1, num_requests=7, num_items=23, present=0.7, ties=True)
    missing = ragged.replace(mask=ragged.targets.mask & (torch.arange(7) != 3).unsqueeze(-1))
    return [ragged, missing, expanded(serving_batch("three_stage", seed=2, num_requests=5))]


@pytest.mark.parametrize("flags", WITH_MATRICES)
def test_blocks_give_the_same_loss_and_gradients(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Method("three_stage", f"--loss_type={flags}").build_weighted()
    for batch in batches():
        whole = step(loss, batch)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "MATRIX_NUMBERS", 0)
            patch.setattr(functional, "NUMBERS_PER_BLOCK", 2 * batch.targets.mask.shape[1] ** 2)
            blocks = step(loss, batch)
        for ours, theirs in (
            (blocks.terms, whole.terms),
            (blocks.grads, whole.grads),
            (blocks.weight_grads, whole.weight_grads),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("flags", [*WITH_MATRICES, *WITHOUT])
def test_no_matrix_of_the_whole_batch_is_kept(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what autograd saves nothing is larger than a few numbers an item, also while a block is made again."""
    batch, sizes = make_batch("three_stage", num_requests=6, num_items=60), list[int]()
    monkeypatch.setattr(functional, "MATRIX_NUMBERS", 6 * 60**2 - 1)
    monkeypatch.setattr(functional, "NUMBERS_PER_BLOCK", 2 * 60**2)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = Method("three_stage", f"--loss_type={flags}").build()(
            {stage: scores.requires_grad_() for stage, scores in batch.scores.items()}, batch.targets
        )
    assert sizes
    assert max(sizes) <= 3 * 6 * 60
    result["loss"].backward()
    assert all(scores.grad is not None and scores.grad.isfinite().all() for scores in batch.scores.values())


def test_matrices_of_few_numbers_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the arithmetic, and so every bit, is that without blocks: batches of the paper's settings stay below."""
    asked = list[int]()

    def rows(scores: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(scores))
        return scores, scores.sum()

    monkeypatch.setattr(functional, "MATRIX_NUMBERS", 9 * 5**2)
    monkeypatch.setattr(functional, "NUMBERS_PER_BLOCK", 4 * 5**2 + 24)
    for requests, expected in ((9, [9]), (10, [4, 4, 2]), (12, [4, 4, 4])):
        asked.clear()
        scores = torch.arange(5.0 * requests).view(requests, 5)
        joined, total = in_blocks(rows, scores)
        assert asked == expected
        assert torch.equal(joined, scores)
        assert total == scores.sum()
    monkeypatch.undo()
    assert functional.MATRIX_NUMBERS >= 2048 * 50**2
