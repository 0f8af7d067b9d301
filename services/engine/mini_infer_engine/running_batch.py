"""The sequences that take part in steps, and each step's work written down in columns.

What does not change from step to step (sampling parameters, blocks) is kept in numpy, a row a
sequence, so that writing down a step of hundreds of sequences is a few operations on columns.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np

from mini_infer_engine.batch import NO_SCORES, Ints, ScheduledBatch, ScoredPrompts
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.sampling_slots import SamplingSlots
from mini_infer_engine.scores import score_prompts
from mini_infer_engine.sequence import Sequence
from mini_infer_engine.waiting_queue import scheduling_key

_FIRST_WIDTH = 64
_NO_CHANGES: Ints = np.empty((3, 0), np.int64)


class RunningBatch:
    """Running sequences in scheduling order, and their columns.

    Each has a *slot*, its row of the columns, from `add` to `remove`.
    """

    def __init__(self, max_num_seqs: int) -> None:
        """Makes an empty batch for so many sequences."""
        self._sequences: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._block_tables = np.zeros((max_num_seqs, _FIRST_WIDTH), np.int64)
        self._table_lens = [0] * max_num_seqs
        # By slot, indices of its table from which on blocks are new since the last `build`.
        self._new_from: dict[int, int] = {}
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self._sampling = SamplingSlots(max_num_seqs)

    def __len__(self) -> int:
        """Sequences that run."""
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences in scheduling order."""
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        """The sequences from the last in scheduling order to the first."""
        return reversed(self._sequences)

    @property
    def last(self) -> Sequence:
        """The last in scheduling order: the first victim."""
        return self._sequences[-1]

    @property
    def num_free_slots(self) -> int:
        """Sequences that can still join."""
        return len(self._free_slots)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in, with the blocks that it has."""
        bisect.insort(self._sequences, sequence, key=scheduling_key)
        slot = sequence.slot = self._free_slots.pop()
        self._num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self._sampling.put(slot, sequence)
        num_blocks = self._table_lens[slot] = len(sequence.block_table)
        self._widen(num_blocks)
        self._block_tables[slot, :num_blocks] = sequence.block_table
        self._new_from[slot] = 0

    def note_growth(self, sequence: Sequence) -> None:
        """Takes in the block that a sequence got last."""
        num_blocks = self._table_lens[sequence.slot] = len(sequence.block_table)
        self._widen(num_blocks)
        self._block_tables[sequence.slot, num_blocks - 1] = sequence.block_table[-1]
        self._new_from.setdefault(sequence.slot, num_blocks - 1)

    def remove(self, sequence: Sequence) -> None:
        """Lets a sequence go."""
        index = bisect.bisect_left(self._sequences, scheduling_key(sequence), key=scheduling_key)
        del self._sequences[index]
        self._free_slots.append(sequence.slot)
        self._new_from.pop(sequence.slot, None)
        sequence.slot = -1

    def build(
        self,
        step: int,
        decodes: Seq[Sequence],
        prefills: Seq[tuple[Sequence, int]],
        transfers: BlockTransfers,
    ) -> ScheduledBatch:
        """Writes down a step.

        Args:
            step: Its number.
            decodes: Sequences of which one token is left to compute.
            prefills: The other ones that take part, each with how many of its tokens.
            transfers: What happens to blocks before.
        """
        sequences = [*decodes, *(sequence for sequence, _ in prefills)]
        num_decodes = len(decodes)
        num_computed = np.array([each.num_computed_tokens for each in sequences], np.int64)
        num_scheduled = np.ones(len(sequences), np.int64)
        token_ids = [each.token_ids[-1] for each in decodes]
        rows = list(range(num_decodes))
        for row, (sequence, count) in enumerate(prefills, num_decodes):
            start = sequence.num_computed_tokens
            num_scheduled[row] = count
            token_ids += sequence.token_ids[start : start + count]
            if start + count == sequence.num_tokens:
                rows.append(row)
        return self._write_down(
            step,
            sequences,
            num_decodes=num_decodes,
            token_ids=np.array(token_ids, np.int64),
            num_computed=num_computed,
            num_scheduled=num_scheduled,
            sampled=np.array(rows, np.int64),
            scored=score_prompts(prefills, num_decodes),
            transfers=transfers,
        )

    def need_tokens(self, sequences: Seq[Sequence]) -> bool:
        """Whether sequences choose their next token but one by the next one."""
        slots = np.array([each.slot for each in sequences], np.int64)
        num_known = np.array([each.num_tokens for each in sequences], np.int64) + 1
        return self._sampling.need_tokens(slots, num_known - self._num_prompt_tokens[slots])

    def build_ahead(
        self, step: int, sequences: Seq[Sequence], sources: Seq[int], transfers: BlockTransfers
    ) -> ScheduledBatch:
        """Writes down the step behind one that is under way.

        Args:
            step: Its number.
            sequences: Those of which the step under way chooses a token.
            sources: Their places among its sampled rows.
            transfers: What happens to blocks before.
        """
        num_rows = len(sequences)
        return self._write_down(
            step,
            sequences,
            num_decodes=num_rows,
            token_ids=-1 - np.array(sources, np.int64),
            num_computed=np.array([each.num_tokens for each in sequences], np.int64),
            num_scheduled=np.ones(num_rows, np.int64),
            sampled=np.arange(num_rows),
            scored=NO_SCORES,
            transfers=transfers,
        )

    def _write_down(
        self,
        step: int,
        sequences: Seq[Sequence],
        *,
        num_decodes: int,
        token_ids: Ints,
        num_computed: Ints,
        num_scheduled: Ints,
        sampled: Ints,
        scored: ScoredPrompts,
        transfers: BlockTransfers,
    ) -> ScheduledBatch:
        """Adds what the columns hold."""
        slots = np.array([each.slot for each in sequences], np.int64)
        sampled_slots = slots[sampled]
        num_known = (num_computed + num_scheduled)[sampled]
        width = max(len(each.block_table) for each in sequences)
        return ScheduledBatch(
            step=step,
            keys=[each.key for each in sequences],
            slots=slots,
            token_ids=token_ids,
            num_scheduled_tokens=num_scheduled,
            num_computed_tokens=num_computed,
            num_turned_together=np.array(
                [each.num_turned_together for each in sequences], np.int64
            ),
            block_tables=self._block_tables[slots, :width],
            table_changes=self._take_table_changes(),
            num_decodes=num_decodes,
            sampling=self._sampling.columns(
                sequences,
                sampled,
                sampled_slots,
                num_known - self._num_prompt_tokens[sampled_slots],
            ),
            scored=scored,
            swap_outs=_pairs(transfers.swap_outs),
            zero_blocks=np.array(transfers.zero_blocks, np.int64),
            swap_ins=_pairs(transfers.swap_ins),
            block_copies=_pairs(transfers.block_copies),
        )

    def check_integrity(self) -> None:
        """Checks the order, the slots and the columns against the sequences.

        Raises:
            AssertionError: Where they disagree.
        """
        keys = [scheduling_key(each) for each in self._sequences]
        assert keys == sorted(keys), "the running batch is out of order"
        slots = [each.slot for each in self._sequences]
        everything = sorted([*slots, *self._free_slots])
        assert everything == list(range(len(self._block_tables))), "a slot is lost or taken twice"
        for each in self._sequences:
            row = self._block_tables[each.slot, : len(each.block_table)]
            assert row.tolist() == each.block_table, f"the blocks of {each} are not its columns'"

    def _take_table_changes(self) -> Ints:
        """As `ScheduledBatch.table_changes`."""
        if not self._new_from:
            return _NO_CHANGES
        slots: list[int] = []
        indices: list[int] = []
        blocks: list[int] = []
        for slot, first in self._new_from.items():
            end = self._table_lens[slot]
            slots += [slot] * (end - first)
            indices += range(first, end)
            blocks += self._block_tables[slot, first:end].tolist()
        self._new_from.clear()
        return np.array((slots, indices, blocks), np.int64)

    def _widen(self, width: int) -> None:
        while width > self._block_tables.shape[1]:
            self._block_tables = np.concatenate(
                [self._block_tables, np.zeros_like(self._block_tables)], axis=1
            )


def _pairs(pairs: list[tuple[int, int]]) -> Ints:
    return np.array(pairs, np.int64).reshape(-1, 2)
