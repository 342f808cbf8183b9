"""Search of the items with the largest dot products: exactly, or by faiss's inverted lists (IVF) or graph (HNSW).

Neither lists nor a graph can be built on dot products themselves: an item with a long vector is near to every user and
to no other item. So vectors get one more number, which makes all of them equally long; a user's is 0 there. Dot
products stay what they are, and the nearest item is the one with the largest (Bachrach et al., RecSys 2014).

What the approximate ones lose is measured when they are built: on real user vectors, recall@k against the exact search
must reach a target, else they look at more (nprobe lists, efSearch nodes).
"""

import importlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from deep_components.errors import InputError

KINDS = ("auto", "flat", "ivf", "hnsw")
FLAT_UP_TO = 100_000  # items that "auto" searches one by one: some 2 ms a request on one core
RECALL = 0.99

_LINKS = 32  # of a node of the graph
_BREADTH = 128  # candidates while the graph is built
_MOST_LISTS = 8192  # of IVF: with more the corpus takes long to sort into them
_POINTS_PER_LIST = 40  # that IVF's centroids are learnt from
_ITERATIONS = 10  # of k-means; 25 find no more
_GPU_LISTS = 2048  # that a search on a GPU can look into
_MOST_KEPT = 16  # times k, the nodes that a search of the graph keeps at most
_BLOCK = 1 << 16  # vectors added at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexChoice:
    """What the manifest says of an index."""

    kind: str  # "flat", "ivf" or "hnsw"
    asked: str = "auto"  # the kind that was asked for
    lists: int = 0  # of IVF
    effort: int = 0  # IVF: lists that a search looks into (nprobe); HNSW: nodes that it keeps (efSearch)
    at: int = 0  # k of recall
    recall: float = 1.0  # of recall@k against the exact search
    queries: int = 0  # user vectors that it was measured on
    target: float = RECALL

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class VectorIndex:
    """Vectors [M, d] and how they are searched; may be used by several threads.

    ``index``: faiss's, None for the exact search over the vectors as they lie; ``alone``: it bears no
    two threads at a time, as on a GPU.
    """

    def __init__(self, vectors: np.ndarray, choice: IndexChoice, index: Any = None, alone: bool = False) -> None:
        self.vectors, self.choice, self._index = vectors, choice, index
        self._lock: AbstractContextManager[Any] = Lock() if alone else nullcontext()

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest dot products with queries [B, d]: (scores [B, k] float32, falling, rows [B, k] int64). Where
        less than k are found stand -inf and -1."""
        queries = np.ascontiguousarray(queries, np.float32)
        found = min(k, len(self))
        with self._lock:
            scores, rows = self._search(queries, found)
        whole = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        whole[0][:, :found], whole[1][:, :found] = np.where(rows < 0, -np.inf, scores), rows
        return whole

    def exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same by comparing with every vector."""
        return VectorIndex(self.vectors, self.choice).search(queries, k)

    def with_choice(self, choice: IndexChoice) -> "VectorIndex":
        """The same index, searched otherwise."""
        return VectorIndex(self.vectors, choice, self._index)

    def with_effort(self, effort: int) -> "VectorIndex":
        """The same index that looks at more or less."""
        return self.with_choice(replace(self.choice, effort=effort))

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = load_faiss()
        if self._index is None:
            scores, rows = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
            return scores, rows
        wanted = queries if self.choice.kind == "flat" else _lengthened(queries)
        scores, rows = self._index.search(wanted, k, params=self._parameters(faiss, k))
        return self._by_score(queries, rows) if self.choice.kind == "hnsw" else (scores, rows)

    def _by_score(self, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dot products of the rows found, falling, and these rows: the graph measures distances."""
        scores = np.einsum("bd,bkd->bk", queries, self.vectors[np.maximum(rows, 0)])
        order = np.argsort(-np.where(rows < 0, -np.inf, scores), axis=1, kind="stable")
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _parameters(self, faiss: ModuleType, k: int) -> Any:
        if self.choice.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.choice.effort)
        return faiss.SearchParametersHNSW(efSearch=max(self.choice.effort, k)) if self.choice.kind == "hnsw" else None


def build_index(
    vectors: np.ndarray,
    kind: str = "auto",
    queries: np.ndarray | None = None,
    k: int = 100,
    target: float = RECALL,
    path: Path | None = None,
) -> VectorIndex:
    """An index of vectors [M, d] float32, which may be mapped.

    Args:
        kind: one of KINDS; "auto" is flat up to FLAT_UP_TO items, then IVF.
        queries: [Q, d], on which recall@k is measured; the vectors themselves where there are none.
        k: items that a search will ask for.
        target: recall that it must have against the exact search.
        path: file that an approximate index is written to.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"--index={kind}: is one of {', '.join(KINDS)}")
    chosen = kind if kind != "auto" else "flat" if len(vectors) <= FLAT_UP_TO else "ivf"
    k = min(k, len(vectors))
    if chosen == "flat":
        return VectorIndex(vectors, IndexChoice("flat", kind, at=k, target=target))
    lists = max(1, min(round(2 * math.sqrt(len(vectors))), len(vectors) // _POINTS_PER_LIST, _MOST_LISTS))
    index = _ivf(vectors, lists) if chosen == "ivf" else _hnsw(vectors)
    choice = IndexChoice(chosen, kind, lists if chosen == "ivf" else 0, 1, k, target=target)
    queries = _sample(vectors, 256) if queries is None or not len(queries) else queries
    made = _calibrated(VectorIndex(vectors, choice, index), queries, k, target)
    if path is not None:
        load_faiss().write_index(index, str(path))
    return made


def open_index(vectors: np.ndarray, choice: IndexChoice, path: Path, gpu: bool = False) -> VectorIndex:
    """The index of a manifest's choice over its vectors; with ``gpu`` on the first GPU, where faiss sees one.
    InputError when its file is none of them."""
    index = None if choice.kind == "flat" else _read(path, vectors, choice.kind)
    if not gpu or choice.kind == "hnsw" or not load_faiss().get_num_gpus():  # HNSW has no form on a GPU
        return VectorIndex(vectors, choice, index)
    return _on_gpu(vectors, choice, index)


def _read(path: Path, vectors: np.ndarray, kind: str) -> Any:
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a readable index; export the run again") from error
    metric = faiss.METRIC_INNER_PRODUCT if kind == "ivf" else faiss.METRIC_L2
    if (index.ntotal, index.d, index.metric_type) != (len(vectors), vectors.shape[1] + 1, metric):
        raise InputError(f"{path}: is an index of other vectors than those beside it; export the run again")
    return index


def _on_gpu(vectors: np.ndarray, choice: IndexChoice, index: Any) -> VectorIndex:
    faiss = load_faiss()
    if index is None:
        index = faiss.IndexFlatIP(vectors.shape[1])
        for block in _blocks(vectors):
            index.add(block)
    choice = replace(choice, effort=min(choice.effort, _GPU_LISTS))
    return VectorIndex(vectors, choice, faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), alone=True)


def recall_at(index: VectorIndex, queries: np.ndarray, k: int, exact: np.ndarray) -> float:
    """The mean share of the exact rows [Q, k] that the index finds."""
    _, rows = index.search(queries, k)
    found = [len(np.intersect1d(ours, theirs)) for ours, theirs in zip(rows, exact, strict=True)]
    return float(np.mean(found)) / k


def _calibrated(index: VectorIndex, queries: np.ndarray, k: int, target: float) -> VectorIndex:
    """The index with about the least effort that reaches the target."""
    _, exact = index.exact(queries, k)
    least, most = (1, index.choice.lists) if index.choice.kind == "ivf" else (k, _MOST_KEPT * k)

    def recall(effort: int) -> float:
        return recall_at(index.with_effort(effort), queries, k, exact)

    effort = least
    while recall(effort) < target and effort < most:
        effort = min(2 * effort, most)
    low = effort // 2  # too little, unless it is the least
    while effort - low > max(1, low // 8) and effort > least:
        middle = (low + effort) // 2
        low, effort = (low, middle) if recall(middle) >= target else (middle, effort)
    measured = {"effort": effort, "recall": recall(effort), "queries": len(queries)}
    choice = IndexChoice(**index.choice.to_json() | measured)
    logger.info("%s index: recall@%d %.4f of the exact search", choice.kind, k, choice.recall)
    return index.with_choice(choice)


def _ivf(vectors: np.ndarray, lists: int) -> Any:
    faiss, width, longest = load_faiss(), vectors.shape[1] + 1, _longest(vectors)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # a small corpus is no reason to warn
    index.cp.niter = _ITERATIONS
    index.train(_lengthened(_sample(vectors, lists * _POINTS_PER_LIST), longest))
    _add(index, vectors, longest)
    return index


def _hnsw(vectors: np.ndarray) -> Any:
    faiss, longest = load_faiss(), _longest(vectors)
    index = faiss.IndexHNSWFlat(vectors.shape[1] + 1, _LINKS, faiss.METRIC_L2)
    index.hnsw.efConstruction = _BREADTH
    _add(index, vectors, longest)
    return index


def _add(index: Any, vectors: np.ndarray, longest: float) -> None:
    for block in _blocks(vectors):
        index.add(_lengthened(block, longest))


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    return (vectors[first : first + _BLOCK] for first in range(0, len(vectors), _BLOCK))


def _longest(vectors: np.ndarray) -> float:
    """The square of the longest vector's length."""
    return max(float(np.square(block).sum(axis=1).max()) for block in _blocks(vectors))


def _lengthened(vectors: np.ndarray, longest: float | None = None) -> np.ndarray:
    """Vectors [n, d + 1] whose squared lengths are ``longest``; None: with a 0 more, as users' are."""
    more = np.zeros(len(vectors)) if longest is None else np.sqrt((longest - np.square(vectors).sum(axis=1)).clip(0))
    return np.column_stack([vectors, more]).astype(np.float32)


def _sample(vectors: np.ndarray, count: int) -> np.ndarray:
    """That many vectors, spread evenly."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(np.int64))
    return np.ascontiguousarray(vectors[rows])


def load_faiss() -> ModuleType:
    """The package, whose import logs and warns of its own affairs. InputError when it is not installed."""
    if (loaded := sys.modules.get("faiss")) is not None:  # every search asks
        return loaded
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("faiss")
    except ImportError as error:
        raise missing("faiss", error) from error


def missing(package: str, error: ImportError) -> InputError:
    """The sentence for a package of requirements-serve.txt that is not there."""
    return InputError(
        f"the package {package} is missing ({error}); pip install 'lcron[serve]', or -r requirements-serve.txt"
    )
