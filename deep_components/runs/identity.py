"""Whether two trainings are the same run, decided here alone: for --resume, for the runner, and for reports.

What is compared is ``config.json`` or what a plan knows of it: setting, cascade, schema, encoding, origin and checksums
of the data, arguments, the loss's hyper-parameters, the models of --init_from, the training days, the validation day,
and the code (runs/code.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deep_components.runs import code

# Arguments of a training that lead to the same numbers, to rounding: where things lie, what is saved and shown.
EXECUTION_ARGUMENTS = (
    *("output_dir", "data_dir", "cache_dir", "device", "cuda", "table_memory", "day_on_device", "compile"),
    *("resume", "any_code", "save_minutes", "print_freq", "tensorboard", "pull_from", "timeout"),
    *("processes", "max_restarts", "engine"),
)
# Arguments that an untrained cascade depends on, beside its seed.
UNTRAINED_ARGUMENTS = ("emb_dim", "nn_units", "seq_len", "dtype", "time_zone", "init_from")

# A finished run stays when a failed one beside it is made again with steps left out that are not finite, and a stopped
# one may go on so. The training days are compared apart.
_NOT_THE_RUN = (*EXECUTION_ARGUMENTS, "on_nonfinite", "train_days")
_OF_THE_FILES = ("schema_checksum", "encoding_checksum", "loss", "init_from_checksums")
_NOT_THE_METHOD = (*EXECUTION_ARGUMENTS, "on_nonfinite", "seed", "loss_type", "compact_from")


class Difference(NamedTuple):
    """The first thing in which a run is another one than the wanted."""

    name: str
    found: Any
    wanted: Any

    @property
    def is_code(self) -> bool:
        """The runs differ in nothing but their code."""
        return self.name == "code"

    def __str__(self) -> str:
        if self.is_code:
            return f"other code: {code.named(self.found)}"
        if self.name == "init_from_checksums":
            return f"other models in --init_from: {', '.join(_changed(self.found, self.wanted))}"
        if self.name in ("cascade", "schema_checksum", "encoding_checksum", "loss") or self.name.startswith("day "):
            return f"another {self.name.removesuffix('_checksum')}"
        return f"{self.name}={self.found}, not {self.wanted}"


def run_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide what a training ends in, but the training days; an untrained cascade has few."""
    if not arguments.get("epochs"):
        return {name: arguments.get(name) for name in ("seed", "epochs", *UNTRAINED_ARGUMENTS)}
    return {name: value for name, value in arguments.items() if name not in _NOT_THE_RUN}


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run's files note of its config.json, so that those of another run are told: name -> short SHA-256.

    Nothing that may change when the training is stopped and goes on: no passes, days after the first, code, or
    arguments of _NOT_THE_RUN. What is None or absent is left out, and not compared."""
    first = next(iter(config.get("train_days") or ()), None)
    known = {name: config.get(name) for name in ("setting", "cascade", "data", *_OF_THE_FILES)}
    known |= {"first day": first, "data of the first day": (config.get("data_checksums") or {}).get(first)}
    arguments = {name: value for name, value in config.get("arguments", {}).items() if name not in _NOT_THE_RUN}
    known |= {name: value for name, value in arguments.items() if name != "epochs"}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in known.items() if value is not None}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


def method_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that all runs of one method share, whatever their seed."""
    if arguments.get("epochs") == 0:
        return {name: arguments.get(name) for name in UNTRAINED_ARGUMENTS}
    return {name: value for name, value in arguments.items() if name not in _NOT_THE_METHOD}


def first_difference(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    more_days: bool = False,
    more_epochs: bool = False,
    any_code: bool = False,
) -> Difference | None:
    """The first difference between a run's config.json and a wanted one; None when they are the same run.

    Args:
        found, wanted: where one lacks a field of the data, ``loss``, ``init_from_checksums``, ``code``, or a day's
            checksum, it is not compared.
        more_days, more_epochs: the wanted run may be a continuation of the found one.
        any_code: they may be of different code.
    """
    differences = _differences(found, wanted, more_days, more_epochs)
    return next((difference for difference in differences if not (any_code and difference.is_code)), None)


def _changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], more_days: bool, more_epochs: bool
) -> Iterator[Difference]:
    ours, arguments = run_arguments(wanted["arguments"]), found.get("arguments", {})
    theirs = run_arguments({**arguments, "epochs": ours["epochs"]}) | {"epochs": arguments.get("epochs")}
    fields = ["setting", "cascade", "data", "schema_checksum", "encoding_checksum"]
    for name in [*fields, "loss"] if ours["epochs"] else fields:
        if name in found and name in wanted and found[name] != wanted[name]:
            yield Difference(name, found[name], wanted[name])
    known, checksums = found.get("data_checksums", {}), wanted.get("data_checksums", {})
    for day in sorted(known.keys() & checksums.keys()):
        if known[day] != checksums[day]:
            yield Difference(f"day {day}", known[day], checksums[day])
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (name != "epochs", name)):
        if name == "epochs" and more_epochs and (theirs["epochs"] or 0) <= ours["epochs"]:
            continue
        if theirs.get(name) != ours.get(name):
            yield Difference(name, theirs.get(name), ours.get(name))
    models = "init_from_checksums"
    if models in found and models in wanted and found[models] != wanted[models]:
        yield Difference(models, found[models], wanted[models])
    before, days = found.get("train_days", []), list(wanted["train_days"])
    # A second pass has seen the days of the first: more of them would be another training.
    validates = wanted.get("validation_day")
    if ours["epochs"] and found.get("validation_day") != validates:
        yield Difference("validation_day", found.get("validation_day"), validates)
    # A validated one has measured after its last day, which would be in the middle.
    longer = more_days and before == days[: len(before)] and ours["epochs"] == 1 and not validates
    if ours["epochs"] and before != days and not longer:
        yield Difference("train_days", ",".join(before), ",".join(days))
    files = code.changes(found.get("code"), wanted.get("code"), method=bool(ours["epochs"]))
    if files:  # last: anything else says more
        yield Difference("code", files, None)
