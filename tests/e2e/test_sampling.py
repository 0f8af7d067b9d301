"""Sampling options, log-probabilities and structured output as clients of `serve` see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mini_infer import Client, EngineConfig, LLMEngine, StructuredOutput
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason

STORY = "Once upon a time"
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "animals": {"type": "array", "items": {"enum": ["fox", "owl"]}, "maxItems": 3},
    },
    "required": ["title", "animals"],
    "additionalProperties": False,
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "min_p": 0.05, "top_k": 40, "top_p": 0.95},
    {"temperature": 0.9, "typical_p": 0.8},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0.0, "logit_bias": {500: 3.0, 700: -100.0}},
    {"temperature": 1.0, "allowed_token_ids": list(range(300, 900))},
    {"temperature": 0.0, "bad_words": ["there was", "named", " the"]},
    {"temperature": 0.0, "min_tokens": 40, "stop": ["."], "include_stop_str_in_output": True},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(EngineConfig(max_num_seqs=8, kv_cache_tokens=4096)) as made:
        yield made


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_each_option_means_the_same_over_grpc_and_in_process(
    server: str, engine: LLMEngine, options: dict[str, Any]
) -> None:
    (expected,) = engine.generate(STORY, seed=5, max_tokens=48, **options)
    with Client(server) as client:
        stream = client.generate(STORY, seed=5, max_tokens=48, **options)
        assert stream.text() == expected.text
        assert stream.token_ids == expected.token_ids


def test_logprobs_are_told_with_each_token_and_with_the_prompt(
    server: str, engine: LLMEngine
) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30, "logprobs": 3}
    (expected,) = engine.generate(STORY, prompt_logprobs=2, **options)
    with Client(server) as client:
        stream = client.generate(STORY, prompt_logprobs=2, stream_interval=7, **options)
        for chunk in stream:
            assert len(chunk.logprobs) == len(chunk.token_ids)
        (choice,) = stream.choices
    assert choice.token_ids == expected.token_ids
    assert len(choice.logprobs) == 30
    assert len(stream.prompt_logprobs) == len(expected.prompt_token_ids) - 1
    for told, own in (
        (choice.logprobs, expected.logprobs),
        (stream.prompt_logprobs, expected.prompt_logprobs),
    ):
        for ours, theirs in zip(told, own, strict=True):
            assert ours.rank == theirs.rank
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [each.token_id for each in ours.top] == [each.token_id for each in theirs.top]


def test_structured_outputs_stream_beside_others(server: str) -> None:
    with Client(server) as client, ThreadPoolExecutor(8) as threads:
        plain = client.generate(STORY, temperature=0.0, max_tokens=60).text()

        def run(index: int) -> str:
            if index % 2:
                return client.generate(STORY, temperature=0.0, max_tokens=60).text()
            stream = client.generate(STORY, seed=index, json_schema=SCHEMA, max_tokens=200)
            text = stream.text()
            assert stream.finish_reason == "stop"
            return text

        texts = list(threads.map(run, range(8)))
    for index, text in enumerate(texts):
        if index % 2:
            assert text == plain
        else:
            assert set(json.loads(text)) == {"title", "animals"}


def test_every_kind_of_language(server: str, engine: LLMEngine) -> None:
    with Client(server) as client:
        for language, pattern in (
            ({"choice": ["red", "blue"]}, r"red|blue"),
            ({"regex": r"\d{4}-\d\d"}, r"\d{4}-\d\d"),
            ({"grammar": 'start: "a"~2..4'}, r"a{2,4}"),
            ({"json_object": True}, r"\{.*\}"),
        ):
            stream = client.generate(STORY, temperature=0.0, max_tokens=60, **language)
            assert re.fullmatch(pattern, stream.text(), re.DOTALL)
            assert stream.finish_reason == "stop"
            structured = StructuredOutput(**language)
            (expected,) = engine.generate(
                STORY, temperature=0.0, max_tokens=60, structured_output=structured
            )
            assert stream.token_ids == expected.token_ids


@pytest.mark.parametrize(
    "language",
    [
        {"regex": "(unclosed"},
        {"json_schema": '{"type": "no such type"}'},
        {"json_schema": "{"},
        {"grammar": "nothing: here"},
        {"json_schema": '{"items": ' * 300 + "{}" + "}" * 300},
        {"grammar": "\n".join(f"r{i}: r{i + 1}" for i in range(10_000))},
    ],
)
def test_a_language_that_cannot_be_used_is_refused(server: str, language: dict[str, str]) -> None:
    with Client(server) as client:
        with pytest.raises(RequestFailed) as failed:
            client.generate(STORY, **language).text()
        assert failed.value.reason is ErrorReason.GRAMMAR_INVALID
        assert failed.value.code.name == "INVALID_ARGUMENT"
        assert client.generate(STORY, max_tokens=4).text()


def test_conditions_that_leave_no_token_end_that_request_alone(server: str) -> None:
    with Client(server) as client:
        with pytest.raises(RequestFailed) as failed:
            client.generate(STORY, choice=["red"], allowed_token_ids=[3]).text()
        assert failed.value.reason is ErrorReason.NO_TOKEN_ALLOWED
        assert client.generate(STORY, max_tokens=4).text()


def test_an_output_that_repeats_itself_ends(server: str) -> None:
    with Client(server) as client:
        stream = client.generate(
            STORY,
            temperature=0.0,
            max_tokens=200,
            allowed_token_ids=[300, 301],
            repetition_detection={"max_period": 8, "num_repeats": 4},
        )
        assert len(stream.text()) > 0
        assert stream.finish_reason == "repetition"
        assert len(stream.token_ids) < 60
