"""The engine on a GPU: the same parts and the same tokens as on the CPU. `make test-gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from engine.block_moves import Columns, Memories, as_pairs, moves, spec_of, with_moves
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer import ConfigError, EngineConfig, LLMEngine
from mini_infer_engine.build import build_engine
from mini_infer_engine.captured_decode import decode_batch
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [f"Once upon a time{' there was a' * (index % 5)}" for index in range(20)]


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[LLMEngine]:
    config = EngineConfig(
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=64,
        kv_cache_tokens=2**16,
        swap_space_gib=0.1,
    )
    with LLMEngine(config) as made:
        yield made


def test_greedy_ids_equal_those_on_the_cpu(on_cuda: LLMEngine) -> None:
    options = {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True}
    with LLMEngine(EngineConfig(device="cpu")) as on_cpu:
        expected = on_cpu.generate(PROMPTS, **options)
    outputs = on_cuda.generate(PROMPTS, **options)
    differing = [
        index
        for index, (output, reference) in enumerate(zip(outputs, expected, strict=True))
        if output.token_ids != reference.token_ids
    ]
    # Sums in another order can turn a near tie; more than one in 1,280 tokens is no near tie.
    assert len(differing) <= 1


def test_sampled_ids_equal_those_alone(on_cuda: LLMEngine) -> None:
    together = on_cuda.generate(PROMPTS, max_tokens=16, temperature=0.8, top_k=40, seed=3)
    alone = [
        on_cuda.generate(prompt, max_tokens=16, temperature=0.8, top_k=40, seed=3)[0]
        for prompt in PROMPTS
    ]
    same = [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)]
    assert sum(same) >= len(PROMPTS) - 1


def test_the_checkpoints_type_is_the_default() -> None:
    config = EngineConfig(device="cuda", kv_cache_tokens=4096, swap_space_gib=0)
    with LLMEngine(config) as made:
        assert made._engine.served.dtype == "bfloat16"
        (output,) = made.generate("Once upon a time", max_tokens=8, temperature=0, ignore_eos=True)
        assert len(output.token_ids) == 8


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_the_cache_is_sized_from_free_memory(enable_prefix_caching: bool) -> None:
    config = EngineConfig(
        device="cuda",
        max_num_seqs=256,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=enable_prefix_caching,
        swap_space_gib=1,
    )
    engine = build_engine(config)
    size = engine.cache_size
    num_useful = 256 * engine.served.max_model_len // 16
    if enable_prefix_caching:
        total = torch.cuda.get_device_properties(0).total_memory
        assert num_useful < size.num_blocks
        assert 0.4 * total < engine.runner.cache.layers.nbytes < 0.5 * total
    else:
        assert size.num_blocks == num_useful
    assert size.num_host_blocks == 2**30 // size.spec.bytes_per_block
    assert engine.times.swapped_block_s > 0


def test_a_share_of_memory_that_is_too_small_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="raise gpu_memory_utilization"):
        LLMEngine(EngineConfig(device="cuda", gpu_memory_utilization=0.0001))


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(moves(), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
)
def test_blocks_move_in_the_batchs_order(steps: list[Columns], dtype: torch.dtype) -> None:
    """Nothing waits between the steps, so host blocks are used again while copies are queued."""
    memories = Memories(dtype, "cuda")
    for columns in steps:
        memories.run(with_moves(decode_batch(2), columns))
    memories.check()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_moving_blocks_does_not_wait_for_the_device() -> None:
    memories = Memories(device="cuda")
    columns = (
        as_pairs([(1, 5), (2, 0)]),
        np.array([1, 2], np.int64),
        as_pairs([(5, 2), (0, 1)]),
        as_pairs([(1, 3)]),
    )
    batch = with_moves(decode_batch(1), columns)
    memories.runner._move_blocks(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        memories.runner._move_blocks(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_swapped_blocks_come_back_exact_while_theirs_are_overwritten() -> None:
    """Enough of them that copies are under way while the next ones are queued."""
    spec = KVCacheSpec(
        num_layers=8,
        num_kv_heads=8,
        head_dim=128,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    num_blocks = 512
    cache, host_cache = KVCache(spec, num_blocks), HostCache(spec, num_blocks // 2)
    assert host_cache._blocks.is_pinned()
    cache.layers.normal_()
    before = cache.layers.clone()
    generator = np.random.default_rng(0)
    for _ in range(6):
        blocks = generator.permutation(num_blocks)[: num_blocks // 2]
        host_blocks = generator.permutation(num_blocks // 2)
        host_cache.swap_out(cache, np.stack((blocks, host_blocks), axis=1))
        cache.fill(blocks, float("nan"))
        order = generator.permutation(len(blocks))
        host_cache.swap_in(cache, np.stack((host_blocks, blocks), axis=1)[order])
    assert torch.equal(cache.layers, before)


def test_the_hosts_memory_is_given_back() -> None:
    spec = spec_of(device="cuda")
    host_cache = HostCache(spec, 100)
    blocks = host_cache._blocks
    assert blocks.is_pinned()
    del host_cache
    gc.collect()
    assert not blocks.is_pinned()
