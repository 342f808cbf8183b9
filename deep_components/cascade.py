"""The cascade: its stages, how many items each keeps, the item groups of a request, and what counts as relevant.

Every such number of the project stands here and nowhere else (paper, section 5.1; RecFlow's stages), or in the TOML
file of a cascade of one's own (docs/cascades.md).
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

from deep_components.errors import InputError
from deep_components.files import read_bytes

DEFAULT_SLOTS = 10  # of a group, where neither the cascade nor the log says otherwise
LABEL_CEILING = 30  # the label of position 0 in the true order, as in the original; see Cascade.labels
STAGES_ALLOWED = range(2, 5)

_MAX_BYTES = 1 << 20  # of a TOML file
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# A stage's name becomes that of files, metrics, terms of a loss, and entries of train.jsonl and scores.npz.
_RESERVED = (
    *("loss", "end_to_end", "labels", "mask", "group", "request_id", "training_state", "weight", "joint", "survival"),
    *("step", "day", "skipped", "seconds", "data"),
)


@dataclass(frozen=True)
class Stage:
    """One ranker of the cascade: it keeps its best ``keep`` of the items that reach it."""

    name: str  # of its model's file and metrics
    keep: int  # q, its quota
    model: str  # one of deep_components.models.MODELS, or "my_package.my_module:MyModel"
    exposed_groups: int | None = None  # when it served, it saw the items of the first so many groups; None = all
    nn_units: int | None = None  # the width of its model; None = --nn_units

    def to_json(self) -> dict[str, Any]:
        """Without a width that is not given: runs from before there was one stay the same."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("nn_units", None)}


@dataclass(frozen=True)
class Group:
    """Items of a request that left the online system at the same point."""

    name: str  # in the log
    size: int | None = None  # items of it that a request has at the most; None: as many as the log has, see slots
    position: int | None = None  # the group's common position in the true order; None: every item has its own
    index_field: str | None = None  # the column of RecFlow's all_stage files with the items' own positions

    @property
    def slots(self) -> int:
        """Items of the group in a request of a log whose requests all have as many, in the order of the groups; what
        RecFlow's files have beyond is not used."""
        return DEFAULT_SLOTS if self.size is None else self.size


@dataclass(frozen=True)
class Cascade:
    """Two to four stages in serving order; two or more item groups from best to worst, the ground truth first."""

    stages: tuple[Stage, ...]
    groups: tuple[Group, ...]
    num_relevant: int = 10  # upper limit of K, the ground-truth items of a request that count
    name: str = "custom"  # of the setting, in folders and results

    @property
    def num_items(self) -> int:
        """N, the number of item slots of a request; a log with groups of its own may have another, unless the cascade
        :attr:`has_sizes`."""
        return sum(group.slots for group in self.groups)

    @property
    def has_sizes(self) -> bool:
        """Whether every group has a size of its own, so that no request has more items than :attr:`num_items`."""
        return all(group.size is not None for group in self.groups)

    @property
    def group_of_item(self) -> np.ndarray:
        """[N] int64: the group, from 0, that each item slot of a request belongs to, in a log without groups of its
        own."""
        return np.repeat(np.arange(len(self.groups)), [group.slots for group in self.groups])

    @property
    def label_ceiling(self) -> int:
        """LABEL_CEILING, or the last position in the true order that the groups have, if that is beyond it."""
        return max(LABEL_CEILING, *(g.slots if g.position is None else g.position for g in self.groups))

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """The labels of items at these positions in the true order: max(0, ceiling - position), as labels are gains.

        Items beyond the ceiling tie, below all others.
        """
        return np.maximum(self.label_ceiling - positions, 0)

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    @property
    def quotas(self) -> dict[str, int]:
        """Stage -> the number of items it keeps."""
        return {stage.name: stage.keep for stage in self.stages}

    @property
    def exposed_groups(self) -> dict[str, int]:
        """Stage -> the number of groups, from the best, whose items it saw when it served."""
        return {stage.name: stage.exposed_groups or len(self.groups) for stage in self.stages}

    def seen_groups(self, random_items: int | None) -> dict[str, int]:
        """:attr:`exposed_groups`; the group of ``random_items``, which comes after the last, is seen by the first stage
        alone, as nothing chose them. InputError when the first stage did not see all groups."""
        first, seen = self.stages[0].name, self.exposed_groups
        if not random_items:
            return seen
        if seen[first] < len(self.groups):
            raise InputError(
                f"cascade {self.name}: its first stage, {first}, has exposed_groups={seen[first]}, so that no stage "
                "would see the items of --num_random_items; leave that key out of the stage"
            )
        return seen | {first: len(self.groups) + 1}

    @property
    def icc_cuts(self) -> dict[str, int]:
        """Stage -> where ICC cuts it: at its quota, but the last stage at the quota of the one before it, as the
        original does."""
        return self.quotas | {self.stages[-1].name: self.stages[-2].keep}

    def to_json(self) -> dict[str, Any]:
        """The cascade as plain JSON values."""
        return asdict(self) | {"stages": [s.to_json() for s in self.stages], "groups": [asdict(g) for g in self.groups]}

    @classmethod
    def from_json(cls, content: Any, source: str) -> "Cascade":
        """The reverse of :meth:`to_json`; ``source`` names the file in the InputError for what is no cascade."""
        top = _entry(cls, content, source, "the cascade")
        stages = tuple(Stage(**_entry(Stage, e, source, "a stage")) for e in _list(top, "stages", source))
        groups = tuple(Group(**_entry(Group, e, source, "a group")) for e in _list(top, "groups", source))
        cascade = cls(**top | {"stages": stages, "groups": groups})
        for problem in _problems(cascade):
            raise InputError(f"{source}: {problem}")
        return cascade

    @classmethod
    def from_toml(cls, path: Path) -> "Cascade":
        """The cascade in a TOML file (docs/cascades.md). InputError when it cannot be read or is no cascade."""
        try:
            content = tomllib.loads(read_bytes(path, _MAX_BYTES).decode())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); --cascade names a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not a TOML file ({error}); see docs/cascades.md") from error
        return cls.from_json({"name": path.stem.lower()} | content, str(path))


def _entry(kind: type[Any], content: Any, source: str, what: str) -> dict[str, Any]:
    """The keys of an object that becomes a ``kind``. InputError for a key it does not have, or lacks, or of a type that
    it cannot be."""
    known = {field.name: field for field in fields(kind)}
    if not isinstance(content, Mapping):
        raise InputError(f"{source}: {what} is not a table of keys; see docs/cascades.md")
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{source}: {what} has the key {key!r}; it takes {', '.join(known)}")
        kinds = get_args(known[key].type) or (known[key].type,)
        if get_origin(known[key].type) is not tuple and type(value) not in kinds:
            wanted = "a whole number" if int in kinds else "a text"
            raise InputError(f"{source}: {key} of {what} is {value!r}, not {wanted}")
    for name, field in known.items():
        if name not in content and field.default is MISSING:
            raise InputError(f"{source}: {what} has no {name}; see docs/cascades.md")
    return dict(content)


def _list(top: Mapping[str, Any], name: str, source: str) -> Sequence[Any]:
    if not isinstance(top[name], Sequence) or isinstance(top[name], str):
        raise InputError(f"{source}: {name} is not a list of tables; see docs/cascades.md")
    return top[name]


def _problems(cascade: Cascade) -> Iterator[str]:
    """What is wrong with a cascade, a sentence each."""
    if len(cascade.stages) not in STAGES_ALLOWED:
        yield f"a cascade has {STAGES_ALLOWED[0]} to {STAGES_ALLOWED[-1]} stages, not {len(cascade.stages)}"
    if len(cascade.groups) < 2:
        yield "a cascade has two groups or more, the first of which is the ground truth"
    for what, names in (("stage", cascade.stage_names), ("group", [group.name for group in cascade.groups])):
        for name in names:
            if not _NAME.fullmatch(name) or (what == "stage" and name in _RESERVED):
                yield f"{what} {name!r}: a name is of lower-case letters, digits and _, and not reserved"
        if len(set(names)) < len(names):
            yield f"two of its {what}s have the same name"
    if not _NAME.fullmatch(cascade.name):
        yield f"name {cascade.name!r}: a name is of lower-case letters, digits and _"
    for group in cascade.groups:
        if group.size is not None and group.size < 1:
            yield f"group {group.name}: size is 1 or more"
        if group.position is not None and group.index_field is not None:
            yield f"group {group.name} has position and index_field; give one of them"
    left = cascade.num_items if cascade.has_sizes else None
    for stage in cascade.stages:
        if not 0 < stage.keep <= (left or stage.keep):
            reached = "all items, so 1 or more" if left is None else f"{left} items, so 1 to {left}"
            yield f"stage {stage.name} keeps {stage.keep}; it is reached by {reached}"
        left = stage.keep
        if stage.exposed_groups is not None and not 0 < stage.exposed_groups <= len(cascade.groups):
            yield f"stage {stage.name}: exposed_groups is 1 to {len(cascade.groups)}"
        step = 1 if ":" in stage.model else 4  # the towers of MODELS have quarters of it
        if stage.nn_units is not None and (stage.nn_units < 1 or stage.nn_units % step):
            yield f"stage {stage.name}: nn_units is {'1 or more' if step == 1 else 'a multiple of 4'}"
    if cascade.num_relevant < 1:
        yield "num_relevant is 1 or more"


TWO_STAGE = Cascade(
    stages=(Stage("retrieval", keep=30, model="dssm"), Stage("rank", keep=20, model="din", exposed_groups=2)),
    groups=(
        Group("rank_pos", 10, index_field="rank_index"),
        Group("rank_neg", 10, position=23),
        Group("coarse_neg", 10, position=24),
        Group("prerank_neg", 10, position=25),
    ),
    name="two_stage",
)

THREE_STAGE = Cascade(
    stages=(
        Stage("retrieval", keep=40, model="dssm"),
        Stage("prerank", keep=30, model="mlp", exposed_groups=4),
        Stage("rank", keep=20, model="din", exposed_groups=2),
    ),
    groups=(
        Group("rerank_pos", 10, index_field="rerank_index"),
        Group("rerank_neg", 10, position=22),
        Group("rank_neg", 10, position=23),
        Group("coarse_neg", 10, position=24),
        Group("prerank_neg", 10, position=25),
    ),
    name="three_stage",
)

SETTINGS = {cascade.name: cascade for cascade in (TWO_STAGE, THREE_STAGE)}


def named_cascade(name: str) -> Cascade:
    """What ``--cascade=name`` says: one of SETTINGS, or the cascade in a TOML file, with the errors of from_toml."""
    return SETTINGS.get(name) or Cascade.from_toml(Path(name))
