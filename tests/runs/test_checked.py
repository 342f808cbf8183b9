"""The writer and reader of checksummed safetensors files: safetensors' own bytes, a block at a time."""

import errno
import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as safetensors_bytes

from deep_components.errors import InputError
from deep_components.runs import checked
from deep_components.runs.checked import Blocks, CheckedFile, load, save, written_order
from deep_components.runs.state import copy_model, load_model, save_models

TYPES = (
    *("bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "float64", "int64"),
    *("uint64", "complex64"),
)
NAMES = ("tower.0.weight", "Z", "\u00e9", '"\\', "\n\t\x01\x7f", "\u65e5", "</>", "\U0001f600", "ids.video", "a", "b")


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    """Of random names, types, and shapes of none to three axes, some of them without values."""
    rng = np.random.default_rng(seed)
    return {
        str(name): rng.integers(0, 2, rng.integers(0, 5, size=rng.integers(4))).astype(rng.choice(TYPES))
        for name in rng.permutation(NAMES)[: rng.integers(len(NAMES) + 1)]
    }


def in_blocks(values: np.ndarray, size: int) -> np.ndarray | Blocks:
    pieces = (values[first : first + size] for first in range(0, len(values), size)) if values.ndim else ()
    return Blocks(values.shape, values.dtype, pieces) if values.ndim else values


def bytes_of_safetensors(arrays: dict[str, np.ndarray], note: dict[str, object]) -> bytes:
    """With the checksums as runs/state.py describes them, made by safetensors from whole arrays."""
    sealed = dict(note) | {
        "tensor_sha256": {
            name: hashlib.sha256(
                json.dumps([f"torch.{values.dtype}", list(values.shape)]).encode() + values.tobytes()
            ).hexdigest()
            for name, values in arrays.items()
        }
    }
    sealed["sha256"] = hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
    return safetensors_bytes(arrays, metadata={"run": json.dumps(sealed, sort_keys=True)})


@pytest.mark.parametrize("seed", range(12))
def test_the_bytes_are_those_of_safetensors(seed: int, tmp_path: Path) -> None:
    """Of whole arrays and of blocks; and they are read back, whole or in blocks."""
    arrays, note, size = random_arrays(seed), {"a": 1, "\u00e9": '"\\\n', "z": None}, seed % 4 + 1
    path = tmp_path / "file"
    checksum = save(path, arrays, note)
    whole = path.read_bytes()
    assert whole == bytes_of_safetensors(arrays, note)
    assert save(path, {name: in_blocks(values, size) for name, values in arrays.items()}, note) == checksum
    assert path.read_bytes() == whole
    loaded, metadata = load(path)
    assert metadata == note and loaded.keys() == arrays.keys()
    file = CheckedFile(path)
    assert file.checksum == checksum
    for name, values in arrays.items():
        assert loaded[name].dtype == values.dtype == file.dtypes[name] and np.array_equal(loaded[name], values)
        if values.ndim:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checked, "_BLOCK_BYTES", 8 * size)
                assert np.array_equal(np.concatenate(list(file.blocks(name))), values)


def test_arrays_are_asked_for_in_the_order_that_is_told(tmp_path: Path) -> None:
    asked: list[str] = []

    def blocks(name: str) -> Iterator[np.ndarray]:
        asked.append(name)
        yield np.zeros(2, name[1:])

    names = ("bint8", "afloat32", "bfloat32", "aint64", "aint8")
    arrays = {name: Blocks((2,), np.dtype(name[1:]), blocks(name)) for name in names}
    save(tmp_path / "file", arrays, {})
    assert asked == written_order(arrays) == ["aint64", "afloat32", "bfloat32", "aint8", "bint8"]


def test_no_array_is_in_memory_whole(tmp_path: Path) -> None:
    rows, block = 1 << 17, np.ones((1 << 10, 8))  # 8 MB in blocks of 64 KB
    table = Blocks((rows, 8), block.dtype, (block for _ in range(rows // len(block))))
    tracemalloc.start()
    try:
        save_models(tmp_path, {"rank": {"embedding.video": table}}, {})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert np.array_equal(load_model(tmp_path, "rank").arrays["embedding.video"], np.ones((rows, 8)))


def test_a_model_is_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "_BLOCK_BYTES", 32)
    arrays = {"embedding.video": np.arange(20.0).reshape(10, 2), "bias": np.ones(3, np.float32), "n": np.array(4)}
    ids = {"video": np.arange(0, 20, 2)}
    save_models(tmp_path / "best", {"rank": arrays}, {"step": 1}, ids)
    save_models(tmp_path / "expected", {"rank": arrays}, {"step": 2}, ids)
    copy_model(tmp_path / "best", tmp_path / "run", "rank", {"step": 2})
    name = "rank.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    damaged = bytearray((tmp_path / "best" / name).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "best" / name).write_bytes(damaged)
    with pytest.raises(InputError, match=r"best/rank\.safetensors: damaged"):
        copy_model(tmp_path / "best", tmp_path / "other", "rank", {"step": 2})
    assert not list((tmp_path / "other").iterdir())


def test_a_disk_that_is_full_before_the_last_block(tmp_path: Path) -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield np.zeros(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path / "file", {"a": np.ones(1)}, {})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(InputError, match=r"file: cannot be written \(No space left on device\); free the space"):
        save(tmp_path / "file", {"a": Blocks((4,), np.dtype(float), blocks())}, {})
    assert list(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_bytes() == before


def test_a_type_that_no_such_file_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(safetensors files have no type complex128\)"):
        save(tmp_path / "file", {"a": np.zeros(2, complex)}, {})
    assert not list(tmp_path.iterdir())
