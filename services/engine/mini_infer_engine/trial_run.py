"""Steps that run before the engine serves: what memory the largest takes, and how long they take.

They name the cache's first blocks, which nobody uses yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from mini_infer.logprobs import MAX_LOGPROBS
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
_WARM_UP_PROMPTS = ((1,), (3,), (1, 2))
"""Rows that decode, others, and both."""
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
    """Lengths of prompts that make the largest step: long ones first, and a row for all others.

    Args:
        max_num_seqs: Sequences in a step at most.
        max_num_batched_tokens: Tokens in a step at most, at least `max_num_seqs`.
        longest: Tokens that a prompt can have at most.
    """
    lengths = []
    num_left = max_num_batched_tokens
    for num_others in range(max_num_seqs - 1, -1, -1):
        lengths.append(min(longest, num_left - num_others))
        num_left -= lengths[-1]
    return lengths


def num_trial_blocks(prompt_lens: Sequence[int], block_size: int) -> int:
    """Blocks that a trial of these prompts needs."""
    return sum(-(-(length + 1) // block_size) for length in prompt_lens)


_DRAWN = ResolvedSampling(temperature=1.0, top_k=0, top_p=0.9, seed=0, max_tokens=1)
_ALL_ON = msgspec.structs.replace(
    _DRAWN,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    bias_ids=[0],
    bias_values=[1.0],
    num_logprobs=MAX_LOGPROBS,
)
_WITH_PROMPT_LOGPROBS = msgspec.structs.replace(_ALL_ON, num_prompt_logprobs=MAX_LOGPROBS)


def trial_batch(
    prompt_lens: Sequence[int], block_size: int, sampling: ResolvedSampling = _DRAWN
) -> ScheduledBatch:
    """The step that computes these prompts at once and samples a token for each.

    Args:
        prompt_lens: Tokens of each.
        block_size: Of the cache.
        sampling: How.
    """
    running = RunningBatch(len(prompt_lens))
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


def largest_batch(prompt_lens: Sequence[int], block_size: int) -> ScheduledBatch:
    """As `trial_batch`, with everything that takes memory."""
    return trial_batch(prompt_lens, block_size, _ALL_ON)


def warm_up(runner: ModelRunner, max_num_seqs: int, longest: int) -> None:
    """Runs small steps that ask for everything, so that their kernels are compiled.

    Args:
        runner: Its caches hold nothing yet.
        max_num_seqs: Sequences in a step at most.
        longest: Tokens that a prompt, and a step, can have at most.
    """
    block_size, num_blocks = runner.cache.spec.block_size, runner.cache.num_blocks
    for prompt_lens in _WARM_UP_PROMPTS:
        num_tokens = sum(prompt_lens)
        is_allowed = len(prompt_lens) <= max_num_seqs and num_tokens <= longest
        if is_allowed and num_trial_blocks(prompt_lens, block_size) <= num_blocks:
            for sampling in (_DRAWN, _ALL_ON, _WITH_PROMPT_LOGPROBS):
                runner.run(trial_batch(prompt_lens, block_size, sampling))


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
