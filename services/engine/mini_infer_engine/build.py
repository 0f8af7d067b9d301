"""Puts an engine together: folder to config, model, cache, runner and scheduler."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import structlog
import torch
from mini_infer.config import DUMMY, EngineConfig
from mini_infer.errors import ConfigError

from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.captured_decode import CAN_RECORD, CapturedDecode, captured_decode
from mini_infer_engine.dummy_weights import draw_weights
from mini_infer_engine.execution import (
    Execution,
    StepGraphs,
    choose_kernels,
    make_execution,
    needs_rotation_lens,
)
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.loader import Progress, check_weights, load_weights
from mini_infer_engine.lone_row import LoneRow, num_lone_row_blocks
from mini_infer_engine.memory import CacheSize, available_bytes, free_memory, size_cache
from mini_infer_engine.merged_decode import MERGED_ROUNDS, MergedDecode
from mini_infer_engine.model_config import ModelConfig, read_model_config
from mini_infer_engine.model_runner import Forward, ModelRunner
from mini_infer_engine.models import MODELS
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.served_model import ServedModel, read_served_model
from mini_infer_engine.step_costs import StepCoefficients
from mini_infer_engine.tied_weights import with_stored_ties
from mini_infer_engine.trial_run import StepTimes, measure_step_times, warm_up

log = structlog.get_logger("engine")

SMALL_MODEL_BYTES = 2**27
"""Of weights. A layer's products take microseconds then, and a thread that was put aside for
another process makes each of them wait for milliseconds."""

_NO_SWAPS_S = 1e-6
"""In place of the time of a swapped block, where none is ever swapped."""

_FEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The parts of an engine, the same for the service and in-process.

    Attributes:
        config: What it was built from.
        served: The model as clients know it.
        scheduler: The queues.
        runner: The model and its cache.
        model: What the runner runs.
        cache_size: What its cache holds.
        times: How long parts of a step took in a trial.
        graphs: Its captured steps, where there are some.
    """

    config: EngineConfig
    served: ServedModel
    scheduler: Scheduler
    runner: ModelRunner
    model: CausalLM
    cache_size: CacheSize
    times: StepTimes
    graphs: StepGraphs | None = None

    @property
    def pool(self) -> BlockPool:
        """The blocks, which the scheduler alone changes."""
        return self.scheduler.blocks.pool

    def close(self) -> None:
        """Ends its threads and gives the memory of its graphs back."""
        self.served.grammars.close()
        if self.graphs is not None:
            self.graphs.close()

    @property
    def seconds_per_token(self) -> float:
        """How long a step takes for each of its tokens, where it has few."""
        return self.times.step_s / _FEW_TOKENS + self.times.token_s

    def with_empty_queues(self) -> Engine:
        """The same model without any sequence: what to go on with where steps were broken off."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        # What such a step has written may not be finite.
        condemned = self.scheduler.blocks.take_transfers().zero_blocks
        condemned += self.scheduler.blocks_under_way()
        if condemned:
            self.runner.cache.fill(np.unique(condemned), 0.0)
        learnt = self.scheduler.costs.coefficients
        return replace(self, scheduler=_make_scheduler(self.config, self.cache_size, learnt))


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
    served, backend = _read_model(config)
    # Kernels are launched, and captured, on the current device.
    is_cuda = backend.device.type == "cuda"
    with torch.cuda.device(backend.device) if is_cuda else nullcontext():
        model, num_stored_bytes = _load_model(config, served, backend, on_progress)
        is_small = num_stored_bytes < SMALL_MODEL_BYTES
        if num_threads := config.num_threads or (is_small and small_model_threads):
            torch.set_num_threads(num_threads)
        merges = merge_decode_steps and is_small
        return _put_together(config, served, backend, model, merges=merges)


def _put_together(
    config: EngineConfig, served: ServedModel, backend: Backend, model: CausalLM, *, merges: bool
) -> Engine:
    """Everything around a loaded model; `merges`: a lone row may make several tokens a step."""
    spec = _cache_spec(config, served, backend)
    execution = make_execution(config, served, spec, model)
    cache_size = _size_cache(config, served, spec, model, execution)
    served = _within_cache(config, served, cache_size)
    num_rounds = min(MERGED_ROUNDS, config.block_size) if merges else 1
    runner = _make_runner(served, model, execution, cache_size, num_rounds)
    longest_prompt = min(served.max_model_len - 1, config.max_num_batched_tokens)
    if spec.device.type == "cuda":
        warm_up(runner, config.max_num_seqs, longest_prompt)
    times = measure_step_times(runner, longest_prompt)
    return Engine(
        config=config,
        served=served,
        scheduler=_make_scheduler(
            config, cache_size, _first_costs(times, cache_size, model, served.config)
        ),
        runner=runner,
        model=model,
        cache_size=cache_size,
        times=times,
        graphs=execution.graphs,
    )


def _make_scheduler(
    config: EngineConfig, cache_size: CacheSize, costs: StepCoefficients
) -> Scheduler:
    return build_scheduler(
        config,
        num_blocks=cache_size.num_blocks,
        num_host_blocks=cache_size.num_host_blocks,
        costs=costs,
    )


def _first_costs(
    times: StepTimes, size: CacheSize, model: CausalLM, config: ModelConfig
) -> StepCoefficients:
    """What the scheduler expects of steps at first.

    A trial has no context to speak of, so what that costs is reckoned (derived here). A decoding
    row reads the K and V of its context as fast as a step reads the weights. A pair of tokens takes
    4 * heads * head_dim operations a layer, queries by keys and weights by values; a token takes 2
    for each weight.
    """
    spec = size.spec
    bytes_per_token = spec.bytes_per_block / spec.block_size
    pair_share = 2 * spec.num_layers * config.num_q_heads * spec.head_dim / config.num_parameters
    return StepCoefficients(
        step_s=times.step_s,
        row_s=times.token_s,
        context_s=times.step_s * bytes_per_token / model.num_bytes,
        token_s=times.token_s,
        pair_s=times.token_s * pair_share,
        block_s=times.swapped_block_s or _NO_SWAPS_S,
    )


def _read_model(config: EngineConfig) -> tuple[ServedModel, Backend]:
    """What the model folder says without the weights, and what they will run on."""
    device = _choose_device(config.device)
    model_config = read_model_config(config.model_folder)
    if config.load_format != DUMMY:
        model_config = with_stored_ties(model_config, config.model_folder)
    dtype_name = config.dtype
    if dtype_name == "auto":
        # A CPU multiplies float32 faster than the half-width types it would convert to and from.
        dtype_name = "float32" if device.type == "cpu" else model_config.checkpoint_dtype
    served = read_served_model(config, model_config, dtype_name)
    return served, Backend(choose_kernels(device), getattr(torch, dtype_name), device)


def _load_model(
    config: EngineConfig, served: ServedModel, backend: Backend, on_progress: Progress | None
) -> tuple[CausalLM, int]:
    """The model, and the bytes of its weights in the checkpoint; all is checked beforehand."""
    make_model = MODELS[served.config.architecture]
    nowhere = replace(backend, device=torch.device("meta"))
    outline = make_model(served.config, nowhere, num_positions=1)
    is_dummy = config.load_format == DUMMY
    if not is_dummy:
        check_weights(outline, config.model_folder)
    memory = available_bytes(backend.device)
    if outline.num_bytes > memory:
        raise ConfigError(
            f"the weights take {outline.num_bytes} bytes as {served.dtype}, and {memory} are free "
            f"on {backend.device}: choose a smaller model, a machine with more memory, or a dtype "
            "of 16 bits"
        )
    # Of whole blocks: merged steps go beyond a row's end, though not beyond its last block.
    num_positions = -(-served.max_model_len // config.block_size) * config.block_size
    model = make_model(served.config, backend, num_positions=num_positions)
    if is_dummy:
        log.warning("the weights are random numbers", load_format=DUMMY)
        draw_weights(model.destinations())
        return model, model.num_bytes
    return model, load_weights(model, config.model_folder, on_progress).num_bytes


def _can_record(served: ServedModel, spec: KVCacheSpec) -> bool:
    return spec.device.type == "cpu" and CAN_RECORD and not needs_rotation_lens(served)


def _cache_spec(config: EngineConfig, served: ServedModel, backend: Backend) -> KVCacheSpec:
    return KVCacheSpec(
        num_layers=served.config.num_layers,
        num_kv_heads=served.config.num_kv_heads,
        head_dim=served.config.head_dim,
        block_size=config.block_size,
        dtype=backend.dtype,
        device=backend.device,
    )


def _size_cache(
    config: EngineConfig,
    served: ServedModel,
    spec: KVCacheSpec,
    model: CausalLM,
    execution: Execution,
) -> CacheSize:
    """Sizes the cache beside the copy of a lone row."""
    free = free_memory(config, spec, served.max_model_len, model, execution)
    copy_bytes = _num_lone_row_blocks(served, spec) * spec.bytes_per_block
    left = replace(free, device=free.device - copy_bytes, host=free.host - copy_bytes)
    return size_cache(config, spec, served.max_model_len, left)


def _num_lone_row_blocks(served: ServedModel, spec: KVCacheSpec) -> int:
    """Room for the copy of a lone row, for models whose steps can be recorded."""
    if spec.device.type != "cpu" or needs_rotation_lens(served):
        return 0
    return num_lone_row_blocks(spec, served.max_model_len)


def _make_runner(
    served: ServedModel,
    model: CausalLM,
    execution: Execution,
    cache_size: CacheSize,
    num_rounds: int,
) -> ModelRunner:
    """Allocates the caches; captures or records steps where that can be done."""
    spec = cache_size.spec
    cache = KVCache(spec, cache_size.num_blocks)
    host_cache = HostCache(spec, cache_size.num_host_blocks)
    lone_row = LoneRow(cache, _num_lone_row_blocks(served, spec))
    if execution.graphs is not None:
        execution.graphs.capture(cache)
    forward, merged = execution.forward, None
    buffers = execution.buffers
    if isinstance(buffers, InputBuffers) and _can_record(served, spec):
        try:
            forward, merged = _record(forward, cache, buffers, num_rounds)
        except Exception as error:
            log.warning("decoding steps are not recorded, so they are slower", error=repr(error))
            cache.fill([0], 0.0)
    return ModelRunner(
        model,
        forward,
        cache,
        buffers,
        execution.sampler,
        merged,
        host_cache,
        lone_row,
        runs_ahead=execution.runs_ahead,
    )


def _record(
    forward: Forward, cache: KVCache, buffers: InputBuffers, num_rounds: int
) -> tuple[CapturedDecode, MergedDecode | None]:
    captured = captured_decode(forward, cache, buffers)
    merged = MergedDecode(forward, cache, buffers, num_rounds) if num_rounds > 1 else None
    return captured, merged


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


def _within_cache(config: EngineConfig, served: ServedModel, cache_size: CacheSize) -> ServedModel:
    """Lowers the context to what the cache holds, so that no request within it is refused."""
    num_tokens = cache_size.num_tokens
    if num_tokens >= served.max_model_len:
        return served
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {num_tokens} tokens that the "
            f"KV cache holds: lower it or raise {cache_size.bound}"
        )
    log.warning("context lowered to the KV cache", model=served.max_model_len, cache=num_tokens)
    return replace(served, max_model_len=num_tokens)
