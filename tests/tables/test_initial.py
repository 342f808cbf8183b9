"""Initial values: standard normal, and a function of (seed, table, id) alone."""

import math

import numpy as np
import torch

from deep_components.tables.initial import fill_initial_rows, initial_rows


def test_initial_rows_are_standard_normal_and_depend_on_their_key_alone() -> None:
    ids = np.arange(20_000)
    rows = initial_rows(30, "rank.video", ids, 8)
    # 160,000 numbers: the mean's standard error is 0.0025, the standard deviation's 0.0018.
    assert abs(rows.mean().item()) < 0.0125 and abs(rows.std().item() - 1) < 0.009
    assert abs(((rows.abs() < 1).double().mean().item()) - math.erf(math.sqrt(0.5))) < 0.006
    assert abs(torch.corrcoef(rows.T).fill_diagonal_(0)).max() < 0.035
    picked = np.array([19_999, 3, 77])
    torch.testing.assert_close(initial_rows(30, "rank.video", picked, 8), rows[picked], rtol=0, atol=0)
    for other in (initial_rows(31, "rank.video", ids, 8), initial_rows(30, "rank.author", ids, 8)):
        assert abs((other * rows).mean().item()) < 0.0125


def test_the_padding_row_is_zero_and_chunks_do_not_show() -> None:
    ids = np.arange(300_000)  # more than one chunk
    table = torch.empty(len(ids), 1, dtype=torch.float64)
    fill_initial_rows(table, 1, "rank.video", ids, padding=2)
    assert table[2].item() == 0
    expected = initial_rows(1, "rank.video", ids[[0, 1, 299_999]], 1)
    torch.testing.assert_close(table[[0, 1, 299_999]], expected, rtol=0, atol=0)
