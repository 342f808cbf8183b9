"""Which files a run's code consists of, and what is noted of them."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from deep_components.runs import code
from deep_components.runs.code import code_of, continued, evaluation_code, is_evaluation_current, named, training_code

BCE = ("deep_components/loss/__init__.py", "deep_components/loss/bce.py")
COMMAND = """
from deep_components.loss.lcron import LCRON

def build_loss(args):
    if args.loss_type == "bce":
        return BCE()
    elif args.loss_type == "lcron":
        return LCRON()
    else:
        raise unknown_method(args.loss_type)
"""
FILES = {
    "loss/functional.py": "", "loss/selection.py": "", "loss/bce.py": "", "run_train2.py": COMMAND,
    "loss/lcron.py": "from deep_components.loss.ties import shared\nfrom deep_components.loss import functional\n",
    "loss/ties.py": "import torch\n", "training/step.py": "", "models/din.py": "", "kernels/kernels.c": "",
    "metrics.py": "", "evaluation/day.py": "", "reporting/page.py": "", "commands/table.py": "", "cli.py": "",
    "dataset/importers/recflow.py": "", "runs/state.py": "", "runs/folder.py": "",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package of the project's name, whose files a test may change."""
    folder = tmp_path / "somewhere" / "deep_components"
    for name in [*FILES, "__init__.py", *(f"{name.rpartition('/')[0]}/__init__.py" for name in FILES if "/" in name)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES.get(name, ""))
    monkeypatch.setattr(code, "PACKAGE", folder)
    return folder


def noted(package: Path, **options: Any) -> dict[str, Any]:
    return training_code("lcron", [package / "loss" / "lcron.py"], **options)


def changed(package: Path, before: dict[str, Any]) -> list[str]:
    return [name.removeprefix("deep_components/") for name in code.changes(before, noted(package))]


COUNT = [
    "loss/functional.py",
    "loss/selection.py",
    "loss/lcron.py",
    "loss/ties.py",
    "training/step.py",
    "models/din.py",
]
COUNT += ["kernels/kernels.c", "runs/state.py", "models/new.py", "new_room/new.py"]
COUNT_NOT = ["loss/bce.py", "loss/new.py", "metrics.py", "evaluation/day.py", "reporting/page.py", "commands/table.py"]
COUNT_NOT += ["cli.py", "dataset/importers/recflow.py", "runs/folder.py", "notes.md", "models/.#din.py"]


@pytest.mark.parametrize("name", COUNT)
def test_a_file_that_counts(name: str, package: Path) -> None:
    """Those that decide numbers, new ones too; of the losses, the method's own and what it imports."""
    before = noted(package)
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text(FILES.get(name, "") + "# changed\n")
    assert changed(package, before) == [name]
    assert before["total"] != noted(package)["total"] or name in ("loss/lcron.py", "loss/ties.py")


@pytest.mark.parametrize("name", COUNT_NOT)
def test_a_file_that_does_not_count(name: str, package: Path) -> None:
    before = noted(package)
    (package / name).write_text("# changed\n")
    assert changed(package, before) == []


def test_the_method_s_branch_alone_counts(package: Path) -> None:
    """So a method can be added, as README says, and runs of the others stay."""
    before, command = noted(package), package / "run_train2.py"
    added = COMMAND.replace("from", "from deep_components.loss.mine import Mine\nfrom", 1)
    command.write_text(added.replace("    else", '    elif args.loss_type == "mine":\n        return Mine()\n    else'))
    assert changed(package, before) == []
    command.write_text(COMMAND.replace("BCE()", "BCE(2)"))
    assert changed(package, before) == []
    command.write_text(COMMAND.replace("LCRON()", "LCRON(2)"))
    assert changed(package, before) == ["run_train2.py (lcron)"]


def test_a_loss_and_a_model_of_one_s_own(package: Path, tmp_path: Path) -> None:
    """With what they import: beside them, of their own package, and of this one; not of others."""
    own = tmp_path / "mine"
    contents = {
        "loss.py": "import helpers, numpy\nfrom ours.deep import x\nfrom deep_components.loss import bce\n",
        "helpers.py": "", "unused.py": "", "ours/__init__.py": "", "ours/deep.py": "from .more import y\n",
        "ours/more.py": "", "tower.py": "",
    }  # fmt: skip
    for name, content in contents.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(content)
    found = training_code("mine", [own / "loss.py"], models=[own / "tower.py"])
    losses = {name for name in found["method"] if "run_train" not in name}
    assert losses == {"loss.py", "helpers.py", "ours/deep.py", "ours/more.py", *BCE}
    assert "tower.py" in found["files"] and "unused.py" not in found["files"] | found["method"]
    (own / "ours/more.py").write_text("z = 1\n")
    assert code.changes(found, training_code("mine", [own / "loss.py"], [own / "tower.py"])) == ["ours/more.py"]


def test_classes_are_found_by_their_files(package: Path) -> None:
    """PyTorch's and those that have no file are left out; this module's is that of the class here."""

    class Own(nn.Module):
        pass

    nowhere = type("Nowhere", (), {"__module__": "__nowhere__"})
    methods = training_code("x", [Own, nn.Linear, nowhere])["method"]
    assert {name for name in methods if "run_train" not in name} == {"tests/runs/test_code.py"}


def test_a_file_that_cannot_be_parsed_counts_by_its_bytes(package: Path) -> None:
    before = noted(package)
    (package / "loss" / "lcron.py").write_text("def (")
    (package / "run_train2.py").write_text(COMMAND + "def (")
    assert {"loss/lcron.py", "run_train2.py (lcron)"} <= set(changed(package, before))


def test_what_an_evaluation_notes(package: Path) -> None:
    before = noted(package)
    after = evaluation_code(before)
    assert set(after["files"]) == {f"deep_components/{name}" for name in ("metrics.py", *_EVALUATION)}
    assert code.changed_since_training(after) == [] and is_evaluation_current(after)
    (package / "loss" / "lcron.py").write_text("# an evaluation needs no loss, and no step\n")
    (package / "training" / "step.py").write_text("# changed\n")
    assert code.changed_since_training(evaluation_code(before)) == []
    (package / "models" / "din.py").write_text("# changed\n")
    assert code.changed_since_training(evaluation_code(before)) == ["deep_components/models/din.py"]
    assert is_evaluation_current(after)
    (package / "metrics.py").write_text("# changed\n")
    assert not is_evaluation_current(after) and is_evaluation_current(None)


_EVALUATION = ("evaluation/__init__.py", "evaluation/day.py")


def test_a_run_in_two_forms(package: Path) -> None:
    """It went on with other code, or was evaluated by other code; also when nothing is known of the first part."""
    before, tested = noted(package), evaluation_code(None)
    (package / "models" / "din.py").write_text("# changed\n")
    now = noted(package)
    assert code_of(continued(before, before), tested).mixed == []
    assert code_of(continued(before, now), tested).mixed == ["deep_components/models/din.py"]
    assert code_of(continued(continued(before, now), now), tested).mixed == ["deep_components/models/din.py"]
    assert code_of(before, evaluation_code(before)).mixed == ["deep_components/models/din.py"]
    assert code_of(continued(None, now), tested).mixed == ["files of an earlier version"]
    run = code_of(now, tested)
    assert run.total == now["total"] and run.own == now["method"] | tested["files"]
    assert code_of(now, tested, method=False).own == tested["files"]


@pytest.mark.parametrize("records", [None, [], {}, {"files": 3}, {"total": 5}], ids=str)
def test_records_that_do_not_say_it(records: Any) -> None:
    assert code_of(records, records).total is None
    assert code.changes(records, {"files": {"a": "b"}}) == []


@pytest.mark.parametrize(("count", "words"), [(1, "0"), (4, "0, 1, 2, 3"), (6, "0, 1, 2, 3 and 2 more")])
def test_files_in_a_sentence(count: int, words: str) -> None:
    assert named(map(str, range(count))) == words


def test_what_is_left_out_is_there() -> None:
    """Each beginning is that of a file, so that a file that is renamed is noticed."""
    names = [path.relative_to(code.PACKAGE).as_posix() for path in code.PACKAGE.rglob("*.py")]
    assert all(any(name.startswith(beginning) for name in names) for beginning in code.LEFT_OUT)


@pytest.mark.parametrize("with_init", [False, True], ids=["namespace packages", "packages"])
def test_modules_of_a_package_count_under_their_dotted_names(
    with_init: bool, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no __init__.py makes its folder a package; two of one file name are two."""
    names = [f"deep_test_{word}_{with_init}" for word in "pq"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(f"from {name}.helper import SCALE\n\nclass M:\n    pass\n")
        (tmp_path / name / "helper.py").write_text("SCALE = 1\n")
        if with_init:
            (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    models = [importlib.import_module(f"{name}.model").M for name in names]
    before = noted(package, models=models)
    assert {f"{name}/{part}.py" for name in names for part in ("model", "helper")} <= set(before["files"])
    for name, part in zip(names, ("model", "helper"), strict=True):
        with (tmp_path / name / f"{part}.py").open("a") as file:
            file.write("SCALE = 2\n")
    changed = code.changes(before, noted(package, models=models))
    assert changed == sorted([f"{names[0]}/model.py", f"{names[1]}/helper.py"])


def test_two_files_of_one_name_count_both(package: Path, tmp_path: Path) -> None:
    """They lie in two folders, and nothing says how Python imports them."""
    paths = [tmp_path / folder / "tower.py" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"NAME = {path.parent.name!r}\n")
    before = noted(package, models=paths)
    assert {"tower.py", "tower.py (2)"} <= set(before["files"])
    for path in paths:
        written = path.read_text()
        path.write_text(written + "SCALE = 2\n")
        assert code.changes(before, noted(package, models=paths)) != []
        path.write_text(written)
    assert code.changes(before, noted(package, models=paths)) == []


@pytest.mark.parametrize(
    "test", ['args.loss_type != "bce"', '"lcron" != args.loss_type', 'args.loss_type < "z"', 'x.loss_type == "bce"',
             'args.loss_type == "bce" or args.tau', 'args.loss_type == "bce" != args.tau']
)  # fmt: skip
def test_only_a_comparison_with_another_method_excludes_a_branch(test: str, package: Path) -> None:
    """What stands under any other test may be run by every method."""
    command = package / "run_train2.py"
    command.write_text(COMMAND.replace("    if args", f"    if {test}:\n        args.tau = 1\n    if args", 1))
    before = noted(package)
    command.write_text(command.read_text().replace("args.tau = 1", "args.tau = 2"))
    assert changed(package, before) == ["run_train2.py (lcron)"]
