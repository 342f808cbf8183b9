"""Atomic writing: the old file or the new one, never half of one, and no litter; checksums of JSON; locks."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from deep_components.errors import InputError
from deep_components.files import (
    atomic_path,
    copy_folder,
    folder_checksum,
    locked,
    read_json,
    remove_folder,
    temporaries,
    write_atomically,
    write_json,
)


def test_writes_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file with blanks.txt"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_disk_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    message = r"file: cannot be written \(No space left on device\)"
    with pytest.raises(InputError, match=message), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "inside", lambda file: file.write(b"new"))


def test_the_target_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "folder", lambda file: file.write(b"new"))
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_the_new_file_appears_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one folder is atomic
    assert path.read_bytes() == b"new"


# ---- JSON with a checksum --------------------------------------------------------------------------------------------


def test_json_with_a_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.json"
    content = {"float": 0.1 + 0.2, "text": "ä\n", "list": [1, None, True], "path": tmp_path, "nested": {"b": 1, "a": 2}}
    write_json(path, content)
    assert read_json(path) == content | {"path": str(tmp_path)}
    text = path.read_text()
    path.write_text(text.replace("0.30000000000000004", "0.3"))
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_json(path)
    assert not caplog.records


def test_json_without_a_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert f"{path}: has no checksum" in caplog.text
    with pytest.raises(ValueError, match="checksum"):
        read_json(path, must_have_checksum=True)


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_a_lock_excludes_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a"
    with locked(path) as ours:
        assert ours is not None
        with locked(path, wait=0) as theirs, locked(path, shared=True, wait=0.15) as reading:
            assert theirs is None and reading is None
    with locked(path, wait=0) as free:
        assert free is not None


def test_shared_locks_do_not_exclude_one_another(tmp_path: Path) -> None:
    with locked(tmp_path / "a", shared=True) as one, locked(tmp_path / "a", shared=True, wait=0) as other:
        assert one is not None and other is not None
        with locked(tmp_path / "a", wait=0) as alone:
            assert alone is None


def test_where_nothing_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "lock", shared=True) as reading:
        assert reading is not None
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock"):
        pass
    no_locks = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    with mock.patch("fcntl.flock", no_locks), locked(tmp_path / "a", shared=True) as reading:
        assert reading is not None
    with mock.patch("fcntl.flock", no_locks), pytest.raises(OSError, match="No locks"), locked(tmp_path / "a"):
        pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of two files."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"1")
    (folder / "b.json").write_bytes(b"2")
    return folder


def test_the_checksum_of_a_folder(source: Path) -> None:
    """Of names and contents, and of nothing else."""
    checksum = folder_checksum(source)
    assert folder_checksum(source / "absent") is None
    (source / "a.npy").touch()
    assert folder_checksum(source) == checksum
    (source / "a.npy").rename(source / "c.npy")
    renamed = folder_checksum(source)
    (source / "c.npy").write_bytes(b"3")
    assert len({checksum, renamed, folder_checksum(source)}) == 3


@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe"])
def test_a_folder_of_plain_files_only(kind: str, source: Path) -> None:
    odd = source / "odd"
    if kind == "a link":
        odd.symlink_to(source / "a.npy")
    else:
        odd.mkdir() if kind == "a folder" else os.mkfifo(odd)
    with pytest.raises(InputError, match="odd: not a plain file; remove it"):
        folder_checksum(source)


def test_a_copied_folder(source: Path, tmp_path: Path) -> None:
    checksum = folder_checksum(source)
    assert checksum is not None
    copy_folder(source, tmp_path / "copy", checksum)
    assert folder_checksum(tmp_path / "copy") == checksum
    (source / "a.npy").write_bytes(b"another")
    with pytest.raises(InputError, match="source: changed while it was read"):
        copy_folder(source, tmp_path / "again", checksum)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy"}


def test_an_interrupted_copy_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with mock.patch("shutil.copyfile", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        copy_folder(source, tmp_path / "copy", "")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_removed_folder(source: Path, tmp_path: Path) -> None:
    """A link is removed, not what it names; a removal that is killed leaves a temporary folder, never a part."""
    (tmp_path / "link").symlink_to(source)
    remove_folder(tmp_path / "link")
    remove_folder(tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    with mock.patch("shutil.rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        remove_folder(source)
    (left,) = tmp_path.iterdir()
    assert temporaries(source) == [left]
    source.mkdir()
    remove_folder(source)
    assert list(tmp_path.iterdir()) == []
