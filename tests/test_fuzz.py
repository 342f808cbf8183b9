"""A short, seeded part of benchmarks/fuzz.py."""

import random
from pathlib import Path

from benchmarks.fuzz import Fuzzer, Target, damage, make_targets
from deep_components.errors import InputError

EXECUTIONS = 100


def test_no_damage_passes_unseen(tmp_path: Path) -> None:
    fuzzer = Fuzzer(make_targets(tmp_path))
    for seed in range(EXECUTIONS):
        fuzzer.execute(seed)
    assert not fuzzer.findings
    assert fuzzer.counts["refused"] > EXECUTIONS / 5
    assert fuzzer.counts["read as it was"] > EXECUTIONS / 10  # caches that are built anew, mostly
    assert [target.path.read_bytes() for target in fuzzer.targets] == fuzzer.originals


def test_findings_are_seen(tmp_path: Path) -> None:
    """A reader that raises anything else, or speaks of another file, or gives something else."""
    path, sound = tmp_path / "file", b"sound" * 9
    path.write_bytes(sound)

    def refuse(error: Exception) -> dict[str, bytes]:
        if path.read_bytes() != sound:
            raise error
        return {}

    def read() -> dict[str, bytes]:
        return {"content": path.read_bytes()}

    for reader in (lambda: refuse(KeyError("a")), lambda: refuse(InputError("another: is damaged")), read):
        fuzzer = Fuzzer([Target(path, reader, protected=True)])
        for seed in range(20):
            fuzzer.execute(seed)
        assert fuzzer.counts["finding"] == len(fuzzer.findings) > 15


def test_damage_depends_on_its_seed() -> None:
    content = bytes(range(256)) * 4
    made = [damage(content, random.Random(seed), [content]) for seed in (*range(50), *range(50))]
    assert made[:50] == made[50:]
    assert len(set(made)) > 45
