"""Sampling in an engine on a GPU: the same tokens and scores as on the CPU. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mini_infer import (
    EngineConfig,
    LLMEngine,
    RepetitionDetection,
    SamplingParams,
    StructuredOutput,
)
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [f"Once upon a time{' there was a' * (index % 4)}" for index in range(8)]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "is_brave": {"type": "boolean"}},
    "required": ["name", "is_brave"],
    "additionalProperties": False,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 20, "top_p": 0.9},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "top_k": 50},
    {"logit_bias": {500: 2.0, 700: -50.0}, "bad_words": ["the", "there was a"]},
    {"allowed_token_ids": list(range(200, 2000))},
    {"structured_output": StructuredOutput(json_schema=SCHEMA)},
    {"structured_output": StructuredOutput(json_schema=SCHEMA), "logprobs": 2},
    {"structured_output": StructuredOutput(regex="[a-z]{20}"), "temperature": 0.0},
    {"repetition_detection": RepetitionDetection(max_period=4, num_repeats=3)},
    {"logprobs": 20, "prompt_logprobs": 3},
    {"temperature": 0.0, "logprobs": 0, "min_tokens": 40},
]


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[LLMEngine, LLMEngine]]:
    options = {"max_num_batched_tokens": 64, "kv_cache_tokens": 2**14, "swap_space_gib": 0.1}
    with (
        LLMEngine(EngineConfig(device="cuda", dtype="float32", **options)) as on_cuda,
        LLMEngine(EngineConfig(device="cpu", **options)) as on_cpu,
    ):
        yield on_cuda, on_cpu


def test_the_kernels_are_those_in_triton(engines: tuple[LLMEngine, LLMEngine]) -> None:
    on_cuda, on_cpu = engines
    assert on_cuda._engine.runner._sampler._kernels is not REFERENCE_SAMPLING
    assert on_cpu._engine.runner._sampler._kernels is REFERENCE_SAMPLING


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_tokens_equal_those_on_the_cpu(
    engines: tuple[LLMEngine, LLMEngine], options: dict[str, Any]
) -> None:
    given = {"max_tokens": 48, "temperature": 0.9, "seed": 11, **options}
    outputs, expected = (engine.generate(PROMPTS, **given) for engine in engines)
    pairs = list(zip(outputs, expected, strict=True))
    # Sums in another order can turn a near tie, of which there is hardly one in 384 tokens.
    assert sum(output.token_ids != reference.token_ids for output, reference in pairs) <= 1
    for output, reference in pairs:
        if output.token_ids != reference.token_ids:
            continue
        assert output.finish_reason == reference.finish_reason
        for told, own in (
            (output.logprobs, reference.logprobs),
            (output.prompt_logprobs, reference.prompt_logprobs),
        ):
            assert [each.rank for each in told] == [each.rank for each in own]
            assert [each.logprob for each in told] == pytest.approx(
                [each.logprob for each in own], abs=1e-3
            )
            assert [len(each.top) for each in told] == [len(each.top) for each in own]


def test_all_options_at_once_in_one_batch(engines: tuple[LLMEngine, LLMEngine]) -> None:
    """Rows of every kind side by side give what they give alone."""
    on_cuda, _ = engines
    params = [
        SamplingParams(**{"max_tokens": 48, "temperature": 0.9, "seed": 5, **options})
        for options in OPTIONS
    ]
    together = on_cuda.generate([PROMPTS[0]] * len(params), params)
    alone = [on_cuda.generate(PROMPTS[0], each)[0] for each in params]
    pairs = zip(together, alone, strict=True)
    assert sum(output.token_ids != single.token_ids for output, single in pairs) <= 1
