"""Languages as users describe them, in the notation of the llguidance library.

What the library would accept and then not obey, or obey in a way that the output's text does not
show, is refused here.
"""

from __future__ import annotations

import json
import re

import llguidance
import msgspec
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.structured_output import Grammar, GrammarKind

_JSON_OPTIONS: llguidance._lib.JsonCompileOptions = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
"""JSON without any whitespace: small models, once they write space where it is optional, may go on
for ever; and where every brace, comma and key is determined, whole runs of tokens are forced, which
costs no step. `lenient` would ignore keywords that the library does not know."""

_MAX_CHARACTERS = 300

_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""Masks hold every token that the language allows, where it admits a single text as well."""

_CAUSES = {
    "NoExtensionBias": "no token of the model continues the output within the language",
}
"""What the library says in too few words."""

_DANGLING_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
"""The library would drop the last backslash."""

_LARK_PARTS = re.compile(
    r'"(?:\\.|[^"\\\n])*"'  # a string
    r"|(?://|\#)[^\n]*"  # a comment
    r"|/(?:\\.|[^/\\\n])+/"  # a regular expression
    r"|(?P<token><[^>\n]*>?)"  # has no other meaning
    r"|(?P<option>\b(?:stop|temperature|max_tokens)\s*=|%llguidance(?!\s*\{\s*\}))"
    r"|(?P<json>%json\b)"
)
"""What a grammar is made of, as far as it matters where texts and comments begin and end."""


def library_grammar(grammar: Grammar, opening: str) -> str:
    """The library's description of a language.

    Args:
        grammar: As it was set.
        opening: Text that comes before it.

    Raises:
        MiniInferError: GRAMMAR_INVALID where the description is none.
    """
    before = f"{json.dumps(opening)} " if opening else ""
    top = {"lark_grammar": f"{_OPTIONS}start: {before}@body"}
    return json.dumps({"grammars": [top, _body(grammar) | {"name": "body"}]})


def cause_of(error: str) -> str:
    """The library's words in one line of bounded length."""
    lines = error.splitlines() or ["it is not valid"]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = (reasons or lines)[0].encode(errors="replace").decode()
    text = _CAUSES.get(text, text)
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " ..."


def invalid(error: str) -> MiniInferError:
    """An error about a language.

    Args:
        error: What the library says about it.
    """
    return MiniInferError(ErrorReason.GRAMMAR_INVALID, f"structured output: {cause_of(error)}")


def _body(grammar: Grammar) -> dict[str, object]:
    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                return _json_body(grammar.source)
            case GrammarKind.JSON_OBJECT:
                return _json_body('{"type": "object"}')
            case GrammarKind.REGEX:
                if _DANGLING_ESCAPE.search(grammar.source):
                    raise invalid("the regular expression ends within an escape")
                # Digits and letters are ASCII, as in the patterns of a JSON schema.
                source = llguidance.regex_to_lark(grammar.source, use_ascii="dw")
                return {"lark_grammar": f"start: /{source}/"}
            case GrammarKind.GRAMMAR:
                _check_lark(grammar.source)
                return {"lark_grammar": grammar.source}
            case GrammarKind.CHOICE:
                texts = msgspec.json.decode(grammar.source.encode(), type=list[str])
                # A terminal, since there may be more alternatives than a rule can have.
                return {"lark_grammar": f"start: TEXT\nTEXT: {' | '.join(map(json.dumps, texts))}"}
    except (ValueError, RecursionError, msgspec.DecodeError) as error:  # no JSON, or no Unicode
        raise invalid(str(error)) from None


def _json_body(schema: str) -> dict[str, object]:
    if schema.strip() == "true":
        schema = "{}"
    source = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    return {"json_schema": json.loads(source)["grammars"][0]["json_schema"]}


def _check_lark(source: str) -> None:
    for part in _LARK_PARTS.finditer(source):
        if part["token"]:
            raise invalid(f"special tokens such as {part['token'][:40]} are not supported")
        if part["option"]:
            raise invalid(
                "the options stop, temperature and max_tokens of rules, and those of %llguidance, "
                "are not supported"
            )
        if part["json"]:
            raise invalid("schemas within a grammar are not supported: use json_schema")
