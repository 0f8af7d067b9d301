"""Steps of decoding rows alone, recorded once and replayed: a CPU's counterpart of CUDA graphs.

A small model's step is hundreds of operations of a few microseconds each, and going back to Python
between them takes as long again. `torch.jit.trace` records the operations of one step; the
recording runs them without Python, for any number of rows and any context. Steps with prompts in
them run eagerly: their products outweigh it.

Only on a CPU, and only before Python 3.14, where torch no longer supports `torch.jit`. Elsewhere,
and where recording fails, every step runs eagerly: slower, with the same tokens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from mini_infer.sampling_params import ResolvedSampling

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.input_buffers import InputBuffers, ModelInputs
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.model_runner import Forward
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence, StreamKey

Recording = Callable[..., torch.Tensor]

CAN_RECORD = sys.version_info < (3, 14)
"""Whether torch supports `torch.jit` here."""


class CapturedDecode:
    """The same logits as the model's own, from recordings wherever there is one.

    The two kinds of step (rows that gather their blocks, and a row that reads a window of the
    cache) differ in their operations, so each is recorded when `capture` sees it first.
    """

    def __init__(self, forward: Forward) -> None:
        """Replays what `forward` does, once it has been captured."""
        self._forward = forward
        self._recordings: dict[int, Recording] = {}

    def __call__(self, inputs: ModelInputs) -> torch.Tensor:
        """Computes a batch, replaying where its kind has been captured."""
        if inputs.attention.prefill_lens or inputs.sampled_tokens is not None:
            return self._forward(inputs)
        tensors = _tensors(inputs)
        recording = self._recordings.get(len(tensors))
        return self._forward(inputs) if recording is None else recording(*tensors)

    def capture(self, inputs: ModelInputs) -> None:
        """Records a step of decoding rows; it is run, so it writes its slots of the cache."""
        tensors = _tensors(inputs)
        self._recordings[len(tensors)] = record(
            lambda *each: self._forward(_replaced(inputs, each)), tensors
        )


def record(function: Callable[..., Any], tensors: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """Runs a function of tensors and gives its operations as a function that needs no Python."""
    with torch.inference_mode(), warnings.catch_warnings():
        # What Python reads off shapes are the model's own sizes, the same in every step. That the
        # function is deprecated: every torch that the project admits has it, and what is to
        # replace it needs a compiler on the user's machine.
        warnings.simplefilter("ignore")
        trace: Callable[..., Callable[..., Any]] = torch.jit.trace
        recording = trace(function, tensors, check_trace=False)
    return recording


def captured_decode(forward: Forward, cache: KVCache, buffers: InputBuffers) -> CapturedDecode:
    """Captures both kinds of step, on blocks that nobody uses yet.

    Args:
        forward: The model.
        cache: Its cache, which is left cleared.
        buffers: Makes the inputs.
    """
    captured = CapturedDecode(forward)
    for num_rows in (1, 2):
        captured.capture(buffers.build(decode_batch(num_rows), cache))
    cache.fill([0], 0.0)
    return captured


def decode_batch(num_rows: int) -> ScheduledBatch:
    """Rows whose first token is decoded, all of them in block 0."""
    sampling = ResolvedSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=1)
    running = RunningBatch(num_rows)
    for stream in range(num_rows):
        sequence = Sequence(StreamKey(b"", stream), [0], sampling, eos_token_ids=())
        sequence.block_table = [0]
        running.add(sequence)
    return running.build(0, list(running), [], BlockTransfers())


def _tensors(inputs: ModelInputs) -> tuple[torch.Tensor, ...]:
    """What differs from step to step."""
    attention = inputs.attention
    every_kind = (inputs.token_ids, inputs.cache, attention.positions, attention.slot_mapping)
    if attention.decode_block_tables is None:
        return every_kind
    return (*every_kind, attention.decode_block_tables, *attention.decode_masks)


def _replaced(inputs: ModelInputs, tensors: tuple[torch.Tensor, ...]) -> ModelInputs:
    """The inverse of `_tensors`."""
    token_ids, cache, positions, slot_mapping, *gathered = tensors
    attention = replace(
        inputs.attention,
        positions=positions,
        slot_mapping=slot_mapping,
        decode_block_tables=gathered[0] if gathered else None,
        decode_masks=tuple(gathered[1:]),
    )
    return replace(inputs, token_ids=token_ids, cache=cache, attention=attention)
