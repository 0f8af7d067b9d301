"""What scheduler and model runner hand each other: one step's work, and what came of it.

Integers and numpy arrays only, so that a batch can be broadcast to tensor-parallel ranks, each of
which builds its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from mini_infer.logprobs import LogprobColumns
from numpy.typing import NDArray

from mini_infer_engine.sequence import StreamKey

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Tokens of sequences with penalties that the sampler has not counted yet.

    Attributes:
        new_slots: [U] slots that have another sequence now: forget what was counted there.
        slots: [N] where to count
        token_ids: [N] these tokens.
        is_output: [N] whether they are of the output, or else of the prompt.
    """

    new_slots: Ints
    slots: Ints
    token_ids: Ints
    is_output: Bools


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """How to choose the next token of the rows that get one. R rows.

    Attributes:
        rows: [R] their rows in the batch.
        slots: [R] their sequences' slots, under which their tokens are counted.
        temperatures: [R], 0 is greedy.
        top_ks: [R], 0 keeps the whole vocabulary.
        top_ps: [R], 1 keeps the whole vocabulary.
        min_ps: [R], 0 keeps the whole vocabulary.
        typical_ps: [R], 1 keeps the whole vocabulary.
        repetition_penalties: [R], 1 is none.
        presence_penalties: [R], 0 is none.
        frequency_penalties: [R], 0 is none.
        seeds: [R] uint64.
        positions: [R] output position of the token that is chosen.
        num_logprobs: [R] likeliest tokens to tell, or `NO_LOGPROBS`.
        bias_rows: [P] indices into the R rows whose logits of
        bias_ids: [P] these ids are changed by
        bias_values: [P] so much; those of -inf may not be chosen. Pairs may repeat.
        masked: [M] indices into the R rows that choose from a set of ids, which is told later
            (`token_masks.py`).
        history: What to count before the penalties.
    """

    rows: Ints
    slots: Ints
    temperatures: Floats
    top_ks: Ints
    top_ps: Floats
    min_ps: Floats
    typical_ps: Floats
    repetition_penalties: Floats
    presence_penalties: Floats
    frequency_penalties: Floats
    seeds: NDArray[np.uint64]
    positions: Ints
    num_logprobs: Ints
    bias_rows: Ints
    bias_ids: Ints
    bias_values: Floats
    masked: Ints
    history: TokenHistory

    @property
    def is_plain(self) -> bool:
        """Whether each row takes its likeliest token and nothing else is asked for."""
        return not (
            len(self.bias_ids)
            or len(self.masked)
            or self.temperatures.any()
            or self.has_penalties
            or (self.num_logprobs >= 0).any()
        )

    @property
    def has_penalties(self) -> bool:
        """Whether a row's counted tokens change its logits."""
        return bool(
            (self.repetition_penalties != 1).any()
            or self.presence_penalties.any()
            or self.frequency_penalties.any()
        )


@dataclass(frozen=True, slots=True)
class ScoredPrompts:
    """Tokens of prompts whose log-probabilities are wanted. Q tokens of P rows.

    Attributes:
        rows: [P] rows of the batch.
        starts: [P] index in its prompt of each row's first token.
        counts: [P] tokens of each row.
        num_logprobs: [P] likeliest tokens to tell.
        after: [Q] index among the batch's T tokens of the one before each.
        token_ids: [Q] the tokens.
    """

    rows: Ints
    starts: Ints
    counts: Ints
    num_logprobs: Ints
    after: Ints
    token_ids: Ints


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step: S rows, a sequence each, with T tokens in all; rows of one token come first.

    Attributes:
        step: Its number.
        keys: [S] the rows' sequences.
        slots: [S] the rows' places in the running batch, which sequences keep while they run.
        token_ids: [T] the tokens to compute, row after row. Of a step that was scheduled while the
            one before was under way, -1 - i is what that one chooses for its sampled row i.
        num_scheduled_tokens: [S] how many of them belong to each row.
        num_computed_tokens: [S] tokens of the row that are in the cache before the step.
        num_turned_together: [S] see `Sequence.num_turned_together`.
        block_tables: [S, B] each row's blocks, padded with 0.
        table_changes: [3, U] what changed of the running sequences' block tables since the step
            before: slot, index in the table, block; no place twice.
        num_decodes: Rows at the front that have one token each.
        sampling: How to choose the next token of the rows whose last token is computed now.
        scored: Tokens of prompts whose log-probabilities are wanted.
        swap_outs: [O, 2] blocks to copy from the device to the host: from, to. First of all.
        zero_blocks: [Z] blocks to clear then: they may hold non-finite values.
        swap_ins: [I, 2] blocks to copy from the host to the device then: from, to.
        block_copies: [C, 2] blocks to copy on the device then: from, to. The tokens come last.
    """

    step: int
    keys: list[StreamKey]
    slots: Ints
    token_ids: Ints
    num_scheduled_tokens: Ints
    num_computed_tokens: Ints
    num_turned_together: Ints
    block_tables: Ints
    table_changes: Ints
    num_decodes: int
    sampling: SamplingColumns
    scored: ScoredPrompts
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
NO_HISTORY = TokenHistory(_NO_INTS, _NO_INTS, _NO_INTS, np.empty(0, np.bool_))
NO_SCORES = ScoredPrompts(_NO_INTS, _NO_INTS, _NO_INTS, _NO_INTS, _NO_INTS, _NO_INTS)
_NO_SAMPLING = SamplingColumns(
    rows=_NO_INTS,
    slots=_NO_INTS,
    temperatures=_NO_FLOATS,
    top_ks=_NO_INTS,
    top_ps=_NO_FLOATS,
    min_ps=_NO_FLOATS,
    typical_ps=_NO_FLOATS,
    repetition_penalties=_NO_FLOATS,
    presence_penalties=_NO_FLOATS,
    frequency_penalties=_NO_FLOATS,
    seeds=np.empty(0, np.uint64),
    positions=_NO_INTS,
    num_logprobs=_NO_INTS,
    bias_rows=_NO_INTS,
    bias_ids=_NO_INTS,
    bias_values=_NO_FLOATS,
    masked=_NO_INTS,
    history=NO_HISTORY,
)
EMPTY_BATCH = ScheduledBatch(
    step=0,
    keys=[],
    slots=_NO_INTS,
    token_ids=_NO_INTS,
    num_scheduled_tokens=_NO_INTS,
    num_computed_tokens=_NO_INTS,
    num_turned_together=_NO_INTS,
    block_tables=np.empty((0, 0), np.int64),
    table_changes=np.empty((3, 0), np.int64),
    num_decodes=0,
    sampling=_NO_SAMPLING,
    scored=NO_SCORES,
    swap_outs=_NO_PAIRS,
    zero_blocks=_NO_INTS,
    swap_ins=_NO_PAIRS,
    block_copies=_NO_PAIRS,
)
"""Nothing to run."""


class RowStatus(IntEnum):
    """Whether a row's token means anything."""

    OK = 0
    NON_FINITE = 1
    """The row's logits hold NaN or infinity."""
    NOTHING_ALLOWED = 2
    """The request's own conditions leave no token to choose from."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step chose, in the order of `SamplingColumns.rows`, and what it was asked to tell.

    Attributes:
        token_ids: [R, K] the ids of each row: one, or several where the runner makes several a
            step; all but the last of them are in the cache already.
        statuses: [R] a `RowStatus` each; the ids of a row that is not OK mean nothing.
        logprobs: By index into the R rows, the log-probabilities of its ids, where wanted.
        prompt_logprobs: By index into the rows of `ScoredPrompts`.
    """

    token_ids: Ints
    statuses: NDArray[np.int32]
    logprobs: Mapping[int, LogprobColumns] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, LogprobColumns] = field(default_factory=dict)


LaunchedTokens = Callable[[], StepTokens]
"""A step that was launched: waits for the device and gives its tokens; to be called once."""

NO_TOKENS = StepTokens(token_ids=np.empty((0, 1), np.int64), statuses=np.empty(0, np.int32))


TokenMasks = NDArray[np.int32]
"""[M, words] for the rows of `SamplingColumns.masked`: bit b of word w is set where the row may
choose id 32 * w + b."""
FillMasks = Callable[[], TokenMasks]
"""Makes the masks of a step; called while the device computes its logits."""


def fill_no_masks() -> TokenMasks:
    """For steps without masked rows."""
    return np.empty((0, 0), np.int32)
