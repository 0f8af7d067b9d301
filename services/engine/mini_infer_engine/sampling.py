"""Chooses the next token of each row from its logits, and says how likely it was.

The order is that of vLLM: biases and bans, penalties, masks, temperature, min-p, top-k, top-p,
typical-p, and then the draw (`mini_infer_kernels`, `docs/sampling.md`). The random number of a draw
is a function of seed, output position and token id alone, so a request draws the same in any batch,
after preemption, and when it is resumed.

Log-probabilities are of the model's own distribution, before all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from mini_infer.logprobs import LogprobColumns
from mini_infer_kernels.sampling_kernels import SamplingKernels, TokenCounts
from numpy.typing import NDArray

from mini_infer_engine.batch import (
    FillMasks,
    Ints,
    LaunchedTokens,
    SamplingColumns,
    ScoredPrompts,
    StepTokens,
    TokenHistory,
)
from mini_infer_engine.token_choice import EagerChoice, LaunchedIds, TokenChoice

_SCORED_AT_ONCE = 128
"""Tokens of prompts whose logits are held at a time."""


class Sampler:
    """Owns what was counted of the running sequences' tokens, by slot."""

    def __init__(
        self,
        kernels: SamplingKernels,
        *,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        choice: TokenChoice | None = None,
    ) -> None:
        """Makes room to count tokens.

        Args:
            kernels: The operations.
            vocab_size: Number of ids of the model.
            max_num_seqs: Slots.
            max_model_len: Tokens of a sequence at most.
            device: Of the logits.
            choice: Chooses at the end; without it, operation by operation.
        """
        self._kernels = kernels
        self._choice = choice or EagerChoice(kernels, device)
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._max_distinct = min(vocab_size, max_model_len)
        self._device = device
        if device.type == "cuda":
            _ = self._counts  # before the KV cache takes what is left

    @cached_property
    def _counts(self) -> TokenCounts:
        return TokenCounts(self._max_num_seqs, self._vocab_size, self._max_distinct, self._device)

    def launch(
        self, logits: torch.Tensor, columns: SamplingColumns, fill_masks: FillMasks
    ) -> LaunchedTokens:
        """Launches the choice of a token per row.

        Args:
            logits: [R, vocab_size] float32; changed in place.
            columns: How, for the R rows.
            fill_masks: Gives the masks of the masked rows; called while the device may still be
                computing the logits.
        """
        if columns.is_plain:
            return partial(self._told, self._choice.likeliest(logits))
        wanted = np.flatnonzero(columns.num_logprobs >= 0)
        own = logits.index_select(0, self._tensor(wanted)) if len(wanted) else None
        self._change(logits, columns)
        chosen = self._choice.draw(logits, columns, fill_masks)
        if own is None:
            return partial(self._told, chosen)
        return partial(self._told_with_logprobs, chosen, own, wanted, columns.num_logprobs[wanted])

    def _told(self, chosen: LaunchedIds) -> StepTokens:
        token_ids, statuses = chosen()
        return StepTokens(token_ids[:, None], statuses)

    def _told_with_logprobs(
        self, chosen: LaunchedIds, own: torch.Tensor, wanted: Ints, num_top: Ints
    ) -> StepTokens:
        """With the log-probabilities of the rows that want them, from their own logits."""
        token_ids, statuses = chosen()
        scores = self._scores(own, self._tensor(token_ids[wanted]), int(num_top.max()))
        packed = _packed(scores, np.ones_like(wanted), num_top)
        logprobs = dict(zip(wanted.tolist(), packed, strict=True))
        return StepTokens(token_ids[:, None], statuses, logprobs)

    def score_prompts(
        self,
        hidden: torch.Tensor,
        to_logits: Callable[[torch.Tensor], torch.Tensor],
        scored: ScoredPrompts,
    ) -> dict[int, LogprobColumns]:
        """How likely tokens of prompts are, by index into the rows of `scored`.

        Args:
            hidden: [T, hidden_size] what the model makes of the batch's tokens.
            to_logits: Makes [N, vocab_size] float32 logits of some rows of it.
            scored: The tokens; at least one.
        """
        num_top = int(scored.num_logprobs.max())
        after, token_ids = self._tensor(scored.after), self._tensor(scored.token_ids)
        parts = []
        for start in range(0, len(after), _SCORED_AT_ONCE):
            part = slice(start, start + _SCORED_AT_ONCE)
            logits = to_logits(hidden.index_select(0, after[part]))
            parts.append(self._scores(logits, token_ids[part], num_top))
        scores = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return dict(enumerate(_packed(scores, scored.counts, scored.num_logprobs)))

    def _scores(
        self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
    ) -> list[NDArray[np.generic]]:
        """Log-probability and rank of a token a row, ids and log-probabilities of the likeliest."""
        scores = self._kernels.token_logprobs(logits, token_ids, num_top)
        return [each.numpy(force=True) for each in scores]

    def _change(self, logits: torch.Tensor, columns: SamplingColumns) -> None:
        """Applies biases, bans and penalties."""
        if len(columns.bias_ids):
            rows, ids = self._tensors(columns.bias_rows, columns.bias_ids)
            self._kernels.add_to_logits(logits, rows, ids, self._tensor(columns.bias_values))
        self._count(columns.history)
        if columns.has_penalties:
            self._kernels.apply_penalties(
                logits,
                self._counts,
                self._tensor(columns.slots),
                *self._tensors(
                    columns.repetition_penalties,
                    columns.presence_penalties,
                    columns.frequency_penalties,
                ),
            )

    def _count(self, history: TokenHistory) -> None:
        if len(history.new_slots):
            self._kernels.reset_counts(self._counts, self._tensor(history.new_slots))
        if len(history.slots):
            slots, ids = self._tensors(history.slots, history.token_ids)
            self._kernels.count_tokens(self._counts, slots, ids, self._tensor(history.is_output))

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _tensors(self, *columns: NDArray[np.generic]) -> tuple[torch.Tensor, ...]:
        """Columns of one length and type, which take one copy together."""
        return self._tensor(np.stack(columns)).unbind()


def _packed(
    scores: Sequence[NDArray[np.generic]], counts: Ints, num_logprobs: Ints
) -> list[LogprobColumns]:
    """Scores of tokens in a row as columns of their owners.

    Args:
        scores: As `Sampler._scores` gives them.
        counts: Tokens of each owner.
        num_logprobs: Likeliest tokens that each owner wants.
    """
    logprobs, ranks, top_ids, top_logprobs = scores
    ends = np.cumsum(counts)
    return [
        LogprobColumns.from_arrays(
            logprobs[start:end],
            ranks[start:end],
            top_ids[start:end, :k],
            top_logprobs[start:end, :k],
        )
        for start, end, k in zip(
            (ends - counts).tolist(), ends.tolist(), num_logprobs.tolist(), strict=True
        )
    ]
