"""What sampling and stopping fields do, told to a stand-in engine and a tokenizer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway.harness import RunningGateway, exercises, submitted, thoughts
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine, StandInTokenizer
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.messages import (
    CheckGrammar,
    EncodedWords,
    EncodeWords,
    FinishCode,
    GrammarAccepted,
    Submit,
)
from mini_infer.resolved_sampling import RepetitionLimit
from mini_infer.structured_output import Grammar, GrammarKind


@exercises("SamplingOptions.temperature", "SamplingOptions.top_k", "SamplingOptions.top_p")
@exercises("GenerateRequest.sampling", "GenerateRequest.stopping")
@exercises("StoppingOptions.max_tokens", "StoppingOptions.min_tokens")
@exercises("StoppingOptions.ignore_eos", "StoppingOptions.stop_token_ids")
async def test_sampling_reaches_the_engine(served: RunningGateway, engine: StandInEngine) -> None:
    defaults = (await submitted(served, engine, [5, 6])).sampling
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.7, 0, 0.95)
    assert defaults.max_tokens == ENGINE_WELCOME.max_model_len - 2
    assert (defaults.min_tokens, defaults.ignore_eos, defaults.stop_token_ids) == (0, False, [])
    zeros = (await submitted(served, engine, [5], temperature=0, top_k=0, seed=0)).sampling
    assert (zeros.temperature, zeros.top_k, zeros.seed) == (0, 0, 0)
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "seed": 2**64 - 1,
        "max_tokens": 9,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [11, 12],
    }
    sampling = (await submitted(served, engine, [5], **given)).sampling  # type: ignore[arg-type]
    assert {name: getattr(sampling, name) for name in given} == given


@exercises("SamplingOptions.min_p", "SamplingOptions.typical_p")
@exercises("SamplingOptions.repetition_penalty", "SamplingOptions.presence_penalty")
@exercises("SamplingOptions.frequency_penalty")
async def test_filters_and_penalties_reach_the_engine(
    served: RunningGateway, engine: StandInEngine
) -> None:
    names = ("min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

    async def told(**options: float) -> list[float]:
        sampling = (await submitted(served, engine, [5], **options)).sampling
        return [getattr(sampling, name) for name in names]

    defaults = ENGINE_WELCOME.defaults
    of_the_model = [defaults.min_p, defaults.typical_p, defaults.repetition_penalty, 0, 0]
    assert await told() == of_the_model
    for index, (name, value) in enumerate(zip(names, (0.25, 0.5, 1.5, -1.25, 2), strict=True)):
        expected = [*of_the_model]
        expected[index] = value
        assert await told(**{name: value}) == expected
    neutral = {"min_p": 0, "typical_p": 1, "repetition_penalty": 1}
    assert await told(**neutral) == [0, 1, 1, 0, 0]


@exercises("SamplingOptions.logit_bias", "SamplingOptions.allowed_token_ids")
async def test_bias_and_allowed_ids_reach_the_engine(
    served: RunningGateway, engine: StandInEngine
) -> None:
    sampling = (await submitted(served, engine, [5])).sampling
    assert (sampling.bias_ids, sampling.bias_values, sampling.allowed_token_ids) == ([], [], [])
    bias = {4095: -100.0, 0: 0.5}
    options: dict[str, Any] = {"logit_bias": bias, "allowed_token_ids": [9, 0, 4095]}
    sampling = (await submitted(served, engine, [5], **options)).sampling
    assert dict(zip(sampling.bias_ids, sampling.bias_values, strict=True)) == bias
    assert sampling.allowed_token_ids == [9, 0, 4095]


@exercises("SamplingOptions.bad_words")
async def test_bad_words_reach_the_engine_in_ids(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    options: Any = {"bad_words": ["a fox", "né"], "ids_only": True}
    submitting = asyncio.create_task(submitted(faked, engine, [5], **options))
    job = await tokenizer.next(EncodeWords)
    assert job.words == ["a fox", "né"]
    await tokenizer.send(EncodedWords(job.job, [[7, 8], [9]]))
    assert (await submitting).sampling.bad_words == [[7, 8], [9]]


@exercises("StoppingOptions.repetition_detection", "RepetitionDetection.max_period")
@exercises("RepetitionDetection.min_period", "RepetitionDetection.num_repeats")
async def test_repetition_detection_reaches_the_engine(
    served: RunningGateway, engine: StandInEngine
) -> None:
    assert (await submitted(served, engine, [5])).sampling.repetition is None
    detection = {"max_period": 9, "num_repeats": 3}
    submit = await submitted(served, engine, [5], repetition_detection=detection)
    assert submit.sampling.repetition == RepetitionLimit(1, 9, 3)
    detection["min_period"] = 2
    submit = await submitted(served, engine, [5], repetition_detection=detection)
    assert submit.sampling.repetition == RepetitionLimit(2, 9, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json_schema": {"a": 1}}, Grammar(GrammarKind.JSON_SCHEMA, '{"a": 1}')),
        ({"regex": "a*"}, Grammar(GrammarKind.REGEX, "a*")),
        ({"grammar": "start: x"}, Grammar(GrammarKind.GRAMMAR, "start: x")),
        ({"choice": ["yes", "né"]}, Grammar(GrammarKind.CHOICE, '["yes", "né"]')),
        ({"json_object": True}, Grammar(GrammarKind.JSON_OBJECT, "")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@exercises("GenerateRequest.structured_output", "StructuredOutput.json_schema")
@exercises("StructuredOutput.regex", "StructuredOutput.grammar", "StructuredOutput.json_object")
@exercises("StructuredOutput.choice", "Choices.texts")
async def test_language_is_vetted_and_reaches_the_engine(
    faked: RunningGateway,
    engine: StandInEngine,
    tokenizer: StandInTokenizer,
    options: Any,
    expected: Grammar,
) -> None:
    submitting = asyncio.create_task(submitted(faked, engine, [5], ids_only=True, **options))
    check = await tokenizer.next(CheckGrammar)
    assert check.grammar == expected
    await tokenizer.send(GrammarAccepted(check.job))
    assert (await submitting).sampling.grammar == expected


@exercises("OutputOptions.logprobs", "OutputOptions.prompt_logprobs")
async def test_log_probabilities_are_asked_for_and_delivered(
    served: RunningGateway, engine: StandInEngine
) -> None:
    """`test_logprobs.py` says how they travel."""
    sampling = (await submitted(served, engine, [5])).sampling
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (NO_LOGPROBS, NO_LOGPROBS)
    stream = served.client.generate([5, 6, 7], logprobs=0, prompt_logprobs=2)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    assert (submit.sampling.num_logprobs, submit.sampling.num_prompt_logprobs) == (0, 2)
    prompt, output = thoughts(1, [6, 7], 2), thoughts(0, [8], 0)
    await engine.tell_prompt(submit.stream, 1, prompt)
    await engine.step(submit.stream, 0, [8], FinishCode.LENGTH, logprobs=output)
    await reading
    assert stream.prompt_logprobs == prompt.tokens()
    assert stream.choices[0].logprobs == output.tokens()
