"""The cascade: its stages, how many items each keeps, the item groups of a request, and what counts as relevant.

Every such number of the project stands here and nowhere else (paper, section 5.1; RecFlow's stages).
"""

from dataclasses import dataclass

LABEL_CEILING = 30  # a label is LABEL_CEILING - position in the true order, so that higher is better


@dataclass(frozen=True)
class Stage:
    """One ranker of the cascade: it keeps its best ``keep`` of the items that reach it."""

    name: str
    keep: int


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


TWO_STAGE = Cascade(
    stages=(Stage("retrieval", keep=30), Stage("rank", keep=20)),
    groups=(
        Group("rank_pos", index_field="rank_index"),
        Group("rank_neg", position=23),
        Group("coarse_neg", position=24),
        Group("prerank_neg", position=25),
    ),
    name="two_stage",
)

THREE_STAGE = Cascade(
    stages=(Stage("retrieval", keep=40), Stage("prerank", keep=30), Stage("rank", keep=20)),
    groups=(
        Group("rerank_pos", index_field="rerank_index"),
        Group("rerank_neg", position=22),
        Group("rank_neg", position=23),
        Group("coarse_neg", position=24),
        Group("prerank_neg", position=25),
    ),
    name="three_stage",
)
