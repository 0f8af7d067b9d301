"""Puts a scheduler together: pools, prefix cache, limits and first guesses. No torch."""

from __future__ import annotations

from mini_infer.config import EngineConfig

from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.limits import SchedulerLimits
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.step_costs import StepCoefficients, StepCosts


def build_scheduler(
    config: EngineConfig, *, num_blocks: int, num_host_blocks: int, costs: StepCoefficients
) -> Scheduler:
    """An idle scheduler over blocks that are all free.

    Args:
        config: Its limits.
        num_blocks: Of the KV cache.
        num_host_blocks: Of the host, for sequences that are swapped out; 0 swaps none.
        costs: What steps are expected to take at first.
    """
    pool = BlockPool(num_blocks, config.block_size)
    cache = PrefixCache(pool) if config.enable_prefix_caching else None
    host_pool = BlockPool(num_host_blocks, config.block_size) if num_host_blocks else None
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        target_itl_ms=config.target_itl_ms,
        priority_ageing_s=config.priority_ageing_s,
        kv_watermark=config.kv_watermark,
    )
    return Scheduler(BlockManager(pool, cache, host_pool), limits, StepCosts(costs))
