"""ONNX graphs and torch.export programs: equal to the models, for any sizes, and made of standard operators."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deep_components import commands
from deep_components.batch import EmbeddedFeatures, Features, RowFeatures
from deep_components.cascade import Cascade, Group, Stage
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.files import read_json, sha256_of
from deep_components.models import build_models
from deep_components.schema import SIDES, Field, Schema
from deep_components.serving import interchange
from deep_components.serving.bundle import Bundle
from deep_components.serving.interchange import export_bundle, export_graphs
from deep_components.serving.scorer import Scorer
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import build_stores
from tests.schemas import random_batch
from tests.serving.conftest import Trained

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SCHEMA = Schema(
    (
        Field("city", "request", size=7),
        Field("spent", "request", "number"),
        Field("langs", "request", size=9, table="tags", length=2),
        Field("weight", "history", "number"),
        Field("product", "history", size=12, unknown=1),
        Field("price", "item", "number"),
        Field("shop", "item", size=5, padding=2),
        Field("product", "item", size=12, unknown=1),
        Field("tags", "item", size=9, length=3),
    )
)
GROUPS = (Group("shown", 2), Group("rest", 3))
ROWS = np.array([0, 1, 3, 5, 7])  # of the compacted table product, whose unknown row is 1


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Own(nn.Module):
    """A model of one's own, with an autograd function of its own."""

    def __init__(self, schema: Schema, emb_dim: int, nn_units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(schema.width("item", emb_dim), 1)

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        scores: Tensor = _Twice.apply(self.linear(features.item).squeeze(-1))
        return scores


def scorer(first: str = f"{__name__}:Own") -> Scorer:
    cascade = Cascade((Stage("first", 4, first), Stage("last", 2, "din", nn_units=64)), GROUPS)
    ids = {"product": IdSet.of([ROWS], 12)}
    models = build_models(cascade, SCHEMA, 4, 16, 0)
    for model in models.values():
        model.eval()
    return Scorer(cascade, SCHEMA, models, build_stores(cascade, SCHEMA, 4, 0, ids), seed=0)


def samples() -> list[Features]:
    return [random_batch(SCHEMA, 5, 7, 6).features]


@dataclass(frozen=True)
class Exported:
    folder: Path
    scorer: Scorer
    manifest: Mapping[str, Any]


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Lists, numbers and a table with a row for unknown ids; the last stage's tables lie in a file of their own, as
    those of more than 2 GB do."""
    made, folder = scorer(), tmp_path_factory.mktemp("graphs") / "onnx"
    folder.mkdir()
    (folder / "old.onnx").touch()  # all is replaced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interchange, "_LARGE", 4096)  # bytes
        export_graphs(made, folder, samples(), {"version": "v1"})
    return Exported(folder, made, read_json(folder / "manifest.json", must_have_checksum=True))


@pytest.fixture(scope="session")
def recflow_graphs(recflow: Trained, recflow_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle's, by the command; the tables are compacted, without rows for unknown ids."""
    copy = Path(shutil.copytree(recflow_bundle, tmp_path_factory.mktemp("onnx") / "bundle"))
    assert commands.main(["export", "onnx", f"--bundle={copy}", f"--data_dir={recflow.log}"]) == 0
    manifest = read_json(copy / "onnx/manifest.json", must_have_checksum=True)
    return Exported(copy / "onnx", Bundle.load(copy).scorer, manifest)


@pytest.fixture(params=["own", "recflow_graphs"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def batch(exported: Exported, requests: int, items: int, length: int) -> Features:
    """Random indices of all tables."""
    return random_batch(exported.scorer.schema, requests, items, length, seed=9).features


def rows_of(exported: Exported, features: Features) -> RowFeatures:
    """The rows that the manifest promises: by the list of indices, what is not there being unknown, or padding."""
    manifest, schema = exported.manifest["tables"], exported.scorer.schema
    tables = {(field.side, field.name): manifest[field.table] for field in schema.fields if field.table}

    def rows(side: str, name: str, values: Tensor) -> Tensor:
        table = tables.get((side, name), {"indices": None})
        if table["indices"] is None:
            return values
        known = np.load(exported.folder / table["indices"])
        other = table["padding"] if table["unknown"] is None else table["unknown"]
        row = {index: number for number, index in enumerate(known.tolist())}
        return torch.tensor([row.get(index, other) for index in values.flatten().tolist()]).view(values.shape)

    sides = {side: {n: rows(side, n, v) for n, v in getattr(features, side).items()} for side in SIDES}
    return RowFeatures(**sides, history_mask=features.history_mask)


def inputs_of(exported: Exported, features: Features) -> dict[str, Tensor]:
    rows = rows_of(exported, features)
    fields = {f"{side}.{name}": values for side in SIDES for name, values in getattr(rows, side).items()}
    return fields | {"history.mask": rows.history_mask}


def run(exported: Exported, name: str, inputs: Mapping[str, Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(exported.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    wanted = exported.manifest["graphs"][name]["inputs"]
    assert {entry.name: entry.shape for entry in session.get_inputs()} == {k: v["shape"] for k, v in wanted.items()}
    (output,) = session.run(None, {key: inputs[key].numpy() for key in wanted})
    found: np.ndarray = output
    return found


@torch.no_grad()
def scores(exported: Exported, stage: str, features: Features) -> np.ndarray:
    """By the store's own look-ups."""
    embedded = exported.scorer.stores[stage].embed(rows_of(exported, features))
    found: np.ndarray = exported.scorer.models[stage](embedded).numpy()
    return found


SIZES = [(1, 1, 1), (4, 9, 3), (1, 40, 12)]


@pytest.mark.parametrize(("requests", "items", "length"), SIZES)
def test_graphs_equal_the_models(exported: Exported, requests: int, items: int, length: int) -> None:
    features = batch(exported, requests, items, length)
    for stage in exported.scorer.models:
        expected = scores(exported, stage, features)
        assert expected.shape == (requests, items)
        np.testing.assert_allclose(run(exported, stage, inputs_of(exported, features)), expected, rtol=1e-5, atol=1e-5)


def test_programs_equal_the_models(own: Exported) -> None:
    program = torch.export.load(own.folder / "last.pt2").module()
    for sizes in SIZES:
        features = batch(own, *sizes)
        found = program(inputs_of(own, features)).detach().numpy()
        np.testing.assert_allclose(found, scores(own, "last", features), rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_the_bundle(recflow: Trained, recflow_graphs: Exported) -> None:
    """From the log's indices to scores, for ids that the tables have rows of."""
    own, log = recflow_graphs.scorer, open_log(recflow.log)
    features = log.open_day(log.days()[0], own.cascade, None).with_history(5).batch(np.arange(8)).features
    for stage in own.models:
        found = run(recflow_graphs, stage, inputs_of(recflow_graphs, features))
        np.testing.assert_allclose(found, own.scores(stage, features), rtol=1e-5, atol=1e-5)


def test_vectors_of_users_and_items(recflow_graphs: Exported) -> None:
    features = batch(recflow_graphs, 3, 8, 4)
    inputs = inputs_of(recflow_graphs, features)
    users = run(recflow_graphs, "retrieval.user", inputs)
    items = [run(recflow_graphs, "retrieval.item", {name: v[b] for name, v in inputs.items()}) for b in range(3)]
    assert users.shape == (3, 4) and items[0].shape == (8, 4)
    dots = np.stack([some @ user for some, user in zip(items, users, strict=True)])
    np.testing.assert_allclose(dots, scores(recflow_graphs, "retrieval", features), rtol=1e-5, atol=1e-5)


def test_the_manifest(own: Exported, recflow_graphs: Exported, recflow_bundle: Path) -> None:
    manifest = own.manifest
    assert manifest["version"] == "v1" and manifest["tolerance"] == 1e-5
    inputs = manifest["graphs"]["last"]["inputs"]
    assert inputs["request.spent"] == {"dtype": "float32", "shape": ["B"]}
    assert inputs["request.langs"] == {"dtype": "int64", "shape": ["B", 2]}
    assert inputs["history.product"] == {"dtype": "int64", "shape": ["B", "L"]}
    assert inputs["history.mask"] == {"dtype": "bool", "shape": ["B", "L"]}
    assert inputs["item.tags"] == {"dtype": "int64", "shape": ["B", "N", 3]}
    assert manifest["tables"]["product"] == {"rows": 5, "padding": 0, "unknown": 1, "indices": "ids.product.npy"}
    assert np.array_equal(np.load(own.folder / "ids.product.npy"), ROWS)
    assert manifest["tables"]["shop"] == {"rows": 5, "padding": 2, "unknown": None, "indices": None}
    manifest = recflow_graphs.manifest
    assert manifest["version"] == Bundle.load(recflow_bundle).version and manifest["seq_len"] == 5
    assert list(manifest["graphs"]) == ["retrieval", "retrieval.user", "retrieval.item", "rank"]
    assert manifest["graphs"]["retrieval.item"]["inputs"]["item.video"] == {"dtype": "int64", "shape": ["N"]}


def test_the_manifest_lists_all_files(exported: Exported) -> None:
    there = {path.name for path in exported.folder.iterdir()} - {"manifest.json"}
    assert there == set(exported.manifest["files"])
    for name, entry in exported.manifest["files"].items():
        path = exported.folder / name
        assert entry == {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for graph in exported.manifest["graphs"].values():
        assert all(0 <= difference <= 1e-5 for difference in graph["largest_difference"].values())


def test_graphs_are_of_standard_operators_and_know_no_machine(exported: Exported) -> None:
    for path in exported.folder.glob("*.onnx"):
        model = onnx.load(path)
        onnx.checker.check_model(str(path))
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        assert not [node.name for node in model.graph.node if node.metadata_props]
    for path in exported.folder.iterdir():
        assert str(Path(interchange.__file__).parents[2]).encode() not in path.read_bytes()


def test_large_tables_lie_in_a_file_beside(own: Exported) -> None:
    assert [path.name for path in own.folder.glob("*.data")] == ["last.onnx.data"]


def test_an_index_beyond_the_table_is_refused(own: Exported) -> None:
    inputs = inputs_of(own, batch(own, 2, 3, 4))
    inputs["item.shop"] = torch.full_like(inputs["item.shop"], 5)
    with pytest.raises(Exception, match="out of data bounds"):
        run(own, "last", inputs)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Deciding(Own):
    def forward(self, features: EmbeddedFeatures) -> Tensor:
        scores = super().forward(features)
        return scores * 2 if scores.sum().item() > 0 else scores


class Changing(Own):
    """Gives other scores when it is exported, as a defect of an exporter would."""

    def forward(self, features: EmbeddedFeatures) -> Tensor:
        return super().forward(features) + (0.001 if torch.compiler.is_exporting() else 0)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("Deciding", "stage first: its model cannot be exported .*no decision on the values"),
        ("Changing", r"stage first: first\.onnx differs from the model by .* more than 1e-05; nothing is exported"),
    ],
)
def test_what_cannot_be_exported(model: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "manifest.json").write_text("before")
    with pytest.raises(InputError, match=sentence) as refused:
        export_graphs(scorer(f"{__name__}:{model}"), folder, samples(), {})
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]  # as it was
    assert (folder / "manifest.json").read_text() == "before"


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--onnx: the package onnx is missing; pip install"):
        export_graphs(scorer(), tmp_path / "onnx", samples(), {})
    assert not list(tmp_path.iterdir())


def test_another_log(recflow_bundle: Path, shop: Trained) -> None:
    with pytest.raises(InputError, match="its fields or id counts differ from those of the bundle"):
        export_bundle(recflow_bundle, data_dir=shop.log)
