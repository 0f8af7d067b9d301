"""How decoding rows are put into groups."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mini_infer_engine.decode_groups import BLOCKS_PER_GROUP, group_rows

num_blocks_of_rows = st.lists(st.integers(1, 60), max_size=12)


def cost(groups: list[list[int]]) -> int:
    """Of groups of rows that have so many blocks each."""
    return sum(len(each) * max(each) + BLOCKS_PER_GROUP for each in groups)


@given(num_blocks_of_rows, st.integers(1, 5))
def test_each_row_is_in_one_group_and_groups_do_not_overlap(
    num_blocks: list[int], max_groups: int
) -> None:
    groups = group_rows(np.array(num_blocks, np.int64), max_groups)
    assert sorted(itertools.chain(*groups)) == list(range(len(num_blocks)))
    assert all(map(len, groups))
    assert len(groups) <= max_groups
    sizes = [[num_blocks[row] for row in group] for group in groups]
    assert all(max(one) < min(other) for one, other in itertools.pairwise(sizes))


@given(num_blocks_of_rows.filter(bool))
def test_two_groups_are_the_best_two(num_blocks: list[int]) -> None:
    groups = group_rows(np.array(num_blocks), 2)
    ordered = sorted(num_blocks)
    choices = [[ordered]] + [[ordered[:cut], ordered[cut:]] for cut in range(1, len(ordered))]
    found = cost([[num_blocks[row] for row in group] for group in groups])
    assert found == min(map(cost, choices))


@given(num_blocks_of_rows, st.integers(1, 4))
def test_another_group_is_made_only_where_it_pays(num_blocks: list[int], max_groups: int) -> None:
    fewer, more = (
        [[num_blocks[row] for row in group] for group in group_rows(np.array(num_blocks), limit)]
        for limit in (max_groups, max_groups + 1)
    )
    assert cost(more) <= cost(fewer)


def test_rows_in_one_group_keep_their_order() -> None:
    (rows,) = group_rows(np.array([3, 1, 2]), 3)
    assert rows.tolist() == [0, 1, 2]


def test_three_lengths_make_three_groups() -> None:
    groups = group_rows(np.array([2, 40, 3, 12, 41, 2, 11, 2, 2, 12]), 3)
    assert [group.tolist() for group in groups] == [[0, 5, 7, 8, 2], [6, 3, 9], [1, 4]]
