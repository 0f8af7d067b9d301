"""Checks of sampling parameters, and how defaults fill them."""

from __future__ import annotations

import math

import msgspec
import pytest
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.sampling_params import (
    MAX_STOP_STRING_BYTES,
    GenerationDefaults,
    ResolvedSampling,
    SamplingParams,
)

VOCAB_SIZE = 4096


def violated_fields(**values: object) -> list[str]:
    params = SamplingParams(**values)  # type: ignore[arg-type]
    return [each.field for each in params.violations(VOCAB_SIZE)]


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
    ],
)
def test_bad_values_are_named(values: dict[str, object], field: str) -> None:
    assert violated_fields(**values) == [field]


def test_all_violations_are_told_at_once() -> None:
    fields = violated_fields(temperature=-1.0, top_p=2.0, max_tokens=0, stop=[""])
    assert fields == [
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stopping.stop[0]",
    ]


def test_absent_values_take_the_models_defaults() -> None:
    defaults = GenerationDefaults(temperature=0.7, top_k=40, top_p=0.9, max_tokens=20)
    resolved = resolve(SamplingParams(), defaults=defaults)
    assert (resolved.temperature, resolved.top_k, resolved.top_p) == (0.7, 40, 0.9)
    assert (resolved.max_tokens, resolved.seed) == (20, 7)


def test_zeros_are_values_not_absence() -> None:
    defaults = GenerationDefaults(temperature=0.7, top_k=40, top_p=0.9)
    resolved = resolve(SamplingParams(temperature=0.0, top_k=0, seed=0), defaults=defaults)
    assert (resolved.temperature, resolved.top_k, resolved.seed) == (0.0, 0, 0)


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
    first = resolve(SamplingParams(seed=2**64 - 1, temperature=0.5, stop_token_ids=[7]))
    assert first.of_choice(0) == first
    assert first.of_choice(1) == msgspec.structs.replace(first, seed=0)
    assert first.of_choice(15) == msgspec.structs.replace(first, seed=14)
