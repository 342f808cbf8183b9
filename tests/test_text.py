"""Text for a terminal."""

import hypothesis.strategies as st
from hypothesis import given

from deep_components.text import aligned

CELLS = st.text("abc0.", min_size=1, max_size=8)


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1)))
def test_columns_begin_at_one_place(rows: list[list[str]]) -> None:
    head, rule, *body = aligned(rows)
    starts = [place for place in range(len(rule)) if rule[place] == "-" and rule[:place][-1:] in ("", " ")]
    assert [line.split() for line in (head, *body)] == rows
    for line, cells in zip((head, *body), rows, strict=True):
        assert [line[start : start + len(cell)] for start, cell in zip(starts, cells, strict=True)] == cells
