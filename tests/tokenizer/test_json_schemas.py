"""The corpus of JSON schemas: each compiles, and whatever is complete is a value of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from json_schemas import json_schemas
from jsonschema import Draft202012Validator
from mini_infer.config import bundled_model
from mini_infer.structured_output import StructuredOutput
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary
from mini_infer_tokenizer.grammar_checks import GrammarChecks

SCHEMAS = json_schemas(200)
EOS_ID = 0
KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "patternProperties", "items",
    "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "enum",
    "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf",
    "allOf", "$ref", "$defs", "maxProperties",
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(demo: TextTokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(demo, demo.vocab_size, [EOS_ID])


@pytest.fixture(scope="module")
def checks() -> Iterator[GrammarChecks]:
    checks = GrammarChecks(bundled_model("demo"), num_processes=1)
    yield checks
    checks.close()


def keywords_of(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(keywords_of, schema))
    if isinstance(schema, dict):
        return set(schema) | set().union(*map(keywords_of, schema.values()))
    return set()


def output_at_random(
    vocabulary: GrammarVocabulary, demo: TextTokenizer, schema: Any, seed: int
) -> str | None:
    """The text of a whole output, of tokens chosen evenly; None where it has no end."""
    matcher = vocabulary.compile(StructuredOutput(json_schema=schema).as_grammar())
    generator = random.Random(seed)
    row = np.zeros(vocabulary.num_mask_words, np.int32)
    token_ids: list[int] = []
    while not matcher.is_complete and len(token_ids) < 1000:
        matcher.fill(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        token_id = int(generator.choice(allowed))
        if token_id == EOS_ID:
            break
        assert matcher.advance([token_id]) == 1
        token_ids.append(token_id)
    return demo.decode(token_ids, skip_special_tokens=True) if matcher.may_end else None


def test_the_corpus_is_what_it_is_meant_to_be() -> None:
    assert json_schemas(200) == SCHEMAS
    assert len({json.dumps(schema) for schema in SCHEMAS}) == 200
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(schema)
    counts = {
        keyword: sum(keyword in keywords_of(schema) for schema in SCHEMAS) for keyword in KEYWORDS
    }
    assert min(counts.values()) >= 5, counts


def test_each_is_accepted(checks: GrammarChecks) -> None:
    for schema in SCHEMAS:
        checks.check(StructuredOutput(json_schema=schema).as_grammar())


def test_complete_outputs_are_values_of_their_schema(
    vocabulary: GrammarVocabulary, demo: TextTokenizer
) -> None:
    num_complete = 0
    for number, schema in enumerate(SCHEMAS):
        text = output_at_random(vocabulary, demo, schema, seed=number)
        if text is not None:
            Draft202012Validator(schema).validate(json.loads(text))
            num_complete += 1
    assert num_complete >= 150
