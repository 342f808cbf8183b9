"""The walls between the parts of the package, read from the source, and imports without side effects."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deep_components"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
}


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@cache
def imported(name: str) -> frozenset[str]:
    """Full names of all modules, and names in them, that a module imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def within(prefix: str) -> list[str]:
    return [name for name in MODULES if name == prefix or name.startswith(prefix + ".")]


def foreign(name: str, *allowed: str) -> set[str]:
    """The imports of a module that are in none of the allowed packages."""
    return {used for used in imported(name) if not any(used == a or used.startswith(a + ".") for a in allowed)}


def forbidden(name: str, *packages: str) -> set[str]:
    return {used for used in imported(name) if any(used == p or used.startswith(p + ".") for p in packages)}


STANDARD = ("math", "typing", "__future__", "collections", "contextlib", "contextvars", "dataclasses", "functools")
LOSS_KERNELS = ("deep_components.loss.functional", "deep_components.loss.selection")
# What users start: `python -m deep_components.NAME`. Nothing else imports them.
ENTRY_POINTS = [
    name
    for name in MODULES
    if name.startswith("deep_components.commands.") or name.rpartition(".")[2].startswith(("run_", "__main__"))
]


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"deep_components.{name}" for name in names)


def reached(name: str) -> set[str]:
    """The modules of the package that importing one imports, directly or not."""
    found, waiting = {name}, [name]
    while waiting:
        for used in imported(waiting.pop()):
            for module in (used, used.rpartition(".")[0]):
                if module in MODULES and module not in found:
                    found.add(module)
                    waiting.append(module)
    return found


def test_the_walls_see_imports() -> None:
    """These tests would pass on nothing; they do see something."""
    assert len(SOURCES) > 20
    assert "deep_components.metrics.cascade_metrics" in imported("deep_components.evaluation.day")
    assert foreign("deep_components.evaluation.day", "deep_components") >= {"argparse", "torch.nn"}
    assert forbidden("deep_components.evaluation.day", "deep_components.checkpoint")
    assert "deep_components.batch" in reached("deep_components.evaluation.day")
    assert len(ENTRY_POINTS) > 8


@pytest.mark.parametrize("name", within("deep_components.loss"))
def test_a_loss_is_mathematics(name: str) -> None:
    assert foreign(name, "torch", *STANDARD, *LOSS_KERNELS) == set()


# What may know that a batch is shared by several processes, beside the commands.
SHARED = (*within("deep_components.distributed"), *within("deep_components.training"))


def test_only_the_training_knows_several_processes() -> None:
    for name in set(MODULES) - {*SHARED, *ENTRY_POINTS}:
        assert not forbidden(name, "torch.distributed", *rooms("distributed")), name
        attributes = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.Attribute)]
        assert "torch.distributed" not in {ast.unparse(node) for node in attributes if node.attr == "distributed"}, name


def test_what_a_loss_or_a_model_reaches_knows_no_process() -> None:
    """Transitively."""
    for room in ("loss", "models", "tables", "dataset", "runs", "metrics", "evaluation", "reporting", "serving"):
        for name in within(f"deep_components.{room}"):
            assert not reached(name) & set(SHARED), name


def test_metrics_know_arrays_only() -> None:
    assert foreign("deep_components.metrics", "torch", *sys.stdlib_module_names) == set()


WALLS = {
    "models": rooms("loss", "metrics", "tables", "training", "evaluation", "runs", "arguments", "dataset"),
    "tables": rooms("loss", "metrics", "models", "training", "evaluation", "runs", "arguments", "dataset"),
    "dataset": rooms("loss", "metrics", "models", "training", "evaluation", "runs", "reporting"),
    "runs": ("torch", *rooms("loss", "metrics", "models", "tables", "training", "evaluation", "dataset", "reporting")),
    "reporting": ("torch", *rooms("loss", "metrics", "models", "tables", "training", "evaluation", "dataset")),
    "experiments": rooms("loss", "metrics", "models", "tables", "reporting"),
    "training": rooms("loss", "metrics", "reporting", "experiments", "dataset.importers"),
    "serving": rooms("loss", "training", "reporting", "experiments", "dataset.importers"),
    "evaluation": rooms("loss", "training", "reporting", "experiments", "dataset.importers"),
}


# The bound is of the shares that a loss takes: the operators alone.
ALLOWED = {"deep_components.evaluation.bound": {f"{LOSS_KERNELS[1]}.{n}" for n in ("SELECTION_OPERATORS", "select")}}


@pytest.mark.parametrize(("room", "name"), [(r, name) for r in WALLS for name in within(f"deep_components.{r}")])
def test_a_room_knows_what_it_may(room: str, name: str) -> None:
    assert forbidden(name, *WALLS[room]) <= ALLOWED.get(name, set())


@pytest.mark.parametrize("name", within("deep_components.models"))
def test_models_know_embedded_features_only(name: str) -> None:
    allowed = {f"deep_components.batch.{part}" for part in ("EmbeddedFeatures",)}
    assert {used for used in imported(name) if used.startswith("deep_components.batch")} <= allowed


@pytest.mark.parametrize("room", ["runs", "reporting"])
def test_rooms_without_torch_load_none(room: str) -> None:
    """Transitively: a table or a report of many runs starts at once."""
    modules = within(f"deep_components.{room}")
    script = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ENTRY_POINTS])
def test_only_importers_know_where_data_came_from(name: str) -> None:
    if not name.startswith("deep_components.dataset."):
        assert not forbidden(name, *rooms("dataset.importers"))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_what_users_start(name: str) -> None:
    commands = [module for module in ENTRY_POINTS if module != name]
    if name not in ENTRY_POINTS:
        assert not forbidden(name, *commands)


@pytest.mark.parametrize(
    "name", ["training.loop", "training.step", "evaluation.day", "metrics", "files", "cli", "batch", "cascade"]
)
def test_the_frame_names_no_method(name: str) -> None:
    methods = {path.stem for path in (PACKAGE / "loss").glob("[a-z]*.py")}
    methods -= {"functional", "selection"}
    assert len(methods) >= 8
    code = ast.parse(MODULES[f"deep_components.{name}"].read_text())
    texts = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert methods.isdisjoint(texts)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_prints(name: str) -> None:
    calls = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


_IMPORT_ALL = """
import importlib, json, logging, os, random, sys, warnings
import numpy, torch

def state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "python": str(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "handlers": str(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
json.dump([key for key in before if before[key] != after[key]], sys.stdout)
"""


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    def tree() -> dict[str, tuple[int, int]]:
        files = [path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}

    before = tree()
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # scikit-learn sets them where another test imported it
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", _IMPORT_ALL, *MODULES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []  # nothing changed, and nothing else was printed
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert tree() == before


def dangerous(tree: ast.AST) -> list[str]:
    """What runs, or may run, what a file says: unrestricted unpickling, evaluation, shells."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "joblib", "dill"):
            found.append(f"from {node.module}")
        if isinstance(node, ast.Import):
            found += [
                name.name for name in node.names if name.name in ("marshal", "shelve", "joblib", "dill", "cPickle")
            ]
        if isinstance(node, ast.Attribute):
            called = ast.unparse(node)
            if called in (
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
                "os.system",
                "np.core.multiarray.fromfile",
            ):
                found.append(called)
        if isinstance(node, ast.Call):
            call, text = ast.unparse(node.func), ast.unparse(node)
            if call in ("eval", "exec", "__import__", "compile") or "allow_pickle=True" in text or "shell=True" in text:
                found.append(text)
            if call == "torch.load" and "weights_only=True" not in text:
                found.append(text)
    return found


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((PACKAGE.parent / "benchmarks").glob("*.py"))], ids=lambda p: p.stem
)
def test_no_file_can_run_anything(path: Path) -> None:
    assert not dangerous(ast.parse(path.read_text()))


def test_what_is_dangerous_is_seen() -> None:
    samples = ["pickle.load(file)", "x = pickle.Unpickler", "torch.load(path)", "torch.load(p, weights_only=False)"]
    samples += ["from pickle import load", "import marshal", "np.load(p, allow_pickle=True)", "eval(text)"]
    samples += ["subprocess.run(text, shell=True)", "os.system(text)"]
    assert all(dangerous(ast.parse(sample)) for sample in samples)
    sound = "torch.load(p, weights_only=True); np.load(p); pickle.dump(x, file); model.eval(); re.compile(x)"
    assert not dangerous(ast.parse(sound))
