"""What tests of the scheduler share: sequences, a stand-in for the model, and a loop."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.limits import SchedulerLimits
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts
from mini_infer_engine.step_updates import SequenceUpdate

EOS = 7
BLOCK_SIZE = 4
SWAP_IS_CHEAP = StepCoefficients(
    step_s=1e-3, row_s=1e-4, context_s=1e-5, token_s=1e-3, pair_s=1e-5, block_s=1e-7
)
SWAP_IS_DEAR = StepCoefficients(
    step_s=1e-3, row_s=1e-4, context_s=1e-5, token_s=1e-3, pair_s=1e-5, block_s=1.0
)


def next_token(stream: int, position: int) -> int:
    """What the stand-in for a model makes; sometimes EOS."""
    return (stream * 31 + position * 17) % 29


def make(
    stream: int,
    num_prompt: int,
    max_tokens: int,
    turning_point: int | None = None,
    *,
    prompt: Seq[int] | None = None,
    scope: tuple[str, ...] | None = None,
    priority: int = 0,
    deadline: float | None = None,
    arrival: float = 0.0,
    parent: Sequence | None = None,
    **options: object,
) -> Sequence:
    """A sequence whose prompt is its own, unless one is given."""
    sampling = ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=stream, max_tokens=max_tokens, **options
    )
    sequence = Sequence(
        StreamKey(b"g", stream),
        [100 + stream] * num_prompt if prompt is None else prompt,
        sampling,
        eos_token_ids=(EOS,),
        turning_point=turning_point,
        cache_scope=scope,
        priority=priority,
        deadline=deadline,
        parent=parent,
    )
    sequence.times.arrival = arrival
    return sequence


def expected_output(sequence: Sequence) -> list[int]:
    """What a sequence must get, whatever happens around it."""
    output: list[int] = []
    sampling = sequence.sampling
    while len(output) < sampling.max_tokens:
        token = next_token(sequence.key.stream, len(output))
        output.append(token)
        if token in sequence.end_ids and len(output) > sampling.min_tokens:
            break
    return output


def run(batch: ScheduledBatch, tokens_per_row: int = 1) -> StepTokens:
    """The stand-in for a model."""
    rows = [
        [next_token(batch.keys[row].stream, position + offset) for offset in range(tokens_per_row)]
        for row, position in zip(
            batch.sampling.rows.tolist(), batch.sampling.positions.tolist(), strict=True
        )
    ]
    token_ids = np.array(rows, np.int64).reshape(len(rows), tokens_per_row)
    return StepTokens(token_ids, np.zeros(len(rows), np.int32))


def scheduler_of(
    num_blocks: int,
    *,
    max_num_seqs: int = 8,
    budget: int = 32,
    max_queued: int = 64,
    num_host_blocks: int = 0,
    caches: bool = False,
    costs: StepCoefficients = SWAP_IS_CHEAP,
    on_free: Callable[[Seq[int]], None] | None = None,
    **limits: float | None,
) -> Scheduler:
    """An idle scheduler over blocks of 4 tokens."""
    bounds = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_queued_requests=max_queued,
        **limits,  # type: ignore[arg-type]
    )
    pool = BlockPool(num_blocks, BLOCK_SIZE, on_free)
    host_pool = BlockPool(num_host_blocks, BLOCK_SIZE) if num_host_blocks else None
    blocks = BlockManager(pool, PrefixCache(pool) if caches else None, host_pool)
    return Scheduler(blocks, bounds, StepCosts(costs))


def step(scheduler: Scheduler, now: float = 0.0) -> tuple[ScheduledBatch, list[SequenceUpdate]]:
    """A whole step."""
    batch = scheduler.schedule(now)
    updates = list(scheduler.finish_step(batch, run(batch), now))
    scheduler.check_integrity()
    return batch, updates


def drive(
    scheduler: Scheduler, after_step: Callable[[list[SequenceUpdate]], None] = lambda _: None
) -> dict[int, list[int]]:
    """Steps until nothing is left; gives each stream's output from now on."""
    outputs: dict[int, list[int]] = {}
    starts: dict[int, int] = {}
    while not scheduler.is_idle:
        _, updates = step(scheduler)
        for update in updates:
            output = outputs.setdefault(update.key.stream, [])
            start = starts.setdefault(update.key.stream, update.start)
            assert update.start == start + len(output)
            output += update.token_ids
        after_step(updates)
    return outputs
