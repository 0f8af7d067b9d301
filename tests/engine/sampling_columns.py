"""Sampling columns of rows that are described by their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import SamplingColumns
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.sequence import StreamKey


def resolved(**options: Any) -> ResolvedSampling:
    """Parameters that restrict nothing, but for the options."""
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "max_tokens": 100}
    return ResolvedSampling(**{**given, **options})


def columns_of(
    rows: Sequence[ResolvedSampling],
    *,
    prompt: Sequence[int] = (1,),
    outputs: Sequence[Sequence[int]] | None = None,
    end_ids: Sequence[int] = (),
) -> SamplingColumns:
    """The columns of a step in which each of some sequences gets its next token.

    Args:
        rows: How each of them samples.
        prompt: Of all of them.
        outputs: What each of them has already; nothing where it is None.
        end_ids: Of the model.
    """
    running = RunningBatch(len(rows))
    for stream, sampling in enumerate(rows):
        output_ids = [] if outputs is None else outputs[stream]
        key = StreamKey(b"", stream)
        sequence = EngineSequence(
            key, prompt, sampling, eos_token_ids=end_ids, output_ids=output_ids
        )
        sequence.arrival_number = stream
        sequence.block_table = [0]
        running.add(sequence)
    everyone = [(each, each.num_tokens) for each in running]
    return running.build(0, [], everyone, BlockTransfers()).sampling
