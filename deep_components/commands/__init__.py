"""The command ``lcron``: ``lcron NAME arguments``, without installation ``python -m deep_components NAME arguments``.

Only the module of the command that is run gets imported.
"""

import difflib
import importlib
import os
import sys
from pathlib import Path

from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.threads import short_waits

# name -> a module with main(argv), and what it does
COMMANDS = {
    "train": ("run_train", "train a cascade: --cascade=two_stage, three_stage, or a TOML file"),
    "test": ("run_test", "evaluate a run on a test day"),
    "experiments": ("run_experiments", "train and evaluate many methods and seeds on a cascade, and print the table"),
    "table": ("commands.table", "one table of many runs: --kind=metrics, costs or streaming"),
    "serve": ("commands.serve", "answer requests over HTTP by a bundle: --bundle=B --port=8080"),
    "report": ("commands.report", "one page with charts about many runs"),
    "recommend": ("commands.recommend", "answer the requests of a table by a bundle: --bundle=B --requests=r.parquet"),
    "doctor": ("commands.doctor", "check the environment and a log, and say what to do"),
    "simulate": ("dataset.simulate", "make a simulated log"),
    "import": ("dataset.importers.table.command", "make a log from a table of your own: --mapping=log.toml"),
    "import movielens": ("dataset.importers.movielens", "make a log from MovieLens-1M"),
    "import checkpoint": ("commands.import_checkpoint", "make a run from models of the paper's original code"),
    "export": ("commands.export", "make a bundle that serves a run: its models, corpus and index (docs/serving.md)"),
    "index": ("commands.index", "give a bundle another corpus, without training"),
    "export onnx": ("commands.export_onnx", "write a bundle's models as ONNX graphs and torch.export programs"),
    "features": ("commands.features", "fill the feature store with each user's latest request"),
    "export checkpoint": ("commands.export_checkpoint", "write a run's models for the paper's original code"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name and return the process's exit code (:func:`run_command`)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        sys.stdout.write(_usage())
        return 0
    for words in (2, 1):
        wrong = words == 1 and argv[:1] in (["import"], ["export"]) and argv[1:] and not argv[1].startswith("-")
        if (name := " ".join(argv[:words])) in COMMANDS and not wrong:  # import movieles: no argument, but misspelt
            os.environ.update(short_waits())
            module = importlib.import_module(f"deep_components.{COMMANDS[name][0]}")
            sys.argv[0] = f"{_program()} {name}"  # argparse shows it in a command's usage
            return run_command(module.main, argv[words:])
    return run_command(_refuse, argv)


def as_before(name: str, command: str) -> None:
    """What ``python -m`` of a module under its earlier name does: the command. ``name`` is the module's __name__."""
    if name == "__main__":
        sys.exit(main([*command.split(), *sys.argv[1:]]))


def _program() -> str:
    return "lcron" if Path(sys.argv[0]).stem == "lcron" else "python -m deep_components"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([f"usage: {_program()} NAME arguments; NAME --help says more", "", *lines]) + "\n"


def _refuse(argv: list[str]) -> None:
    """InputError that names the nearest command."""
    if not argv:
        raise InputError(f"no command given; choose one of {', '.join(COMMANDS)}")
    words, kin = " ".join(argv[:2]), [name for name in COMMANDS if name.split()[0] == argv[0]]
    near = difflib.get_close_matches(words, kin, 1, 0) or difflib.get_close_matches(argv[0], COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    raise InputError(f"{argv[0]}: no such command; {hint}")
