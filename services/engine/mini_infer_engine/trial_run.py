"""Steps that run before the engine serves: what memory the largest takes, and how long they take.

They name the cache's first blocks, which nobody uses yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.resolved_sampling import ResolvedSampling

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.captured_decode import decode_batch
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.sequence import StreamKey

_TIMED_TOKENS = 512
_TIMED_BLOCKS = 64
_LEAST_SHARE = 0.1
"""Of the time of a prompt's step, for its tokens."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long parts of a step took in a trial, in seconds.

    Attributes:
        step_s: A step that decodes one row.
        token_s: What a token of a prompt adds to a step.
        swapped_block_s: A block's way to the host's memory, or back; 0 where none can be swapped.
    """

    step_s: float
    token_s: float
    swapped_block_s: float


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


def trial_batch(
    prompt_lens: Sequence[int], block_size: int, num_logprobs: int = NO_LOGPROBS
) -> ScheduledBatch:
    """The step that computes these prompts at once and samples a token for each.

    Args:
        prompt_lens: Tokens of each.
        block_size: Of the cache.
        num_logprobs: Likeliest tokens to tell with each sampled one, or `NO_LOGPROBS`.
    """
    running = RunningBatch(len(prompt_lens))
    # Not greedy, so that sampling takes what it can take.
    sampling = ResolvedSampling(
        temperature=1.0, top_k=0, top_p=0.9, seed=0, max_tokens=1, num_logprobs=num_logprobs
    )
    num_blocks = 0
    for stream, length in enumerate(prompt_lens):
        key = StreamKey(b"", stream)
        sequence = EngineSequence(key, [0] * length, sampling, eos_token_ids=())
        sequence.arrival_number = stream
        first, num_blocks = num_blocks, num_blocks + num_trial_blocks([length], block_size)
        sequence.block_table = list(range(first, num_blocks))
        running.add(sequence)
    decodes = [each for each in running if each.num_tokens == 1]
    prefills = [(each, each.num_tokens) for each in running if each.num_tokens > 1]
    return running.build(0, decodes, prefills, BlockTransfers())


def measure_step_times(runner: ModelRunner, longest: int) -> StepTimes:
    """Runs small steps to see how long they take.

    Args:
        runner: Its caches hold nothing yet.
        longest: Tokens that a prompt can have at most.
    """
    block_size = runner.cache.spec.block_size
    room = runner.cache.num_blocks * block_size - 1
    num_tokens = max(1, min(_TIMED_TOKENS, longest, room))
    prompt = trial_batch([num_tokens], block_size)
    # Recorded steps are optimized while they run for the first and second time.
    step_s = _seconds(runner, lambda: runner.run(decode_batch(1)), num_runs=4)
    prompt_s = _seconds(runner, lambda: runner.run(prompt))
    return StepTimes(
        step_s=step_s,
        # A GPU computes some tokens as fast as one, and a clock is not exact.
        token_s=max(prompt_s - step_s, _LEAST_SHARE * prompt_s) / num_tokens,
        swapped_block_s=_seconds_per_swapped_block(runner),
    )


def _seconds_per_swapped_block(runner: ModelRunner) -> float:
    cache, host_cache = runner.cache, runner.host_cache
    # Every other block of the host: copies of neighbours would be faster than most.
    count = min(_TIMED_BLOCKS, cache.num_blocks, (host_cache.num_blocks + 1) // 2)
    if not count:
        return 0.0
    pairs = np.stack((np.arange(count), 2 * np.arange(count)), axis=1)

    def there_and_back() -> None:
        host_cache.swap_out(cache, pairs)
        host_cache.swap_in(cache, pairs[:, ::-1])

    return _seconds(runner, there_and_back) / (2 * count)


def _seconds(runner: ModelRunner, work: Callable[[], object], num_runs: int = 2) -> float:
    """How long something takes at best: the first times pay for what is done once."""
    durations = []
    for _ in range(num_runs):
        _wait_for(runner.cache.spec.device)
        started = time.perf_counter()
        work()
        _wait_for(runner.cache.spec.device)
        durations.append(time.perf_counter() - started)
    return min(durations)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
