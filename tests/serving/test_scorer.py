"""Scores of a bundle's models are those of the evaluation, also of ids that were never trained."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from deep_components.dataset.log import open_log
from deep_components.serving.bundle import Bundle
from tests.serving.conftest import Trained


@pytest.fixture(params=["recflow", "shop"])
def served(request: pytest.FixtureRequest) -> tuple[Trained, Bundle]:
    return request.getfixturevalue(request.param), Bundle.load(request.getfixturevalue(f"{request.param}_bundle"))


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


def test_the_test_day_has_ids_that_were_never_trained(recflow: Trained, recflow_bundle: Path) -> None:
    """Else the test above would not see that their initial values count."""
    bundle, log = Bundle.load(recflow_bundle), open_log(recflow.log)
    day = log.open_day(log.days()[-1], bundle.cascade, None, bundle.manifest["zone"])
    known = bundle.scorer.stores["rank"].ids["user"]
    assert not known.contains(np.unique(day.columns["request.user"]).astype(np.int64)).all()
