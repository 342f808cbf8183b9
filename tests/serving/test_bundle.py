"""Bundles: a version is whole or not there, is read only as it was written, and runs no code unasked."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deep_components import run_train
from deep_components.cascade import TWO_STAGE, Cascade
from deep_components.commands import main
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.files import locked, read_json, write_json
from deep_components.serving import export
from deep_components.serving.bundle import FORMAT, Bundle, versions, write_version
from deep_components.serving.export import export_run, index_corpus
from tests.helpers import DAYS, training_arguments
from tests.serving.conftest import Trained
from tests.test_bit_flips import flips
from tests.test_own_cascade import arguments as shop_arguments
from tests.test_own_cascade import write_log


@pytest.fixture
def bundle(shop_bundle: Path, tmp_path: Path) -> Path:
    """The shop's, to be changed."""
    return Path(shutil.copytree(shop_bundle, tmp_path / "bundle"))


def current(bundle: Path) -> Path:
    return bundle / "versions" / str(read_json(bundle / "current.json")["version"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def new_items(shop: Trained, folder: Path) -> Path:
    """Two items of the log, and one that nobody has seen."""
    rows = pd.read_parquet(shop.corpus)
    items = rows.drop_duplicates("item")[["item", "brand", "shop", "price", "stock"]].head(2)
    unseen = items.iloc[:1].assign(item="sku-new", brand="brand-new")
    path = folder / "new.parquet"
    pd.concat([items, unseen]).assign(title=["One", "Two", "New"]).to_parquet(path, index=False)
    return path


# ---- what a version holds --------------------------------------------------------------------------------------------


def test_the_manifest_says_what_it_is(shop: Trained, shop_bundle: Path, shop_cascade: Cascade) -> None:
    bundle = Bundle.load(shop_bundle)
    config, manifest = read_json(shop.run / "config.json"), bundle.manifest
    assert bundle.cascade == shop_cascade and bundle.version == current(shop_bundle).name
    assert manifest["run"] == {
        "seed": 30, "loss_type": "lcron", "code": config["code"]["total"], "data": "shop",
    }  # fmt: skip
    assert {name: manifest[name] for name in ("format", "emb_dim", "nn_units", "seq_len", "dtype", "zone", "item")} == {
        "format": FORMAT, "emb_dim": 4, "nn_units": 16, "seq_len": 5, "dtype": "float32", "zone": "Europe/Berlin",
        "item": "item",
    }  # fmt: skip
    assert manifest["index"]["kind"] == "flat" and manifest["index"]["at"] == shop_cascade.stages[0].keep
    rows = pd.read_parquet(shop.corpus)
    assert len(bundle.corpus) == len(bundle.index) == manifest["items"] == rows["item"].nunique()
    assert bundle.encoding.history_length == 5 and bundle.schema == bundle.encoding.schema
    last = rows.drop_duplicates("item", keep="last")
    assert bundle.corpus.ids(range(3)) == last["item"].tolist()[:3]
    assert (bundle.encoding.item, bundle.encoding.user, bundle.encoding.time) == ("item", "user", "time")


def test_search_gives_the_first_stages_best(shop_bundle: Path) -> None:
    bundle = Bundle.load(shop_bundle)
    queries = np.load(current(shop_bundle) / "queries.npy")
    assert len(queries) == 40  # the requests of the last training day
    scores, rows = bundle.index.search(queries, 24)
    everything = queries @ bundle.scorer.item_vectors(bundle.corpus.features).T
    np.testing.assert_allclose(scores, -np.sort(-everything, axis=1)[:, :24], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(everything, rows, axis=1), rtol=1e-5, atol=1e-6)


def test_items_of_recflows_layout_come_from_the_log(recflow_bundle: Path) -> None:
    bundle = Bundle.load(recflow_bundle)
    videos = bundle.corpus.features["video"]
    assert bundle.corpus.ids(range(len(videos))) == (videos.astype(int) - 1).tolist()
    assert len(set(videos.tolist())) == len(videos)


def test_items_of_a_log_of_indices(tmp_path: Path) -> None:
    """Their raw values are the indices; ``--item`` may name another field."""
    log, run = write_log(tmp_path / "log"), tmp_path / "run"
    sizes = ("--emb_dim=4", "--nn_units=8", "--batch_size=20", "--loss_type=bce", "--epochs=0")
    run_train.main(shop_arguments(log, run, *sizes, f"--cascade={log / 'shop.toml'}"))
    export_run(run, tmp_path / "bundle", data_dir=log)
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.corpus.ids(range(len(bundle.corpus))) == bundle.corpus.features["product"].tolist()
    export_run(run, tmp_path / "bundle", data_dir=log, item="shop")
    assert Bundle.load(tmp_path / "bundle").corpus.item == "shop"
    with pytest.raises(
        InputError, match=r"run: does not say how raw values became indices; name its log with --data_dir"
    ):
        export_run(run, tmp_path / "bundle")


# ---- new versions ----------------------------------------------------------------------------------------------------


def test_new_items_without_training(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    """An item that nobody has seen has the unknown rows; the old version, and who uses it, is as before."""
    before, old, opened = current(bundle), content(current(bundle)), Bundle.load(bundle)
    index_corpus(bundle, new_items(shop, tmp_path))
    assert current(bundle) != before and content(before) == old and len(versions(bundle)) == 2
    made = Bundle.load(bundle)
    assert made.corpus.ids(range(3))[2] == "sku-new" and made.corpus.values("title", [2]) == ["New"]
    assert made.corpus.features["item"][2] == made.schema.tables["item"].unknown
    rows = opened.corpus.rows_of(pa.array(made.corpus.ids([0, 1])))
    known = {name: values[:2] for name, values in made.corpus.features.items() if name in ("item", "brand", "shop")}
    assert all(np.array_equal(values, opened.corpus.features[name][rows]) for name, values in known.items())
    np.testing.assert_allclose(made.index.vectors, made.scorer.item_vectors(made.corpus.features), rtol=1e-6)
    queries = (current(bundle) / "queries.npy").read_bytes()
    assert queries == old["queries.npy"]


def test_the_kind_of_index_stays(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    index_corpus(bundle, shop.corpus or Path(), index="ivf", recall=0.9)
    choice = Bundle.load(bundle).index.choice
    assert choice.kind == "ivf" and choice.recall >= 0.9 and choice.queries == 40
    index_corpus(bundle, new_items(shop, tmp_path))
    assert (Bundle.load(bundle).index.choice.kind, Bundle.load(bundle).index.choice.target) == ("ivf", 0.9)


def test_old_versions_may_go(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    """What serves one of them does not notice."""
    opened, items = Bundle.load(bundle), new_items(shop, tmp_path)
    index_corpus(bundle, items, keep=1)
    assert versions(bundle) == [current(bundle).name]
    assert len(opened.corpus.ids(range(len(opened.corpus)))) == len(opened.corpus)
    assert opened.index.search(opened.index.vectors[:1], 3)[1].shape == (1, 3)
    assert len(Bundle.load(bundle).corpus) == 3


def test_a_failure_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path) -> None:
    before = content(bundle)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    pd.DataFrame({"item": ["a"]}).to_parquet(tmp_path / "short.parquet")
    for name in ("bad", "short"):
        with pytest.raises(InputError, match=name):
            index_corpus(bundle, tmp_path / f"{name}.parquet")

    def stopped(folder: Path) -> Mapping[str, Any]:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_version(bundle, stopped)
    assert content(bundle) == before


def test_what_a_killed_process_leaves_is_removed(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    left = bundle / "versions/.new.123.tmp"
    left.mkdir()
    (left / "vectors.npy").touch()
    Bundle.load(bundle)
    index_corpus(bundle, new_items(shop, tmp_path))
    assert not left.exists()
    (tmp_path / "begun/versions").mkdir(parents=True)  # killed before its first version was there
    (tmp_path / "begun/.lock").touch()
    export_run(shop.run, tmp_path / "begun", corpus=new_items(shop, tmp_path))
    assert len(Bundle.load(tmp_path / "begun").corpus) == 3


def test_one_writer_at_a_time(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    items, before = new_items(shop, tmp_path), content(bundle)
    with locked(bundle / ".lock"), pytest.raises(InputError, match=r"bundle: another process is writing a version"):
        index_corpus(bundle, items)
    assert content(bundle) == before


def test_no_folder_of_other_files_is_written_to(shop: Trained, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(InputError, match=r"--output=.*other: is there already and is no bundle; name another folder"):
        export_run(shop.run, tmp_path / "other", corpus=shop.corpus)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["retrieval.safetensors", "items.arrow", "item.brand.npy", "vectors.npy", "encoding/brand.npy", "keys.npy"]
)
def test_a_damaged_file(name: str, bundle: Path) -> None:
    path = current(bundle) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 4] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        InputError, match=f"{name}: does not match its checksum in manifest.json, so it is damaged or of"
    ):
        Bundle.load(bundle)


def test_a_flipped_bit_anywhere(bundle: Path) -> None:
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != ".lock"]
    for path in flips(sorted(files), 80):
        with pytest.raises(InputError) as error:
            Bundle.load(bundle)
        assert str(path.parent) in str(error.value)
    Bundle.load(bundle)


def edited(path: Path, **changes: Any) -> None:
    """Change a JSON file and write it with a sound checksum."""
    write_json(path, read_json(path) | changes)


def _missing(version: Path) -> None:
    (version / "rank.safetensors").unlink()


def _too_many(version: Path) -> None:
    (version / "more.safetensors").touch()


def _link(version: Path) -> None:
    (version / "keys.npy").rename(version.parent / "keys.npy")
    (version / "keys.npy").symlink_to(version.parent / "keys.npy")


def _torn(version: Path) -> None:
    (version / "manifest.json").write_text('{"format": 1')


def _foreign(version: Path) -> None:
    """The manifest of another version, with a sound checksum."""
    edited(version / "manifest.json", created="20200101T000000Z")


def _nowhere(version: Path) -> None:
    edited(version.parents[1] / "current.json", version="20200101T000000Z-00000000")


def _outside(version: Path) -> None:
    edited(version.parents[1] / "current.json", version="../../elsewhere")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_missing, "rank.safetensors: no such file; copy the whole bundle again"),
        (_too_many, "more.safetensors: not a file of this version; remove it"),
        (_link, "keys.npy: does not match its checksum"),
        (_torn, "manifest.json: not readable"),
        (_foreign, "manifest.json: is not of version 2"),
        (_nowhere, "manifest.json: not readable .*No such file"),
        (_outside, "current.json: not readable .*is no version"),
    ],
)
def test_a_damaged_bundle(damage: Callable[[Path], None], problem: str, bundle: Path) -> None:
    damage(current(bundle))
    with pytest.raises(InputError, match=problem):
        Bundle.load(bundle)


def test_files_of_two_versions_are_no_version(shop: Trained, bundle: Path, tmp_path: Path) -> None:
    """Each is sound in its own."""
    before = current(bundle)
    index_corpus(bundle, new_items(shop, tmp_path))
    shutil.copy(before / "vectors.npy", current(bundle))
    with pytest.raises(InputError, match=r"vectors.npy: does not match its checksum"):
        Bundle.load(bundle)
    shutil.copy(before / "vectors.npy", current(bundle))
    shutil.copy(before / "manifest.json", current(bundle))
    with pytest.raises(InputError, match=r"manifest.json: is not of version 2"):
        Bundle.load(bundle)


def renamed(bundle: Path, **changes: Any) -> None:
    """Change the manifest, and name the version by it: as somebody would who means it."""
    version = current(bundle)
    edited(version / "manifest.json", **changes)
    digits = json.loads((version / "manifest.json").read_text())["checksum"][:8]
    name = f"{version.name.partition('-')[0]}-{digits}"
    version.rename(version.parent / name)
    edited(bundle / "current.json", version=name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format 2, not 1; export the run with this version of lcron"),
        ({"emb_dim": 1 << 40}, "emb_dim, nn_units or dtype is out of range"),
        ({"emb_dim": 8}, "but the model wants"),
        ({"dtype": "object"}, "emb_dim, nn_units or dtype is out of range"),
        ({"items": "many"}, "field items is missing or damaged"),
        ({"index": {"kind": "flat", "more": 1}}, "field index is damaged"),
        ({"item": "sku"}, "not a readable corpus"),
    ],
)
def test_a_manifest_that_says_what_cannot_be(changes: dict[str, Any], problem: str, bundle: Path) -> None:
    renamed(bundle, **changes)
    with pytest.raises(InputError, match=problem):
        Bundle.load(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"current.json: no such file; .* is no bundle, make one with lcron export"):
        Bundle.load(tmp_path)


# ---- models ----------------------------------------------------------------------------------------------------------


OWN = "tests.models.own_models"


def trained_with(log: Path, folder: Path, **models: str) -> tuple[Path, Path]:
    """(run, cascade file) of two stages with these models, untrained."""
    text = "".join(f"[[stages]]\nname = '{name}'\nmodel = '{model}'\nkeep = 20\n" for name, model in models.items())
    groups = "[[groups]]\nname = 'rank_pos'\nindex_field = 'rank_index'\n[[groups]]\nname = 'rank_neg'\nposition = 23\n"
    (folder / "own.toml").write_text(f"{text}{groups}")
    run_train.main(training_arguments(log, folder / "run", "--epochs=0", f"--cascade={folder / 'own.toml'}"))
    return folder / "run", folder / "own.toml"


def test_own_models_are_imported_only_where_the_user_names_them(log: Path, tmp_path: Path) -> None:
    run, file = trained_with(log, tmp_path, retrieval=f"{OWN}:Towers", rank=f"{OWN}:Bilinear")
    cascade, sentence = (
        Cascade.from_toml(file),
        "names 'tests.models.own_models:Towers', which is none of this project's",
    )
    with pytest.raises(InputError, match=sentence):
        export_run(run, tmp_path / "bundle", data_dir=log)
    export_run(run, tmp_path / "bundle", data_dir=log, cascade=cascade)
    with pytest.raises(InputError, match=sentence):
        Bundle.load(tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle", cascade)
    assert [type(model).__name__ for model in bundle.scorer.models.values()] == ["Towers", "Bilinear"]
    features = open_log(log).open_day(DAYS[0], TWO_STAGE).batch(np.arange(4)).features
    items = {name: values.numpy() for name, values in features.item.items()}
    vectors = [bundle.scorer.item_vectors({name: values[row] for name, values in items.items()}) for row in range(4)]
    dots = np.einsum("bd,bnd->bn", bundle.scorer.user_vectors_of(features), np.stack(vectors))
    np.testing.assert_allclose(dots, bundle.scorer.scores("retrieval", features), atol=1e-5)
    other = Cascade.from_json(cascade.to_json() | {"num_relevant": 3}, "other")
    with pytest.raises(InputError, match=r"of another cascade than own"):
        Bundle.load(tmp_path / "bundle", other)


def test_the_first_stage_must_have_vectors(log: Path, tmp_path: Path) -> None:
    run, _ = trained_with(log, tmp_path, retrieval="mlp", rank="din")
    with pytest.raises(InputError, match=r"stage retrieval: its model MLP has no user_vectors, so no index can search"):
        export_run(run, tmp_path / "bundle", data_dir=log)
    assert not (tmp_path / "bundle/current.json").exists()


def test_models_of_other_code_or_another_run(shop: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shop.run, tmp_path / "run"))
    config = read_json(run / "config.json")
    config["code"]["files"] = {"models/dssm.py": "other"}
    write_json(run / "config.json", config)
    with pytest.raises(InputError, match=r"was trained by other code: .*--any_code"):
        export_run(run, tmp_path / "bundle", corpus=shop.corpus)
    export_run(run, tmp_path / "bundle", corpus=shop.corpus, any_code=True)
    write_json(run / "config.json", config | {"arguments": config["arguments"] | {"seed": 31}})
    with pytest.raises(InputError, match=r"is of another run than the config.json beside it"):
        export_run(run, tmp_path / "bundle", corpus=shop.corpus, any_code=True)


def test_another_log_is_refused(shop: Trained, recflow: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its fields or id counts differ from those of the run's data"):
        export_run(shop.run, tmp_path / "bundle", corpus=shop.corpus, data_dir=recflow.log)


def test_what_to_give_for_the_corpus(shop: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--corpus is missing; .* item, brand, shop, price, stock: .* imported from"):
        export_run(shop.run, tmp_path / "bundle")
    with pytest.raises(InputError, match=r"log: holds indices that were made of raw values; .*--corpus"):
        export_run(shop.run, tmp_path / "bundle", data_dir=shop.log)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_the_commands(shop: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, items = tmp_path / "bundle", new_items(shop, tmp_path)
    corpus = f"--corpus={items}"
    assert main(["export", f"--run={shop.run}", corpus, f"--output={bundle}", "--index=hnsw", "--recall=0.9"]) == 0
    first = Bundle.load(bundle)
    assert (first.index.choice.kind, first.index.choice.target, first.index.choice.queries) == ("hnsw", 0.9, 3)
    assert main(["index", f"--bundle={bundle}", corpus, "--index=flat", "--keep=1"]) == 0
    assert Bundle.load(bundle).index.choice.kind == "flat" and len(versions(bundle)) == 1
    for flag, sentence in (("--recall=2", "--recall=2.0: is a share above 0"), ("--keep=0", "--keep=0: is 1 or more")):
        assert main(["index", f"--bundle={bundle}", corpus, flag]) == 2
        assert sentence in capsys.readouterr().err


def test_a_file_system_without_hard_links(
    shop: Trained, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refused)
    index_corpus(bundle, new_items(shop, tmp_path))
    assert len(Bundle.load(bundle).corpus) == 3
    assert export.os.link is refused
