"""What stands beside a table's rows: which code they ran, and marks and lines of what else a reader must know."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pandas as pd

from deep_components.errors import InputError
from deep_components.runs.code import named

UNKNOWN = "unknown"  # the code of a run of an earlier version, or of imported models
_ROW = ["row", "setting", "data"]
_COMMIT = 9  # letters of a commit that are shown

Row = tuple[str, str, str]  # of a table: its name, the setting and the log


@dataclass(frozen=True)
class Remarks:
    """``marks``, such as " [1]", by row; ``lines``: what they mean; ``codes``: the code of each row; ``one_code``: of
    all rows, where they have the same."""

    marks: Mapping[Row, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    codes: Mapping[Row, str] = field(default_factory=dict)
    one_code: str = ""

    @property
    def alike(self) -> bool:
        return bool(self.one_code) or not self.codes

    @property
    def below(self) -> tuple[str, ...]:
        """The lines below a table that has a column of codes where they differ."""
        return (*self.lines, *([f"Code: {self.one_code}."] if self.one_code else []))

    @property
    def below_without_column(self) -> tuple[str, ...]:
        """The lines below a table without such a column."""
        each = () if self.alike else (f"Code of {row}: {code}." for (row, *_), code in self.codes.items())
        return (*self.below, *each)


def remarks_of(runs: pd.DataFrame) -> Remarks:
    """The remarks about runs with rows (:func:`~deep_components.reporting.frame.label_rows`)."""
    groups: dict[Row, pd.DataFrame] = dict(list(runs.groupby(_ROW, sort=False)))
    conflicts = conflicting_files(runs)
    codes = {key: _code(group, conflicts) for key, group in groups.items()}
    alike = len({(frozenset(group["code"]), *_forms(group, conflicts)) for group in groups.values()}) == 1
    marks, lines = dict[Row, str](), list[str]()
    for key, group in groups.items():
        for sentence in _sentences(group):
            name = key[0] if runs["setting"].nunique() < 2 else ", ".join(key[:2])
            lines.append(f"[{len(lines) + 1}] {name}: {sentence}.")
            marks[key] = f"{marks.get(key, '')} [{len(lines)}]"
    return Remarks(marks, tuple(lines), codes, _code(runs, conflicts) if alike else "")


def conflicting_files(runs: pd.DataFrame) -> list[str]:
    """The files of which the runs had more than one form."""
    forms: dict[str, set[str]] = {}
    for code in runs["run_code"]:
        for name, digest in (code.files | code.own).items():
            forms.setdefault(name, set()).add(digest)
    return sorted(name for name, found in forms.items() if len(found) > 1)


def check_one_code(name: str, runs: pd.DataFrame, any_code: bool) -> None:
    """InputError when the runs of a row, its seeds, ran different code, unless ``any_code`` will do."""
    conflicts = conflicting_files(runs)
    if conflicts and not any_code:
        raise InputError(
            f"{name}: its seeds ran different code: {named(conflicts)}, in {', '.join(map(str, runs['folder']))}; make "
            "them again with --force, or take them all the same, marked, with --any_code"
        )


def _code(runs: pd.DataFrame, conflicts: list[str]) -> str:
    """The code of runs: the fingerprints of what all methods share, each with its commits, and what their other files
    are that differ in the table."""
    commits: dict[str, dict[str, None]] = {}
    for total, commit in zip(runs["code"], runs["commit"], strict=True):
        first, dash, modified = str(commit or UNKNOWN).partition("-")
        commits.setdefault(total or UNKNOWN, {})[f"{first[:_COMMIT]}{dash}{modified}"] = None
    shared = "; ".join(f"{total} (commit {', '.join(found)})" for total, found in commits.items())
    return ", ".join([shared, *(f"{name.removeprefix('deep_components/')} {d}" for name, d in _forms(runs, conflicts))])


def _forms(runs: pd.DataFrame, conflicts: list[str]) -> tuple[tuple[str, str], ...]:
    """The files of the method and the evaluation that differ in the table, with their checksums."""
    found = ((name, code.own[name]) for name in conflicts for code in runs["run_code"] if name in code.own)
    return tuple(dict.fromkeys(found))


def _sentences(group: pd.DataFrame) -> Iterator[str]:
    """What a reader must know of a row."""
    skipped = group["skipped_steps"].fillna(0).sum()
    if skipped:
        total = "" if group["steps"].isna().any() else f" of {group['steps'].sum()}"
        yield f"{skipped}{total} training steps were left out, because they were not finite"
    if conflicts := conflicting_files(group):
        yield f"the seeds ran different code: {named(conflicts)}"
    if mixed := sorted({name for code in group["run_code"] for name in code.mixed}):
        yield f"trained or evaluated by other code than it began with: {named(mixed)}"
