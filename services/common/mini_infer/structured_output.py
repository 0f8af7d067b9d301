"""Languages that an output must belong to: what users set, and what the processes pass on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from mini_infer.errors import FieldViolation

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_CHOICE_TEXTS = 1024


class GrammarKind(str, Enum):
    """How a language is described."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


class Grammar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A language.

    Attributes:
        kind: How it is described.
        source: The description: a JSON schema, nothing, a regular expression, a grammar in Lark's
            notation, or a JSON array of texts.
    """

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """A language that the output must belong to: exactly one field is set.

    Attributes:
        json_schema: A JSON schema, as text or as a mapping; the output is a JSON value of it.
        regex: A regular expression that the output matches from end to end.
        grammar: A grammar in Lark's notation, whose `start` rule the output matches.
        choice: Texts of which the output is one; 1 to 1,024, none empty.
        json_object: True: the output is any JSON object.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool = False

    def violations(self) -> list[FieldViolation]:
        """Lists what is wrong, as far as it is seen without reading the language itself."""
        path = "structured_output"
        given = [kind for kind in GrammarKind if getattr(self, kind.value) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(kind.value for kind in given) or "none"
            expected = "expected one of json_schema, json_object, regex, grammar and choice"
            return [FieldViolation(path, f"{expected}, got {names}")]
        (kind,) = given
        field = f"{path}.{kind.value}"
        if self.choice is not None:
            if isinstance(self.choice, str):
                return [FieldViolation(field, "expected a list of texts, got a single one")]
            if not 1 <= len(self.choice) <= MAX_CHOICE_TEXTS:
                expected = f"expected 1 to {MAX_CHOICE_TEXTS} texts, got {len(self.choice)}"
                return [FieldViolation(field, expected)]
            if not all(self.choice):
                return [FieldViolation(field, "expected texts that are not empty")]
        try:
            num_bytes = len(self.as_grammar().source.encode())
        except (TypeError, ValueError, RecursionError) as error:  # no JSON, or half a character
            return [FieldViolation(field, f"expected JSON in Unicode: {error}")]
        if num_bytes > MAX_GRAMMAR_BYTES:
            expected = f"expected at most {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}"
            return [FieldViolation(field, expected)]
        if num_bytes == 0 and kind is not GrammarKind.JSON_OBJECT:
            return [FieldViolation(field, "expected a description, got an empty one")]
        return []

    def as_grammar(self) -> Grammar:
        """What the processes pass on. Only where `violations` finds no other number than one."""
        if self.json_schema is not None:
            schema = self.json_schema
            source = (
                schema if isinstance(schema, str) else json.dumps(dict(schema), allow_nan=False)
            )
            return Grammar(GrammarKind.JSON_SCHEMA, source)
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex)
        if self.grammar is not None:
            return Grammar(GrammarKind.GRAMMAR, self.grammar)
        if self.choice is not None:
            source = json.dumps(list(self.choice), ensure_ascii=False)
            return Grammar(GrammarKind.CHOICE, source)
        return Grammar(GrammarKind.JSON_OBJECT, "")
