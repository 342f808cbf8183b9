"""Evaluation over a whole corpus: what is served equals the cascade of the metrics, and what is missing is counted."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from deep_components import run_test, run_train
from deep_components.cascade import Cascade
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache, write_day
from deep_components.dataset.log import open_log, write_log_file
from deep_components.errors import InputError
from deep_components.evaluation.corpus import ExactIndex, ItemRows, evaluate_corpus, with_quotas
from deep_components.files import read_json
from deep_components.schema import Field, Schema
from deep_components.serving.bundle import Bundle
from deep_components.serving.export import export_run
from deep_components.serving.recommender import Recommender
from tests.helpers import evaluate, leftovers, small_log, train

DAYS = ("2026-03-01", "2026-03-02")
REQUESTS, PRODUCTS, LENGTH = 24, 30, 4
FIRST = 2  # a product's index; 0 is padding, 1 unknown
SCHEMA = Schema(
    (
        Field("user", "request", size=REQUESTS + FIRST, unknown=1),
        Field("product", "history", size=PRODUCTS + FIRST, unknown=1),
        Field("product", "item", size=PRODUCTS + FIRST, unknown=1),
        Field("shop", "item", size=7, unknown=1),
        Field("price", "item", "number"),
    )
)
CASCADE = """
name = "shop"
num_relevant = 3
stages = [
    {name = "retrieval", keep = 15, model = "dssm"},
    {name = "coarse", keep = 9, model = "mlp"},
    {name = "rank", keep = 5, model = "din"},
]
groups = [{name = "bought"}, {name = "shown"}]
"""
RECALLS = [
    *("corpus_recall@3@5", "corpus_recall_after_retrieval@3@15"),
    *("corpus_recall_after_coarse@3@9", "corpus_recall_after_rank@3@5"),
]


def fields_of(products: np.ndarray) -> dict[str, np.ndarray]:
    """An item's fields are the same wherever it stands."""
    return {"product": products, "shop": FIRST + products % 5, "price": (products % 7 - 3).astype(np.float32)}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every request has all products as candidates, in an order of its own; the first four are ground truth, and three
    of them count, of which two tie."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.toml").write_text(CASCADE)
    rng = np.random.default_rng(0)
    for day in DAYS:
        products = rng.permuted(np.tile(FIRST + np.arange(PRODUCTS), (REQUESTS, 1)), axis=1)
        history = FIRST + rng.integers(0, PRODUCTS, (REQUESTS, LENGTH))
        mask = np.arange(LENGTH) >= rng.integers(0, LENGTH, REQUESTS)[:, None]
        with write_day(folder / day, SCHEMA, requests=REQUESTS) as columns:
            columns.write("request_id", np.arange(REQUESTS))
            columns.write("request.user", FIRST + np.arange(REQUESTS))
            columns.write("history.product", np.where(mask, history, 0))
            columns.write("history.mask", mask)
            for name, values in fields_of(products).items():
                columns.write(f"item.{name}", values)
            columns.write("item.mask", np.ones(products.shape, bool))
            columns.write("item.group", np.broadcast_to(np.arange(PRODUCTS) >= 4, products.shape).astype(np.uint8))
            columns.write("item.label", np.broadcast_to(np.array([9, 8, 7, 7] + [0] * 26), products.shape))
    write_log_file(folder, origin="a shop")
    return folder


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sizes = ("--emb_dim=4", "--nn_units=32", "--batch_size=12", "--epochs=1", "--loss_type=bce")
    run_train.main([*sizes, "--device=cpu", f"--data_dir={log}", f"--output_dir={folder}",
                    f"--cascade={log / 'shop.toml'}"])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bundle(log: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    export_run(run, folder, data_dir=log, index="flat")
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def day(log: Path, bundle: Bundle) -> DayCache:
    return open_log(log).open_day(DAYS[-1], bundle.cascade)


def write_items(path: Path, products: Any) -> Path:
    pa.parquet.write_table(pa.table(fields_of(np.asarray(products))), path)
    return path


def evaluated(log: Path, run: Path, *flags: str) -> dict[str, Any]:
    run_test.main(["--device=cpu", f"--data_dir={log}", f"--output_dir={run}", *flags])
    return read_json(run / "metrics.json")


def per_request(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "per_request.npz") as arrays:
        return dict(arrays)


PRODUCT = next(field for field in SCHEMA.side("item") if field.name == "product")


def test_a_corpus_of_a_request_s_candidates(log: Path, run: Path) -> None:
    """What is served is then what the hard cascade of metrics.py keeps, request by request and stage by stage; where
    scores tie, that has the mean over all orders."""
    corpus = evaluated(log, run, "--corpus", "--save_scores")["corpus"]
    assert [name for name in corpus if "@" in name] == RECALLS
    arrays, stages = per_request(run), ("retrieval", "coarse", "rank")
    with np.load(run / "scores.npz") as scores:
        distinct = [[len(np.unique(row)) == PRODUCTS for row in scores[stage]] for stage in stages]
    settled = np.all(distinct, axis=0)
    assert settled.mean() > 0.5
    assert arrays["corpus_recall@3@5"][settled] == pytest.approx(arrays["joint_recall@3@5"][settled])
    for name, stage in zip(RECALLS[1:], stages, strict=True):
        assert arrays[name][settled] == pytest.approx(arrays[f"survival_after_{stage}"][settled])
        assert corpus[name] == pytest.approx(arrays[name].mean())
    assert len(np.unique(arrays["corpus_recall@3@5"][settled])) > 2  # neither all nothing nor all
    counts = ("items", "ground_truth", "ground_truth_unknown", "ground_truth_not_in_corpus")
    assert [corpus[name] for name in counts] == [PRODUCTS, 4 * REQUESTS, 0, 0]
    assert "corpus" not in evaluated(log, run)
    assert not any("corpus" in name for name in per_request(run))


def test_a_file_in_another_order_is_the_same_corpus(log: Path, run: Path, tmp_path: Path) -> None:
    ours = evaluated(log, run, "--corpus")["corpus"]
    file = write_items(tmp_path / "items.parquet", FIRST + np.arange(PRODUCTS)[::-1])
    theirs = evaluated(log, run, f"--corpus={file}")["corpus"]
    assert {name: ours[name] for name in RECALLS} == {name: theirs[name] for name in RECALLS}


def test_items_that_the_corpus_lacks(log: Path, run: Path, tmp_path: Path, day: DayCache) -> None:
    """They are missed, and counted; the quotas are large enough for all others."""
    file = write_items(tmp_path / "items.parquet", FIRST + np.arange(5))
    results = evaluated(log, run, f"--corpus={file}")["corpus"]
    batch = day.batch(np.arange(REQUESTS))
    there = (batch.features.item["product"] < FIRST + 5).numpy()[:, :4]
    weight = np.array([1, 1, 0.5, 0.5]) / 3
    assert results["corpus_recall@3@5"] == pytest.approx((there * weight).sum(axis=1).mean())
    assert results["ground_truth_not_in_corpus"] == (~there).sum()
    assert results["items"] == 5


def test_unknown_items_are_nobody_s(bundle: Bundle, day: DayCache) -> None:
    """A ground-truth item whose index stands for all unknown ones is not found in an unknown one of the corpus."""
    columns = dict(day.columns)
    columns["item.product"] = np.where(np.asarray(columns["item.product"]) < FIRST + 3, 1, columns["item.product"])
    _, results = evaluate_corpus({"exact": Recommender(bundle)}, dataclasses.replace(day, columns=columns), PRODUCT)
    assert results["ground_truth_unknown"] == (columns["item.product"][:, :4] == 1).sum() > 0
    rows = ItemRows(PRODUCT, np.array([5, 1, 0, 9, 5]))
    assert rows(np.array([[0, 1], [5, 9], [4, 10]])).tolist() == [[-1, -1], [4, 3], [-1, -1]]
    assert ItemRows(PRODUCT, np.zeros(0, np.int64))(np.array([5])).tolist() == [-1]


def test_the_history_s_own_items(log: Path, run: Path, day: DayCache) -> None:
    """They stay, unless --filter_seen: then the ground truth among them is missed, and nothing else at wide quotas."""
    wide = f"--quotas={PRODUCTS},{PRODUCTS},{PRODUCTS}"
    kept = evaluated(log, run, "--corpus", wide)["corpus"]
    assert kept["corpus_recall@3@30"] == 1 and not kept["filter_seen"]
    filtered = evaluated(log, run, "--corpus", wide, "--filter_seen")["corpus"]
    batch = day.batch(np.arange(REQUESTS))
    seen = batch.features.history["product"].masked_fill(~batch.features.history_mask, 0)
    truth = batch.features.item["product"][:, :4]
    missed = (truth[:, :, None] == seen[:, None]).any(dim=-1).numpy() * np.array([1, 1, 0.5, 0.5]) / 3
    assert filtered["corpus_recall@3@30"] == pytest.approx(1 - missed.sum(axis=1).mean()) and filtered["filter_seen"]
    assert 0 < missed.sum() < REQUESTS


@dataclasses.dataclass
class Oracle:
    """A scorer that knows how much each user likes each product: [users, products]."""

    liking: np.ndarray

    def user_vectors(self, request: dict[str, np.ndarray], history: dict[str, np.ndarray]) -> np.ndarray:
        return self.liking[request["user"] - FIRST]

    def features(self, request: dict[str, Any], history: dict[str, Any], item: dict[str, Any]) -> Any:
        return request["user"], item["product"]

    def scores(self, stage: str, features: Any) -> np.ndarray:
        users, products = features
        return np.take_along_axis(self.liking[users - FIRST], products - FIRST, axis=1)


def served_by(bundle: Bundle, liking: np.ndarray) -> Recommender:
    """By these likings alone: an item's vector is 1 where it is itself."""
    own = np.eye(PRODUCTS, dtype=np.float32)[bundle.corpus.features["product"] - FIRST]
    index: Any = ExactIndex(own)
    oracle: Any = Oracle(liking.astype(np.float32))
    return Recommender(dataclasses.replace(bundle, index=index, scorer=oracle))


def test_a_perfect_model_and_its_opposite(bundle: Bundle, day: DayCache) -> None:
    truth = day.batch(np.arange(REQUESTS)).features.item["product"][:, :4].numpy() - FIRST
    liking = np.random.default_rng(0).random((REQUESTS, PRODUCTS))
    np.put_along_axis(liking, truth, 2.0, axis=1)
    for sign, recall in ((1, 1.0), (-1, 0.0)):
        arrays, results = evaluate_corpus({"exact": served_by(bundle, sign * liking)}, day, PRODUCT)
        assert [results[name] for name in RECALLS] == [recall] * 4
        assert all((values == recall).all() for values in arrays.values())


def test_chance(bundle: Bundle, day: DayCache) -> None:
    """A random order keeps a share q / M of anything; 40 of them, so that five standard errors are below 0.06."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        _, results = evaluate_corpus({"exact": served_by(bundle, rng.random((REQUESTS, PRODUCTS)))}, day, PRODUCT)
        found.append([results[name] for name in RECALLS])
    assert np.mean(found, axis=0) == pytest.approx(np.array([5, 15, 9, 5]) / PRODUCTS, abs=0.06)


def test_what_an_index_loses(log: Path, run: Path) -> None:
    results = evaluated(log, run, "--corpus", "--index=flat,ivf")["corpus"]
    assert list(results["index"]) == ["flat", "ivf"]
    flat, ivf = results["index"].values()
    assert flat["retrieval_recall_of_exact@15"] == 1
    assert {name: flat[name] for name in RECALLS} == {name: results[name] for name in RECALLS}
    assert 0.5 < ivf["retrieval_recall_of_exact@15"] <= 1 and ivf["parameters"]["kind"] == "ivf"


def test_an_index_that_finds_half(bundle: Bundle, day: DayCache) -> None:
    """The share of the exact set, and the recall that is left, for an index that sees every other item."""

    class Half(ExactIndex):
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = super().search(queries, PRODUCTS)
            odd = np.argsort(rows % 2 == 0, axis=1, kind="stable")[:, :k]
            rows = np.take_along_axis(rows, odd, axis=1)
            rows[rows % 2 == 0] = -1
            return np.take_along_axis(scores, odd, axis=1), rows

    vectors = bundle.index.vectors
    index: dict[str, Any] = {"exact": ExactIndex(vectors), "half": Half(vectors)}
    served = {name: Recommender(dataclasses.replace(bundle, index=one)) for name, one in index.items()}
    _, results = evaluate_corpus(served, day, PRODUCT)
    batch = day.batch(np.arange(REQUESTS))
    users = bundle.scorer.user_vectors_of(batch.features)
    best = np.argsort(-(users @ np.asarray(vectors).T), axis=1)[:, :15]
    assert results["index"]["half"]["retrieval_recall_of_exact@15"] == pytest.approx((best % 2 == 1).mean())
    assert results["index"]["half"]["corpus_recall_after_retrieval@3@15"] <= 0.75


def test_exact_search_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_components.evaluation.corpus._SCORES_AT_A_TIME", 64)
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (101, 4))
    scores, rows = ExactIndex(vectors).search(queries, 7)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :7]
    assert np.array_equal(rows, expected)
    assert scores == pytest.approx(np.take_along_axis(queries @ vectors.T, expected, axis=1), abs=1e-5)
    scores, rows = ExactIndex(vectors[:2]).search(queries, 3)
    assert (rows[:, 2] == -1).all() and np.isneginf(scores[:, 2]).all()


def test_a_recflow_log_s_own_items(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Items of the whole log; nothing of the run but its metrics changes."""
    log = small_log(tmp_path_factory)
    run = train(log, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    corpus = evaluate(log, run, "--corpus", "--quotas=100,50")["corpus"]
    assert corpus["items"] <= 200 and corpus["ground_truth_not_in_corpus"] == 0
    assert 0 < corpus["corpus_recall@10@50"] <= corpus["corpus_recall_after_retrieval@10@100"] < 1
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name in before} == before
    assert leftovers(run) == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--filter_seen"], "--filter_seen belongs to --corpus"),
        (["--index=ivf"], "--index belongs to --corpus"),
        (["--quotas=5,3,2"], "--quotas belongs to --corpus"),
        (
            ["--corpus", "--quotas=5,9,3"],
            "--quotas=5,9,3: give a number for each of retrieval, coarse, rank, none above",
        ),
        (["--corpus", "--quotas=5,3"], "--quotas=5,3: give a number for each of"),
        (["--corpus=nowhere.parquet"], "--corpus=nowhere.parquet: no such file"),
        (["--corpus", "--item=price_tag"], "--item=price_tag"),
    ],
)
def test_options_that_do_not_fit(
    flags: list[str], text: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").unlink(missing_ok=True)
    assert run_command(run_test.main, ["--device=cpu", f"--data_dir={log}", f"--output_dir={run}", *flags]) == 2
    assert text in capsys.readouterr().err
    assert not (run / "metrics.json").exists()


def test_other_kinds_of_index_are_refused(log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluated(log, run, "--corpus", "--index=annoy")
    assert "'annoy' is none of flat, ivf, hnsw" in capsys.readouterr().err


def test_quotas_are_the_cascade_s_own_by_default() -> None:
    own = Cascade.from_json(tomllib.loads(CASCADE), "shop.toml")
    assert with_quotas(own, None) == own
    assert with_quotas(own, [4, 4, 1]).quotas == {"retrieval": 4, "coarse": 4, "rank": 1}
    with pytest.raises(InputError):
        with_quotas(own, [4, 4, 4, 4])
