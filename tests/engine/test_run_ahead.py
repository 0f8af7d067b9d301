"""Steps that are launched before the tokens of those before them are known: the same outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine.runners import AheadRunner, runner_of
from mini_infer import EngineConfig, GenerationOutput, LLMEngine, SamplingParams
from mini_infer.structured_output import StructuredOutput
from mini_infer_engine.batch import FillMasks, LaunchedTokens, ScheduledBatch, StepTokens
from mini_infer_engine.build import Engine
from mini_infer_engine.pipeline import StepPipeline
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_costs import StepWork

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
    own = engine._engine.runner
    runner = AheadRunner(own)
    engine._loaded = replace(engine._engine, runner=runner)  # type: ignore[arg-type]
    yield runner
    engine._loaded = replace(engine._engine, runner=own)
    assert engine._engine.pool.num_used == 0
    assert engine._engine.scheduler.is_idle


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


def test_a_stop_string_costs_no_step_where_none_runs_ahead(engine: LLMEngine) -> None:
    (whole,) = engine.generate(PROMPTS[0], max_tokens=12, temperature=0.0)
    before = engine.num_steps
    (output,) = engine.generate(PROMPTS[0], max_tokens=12, temperature=0.0, stop=[whole.text[4:6]])
    assert output.finish_reason == "stop"
    assert output.stop_string == whole.text[4:6]
    num_ids = len(output.token_ids)
    assert engine.num_steps - before == num_ids


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_steps_that_were_broken_off_leave_nothing_behind(
    engine: LLMEngine,
    ahead: AheadRunner,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: type[BaseException],
) -> None:
    options = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    expected = told(engine.generate(PROMPTS, **options))
    cache, launch, num_launched = ahead.cache, ahead.launch, 0

    def launch_some(batch: ScheduledBatch, fill_masks: FillMasks) -> LaunchedTokens:
        nonlocal num_launched
        num_launched += 1
        launched = launch(batch, fill_masks)
        if num_launched < 6:
            return launched

        def fail() -> StepTokens:
            launched()
            cache.fill(np.unique(batch.block_tables), float("nan"))
            raise interrupt

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(ahead, "launch", launch_some)
        with pytest.raises(interrupt):
            engine.generate(PROMPTS, **options)
    assert engine._engine.pool.num_used == 0
    assert cache.layers.isfinite().all()
    assert told(engine.generate(PROMPTS, **options)) == expected


def test_what_is_told_of_a_step_ahead_is_true(engine: LLMEngine, ahead: AheadRunner) -> None:
    loaded = engine._engine
    noted: list[StepWork] = []
    loaded.scheduler.costs.note = lambda work, seconds: noted.append(work)  # type: ignore
    pipeline = StepPipeline(loaded.scheduler, loaded.runner, loaded.served.fill_masks)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True).resolve(
        loaded.served.defaults, num_prompt_tokens=4, max_model_len=64, seed=0, bad_words=[]
    )
    (sequence,) = loaded.served.sequences([StreamKey(b"", 10**7)], [5, 6, 7, 8], sampling)
    loaded.scheduler.add(sequence, now=time.monotonic())
    first = loaded.scheduler.num_steps + 1
    ends = []
    while not pipeline.is_idle:
        ends += pipeline.finish(pipeline.launch()).updates.ends.values()
    del loaded.scheduler.costs.note
    assert [work.num_context_tokens for work in noted] == [0, 4, 5, 6, 7, 8]
    assert loaded.scheduler.num_steps == first + 5
    assert [end.accounting.num_steps for end in ends] == [6]
