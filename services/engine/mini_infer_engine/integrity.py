"""What must hold of the queues at any time, whatever came before."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence, SequenceStatus
from mini_infer_engine.waiting_queue import WaitingQueue


def check_queues(
    sequences: Collection[Sequence],
    launched: Iterable[Sequence],
    running: RunningBatch,
    waiting: WaitingQueue[Sequence],
    blocks: BlockManager,
) -> None:
    """Checks every invariant of the queues and of the blocks.

    Args:
        sequences: Those that have not ended.
        launched: Those that steps under way name, perhaps some of them twice.
        running: Of the scheduler.
        waiting: Of the scheduler.
        blocks: Of the scheduler.

    Raises:
        AssertionError: Where one does not hold.
    """
    everyone = {id(each): each for each in [*sequences, *launched]}
    blocks.check_integrity(everyone.values())
    running.check_integrity()
    waiting.check_integrity()
    running_keys = {each.key for each in running}
    waiting_keys = {each.key for each in waiting}
    assert not running_keys & waiting_keys, "a sequence is in both queues"
    assert running_keys | waiting_keys == {each.key for each in sequences}, "a sequence is lost"
    for sequence in waiting:
        assert sequence.status is SequenceStatus.WAITING
        assert not sequence.block_table, f"{sequence} waits with blocks"
    for sequence in running:
        assert sequence.status is SequenceStatus.RUNNING
        assert not sequence.host_blocks, f"{sequence} runs with blocks of the host"
        assert sequence.num_computed_tokens < sequence.num_tokens
    if not everyone:
        assert blocks.pool.num_used == 0, "idle queues hold blocks"
        assert blocks.num_swapped == 0, "idle queues have swapped sequences"
