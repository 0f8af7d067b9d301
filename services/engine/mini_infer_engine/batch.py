"""What scheduler and model runner hand each other: one step's work, and what came of it.

Integers and numpy arrays only, so that a batch can be broadcast to tensor-parallel ranks, each of
which builds its own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mini_infer_engine.sequence import Sequence, StreamKey

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

_NO_INTS: Ints = np.array([], np.int64)


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """How to choose the next token of the rows that get one. R rows.

    Attributes:
        rows: [R] their rows in the batch.
        temperatures: [R], 0 is greedy.
        top_ks: [R], 0 keeps the whole vocabulary.
        top_ps: [R], 1 keeps the whole vocabulary.
        seeds: [R] uint64.
        positions: [R] output position of the token that is chosen.
        banned_rows: [P] indices into the R rows, and
        banned_ids: [P] the ids that may not be chosen there (min_tokens).
    """

    rows: Ints
    temperatures: Floats
    top_ks: Ints
    top_ps: Floats
    seeds: NDArray[np.uint64]
    positions: Ints
    banned_rows: Ints
    banned_ids: Ints


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step: S rows, a sequence each, with T tokens in all; rows of one token come first.

    Attributes:
        step: Its number.
        keys: [S] the rows' sequences.
        token_ids: [T] the tokens to compute, row after row.
        num_scheduled_tokens: [S] how many of them belong to each row.
        num_computed_tokens: [S] tokens of the row that are in the cache before the step.
        num_turned_together: [S] see `Sequence.num_turned_together`.
        block_tables: [S, B] each row's blocks, padded with 0.
        num_decodes: Rows at the front that have one token each.
        sampling: How to choose the next token of the rows whose last token is computed now.
        zero_blocks: [Z] blocks to clear before the step: they may hold non-finite values.
    """

    step: int
    keys: list[StreamKey]
    token_ids: Ints
    num_scheduled_tokens: Ints
    num_computed_tokens: Ints
    num_turned_together: Ints
    block_tables: Ints
    num_decodes: int
    sampling: SamplingColumns
    zero_blocks: Ints

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.keys

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step chose, in the order of `SamplingColumns.rows`.

    Attributes:
        token_ids: [R] list of the ids of each row: one, or several where the runner makes several
            a step; all but the last of them are in the cache already.
        finite: [R] whether the row's logits were finite. Ids of a row that were not mean nothing.
    """

    token_ids: list[list[int]]
    finite: list[bool]


NO_TOKENS = StepTokens(token_ids=[], finite=[])


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence in a step.

    Attributes:
        sequence: The sequence.
        num_tokens: Number of its tokens that the step computes.
        samples: Whether its last token is among them, so that a next one is chosen.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> ScheduledRow:
        """The row that computes a sequence's next tokens."""
        end = sequence.num_computed_tokens + num_tokens
        return cls(sequence, num_tokens, samples=end == sequence.num_tokens)


def build_batch(step: int, rows: Seq[ScheduledRow], zero_blocks: Seq[int]) -> ScheduledBatch:
    """Writes down what the rows need.

    Args:
        step: Its number.
        rows: Those of one token first.
        zero_blocks: Blocks to clear before the step.
    """
    sequences = [row.sequence for row in rows]
    token_ids: list[int] = []
    for row in rows:
        start = row.sequence.num_computed_tokens
        token_ids += row.sequence.token_ids[start : start + row.num_tokens]
    block_tables = np.zeros(
        (len(rows), max((len(each.block_table) for each in sequences), default=0)), np.int64
    )
    for index, sequence in enumerate(sequences):
        block_tables[index, : len(sequence.block_table)] = sequence.block_table
    return ScheduledBatch(
        step=step,
        keys=[sequence.key for sequence in sequences],
        token_ids=np.array(token_ids, np.int64),
        num_scheduled_tokens=np.array([row.num_tokens for row in rows], np.int64),
        num_computed_tokens=np.array([each.num_computed_tokens for each in sequences], np.int64),
        num_turned_together=np.array([each.num_turned_together for each in sequences], np.int64),
        block_tables=block_tables,
        num_decodes=sum(row.num_tokens == 1 for row in rows),
        sampling=_sampling_columns(rows),
        zero_blocks=np.array(zero_blocks, np.int64) if zero_blocks else _NO_INTS,
    )


def _sampling_columns(rows: Seq[ScheduledRow]) -> SamplingColumns:
    sampled = [index for index, row in enumerate(rows) if row.samples]
    sequences = [rows[index].sequence for index in sampled]
    banned = [
        (index, token_id)
        for index, sequence in enumerate(sequences)
        if sequence.ends_are_banned
        for token_id in sequence.end_ids
    ]
    return SamplingColumns(
        rows=np.array(sampled, np.int64),
        temperatures=np.array([each.sampling.temperature for each in sequences], np.float32),
        top_ks=np.array([each.sampling.top_k for each in sequences], np.int64),
        top_ps=np.array([each.sampling.top_p for each in sequences], np.float32),
        seeds=np.array([each.sampling.seed for each in sequences], np.uint64),
        positions=np.array([each.num_output_tokens for each in sequences], np.int64),
        banned_rows=np.array([index for index, _ in banned], np.int64),
        banned_ids=np.array([token_id for _, token_id in banned], np.int64),
    )
