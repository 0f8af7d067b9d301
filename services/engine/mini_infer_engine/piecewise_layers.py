"""Steps with prompts on a GPU: what the layers compute between attention and attention, as graphs.

Attention alone differs in shape from step to step of as many tokens: how many sequences there are,
how long they are. So the layers are captured piece by piece: a piece begins behind one layer's
attention and ends before the next one's, whose kernels are launched as they are. A step of a few
hundred tokens would otherwise wait for the host to launch hundreds of kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mini_infer_engine.cuda_graphs import GraphPool, borrowed
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionPattern
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.paged_attention import PagedAttentionInputs
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.paged_inputs import PagedInputBuffers


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """A layer's attention, at the same place in each step of a size.

    Attributes:
        query: [T, num_q_heads, head_dim], where the piece before leaves it. It does not own that
            memory, which the piece behind takes for something else.
        cache: The layer's.
        pattern: The layer's.
    """

    query: torch.Tensor
    cache: torch.Tensor
    pattern: AttentionPattern


@dataclass(frozen=True, slots=True)
class _CapturedLayers:
    """All pieces of a size.

    Attributes:
        first: Up to the first layer's attention.
        others: Each layer's attention, and the piece behind it.
        hidden: [T, hidden_size], what the last piece makes.
    """

    first: torch.cuda.CUDAGraph
    others: list[tuple[_AttentionCall, torch.cuda.CUDAGraph]]
    hidden: torch.Tensor


class PiecewiseLayers:
    """Owns the pieces of every size."""

    def __init__(self, model: CausalLM) -> None:
        """Captures nothing yet.

        Args:
            model: Loaded, on a CUDA device.
        """
        self._model = model
        self._captured: dict[int, _CapturedLayers] = {}

    def run(self, inputs: PagedAttentionInputs) -> torch.Tensor | None:
        """Computes the layers: [T, hidden_size]; None where the size is not captured."""
        captured = self._captured.get(len(inputs.positions))
        if captured is None:
            return None
        inputs.prepare()
        captured.first.replay()
        for call, piece in captured.others:
            inputs.attend(call.query, call.cache, call.pattern)
            piece.replay()
        return captured.hidden

    def release(self) -> None:
        """Forgets the pieces."""
        self._captured.clear()

    def capture(self, buffers: PagedInputBuffers, cache: KVCache, sizes: Sequence[int]) -> None:
        """Captures the layers of steps of some sizes.

        Args:
            buffers: Make the inputs of every step.
            cache: The whole cache; the graphs hold its place.
            sizes: Numbers of tokens.
        """
        gc.collect()  # what a collection frees while a piece is captured would end the capture
        pool = torch.cuda.graph_pool_handle()
        # One for all sizes: cuBLAS keeps memory for each stream.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in sorted(sizes, reverse=True):  # the largest first, as in `GraphsBySize`
                inputs = buffers.padding_tokens(size, cache)
                self._model(inputs.token_ids, inputs.cache, inputs.attention)
                torch.cuda.synchronize()
                recorder = _Recorder(inputs.attention, pool)
                self._captured[size] = recorder.capture(self._model, inputs)
        torch.cuda.synchronize()


class _Recorder:
    """In place of a step's attention inputs while the layers are captured."""

    def __init__(self, inputs: PagedAttentionInputs, pool: GraphPool) -> None:
        self.positions = inputs.positions
        self.rotation_lens = inputs.rotation_lens
        self.slot_mapping = inputs.slot_mapping
        self._attended = inputs.attended
        self._pool = pool
        self._pieces: list[torch.cuda.CUDAGraph] = []
        self._calls: list[_AttentionCall] = []

    def capture(
        self, model: CausalLM, inputs: ModelInputs[PagedAttentionInputs]
    ) -> _CapturedLayers:
        """Runs the layers once, cut up at each attention; on a stream that is no default one."""
        self._begin()
        hidden = model(inputs.token_ids, inputs.cache, self)
        self._pieces[-1].capture_end()
        first, *others = self._pieces
        return _CapturedLayers(first, list(zip(self._calls, others, strict=True)), hidden)

    def prepare(self) -> None:
        """Comes before the first piece."""

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, pattern: AttentionPattern
    ) -> torch.Tensor:
        """Ends a piece and begins the next one."""
        self._pieces[-1].capture_end()
        self._calls.append(_AttentionCall(borrowed(query), cache, pattern))
        self._begin()
        return self._attended

    def _begin(self) -> None:
        self._pieces.append(torch.cuda.CUDAGraph())
        self._pieces[-1].capture_begin(pool=self._pool)
