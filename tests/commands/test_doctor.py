"""The doctor: its report on sound, partial, damaged, absent and read-only logs, and the manifest."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deep_components.cascade import TWO_STAGE
from deep_components.cli import run_command
from deep_components.commands import doctor
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.log import open_log, write_log_file
from deep_components.dataset.manifest import MANIFEST_FILE
from deep_components.errors import InputError
from tests.helpers import DAYS
from tests.test_own_cascade import write_log

FOUR_STAGE = Path(__file__).parents[2] / "examples/four_stage.toml"


@pytest.fixture
def root(log: Path, tmp_path: Path) -> Path:
    """A log that the test may change."""
    return Path(shutil.copytree(log, tmp_path / "log", ignore=shutil.ignore_patterns("cache")))


def report(capsys: pytest.CaptureFixture[str], root: Path, *flags: str, code: int = 0) -> str:
    found: object
    try:
        found = run_command(doctor.main, [f"--data_dir={root}", *flags])
    except SystemExit as end:
        found = end.code
    printed = capsys.readouterr()
    assert found == code, printed
    return printed.out if code < 2 else printed.err


def line(text: str, level: str, *parts: str) -> str:
    """The one line of that level that holds the parts."""
    lines = [line for line in text.splitlines() if line.split()[:1] == [level] and all(part in line for part in parts)]
    assert len(lines) == 1, text
    return lines[0]


def flip(path: Path, index: int = -200) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 4
    path.write_bytes(content)


def test_kernels_that_cannot_be_compiled(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "load_kernels", lambda dtype: None)
    line(report(capsys, root), "WARN", "kernels", "install gcc")


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_a_sound_log(root: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    before = sorted(root.rglob("*"))
    text = report(capsys, root, *flags)
    assert "FAIL" not in text
    line(text, "OK", "origin", "simulated")
    line(text, "OK", "days", f"3, {DAYS[0]} .. {DAYS[-1]}")
    line(text, "OK", "tables", "weekday 9, hour 26", "video 202")
    line(text, "OK", "cache", "free")
    sentence = "all 40 requests read and encoded" if flags else "its first 40 requests are sound"
    assert text.count(sentence) == 3 * 2
    findings = [line for line in text.splitlines() if line.startswith("  OK")]
    assert {line[32] for line in findings} == {" "} and " " not in {line[33] for line in findings}  # in columns
    assert sorted(root.rglob("*")) == before


def test_a_cascade_of_one_s_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, root, f"--cascade={FOUR_STAGE}")
    assert text.count(" four_stage ") == 3 and "two_stage" not in text
    wrong = root / "wrong.toml"
    wrong.write_text(FOUR_STAGE.read_text().replace("coarse_neg", "coarse"))
    assert "coarse" in report(capsys, root, f"--cascade={wrong}", "--full", code=1)


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_a_log_with_groups_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    root = write_log(tmp_path / "log")
    write_log_file(root, "a shop", groups=["bought", "clicked", "shown"])
    text = report(capsys, root, *flags)
    assert text.count("all 40 requests") == 3 and "FAIL" not in text
    line(text, "OK", "manifest", "none needed")
    flip(root / "2026-03-02/item.label.npy")
    line(report(capsys, root, *flags, code=1), "FAIL", "2026-03-02", "item.label.npy")


@pytest.mark.parametrize("name", ["", "absent", "absent/deeper"])
def test_a_folder_without_a_log_is_not_all_well(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever names a folder has a log there in mind."""
    folder = tmp_path / name
    wanted = "no such folder; --data_dir names" if name else "data/README.md"
    assert wanted in line(report(capsys, folder, code=1), "FAIL", "log", str(folder))
    report(capsys, folder, "--write_manifest", code=2)


def test_no_log_named_and_none_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    assert run_command(doctor.main, []) == 0
    line(capsys.readouterr().out, "WARN", "log", "a script without it simulates one")


def keep_one_folder(root: Path) -> None:
    for name in ("request_id_dict", "seq_effective_50_dict"):
        shutil.rmtree(root / name)


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a file of a day is missing": (
        lambda root: recflow.history_path(root, DAYS[1]).unlink(),
        ("days", f"seq_effective_50_dict/{DAYS[1]}.pkl: no such file", "fetch it"),
    ),
    "only one folder is here": (keep_one_folder, ("log", "no day has its files", "data/README.md")),
    "no id counts": (lambda root: recflow.id_count_path(root).unlink(), ("log", "id_cnt.pkl: no such file")),
    "an empty pickle": (
        lambda root: os.truncate(recflow.request_path(root, DAYS[0]), 0),
        (f"{DAYS[0]} two_stage", "request_id_dict", "ends too early", "fetch the file again"),
    ),
    "a cut feather file": (
        lambda root: os.truncate(recflow.feather_path(root, DAYS[2]), 1000),
        ("three_stage", f"all_stage/{DAYS[2]}.feather: not a readable Feather"),
    ),
    "a day that is no date": (
        lambda root: recflow.feather_path(root, DAYS[0]).rename(recflow.feather_path(root, "2024-02-31")),
        ("log", "2024-02-31 is no date"),
    ),
    "an origin that is none": (
        lambda root: (root / recflow.ORIGIN_FILE).write_text("{}"),
        ("log", "origin.json: not readable", "make the log again"),
    ),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_is_wrong_and_what_to_do(root: Path, capsys: pytest.CaptureFixture[str], problem: str) -> None:
    spoil, parts = BROKEN[problem]
    spoil(root)
    text = report(capsys, root, code=1)
    line(text, "FAIL", *parts)
    assert "each line says what to do" in text.splitlines()[-1]


def test_the_full_reading_finds_what_the_quick_one_does_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recflow.history_path(root, DAYS[1])
    content = path.read_bytes()
    path.write_bytes(content[:60_000] + content[60_001:])
    text = report(capsys, root, "--full", code=1)
    assert text.count("\n  FAIL ") == 2 and text.count(str(path)) == 2
    assert text.splitlines()[-1].startswith("2 FAIL")


def test_what_is_left_out_is_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recflow.history_path(root, DAYS[0]).write_bytes(b"\x80\x02}.")
    line(report(capsys, root, "--full"), "WARN", "two_stage", "requests without a history", ": 40")


def test_a_partial_recflow(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report names the days that are missing, and how to train without them."""
    (root / recflow.ORIGIN_FILE).unlink()
    warning = line(report(capsys, root), "WARN", "published protocol", "--train_days", "--test_day")
    missing = [day for day in recflow.PERIOD_1 if day not in DAYS]
    assert f"lacks {', '.join(missing)}; without them a training takes all days here but the last, {DAYS[2]}" in warning


def test_recflow_as_the_mirror_has_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of a day is missing: the report says the arguments that train without the day."""
    (root / recflow.ORIGIN_FILE).unlink()
    recflow.feather_path(root, DAYS[0]).unlink()
    text = report(capsys, root, code=1)
    line(text, "FAIL", "days", f"all_stage/{DAYS[0]}.feather: no such file")
    line(text, "WARN", "lacks 2024-01-13", f"without them say --train_days={DAYS[1]} --test_day={DAYS[2]}")


def test_a_pipe_for_a_cascade(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(root / "cascade.toml")
    assert "not a regular file" in report(capsys, root, f"--cascade={root / 'cascade.toml'}", code=2)


def test_a_read_only_log(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "user"))
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert "user" in line(report(capsys, root), "OK", "cache")
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_environment(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# pins\nnumpy==0.1\nno-such-package==1.0\n")
    other, absent = doctor.packages(pins)
    assert (other.level, absent.level) == ("WARN", "FAIL")
    assert "pip install numpy==0.1" in other.text and "pip install no-such-package==1.0" in absent.text


@pytest.mark.parametrize(("pins", "found"), [(["numpy==0.1", 'ray==2.0; extra == "ray"'], "numpy"), (None, "packages")])
def test_the_environment_of_an_installed_project(
    pins: list[str] | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pins are those it was installed with; without any the versions cannot be compared."""

    def requires(name: str) -> list[str]:
        if pins is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return pins

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    assert [(finding.level, finding.subject) for finding in doctor.packages(tmp_path / "none")] == [("WARN", found)]


def test_sizes_in_words() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 KB", 123_456: "123 KB", 5 * 10**9: "5.0 GB", 2 * 10**12: "2.0 TB"}
    assert {count: doctor.size(count) for count in sizes} == sizes


# ---- manifest --------------------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "written, 11 files" in report(capsys, root, "--write_manifest")
    listed = json.loads((root / MANIFEST_FILE).read_text())["files"]
    assert set(listed) == {str(path.relative_to(root)) for path in root.rglob("*.*") if path.name != "manifest.json"}
    line(report(capsys, root), "OK", "manifest", "11 files")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_bit_in_a_day_s_file(root: Path, capsys: pytest.CaptureFixture[str], index: int) -> None:
    report(capsys, root, "--write_manifest")
    path = recflow.day_paths(root, DAYS[1])[index]
    flip(path)
    with pytest.raises(InputError, match=rf"{path}: has not the SHA-256 that others/manifest.json"):
        open_log(root).open_day(DAYS[1], TWO_STAGE)
    open_log(root).open_day(DAYS[0], TWO_STAGE)
    report(capsys, root)  # the sizes fit
    text = report(capsys, root, "--full", code=1)
    assert text.count("\n  FAIL ") == 2 and text.count(f"{path}: has not the SHA-256") == 2  # once a setting
    with path.open("ab") as file:
        file.write(b"x")
    line(report(capsys, root, code=1), "FAIL", "manifest", f"{path}: has ")


def test_a_flipped_bit_in_the_other_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, root, "--write_manifest")
    origin = root / recflow.ORIGIN_FILE
    origin.write_text(origin.read_text().replace("simulated", "simulatee"))
    with pytest.raises(InputError, match=r"origin.json: has not the SHA-256"):
        recflow.read_origin(root)
    before = recflow.read_id_counts(root)
    recflow.write_id_counts(root, before | {"gender": before["gender"] ^ 4})
    with pytest.raises(InputError, match=r"id_cnt.pkl: has not the SHA-256"):
        recflow.read_id_counts(root)


def test_a_new_day_must_be_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, root, "--write_manifest")
    for path in recflow.day_paths(root, DAYS[0]):
        shutil.copy(path, path.with_stem("2024-01-20"))
    with pytest.raises(InputError, match=r"2024-01-20.feather: not listed in others/manifest.json.*--write_manifest"):
        open_log(root).open_day("2024-01-20", TWO_STAGE)
    line(report(capsys, root, code=1), "FAIL", "manifest", "not listed")
    report(capsys, root, "--write_manifest")
    assert len(open_log(root).open_day("2024-01-20", TWO_STAGE)) == 40


def test_a_listed_file_must_be_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, root, "--write_manifest")
    for path in recflow.day_paths(root, DAYS[0]):
        path.unlink()
    line(report(capsys, root, code=1), "FAIL", "manifest", f"{DAYS[0]}.feather: no such file", "lists it")


@pytest.mark.parametrize("content", ["", "{}", '{"files": {}}', "[]", "{" * 100_000])
def test_a_damaged_manifest(root: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (root / MANIFEST_FILE).write_text(content)
    with pytest.raises(InputError, match=r"manifest.json: not readable .*--write_manifest"):
        recflow.read_id_counts(root)
    assert "manifest.json: not readable" in line(report(capsys, root, code=1), "FAIL", "log")
