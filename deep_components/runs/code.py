"""Which code a run ran: a short SHA-256 of every source file that decides its numbers, and one of them all.

``config.json`` has under ``code`` what the training ran: ``files``, which all methods share, their ``total``, and
``method``, the files of the method alone: its loss with all that it imports, and its branch of the training commands.
``metrics.json`` has there what the evaluation ran beside it. A file counts by its bytes; a file's name is its path from
the folder that Python imports it from.
"""

import ast
import hashlib
import inspect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]

# Beginnings of the names of files that no number of a run follows from: they start runs, keep their books, or read
# what is finished. Importers make days, whose checksums are part of a run's identity. Every other file counts, a new
# one too.
LEFT_OUT = (
    *(
        "commands/",
        "experiments/",
        "reporting/",
        "serving/",
        "dataset/importers/",
        "dataset/rows.py",
        "dataset/simulate.py",
        "dataset/movielens.py",
        "distributed/launch.py",
        "distributed/evaluation.py",
    ),
    *("runs/code.py", "runs/folder.py", "runs/identity.py", "runs/records.py", "run_experiments.py", "run_test"),
    *("__main__.py", "cli.py", "collect_", "doctor.py", "report.py", "import_checkpoint.py", "export_checkpoint.py"),
)
# Of these, only what the run's own method needs.
_OF_METHODS, _OF_ALL_METHODS = ("loss/", "run_train"), ("loss/functional.py", "loss/selection.py")
_OF_EVALUATIONS, _OF_TRAININGS = ("evaluation/", "metrics.py"), ("training/", "loss/")
_ABSENT = "absent"
_SHOWN = 4  # files that a sentence names

Files = dict[str, str]  # name -> short SHA-256


def training_code(
    method: str, loss: Iterable[Any], models: Iterable[Any] = (), validates: bool = False
) -> dict[str, Any]:
    """What a training by the code as it is now would note in its config.json.

    Args:
        method: the --loss_type.
        loss: the classes of the loss, or their files, wherever these lie; what they import beside them and in the
            package counts too. Classes of PyTorch, and those that have no file, as in a notebook, do not count.
        models: the same of the stages' models.
        validates: the training runs the evaluation's code too.
    """
    found = _files(models)
    files = {name: digest for name, digest in found.items() if not _begins(name, _OF_EVALUATIONS)}
    own = _imported_with(loss, found)
    if validates:
        own |= {name: digest for name, digest in found.items() if name not in files}
    for path in PACKAGE.glob("run_train*.py"):
        own[f"{_name(path)} ({method})"] = _digest(_branch(path.read_text(), method).encode())
    return {"total": _total(files), "files": files, "method": own}


def evaluation_code(trained: Any, models: Iterable[Any] = ()) -> dict[str, Any]:
    """What an evaluation by the code as it is now notes in metrics.json: its own files, and those of the training's
    (``code`` of its config.json) that it runs too and that have changed since."""
    found = _files(models)
    files = {name: digest for name, digest in found.items() if _begins(name, _OF_EVALUATIONS)}
    before = {name: digest for name, digest in _map(trained, "files").items() if not _begins(name, _OF_TRAININGS)}
    now = {name: digest for name, digest in found.items() if not _begins(name, _OF_TRAININGS) and name not in files}
    changed = {name: now.get(name, _ABSENT) for name in _different(before, now)} if before else {}
    return {"total": _total(files), "files": files | changed}


def changed_since_training(evaluated: Any) -> list[str]:
    """The files of an evaluation's code (:func:`evaluation_code`) that the training had in another form."""
    return [name for name in _map(evaluated, "files") if not _begins(name, _OF_EVALUATIONS)]


def is_evaluation_current(evaluated: Any) -> bool:
    """The evaluation's own files are those that are there now; also for an evaluation that noted none."""
    noted = {name: digest for name, digest in _map(evaluated, "files").items() if _begins(name, _OF_EVALUATIONS)}
    return not noted or noted == evaluation_code(None)["files"]


def changes(found: Any, wanted: Any, method: bool = True) -> list[str]:
    """The files in which two ``code`` of config.json differ; none where one of them is not known.

    ``method``: those of the method alone count too."""
    parts = ("files", "method") if method else ("files",)
    ours, theirs = ({name: d for part in parts for name, d in _map(code, part).items()} for code in (found, wanted))
    return _different(ours, theirs) if ours and theirs else []


def continued(before: Any, now: Mapping[str, Any]) -> dict[str, Any]:
    """``now`` of a training that goes on with other code than ``before``, with ``before``: what has changed."""
    known = {**_map(before, "files"), **_map(before, "method")}
    past = {name: known.get(name, _ABSENT) for name in changes(before, now)} | _map(before, "before")
    past |= {} if known else {"files of an earlier version": "unknown"}
    return {**now, "before": past} if past else dict(now)


@dataclass(frozen=True)
class RunCode:
    """What a run's config.json and metrics.json say of its code."""

    total: str | None  # of the files that all methods share; None where the records do not say
    files: Files  # these
    own: Files  # of the method and of the evaluation
    mixed: list[str]  # files that the run had in two forms: it went on with other code, or was evaluated by other code


def code_of(trained: Any, evaluated: Any, method: bool = True) -> RunCode:
    """The code of a run by ``code`` of its config.json and of its metrics.json; that of its method too, or not."""
    files = _map(trained, "files")
    mixed = sorted({*_map(trained, "before"), *(changed_since_training(evaluated) if files else ())})
    tested = {name: digest for name, digest in _map(evaluated, "files").items() if _begins(name, _OF_EVALUATIONS)}
    total = str(trained["total"]) if files and "total" in trained else None
    return RunCode(total, files, (_map(trained, "method") if method else {}) | tested, mixed)


def named(files: Iterable[str]) -> str:
    """The files in a sentence, the first few by name."""
    listed = list(files)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _different(ours: Files, theirs: Files) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _map(code: Any, part: str) -> Files:
    """A part of what a file notes; empty when it is not there or not what it should be."""
    content = code.get(part) if isinstance(code, dict) else None
    return {str(name): str(digest) for name, digest in content.items()} if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Source:
    """A source file and the folder that Python imports it from."""

    path: Path
    root: Path

    @property
    def name(self) -> str:
        """Its path from there."""
        return self.path.relative_to(self.root).as_posix()


# ---- which files, and their digests ----------------------------------------------------------------------------------


def _files(models: Iterable[Any]) -> Files:
    """The package's files that count for every method, and those of models outside of it."""
    paths = sorted(path for pattern in ("*.py", "*.c") for path in PACKAGE.rglob(pattern))
    counted = (p for p in paths if p.is_file() and not p.name.startswith(".") and not _begins(_name(p), LEFT_OUT))
    found = {
        _name(path): _digest(path.read_bytes())
        for path in counted
        if not _begins(_name(path), _OF_METHODS) or _begins(_name(path), _OF_ALL_METHODS)
    }
    return found | _imported_with(models, found)


def _begins(name: str, beginnings: tuple[str, ...]) -> bool:
    """Whether the name is one of the package's that begins so."""
    return name.startswith(tuple(f"{PACKAGE.name}/{beginning}" for beginning in beginnings))


def _imported_with(parts: Iterable[Any], known: Mapping[str, str]) -> Files:
    """The files of ``parts`` and what they import, of the package and of their own, but those that are ``known``."""
    found: Files = {}
    waiting, seen = [source for source in map(_source_of, parts) if source is not None], set()
    while waiting:
        source = waiting.pop()
        if source.path in seen or _begins(source.name, LEFT_OUT):
            continue
        seen.add(source.path)
        content = source.path.read_bytes()
        digest = _digest(content)
        name = _free_name(source.name, digest, {**known, **found})
        if name is not None:
            found[name] = digest
            waiting += _imports(source, content)
    return found


def _free_name(name: str, digest: str, taken: Mapping[str, str]) -> str | None:
    """``name``, with a number where another file has it; None where that file is the same."""
    names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
    free = next(name for name in names if taken.get(name) in (None, digest))
    return None if free in taken else free


def _source_of(part: Any) -> Source | None:
    """The file of a class or function, or of a path itself; None where there is none, and for PyTorch's."""
    if isinstance(part, Path):
        return _source(part)
    try:
        path = Path(inspect.getsourcefile(part) or "")
    except TypeError:  # built in, or of an interactive session
        return None
    module = part.__module__.split(".")
    return _source(path, module) if path.is_file() and module[0] != "torch" else None


def _source(path: Path, module: Sequence[str] = ()) -> Source:
    """The file, and the folder that Python imports it from: the one in which it has the name of its ``module``. Where
    that is not known, the one above all folders with an ``__init__.py``."""
    if path.resolve().is_relative_to(PACKAGE):
        return Source(path.resolve(), PACKAGE.parent)
    path = path.absolute()
    named = path.parent if path.name == "__init__.py" else path.with_suffix("")
    if module and named.parts[-len(module) :] == tuple(module):
        return Source(path, named.parents[len(module) - 1])
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return Source(path, folder)


def _imports(source: Source, content: bytes) -> Iterator[Source]:
    """The files that a module imports, of the package, of its own package, or where no ``__init__.py`` makes one of its
    folder, of all that lies beside it."""
    root, own = source.root, source.path.relative_to(source.root).parts
    alone = not (root / own[0] / "__init__.py").exists() and root.name not in ("site-packages", "dist-packages")
    for name in _imported_names(content, own[:-1]):
        first, *_ = name
        if first == PACKAGE.name or first == own[0] or alone:
            base = PACKAGE.parent if first == PACKAGE.name else root
            for candidate in (base.joinpath(*name).with_suffix(".py"), base.joinpath(*name, "__init__.py")):
                if candidate.is_file():
                    yield Source(candidate, base)


def _imported_names(content: bytes, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for node in _nodes(content):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            yield from (name for name in (base, *((*base, alias.name) for alias in node.names)) if name)


def _nodes(source: str | bytes) -> Iterator[ast.AST]:
    """All parts of a module; none of one that cannot be parsed, as it has been changed since it was imported."""
    try:
        yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return


def _branch(source: str, method: str) -> str:
    """A training command without its imports and the branches of other methods, so that adding one changes nothing."""
    dropped: set[int] = set()
    for node in _nodes(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.If) and _method_of(node.test) not in (None, method):
            dropped |= set(range(node.lineno, (node.body[-1].end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(line for number, line in lines if number not in dropped and line.strip())


def _method_of(test: ast.expr) -> str | None:
    """lcron of the test ``args.loss_type == "lcron"``; None of every other test: its branch counts for all."""
    match test:
        case ast.Compare(ops=[ast.Eq()], comparators=[ast.Constant(value=str(method))]):
            return method if ast.unparse(test.left) == "args.loss_type" else None
    return None


def _name(path: Path) -> str:
    """Of a file of the package."""
    return path.relative_to(PACKAGE.parent).as_posix()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _total(files: Mapping[str, str]) -> str:
    return _digest(json.dumps(files, sort_keys=True).encode())
