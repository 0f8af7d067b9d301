"""How much the KV cache holds, on the device and in the host's memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError

from mini_infer_engine.execution import Execution, StepGraphs
from mini_infer_engine.kv_cache import STAGING_BYTES, KVCache, KVCacheSpec
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.trial_run import largest_batch, largest_prompts, num_trial_blocks

GIB = 2**30
CUDA_SWAP_GIB = 4.0
"""Host memory for swapped blocks beside a CUDA device where `swap_space_gib` is not set, unless
less than twice as much is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """What the KV cache holds.

    Attributes:
        spec: Shape of the cache.
        num_blocks: On the device, at least 1.
        num_host_blocks: For swapped blocks in the host's memory.
        bound: The setting that `num_blocks` follows from.
    """

    spec: KVCacheSpec
    num_blocks: int
    num_host_blocks: int
    bound: str

    @property
    def num_tokens(self) -> int:
        """Tokens that the device's blocks hold."""
        return self.num_blocks * self.spec.block_size

    def summary(self, max_model_len: int) -> dict[str, int | float | str]:
        """What fits, as the fields of a line of the log.

        Args:
            max_model_len: Tokens of the longest sequence.
        """
        return {
            "num_blocks": self.num_blocks,
            "block_size": self.spec.block_size,
            "num_tokens": self.num_tokens,
            "gib": round(self.num_blocks * self.spec.bytes_per_block / GIB, 3),
            "num_longest_seqs": self.num_blocks // -(-max_model_len // self.spec.block_size),
            "num_host_blocks": self.num_host_blocks,
            "bound": self.bound,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Bytes that can be taken.

    Attributes:
        cache: Of the device, by the KV cache, as far as the configuration allows.
        device: Of the device, by anything.
        host: Of the host; the same as the device's on a CPU.
    """

    cache: int
    device: int
    host: int


def size_cache(
    config: EngineConfig, spec: KVCacheSpec, max_model_len: int, free: FreeMemory
) -> CacheSize:
    """Decides how many blocks there are.

    Args:
        config: The bounds.
        spec: Shape of the cache.
        max_model_len: Tokens of the longest sequence.
        free: What there is.

    Raises:
        ConfigError: Where not even a block fits, or where more was asked for than there is.
    """
    num_blocks, bound = _num_blocks(config, spec, max_model_len, free.cache)
    if num_blocks < 1:
        raise ConfigError(
            f"no block of the KV cache ({spec.bytes_per_block} bytes) fits into the "
            f"{max(0, free.cache)} bytes left: raise {bound}, or lower max_num_batched_tokens or "
            "max_num_seqs"
        )
    cache_bytes = num_blocks * spec.bytes_per_block
    if cache_bytes > free.device:
        raise ConfigError(
            f"{bound} {getattr(config, bound)} takes {cache_bytes} bytes, there are {free.device}: "
            "lower it"
        )
    is_cpu = spec.device.type == "cpu"
    swap_gib = config.swap_space_gib
    if swap_gib is None:
        swap_gib = 0.0 if is_cpu else min(CUDA_SWAP_GIB, free.host / GIB / 2)
    free_host_bytes = free.host - cache_bytes if is_cpu else free.host
    if swap_gib * GIB > free_host_bytes:
        raise ConfigError(
            f"swap_space_gib {swap_gib} is more than the {free_host_bytes / GIB:.2f} GiB that are "
            "free in the host's memory: lower it"
        )
    num_host_blocks = int(swap_gib * GIB) // spec.bytes_per_block
    return CacheSize(spec=spec, num_blocks=num_blocks, num_host_blocks=num_host_blocks, bound=bound)


def _num_blocks(
    config: EngineConfig, spec: KVCacheSpec, max_model_len: int, free_bytes: int
) -> tuple[int, str]:
    """Blocks on the device, and the setting that they follow from."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens // spec.block_size, "kv_cache_tokens"
    num_blocks = free_bytes // spec.bytes_per_block
    # More than all sequences of a step can hold is of use to cached prefixes alone.
    num_useful = config.max_num_seqs * -(-max_model_len // spec.block_size)
    if num_blocks > num_useful and not config.enable_prefix_caching:
        return num_useful, "max_num_seqs"
    is_cpu = spec.device.type == "cpu"
    return num_blocks, "cpu_kv_cache_gib" if is_cpu else "gpu_memory_utilization"


def free_memory(
    config: EngineConfig,
    spec: KVCacheSpec,
    max_model_len: int,
    model: CausalLM,
    execution: Execution,
) -> FreeMemory:
    """Finds out what the cache may take, on CUDA by running the largest batch.

    Args:
        config: The bounds.
        spec: Shape of the cache.
        max_model_len: Tokens of the longest sequence.
        model: With its weights.
        execution: What computes the batch.
    """
    if spec.device.type == "cpu":
        cache_bytes = int(min(config.cpu_kv_cache_gib * GIB, 2**62))  # too much is refused later
    elif config.kv_cache_tokens is not None:
        cache_bytes = config.kv_cache_tokens // spec.block_size * spec.bytes_per_block
    else:
        cache_bytes = _free_cuda_bytes(config, spec, max_model_len, model, execution)
    host = available_bytes(torch.device("cpu"))
    return FreeMemory(cache=cache_bytes, device=available_bytes(spec.device), host=host)


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken; on a CPU what the system can make free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an engine before this one has left
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_cuda_bytes(
    config: EngineConfig,
    spec: KVCacheSpec,
    max_model_len: int,
    model: CausalLM,
    execution: Execution,
) -> int:
    """Memory left for the cache, after running the largest batch to see what it takes."""
    prompt_lens = largest_prompts(
        config.max_num_seqs, config.max_num_batched_tokens, max_model_len - 1
    )
    cache = KVCache(spec, num_trial_blocks(prompt_lens, spec.block_size))
    runner = ModelRunner(model, execution.forward, cache, execution.buffers, execution.sampler)
    torch.cuda.synchronize(spec.device)
    before = torch.cuda.memory_allocated(spec.device)
    torch.cuda.reset_peak_memory_stats(spec.device)
    runner.run(largest_batch(prompt_lens, spec.block_size))
    # Blocks on their way and the step that follows do not take memory at the same time.
    step_bytes = max(torch.cuda.max_memory_allocated(spec.device) - before, STAGING_BYTES)
    graph_bytes = _graph_bytes(execution.graphs, cache)
    del runner, cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(spec.device)
    allowed = int(total * config.gpu_memory_utilization) - (total - free)
    return allowed - step_bytes - graph_bytes


def _graph_bytes(graphs: StepGraphs | None, cache: KVCache) -> int:
    """What captured steps take; they are captured for this and released again."""
    if graphs is None:
        return 0
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(cache.spec.device)
    graphs.capture(cache)
    torch.cuda.empty_cache()
    left, _ = torch.cuda.mem_get_info(cache.spec.device)
    graphs.release()
    return free - left
