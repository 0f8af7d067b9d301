"""Steps that are launched before the tokens of those before them are known: the same outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from engine.runners import AheadRunner, runner_of
from mini_infer import EngineConfig, GenerationOutput, LLMEngine, SamplingParams
from mini_infer.structured_output import StructuredOutput
from mini_infer_engine.build import Engine
from mini_infer_engine.pipeline import StepPipeline
from mini_infer_engine.sequence import StreamKey

PROMPTS = [f"Once upon a time{' there was a' * (index % 5)}" for index in range(12)]
SHARED = {"max_tokens": 24, "seed": 5}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy to the end": {"temperature": 0.0, "ignore_eos": True},
    "drawn": {"temperature": 0.9, "top_k": 40, "top_p": 0.9},
    "choices": {"temperature": 0.8, "n": 3},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "stop string": {"temperature": 0.8, "stop": ["e"]},
    "late end": {"temperature": 0.8, "min_tokens": 10, "logit_bias": {2: 8.0}},
    "log-probabilities": {"temperature": 0.8, "logprobs": 2},
    "choice": {"structured_output": StructuredOutput(choice=["a fox", "a dog and a cat"])},
    "repetition": {"temperature": 0.0, "ignore_eos": True, "max_tokens": 60},
}
CAN_RUN_AHEAD = {"greedy", "greedy to the end", "drawn", "choices", "stop string", "repetition"}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    config = EngineConfig(device="cpu", max_num_seqs=5, kv_cache_tokens=512)
    with LLMEngine(config) as made:
        made._loaded = replace(made._engine, runner=runner_of(made._engine))
        yield made


@pytest.fixture
def ahead(engine: LLMEngine) -> Iterator[AheadRunner]:
    """The engine's runner, which runs ahead until the test is over."""
    loaded = engine._engine
    runner = AheadRunner(loaded.runner)
    engine._loaded = replace(loaded, runner=runner)  # type: ignore[arg-type]
    yield runner
    engine._loaded = loaded
    assert loaded.pool.num_used == 0
    assert loaded.scheduler.is_idle


def told(outputs: list[GenerationOutput]) -> list[tuple[Any, ...]]:
    return [
        (each.token_ids, each.text, each.finish_reason, each.stop_token_id, len(each.logprobs))
        for each in outputs
    ]


@pytest.mark.parametrize("name", REQUESTS)
def test_outputs_are_those_of_one_step_after_the_other(
    engine: LLMEngine, request: pytest.FixtureRequest, name: str
) -> None:
    params = SamplingParams(**SHARED | REQUESTS[name])
    expected = told(engine.generate(PROMPTS, params))
    runner: AheadRunner = request.getfixturevalue("ahead")
    assert told(engine.generate(PROMPTS, params)) == expected
    assert (runner.num_ahead > 0) == (name in CAN_RUN_AHEAD)


def test_mixed_requests(engine: LLMEngine, request: pytest.FixtureRequest) -> None:
    params = [
        SamplingParams(**SHARED | options | {"max_tokens": 5 + 7 * index})
        for index, options in enumerate(REQUESTS.values())
        if "n" not in options
    ]
    prompts = PROMPTS[: len(params)]
    expected = told(engine.generate(prompts, params))
    runner: AheadRunner = request.getfixturevalue("ahead")
    assert told(engine.generate(prompts, params)) == expected
    assert runner.num_ahead


def steps_of(engine: Engine, max_tokens: int) -> int:
    """Steps of one request alone."""
    pipeline = StepPipeline(engine.scheduler, engine.runner, engine.served.fill_masks)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True).resolve(
        engine.served.defaults, num_prompt_tokens=4, max_model_len=64, seed=0, bad_words=[]
    )
    (sequence,) = engine.served.sequences([StreamKey(b"", 10**6)], [5, 6, 7, 8], sampling)
    before = engine.scheduler.num_steps
    engine.scheduler.add(sequence, now=time.monotonic())
    while not pipeline.is_idle:
        pipeline.finish(pipeline.launch())
    return engine.scheduler.num_steps - before


def test_no_step_is_computed_in_vain_where_the_end_is_known(
    engine: LLMEngine, ahead: AheadRunner
) -> None:
    assert steps_of(engine._engine, 12) == 12
    assert ahead.num_ahead == 11
