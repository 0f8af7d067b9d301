"""The block pool: conservation, reference counts, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_infer_engine.block_pool import BlockPool


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 99))))
def test_any_sequence_of_calls_conserves_blocks(calls: list[tuple[str, int]]) -> None:
    freed: list[int] = []
    pool = BlockPool(12, 4, on_free=freed.extend)
    tables: list[list[int]] = []
    for call, number in calls:
        if call == "allocate" and number % 5 <= pool.num_free:
            before = pool.num_free
            tables.append(pool.allocate(number % 5))
            assert before - pool.num_free == number % 5
        elif call == "share" and tables:
            shared = tables[number % len(tables)]
            pool.share(shared)
            tables.append(list(shared))
        elif call == "release" and tables:
            table = tables.pop(number % len(tables))
            still_held = {block for other in tables for block in other}
            freed.clear()
            pool.release(table)
            assert sorted(freed) == sorted(set(table) - still_held)
        pool.check_integrity(tables)
        assert pool.num_free + pool.num_used == 12
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.num_used == 0


def test_more_than_is_free_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(3, 16)
    taken = pool.allocate(2)
    with pytest.raises(ValueError, match="expected at most 1 blocks, got 2"):
        pool.allocate(2)
    pool.check_integrity([taken])


def test_an_empty_block_is_neither_released_nor_shared() -> None:
    pool = BlockPool(3, 16)
    with pytest.raises(ValueError, match="free block 1"):
        pool.release([1])
    with pytest.raises(ValueError, match="empty block 1"):
        pool.share([1])


def test_what_is_kept_is_cached_until_it_is_needed() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, 16)
    pool.on_evict = evicted.append
    first, second, third = pool.allocate(3)
    for block in (first, third):
        pool.keep(block)
    pool.release([first, second, third])
    assert (pool.num_cached, pool.num_free, pool.num_used) == (2, 3, 0)
    assert pool.allocate(1) == [second]
    pool.share([first])
    assert (pool.num_cached, pool.num_used) == (1, 2)
    assert pool.allocate(1) == [third]
    assert evicted == [third]
    pool.release([first])
    pool.drop(first)
    assert (pool.num_cached, pool.num_free) == (0, 1)
    pool.check_integrity([[second], [third]])


def test_integrity_check_notices_a_lost_and_a_doubled_block() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    with pytest.raises(AssertionError):
        pool.check_integrity([table, table])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (4096, 256)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(tokens) == blocks
