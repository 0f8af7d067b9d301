"""What the gateway makes of sampling fields: bad values are named, all of them at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gateway.request_samples import INVALID, violations_of
from gateway.stand_ins import ENGINE_WELCOME
from mini_infer.sampling_params import RepetitionDetection, SamplingParams
from mini_infer.structured_output import MAX_GRAMMAR_BYTES, StructuredOutput
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer_gateway.validation import check_generate

SAMPLING = pb2.SamplingOptions
OUTPUT = pb2.OutputOptions
STRUCTURED = pb2.StructuredOutput
ABOVE_1 = 1.0000001192092896
"""The least float32 above it."""


def repetition(**fields: int) -> pb2.StoppingOptions:
    return pb2.StoppingOptions(repetition_detection=pb2.RepetitionDetection(**fields))


def choice(*texts: str) -> pb2.StructuredOutput:
    return STRUCTURED(choice=pb2.Choices(texts=texts))


def params_of(**fields: Any) -> SamplingParams:
    return check_generate(pb2.GenerateRequest(text="x", **fields), ENGINE_WELCOME, 10).params


BAD_NUMBERS = {
    "temperature": [-1e-7, 100.00001, math.nan, math.inf, -math.inf],
    "top_p": [0, -0.5, ABOVE_1, math.nan, math.inf],
    "min_p": [-1e-7, ABOVE_1, math.nan, math.inf],
    "typical_p": [0, -0.5, ABOVE_1, math.nan, math.inf],
    "repetition_penalty": [0, 0.00999, 100.00001, math.nan, math.inf],
    "presence_penalty": [-2.0000002, 2.0000002, math.nan, math.inf],
    "frequency_penalty": [-2.0000002, 2.0000002, math.nan, -math.inf],
}
GOOD_NUMBERS = {
    "temperature": [0, -0.0, 1e-30, 100],
    "top_p": [1e-30, 1],
    "min_p": [0, 1],
    "typical_p": [1e-30, 1],
    "repetition_penalty": [0.01, 1, 100],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, each) for name, values in BAD_NUMBERS.items() for each in values]
)
def test_number_out_of_range_is_named(name: str, value: float) -> None:
    assert violations_of(text="x", sampling=SAMPLING(**{name: value})) == [
        (f"sampling.{name}", INVALID)
    ]


@pytest.mark.parametrize(
    ("name", "value"), [(name, each) for name, values in GOOD_NUMBERS.items() for each in values]
)
def test_bounds_of_a_number_are_allowed_as_float32(name: str, value: float) -> None:
    params = params_of(sampling=SAMPLING(**{name: value}))
    assert getattr(params, name) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": SAMPLING(logit_bias={4096: 1})}, "sampling.logit_bias"),
        ({"sampling": SAMPLING(logit_bias={5: 100.00001})}, "sampling.logit_bias[5]"),
        ({"sampling": SAMPLING(logit_bias={5: math.nan})}, "sampling.logit_bias[5]"),
        ({"sampling": SAMPLING(logit_bias={5: -math.inf})}, "sampling.logit_bias[5]"),
        ({"sampling": SAMPLING(allowed_token_ids=[5, 4096])}, "sampling.allowed_token_ids[1]"),
        ({"sampling": SAMPLING(bad_words=["x", ""])}, "sampling.bad_words[1]"),
        ({"sampling": SAMPLING(bad_words=["é" * 513])}, "sampling.bad_words[0]"),
        ({"output": OUTPUT(logprobs=21)}, "output.logprobs"),
        ({"output": OUTPUT(prompt_logprobs=21)}, "output.prompt_logprobs"),
        (
            {"stopping": repetition(max_period=0, num_repeats=2)},
            "stopping.repetition_detection.max_period",
        ),
        (
            {"stopping": repetition(max_period=1025, num_repeats=2)},
            "stopping.repetition_detection.max_period",
        ),
        (
            {"stopping": repetition(max_period=3, min_period=0, num_repeats=2)},
            "stopping.repetition_detection.min_period",
        ),
        (
            {"stopping": repetition(max_period=3, min_period=4, num_repeats=2)},
            "stopping.repetition_detection.min_period",
        ),
        (
            {"stopping": repetition(max_period=3, num_repeats=1)},
            "stopping.repetition_detection.num_repeats",
        ),
        (
            {"stopping": repetition(max_period=3, num_repeats=1025)},
            "stopping.repetition_detection.num_repeats",
        ),
        ({"structured_output": STRUCTURED()}, "structured_output"),
        ({"structured_output": STRUCTURED(json_object=False)}, "structured_output.json_object"),
        ({"structured_output": STRUCTURED(json_schema="")}, "structured_output.json_schema"),
        ({"structured_output": STRUCTURED(regex="")}, "structured_output.regex"),
        ({"structured_output": STRUCTURED(grammar="")}, "structured_output.grammar"),
        ({"structured_output": choice()}, "structured_output.choice"),
        ({"structured_output": choice("a", "")}, "structured_output.choice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_value_is_named(fields: dict[str, Any], path: str) -> None:
    assert violations_of(text="x", **fields) == [(path, INVALID)]


def test_empty_detection_lacks_both_numbers() -> None:
    path = "stopping.repetition_detection"
    assert violations_of(text="x", stopping=repetition()) == [
        (f"{path}.max_period", INVALID),
        (f"{path}.num_repeats", INVALID),
    ]


def test_all_violations_come_at_once() -> None:
    found = violations_of(
        text="x",
        sampling=SAMPLING(
            min_p=2,
            typical_p=0,
            repetition_penalty=0,
            presence_penalty=3,
            frequency_penalty=-3,
            logit_bias={5: 101, 5000: 1},
            allowed_token_ids=[5000],
            bad_words=[""],
        ),
        stopping=repetition(max_period=0, num_repeats=0),
        output=OUTPUT(logprobs=21, prompt_logprobs=21),
        structured_output=STRUCTURED(regex=""),
    )
    assert {field for field, _ in found} == {
        "sampling.min_p",
        "sampling.typical_p",
        "sampling.repetition_penalty",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.logit_bias[5]",
        "sampling.logit_bias",
        "sampling.allowed_token_ids[0]",
        "sampling.bad_words[0]",
        "stopping.repetition_detection.max_period",
        "stopping.repetition_detection.num_repeats",
        "output.logprobs",
        "output.prompt_logprobs",
        "structured_output.regex",
    }


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        (
            {"sampling": SAMPLING(logit_bias=dict.fromkeys(range(1025), 1.0))},
            "sampling.logit_bias",
        ),
        ({"sampling": SAMPLING(allowed_token_ids=[5] * 65_537)}, "sampling.allowed_token_ids"),
        ({"sampling": SAMPLING(bad_words=["x"] * 257)}, "sampling.bad_words"),
        ({"structured_output": choice(*["x"] * 1025)}, "structured_output.choice"),
        (
            {"structured_output": STRUCTURED(regex="x" * (MAX_GRAMMAR_BYTES + 1))},
            "structured_output",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_long_lists_are_refused_alone(fields: dict[str, Any], path: str) -> None:
    """Whatever else is wrong: nothing of the request is read."""
    assert violations_of(**fields, request_id="?") == [(path, INVALID)]


@pytest.mark.parametrize(
    "structured",
    [
        STRUCTURED(regex="x" * MAX_GRAMMAR_BYTES),
        # JSON adds four bytes to each: quotes, a comma, a space; or the brackets.
        choice(*["x" * 252] * 1024),
    ],
    ids=["regex", "choice"],
)
def test_longest_language_is_allowed(structured: pb2.StructuredOutput) -> None:
    params = params_of(structured_output=structured)
    assert params.structured_output is not None
    assert len(params.structured_output.as_grammar().source) == MAX_GRAMMAR_BYTES


def test_choice_may_be_too_long_as_json_alone() -> None:
    structured = choice(*["x" * 252] * 1023, "x" * 253)
    assert violations_of(text="x", structured_output=structured) == [
        ("structured_output.choice", INVALID)
    ]


def test_everything_that_is_set_is_read() -> None:
    params = params_of(
        sampling=SAMPLING(
            min_p=0.25,
            typical_p=0.5,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.75,
            logit_bias={0: -100, 4095: 100},
            allowed_token_ids=[0, 4095],
            bad_words=["a", " b"],
        ),
        stopping=repetition(max_period=4, min_period=2, num_repeats=3),
        output=OUTPUT(logprobs=0, prompt_logprobs=20),
    )
    assert params == SamplingParams(
        min_p=0.25,
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={0: -100, 4095: 100},
        allowed_token_ids=(0, 4095),
        bad_words=("a", " b"),
        repetition_detection=RepetitionDetection(max_period=4, min_period=2, num_repeats=3),
        logprobs=0,
        prompt_logprobs=20,
    )
    assert params_of() == SamplingParams()


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        (STRUCTURED(json_schema="{}"), StructuredOutput(json_schema="{}")),
        (STRUCTURED(regex="a*"), StructuredOutput(regex="a*")),
        (STRUCTURED(grammar='start: "a"'), StructuredOutput(grammar='start: "a"')),
        (choice("a", "b"), StructuredOutput(choice=("a", "b"))),
        (STRUCTURED(json_object=True), StructuredOutput(json_object=True)),
    ],
    ids=["schema", "regex", "grammar", "choice", "object"],
)
def test_language_is_read(structured: pb2.StructuredOutput, expected: StructuredOutput) -> None:
    assert params_of(structured_output=structured).structured_output == expected
