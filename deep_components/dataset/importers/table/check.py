"""``lcron import --check``: what a table holds, and all that is wrong with it, without writing a log."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deep_components.cli import printable
from deep_components.dataset.encoding import MISSING, NO_TIME, NO_VALUE, FieldEncoding
from deep_components.dataset.importers.table.clean import NO_TRUTH, ONE_ITEM, TWICE
from deep_components.dataset.importers.table.command import Read, day_problems, read_rows, row_problems
from deep_components.dataset.importers.table.learn import Sample, counted_keys, sampled_values
from deep_components.dataset.importers.table.mapping import read_mapping
from deep_components.dataset.importers.table.plan import Plan, make_plan, needed_columns
from deep_components.dataset.importers.table.source import open_source
from deep_components.dataset.importers.table.tasks import workers
from deep_components.errors import InputError

_MANY = 1000  # values from which a number may be an id
_TELLING = 0.99  # share of candidates that one field alone puts into their group


def check_table(mapping_path: Path, scratch: Path, jobs: int, engine: str) -> None:
    """Write the report to stdout. InputError when there are problems: the one, or their number."""
    mapping, problems = read_mapping(mapping_path)
    lines: list[str] = []
    if mapping is not None:
        source = open_source(mapping, needed_columns(mapping))
        problems += source.problems
        mapping = mapping.without(mapping.using(source.faulty))
        if source.files and needed_columns(mapping):
            with workers(jobs, scratch, engine) as run:
                read = read_rows(run, make_plan(mapping, source, scratch, strict=False), source)
            problems += [*row_problems(read, source), *day_problems(read)]
            dated = mapping.rows.time is not None and "time" not in read.scanned.unread
            lines = list(_report(read)) if read.days and dated else []
    for number, problem in enumerate(problems, 1):
        lines.append(f"problem {number}: {problem}")
    sys.stdout.write("".join(f"{printable(' '.join(line.splitlines()))}\n" for line in lines))
    if problems:
        alone = len(problems) == 1
        raise InputError(problems[0] if alone else f"{mapping_path}: {len(problems)} problems, listed above; mend them")


def _report(read: Read) -> Iterator[str]:
    plan, mapping = read.plan, read.plan.mapping
    yield f"table: {mapping.source}, {read.scanned.rows:,} rows"
    for day in read.days:
        counts = read.counts[day]
        use = "test" if day in read.test_days else "training"
        yield f"day {day}, {use}: {counts.requests:,} requests, {counts.rows:,} candidates"
    repairs = sum((counts.repairs for counts in read.counts.values()), Counter[str]())
    yield from (f"{repairs[what]:,} {what}" for what in (NO_TRUTH, ONE_ITEM, TWICE))
    lengths = sum((counts.lengths for counts in read.counts.values()), Counter[int]())
    yield f"candidates of a request: {min(lengths)} to {max(lengths)}, median {_median(lengths)}"
    groups = sum((counts.groups for counts in read.counts.values()), Counter[int]())
    requests = sum(counts.requests for counts in read.counts.values())
    for number, name in enumerate(mapping.groups.names):
        yield f"group {name}: {groups[number]:,} candidates, {groups[number] / requests:.2f} a request"
    sample = read.samples.of_days(read.days)
    yield from (_field_line(plan, entry, sample) for entry in _known_entries(read))
    if read.training_days and read.test_days:
        yield from _unseen(read)
    for suspicion in _suspicions(read, sample):
        yield f"suspicious: {suspicion}"


def _median(lengths: Counter[int]) -> int:
    values = np.array(sorted(lengths))
    return int(values[np.searchsorted(np.cumsum([lengths[v] for v in values.tolist()]), lengths.total() / 2)])


def _missing(entry: FieldEncoding, values: np.ndarray) -> np.ndarray:
    if entry.kind == "id":
        return values == MISSING
    return np.isnan(values) if entry.kind == "number" else values == NO_TIME


def _known_entries(read: Read) -> list[FieldEncoding]:
    """The fields that the table has, without those that could not be read."""
    listed = (entry for entry in read.plan.entries if entry not in read.plan.derived)
    unread = read.scanned.unread
    return [e for e in listed if (read.plan.stored(e) if e.side == "item" else f"{e.side}.{e.name}") not in unread]


def _known(plan: Plan, entry: FieldEncoding, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The sampled values of a field that are there, and which were."""
    values = sampled_values(plan, entry, sample)
    values = values[values != NO_VALUE] if entry.kind == "id" else values
    there = ~_missing(entry, values)
    return values[there], there


def _field_line(plan: Plan, entry: FieldEncoding, sample: Sample) -> str:
    known, there = _known(plan, entry, sample)
    text = f"field {entry.name} of side {entry.side}: {1 - there.mean() if len(there) else 0:.1%} missing"
    if not len(known):
        return text
    if entry.kind == "number":
        low, middle, high = np.quantile(known, [0, 0.5, 1])
        return f"{text}, {low:g} to {high:g}, median {middle:g}"
    if entry.kind == "time":
        first, last = (np.datetime64(int(time // 1_000_000), "s") for time in (known.min(), known.max()))
        return f"{text}, {first} to {last} UTC"
    return text


def _unseen(read: Read) -> Iterator[str]:
    """Of each table the ids, and those of the test days that no training day has."""
    minimum = {table: rule.min_count for rule in read.plan.mapping.fields if rule.kind == "id" for table in rule.tables}
    for table, count in minimum.items():
        learnt = counted_keys(read.plan, table, read.training_days)
        ids, rows = len(learnt), int(learnt["count"].sum())
        if rows > 100 and ids > 0.9 * rows:
            yield f"suspicious: table {table} has {ids:,} ids in {rows:,} values, so few are seen again in training"
        tested = counted_keys(read.plan, table, read.test_days)
        new = ~np.isin(tested["key"], learnt["key"])
        share = tested["count"][new].sum() / max(tested["count"].sum(), 1)
        rare = f", {(learnt['count'] < count).sum():,} of them fewer than {count} times" if count > 1 else ""
        yield (
            f"table {table}: {ids:,} ids in the training days{rare}; of {len(tested):,} ids of the test days "
            f"{new.mean() if len(new) else 0:.1%} were never seen in training, in {share:.1%} of occurrences"
        )


def _suspicions(read: Read, sample: Sample) -> Iterator[str]:
    plan, mapping = read.plan, read.plan.mapping
    for path, rows in sorted(read.scanned.other_days.items()):
        yield (f"{path}: {rows:,} rows are of another day than its name says; check time_zone and time_unit of [rows]")
    for entry in _known_entries(read):
        what = f"field {entry.name} of side {entry.side}, column {entry.column},"
        known, there = _known(plan, entry, sample)
        distinct = len(np.unique(known))
        if not len(known):
            yield f"{what} has no value; leave it out"
        elif distinct == 1 and there.all() and len(there) > 1:
            yield f"{what} has the same value everywhere; leave it out"
        elif entry.kind == "number" and distinct > max(_MANY, len(known) / 2) and (known == np.rint(known)).all():
            yield f"{what} is a number of many whole values; if it is an id, give it kind id"
        if entry.side == "item" and not entry.length and (share := _telling(plan, entry, sample)) > _TELLING:
            yield f"{what} alone tells the ground truth in {share:.1%} of cases; it may not be known when serving"
    constant = [name for number, name in enumerate(mapping.groups.names) if not _has_group(read, number)]
    for name in constant:
        yield f"group {name} has no candidate; check [groups]"


def _has_group(read: Read, number: int) -> bool:
    return any(counts.groups[number] for counts in read.counts.values())


def _telling(plan: Plan, entry: FieldEncoding, sample: Sample) -> float:
    """How well a field alone tells ground truth from the rest, among as many of both: 0.5 .. 1. The sample is halved:
    each value's side is learnt from one half and tried on the other, so that an id with few candidates tells nothing.
    """
    items = sample.items
    values, truth = items[plan.stored(entry)], items["group"] == 0
    if entry.kind == "number":
        values = np.where(np.isnan(values), -np.inf, values)
    half = np.arange(len(items)) % 2 == 0
    if min(truth[half].sum(), (~truth)[half].sum(), truth[~half].sum(), (~truth)[~half].sum()) < 20:
        return 0.5
    distinct, code = np.unique(values, return_inverse=True)
    if len(distinct) > 256:  # a number: 256 ranges of it
        if entry.kind == "id":
            return 0.5
        edges = np.quantile(values[np.isfinite(values)], np.linspace(0, 1, 256)[1:-1])
        code = np.searchsorted(np.unique(edges), values, side="right")
    weight = np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())
    size = int(code.max()) + 1
    for_truth, against = (np.bincount(code[half & t], weight[half & t], size) for t in (truth, ~truth))
    right = (for_truth > against)[code[~half]] == truth[~half]
    return float((weight[~half] * right).sum() / weight[~half].sum())
