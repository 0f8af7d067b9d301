"""What scheduler and model runner hand each other: one step's work, and what came of it.

Integers and numpy arrays only, so that a batch can be broadcast to tensor-parallel ranks, each of
which builds its own tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mini_infer_engine.sequence import StreamKey

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


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
        swap_outs: [O, 2] blocks to copy from the device to the host: from, to. First of all.
        zero_blocks: [Z] blocks to clear then: they may hold non-finite values.
        swap_ins: [I, 2] blocks to copy from the host to the device then: from, to.
        block_copies: [C, 2] blocks to copy on the device then: from, to. The tokens come last.
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
    swap_outs: Ints
    zero_blocks: Ints
    swap_ins: Ints
    block_copies: Ints

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.keys

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.token_ids)


_NO_INTS: Ints = np.empty(0, np.int64)
_NO_FLOATS: Floats = np.empty(0, np.float32)
_NO_PAIRS: Ints = np.empty((0, 2), np.int64)
_NO_SAMPLING = SamplingColumns(
    rows=_NO_INTS,
    temperatures=_NO_FLOATS,
    top_ks=_NO_INTS,
    top_ps=_NO_FLOATS,
    seeds=np.empty(0, np.uint64),
    positions=_NO_INTS,
    banned_rows=_NO_INTS,
    banned_ids=_NO_INTS,
)
EMPTY_BATCH = ScheduledBatch(
    step=0,
    keys=[],
    token_ids=_NO_INTS,
    num_scheduled_tokens=_NO_INTS,
    num_computed_tokens=_NO_INTS,
    num_turned_together=_NO_INTS,
    block_tables=np.empty((0, 0), np.int64),
    num_decodes=0,
    sampling=_NO_SAMPLING,
    swap_outs=_NO_PAIRS,
    zero_blocks=_NO_INTS,
    swap_ins=_NO_PAIRS,
    block_copies=_NO_PAIRS,
)
"""Nothing to run."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step chose, in the order of `SamplingColumns.rows`.

    Attributes:
        token_ids: [R, K] the ids of each row: one, or several where the runner makes several a
            step; all but the last of them are in the cache already.
        finite: [R] whether the row's logits were finite. Ids of a row that were not mean nothing.
    """

    token_ids: Ints
    finite: Bools


NO_TOKENS = StepTokens(token_ids=np.empty((0, 1), np.int64), finite=np.empty(0, np.bool_))
