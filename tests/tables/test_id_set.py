"""IdSet against a plain sorted set."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from deep_components.tables import id_set
from deep_components.tables.id_set import IdSet

some = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def sizes_and_sets(draw: st.DrawFn, sets: int = 1) -> tuple[int, list[set[int]]]:
    """A size around the 64-bit words' borders, and sets of ids below it."""
    size = draw(st.one_of(st.integers(1, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 4096])))
    return size, [draw(st.sets(st.integers(0, size - 1))) for _ in range(sets)]


def array(ids: set[int] | list[int]) -> np.ndarray:
    return np.array(list(ids), np.int64)


@some
@given(drawn=sizes_and_sets())
def test_a_set_is_its_sorted_ids(drawn: tuple[int, list[set[int]]]) -> None:
    size, [chosen] = drawn
    known = IdSet.of([array(chosen)], size)
    assert known.ids().dtype == np.int64 and known.ids().tolist() == sorted(chosen)
    assert len(known) == len(chosen)
    assert known.size >= size and known.size % 64 == 0


@some
@given(drawn=sizes_and_sets(), data=st.data())
def test_the_row_of_an_id_is_its_rank(drawn: tuple[int, list[set[int]]], data: st.DataObject) -> None:
    size, [chosen] = drawn
    known, ranked = IdSet.of([array(chosen)], size), sorted(chosen)
    asked = data.draw(st.lists(st.sampled_from(ranked), max_size=20)) if ranked else []
    rows = known.rows(array(asked))
    assert rows.dtype == np.int64 and rows.tolist() == [ranked.index(one) for one in asked]
    assert known.rows(known.ids()).tolist() == list(range(len(chosen)))


@some
@given(drawn=sizes_and_sets())
def test_contains_every_id_of_the_set_and_no_other(drawn: tuple[int, list[set[int]]]) -> None:
    size, [chosen] = drawn
    known = IdSet.of([array(chosen)], size)
    assert known.contains(np.arange(size)).tolist() == [one in chosen for one in range(size)]
    for missing in (one for one in (0, size // 2, size - 1) if one not in chosen):
        with pytest.raises(KeyError):
            known.rows(array([*chosen, missing]))


@some
@given(drawn=sizes_and_sets(sets=2))
def test_union_and_equality(drawn: tuple[int, list[set[int]]]) -> None:
    size, (one, other) = drawn
    ours, theirs = IdSet.of([array(one)], size), IdSet.of([array(other)], size)
    assert (ours | theirs).ids().tolist() == sorted(one | other)
    assert (ours | theirs) == IdSet.of([array(one), array(other)], size)
    assert (ours == theirs) == (one == other)
    assert (ours | theirs).rows(ours.ids()).tolist() == [sorted(one | other).index(i) for i in sorted(one)]


def test_ids_may_come_more_than_once_in_arrays_of_any_shape_and_type() -> None:
    known = IdSet.of([np.array([[3, 3], [1, 70]], np.int32), np.zeros((0, 5), np.int64), np.array([1])], 71)
    assert known.ids().tolist() == [1, 3, 70]
    assert known.rows(np.array([[70, 1], [3, 3]])).tolist() == [[2, 0], [1, 1]]


def test_the_bits_are_the_set() -> None:
    known = IdSet.of([np.array([0, 5, 63, 64, 128])], 129)
    assert known.bits.dtype == np.uint64
    assert known.bits.tolist() == [1 | 1 << 5 | 1 << 63, 1, 1]
    assert IdSet(known.bits) == known


@pytest.mark.parametrize("bad", [65, 127, 128, 10**9, -1, -65])
def test_an_id_outside_the_size(bad: int) -> None:
    """65 .. 127 too, for which the last word has bits."""
    with pytest.raises(IndexError):
        IdSet.of([np.array([3, bad])], 65)


def test_many_ids() -> None:
    generator = np.random.default_rng(0)
    chosen = np.unique(generator.integers(0, 1_000_000, 300_000))
    known = IdSet.of([generator.permutation(chosen)], 1_000_000)
    assert np.array_equal(known.ids(), chosen)
    asked = generator.choice(chosen, 50_000)
    assert np.array_equal(known.rows(asked), np.searchsorted(chosen, asked))


@some
@given(drawn=sizes_and_sets(), step=st.integers(1, 9), words=st.integers(1, 5))
def test_every_so_many_th_row(drawn: tuple[int, list[set[int]]], step: int, words: int) -> None:
    """Also where the set is gone through in several pieces."""
    size, [chosen] = drawn
    known = IdSet.of([array(chosen)], size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_set, "_WORDS_AT_A_TIME", words)
        parts = [known.every(step, first) for first in range(step)]
    assert [part.ids().tolist() for part in parts] == [sorted(chosen)[first::step] for first in range(step)]
    assert {part.size for part in parts} == {known.size}


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 300])
def test_all_ids_below_a_size(size: int) -> None:
    assert IdSet.below(size).ids().tolist() == list(range(size))
