"""Rows that decode alone on scattered blocks: a copy of their K and V, and what it must equal."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine.block_moves import NOTHING, as_pairs, with_moves
from engine.runners import runner_of
from engine.scheduling import SWAP_IS_CHEAP, SWAP_IS_DEAR
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine import memory
from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_manager import BlockManager, BlockTransfers
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.captured_decode import decode_batch
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.limits import SchedulerLimits
from mini_infer_engine.lone_row import LONE_ROW_BYTES, LoneRow, num_lone_row_blocks
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts
from mini_infer_engine.step_updates import SequenceUpdate

BLOCK_SIZE = 4
NUM_BLOCKS = 8
SPEC = KVCacheSpec(
    num_layers=2,
    num_kv_heads=1,
    head_dim=2,
    block_size=BLOCK_SIZE,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
NAN = float("nan")


def in_order(cache: KVCache, blocks: list[int], num_tokens: int) -> torch.Tensor:
    """A row's K and V, [num_layers, num_tokens, 2 * num_kv_heads, head_dim]."""
    return cache.layers[:, blocks].flatten(1, 2)[:, :num_tokens].clone()


# --- the copy alone ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A lone row's step, or with no blocks a step of several rows.

    Attributes:
        blocks: The row's.
        num_computed: Its tokens in the cache.
        num_rounds: Tokens that it computes.
        cleared: A block that is cleared before, or None.
    """

    blocks: tuple[int, ...]
    num_computed: int
    num_rounds: int
    cleared: int | None


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Steps of a few rows that share blocks; most of them go on where the one before ended."""
    tables = draw(
        st.lists(
            st.permutations(range(NUM_BLOCKS)).map(lambda order: order[:4]), min_size=1, max_size=2
        )
    )
    made: list[Step] = []
    position, blocks = 0, tables[0]
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.integers(0, 3)) == 0:
            blocks = draw(st.sampled_from(tables))
            position = draw(st.integers(0, 4 * BLOCK_SIZE))
        num_rounds = draw(st.integers(1, BLOCK_SIZE))
        if position + num_rounds > 4 * BLOCK_SIZE:
            position = 0
        is_lone = draw(st.integers(0, 4)) > 0
        cleared = draw(st.none() | st.none() | st.integers(0, NUM_BLOCKS - 1))
        num_held = -(-(position + num_rounds) // BLOCK_SIZE)
        table = tuple(blocks[:num_held]) if is_lone else ()
        made.append(Step(table, position, num_rounds, cleared))
        position += num_rounds
    return made


@settings(max_examples=300, deadline=None)
@given(steps=steps(), seed=st.integers(0, 99))
def test_the_copy_equals_the_blocks_and_they_get_what_is_new(steps: list[Step], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    paged = KVCache(SPEC, NUM_BLOCKS)
    paged.layers.copy_(torch.randn(paged.layers.shape, generator=generator))
    lone_row = LoneRow(paged, NUM_BLOCKS)
    lone_row.cache.layers.fill_(NAN)
    for step in steps:
        cleared = [] if step.cleared is None else [step.cleared]
        paged.fill(cleared, 0.0)
        moves = (NOTHING[0], np.array(cleared, np.int64), *NOTHING[2:])
        if not step.blocks:
            assert lone_row.enter(with_moves(decode_batch(2), moves)) is None
            paged.layers.copy_(torch.randn(paged.layers.shape, generator=generator))
            continue
        batch = replace(
            with_moves(decode_batch(1), moves),
            block_tables=np.array([step.blocks]),
            num_computed_tokens=np.array([step.num_computed]),
        )
        run_lone_step(lone_row, paged, batch, step.num_rounds, generator)


def run_lone_step(
    lone_row: LoneRow,
    paged: KVCache,
    batch: ScheduledBatch,
    num_rounds: int,
    generator: torch.Generator,
) -> None:
    """A step whose model writes random K and V; checks what it reads and where they end up."""
    blocks = batch.block_tables[0].tolist()
    start = int(batch.num_computed_tokens[0])
    copied = lone_row.enter(batch)
    expected = paged.layers.clone()
    end = start + num_rounds
    new = torch.randn((2, num_rounds, 2, 2), generator=generator)
    for offset, position in enumerate(range(start, end)):
        expected[:, blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = new[:, offset]
    if copied is None:
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        paged.layers.copy_(expected)
        return
    places = copied.block_tables[0].tolist()
    assert places == list(range(len(blocks)))
    read = in_order(lone_row.cache, places, start)
    assert torch.equal(read, in_order(paged, blocks, start))
    lone_row.cache.window(0, end)[:, 0, start:] = new
    lone_row.leave(batch, num_rounds)
    assert torch.equal(paged.layers, expected)


def test_a_row_that_goes_on_is_not_copied_again() -> None:
    paged = KVCache(SPEC, NUM_BLOCKS)
    lone_row = LoneRow(paged, NUM_BLOCKS)
    batch = replace(decode_batch(1), block_tables=np.array([[5, 2]]))
    for position in range(4, 8):
        now = replace(batch, num_computed_tokens=np.array([position]))
        lone_row.enter(now)
        lone_row.cache.window(0, position + 1)[:, 0, position] = float(position)
        lone_row.leave(now, 1)
        paged.fill([5], NAN)
    tables = np.array([[5, 2, 7]])
    lone_row.enter(replace(batch, num_computed_tokens=np.array([8]), block_tables=tables))
    read = in_order(lone_row.cache, [0, 1], 8)[0, :, 0, 0]
    assert read.tolist() == [0, 0, 0, 0, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("column", "moved"), [("swap_ins", [(0, 5)]), ("block_copies", [(1, 5)]), ("zero_blocks", [5])]
)
def test_a_row_whose_blocks_may_have_changed_is_copied_again(
    column: str, moved: list[tuple[int, int]]
) -> None:
    paged = KVCache(SPEC, NUM_BLOCKS)
    lone_row = LoneRow(paged, NUM_BLOCKS)
    batch = replace(
        decode_batch(1), block_tables=np.array([[5, 2]]), num_computed_tokens=np.array([4])
    )
    lone_row.enter(batch)
    lone_row.leave(batch, 1)
    paged.fill([5], 3.0)
    columns = as_pairs(moved) if column != "zero_blocks" else np.array(moved)
    lone_row.enter(replace(batch, **{column: columns}))
    assert (in_order(lone_row.cache, [0], 4) == 3.0).all()


def test_a_row_that_is_too_long_or_in_order_is_not_copied() -> None:
    lone_row = LoneRow(KVCache(SPEC, NUM_BLOCKS), 2)
    assert lone_row.enter(replace(decode_batch(1), block_tables=np.array([[5, 2]]))) is not None
    assert lone_row.enter(replace(decode_batch(1), block_tables=np.array([[5, 2, 3]]))) is None
    assert lone_row.enter(replace(decode_batch(1), block_tables=np.array([[5, 6]]))) is None
    assert lone_row.enter(decode_batch(2)) is None


# --- with the model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(
        EngineConfig(kv_cache_tokens=1024, swap_space_gib=0.01), merge_decode_steps=True
    )


class CountsSteps(LoneRow):
    """A copy that knows how often it was used; what nobody wrote in it is not a number."""

    def __init__(self, paged: KVCache, num_blocks: int) -> None:
        super().__init__(paged, num_blocks)
        self.cache.layers.fill_(NAN)
        self.num_steps = self.num_tokens = 0

    def leave(self, batch: ScheduledBatch, num_rounds: int) -> None:
        super().leave(batch, num_rounds)
        self.num_steps += 1
        self.num_tokens += num_rounds


def with_lone_row(engine: Engine, lone_row: LoneRow) -> ModelRunner:
    runner = engine.runner
    return ModelRunner(
        engine.model,
        runner._forward,
        runner.cache,
        runner._buffers,
        runner._sampler,
        runner._merged,
        runner.host_cache,
        lone_row,
    )


def shuffled_pool(num_blocks: int, generator: random.Random) -> BlockPool:
    """A pool that hands out blocks in a random order."""
    pool = BlockPool(num_blocks, 16)
    blocks = pool.allocate(num_blocks)
    generator.shuffle(blocks)
    pool.release(blocks)
    return pool


def scheduler_over(pool: BlockPool, costs: StepCoefficients = SWAP_IS_DEAR) -> Scheduler:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=48, max_queued_requests=99)
    blocks = BlockManager(pool, PrefixCache(pool), BlockPool(16, 16))
    return Scheduler(blocks, limits, StepCosts(costs))


def greedy(max_tokens: int) -> ResolvedSampling:
    return ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=max_tokens, ignore_eos=True
    )


def recomputed(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """K and V of a text computed at once, operation by operation; as `in_order`."""
    num_blocks = -(-len(token_ids) // 16)
    cache = KVCache(engine.runner.cache.spec, num_blocks)
    sequence = Sequence(StreamKey(b"", 0), token_ids, greedy(1), eos_token_ids=())
    sequence.block_table = list(range(num_blocks))
    running = RunningBatch(1)
    running.add(sequence)
    batch = running.build(0, [], [(sequence, len(token_ids))], BlockTransfers())
    runner_of(engine, cache=cache).run(batch)
    return in_order(cache, sequence.block_table, len(token_ids))


def alone(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy output, eager, one token a step, on neighbouring blocks without a prefix cache."""
    runner = runner_of(engine)
    scheduler = Scheduler(
        BlockManager(BlockPool(64, 16)),
        SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=512, max_queued_requests=1),
        StepCosts(SWAP_IS_DEAR),
    )
    sampling = greedy(max_tokens)
    scheduler.add(*engine.served.sequences([StreamKey(b"", 0)], prompt, sampling), now=0.0)
    return [token for _, update in run_steps(scheduler, runner) for token in update.token_ids]


def run_steps(
    scheduler: Scheduler, runner: ModelRunner
) -> Iterator[tuple[ScheduledBatch, SequenceUpdate]]:
    """Steps until nothing is left; gives each update with its step."""
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for update in scheduler.finish_step(batch, runner.run(batch), 0.0):
            yield batch, update
        scheduler.check_integrity()


class Serving:
    """Requests that come and go, and snapshots of their K and V after each of their steps."""

    def __init__(self, engine: Engine, scheduler: Scheduler, runner: ModelRunner) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._runner = runner
        self.prompts: list[list[int]] = []
        self.outputs: list[list[int]] = []
        self.snapshots: list[tuple[int, torch.Tensor]] = []
        self.num_alone = self.num_together = 0

    @property
    def texts(self) -> list[list[int]]:
        return [prompt + out for prompt, out in zip(self.prompts, self.outputs, strict=True)]

    def request(self, prompt: list[int], max_tokens: int) -> None:
        key = StreamKey(b"", len(self.prompts))
        sequences = self._engine.served.sequences([key], prompt, greedy(max_tokens))
        self._scheduler.add(*sequences, now=0.0)
        self.prompts.append(prompt)
        self.outputs.append([])

    def step(self) -> None:
        batch = self._scheduler.schedule(0.0)
        tokens = self._runner.run(batch)
        for update in self._scheduler.finish_step(batch, tokens, 0.0):
            assert update.error is None
            self.outputs[update.key.stream] += update.token_ids
        self._scheduler.check_integrity()
        self.num_alone += len(batch.keys) == 1
        self.num_together += len(batch.keys) > 1
        num_rounds = tokens.token_ids.shape[1]
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens + num_rounds - 1
        rows = zip(batch.keys, batch.block_tables.tolist(), ends.tolist(), strict=True)
        for key, blocks, end in rows:
            num_tokens = min(end, len(self.texts[key.stream]))
            held = in_order(self._runner.cache, blocks, num_tokens)
            self.snapshots.append((key.stream, held))


@pytest.mark.parametrize("seed", range(4))
def test_lone_and_shared_steps_make_what_each_request_gets_alone(engine: Engine, seed: int) -> None:
    """Prefix hits, preemptions of both kinds, and rows that are alone now and then."""
    generator = random.Random(seed)
    beginnings = [[generator.randrange(5, 200) for _ in range(90)] for _ in range(2)]
    pool = shuffled_pool(11, generator)
    lone_row = CountsSteps(engine.runner.cache, 16)
    scheduler = scheduler_over(pool, SWAP_IS_CHEAP if seed % 2 else SWAP_IS_DEAR)
    serving = Serving(engine, scheduler, with_lone_row(engine, lone_row))
    for _ in range(16):
        prompt = generator.choice(beginnings)[: generator.randrange(1, 90)]
        serving.request(prompt, max_tokens=generator.randrange(1, 70))
        for _ in range(generator.choice((0, 0, 3, 80))):
            serving.step()
    while not scheduler.is_idle:
        serving.step()
    expected = [recomputed(engine, text) for text in serving.texts]
    for stream, held in serving.snapshots:
        wanted = expected[stream][:, : held.shape[1]]
        torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-4)
    for prompt, output in zip(serving.prompts, serving.outputs, strict=True):
        assert output == alone(engine, prompt, len(output))
    assert scheduler.blocks.num_hit_tokens
    assert scheduler.num_preemptions
    assert serving.num_together > 20
    assert serving.num_alone > 20
    assert lone_row.num_steps > 10
    assert lone_row.num_tokens > 2 * lone_row.num_steps, "hardly any step was merged"


def test_a_row_that_is_not_finite_fails_and_harms_nobody(engine: Engine) -> None:
    lone_row = CountsSteps(engine.runner.cache, 16)
    runner = with_lone_row(engine, lone_row)
    scheduler = scheduler_over(shuffled_pool(5, random.Random(3)))
    prompt = list(range(20, 60))
    (failing,) = engine.served.sequences([StreamKey(b"", 0)], prompt, greedy(30))
    scheduler.add(failing, now=0.0)
    batch = scheduler.schedule(0.0)
    scheduler.finish_step(batch, runner.run(batch), 0.0)
    runner.cache.fill(batch.block_tables[0, :1].tolist(), NAN)
    batch = scheduler.schedule(0.0)
    (update,) = scheduler.finish_step(batch, runner.run(batch), 0.0)
    assert update.error is not None
    assert lone_row.num_steps == 1
    (next_one,) = engine.served.sequences([StreamKey(b"", 0)], prompt[5:], greedy(30))
    scheduler.add(next_one, now=0.0)
    output = [token for _, update in run_steps(scheduler, runner) for token in update.token_ids]
    assert lone_row.num_steps > 1
    assert output == alone(engine, prompt[5:], 30)


# --- what an engine takes for it -----------------------------------------------------------------


def test_the_copy_holds_the_longest_row_unless_that_is_too_much() -> None:
    assert num_lone_row_blocks(SPEC, 9) == 3
    large = replace(SPEC, num_layers=2**10, head_dim=2**10)
    assert num_lone_row_blocks(large, 2**20) == LONE_ROW_BYTES // large.bytes_per_block == 16


def test_the_copy_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(kv_cache_tokens=160, max_model_len=128)
    spec = build_engine(config).cache_size.spec
    free = (10 + 8) * spec.bytes_per_block
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    assert build_engine(config).runner._lone_row.cache.num_blocks == 8
    monkeypatch.setattr(memory, "available_bytes", lambda device: free - 1)
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        build_engine(config)
