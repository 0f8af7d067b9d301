"""The model over the paged cache against `transformers`, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from mini_infer.config import EngineConfig
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import RowStatus, ScheduledBatch, StepTokens
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.limits import SchedulerLimits
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as ReferenceModel

VOCAB = 97
SHAPES = [
    dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, attention_bias=True),
    dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=1, head_dim=10, mlp_bias=True),
]


@pytest.fixture(scope="module", params=SHAPES, ids=["gqa-tied", "mha-bias", "mqa-odd"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, ReferenceModel]:
    """Our engine and the reference on the same random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        intermediate_size=56,
        num_hidden_layers=3,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
        **request.param,
    )
    reference = ReferenceModel(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    engine = build_engine(
        EngineConfig(model=str(folder), kv_cache_tokens=2048, swap_space_gib=0.01)
    )
    return engine, reference


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 70, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (each,), generator=generator).tolist() for each in lengths]


def reference_greedy(reference: ReferenceModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = reference(ids).logits[0, -1]
            best = logits.topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "pick another seed: a near tie"
            ids = torch.cat((ids, best.indices[:1, None]), 1)
    return ids[0, len(prompt) :].tolist()


class PoisonsFreedBlocks:
    """The engine's runner, and what the blocks of block tables are on its device."""

    def __init__(self, runner: ModelRunner, *, swaps: bool = False) -> None:
        """Where `swaps`, each step moves every block through the host to another place."""
        self._runner = runner
        self._swaps = swaps
        self._generator = np.random.default_rng(0)
        self._places = np.arange(runner.cache.num_blocks)

    def poison(self, blocks: Sequence[int]) -> None:
        self._runner.cache.fill(self._places[blocks], 1e4)

    def run(self, batch: ScheduledBatch) -> StepTokens:
        return self._runner.run(self._with_swaps(batch) if self._swaps else batch)

    def _with_swaps(self, batch: ScheduledBatch) -> ScheduledBatch:
        moves = (batch.swap_outs, batch.zero_blocks, batch.swap_ins, batch.block_copies)
        assert not any(map(len, moves))
        before, on_host = self._places, self._generator.permutation(self._places)
        after = self._places = self._generator.permutation(self._places)
        return replace(
            batch,
            block_tables=after[batch.block_tables],
            swap_outs=np.stack((before, on_host), axis=1),
            zero_blocks=before,
            swap_ins=np.stack((on_host, after), axis=1),
        )


def scheduler_over(pool: BlockPool, budget: int) -> Scheduler:
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=budget, max_queued_requests=99)
    costs = StepCoefficients(
        step_s=1e-3, row_s=1e-5, context_s=1e-8, token_s=1e-5, pair_s=1e-8, block_s=1e-5
    )
    return Scheduler(BlockManager(pool), limits, StepCosts(costs))


def greedy(
    engine: Engine,
    requests: list[list[int]],
    num_tokens: int,
    *,
    budget: int,
    num_blocks: int,
    swaps: bool = False,
) -> list[list[int]]:
    runner = PoisonsFreedBlocks(engine.runner, swaps=swaps)
    scheduler = scheduler_over(BlockPool(num_blocks, 16, on_free=runner.poison), budget)
    sampling = ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=num_tokens, ignore_eos=True
    )
    for stream, prompt in enumerate(requests):
        key = StreamKey(b"", stream)
        scheduler.add(*engine.served.sequences([key], prompt, sampling), now=0.0)
    outputs: list[list[int]] = [[] for _ in requests]
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for update in scheduler.finish_step(batch, runner.run(batch), 0.0):
            assert update.error is None
            outputs[update.key.stream] += update.token_ids
        scheduler.check_integrity()
    return outputs


@pytest.mark.parametrize(
    ("budget", "num_blocks"),
    [(512, 128), (16, 128), (64, 12)],
    ids=["whole-prompts", "chunked-prefill", "preempted-and-poisoned"],
)
def test_greedy_equals_transformers(
    pair: tuple[Engine, ReferenceModel], budget: int, num_blocks: int
) -> None:
    engine, reference = pair
    requests = prompts(7)
    expected = [reference_greedy(reference, prompt, 12) for prompt in requests]
    assert greedy(engine, requests, 12, budget=budget, num_blocks=num_blocks) == expected


def test_swapped_sequences_go_on_as_if_they_had_stayed(
    pair: tuple[Engine, ReferenceModel],
) -> None:
    engine, reference = pair
    requests = prompts(3)
    outputs = greedy(engine, requests, 12, budget=48, num_blocks=128, swaps=True)
    assert outputs == [reference_greedy(reference, prompt, 12) for prompt in requests]


def test_logits_equal_transformers(pair: tuple[Engine, ReferenceModel]) -> None:
    engine, reference = pair
    (prompt,) = prompts(1)
    captured: list[torch.Tensor] = []
    runner = engine.runner
    original = runner._forward
    runner._forward = lambda inputs: captured.append(original(inputs)) or captured[-1]  # type: ignore[func-returns-value]
    try:
        greedy(engine, [prompt], 1, budget=512, num_blocks=64)
    finally:
        runner._forward = original
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    assert (captured[0][0] - expected).norm() / expected.norm() < 1e-5


def test_blocks_with_non_finite_values_are_cleared_before_reuse(
    pair: tuple[Engine, ReferenceModel],
) -> None:
    engine, reference = pair
    scheduler = scheduler_over(BlockPool(8, 16), 99)
    sampling = ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=3, ignore_eos=True
    )
    scheduler.add(*engine.served.sequences([StreamKey(b"", 0)], [5] * 20, sampling), now=0.0)
    batch = scheduler.schedule(0.0)
    engine.runner.run(batch)
    engine.runner.cache.fill(batch.block_tables[0].tolist(), float("nan"))
    (update,) = scheduler.finish_step(
        batch, StepTokens(np.array([[0]]), np.array([RowStatus.NON_FINITE])), 0.0
    )
    assert update.error is not None
    prompt = list(range(2, 22))
    scheduler.add(*engine.served.sequences([StreamKey(b"", 1)], prompt, sampling), now=0.0)
    output: list[int] = []
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for update in scheduler.finish_step(batch, engine.runner.run(batch), 0.0):
            assert update.error is None
            output += update.token_ids
    assert output == reference_greedy(reference, prompt, 3)
