"""The cascade: its stages, how many items each keeps, the item groups of a request, and what counts as relevant.

Every such number of the project stands here and nowhere else (paper, section 5.1; RecFlow's stages).
"""

from dataclasses import dataclass

LABEL_CEILING = 30  # a label is LABEL_CEILING - position in the true order, so that higher is better


@dataclass(frozen=True)
class Stage:
    """One ranker of the cascade: it keeps its best ``keep`` of the items that reach it.

    ``exposed_groups``: when it served, it saw the items of its cascade's first so many groups; None = all of them.
    """

    name: str
    keep: int
    exposed_groups: int | None = None


@dataclass(frozen=True)
class Group:
    """Items of a request that left the online system at the same point.

    ``position`` is the group's common position in the true order; None says that every item has its own, read from the
    log's column ``index_field``.
    """

    name: str
    position: int | None = None
    index_field: str | None = None

    def label(self) -> int:
        """The label shared by the group's items. Only for groups with a common position."""
        assert self.position is not None
        return LABEL_CEILING - self.position


@dataclass(frozen=True)
class Cascade:
    """Stages in serving order, item groups from best to worst; the first group is the ground truth."""

    stages: tuple[Stage, ...]
    groups: tuple[Group, ...]
    group_size: int = 10
    num_relevant: int = 10
    name: str = "custom"

    @property
    def num_items(self) -> int:
        """N, the number of item places of a request."""
        return len(self.groups) * self.group_size

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

    @property
    def icc_cuts(self) -> dict[str, int]:
        """Stage -> where ICC cuts it: at its quota, but the last stage at the quota of the one before it, as the
        original does."""
        cuts = self.quotas
        names = self.stage_names
        return cuts | {names[-1]: cuts[names[-2]]}


TWO_STAGE = Cascade(
    stages=(Stage("retrieval", keep=30), Stage("rank", keep=20, exposed_groups=2)),
    groups=(
        Group("rank_pos", index_field="rank_index"),
        Group("rank_neg", position=23),
        Group("coarse_neg", position=24),
        Group("prerank_neg", position=25),
    ),
    name="two_stage",
)

THREE_STAGE = Cascade(
    stages=(
        Stage("retrieval", keep=40),
        Stage("prerank", keep=30, exposed_groups=4),
        Stage("rank", keep=20, exposed_groups=2),
    ),
    groups=(
        Group("rerank_pos", index_field="rerank_index"),
        Group("rerank_neg", position=22),
        Group("rank_neg", position=23),
        Group("coarse_neg", position=24),
        Group("prerank_neg", position=25),
    ),
    name="three_stage",
)

SETTINGS = {cascade.name: cascade for cascade in (TWO_STAGE, THREE_STAGE)}
