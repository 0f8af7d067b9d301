"""The real model under everything that the scheduler does: outputs are those of one at a time."""

from __future__ import annotations

import random

import pytest
import torch
from engine.scheduling import SWAP_IS_CHEAP, SWAP_IS_DEAR
from greedy_reference import GreedyComparison, GreedyReference
from mini_infer import EngineConfig
from mini_infer.config import bundled_model
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_costs import StepCosts

NUM_REQUESTS = 60
NUM_TOKENS = 24
FAMILIES = 4
"""Groups of requests that share the beginnings of their prompts."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Room for about three requests at a time; the host takes as many again."""
    config = EngineConfig(
        max_num_seqs=6,
        kv_cache_tokens=16 * 16,
        max_model_len=128,
        max_num_batched_tokens=40,
        swap_space_gib=16 * 16 * 12_288 / 2**30,
    )
    return build_engine(config)


def greedy(num_tokens: int, seed: int = 0) -> ResolvedSampling:
    return ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=seed, max_tokens=num_tokens, ignore_eos=True
    )


class Load:
    """Requests that come, share, are preempted and aborted at random."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.prompts: dict[StreamKey, list[int]] = {}
        self.outputs: dict[StreamKey, list[int]] = {}
        self.ended: set[StreamKey] = set()
        starts = random.Random(1)
        self.starts = [[starts.randrange(5, 900) for _ in range(70)] for _ in range(FAMILIES)]
        self.now = 0.0

    def add(self) -> None:
        start = self.random.choice(self.starts)[: self.random.randint(1, 70)]
        end = [self.random.randrange(5, 900) for _ in range(self.random.randint(1, 12))]
        prompt = [*start, *end]
        first = len(self.prompts)
        keys = [StreamKey(b"", first + index) for index in range(self.random.choice([1, 1, 3]))]
        sequences = self.engine.served.sequences(
            keys,
            prompt,
            greedy(NUM_TOKENS),
            priority=self.random.randint(-1, 1),
            cache_scope=("", self.random.choice(["", "", "salt"])),
        )
        self.engine.scheduler.add(*sequences, now=self.now)
        for key in keys:
            self.prompts[key] = prompt
            self.outputs[key] = []

    def disturb(self) -> None:
        """Preempts, aborts or evicts, now and then."""
        scheduler = self.engine.scheduler
        running = list(scheduler._running)
        draw = self.random.random()
        if running and draw < 0.15:
            costs = self.random.choice([SWAP_IS_CHEAP, SWAP_IS_DEAR])
            scheduler._preemption._costs = StepCosts(costs)
            scheduler._preemption.preempt(self.random.choice(running), self.now)
        elif running and draw < 0.17:
            key = self.random.choice(running).key
            scheduler.abort(key, self.now)
            del self.outputs[key]
        elif draw < 0.19:
            pool = scheduler.blocks.pool
            pool.release(pool.allocate(pool.num_free))

    def step(self) -> None:
        self.now += 0.01
        scheduler = self.engine.scheduler
        batch = scheduler.schedule(self.now)
        tokens = self.engine.runner.run(batch)
        for update in scheduler.finish_step(batch, tokens, self.now):
            self.outputs[update.key] += update.token_ids
        scheduler.check_integrity()

    def run(self) -> None:
        while len(self.prompts) < NUM_REQUESTS or not self.engine.scheduler.is_idle:
            if len(self.prompts) < NUM_REQUESTS and self.random.random() < 0.4:
                self.add()
            self.disturb()
            self.step()


@torch.inference_mode()
def test_any_interleaving_gives_what_each_request_gets_alone(engine: Engine) -> None:
    load = Load(engine, seed=3)
    load.run()
    reference = GreedyReference(bundled_model("demo"))
    alone: dict[tuple[int, ...], list[int]] = {}
    comparison = GreedyComparison(reference)
    for key, output in load.outputs.items():
        prompt = load.prompts[key]
        if tuple(prompt) not in alone:
            alone[tuple(prompt)] = reference.generate(prompt, NUM_TOKENS)
        comparison.add(prompt, alone[tuple(prompt)], output)
    comparison.check()
    counters = engine.scheduler.counters()
    assert counters.num_swaps > 5
    assert counters.num_recomputes > 5
    assert counters.num_swapped_in_blocks > 10
    assert counters.num_copied_blocks > 3
    assert counters.num_hit_tokens > 500
    assert counters.num_evicted_blocks > 50
    assert engine.scheduler.blocks.pool.num_used == 0
