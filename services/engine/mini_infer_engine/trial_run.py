"""Steps that run before the engine serves: what the largest batch takes, and how long a token.

They go through the real scheduler and runner, with blocks of a pool of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from mini_infer.sampling_params import ResolvedSampling

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.scheduler import Scheduler, SchedulerLimits
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.sequence import StreamKey

_TIMED_TOKENS = 64


def largest_prompts(max_num_seqs: int, max_num_batched_tokens: int, longest: int) -> list[int]:
    """Lengths of prompts that make the largest step: one long prompt, and a row for all others.

    Args:
        max_num_seqs: Sequences in a step at most.
        max_num_batched_tokens: Tokens in a step at most, at least `max_num_seqs`.
        longest: Tokens that a prompt can have at most.
    """
    first = min(longest, max_num_batched_tokens - max_num_seqs + 1)
    return [first, *[1] * (max_num_seqs - 1)]


def num_trial_blocks(prompt_lens: Sequence[int], block_size: int) -> int:
    """Blocks that a trial of these prompts needs."""
    return sum(-(-(length + 1) // block_size) for length in prompt_lens)


def trial_batch(prompt_lens: Sequence[int], block_size: int) -> ScheduledBatch:
    """The step that computes these prompts at once and samples a token for each."""
    pool = BlockPool(num_trial_blocks(prompt_lens, block_size), block_size)
    limits = SchedulerLimits(
        max_num_seqs=len(prompt_lens),
        max_num_batched_tokens=sum(prompt_lens),
        max_queued_requests=len(prompt_lens),
    )
    scheduler = Scheduler(pool, limits)
    for sequence in _sequences(prompt_lens):
        scheduler.add(sequence)
    return scheduler.schedule(0.0)


def seconds_per_token(runner: ModelRunner, longest: int) -> float:
    """How long a token of a step takes, after a first step that pays for what is done once.

    Args:
        runner: Its cache holds nothing yet.
        longest: Tokens that a prompt can have at most.
    """
    block_size = runner.cache.spec.block_size
    room = runner.cache.num_blocks * block_size - 1
    num_tokens = max(1, min(_TIMED_TOKENS, longest, room))
    batch = trial_batch([num_tokens], block_size)
    runner.run(batch)
    started = time.perf_counter()
    runner.run(batch)
    return (time.perf_counter() - started) / num_tokens


def _sequences(prompt_lens: Sequence[int]) -> Iterator[EngineSequence]:
    # Not greedy, so that sampling takes what it can take.
    sampling = ResolvedSampling(temperature=1.0, top_k=0, top_p=0.9, seed=0, max_tokens=1)
    for stream, length in enumerate(prompt_lens):
        yield EngineSequence(StreamKey(b"", stream), [0] * length, sampling, eos_token_ids=())
