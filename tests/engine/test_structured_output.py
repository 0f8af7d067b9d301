"""Structured output through the engine, on the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from mini_infer import LLMEngine, StructuredOutput
from mini_infer.errors import ErrorReason, InvalidRequestError, MiniInferError

PROMPT = "Once upon a time"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "favourite_colour": {"enum": ["red", "green"]},
        "lucky_numbers": {"type": "array", "items": {"enum": [7, 13, 1999]}, "maxItems": 3},
    },
    "required": ["name", "favourite_colour", "lucky_numbers"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine() as made:
        yield made


def test_a_schema_is_kept_and_what_must_follow_is_not_computed_step_by_step(
    engine: LLMEngine,
) -> None:
    steps = engine.num_steps
    outputs = engine.generate(
        PROMPT,
        n=8,
        seed=1,
        max_tokens=200,
        temperature=1.0,
        structured_output=StructuredOutput(json_schema=PERSON),
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        person = json.loads(output.text)
        assert set(person) == set(PERSON["properties"])
        assert person["favourite_colour"] in ("red", "green")
        assert all(isinstance(each, int) for each in person["lucky_numbers"])
    # The names of the fields are most of the text.
    assert engine.num_steps - steps < 0.6 * max(len(output.token_ids) for output in outputs)


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        (StructuredOutput(choice=["red", "blue", "bluish"]), r"red|blue|bluish"),
        (StructuredOutput(choice=['a "quoted" text\n', "é\\d+"]), r'a "quoted" text\n|é\\d\+'),
        (StructuredOutput(regex=r"[a-c]{2,4}-\d{3}"), r"[a-c]{2,4}-\d{3}"),
        (StructuredOutput(grammar='start: "<" WORD ">"\nWORD: /[a-z]{1,6}/'), r"<[a-z]{1,6}>"),
        (StructuredOutput(json_schema='{"type": "boolean"}'), r"true|false"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_kind_of_language(
    engine: LLMEngine, structured: StructuredOutput, pattern: str, temperature: float
) -> None:
    outputs = engine.generate(
        [PROMPT, "The fox"],
        max_tokens=60,
        temperature=temperature,
        structured_output=structured,
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        assert re.fullmatch(pattern, output.text)


def test_a_language_of_one_text_needs_no_step(engine: LLMEngine) -> None:
    steps = engine.num_steps
    (output,) = engine.generate(
        PROMPT, max_tokens=60, structured_output=StructuredOutput(choice=["nothing to choose"])
    )
    assert output.text == "nothing to choose"
    assert output.finish_reason == "stop"
    assert engine.num_steps == steps
    assert engine._engine.pool.num_used == 0


def test_a_bad_language_is_refused_and_breaks_nothing(engine: LLMEngine) -> None:
    for structured in (
        StructuredOutput(regex="(unclosed"),
        StructuredOutput(grammar="\n".join(f"r{i}: r{i + 1}" for i in range(10_000))),
    ):
        with pytest.raises(MiniInferError) as failed:
            engine.generate(PROMPT, max_tokens=9, structured_output=structured)
        assert failed.value.reason is ErrorReason.GRAMMAR_INVALID
    (output,) = engine.generate(PROMPT, max_tokens=9, temperature=0)
    assert output.finish_reason == "length"


def test_an_output_that_is_too_long_is_cut(engine: LLMEngine) -> None:
    (output,) = engine.generate(
        PROMPT,
        max_tokens=10,
        temperature=0,
        structured_output=StructuredOutput(json_schema=PERSON),
    )
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 10


def test_choices_follow_their_languages_by_themselves(engine: LLMEngine) -> None:
    outputs = engine.generate(
        PROMPT,
        n=6,
        seed=5,
        temperature=3.0,
        max_tokens=60,
        structured_output=StructuredOutput(regex=r"[a-z]{12}!"),
    )
    texts = [output.text for output in outputs]
    assert all(re.fullmatch(r"[a-z]{12}!", text) for text in texts)
    assert len(set(texts)) == 6


def test_tokens_that_must_follow_are_the_same_one_by_one(engine: LLMEngine) -> None:
    """Asking for log-probabilities has each token chosen; the ids do not change."""
    options = {
        "max_tokens": 200,
        "seed": 3,
        "temperature": 1.0,
        "structured_output": StructuredOutput(json_schema=PERSON),
    }
    (at_once,) = engine.generate(PROMPT, **options)
    (one_by_one,) = engine.generate(PROMPT, logprobs=1, **options)
    assert one_by_one.token_ids == at_once.token_ids
    assert len(one_by_one.logprobs) == len(at_once.token_ids)


def test_an_output_may_end_wherever_its_language_may(engine: LLMEngine) -> None:
    structured = StructuredOutput(regex=r"(ab)+")
    (early,) = engine.generate(
        PROMPT,
        max_tokens=80,
        temperature=0,
        logit_bias={token_id: 100.0 for token_id in engine._engine.served.config.eos_token_ids},
        structured_output=structured,
    )
    assert early.text == "ab"
    assert early.stop_token_id in engine._engine.served.config.eos_token_ids
    (late,) = engine.generate(
        PROMPT, max_tokens=20, min_tokens=20, temperature=0, structured_output=structured
    )
    assert late.finish_reason == "length"
    (endless,) = engine.generate(
        PROMPT, max_tokens=20, ignore_eos=True, temperature=0, structured_output=structured
    )
    assert endless.finish_reason == "length"
    assert re.fullmatch(r"(ab)+a?", endless.text)


def test_conditions_that_contradict_the_language_are_told(engine: LLMEngine) -> None:
    (output,) = engine.generate(
        PROMPT,
        max_tokens=20,
        allowed_token_ids=[3],
        structured_output=StructuredOutput(choice=["red", "blue"]),
    )
    assert output.error is not None
    assert output.error.reason is ErrorReason.NO_TOKEN_ALLOWED


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(),
        StructuredOutput(regex="a", choice=["b"]),
        StructuredOutput(choice=[]),
        StructuredOutput(choice="red"),
        StructuredOutput(choice=["a", ""]),
        StructuredOutput(regex=""),
        StructuredOutput(grammar="x" * 300_000),
        StructuredOutput(json_schema={"enum": [float("nan")]}),
        StructuredOutput(regex="\ud800"),
    ],
)
def test_what_is_no_language_is_refused_at_once(
    engine: LLMEngine, structured: StructuredOutput
) -> None:
    with pytest.raises(InvalidRequestError, match="structured_output"):
        engine.generate(PROMPT, structured_output=structured)
