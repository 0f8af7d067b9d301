"""How the running sequences choose their tokens, by slot, and each step's part of it in columns."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.logprobs import NO_LOGPROBS

from mini_infer_engine.batch import NO_HISTORY, Floats, Ints, SamplingColumns, TokenHistory
from mini_infer_engine.sequence import Sequence

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
        self._has_bias = np.zeros(max_num_seqs, np.bool_)
        self._is_masked = np.zeros(max_num_seqs, np.bool_)

    def put(self, slot: int, sequence: Sequence) -> None:
        """Gives a slot to a sequence, of which nothing is counted there yet."""
        sampling = sequence.sampling
        self._temperatures[slot] = sampling.temperature
        self._top_ks[slot] = sampling.top_k
        self._top_ps[slot] = sampling.top_p
        self._min_ps[slot] = sampling.min_p
        self._typical_ps[slot] = sampling.typical_p
        self._repetition_penalties[slot] = sampling.repetition_penalty
        self._presence_penalties[slot] = sampling.presence_penalty
        self._frequency_penalties[slot] = sampling.frequency_penalty
        self._seeds[slot] = sampling.seed
        self._num_logprobs[slot] = sampling.num_logprobs
        self._has_penalties[slot] = sampling.has_penalties
        self._has_bias[slot] = sequence.bias is not None
        self._is_masked[slot] = sequence.is_masked
        sequence.num_counted_tokens = 0

    def columns(
        self, sequences: Seq[Sequence], rows: Ints, slots: Ints, positions: Ints
    ) -> SamplingColumns:
        """How the rows of a step choose.

        Args:
            sequences: [R] those that get a token.
            rows: [R] their rows in the batch.
            slots: [R] their slots.
            positions: [R] output position of the token.
        """
        bias_rows, bias_ids, bias_values = self._biases(sequences, slots)
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
            masked=np.flatnonzero(self._is_masked[slots]),
            history=self._history(sequences, slots),
        )

    def _biases(self, sequences: Seq[Sequence], slots: Ints) -> tuple[Ints, Ints, Floats]:
        ids: list[Ints] = [_NO_INTS]
        values: list[Floats] = [_NO_FLOATS]
        rows = np.flatnonzero(self._has_bias[slots])
        for row in rows.tolist():
            sequence = sequences[row]
            if sequence.bias is not None:
                changed = sequence.bias.at(sequence.token_ids, sequence.num_output_tokens)
                ids.append(changed[0])
                values.append(changed[1])
        counts = [len(each) for each in ids[1:]]
        return np.repeat(rows, counts), np.concatenate(ids), np.concatenate(values)

    def _history(self, sequences: Seq[Sequence], slots: Ints) -> TokenHistory:
        """The tokens that are new since a slot's last step, of sequences with penalties."""
        with_penalties = np.flatnonzero(self._has_penalties[slots]).tolist()
        if not with_penalties:
            return NO_HISTORY
        new_slots: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        is_output: list[bool] = []
        for row in with_penalties:
            sequence = sequences[row]
            first = sequence.num_counted_tokens
            if first == 0:
                new_slots.append(sequence.slot)
            token_ids += sequence.token_ids[first:]
            num_prompt = max(0, sequence.num_prompt_tokens - first)
            counts.append(sequence.num_tokens - first)
            is_output += [False] * num_prompt + [True] * (counts[-1] - num_prompt)
            sequence.num_counted_tokens = sequence.num_tokens
        return TokenHistory(
            new_slots=np.array(new_slots, np.int64),
            slots=np.repeat(slots[with_penalties], counts),
            token_ids=np.array(token_ids, np.int64),
            is_output=np.array(is_output, np.bool_),
        )
