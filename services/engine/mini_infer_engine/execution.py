"""What computes the steps of a model on its device: kernels, inputs, graphs, the choice of tokens.

On CUDA with Triton the project's kernels run, captured as graphs where a step only decodes;
anywhere else torch's own operations do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch
from mini_infer.config import EngineConfig
from mini_infer_kernels.kernel_set import REFERENCE, KernelSet, triton_kernels
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING, triton_sampling

from mini_infer_engine.graph_sizes import token_sizes
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.rotary import depends_on_length
from mini_infer_engine.model_config import ModelConfig
from mini_infer_engine.model_inputs import BuildsInputs
from mini_infer_engine.model_runner import EagerForward, Forward
from mini_infer_engine.sampling import Sampler
from mini_infer_engine.served_model import ServedModel

_LAUNCHES_OF_LAYER_S = 200e-6
"""What the host takes to launch a layer's operations one by one, on a server of 2024."""
_OPERATIONS_PER_S = 700e12
"""Of a large product of 16-bit numbers on an H200."""
_LEAST_LAUNCH_BOUND, _MOST_LAUNCH_BOUND = 256, 2048

if TYPE_CHECKING:
    from mini_infer_engine.graphed_choice import GraphedChoice
    from mini_infer_engine.graphed_forward import GraphedForward

log = structlog.get_logger("engine")


class StepGraphs:
    """The graphs of an engine: those of the model over its cache, and those of the choice."""

    def __init__(self, forward: GraphedForward, choice: GraphedChoice) -> None:
        """Captures the choice, which has nothing to do with the cache."""
        self._forward = forward
        self._choice = choice
        choice.capture()

    def capture(self, cache: KVCache) -> None:
        """Captures the model's steps; those over another cache must have been released."""
        self._forward.capture(cache)

    def release(self) -> None:
        """Gives the memory of the model's steps back."""
        self._forward.release()

    def close(self) -> None:
        """Gives all memory back."""
        self._choice.release()
        self._forward.release()


@dataclass(frozen=True, slots=True)
class Execution:
    """What a runner is made of, beside model and cache.

    Attributes:
        forward: The model.
        buffers: Make its inputs.
        sampler: Chooses tokens.
        runs_ahead: Whether a step can be launched before the tokens of the one under way are known.
        graphs: What can be captured, or None.
    """

    forward: Forward
    buffers: BuildsInputs
    sampler: Sampler
    runs_ahead: bool
    graphs: StepGraphs | None = None


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
    return Execution(EagerForward(model), buffers, sampler, runs_ahead=False)


def _triton_execution(
    config: EngineConfig, served: ServedModel, spec: KVCacheSpec, model: CausalLM
) -> Execution:
    from mini_infer_engine.graphed_choice import GraphedChoice
    from mini_infer_engine.graphed_forward import GraphedForward
    from mini_infer_engine.paged_inputs import PagedInputBuffers, PagedLimits

    vocab_size = served.config.vocab_size
    sizes: list[int] = []
    if not config.enforce_eager:
        most = _num_launch_bound_tokens(served.config, config.max_num_batched_tokens)
        sizes = token_sizes(most)
    limits = PagedLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_blocks=-(-served.max_model_len // spec.block_size),
        token_sizes=sizes,
    )
    buffers = PagedInputBuffers(
        spec,
        limits,
        num_q_heads=served.config.num_q_heads,
        windows=served.config.windows,
        needs_rotation_lens=needs_rotation_lens(served),
    )
    forward = GraphedForward(model, buffers, config.max_num_seqs, vocab_size, sizes)
    kernels = triton_sampling()
    choice = GraphedChoice(kernels, forward.logits, buffers.results)
    sampler = Sampler(
        kernels,
        vocab_size=vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=served.max_model_len,
        device=spec.device,
        choice=choice,
    )
    graphs = None if config.enforce_eager else StepGraphs(forward, choice)
    return Execution(forward, buffers, sampler, runs_ahead=True, graphs=graphs)


def _num_launch_bound_tokens(config: ModelConfig, max_num_batched_tokens: int) -> int:
    """Tokens up to which a step with prompts takes the host longer to launch than the device.

    A token takes two operations for each weight (derived here).
    """
    launches_s = config.num_layers * _LAUNCHES_OF_LAYER_S
    tokens_per_s = _OPERATIONS_PER_S / (2 * config.num_parameters)
    num_tokens = int(launches_s * tokens_per_s)
    most = min(_MOST_LAUNCH_BOUND, max_num_batched_tokens)
    return min(max(num_tokens, _LEAST_LAUNCH_BOUND), most)
