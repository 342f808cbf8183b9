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
    """``marks``, such as " [1]", by row; ``lines``: what they mean; ``codes``: the code of each row, and whether all
    are ``alike``."""

    marks: Mapping[Row, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    codes: Mapping[Row, str] = field(default_factory=dict)

    @property
    def alike(self) -> bool:
        return len(set(self.codes.values())) < 2

    @property
    def below(self) -> tuple[str, ...]:
        """The lines below a table that has a column of codes where they differ."""
        return (*self.lines, *(f"Code: {code}." for code in set(self.codes.values()) if self.alike))

    @property
    def below_without_column(self) -> tuple[str, ...]:
        """The lines below a table without such a column."""
        each = () if self.alike else (f"Code of {row}: {code}." for (row, *_), code in self.codes.items())
        return (*self.below, *each)


def remarks_of(runs: pd.DataFrame) -> Remarks:
    """The remarks about runs with rows (:func:`~deep_components.reporting.frame.label_rows`)."""
    groups: dict[Row, pd.DataFrame] = dict(list(runs.groupby(_ROW, sort=False)))
    conflicts = conflicting_files(runs)
    codes = {key: _codes(group, conflicts) for key, group in groups.items()}
    marks, lines = dict[Row, str](), list[str]()
    for key, group in groups.items():
        for sentence in _sentences(group):
            name = key[0] if runs["setting"].nunique() < 2 else ", ".join(key[:2])
            lines.append(f"[{len(lines) + 1}] {name}: {sentence}.")
            marks[key] = f"{marks.get(key, '')} [{len(lines)}]"
    return Remarks(marks, tuple(lines), codes)


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


def _codes(group: pd.DataFrame, conflicts: list[str]) -> str:
    """A row's code: the fingerprint of what all methods share and the commit, or each of them, and what its other files
    that differ in this table are."""
    shared = "; ".join(dict.fromkeys(map(_code, group["code"], group["commit"])))
    forms = [(name, code.own[name]) for name in conflicts for code in group["run_code"] if name in code.own]
    own = (f"{name.removeprefix('deep_components/')} {digest[:_COMMIT]}" for name, digest in dict.fromkeys(forms))
    return ", ".join([shared, *own])


def _code(total: str | None, commit: str | None) -> str:
    first, dash, modified = str(commit or UNKNOWN).partition("-")
    return f"{total or UNKNOWN} (commit {first[:_COMMIT]}{dash}{modified})"


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
