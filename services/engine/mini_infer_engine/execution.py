"""What computes the steps of a model on its device: kernels, inputs, graphs, the choice of tokens.

On CUDA with Triton the project's kernels run, captured as graphs where a step only decodes;
anywhere else torch's own operations do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch
from mini_infer.config import EngineConfig
from mini_infer_kernels.kernel_set import REFERENCE, KernelSet, triton_kernels
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING, triton_sampling

from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.rotary import depends_on_length
from mini_infer_engine.model_inputs import BuildsInputs
from mini_infer_engine.model_runner import EagerForward, Forward
from mini_infer_engine.sampling import Sampler
from mini_infer_engine.served_model import ServedModel

log = structlog.get_logger("engine")


@dataclass(frozen=True, slots=True)
class Execution:
    """What a runner is made of, beside model and cache.

    Attributes:
        forward: The model.
        buffers: Make its inputs.
        sampler: Chooses tokens.
        runs_ahead: Whether a step can be launched before the tokens of the one under way are known.
        capture: Captures what can be, over the cache that all steps will use.
    """

    forward: Forward
    buffers: BuildsInputs
    sampler: Sampler
    runs_ahead: bool
    capture: Callable[[KVCache], None]


def choose_kernels(device: torch.device) -> KernelSet:
    """The kernels for a device."""
    if device.type == "cuda":
        try:
            return triton_kernels()
        except ImportError:
            log.warning("the model runs without Triton's kernels, so slower: install triton")
    return REFERENCE


def needs_rotation_lens(served: ServedModel) -> bool:
    """Whether a rotary embedding of the model depends on more than positions."""
    return any(depends_on_length(rope) for rope in served.config.ropes)


def make_execution(
    config: EngineConfig, served: ServedModel, spec: KVCacheSpec, model: CausalLM
) -> Execution:
    """Chooses by the model's kernels.

    Args:
        config: The bounds of a step.
        served: The model as clients know it.
        spec: Shape of the cache.
        model: Loaded.
    """
    if model.kernels is REFERENCE:
        return _torch_execution(config, served, spec, model)
    return _triton_execution(config, served, spec, model)


def _torch_execution(
    config: EngineConfig, served: ServedModel, spec: KVCacheSpec, model: CausalLM
) -> Execution:
    buffers = InputBuffers(
        block_size=spec.block_size,
        dtype=spec.dtype,
        device=spec.device,
        windows=served.config.windows,
        needs_rotation_lens=needs_rotation_lens(served),
    )
    sampler = Sampler(
        REFERENCE_SAMPLING,
        vocab_size=served.config.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=served.max_model_len,
        device=spec.device,
    )
    return Execution(
        EagerForward(model), buffers, sampler, runs_ahead=False, capture=lambda cache: None
    )


def _triton_execution(
    config: EngineConfig, served: ServedModel, spec: KVCacheSpec, model: CausalLM
) -> Execution:
    from mini_infer_engine.graphed_choice import GraphedChoice
    from mini_infer_engine.graphed_forward import GraphedForward
    from mini_infer_engine.paged_inputs import PagedInputBuffers, PagedLimits

    limits = PagedLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_blocks=-(-served.max_model_len // spec.block_size),
    )
    buffers = PagedInputBuffers(
        spec,
        limits,
        num_q_heads=served.config.num_q_heads,
        windows=served.config.windows,
        needs_rotation_lens=needs_rotation_lens(served),
    )
    forward = GraphedForward(model, buffers, config.max_num_seqs, served.config.vocab_size)
    kernels = triton_sampling()
    choice = GraphedChoice(kernels, forward.logits, buffers.results)
    sampler = Sampler(
        kernels,
        vocab_size=served.config.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=served.max_model_len,
        device=spec.device,
        choice=choice,
    )

    @torch.inference_mode()
    def capture(cache: KVCache) -> None:
        if config.enforce_eager:
            return
        forward.capture(cache)
        choice.capture()

    return Execution(forward, buffers, sampler, runs_ahead=True, capture=capture)
