"""Copied and swapped blocks against a plain model of the two memories."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine.block_moves import NOTHING, Columns, Memories, as_pairs, moves, spec_of, with_moves
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer_engine import kv_cache
from mini_infer_engine.captured_decode import decode_batch
from mini_infer_engine.kv_cache import lazy_zeros


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(moves(), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    blocks_per_piece=st.sampled_from([1, 2, 5, 100]),
)
def test_blocks_move_before_the_forward_in_the_batchs_order(
    steps: list[Columns], dtype: torch.dtype, blocks_per_piece: int
) -> None:
    memories = Memories(dtype)
    with pytest.MonkeyPatch.context() as patch:
        num_bytes = blocks_per_piece * memories.spec.bytes_per_block
        patch.setattr(kv_cache, "STAGING_BYTES", num_bytes)
        for columns in steps:
            memories.run(with_moves(decode_batch(2), columns))
            memories.check()


def test_blocks_move_also_where_the_batch_has_no_rows() -> None:
    memories = Memories()
    before = memories.cache.layers.clone()
    no_rows = replace(with_moves(decode_batch(1), NOTHING), keys=[])
    memories.runner.run(replace(no_rows, swap_outs=as_pairs([(7, 0), (3, 1)])))
    memories.cache.fill([3, 7], float("nan"))
    memories.runner.run(replace(no_rows, swap_ins=as_pairs([(1, 3), (0, 7)])))
    assert torch.equal(memories.cache.layers, before)


def test_a_piece_holds_at_least_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = as_pairs([(0, 1), (2, 3), (4, 5)])
    monkeypatch.setattr(kv_cache, "STAGING_BYTES", 1)
    assert [each.tolist() for each in kv_cache.pieces(pairs, spec_of())] == [
        [[0, 1]],
        [[2, 3]],
        [[4, 5]],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_lazy_zeros_are_zeros_on_pages_of_their_own(dtype: torch.dtype) -> None:
    zeros = lazy_zeros((3, 5, 7), dtype)
    assert zeros.dtype == dtype
    assert zeros.data_ptr() % 4096 == 0
    assert zeros.is_contiguous()
    assert torch.equal(zeros, torch.zeros(3, 5, 7, dtype=dtype))
    assert lazy_zeros((0, 5), dtype).shape == (0, 5)


def test_blocks_that_nobody_wrote_take_no_memory() -> None:
    """In a process of its own, whose memory nobody else takes."""
    code = """
import torch
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

spec = KVCacheSpec(
    num_layers=8, num_kv_heads=4, head_dim=64, block_size=16,
    dtype=torch.float32, device=torch.device("cpu"),
)
before = resident()
cache = KVCache(spec, 2**30 // spec.bytes_per_block)
host_cache = HostCache(spec, 2**30 // spec.bytes_per_block)
cache.fill([5, 6], 1.0)
assert cache.layers.nbytes == 2**30
taken = resident() - before
assert taken < 2**26, taken
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
