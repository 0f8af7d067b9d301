"""The engine on a GPU: the same parts and the same tokens as on the CPU. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mini_infer import ConfigError, EngineConfig, LLMEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [f"Once upon a time{' there was a' * (index % 5)}" for index in range(20)]


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[LLMEngine]:
    with LLMEngine(EngineConfig(device="cuda", dtype="float32", max_num_batched_tokens=64)) as made:
        yield made


def test_greedy_ids_equal_those_on_the_cpu(on_cuda: LLMEngine) -> None:
    options = {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True}
    with LLMEngine(EngineConfig(device="cpu")) as on_cpu:
        expected = on_cpu.generate(PROMPTS, **options)
    outputs = on_cuda.generate(PROMPTS, **options)
    differing = [
        index
        for index, (output, reference) in enumerate(zip(outputs, expected, strict=True))
        if output.token_ids != reference.token_ids
    ]
    # Sums in another order can turn a near tie; more than one in 1,280 tokens is no near tie.
    assert len(differing) <= 1


def test_sampled_ids_equal_those_alone(on_cuda: LLMEngine) -> None:
    together = on_cuda.generate(PROMPTS, max_tokens=16, temperature=0.8, top_k=40, seed=3)
    alone = [
        on_cuda.generate(prompt, max_tokens=16, temperature=0.8, top_k=40, seed=3)[0]
        for prompt in PROMPTS
    ]
    same = [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)]
    assert sum(same) >= len(PROMPTS) - 1


def test_the_checkpoints_type_is_the_default_and_the_cache_is_sized_from_free_memory() -> None:
    with LLMEngine(
        EngineConfig(device="cuda", max_num_seqs=256, gpu_memory_utilization=0.5)
    ) as made:
        assert made._engine.served.dtype == "bfloat16"
        spec = made._engine.runner.cache.spec
        num_useful = 256 * made._engine.served.max_model_len // spec.block_size
        assert made._engine.pool.num_blocks == num_useful
        (output,) = made.generate("Once upon a time", max_tokens=8, temperature=0, ignore_eos=True)
        assert len(output.token_ids) == 8


def test_a_share_of_memory_that_is_too_small_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="raise gpu_memory_utilization"):
        LLMEngine(EngineConfig(device="cuda", gpu_memory_utilization=0.0001))
