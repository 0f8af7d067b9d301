"""Counts of what the scheduler has decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mini_infer.errors import MiniInferError
from mini_infer.messages import EngineCounters

from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.preemption import Preemption


@dataclass(slots=True)
class Tally:
    """What is counted nowhere else; `EngineCounters` says what the numbers mean."""

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_expired_waiting: int = 0
    num_expired_running: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts the error with which a request is refused in the block."""
        try:
            yield
        except MiniInferError as error:
            self.refusals[error.reason.value] += 1
            raise

    def note_expired(self, *, has_run: bool) -> None:
        """The deadline of a sequence has passed."""
        self.num_expired_running += has_run
        self.num_expired_waiting += not has_run

    def counters(self, blocks: BlockManager, preemption: Preemption) -> EngineCounters:
        """All counts, with those that the scheduler's parts keep themselves."""
        return EngineCounters(
            num_prefill_tokens=self.num_prefill_tokens,
            num_decode_tokens=self.num_decode_tokens,
            num_queried_tokens=blocks.num_queried_tokens,
            num_hit_tokens=blocks.num_hit_tokens,
            num_recomputes=preemption.num_recomputes,
            num_swaps=preemption.num_swaps,
            num_swapped_out_blocks=blocks.num_swapped_out_blocks,
            num_swapped_in_blocks=blocks.num_swapped_in_blocks,
            num_copied_blocks=blocks.num_copied_blocks,
            num_evicted_blocks=blocks.pool.num_evicted,
            num_expired_waiting=self.num_expired_waiting,
            num_expired_running=self.num_expired_running,
            refusals=dict(self.refusals),
        )
