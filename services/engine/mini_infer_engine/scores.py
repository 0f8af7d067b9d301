"""Log-probabilities: which tokens of prompts get some, and what a step has found, told."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.logprobs import NO_LOGPROBS

from mini_infer_engine.batch import NO_SCORES, ScheduledBatch, ScoredPrompts, StepTokens
from mini_infer_engine.sequence import Sequence, SequenceStatus
from mini_infer_engine.step_plan import LaunchedStep
from mini_infer_engine.step_updates import StepUpdates


def score_prompts(prefills: Seq[tuple[Sequence, int]], num_decodes: int) -> ScoredPrompts:
    """What of a step's prompts is scored: each token whose predecessor is computed in the step.

    A prompt's last token predicts output, so a sequence that decodes has nothing to score. What
    was told before the sequence lost its blocks is not told again.

    Args:
        prefills: Sequences that compute more than one token, or not their last, in the order of
            the batch's rows; each with how many.
        num_decodes: Rows of the batch before them.
    """
    if all(each.sampling.num_prompt_logprobs == NO_LOGPROBS for each, _ in prefills):
        return NO_SCORES
    rows: list[tuple[int, int, int, int]] = []
    after: list[int] = []
    token_ids: list[int] = []
    num_before = num_decodes  # tokens of the batch before the row's
    for row, (sequence, count) in enumerate(prefills, num_decodes):
        computed = sequence.num_computed_tokens
        start = max(computed + 1, sequence.num_scored_tokens)
        end = min(computed + count + 1, sequence.num_prompt_tokens)
        if sequence.sampling.num_prompt_logprobs != NO_LOGPROBS and start < end:
            rows.append((row, start, end - start, sequence.sampling.num_prompt_logprobs))
            first = num_before + start - 1 - computed
            after += range(first, first + end - start)
            token_ids += sequence.token_ids[start:end]
        num_before += count
    columns = np.array(rows, np.int64).reshape(-1, 4)
    return ScoredPrompts(
        rows=columns[:, 0],
        starts=columns[:, 1],
        counts=columns[:, 2],
        num_logprobs=columns[:, 3],
        after=np.array(after, np.int64),
        token_ids=np.array(token_ids, np.int64),
    )


def tell_scores(
    step: LaunchedStep, batch: ScheduledBatch, tokens: StepTokens, updates: StepUpdates
) -> None:
    """Takes in the log-probabilities that a step has found, of sequences that have not ended."""
    for index, columns in tokens.prompt_logprobs.items():
        sequence = step.sequences[batch.scored.rows[index]]
        if sequence.status is not SequenceStatus.ENDED:
            start = int(batch.scored.starts[index])
            sequence.num_scored_tokens = start + columns.num_tokens
            updates.prompt_logprobs.append((sequence.key, start, columns))
    for index, columns in tokens.logprobs.items():
        sequence = step.sequences[batch.sampling.rows[index]]
        if sequence.status is not SequenceStatus.ENDED:
            updates.logprobs[sequence.key] = columns
