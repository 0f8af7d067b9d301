"""Languages of every kind, and random walks through them, for the tests of structured output."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
from mini_infer.config import bundled_model
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary, Matcher

DEMO = bundled_model("demo")
UNSUPPORTED = ("ctc", "end_of_word")
SPELL_ALL = (
    "demo",
    "byte_level",
    "llama_3",
    "qwen_2",
    "byte_fallback",
    "phi_3",
    "mistral",
    "gemma",
    "unigram_fallback",
)
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "role": {"enum": ["administrator", "administrator of all", "guest"]},
            "address": {"$ref": "#/$defs/address"},
        },
        "required": ["first_name", "age", "role", "address"],
        "additionalProperties": False,
        "$defs": {
            "address": {
                "type": "object",
                "properties": {"house_number": {"type": "integer"}, "country": {"const": "狐の国"}},
                "required": ["house_number", "country"],
                "additionalProperties": False,
            }
        },
    },
    ensure_ascii=False,
)


WORDS = "(the fox|the river|then|狐狸)( lived by the (river|rain)){0,3}[.]"
BEGINNINGS = ("administrator", "administration", "admin", "adm")
SPACED = (" fox", "  fox", "fox ")
PAIR = "[a-c]{1,3}=(yes|no|not at all)"


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, json.dumps(texts, ensure_ascii=False))


def schema(source: object) -> Grammar:
    return Grammar(
        GrammarKind.JSON_SCHEMA, source if isinstance(source, str) else json.dumps(source)
    )


def lark(source: str) -> Grammar:
    return Grammar(GrammarKind.GRAMMAR, source)


LANGUAGES = {
    "keys and values": schema(PERSON),
    "any object": Grammar(GrammarKind.JSON_OBJECT, ""),
    "a long constant": schema({"const": "狐 the fox lived by the river, déjà vu, " * 9}),
    "words": regex(WORDS),
    "one long text": choice("Once upon a time there was a fox who lived by the river. 狐"),
    "common beginnings": choice(*BEGINNINGS),
    "characters that begin alike": choice(*"éèê狐狸"),
    "rules": lark('start: pair ("," pair)*\npair: /[a-c]{1,3}/ "=" ("yes" | "no" | "not at all")'),
}


def allowed(matcher: Matcher, vocabulary: GrammarVocabulary) -> list[int]:
    row = np.full(vocabulary.num_mask_words, 0x55555555, np.int32)
    matcher.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return [int(each) for each in np.flatnonzero(bits)]


def walk(
    matcher: Matcher,
    vocabulary: GrammarVocabulary,
    generator: random.Random,
    num_steps: int = 400,
) -> list[int] | None:
    """Ids of a whole output, chosen at random; None where it did not come to its end."""
    token_ids: list[int] = []
    for _ in range(num_steps):
        if matcher.is_complete or (matcher.may_end and generator.random() < 0.3):
            return token_ids
        options = allowed(matcher, vocabulary)
        if not options:
            return None
        token_id = generator.choice(options)
        assert matcher.advance([token_id]) == 1
        token_ids.append(token_id)
    return None


@cache
def vocabulary_of(folder: Path) -> GrammarVocabulary:
    """Without an end of sequence, and of as many ids as the tokenizer has."""
    tokenizer = TextTokenizer(folder)
    return GrammarVocabulary(tokenizer, tokenizer.vocab_size, ())
