"""Puts an engine together: folder to config, model, cache, runner and scheduler."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer_kernels.kernel_set import REFERENCE

from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.captured_decode import CAN_RECORD, captured_decode
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import CPU_CACHE_BYTES, KVCache, KVCacheSpec, blocks_that_fit
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.rotary import depends_on_length
from mini_infer_engine.loader import Progress, check_weights, load_weights
from mini_infer_engine.merged_decode import MERGED_ROUNDS, MergedDecode
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.model_runner import EagerForward, Forward, ModelRunner
from mini_infer_engine.models import MODELS
from mini_infer_engine.scheduler import Scheduler, SchedulerLimits
from mini_infer_engine.served_model import ServedModel, read_served_model
from mini_infer_engine.tied_weights import with_stored_ties
from mini_infer_engine.trial_run import (
    largest_prompts,
    num_trial_blocks,
    seconds_per_token,
    trial_batch,
)

log = structlog.get_logger("engine")

SMALL_MODEL_BYTES = 2**27
"""Of weights. A layer's products take microseconds then, and a thread that was put aside for
another process makes each of them wait for milliseconds."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine, the same for the service and in-process.

    Attributes:
        served: The model as clients know it.
        pool: The blocks, which the scheduler alone changes.
        scheduler: The queues.
        runner: The model and its cache.
        model: What the runner runs.
        seconds_per_token: How long a token of a step took in a trial.
    """

    served: ServedModel
    pool: BlockPool
    scheduler: Scheduler
    runner: ModelRunner
    model: CausalLM
    seconds_per_token: float

    def with_empty_queues(self) -> Engine:
        """The same model without any sequence: what to go on with where a step was broken off."""
        pool = BlockPool(self.pool.num_blocks, self.pool.block_size)
        return replace(self, pool=pool, scheduler=Scheduler(pool, self.scheduler.limits))


def build_engine(
    config: EngineConfig,
    on_progress: Progress | None = None,
    *,
    merge_decode_steps: bool = False,
    small_model_threads: int = 0,
) -> Engine:
    """Loads the model and sizes everything for it.

    Args:
        config: What to build.
        on_progress: Called with bytes loaded and bytes in all.
        merge_decode_steps: Whether a lone greedy row of a small model on a CPU makes several
            tokens a step: for who does not wait for single tokens.
        small_model_threads: Threads of a small model's products where the configuration names
            none; 0 leaves them to torch.

    Raises:
        ConfigError: Where the model folder or the device cannot do what was asked.
    """
    device = _choose_device(config.device)
    dtype_name = _choose_dtype(config, device)
    served = read_served_model(config, dtype_name)
    served = replace(served, config=with_stored_ties(served.config, config.model_folder))
    dtype: torch.dtype = getattr(torch, dtype_name)
    model, num_stored_bytes = _load_model(
        config, served, Backend(REFERENCE, dtype, device), on_progress
    )
    is_small = num_stored_bytes < SMALL_MODEL_BYTES
    if num_threads := config.num_threads or (is_small and small_model_threads):
        torch.set_num_threads(num_threads)
    needs_rotation_lens = any(depends_on_length(rope) for rope in served.config.ropes)
    buffers = InputBuffers(
        block_size=config.block_size,
        dtype=dtype,
        device=device,
        windows=served.config.windows,
        needs_rotation_lens=needs_rotation_lens,
    )
    spec = KVCacheSpec(
        num_layers=served.config.num_layers,
        num_kv_heads=served.config.num_kv_heads,
        head_dim=served.config.head_dim,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
    )
    num_blocks = _choose_num_blocks(config, served, spec, model, buffers)
    served = _within_cache(config, served, num_blocks)
    cache = KVCache(spec, num_blocks)
    num_rounds = min(MERGED_ROUNDS, config.block_size) if merge_decode_steps and is_small else 1
    forward = EagerForward(model)
    if device.type == "cpu" and CAN_RECORD and not needs_rotation_lens:
        runner = _make_recorded_runner(forward, cache, buffers, num_rounds)
    else:
        runner = ModelRunner(forward, cache, buffers)
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued_requests=config.max_queued_requests,
    )
    token_s = seconds_per_token(runner, served.max_model_len - 1)
    pool = BlockPool(num_blocks, config.block_size)
    return Engine(served, pool, Scheduler(pool, limits), runner, model, token_s)


def _load_model(
    config: EngineConfig, served: ServedModel, backend: Backend, on_progress: Progress | None
) -> tuple[CausalLM, int]:
    """The model, and the bytes of its weights in the checkpoint; all is checked beforehand."""
    make_model = MODELS[served.config.architecture]
    nowhere = replace(backend, device=torch.device("meta"))
    outline = make_model(served.config, nowhere, num_positions=1)
    check_weights(outline, config.model_folder)
    memory = _memory_bytes(backend.device)
    if outline.num_bytes > memory:
        raise ConfigError(
            f"the weights take {outline.num_bytes} bytes as {served.dtype}, and {memory} are free "
            f"on {backend.device}: choose a smaller model, a machine with more memory, or a dtype "
            "of 16 bits"
        )
    # Of whole blocks: merged steps go beyond a row's end, though not beyond its last block.
    num_positions = -(-served.max_model_len // config.block_size) * config.block_size
    model = make_model(served.config, backend, num_positions=num_positions)
    return model, load_weights(model, config.model_folder, on_progress).num_bytes


def _make_recorded_runner(
    forward: Forward, cache: KVCache, buffers: InputBuffers, num_rounds: int
) -> ModelRunner:
    """Records steps, or leaves them as they are where torch cannot."""
    try:
        captured = captured_decode(forward, cache, buffers)
        merged = None
        if num_rounds > 1:
            merged = MergedDecode(forward, cache, buffers, num_rounds)
    except Exception as error:
        log.warning("decoding steps are not recorded, so they are slower", error=repr(error))
        cache.fill([0], 0.0)
        return ModelRunner(forward, cache, buffers)
    return ModelRunner(captured, cache, buffers, merged)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no CUDA device here; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device {name}: expected "cpu", "cuda" or "cuda:N"') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _choose_dtype(config: EngineConfig, device: torch.device) -> str:
    if config.dtype != "auto":
        return config.dtype
    # A CPU multiplies float32 faster than the half-width types it would convert to and from.
    if device.type == "cpu":
        return "float32"
    return read_model_config(config.model_folder).checkpoint_dtype


def _choose_num_blocks(
    config: EngineConfig,
    served: ServedModel,
    spec: KVCacheSpec,
    model: CausalLM,
    buffers: InputBuffers,
) -> int:
    if spec.device.type == "cuda" and config.kv_cache_tokens is None:
        free_bytes = _free_cuda_bytes(config, served, spec, model, buffers)
    else:
        free_bytes = CPU_CACHE_BYTES
    num_blocks = blocks_that_fit(
        spec,
        max_useful_tokens=config.max_num_seqs * served.max_model_len,
        free_bytes=free_bytes,
        kv_cache_tokens=config.kv_cache_tokens,
    )
    needed = num_blocks * spec.bytes_per_block
    memory = _memory_bytes(spec.device)
    if needed > memory:
        raise ConfigError(
            f"kv_cache_tokens {config.kv_cache_tokens} takes {needed} bytes, there are {memory}: "
            "lower it"
        )
    if num_blocks < 1:
        raise ConfigError(
            f"no block of the KV cache ({spec.bytes_per_block} bytes) fits into the "
            f"{max(0, free_bytes)} bytes left: raise gpu_memory_utilization, or lower "
            "max_num_batched_tokens or max_num_seqs"
        )
    return num_blocks


def _memory_bytes(device: torch.device) -> int:
    """Memory that can be taken; on a CPU what the system can make free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _within_cache(config: EngineConfig, served: ServedModel, num_blocks: int) -> ServedModel:
    """Lowers the context to what the cache holds, so that no request within it is refused."""
    num_tokens = num_blocks * config.block_size
    if num_tokens >= served.max_model_len:
        return served
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {num_tokens} tokens that the "
            "KV cache holds: lower it or raise kv_cache_tokens"
        )
    log.warning("context lowered to the KV cache", model=served.max_model_len, cache=num_tokens)
    return replace(served, max_model_len=num_tokens)


def _free_cuda_bytes(
    config: EngineConfig,
    served: ServedModel,
    spec: KVCacheSpec,
    model: CausalLM,
    buffers: InputBuffers,
) -> int:
    """Memory left for the cache, after running the largest batch to see what it takes."""
    prompt_lens = largest_prompts(
        config.max_num_seqs, config.max_num_batched_tokens, served.max_model_len - 1
    )
    cache = KVCache(spec, num_trial_blocks(prompt_lens, spec.block_size))
    runner = ModelRunner(EagerForward(model), cache, buffers)
    torch.cuda.synchronize(spec.device)
    before = torch.cuda.memory_allocated(spec.device)
    torch.cuda.reset_peak_memory_stats(spec.device)
    runner.run(trial_batch(prompt_lens, spec.block_size))
    activations = torch.cuda.max_memory_allocated(spec.device) - before
    del runner, cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(spec.device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activations
