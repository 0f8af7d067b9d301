"""Our engine on texts whose tokens are given: real scheduler, batches and runner, all logits kept.

Whatever the model would choose, a step's tokens are replaced by those of the text, so that one
difference in a last bit does not end the comparison.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from engine.runners import runner_of
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build import Engine
from mini_infer_engine.captured_decode import CapturedDecode
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.limits import SchedulerLimits
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import Forward
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts

Texts = Sequence[tuple[list[int], list[int]]]
"""Prompt and output of each text."""
POISON = 1e4
"""What freed blocks are filled with: whoever reads them is far off."""


@dataclass(frozen=True)
class Rows:
    """Logits of neighbouring positions of one text, out of one step.

    Attributes:
        text: Index of the text.
        start: Position of the first.
        num_known: Tokens of the text that the engine had been given by then.
        logits: [positions, vocab_size].
    """

    text: int
    start: int
    num_known: int
    logits: torch.Tensor


class KeepsLogits:
    """The model, with the logits of all tokens of a step instead of those that are sampled."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.logits = torch.empty(0)

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        self.logits = self._forward(replace(inputs, sampled_tokens=None))
        sampled = inputs.sampled_tokens
        return self.logits if sampled is None else self.logits.index_select(0, sampled)


def recorded(engine: Engine) -> Forward:
    """The engine's model as it serves it."""
    return engine.runner._forward


def eager(engine: Engine) -> Forward:
    """The same model, operation by operation."""
    forward = engine.runner._forward
    return forward._forward if isinstance(forward, CapturedDecode) else forward


def shuffled_pool(engine: Engine, num_blocks: int, seed: int) -> BlockPool:
    """A pool over the engine's cache that hands its blocks out in any order, poisoned."""
    cache = engine.runner.cache
    pool = BlockPool(
        num_blocks, cache.spec.block_size, on_free=lambda blocks: cache.fill(blocks, POISON)
    )
    blocks = pool.allocate(num_blocks)
    random.Random(seed).shuffle(blocks)
    pool.release(blocks)
    return pool


def run_forced(
    engine: Engine,
    forward: Forward,
    texts: Texts,
    pool: BlockPool,
    max_step_tokens: int,
) -> list[Rows]:
    """Computes texts together and keeps the logits.

    Args:
        engine: Whose cache and buffers are used.
        forward: Its model, eager or recorded.
        texts: What to compute.
        pool: Blocks of the engine's cache.
        max_step_tokens: A step's budget; longer prompts take several steps.

    Returns:
        The logits of every step.
    """
    kept = KeepsLogits(forward)
    runner = runner_of(engine, kept)
    limits = SchedulerLimits(
        max_num_seqs=len(texts),
        max_num_batched_tokens=max_step_tokens,
        max_queued_requests=len(texts),
    )
    costs = StepCoefficients(
        step_s=1e-3, row_s=1e-5, context_s=1e-8, token_s=1e-5, pair_s=1e-8, block_s=1e-5
    )
    scheduler = Scheduler(BlockManager(pool), limits, StepCosts(costs))
    for index, (prompt, output) in enumerate(texts):
        sampling = greedy(len(output))
        key = StreamKey(b"", index)
        scheduler.add(*engine.served.sequences([key], prompt, sampling), now=0.0)
    rows: list[Rows] = []
    num_known = [len(prompt) for prompt, _ in texts]
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        runner.run(batch)
        rows += _rows(batch, kept.logits, num_known)
        scheduler.finish_step(batch, _forced_tokens(batch, texts, num_known), 0.0)
        scheduler.check_integrity()
    return rows


def run_greedily(
    engine: Engine, prompts: Sequence[list[int]], num_tokens: Sequence[int]
) -> list[list[int]]:
    """Continues prompts together with the engine's own scheduler and runner."""
    for index, prompt in enumerate(prompts):
        sampling = greedy(num_tokens[index])
        key = StreamKey(b"", index)
        engine.scheduler.add(*engine.served.sequences([key], prompt, sampling), now=0.0)
    outputs: list[list[int]] = [[] for _ in prompts]
    while not engine.scheduler.is_idle:
        batch = engine.scheduler.schedule(0.0)
        for update in engine.scheduler.finish_step(batch, engine.runner.run(batch), 0.0):
            assert update.error is None, update.error
            outputs[update.key.stream] += update.token_ids
        engine.scheduler.check_integrity()
    return outputs


def greedy(num_tokens: int) -> ResolvedSampling:
    """So many tokens, end ids among them."""
    return ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=num_tokens, ignore_eos=True
    )


def _rows(batch: ScheduledBatch, logits: torch.Tensor, num_known: Sequence[int]) -> list[Rows]:
    found = []
    sizes = batch.num_scheduled_tokens.tolist()
    starts = batch.num_computed_tokens.tolist()
    parts = logits[: batch.num_tokens].split(sizes)  # a GPU pads steps that decode alone
    for key, start, part in zip(batch.keys, starts, parts, strict=True):
        found.append(Rows(key.stream, start, num_known[key.stream], part))
    return found


def _forced_tokens(batch: ScheduledBatch, texts: Texts, num_known: list[int]) -> StepTokens:
    """The texts' own next tokens; `num_known` goes up with them."""
    token_ids = []
    positions = batch.sampling.positions.tolist()
    for row, position in zip(batch.sampling.rows.tolist(), positions, strict=True):
        index = batch.keys[row].stream
        token_ids.append([texts[index][1][position]])
        num_known[index] += 1
    num_rows = len(token_ids)
    return StepTokens(
        np.array(token_ids, np.int64).reshape(num_rows, 1), np.zeros(num_rows, np.int32)
    )
