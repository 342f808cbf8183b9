"""A short, seeded part of benchmarks/fuzz.py."""

import random
from pathlib import Path

from benchmarks.fuzz import Fuzzer, Target, damage
from deep_components.errors import InputError

EXECUTIONS = 100


def test_no_damage_passes_unseen(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    for seed in range(EXECUTIONS):
        fuzzer.execute(seed)
    assert not fuzzer.outcome.findings
    assert fuzzer.outcome.counts["refused"] > EXECUTIONS / 5
    assert fuzzer.outcome.counts["read as it was"] > EXECUTIONS / 5  # caches that are built anew, mostly
    assert [target.path.read_bytes() for target in fuzzer.targets] == fuzzer.originals


def test_findings_are_seen(tmp_path: Path) -> None:
    """A reader that raises anything else, or gives something else, or speaks of another file."""
    fuzzer = Fuzzer.__new__(Fuzzer)
    path = tmp_path / "file"

    def fails() -> dict[str, bytes]:
        raise KeyError("a")

    def blames_another() -> dict[str, bytes]:
        raise InputError("another: is damaged")

    for read in (fails, blames_another, lambda: {"content": path.read_bytes()}):
        fuzzer.prepare([Target(path, read, protected=True)], [b"sound" * 9], [{"content": b"sound" * 9}])
        path.write_bytes(fuzzer.originals[0])
        for seed in range(20):
            fuzzer.execute(seed)
        assert fuzzer.outcome.counts["finding"] == len(fuzzer.outcome.findings) > 15


def test_damage_depends_on_its_seed() -> None:
    content = bytes(range(256)) * 4
    made = [damage(content, random.Random(seed), [content]) for seed in (*range(50), *range(50))]
    assert made[:50] == made[50:]
    assert len(set(made)) > 45
