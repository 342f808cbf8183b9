"""Search by dot products: exact, IVF and HNSW, and what the approximate ones reach."""

import sys
from pathlib import Path

import numpy as np
import pytest

from deep_components.errors import InputError
from deep_components.serving import index as module
from deep_components.serving.index import IndexChoice, build_index, open_index, recall_at

ITEMS, WIDTH = 2000, 8


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """In clusters, as trained vectors are."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, WIDTH))
    return (centers[rng.integers(20, size=ITEMS)] + 0.3 * rng.normal(size=(ITEMS, WIDTH))).astype(np.float32)


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    return (vectors[:50] + 0.3 * np.random.default_rng(1).normal(size=(50, WIDTH))).astype(np.float32)


def best(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


def test_flat_is_exact(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = build_index(vectors, "flat", k=10)
    scores, rows = index.search(queries, 10)
    assert np.array_equal(rows, best(vectors, queries, 10)) and rows.dtype == np.int64
    expected = np.take_along_axis(queries @ vectors.T, rows, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert index.choice.recall == 1 and index.choice.kind == "flat"


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_reaches_its_target(
    kind: str, vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    """And a file of it finds the same, with the effort that the manifest says."""
    exact = best(vectors, queries, 20)
    index = build_index(vectors, kind, queries, k=20, target=0.95, path=tmp_path / "index")
    assert index.choice.recall == recall_at(index, queries, 20, exact) >= 0.95
    assert index.choice.queries == 50 and index.choice.at == 20
    more = build_index(vectors, kind, queries, k=20, target=1.0)
    assert more.choice.recall == 1 and more.choice.effort >= index.choice.effort
    opened = open_index(vectors, IndexChoice(**index.choice.to_json()), tmp_path / "index")
    for ours, theirs in zip(opened.search(queries, 20), index.search(queries, 20), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(opened.exact(queries, 20)[1], exact)


def test_the_least_effort_is_chosen(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = build_index(vectors, "ivf", queries, k=20, target=0.95)
    exact = best(vectors, queries, 20)
    assert 1 < index.choice.effort < index.choice.lists
    less = index.with_effort(index.choice.effort // 2)
    assert recall_at(less, queries, 20, exact) < 0.95


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_more_than_there_are(kind: str) -> None:
    """-1 and -inf where nothing is found."""
    vectors = np.eye(3, dtype=np.float32)
    index = build_index(vectors, kind, k=20)
    scores, rows = index.search(np.array([[3, 1, 2]]), 5)
    assert rows.tolist() == [[0, 2, 1, -1, -1]]
    assert scores.tolist() == [[3, 2, 1, -np.inf, -np.inf]]


def test_nothing_found_in_the_lists_looked_into() -> None:
    """faiss gives -1 there."""
    vectors = np.repeat(np.eye(2, dtype=np.float32), 100, axis=0)
    index = build_index(vectors, "ivf", vectors[:1], k=10).with_effort(1)
    scores, rows = index.search(vectors[:1], 150)
    assert (rows >= 0).sum() < 150 and (scores[rows < 0] == -np.inf).all() and np.isfinite(scores[rows >= 0]).all()


def test_auto_goes_by_the_number_of_items(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_index(vectors).choice.kind == "flat"
    monkeypatch.setattr(module, "FLAT_UP_TO", ITEMS - 1)
    choice = build_index(vectors).choice
    assert (choice.kind, choice.asked) == ("ivf", "auto")


def test_unknown_kinds_and_files(vectors: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--index=lsh: is one of auto, flat, ivf, hnsw"):
        build_index(vectors, "lsh")
    choice = build_index(vectors, "ivf", path=tmp_path / "index").choice
    with pytest.raises(InputError, match="is an index of other vectors than those beside it"):
        open_index(vectors[1:], choice, tmp_path / "index")
    (tmp_path / "index").write_bytes(b"no index")
    with pytest.raises(InputError, match="index: not a readable index; export the run again"):
        open_index(vectors, choice, tmp_path / "index")


def test_without_faiss_the_remedy_is_said(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"the package faiss is missing .*; pip install 'lcron\[serve\]'"):
        build_index(vectors, "flat").search(vectors[:1], 1)


def test_vectors_of_all_lengths() -> None:
    """As trained items have them: the popular ones' are long, and the best for everybody."""
    rng = np.random.default_rng(0)
    items = (rng.normal(size=(4000, WIDTH)) + 1) * rng.lognormal(sigma=0.7, size=(4000, 1))
    users = rng.normal(size=(50, WIDTH)) + 1
    graph = build_index(items.astype(np.float32), "hnsw", users.astype(np.float32), k=50, target=0.95)
    assert graph.choice.recall >= 0.95
    lists = build_index(items.astype(np.float32), "ivf", users.astype(np.float32), k=50, target=0.95)
    assert lists.choice.recall >= 0.95 and lists.choice.effort < lists.choice.lists / 4
