"""Prefix sharing: what is found, what is not, and who never meets whom."""

from __future__ import annotations

import pytest
from engine.scheduling import BLOCK_SIZE, drive, make, run, scheduler_of, step
from hypothesis import given
from hypothesis import strategies as st
from mini_infer_engine.batch import RowStatus, StepTokens
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence

SCOPE = ("", "")
PROMPT = list(range(10, 23))  # 3 full blocks and a token


def names_of(cache: PrefixCache, scope: tuple[str, ...], token_ids: list[int]) -> list[bytes]:
    names: list[bytes] = []
    cache.extend_names(scope, names, token_ids, len(token_ids) // BLOCK_SIZE)
    return names


texts = st.lists(st.integers(0, 2), min_size=4, max_size=12)


@given(first=texts, second=texts)
def test_names_are_equal_just_where_all_before_is(first: list[int], second: list[int]) -> None:
    cache = PrefixCache(BlockPool(1, BLOCK_SIZE))
    pairs = zip(names_of(cache, SCOPE, first), names_of(cache, SCOPE, second), strict=False)
    for index, (one, other) in enumerate(pairs, 1):
        length = index * BLOCK_SIZE
        assert (one == other) == (first[:length] == second[:length])


def test_names_differ_between_scopes_however_they_are_cut() -> None:
    cache = PrefixCache(BlockPool(1, BLOCK_SIZE))
    scopes = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("a",), ("a", "", "3")]
    names = {names_of(cache, scope, PROMPT)[0] for scope in scopes}
    assert len(names) == len(scopes)


def test_names_are_secret() -> None:
    pool = BlockPool(1, BLOCK_SIZE)
    assert names_of(PrefixCache(pool), SCOPE, PROMPT) != names_of(PrefixCache(pool), SCOPE, PROMPT)


def test_names_made_in_pieces_are_those_made_at_once() -> None:
    cache = PrefixCache(BlockPool(1, BLOCK_SIZE))
    names: list[bytes] = []
    for num_blocks in (1, 1, 3, 2):
        cache.extend_names(SCOPE, names, PROMPT, num_blocks)
    assert names == names_of(cache, SCOPE, PROMPT)


def test_a_block_keeps_its_first_name_and_a_name_its_first_block() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    cache = PrefixCache(pool)
    one, other = pool.allocate(2)
    cache.add(b"name", one)
    cache.add(b"name", other)
    assert cache.find([b"name"]) == [one]
    pool.release([one, other])
    assert (pool.num_cached, pool.num_free) == (1, 4)
    cache.check_integrity()


def test_the_least_recently_used_chain_is_evicted_from_its_end() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    cache = PrefixCache(pool)
    old, new = pool.allocate(2), pool.allocate(2)
    for index, block in enumerate([*old, *new]):
        cache.add(b"%d" % index, block)
    pool.release(old)
    pool.release(new)
    cache.check_integrity()
    assert pool.allocate(1) == [old[1]]
    assert cache.find([b"0", b"1"]) == [old[0]]
    pool.share(cache.find([b"0"]))  # used again, so it is not the oldest any more
    pool.release([old[0]])
    assert pool.allocate(1) == [new[1]]
    assert pool.num_evicted == 2
    cache.check_integrity()


def serve(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence, now=0.0)
    drive(scheduler)


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = scheduler_of(32, caches=True)
    first = make(1, 0, 4, prompt=PROMPT, scope=SCOPE)
    serve(scheduler, first)
    before = scheduler.counters()
    second = make(2, 0, 4, prompt=[*PROMPT, 5, 6], scope=SCOPE)
    serve(scheduler, second)
    after = scheduler.counters()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    assert after.num_prefill_tokens - before.num_prefill_tokens == 3
    assert after.num_hit_tokens - before.num_hit_tokens == 12
    assert after.num_queried_tokens - before.num_queried_tokens == 15


def test_outputs_are_cached_as_prompts_are() -> None:
    scheduler = scheduler_of(32, caches=True)
    first = make(1, 0, 20, prompt=PROMPT, scope=SCOPE, ignore_eos=True)
    serve(scheduler, first)
    second = make(2, 0, 4, prompt=first.token_ids, scope=SCOPE)
    serve(scheduler, second)
    # The last token's K and V were never computed, and the last full block is without it.
    assert second.num_cached_tokens == (len(first.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_the_last_token_is_computed_even_where_all_is_known() -> None:
    scheduler = scheduler_of(32, caches=True)
    for stream in (1, 2):
        sequence = make(stream, 0, 1, prompt=PROMPT[:12], scope=SCOPE)
        serve(scheduler, sequence)
    assert sequence.num_cached_tokens == 8


@pytest.mark.parametrize("scope", [("", "salt"), ("tenant", ""), None])
def test_other_tenants_and_salts_never_hit(scope: tuple[str, ...] | None) -> None:
    scheduler = scheduler_of(32, caches=True)
    serve(scheduler, make(1, 0, 4, prompt=PROMPT, scope=SCOPE))
    stranger = make(2, 0, 4, prompt=PROMPT, scope=scope)
    serve(scheduler, stranger)
    assert stranger.num_cached_tokens == 0
    assert scheduler.counters().num_hit_tokens == 0


def test_a_running_sequence_shares_what_it_has_computed() -> None:
    scheduler = scheduler_of(32, caches=True)
    first = make(1, 0, 30, prompt=PROMPT, scope=SCOPE, ignore_eos=True)
    scheduler.add(first, now=0.0)
    step(scheduler)
    second = make(2, 0, 30, prompt=PROMPT, scope=SCOPE, ignore_eos=True)
    scheduler.add(second, now=0.0)
    batch, _ = step(scheduler)
    assert second.block_table[:3] == first.block_table[:3]
    assert second.block_table[3] != first.block_table[3]
    assert batch.num_computed_tokens.tolist() == [13, 12]
    assert scheduler.blocks.pool.num_used == 5


def test_without_a_cache_nothing_is_shared_or_kept() -> None:
    scheduler = scheduler_of(32)
    for stream in (1, 2):
        sequence = make(stream, 0, 4, prompt=PROMPT, scope=SCOPE)
        serve(scheduler, sequence)
        assert sequence.num_cached_tokens == 0
    assert scheduler.blocks.pool.num_cached == 0


def test_blocks_of_a_sequence_that_failed_are_found_by_nobody() -> None:
    scheduler = scheduler_of(32, caches=True, budget=8)
    bad = make(1, 0, 4, prompt=PROMPT, scope=SCOPE)
    scheduler.add(bad, now=0.0)
    step(scheduler)  # two blocks are named before the first logits come
    batch = scheduler.schedule(0.0)
    tokens = StepTokens(run(batch).token_ids, run(batch).statuses + RowStatus.NON_FINITE)
    (update,) = scheduler.finish_step(batch, tokens, 0.0)
    assert update.error is not None
    scheduler.check_integrity()
    assert scheduler.blocks.pool.num_cached == 0
    again = make(2, 0, 4, prompt=PROMPT, scope=SCOPE)
    serve(scheduler, again)
    assert again.num_cached_tokens == 0
