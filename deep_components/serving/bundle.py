"""A bundle: all that serving a cascade needs, in one folder of versions, of which one is current.

::

    current.json             {"version": NAME}, replaced atomically
    versions/NAME/           never changed once it is there
        manifest.json        what the version is, and the size and SHA-256 of each of its files
        encoding/            how raw values become what models take
        <stage>.safetensors  the models, as the run has them
        items.arrow, item.<field>.npy, keys.npy, key_rows.npy    the corpus
        vectors.npy          [M, d] the items' vectors of the first stage
        queries.npy          [Q, d] vectors of users, on which the index was measured
        index.faiss          unless the index is flat

A name is the time and the first digits of the manifest's checksum, so files of two versions cannot pass for one.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deep_components.arguments import COMPACT_FROM, DTYPES
from deep_components.cascade import Cascade
from deep_components.checkpoint import check_sizes, trained_ids, trained_models
from deep_components.dataset.encoding import RawEncoding
from deep_components.dataset.log import load_encoding
from deep_components.errors import InputError
from deep_components.evaluation.checks import check_cascade
from deep_components.files import locked, make_folder, map_npy, read_json, remove, sha256_of, temporaries, write_json
from deep_components.runs.folder import MAX_EMB_DIM, MAX_NN_UNITS
from deep_components.schema import Schema, Table
from deep_components.serving.corpus import Corpus
from deep_components.serving.index import KINDS, IndexChoice, VectorIndex, open_index
from deep_components.serving.scorer import Scorer, check_retrieval
from deep_components.tables.id_set import IdSet

FORMAT = 1
CURRENT_FILE, VERSIONS, MANIFEST_FILE = "current.json", "versions", "manifest.json"
ENCODING, VECTORS_FILE, QUERIES_FILE, INDEX_FILE = "encoding", "vectors.npy", "queries.npy", "index.faiss"

_NAME = re.compile(r"\d{8}T\d{6}Z-([0-9a-f]{8})")
_NEW = "new"  # version that is being written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """One version of a bundle, opened.

    Attributes:
        folder: of the bundle; ``version`` the name.
        manifest: see :mod:`deep_components.serving.bundle`.
    """

    folder: Path
    version: str
    manifest: Mapping[str, Any]
    cascade: Cascade
    encoding: RawEncoding
    corpus: Corpus
    index: VectorIndex
    scorer: Scorer

    @property
    def schema(self) -> Schema:
        return self.encoding.schema

    @classmethod
    def load(cls, folder: Path, cascade: Cascade | None = None, device: str = "cpu") -> "Bundle":
        """The current version, every file of which is compared with its checksum.

        ``cascade`` must be given where it names models of one's own, as a bundle does not say which code is executed;
        then it must be the bundle's. InputError when a file is missing, damaged, too many or of another version.
        """
        version = current_version(folder)
        path = folder / VERSIONS / version
        manifest = read_manifest(path)
        own = Cascade.from_json(manifest["cascade"], str(path / MANIFEST_FILE))
        check_cascade(folder, own, cascade)
        verify_files(path, manifest["files"])
        encoding = load_encoding(path / ENCODING)
        scorer = load_scorer(path, own, encoding.schema, manifest, device)
        corpus = Corpus.load(path, manifest["item"], manifest["id_type"], encoding.schema)
        choice = index_choice(path, manifest)
        try:
            vectors = map_npy(path / VECTORS_FILE)
            if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(corpus):
                raise ValueError("vectors of other items")
        except (OSError, ValueError) as error:
            raise InputError(f"{path / VECTORS_FILE}: not readable ({error}); export the run again") from error
        index = open_index(vectors, choice, path / INDEX_FILE, torch.device(device).type == "cuda")
        return cls(folder, version, manifest, own, encoding, corpus, index, scorer)


def load_scorer(path: Path, cascade: Cascade, schema: Schema, manifest: Mapping[str, Any], device: str) -> Scorer:
    """The models in a version's folder. InputError when one is damaged, or the first has no vectors to search by."""
    sizes = {"emb_dim": manifest["emb_dim"], "nn_units": manifest["nn_units"]}
    check_sizes(path, cascade, schema, **sizes)
    ids = trained_ids(path, cascade, schema)
    large = {name: known for name, known in ids.items() if schema.tables[name].size >= COMPACT_FROM}
    models, stores, seed = trained_models(
        path, cascade, schema, **sizes, dtype=DTYPES[manifest["dtype"]], device=torch.device(device), ids=large
    )
    for name in ids.keys() - large.keys():  # a row for each id is less work for a request than to know which have one
        _fill_unknown([store.tables[name] for store in stores.values()], ids[name], schema.tables[name])
    check_retrieval(models[cascade.stages[0].name], cascade.stages[0].name)
    return Scorer(cascade, schema, models, stores, seed)


@torch.no_grad()
def _fill_unknown(tables: Sequence[torch.Tensor], known: IdSet, about: Table) -> None:
    """Give ids that were never trained the unknown one's row, where there is one."""
    if about.unknown is not None:
        missing = torch.from_numpy(~known.contains(np.arange(about.size)))
        for table in tables:
            table[missing.to(table.device)] = table[about.unknown].clone()


def index_choice(path: Path, manifest: Mapping[str, Any]) -> IndexChoice:
    """What the manifest of a version says of its index. InputError when it is damaged."""
    wanted = {field.name: field.type for field in fields(IndexChoice)}
    found = {name: type(value) for name, value in manifest["index"].items()}
    if found != wanted or manifest["index"]["kind"] not in KINDS[1:]:  # "auto" is none
        raise InputError(f"{path / MANIFEST_FILE}: field index is damaged; export the run again")
    return IndexChoice(**manifest["index"])


def current_version(folder: Path) -> str:
    """The name of a bundle's current version. InputError when the folder is no bundle, or damaged."""
    path = folder / CURRENT_FILE
    try:
        version = read_json(path, must_have_checksum=True)["version"]
        if not isinstance(version, str) or not _NAME.fullmatch(version):
            raise ValueError(f"{version!r} is no version")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {folder} is no bundle, make one with lcron export") from error
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); export the run again") from error
    return version


_FIELDS = {
    "created": str, "run": dict, "cascade": dict, "emb_dim": int, "nn_units": int, "seq_len": int, "dtype": str,
    "item": str, "id_type": str, "items": int, "index": dict, "files": dict,
}  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the version in a folder. InputError when it is damaged, of another format, or of another version
    than the folder's name says."""
    file = path / MANIFEST_FILE
    try:
        manifest = read_json(file, must_have_checksum=True)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{file}: format {manifest.get('format')!r}, not {FORMAT}; export the run with this version of lcron"
            )
        for name, kind in _FIELDS.items():
            if type(manifest.get(name)) is not kind:
                raise ValueError(f"field {name} is missing or damaged")
        sound = 0 < manifest["emb_dim"] <= MAX_EMB_DIM and 0 < manifest["nn_units"] <= MAX_NN_UNITS
        if not sound or manifest["dtype"] not in DTYPES:
            raise ValueError("emb_dim, nn_units or dtype is out of range")
        sums = [(entry["size"], entry["sha256"]) for entry in manifest["files"].values()]
        if not all((type(size), type(sha256)) == (int, str) for size, sha256 in sums):
            raise ValueError("a size or sha256 is damaged")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not readable ({error}); export the run again") from error
    digits = _NAME.fullmatch(path.name)
    if digits is None or digits[1] != _digits(file):
        raise InputError(f"{file}: is not of version {path.name}; copy the whole bundle again, or export the run again")
    return manifest


def _digits(manifest: Path) -> str:
    """The first digits of a manifest's checksum."""
    return str(json.loads(manifest.read_bytes())["checksum"])[:8]


def verify_files(path: Path, files: Mapping[str, Any]) -> None:
    """InputError unless the folder of a version holds just the files of its manifest, as it says."""
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    for name in sorted({MANIFEST_FILE, *files} - there):
        raise InputError(f"{path / name}: no such file; copy the whole bundle again, or export the run again")
    for name in sorted(there - {MANIFEST_FILE, *files}):
        raise InputError(f"{path / name}: not a file of this version; remove it, or export the run again")
    for name, entry in files.items():
        try:
            same = (path / name).lstat().st_size == entry["size"] and sha256_of(path / name) == entry["sha256"]
        except OSError as error:
            raise InputError(f"{path / name}: cannot be read ({error.strerror}); copy the bundle again") from error
        if not same:
            raise InputError(
                f"{path / name}: does not match its checksum in {MANIFEST_FILE}, so it is damaged or of another "
                "version; copy the whole bundle again, or export the run again"
            )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_version(folder: Path, write: Callable[[Path], Mapping[str, Any]], keep: int | None = None) -> str:
    """Add a version to the bundle in ``folder``, made if need be, and make it the current one; returns its name.

    ``write`` fills a temporary folder and returns what the manifest says beside format, time and files. Whatever ends
    this early, the bundle stays as it was. ``keep``: so many versions stay, this one and the newest of the rest; None:
    all.

    Raises InputError when the folder holds something else, cannot be written, or another process is writing there.
    """
    if folder.exists() and not (folder / CURRENT_FILE).exists() and not _is_begun(folder):
        raise InputError(f"--output={folder}: is there already and is no bundle; name another folder")
    make_folder(folder / VERSIONS)
    try:
        with only_writer(folder):
            name = _written(folder / VERSIONS, write)
            write_json(folder / CURRENT_FILE, {"version": name})
            others = [version for version in versions(folder) if version != name]
            for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
                remove(folder / VERSIONS / old)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); free the space or name another folder"
        ) from error
    return name


def versions(folder: Path) -> list[str]:
    """The names of a bundle's versions, the oldest first."""
    return sorted(path.name for path in (folder / VERSIONS).iterdir() if _NAME.fullmatch(path.name))


def _is_begun(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed first export leaves."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {VERSIONS, ".lock"}


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a bundle's lock. InputError when another process does."""
    with locked(folder / ".lock", wait=0) as free:
        if free is None:
            raise InputError(f"{folder}: another process is writing a version; wait for it")
        for leftover in temporaries(folder / VERSIONS / _NEW):
            remove(leftover)
        yield


def _written(parent: Path, write: Callable[[Path], Mapping[str, Any]]) -> str:
    temporary = parent / f".{_NEW}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        about = write(temporary)
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {str(p.relative_to(temporary)): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}
        created = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        write_json(temporary / MANIFEST_FILE, {"format": FORMAT, "created": created, **about, "files": files})
        for path in paths:
            _flush(path)
        name = f"{created}-{_digits(temporary / MANIFEST_FILE)}"
        _flush(temporary)
        if not (parent / name).exists():  # the same once more, within a second
            temporary.rename(parent / name)
        _flush(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def _flush(path: Path) -> None:
    """Have a file or folder on the disk, whatever happens to the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
