"""How the running sequences choose their tokens, by slot, and each step's part of it in columns."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.logprobs import NO_LOGPROBS

from mini_infer_engine.batch import NO_HISTORY, Floats, Ints, SamplingColumns, TokenHistory
from mini_infer_engine.sequence import Sequence

_LEAST_SHARE = float(np.finfo(np.float32).tiny)
"""Smaller ones could become 0 on a device, of which no token has a share."""
_NO_INTS: Ints = np.empty(0, np.int64)
_NO_FLOATS: Floats = np.empty(0, np.float32)


class SamplingSlots:
    """What does not change from step to step, in numpy, a row a slot."""

    def __init__(self, max_num_seqs: int) -> None:
        """Makes rows for so many sequences."""
        self._temperatures = np.zeros(max_num_seqs, np.float32)
        self._top_ks = np.zeros(max_num_seqs, np.int64)
        self._top_ps = np.ones(max_num_seqs, np.float32)
        self._min_ps = np.zeros(max_num_seqs, np.float32)
        self._typical_ps = np.ones(max_num_seqs, np.float32)
        self._repetition_penalties = np.ones(max_num_seqs, np.float32)
        self._presence_penalties = np.zeros(max_num_seqs, np.float32)
        self._frequency_penalties = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self._has_penalties = np.zeros(max_num_seqs, np.bool_)
        # Output positions below which a sequence's rules change logits.
        self._bias_ends = np.zeros(max_num_seqs, np.int64)
        self._is_masked = np.zeros(max_num_seqs, np.bool_)
        self._needs_tokens = np.zeros(max_num_seqs, np.bool_)

    def put(self, slot: int, sequence: Sequence) -> None:
        """Gives a slot to a sequence, of which nothing is counted there yet."""
        sampling = sequence.sampling
        self._temperatures[slot] = sampling.temperature
        self._top_ks[slot] = sampling.top_k
        self._top_ps[slot] = max(sampling.top_p, _LEAST_SHARE)
        self._min_ps[slot] = sampling.min_p
        self._typical_ps[slot] = max(sampling.typical_p, _LEAST_SHARE)
        self._repetition_penalties[slot] = sampling.repetition_penalty
        self._presence_penalties[slot] = sampling.presence_penalty
        self._frequency_penalties[slot] = sampling.frequency_penalty
        self._seeds[slot] = sampling.seed
        self._num_logprobs[slot] = sampling.num_logprobs
        self._has_penalties[slot] = sampling.has_penalties
        self._bias_ends[slot] = 0 if sequence.bias is None else sequence.bias.end
        self._is_masked[slot] = sequence.is_masked
        # What comes next depends on the token before, or is read off the logits on the host.
        self._needs_tokens[slot] = (
            sampling.has_penalties
            or sequence.is_masked
            or sequence.may_turn
            or sampling.num_logprobs != NO_LOGPROBS
        )
        sequence.num_counted_tokens = 0

    def columns(
        self, sequences: Seq[Sequence], rows: Ints, slots: Ints, positions: Ints
    ) -> SamplingColumns:
        """How the rows of a step choose.

        Args:
            sequences: [S] those of the batch.
            rows: [R] rows of the batch that get a token.
            slots: [R] their slots.
            positions: [R] output position of the token.
        """
        is_biased = positions < self._bias_ends[slots]
        bias_rows, bias_ids, bias_values = _biases(sequences, rows, is_biased.nonzero()[0])
        return SamplingColumns(
            rows=rows,
            slots=slots,
            temperatures=self._temperatures[slots],
            top_ks=self._top_ks[slots],
            top_ps=self._top_ps[slots],
            min_ps=self._min_ps[slots],
            typical_ps=self._typical_ps[slots],
            repetition_penalties=self._repetition_penalties[slots],
            presence_penalties=self._presence_penalties[slots],
            frequency_penalties=self._frequency_penalties[slots],
            seeds=self._seeds[slots],
            positions=positions,
            num_logprobs=self._num_logprobs[slots],
            bias_rows=bias_rows,
            bias_ids=bias_ids,
            bias_values=bias_values,
            masked=self._is_masked[slots].nonzero()[0],
            history=self._history(sequences, rows, slots),
        )

    def need_tokens(self, slots: Ints, positions: Ints) -> bool:
        """Whether rows choose by tokens that were chosen before.

        Args:
            slots: [R] of their sequences.
            positions: [R] output positions of the tokens to choose.
        """
        needed = self._needs_tokens[slots] | (positions < self._bias_ends[slots])
        return bool(needed.any())

    def _history(self, sequences: Seq[Sequence], rows: Ints, slots: Ints) -> TokenHistory:
        """The tokens that are new since a slot's last step, of sequences with penalties."""
        penalised = self._has_penalties[slots].nonzero()[0]
        if not len(penalised):
            return NO_HISTORY
        new_slots: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        is_output: list[bool] = []
        for row in rows[penalised].tolist():
            sequence = sequences[row]
            known, first = sequence.token_ids, sequence.num_counted_tokens
            num_new = len(known) - first
            if first == 0:
                new_slots.append(sequence.slot)
            num_prompt = max(0, sequence.num_prompt_tokens - first)
            token_ids += known[first:]
            is_output += [False] * num_prompt + [True] * (num_new - num_prompt)
            counts.append(num_new)
            sequence.num_counted_tokens = len(known)
        return TokenHistory(
            new_slots=np.array(new_slots, np.int64),
            slots=np.repeat(slots[penalised], counts),
            token_ids=np.array(token_ids, np.int64),
            is_output=np.array(is_output, np.bool_),
        )


def _biases(sequences: Seq[Sequence], rows: Ints, biased: Ints) -> tuple[Ints, Ints, Floats]:
    """What the rules of sequences change in the logits of their rows.

    Args:
        sequences: [S] those of the batch.
        rows: [R] rows of the batch that get a token.
        biased: Indices into these of sequences with rules that count now.
    """
    if not len(biased):
        return _NO_INTS, _NO_INTS, _NO_FLOATS
    changes = [
        sequence.bias.at(sequence.token_ids, sequence.num_output_tokens)
        for sequence in map(sequences.__getitem__, rows[biased].tolist())
        if sequence.bias is not None
    ]
    return (
        np.repeat(biased, [len(ids) for ids, _ in changes]),
        np.concatenate([ids for ids, _ in changes]),
        np.concatenate([values for _, values in changes]),
    )
