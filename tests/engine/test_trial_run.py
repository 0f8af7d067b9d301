"""Trial steps: as large as steps can be, and within whatever cache there is."""

from __future__ import annotations

import pytest
from mini_infer import EngineConfig
from mini_infer_engine.build import build_engine
from mini_infer_engine.trial_run import (
    largest_prompts,
    num_trial_blocks,
    trial_batch,
    warm_up,
)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "longest"),
    [(64, 2048, 4095), (1, 1, 1), (8, 8, 100), (4, 1000, 10), (64, 2048, 1023)],
)
def test_the_largest_step_is_one_step(
    max_num_seqs: int, max_num_batched_tokens: int, longest: int
) -> None:
    prompt_lens = largest_prompts(max_num_seqs, max_num_batched_tokens, longest)
    batch = trial_batch(prompt_lens, block_size=16)
    assert len(batch.sampling.rows) == len(batch.keys) == max_num_seqs
    assert batch.num_tokens == min(max_num_batched_tokens, longest * max_num_seqs)
    assert batch.block_tables.max() < num_trial_blocks(prompt_lens, 16)


@pytest.mark.parametrize("kv_cache_tokens", [16, 32, 4096])
@pytest.mark.parametrize("swap_space_gib", [0.0, 1e-4, 0.1])
def test_an_engine_knows_how_long_its_steps_take(
    kv_cache_tokens: int, swap_space_gib: float
) -> None:
    engine = build_engine(
        EngineConfig(kv_cache_tokens=kv_cache_tokens, swap_space_gib=swap_space_gib)
    )
    times = engine.times
    assert 0 < times.token_s < engine.seconds_per_token < 1
    assert 0 < times.step_s < 1
    assert (times.swapped_block_s > 0) == (swap_space_gib > 0)
    assert engine.pool.num_used == 0


@pytest.mark.parametrize(
    ("kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens"),
    [(16, 2, 2048), (32, 2, 3), (48, 3, 2048), (4096, 1, 2), (4096, 1, 1), (4096, 64, 2048)],
)
def test_warming_up_stays_within_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
    kv_cache_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    engine = build_engine(
        EngineConfig(
            kv_cache_tokens=kv_cache_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    )
    batches = []
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda batch: batches.append(batch) or run(batch))
    warm_up(engine.runner, max_num_seqs, max_num_batched_tokens)
    assert batches
    for batch in batches:
        assert batch.slots.max() < max_num_seqs
        assert batch.num_tokens <= max_num_batched_tokens
        assert batch.block_tables.max() < kv_cache_tokens // 16
