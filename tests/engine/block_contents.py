"""A stand-in for the tensors of the KV cache: it remembers what each slot was computed from.

The tag of a token stands for its scope and all tokens up to it, as its K and V do. A step may only
read slots that hold the right tags, however they came there: computed, shared, copied, swapped.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.sequence import Sequence, StreamKey

POISON = -1


class BlockContents:
    """What the blocks of device and host hold."""

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._device = np.full((num_blocks, block_size), POISON, np.int64)
        self._to_poison: list[int] = []
        self._host = np.full((num_host_blocks, block_size), POISON, np.int64)
        self._tables: dict[tuple[int, int], int] = {}  # as a GPU keeps them, by slot and index

    def poison(self, blocks: Seq[int]) -> None:
        """For `BlockPool.on_free`: nobody may read these any more but a swap that is noted down."""
        self._to_poison += blocks

    def run(self, batch: ScheduledBatch, sequences: dict[StreamKey, Sequence]) -> None:
        """Does to the blocks what a step does, and checks what it reads."""
        for block, host_block in batch.swap_outs:
            self._host[host_block] = self._device[block]
        self._device[self._to_poison] = POISON
        self._to_poison = []
        self._device[batch.zero_blocks] = POISON
        for host_block, block in batch.swap_ins:
            self._device[block] = self._host[host_block]
        for source, target in batch.block_copies:
            self._device[target] = self._device[source]
        self._change_tables(batch)
        # All rows write before any reads, as in a layer.
        rows = [self._write(batch, row, sequences[key]) for row, key in enumerate(batch.keys)]
        for key, slots, tags in rows:
            held = self._device.reshape(-1)[slots].tolist()
            assert held == tags, f"stream {key.stream} reads what it has not computed"

    def _change_tables(self, batch: ScheduledBatch) -> None:
        """Takes changes of block tables in; what a step reads of them must stand in its rows."""
        changes = list(zip(*batch.table_changes.tolist(), strict=True))
        places = [(slot, index) for slot, index, _ in changes]
        assert len(set(places)) == len(places), "a place of a block table changes twice"
        self._tables |= dict(zip(places, (block for *_, block in changes), strict=True))
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        for row, slot in enumerate(batch.slots.tolist()):
            num_blocks = -(-int(ends[row]) // self._block_size)
            kept = [self._tables[slot, index] for index in range(num_blocks)]
            assert kept == batch.block_tables[row, :num_blocks].tolist()

    def room(self, batch: ScheduledBatch, sequences: dict[StreamKey, Sequence]) -> int:
        """Tokens that every sampled row's last block still has room for."""
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        return min(
            (
                len(sequences[batch.keys[row]].block_table) * self._block_size - int(ends[row])
                for row in batch.sampling.rows.tolist()
            ),
            default=0,
        )

    def run_on(
        self, batch: ScheduledBatch, tokens: StepTokens, sequences: dict[StreamKey, Sequence]
    ) -> None:
        """Computes all but the last of several tokens of each row, as a merged step does."""
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        for row, token_ids in zip(
            batch.sampling.rows.tolist(), tokens.token_ids.tolist(), strict=True
        ):
            sequence = sequences[batch.keys[row]]
            tags = tags_of(sequence, sequence.num_tokens)
            for offset, token_id in enumerate(token_ids[:-1]):
                tags.append(hash((tags[-1], token_id)))
                block, slot = divmod(int(ends[row]) + offset, self._block_size)
                self._device[batch.block_tables[row, block], slot] = tags[-1]

    def _write(
        self, batch: ScheduledBatch, row: int, sequence: Sequence
    ) -> tuple[StreamKey, list[int], list[int]]:
        start = int(batch.num_computed_tokens[row])
        end = start + int(batch.num_scheduled_tokens[row])
        table = batch.block_tables[row]
        size = self._block_size
        slots = [int(table[position // size]) * size + position % size for position in range(end)]
        tags = tags_of(sequence, end)
        # One that ended in the step before, when this one was launched already, lacks its token.
        tags += [POISON] * (end - len(tags))
        self._device.reshape(-1)[slots[start:]] = tags[start:]
        return sequence.key, slots, tags


def tags_of(sequence: Sequence, num_tokens: int) -> list[int]:
    """The tags of a sequence's first tokens."""
    # Behind its turning point a text is computed anew, and otherwise.
    tag = hash((sequence.cache_scope, sequence.num_turned_together > sequence.num_prompt_tokens))
    tags = []
    for token_id in sequence.token_ids[:num_tokens]:
        tag = hash((tag, token_id))
        tags.append(tag)
    return tags
