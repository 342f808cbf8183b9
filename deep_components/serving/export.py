"""A trained run -> a version of a bundle; and a version of the same models with another corpus."""

import argparse
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.cascade import Cascade
from deep_components.dataset.encoding import Encoding, RawEncoding
from deep_components.dataset.log import Log, encoding_of, load_encoding, open_log, with_item
from deep_components.dataset.rows import RawRows, items_of_log, open_rows
from deep_components.errors import InputError
from deep_components.evaluation.checks import (
    check_cascade,
    check_encoding,
    check_log,
    check_same_log,
    checked_code,
    time_zone_of,
)
from deep_components.files import NpyWriter, map_npy
from deep_components.runs.folder import ENCODING_FOLDER, cascade_of, model_file, read_training
from deep_components.runs.state import check_same_run
from deep_components.serving import bundle
from deep_components.serving.corpus import Corpus, write_corpus
from deep_components.serving.index import RECALL, build_index
from deep_components.serving.scorer import Scorer

QUERIES = 256  # requests of the log on which the index is measured

_ITEMS_AT_A_TIME = 1 << 14
_REQUESTS_AT_A_TIME = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What is known of a run that is to be served."""

    folder: Path
    config: Mapping[str, Any]
    cascade: Cascade
    log: Log | None
    zone: str
    encoding: RawEncoding

    @property
    def arguments(self) -> argparse.Namespace:
        return argparse.Namespace(**self.config["arguments"])


def export_run(
    run: Path,
    output: Path,
    corpus: Path | None = None,
    data_dir: Path | None = None,
    cascade: Cascade | None = None,
    item: str | None = None,
    index: str = "auto",
    recall: float = RECALL,
    any_code: bool = False,
    cache_dir: Path | None = None,
    keep: int | None = None,
) -> str:
    """Add a version of the run to the bundle in ``output``, made if need be; returns the version's name.

    Args:
        corpus: table of the items: Parquet, CSV or Feather, a file or a folder; None: the items of the log.
        data_dir: the run's log: needed where the run has no encoding of its own, and for a corpus from the log; the
            index is measured on its requests.
        cascade: what the run must be of; needed where a stage's model is one of your own.
        item: raw column that names an item, where the encoding does not say.
        index, recall: ``kind`` and ``target`` of :func:`~deep_components.serving.index.build_index`.
        any_code: export a run that was trained by other code.

    Raises:
        InputError: the run, the log or the corpus cannot be used; the bundle stays as it was.
    """
    opened = _open(run, data_dir, cascade, item, any_code, cache_dir)
    rows = _items(opened, corpus)

    def write(folder: Path) -> dict[str, Any]:
        opened.encoding.save(folder / bundle.ENCODING)
        for stage in opened.cascade.stage_names:
            check_same_run(run / model_file(stage), opened.config)
            shutil.copyfile(run / model_file(stage), folder / model_file(stage))
        about = _about(opened)
        scorer = bundle.load_scorer(folder, opened.cascade, opened.encoding.schema, about, "cpu")
        queries = _users(opened, scorer, cache_dir)
        about |= _write_items(folder, rows, opened.encoding, scorer)
        del scorer  # its tables may take as much memory as the index
        return about | _write_index(folder, queries, opened.cascade, index, recall)

    return bundle.write_version(output, write, keep)


def index_corpus(
    folder: Path,
    corpus: Path,
    cascade: Cascade | None = None,
    index: str | None = None,
    recall: float | None = None,
    keep: int | None = None,
) -> str:
    """Add a version with another corpus to a bundle, with the models and the encoding of the current one, and make it
    the current one. ``index`` and ``recall``: None as the current version was made. Errors as of :func:`export_run`."""
    before = folder / bundle.VERSIONS / bundle.current_version(folder)
    manifest = bundle.read_manifest(before)
    own = Cascade.from_json(manifest["cascade"], str(before / bundle.MANIFEST_FILE))
    check_cascade(folder, own, cascade)
    bundle.verify_files(before, manifest["files"])
    encoding = load_encoding(before / bundle.ENCODING)
    encoding.item = manifest["item"]
    rows = open_rows(corpus, "--corpus", _types(encoding))
    choice = bundle.index_choice(before, manifest)
    kept = [f"{bundle.ENCODING}/{path.name}" for path in (before / bundle.ENCODING).iterdir()]

    def write(new: Path) -> dict[str, Any]:
        (new / bundle.ENCODING).mkdir()
        for name in (*kept, *map(model_file, own.stage_names)):
            _link(before / name, new / name)
        scorer = bundle.load_scorer(new, own, encoding.schema, manifest, "cpu")
        about = {name: manifest[name] for name in _ABOUT} | _write_items(new, rows, encoding, scorer)
        del scorer
        queries = np.array(map_npy(before / bundle.QUERIES_FILE))
        return about | _write_index(new, queries, own, index or choice.asked, recall or choice.target)

    return bundle.write_version(folder, write, keep)


def _open(
    run: Path, data_dir: Path | None, cascade: Cascade | None, item: str | None, any_code: bool, cache_dir: Path | None
) -> _Run:
    config = read_training(run)
    own = cascade_of(run, config)
    log = None if data_dir is None else open_log(data_dir)
    check_cascade(run, own, cascade)
    check_encoding(run, config)
    if log is not None:
        check_log(run, config, log)
    checked_code(run, config, own, any_code)
    zone = time_zone_of(run, config, None)
    if log is not None:
        check_same_log(run, config, log, own, cache_dir, zone)
    length = config["arguments"]["seq_len"]
    if log is not None:
        return _Run(run, config, own, log, zone, encoding_of(log, zone, length, item))
    if not config.get("encoding_checksum"):
        raise InputError(f"{run}: does not say how raw values became indices; name its log with --data_dir")
    encoding = with_item(Encoding.load(run / ENCODING_FOLDER), length, item)
    return _Run(run, config, own, None, zone, encoding)


def _items(run: _Run, corpus: Path | None) -> RawRows:
    if corpus is not None:
        return open_rows(corpus, "--corpus", _types(run.encoding))
    if run.log is None:
        raise InputError(
            "--corpus is missing; name a table with a row an item and the columns "
            f"{', '.join(dict.fromkeys([run.encoding.item, *run.encoding.columns('item')]))}: the one that the log was "
            "imported from will do"
        )
    return items_of_log(run.log, run.cascade)


def _types(encoding: RawEncoding) -> dict[str, Any]:
    return encoding.columns("item")


_ABOUT = ("run", "cascade", "emb_dim", "nn_units", "seq_len", "dtype", "zone")


def _about(run: _Run) -> dict[str, Any]:
    """What the manifest says of the models."""
    arguments, code = run.arguments, run.config.get("code") or {}
    about = {"seed": arguments.seed, "loss_type": arguments.loss_type, "code": code.get("total")}
    values = {"run": about | {"data": run.config["data"]}, "cascade": run.cascade.to_json(), "zone": run.zone}
    return values | {name: getattr(arguments, name) for name in ("emb_dim", "nn_units", "seq_len", "dtype")}


def _write_items(folder: Path, rows: RawRows, encoding: RawEncoding, scorer: Scorer) -> dict[str, Any]:
    """Write corpus and vectors; returns what the manifest says of the former."""
    about = write_corpus(folder, rows, encoding)
    logger.info("%s: %s items", rows.name, f"{about['items']:,}")
    if about["repeated"]:
        logger.info("%s: %s rows of items that come again later, left out", rows.name, f"{about['repeated']:,}")
    corpus = Corpus.load(folder, about["item"], about["id_type"], encoding.schema)
    _write_vectors(folder / bundle.VECTORS_FILE, corpus, scorer)
    return about


def _write_index(folder: Path, queries: np.ndarray, cascade: Cascade, kind: str, target: float) -> dict[str, Any]:
    """Write the index of the vectors, and what it was measured on; returns what the manifest says of it."""
    vectors = map_npy(folder / bundle.VECTORS_FILE)
    np.save(folder / bundle.QUERIES_FILE, queries.astype(np.float32).reshape(-1, vectors.shape[1]))
    index = build_index(vectors, kind, queries, cascade.stages[0].keep, target, folder / bundle.INDEX_FILE)
    return {"index": index.choice.to_json()}


def _write_vectors(path: Path, corpus: Corpus, scorer: Scorer) -> None:
    def vectors(first: int) -> np.ndarray:
        some = {name: values[first : first + _ITEMS_AT_A_TIME] for name, values in corpus.features.items()}
        made = scorer.item_vectors(some)
        if not np.isfinite(made).all():
            raise InputError("the models give items vectors that are not finite; train again with a lower --lr")
        return made

    width = vectors(0).shape[1]
    with NpyWriter(path, np.dtype(np.float32), (len(corpus), width)) as file:
        for first in range(0, len(corpus), _ITEMS_AT_A_TIME):
            file.write(vectors(first))


def _users(run: _Run, scorer: Scorer, cache_dir: Path | None) -> np.ndarray:
    """Vectors [Q, d] of requests spread over the log's last training day; [0, 0] without a log."""
    days = [] if run.log is None else sorted(set(run.config["train_days"]) & set(run.log.days(named=True)))
    if run.log is None or not days:
        return np.zeros((0, 0), np.float32)
    day = run.log.open_day(days[-1], run.cascade, cache_dir, run.zone, run.arguments.seq_len)
    rows = np.unique(np.linspace(0, len(day) - 1, min(QUERIES, len(day))).astype(np.int64))
    parts = (day.batch(rows[k : k + _REQUESTS_AT_A_TIME]) for k in range(0, len(rows), _REQUESTS_AT_A_TIME))
    return np.concatenate([scorer.user_vectors_of(batch.features) for batch in parts])


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
