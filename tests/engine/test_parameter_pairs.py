"""Each pair of parameters at each pair of their boundary values, beside requests that are plain."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest
from engine.covering import all_pairs, covering_array, pairs_of
from greedy_reference import GreedyComparison, GreedyReference
from mini_infer import EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason
from mini_infer.logprobs import TokenLogprobs
from mini_infer.resolved_sampling import MAX_SEED
from mini_infer.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_REPEATS,
    MAX_REPETITION_PERIOD,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    RepetitionDetection,
    SamplingParams,
)
from mini_infer.structured_output import StructuredOutput
from mini_infer_engine.generation import GenerationOutput
from mini_infer_tokenizer.bad_words import bad_word_sequences

VOCAB = 4096
EOS = {0, 5}
MAX_MODEL_LEN = 64
LEAST = math.ulp(0.0)
WORDS = ["the", "fox", " and", "river", "was", "there was", " lived in", "Once upon", ",", "upon a"]
CHOICES = ["the fox ran home", "the fox ran away", "nobody knows"]
REGEX = r"(fox|raven) [0-9]{2,4}(, (fox|raven) [0-9]{2,4}){0,2}!"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "raven"]}, "is_large": {"type": "boolean"}},
    "required": ["kind", "is_large"],
    "additionalProperties": False,
}
LARK = 'start: ("ab" | "cd")+ "."'

VALUES: dict[str, dict[str, Any]] = {
    "temperature": {"default": None, "least": 0.0, "tiny": 1e-6, "typical": 0.8, "greatest": 100.0},
    "top_k": {"off": 0, "least": 1, "typical": 50, "greatest": MAX_TOP_K},
    "top_p": {"least": LEAST, "typical": 0.9, "off": 1.0},
    "min_p": {"off": 0.0, "typical": 0.05, "greatest": 1.0},
    "typical_p": {"least": LEAST, "typical": 0.9, "off": 1.0},
    "repetition_penalty": {"least": 0.01, "off": 1.0, "typical": 1.3, "greatest": 100.0},
    "presence_penalty": {"least": -2.0, "off": 0.0, "greatest": 2.0},
    "frequency_penalty": {"least": -2.0, "off": 0.0, "greatest": 2.0},
    "logit_bias": {
        "off": {},
        "typical": {300: 3.5, 5: -1.0},
        "greatest": {each: 100.0 - 200.0 * (each % 2) for each in range(100, 100 + 1024)},
    },
    "allowed_token_ids": {"off": (), "one": (300,), "typical": tuple(range(6, VOCAB, 2))},
    "bad_words": {
        "off": (),
        "typical": tuple(WORDS),
        "most": tuple(
            f"{one} {other}" for one in "abcdefghijklmnop" for other in "abcdefghijklmnop"
        ),
    },
    "n": {"one": 1, "two": 2, "most": 16},
    "seed": {"drawn": None, "least": 0, "greatest": MAX_SEED},
    "max_tokens": {"least": 1, "typical": 12, "context": None},
    "min_tokens": {"off": 0, "typical": 3, "max_tokens": MAX_MODEL_LEN},
    "stop": {
        "off": (),
        "typical": ("the", "."),
        "most": tuple(f"{each} " for each in "abcdefghijklmnop"),
    },
    "stop_token_ids": {"off": (), "typical": (17, 300), "most": tuple(range(200, 264))},
    "ignore_eos": {"no": False, "yes": True},
    "repetition_detection": {
        "off": None,
        "least": RepetitionDetection(max_period=1, num_repeats=2),
        "typical": RepetitionDetection(min_period=2, max_period=8, num_repeats=3),
        "greatest": RepetitionDetection(max_period=MAX_REPETITION_PERIOD, num_repeats=MAX_REPEATS),
    },
    "structured_output": {
        "off": None,
        "json_schema": StructuredOutput(json_schema=SCHEMA),
        "json_object": StructuredOutput(json_object=True),
        "regex": StructuredOutput(regex=REGEX),
        "grammar": StructuredOutput(grammar=LARK),
        "choice": StructuredOutput(choice=CHOICES),
    },
    "logprobs": {"off": None, "least": 0, "greatest": 20},
    "prompt_logprobs": {"off": None, "least": 0, "greatest": 20},
    "skip_special_tokens": {"no": False, "yes": True},
    "include_stop_str_in_output": {"no": False, "yes": True},
}
NAMES = {name: list(values) for name, values in VALUES.items()}
WITHOUT = {
    "nothing": {},
    "languages": {"structured_output": ["off"]},
    "conditions on ids": {
        "allowed_token_ids": ["off"],
        "bad_words": ["off"],
        "stop_token_ids": ["off"],
        "max_tokens": ["typical", "context"],
    },
}
"""Many requests have conditions that exclude each other, and end at once. So there are more of
them, in which each pair of the remaining values occurs."""
ROWS = {name: covering_array(NAMES | fixed, random.Random(1)) for name, fixed in WITHOUT.items()}


def params_of(row: Mapping[str, str]) -> SamplingParams:
    """The request of a row; `min_tokens` is cut to what `max_tokens` allows."""
    options = {name: VALUES[name][value] for name, value in row.items()}
    most = options["max_tokens"] or MAX_MODEL_LEN
    return SamplingParams(**options | {"min_tokens": min(options["min_tokens"], most)})


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    """Of less room than its requests want: some of them are preempted."""
    config = EngineConfig(
        max_num_seqs=24,
        kv_cache_tokens=16 * 48,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
    )
    with LLMEngine(config) as made:
        yield made


def test_every_parameter_and_every_pair_of_its_values_occurs() -> None:
    assert VALUES.keys() == set(SamplingParams.__dataclass_fields__)
    assert len(VALUES["logit_bias"]["greatest"]) == MAX_LOGIT_BIASES
    assert len(VALUES["bad_words"]["most"]) == MAX_BAD_WORDS
    assert len(VALUES["stop"]["most"]) == MAX_STOP_STRINGS
    assert len(VALUES["stop_token_ids"]["most"]) == MAX_STOP_TOKEN_IDS
    for name, rows in ROWS.items():
        covered = set().union(*map(pairs_of, rows))
        assert covered == all_pairs(NAMES | WITHOUT[name])
        assert len(rows) < 60
        for row in rows:
            assert not params_of(row).violations(VOCAB)


PROMPTS = ["Once upon a time", "The fox", "There was an old man who lived near the river."]
PLAIN = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
ROWS_AT_ONCE = 8


@pytest.fixture(scope="module")
def reference() -> GreedyReference:
    return GreedyReference(bundled_model("demo"))


@pytest.mark.parametrize("without", WITHOUT)
def test_no_pair_crashes_or_disturbs_others(
    engine: LLMEngine, reference: GreedyReference, without: str
) -> None:
    comparison = GreedyComparison(reference)
    alone = [engine.generate(prompt, PLAIN)[0] for prompt in PROMPTS]
    reasons: Counter[str | None] = Counter()
    for batch in range(0, len(ROWS[without]), ROWS_AT_ONCE):
        params = [params_of(row) for row in ROWS[without][batch : batch + ROWS_AT_ONCE]]
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(params))]
        outputs = engine.generate([*PROMPTS, *prompts], [PLAIN] * len(PROMPTS) + params)
        for plain, output in zip(alone, outputs, strict=False):
            comparison.add(plain.prompt_token_ids, plain.token_ids, output.token_ids)
        of_rows = iter(outputs[len(PROMPTS) :])
        for each in params:
            for choice in range(each.n):
                output = next(of_rows)
                assert output.choice_index == choice
                check_output(engine, each, output)
                reasons[output.finish_reason] += 1
        assert next(of_rows, None) is None
    comparison.check()
    assert reasons.keys() >= {"stop", "length", "repetition"}
    assert reasons["error"] == 0 or without != "conditions on ids"
    scheduler = engine._engine.scheduler
    scheduler.check_integrity()
    assert scheduler.num_preemptions > 0
    assert engine._engine.pool.num_used == 0


def check_output(engine: LLMEngine, params: SamplingParams, output: GenerationOutput) -> None:
    """Asserts what follows from the parameters, as far as it is cheap to see."""
    room = MAX_MODEL_LEN - len(output.prompt_token_ids)
    most = params.max_tokens or room
    params = replace(params, min_tokens=min(params.min_tokens, most))
    num_tokens = len(output.token_ids)
    if params.seed is not None:
        assert output.seed == (params.seed + output.choice_index) % (MAX_SEED + 1)
    assert num_tokens <= most
    if output.finish_reason == "length":
        assert num_tokens == most
    if output.finish_reason == "error":
        check_error(params, output)
    else:
        assert num_tokens > 0
    if output.finish_reason == "repetition":
        assert params.repetition_detection
        assert num_tokens >= params.min_tokens
    check_ids(engine, params, output)
    check_text(engine, params, output)
    check_scores(params, output)


def check_error(params: SamplingParams, output: GenerationOutput) -> None:
    """Only conditions that exclude each other may leave nothing to choose from."""
    assert output.error is not None
    assert output.error.reason is ErrorReason.NO_TOKEN_ALLOWED
    has_language = params.structured_output is not None
    conditions = [
        bool(params.allowed_token_ids),
        bool(params.bad_words),
        bool(params.stop_token_ids) and params.min_tokens > 0,
        has_language,
    ]
    assert sum(conditions) > 1, "one condition alone leaves a token"


def check_ids(engine: LLMEngine, params: SamplingParams, output: GenerationOutput) -> None:
    """Ids that are not allowed do not occur."""
    token_ids = output.token_ids
    if params.allowed_token_ids:
        assert set(token_ids) <= set(params.allowed_token_ids)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else EOS)
    assert ends.isdisjoint(token_ids[: params.min_tokens])
    assert ends.isdisjoint(token_ids[:-1])
    if output.stop_token_id is not None:
        assert output.stop_token_id == token_ids[-1]
        assert output.stop_token_id in ends
    text = [*output.prompt_token_ids, *token_ids]
    for word in bad_word_sequences(engine._tokenizer, params.bad_words):
        for end in range(len(output.prompt_token_ids) + 1, len(text) + 1):
            assert text[max(0, end - len(word)) : end] != word


def check_text(engine: LLMEngine, params: SamplingParams, output: GenerationOutput) -> None:
    """The text stops where it should, and belongs to its language where it is complete."""
    if output.stop_string is not None:
        assert output.finish_reason == "stop"
        assert len(output.token_ids) >= params.min_tokens
        is_kept = output.text.endswith(output.stop_string)
        assert is_kept or not params.include_stop_str_in_output
    elif output.finish_reason == "stop":
        token_ids = output.token_ids
        if output.stop_token_id is None:
            assert params.structured_output is not None
        elif output.stop_token_id in EOS:
            token_ids = token_ids[:-1]
        else:
            return  # ended by an id of the request, in the middle
        if params.structured_output is not None:
            check_language(params.structured_output, engine._tokenizer.decode(token_ids, False))


def check_language(language: StructuredOutput, text: str) -> None:
    if language.choice is not None:
        assert text in language.choice
    elif language.regex is not None:
        assert re.fullmatch(language.regex, text)
    elif language.grammar is not None:
        assert re.fullmatch(r"(ab|cd)+\.", text)
    else:
        value = json.loads(text)
        assert isinstance(value, dict)
        if language.json_schema is not None:
            assert list(value) == SCHEMA["required"]
            assert value["kind"] in ("fox", "raven")
            assert isinstance(value["is_large"], bool)


def check_scores(params: SamplingParams, output: GenerationOutput) -> None:
    """Log-probabilities come where they are asked for, one for each token."""
    check_columns(params.logprobs, output.token_ids, output.logprobs)
    wanted = params.prompt_logprobs if output.choice_index == 0 else None
    # A request that ends before its first step has no model behind it.
    if output.prompt_logprobs or output.token_ids:
        check_columns(wanted, output.prompt_token_ids[1:], output.prompt_logprobs)


def check_columns(num_top: int | None, token_ids: Seq[int], told: Seq[TokenLogprobs]) -> None:
    assert len(told) == (0 if num_top is None else len(token_ids))
    for token_id, each in zip(token_ids, told, strict=False):
        assert each.logprob <= 1e-6
        assert 1 <= each.rank <= VOCAB
        assert len(each.top) == num_top
        scores = [top.logprob for top in each.top]
        assert scores == sorted(scores, reverse=True)
        if each.top and each.rank == 1:
            assert each.logprob == scores[0]
        if each.rank > len(each.top):
            assert token_id not in [top.token_id for top in each.top]
