"""Steps of decoding rows alone, recorded once and replayed: a CPU's counterpart of CUDA graphs.

A small model's step is hundreds of operations of a few microseconds each, and going back to Python
between them takes as long again. `torch.jit.trace` records the operations of one step; the
recording runs them without Python, for any number of rows and any context. Steps with prompts in
them run eagerly: their products outweigh it.

Only on a CPU, and only before Python 3.14, where torch no longer supports `torch.jit`. Elsewhere,
and where recording fails, every step runs eagerly: slower, with the same tokens.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from mini_infer.resolved_sampling import ResolvedSampling

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.decode_groups import MAX_DECODE_GROUPS
from mini_infer_engine.input_buffers import GroupedInputs, InputBuffers
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.layers.grouped_attention import DecodeGroup
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import Forward
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence, StreamKey

Recording = Callable[..., torch.Tensor]

CAN_RECORD = sys.version_info < (3, 14)
"""Whether torch supports `torch.jit` here."""


class CapturedDecode:
    """The same logits as the model's own, from recordings wherever there is one.

    A step's operations depend on the number of groups whose rows gather blocks together, none
    where a row reads a window of the cache. So `capture` is called once for each number.
    """

    def __init__(self, forward: Forward) -> None:
        """Replays what `forward` does, once it has been captured."""
        self._forward = forward
        self._recordings: dict[int, Recording] = {}

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        """Computes a batch, replaying where its kind has been captured."""
        grouped = cast(GroupedInputs, inputs)  # `InputBuffers` made them
        attention = grouped.attention
        if attention.prefill_lens or inputs.sampled_tokens is not None:
            return self._forward(inputs)
        recording = self._recordings.get(len(attention.decode_groups))
        return self._forward(inputs) if recording is None else recording(*_tensors(grouped))

    def capture(self, inputs: GroupedInputs) -> None:
        """Records a step of decoding rows; it is run, so it writes its slots of the cache."""
        self._recordings[len(inputs.attention.decode_groups)] = record(
            lambda *tensors: self._forward(_replaced(inputs, tensors)), _tensors(inputs)
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
    """Captures every kind of step, on blocks that nobody uses yet.

    Args:
        forward: The model.
        cache: Its cache, which is left cleared.
        buffers: Makes the inputs.
    """
    captured = CapturedDecode(forward)
    captured.capture(buffers.build(decode_batch(1), cache))
    for num_groups in range(1, MAX_DECODE_GROUPS + 1):
        inputs = buffers.build(decode_batch(2 * num_groups), cache)
        captured.capture(inputs if num_groups == 1 else _in_pairs(inputs))
    cache.fill([0], 0.0)
    return captured


def _in_pairs(inputs: GroupedInputs) -> GroupedInputs:
    """Puts each two rows of a step, all of them in one group, into a group of their own."""
    (group,) = inputs.attention.decode_groups
    num_rows = inputs.attention.num_decodes
    tables, *masks = (each.chunk(num_rows // 2) for each in (group.block_tables, *group.masks))
    attention = replace(
        inputs.attention,
        decode_groups=tuple(map(DecodeGroup, tables, zip(*masks, strict=True))),
        decode_order=torch.arange(num_rows),
    )
    return replace(inputs, attention=attention)


def decode_batch(num_rows: int) -> ScheduledBatch:
    """Rows whose first token is decoded, all of them in block 0."""
    sampling = ResolvedSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=1)
    running = RunningBatch(num_rows)
    for stream in range(num_rows):
        sequence = Sequence(StreamKey(b"", stream), [0], sampling, eos_token_ids=())
        sequence.block_table = [0]
        running.add(sequence)
    return running.build(0, list(running), [], BlockTransfers())


def _tensors(inputs: GroupedInputs) -> tuple[torch.Tensor, ...]:
    """What differs from step to step of a kind."""
    attention = inputs.attention
    order = () if attention.decode_order is None else (attention.decode_order,)
    groups = ((group.block_tables, *group.masks) for group in attention.decode_groups)
    return (
        inputs.token_ids,
        inputs.cache,
        attention.positions,
        attention.slot_mapping,
        *order,
        *itertools.chain.from_iterable(groups),
    )


def _replaced(inputs: GroupedInputs, tensors: tuple[torch.Tensor, ...]) -> GroupedInputs:
    """The inverse of `_tensors`."""
    rest = iter(tensors)
    token_ids, cache, positions, slot_mapping = itertools.islice(rest, 4)
    attention = replace(
        inputs.attention,
        positions=positions,
        slot_mapping=slot_mapping,
        decode_order=None if inputs.attention.decode_order is None else next(rest),
        decode_groups=tuple(
            DecodeGroup(next(rest), tuple(itertools.islice(rest, len(group.masks))))
            for group in inputs.attention.decode_groups
        ),
    )
    return replace(inputs, token_ids=token_ids, cache=cache, attention=attention)
