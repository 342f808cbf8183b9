"""Scores of a bundle's models are those of the evaluation, also of ids that were never trained."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_components.arguments import COMPACT_FROM
from deep_components.dataset.log import open_log
from deep_components.serving.bundle import Bundle
from tests.serving.conftest import Trained


@pytest.fixture(params=[("recflow", 0), ("recflow", COMPACT_FROM), ("shop", 0), ("shop", COMPACT_FROM)])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Trained, Bundle]:
    """With tables that have rows for trained ids only, as large ones are, and with whole tables."""
    log, compact_from = request.param
    monkeypatch.setattr("deep_components.serving.bundle.COMPACT_FROM", compact_from)
    return request.getfixturevalue(log), Bundle.load(request.getfixturevalue(f"{log}_bundle"))


def test_scores_are_those_of_the_evaluation(served: tuple[Trained, Bundle]) -> None:
    trained, bundle = served
    log = open_log(trained.log)
    day = log.open_day(log.days()[-1], bundle.cascade, None, bundle.manifest["zone"], bundle.manifest["seq_len"])
    expected = trained.scores()
    assert np.array_equal(expected["request_id"], day.columns["request_id"])
    features = day.batch(np.arange(len(day))).features
    mask = expected["mask"]
    for stage in bundle.cascade.stage_names:
        scores = bundle.scorer.scores(stage, features)
        np.testing.assert_allclose(scores[mask], expected[stage][mask], atol=1e-6, rtol=1e-6)
    users = bundle.scorer.user_vectors_of(features)
    for user, items, scores, there in zip(users, _items(features.item), expected["retrieval"], mask, strict=True):
        vectors = bundle.scorer.item_vectors(items)
        np.testing.assert_allclose((vectors @ user)[there], scores[there], atol=1e-5)


def _items(fields: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """The items of each request."""
    count = len(next(iter(fields.values())))
    return [{name: values[row].numpy() for name, values in fields.items()} for row in range(count)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_scores_on_a_gpu(recflow: Trained, recflow_bundle: Path) -> None:
    on_cpu, on_gpu = (Bundle.load(recflow_bundle, device=device) for device in ("cpu", "cuda"))
    log = open_log(recflow.log)
    features = (
        log.open_day(log.days()[-1], on_cpu.cascade, None, on_cpu.manifest["zone"], 5).batch(np.arange(40)).features
    )
    for stage in on_cpu.cascade.stage_names:
        np.testing.assert_allclose(
            on_gpu.scorer.scores(stage, features), on_cpu.scorer.scores(stage, features), atol=1e-5
        )
    users = on_cpu.scorer.user_vectors_of(features)
    np.testing.assert_allclose(on_gpu.index.search(users, 9)[0], on_cpu.index.search(users, 9)[0], atol=1e-4)


def test_the_test_day_has_ids_that_were_never_trained(
    recflow: Trained, recflow_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would not see that their initial values count."""
    monkeypatch.setattr("deep_components.serving.bundle.COMPACT_FROM", 0)
    bundle, log = Bundle.load(recflow_bundle), open_log(recflow.log)
    day = log.open_day(log.days()[-1], bundle.cascade, None, bundle.manifest["zone"])
    known = bundle.scorer.stores["rank"].ids["user"]
    assert not known.contains(np.unique(day.columns["request.user"]).astype(np.int64)).all()
