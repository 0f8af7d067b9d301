"""Checks of sampling parameters, and how defaults fill them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.resolved_sampling import GenerationDefaults, RepetitionLimit, ResolvedSampling
from mini_infer.sampling_params import MAX_STOP_STRING_BYTES, RepetitionDetection, SamplingParams
from mini_infer.structured_output import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, StructuredOutput

VOCAB_SIZE = 4096


def violated_fields(**values: object) -> list[str]:
    params = SamplingParams(**values)  # type: ignore[arg-type]
    return [each.field for each in params.violations(VOCAB_SIZE)]


def as_float32(value: float) -> float:
    """The value as a protobuf float holds it."""
    return float(np.float32(value))


def repetition(max_period: int, num_repeats: int, min_period: int = 1) -> RepetitionDetection:
    return RepetitionDetection(
        max_period=max_period, min_period=min_period, num_repeats=num_repeats
    )


def resolve(params: SamplingParams, **replaced: object) -> ResolvedSampling:
    arguments: dict[str, object] = {"num_prompt_tokens": 10, "max_model_len": 100, "seed": 7}
    defaults = replaced.pop("defaults", GenerationDefaults())
    return params.resolve(defaults, **{**arguments, **replaced})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "max_tokens": 1},
        {"temperature": 100.0, "top_k": 2**31 - 1, "top_p": 1e-9, "seed": 2**64 - 1},
        {"n": 1},
        {"n": 16},
        {"min_tokens": 5},
        {"min_tokens": 5, "max_tokens": 5},
        {"stop": ["x"] * 16, "stop_token_ids": [0, VOCAB_SIZE - 1] * 32},
        {"stop": ["é" * (MAX_STOP_STRING_BYTES // 2)]},
        {"min_p": 0.0, "typical_p": math.ulp(0.0), "repetition_penalty": 0.01},
        {"min_p": 1.0, "typical_p": 1.0, "repetition_penalty": 100.0},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": dict.fromkeys(range(1024), 100.0)},
        {"logit_bias": {0: -100.0, VOCAB_SIZE - 1: 0.0}},
        {"allowed_token_ids": [0, VOCAB_SIZE - 1] * 32_768},
        {"bad_words": ["x"] * 255 + ["é" * (MAX_STOP_STRING_BYTES // 2)]},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"logprobs": 20, "prompt_logprobs": 0},
        {"repetition_detection": repetition(1, 2)},
        {"repetition_detection": repetition(1024, 1024, 1024)},
        {"structured_output": StructuredOutput(json_object=True)},
    ],
)
def test_good_values_have_no_violations(values: dict[str, object]) -> None:
    assert violated_fields(**values) == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -0.1}, "sampling.temperature"),
        ({"temperature": 100.1}, "sampling.temperature"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": math.inf}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_k": 2**31}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.01}, "sampling.top_p"),
        ({"top_p": math.nan}, "sampling.top_p"),
        ({"n": 0}, "sampling.n"),
        ({"n": 17}, "sampling.n"),
        ({"seed": -1}, "sampling.seed"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"min_tokens": -1}, "stopping.min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "stopping.min_tokens"),
        ({"stop": ["x"] * 17}, "stopping.stop"),
        ({"stop": ["ok", ""]}, "stopping.stop[1]"),
        ({"stop": ["é" * (MAX_STOP_STRING_BYTES // 2 + 1)]}, "stopping.stop[0]"),
        ({"stop_token_ids": [0] * 65}, "stopping.stop_token_ids"),
        ({"stop_token_ids": [1, VOCAB_SIZE]}, "stopping.stop_token_ids[1]"),
        ({"stop_token_ids": [-1]}, "stopping.stop_token_ids[0]"),
        ({"min_p": -1e-9}, "sampling.min_p"),
        ({"min_p": 1.0000001}, "sampling.min_p"),
        ({"min_p": math.nan}, "sampling.min_p"),
        ({"typical_p": 0.0}, "sampling.typical_p"),
        ({"typical_p": 1.0000001}, "sampling.typical_p"),
        ({"typical_p": math.nan}, "sampling.typical_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"repetition_penalty": 0.00999}, "sampling.repetition_penalty"),
        ({"repetition_penalty": 100.1}, "sampling.repetition_penalty"),
        ({"repetition_penalty": math.nan}, "sampling.repetition_penalty"),
        ({"repetition_penalty": math.inf}, "sampling.repetition_penalty"),
        ({"presence_penalty": -2.0000001}, "sampling.presence_penalty"),
        ({"presence_penalty": math.nan}, "sampling.presence_penalty"),
        ({"frequency_penalty": 2.0000001}, "sampling.frequency_penalty"),
        ({"frequency_penalty": -math.inf}, "sampling.frequency_penalty"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "sampling.logit_bias"),
        ({"logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ({"logit_bias": {VOCAB_SIZE: 0.0}}, "sampling.logit_bias"),
        ({"logit_bias": {7: 100.1}}, "sampling.logit_bias[7]"),
        ({"logit_bias": {7: math.nan}}, "sampling.logit_bias[7]"),
        ({"logit_bias": {7: -math.inf}}, "sampling.logit_bias[7]"),
        ({"allowed_token_ids": [1] * 65_537}, "sampling.allowed_token_ids"),
        ({"allowed_token_ids": [1, VOCAB_SIZE]}, "sampling.allowed_token_ids[1]"),
        ({"allowed_token_ids": [-1]}, "sampling.allowed_token_ids[0]"),
        ({"bad_words": ["x"] * 257}, "sampling.bad_words"),
        ({"bad_words": ["ok", ""]}, "sampling.bad_words[1]"),
        ({"bad_words": ["é" * (MAX_STOP_STRING_BYTES // 2 + 1)]}, "sampling.bad_words[0]"),
        ({"logprobs": -1}, "output.logprobs"),
        ({"logprobs": 21}, "output.logprobs"),
        ({"prompt_logprobs": -1}, "output.prompt_logprobs"),
        ({"prompt_logprobs": 21}, "output.prompt_logprobs"),
        (
            {"repetition_detection": repetition(0, 2)},
            "stopping.repetition_detection.max_period",
        ),
        (
            {"repetition_detection": repetition(1025, 2)},
            "stopping.repetition_detection.max_period",
        ),
        (
            {"repetition_detection": repetition(3, 2, min_period=0)},
            "stopping.repetition_detection.min_period",
        ),
        (
            {"repetition_detection": repetition(3, 2, min_period=4)},
            "stopping.repetition_detection.min_period",
        ),
        (
            {"repetition_detection": repetition(3, 1)},
            "stopping.repetition_detection.num_repeats",
        ),
        (
            {"repetition_detection": repetition(3, 1025)},
            "stopping.repetition_detection.num_repeats",
        ),
        ({"structured_output": StructuredOutput()}, "structured_output"),
        ({"structured_output": StructuredOutput(regex="a", choice=["a"])}, "structured_output"),
        ({"structured_output": StructuredOutput(regex="")}, "structured_output.regex"),
        ({"structured_output": StructuredOutput(choice=[])}, "structured_output.choice"),
        ({"structured_output": StructuredOutput(choice=["a", ""])}, "structured_output.choice"),
        (
            {"structured_output": StructuredOutput(choice=["a"] * 1025)},
            "structured_output.choice",
        ),
        (
            {"structured_output": StructuredOutput(json_schema={"a": {1}})},
            "structured_output.json_schema",
        ),
        (
            {"structured_output": StructuredOutput(json_schema={"a": math.nan})},
            "structured_output.json_schema",
        ),
        (
            {"structured_output": StructuredOutput(regex="é" * (MAX_GRAMMAR_BYTES // 2 + 1))},
            "structured_output.regex",
        ),
        (
            {"structured_output": StructuredOutput(grammar="\ud800")},
            "structured_output.grammar",
        ),
    ],
)
def test_bad_values_are_named(values: dict[str, object], field: str) -> None:
    assert violated_fields(**values) == [field]


@pytest.mark.parametrize(
    ("name", "bound", "beyond"),
    [
        ("temperature", 100, math.inf),
        ("top_p", 1, math.inf),
        ("min_p", 0, -math.inf),
        ("min_p", 1, math.inf),
        ("typical_p", 1, math.inf),
        ("repetition_penalty", 100, math.inf),
        ("presence_penalty", -2, -math.inf),
        ("presence_penalty", 2, math.inf),
        ("frequency_penalty", -2, -math.inf),
        ("frequency_penalty", 2, math.inf),
    ],
)
def test_next_float32_beyond_a_bound_is_named(name: str, bound: float, beyond: float) -> None:
    outside = float(np.nextafter(np.float32(bound), np.float32(beyond)))
    assert violated_fields(**{name: as_float32(bound)}) == []
    assert violated_fields(**{name: outside}) == [f"sampling.{name}"]


def test_bound_that_float32_rounds_down_is_allowed() -> None:
    rounded = as_float32(0.01)
    assert rounded < 0.01
    assert violated_fields(repetition_penalty=rounded) == []


def test_all_violations_are_told_at_once() -> None:
    fields = violated_fields(
        temperature=-1.0,
        top_p=2.0,
        min_p=-1.0,
        typical_p=0.0,
        repetition_penalty=0.0,
        presence_penalty=3.0,
        frequency_penalty=3.0,
        logit_bias={-1: 0.0, 7: 101.0},
        allowed_token_ids=[-1],
        bad_words=[""],
        n=0,
        seed=-1,
        max_tokens=0,
        min_tokens=-1,
        stop=[""],
        stop_token_ids=[-1],
        repetition_detection=repetition(0, 0),
        structured_output=StructuredOutput(),
        logprobs=-1,
        prompt_logprobs=21,
    )
    assert sorted(fields) == [
        "output.logprobs",
        "output.prompt_logprobs",
        "sampling.allowed_token_ids[0]",
        "sampling.bad_words[0]",
        "sampling.frequency_penalty",
        "sampling.logit_bias",
        "sampling.logit_bias[7]",
        "sampling.min_p",
        "sampling.n",
        "sampling.presence_penalty",
        "sampling.repetition_penalty",
        "sampling.seed",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.typical_p",
        "stopping.max_tokens",
        "stopping.min_tokens",
        "stopping.repetition_detection.max_period",
        "stopping.repetition_detection.num_repeats",
        "stopping.stop[0]",
        "stopping.stop_token_ids[0]",
        "structured_output",
    ]


def test_absent_values_take_the_models_defaults() -> None:
    defaults = GenerationDefaults(0.7, 40, 0.9, 20, 0.05, 0.8, 1.5)
    resolved = resolve(SamplingParams(), defaults=defaults)
    assert resolved == ResolvedSampling(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        seed=7,
        max_tokens=20,
        min_p=0.05,
        typical_p=0.8,
        repetition_penalty=1.5,
    )
    assert (resolved.num_logprobs, resolved.num_prompt_logprobs) == (NO_LOGPROBS, NO_LOGPROBS)


def test_zeros_are_values_not_absence() -> None:
    defaults = GenerationDefaults(0.7, 40, 0.9, 20, 0.05, 0.8, 1.5)
    params = SamplingParams(
        temperature=0.0, top_k=0, seed=0, min_p=0.0, logprobs=0, prompt_logprobs=0
    )
    resolved = resolve(params, defaults=defaults)
    assert (resolved.temperature, resolved.top_k, resolved.seed) == (0.0, 0, 0)
    assert (resolved.min_p, resolved.num_logprobs, resolved.num_prompt_logprobs) == (0.0, 0, 0)


def test_what_is_set_is_what_the_engine_gets() -> None:
    params = SamplingParams(
        min_p=0.25,
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={4: -1.5, 2: 100.0},
        allowed_token_ids=(1, 2),
        bad_words=["a fox"],
        repetition_detection=repetition(4, 3, min_period=2),
        structured_output=StructuredOutput(regex="a*"),
        logprobs=3,
        prompt_logprobs=20,
    )
    assert resolve(params, bad_words=[(7,), (8, 9)]) == ResolvedSampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=7,
        max_tokens=90,
        min_p=0.25,
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        bias_ids=[4, 2],
        bias_values=[-1.5, 100.0],
        allowed_token_ids=[1, 2],
        bad_words=[[7], [8, 9]],
        num_logprobs=3,
        num_prompt_logprobs=20,
        repetition=RepetitionLimit(min_period=2, max_period=4, num_repeats=3),
        grammar=Grammar(GrammarKind.REGEX, "a*"),
    )


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        (StructuredOutput(json_schema="{ }"), Grammar(GrammarKind.JSON_SCHEMA, "{ }")),
        (
            StructuredOutput(json_schema={"b": 1, "a": [True]}),
            Grammar(GrammarKind.JSON_SCHEMA, '{"b": 1, "a": [true]}'),
        ),
        (StructuredOutput(grammar="start: x"), Grammar(GrammarKind.GRAMMAR, "start: x")),
        (StructuredOutput(choice=["ü", '"']), Grammar(GrammarKind.CHOICE, '["ü", "\\""]')),
        (StructuredOutput(json_object=True), Grammar(GrammarKind.JSON_OBJECT, "")),
    ],
    ids=["schema text", "schema", "grammar", "choice", "object"],
)
def test_language_is_passed_on_as_text(structured: StructuredOutput, expected: Grammar) -> None:
    assert structured.as_grammar() == expected


def test_output_fills_the_context_where_no_length_is_set() -> None:
    assert resolve(SamplingParams()).max_tokens == 90
    assert resolve(SamplingParams(), defaults=GenerationDefaults(max_tokens=500)).max_tokens == 90


@pytest.mark.parametrize(
    ("params", "num_prompt_tokens"),
    [(SamplingParams(max_tokens=91), 10), (SamplingParams(), 100), (SamplingParams(), 101)],
)
def test_what_does_not_fit_the_context_is_refused(
    params: SamplingParams, num_prompt_tokens: int
) -> None:
    with pytest.raises(MiniInferError, match="the context holds 100 tokens") as caught:
        resolve(params, num_prompt_tokens=num_prompt_tokens)
    assert caught.value.reason is ErrorReason.CONTEXT_LENGTH_EXCEEDED
    assert caught.value.metadata["limit"] == "100"


def test_the_largest_output_that_fits_is_admitted() -> None:
    assert resolve(SamplingParams(max_tokens=90)).max_tokens == 90


def test_choices_differ_in_their_seeds_alone() -> None:
    first = resolve(SamplingParams(seed=2**64 - 1, temperature=0.5, logprobs=2))
    assert first.of_choice(0) == first
    assert first.of_choice(1) == msgspec.structs.replace(first, seed=0)
    assert first.of_choice(15) == msgspec.structs.replace(first, seed=14)


def test_log_probabilities_of_the_prompt_come_with_choice_0_alone() -> None:
    first = resolve(SamplingParams(prompt_logprobs=2))
    assert first.of_choice(0).num_prompt_logprobs == 2
    assert first.of_choice(1).num_prompt_logprobs == NO_LOGPROBS
