"""What descriptions of languages mean, and which are refused."""

from __future__ import annotations

import re

import pytest
from grammar_walks import (
    choice,
    lark,
    regex,
    schema,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary


def accepts(
    vocabulary: GrammarVocabulary, demo: TextTokenizer, grammar: Grammar, text: str
) -> bool:
    matcher = vocabulary.compile(grammar)
    token_ids = demo.encode(text, add_special_tokens=False)
    return matcher.advance(token_ids) == len(token_ids) and matcher.may_end


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_just_its_texts(
    vocabulary: GrammarVocabulary, demo: TextTokenizer, texts: list[str]
) -> None:
    # Texts in which special tokens are written out are other ids.
    texts = [each.replace("<|", "<") for each in texts]
    grammar = choice(*texts)
    for text in texts:
        assert accepts(vocabulary, demo, grammar, text)
        for other in (text + "x", text[:-1], text.swapcase()):
            assert accepts(vocabulary, demo, grammar, other) == (other in texts)


@pytest.mark.parametrize(
    "text",
    ['a"b', "a\\b", "a/b", "a|b", ".*", "$^", "a\nb", "%import", "\x00", "// a", "{a}", "🦊"],
)
def test_a_choice_means_its_characters(
    vocabulary: GrammarVocabulary, demo: TextTokenizer, text: str
) -> None:
    grammar = choice(text, "other")
    assert accepts(vocabulary, demo, grammar, text)
    assert not accepts(vocabulary, demo, grammar, "b")


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        ("[a-c]+", ["a", "abc"], ["", "d", "ad"]),
        ("^[a-c]+$", ["a", "abc"], ["", "d", "^a$"]),
        (r"\A\d{2}\z", ["12"], ["1", "123"]),
        ("^a|b$", ["a", "b"], ["ab"]),
        ("a/b\nc", ["a/b\nc"], ["a/bc"]),
        ("a.c", ["abc", "a狐c"], ["a\nc"]),
        (r"\w+@\w+\.(com|org)", ["fox@river.org"], ["fox@river"]),
        ("(?i)yes", ["YES", "yes", "yEs"], ["no"]),
        (r"\$\^\/", ["$^/"], ["\\$"]),
        ("\\\\", ["\\"], ["\\\\"]),
        ("x{2,3}?", ["xx", "xxx"], ["x", "xxxx"]),
        ("🦊+", ["🦊", "🦊🦊"], ["狐"]),
    ],
)
def test_a_regex_matches_from_end_to_end(
    vocabulary: GrammarVocabulary, demo: TextTokenizer,
    source: str, good: list[str], bad: list[str],
) -> None:  # fmt: skip
    for text in good:
        assert accepts(vocabulary, demo, regex(source), text), text
    for text in bad:
        assert not accepts(vocabulary, demo, regex(source), text), text


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        ({"type": "array", "items": {"type": "integer"}}, ["[1,2]", "[]"], ["[1, 2]", "[ ]"]),
        ({"type": "object"}, ['{"a":{"b":[]}}', "{}"], ['{"a": 1}', "[]", ' {"a":1}']),
        (True, ["1", '"a"', "null", "{}"], ["nul", "{", ""]),
        ({}, ["1", "[[]]"], ["["]),
        ({"type": "string"}, ['"狐"', '"\\n"', '"\\""'], ['"\n"', '"', "'a'"]),
        ({"const": {"b": 1, "a": [" x "]}}, ['{"b":1,"a":[" x "]}'], ['{"b":1,"a":["x"]}']),
        ({"x-guidance": {"whitespace_flexible": True}, "type": "array"}, ["[]"], ["[ ]"]),
        ({"x-guidance": {"item_separator": ";"}, "type": "array"}, ["[1,2]"], ["[1;2]"]),
    ],
)  # fmt: skip
def test_json_has_no_space_but_in_texts(
    vocabulary: GrammarVocabulary, demo: TextTokenizer,
    source: object, good: list[str], bad: list[str],
) -> None:  # fmt: skip
    for text in good:
        assert accepts(vocabulary, demo, schema(source), text), text
    for text in bad:
        assert not accepts(vocabulary, demo, schema(source), text), text


def test_any_object_is_an_object(vocabulary: GrammarVocabulary, demo: TextTokenizer) -> None:
    grammar = Grammar(GrammarKind.JSON_OBJECT, "")
    assert accepts(vocabulary, demo, grammar, '{"a":[1,{"b":null}],"c":"d"}')
    assert not accepts(vocabulary, demo, grammar, "[1]")
    assert not accepts(vocabulary, demo, grammar, '{"a":1')


def test_a_grammar_begins_with_start(vocabulary: GrammarVocabulary, demo: TextTokenizer) -> None:
    # What looks like special tokens and options within texts and comments is none.
    source = (
        '%llguidance {}\nstart: body " <" /[a-z]+/ ">" // <|user|> a[stop=""]\n'
        'body: "a[stop=" | "b" | "\\"" | /<[a\\/]/\n'
    )
    for text in ("b <x>", "a[stop= <fox>", '" <x>', "<a <x>", "</ <x>"):
        assert accepts(vocabulary, demo, lark(source), text), text
    assert not accepts(vocabulary, demo, lark(source), "b")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (regex("(?=a)"), "look-around"),
        (regex(r"(a)\1"), "backreferences"),
        (regex("a\\"), "within an escape"),
        (regex("("), "unclosed group"),
        (schema('{"type": "nope"}'), "nope"),
        (schema('{"uniqueItems": true, "type": "array"}'), "uniqueItems"),
        (schema({"type": "string", "x-guidance": {"lenient": True}, "format": "x"}), "format"),
        (schema("{"), "line 1"),
        (schema("[" * 5_000), "recursion limit"),
        (lark('start: <|user|> "a"'), "special tokens such as <|user|>"),
        (lark("start: a\na[temperature=0.5]: /x/"), "temperature"),
        (lark('start: a\na[capture, stop="x"]: /y/'), "stop"),
        (lark("start [temperature=0.7]: /x/"), "temperature"),
        (lark('start: x\nx [stop=";"]: /y/'), "stop"),
        (lark('start[capture="]", max_tokens=2]: /y+/'), "max_tokens"),
        (lark(f'start: x\nx[capture="{"a" * 120}", stop=";"]: /y/'), "stop"),
        (lark(f"start: <[{'0-5,' * 40}7]> /x/"), "special tokens"),
        (lark('%llguidance {"no_forcing": false}\nstart: "a"'), "%llguidance"),
        (lark("begin: /a/"), "start"),
        (lark('{"grammars": []}'), "1(1)"),
        (Grammar(GrammarKind.CHOICE, "7"), "array"),
        (Grammar(GrammarKind.CHOICE, "[7]"), "str"),
    ],
)  # fmt: skip
def test_what_is_not_valid_is_named(
    vocabulary: GrammarVocabulary, grammar: Grammar, words: str
) -> None:
    with pytest.raises(MiniInferError, match=re.escape(words)) as caught:
        vocabulary.compile(grammar)
    assert caught.value.reason is ErrorReason.GRAMMAR_INVALID
    assert caught.value.message.startswith("structured output: ")
    assert "\n" not in caught.value.message


def test_errors_do_not_repeat_long_descriptions(vocabulary: GrammarVocabulary) -> None:
    for grammar in (
        regex("a^" * 50_000),
        lark("start: " + "x" * 50_000),
        schema({"type": "x" * 50_000}),
    ):
        with pytest.raises(MiniInferError) as caught:
            vocabulary.compile(grammar)
        assert len(caught.value.message) < 400
