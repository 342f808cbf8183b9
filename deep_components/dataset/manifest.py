"""The manifest of a log: size and SHA-256 of each of its files, so that bit rot in them does not pass unseen.

Feather and pickle files do not protect themselves. ``others/manifest.json`` is optional; where it is, a file is
compared with it before it is used, which for a day's files is once, when its cache is built.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deep_components.cli import progress
from deep_components.errors import InputError
from deep_components.files import read_json, sha256_of, write_json

MANIFEST_FILE = "others/manifest.json"


def write_manifest(root: Path, paths: Iterable[Path]) -> int:
    """Write the manifest of the log in ``root`` for the files at ``paths``; returns their number. InputError when one
    cannot be read or the manifest cannot be written."""
    files = {str(path.relative_to(root)): _entry(path) for path in progress(list(paths), "manifest", "file")}
    write_json(root / MANIFEST_FILE, {"files": files})
    return len(files)


def read_manifest(root: Path) -> dict[str, Any] | None:
    """File (relative to ``root``) -> {"size", "sha256"}; None where there is no manifest.

    Raises InputError when it is damaged.
    """
    path = root / MANIFEST_FILE
    try:
        files = read_json(path, must_have_checksum=True)["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); write it again with doctor --write_manifest") from error
    return dict(files)


def verify(root: Path, paths: Iterable[Path], sizes_only: bool = False) -> None:
    """InputError when a manifest is in ``root`` and one of the files is not as it says."""
    manifest = read_manifest(root)
    if manifest is None:
        return
    for path in paths:
        expected = manifest.get(str(path.relative_to(root)))
        if expected is None:
            raise InputError(
                f"{path}: not listed in {MANIFEST_FILE}; if the file is sound, write that again with "
                "doctor --write_manifest"
            )
        size = _entry(path, size_only=True)["size"]
        if size != expected["size"]:
            what = f"has {size} bytes, not the {expected['size']}"
        elif not sizes_only and _entry(path)["sha256"] != expected["sha256"]:
            what = "has not the SHA-256"
        else:
            continue
        raise InputError(
            f"{path}: {what} that {MANIFEST_FILE} names, so it is damaged or was replaced; fetch the file again"
        )


def _entry(path: Path, size_only: bool = False) -> dict[str, Any]:
    try:
        return {"size": path.stat().st_size, "sha256": None if size_only else sha256_of(path)}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from error
