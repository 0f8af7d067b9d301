"""JSON schemas as people write them, drawn from seeds.

Most bound every text, list and number, as is good practice with language models; a third leave
them open now and then. Each is a valid schema of draft 2020-12.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

_THINGS = ["person", "pet", "house", "garden", "meal", "trip", "letter", "song", "game", "tool"]
_TEXT_NAMES = [
    "name",
    "title",
    "summary",
    "city",
    "colour",
    "owner",
    "comment",
    "first_name",
    "note",
]
_NUMBER_NAMES = ["age", "count", "price", "score", "height_cm", "year", "rating", "distance_km"]
_FLAG_NAMES = ["is_open", "isActive", "has_children", "verified", "in stock"]
_LIST_NAMES = ["tags", "friends", "steps", "ingredients", "scores", "rooms"]
_WORDS = ["red", "green", "blue", "happy", "sad", "small", "large", "north", "south", "unknown"]
_PATTERNS = [
    r"^[A-Z][a-z]{2,9}$",
    r"^[A-Z]{2}-\d{4}$",
    r"^\d{3}-\d{2}-\d{4}$",
    r"^(red|green|blue)( (light|dark))?$",
    r"^#[0-9a-f]{6}$",
    r"^v\d{1,2}\.\d{1,2}\.\d{1,3}$",
    r"^[a-z_]{1,12}\.(txt|md|json)$",
    r"^\+?[0-9]{6,12}$",
]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email", "hostname"]


class _Author:
    """Writes one schema."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._leaves_open = self._random.random() < 1 / 3

    def schema(self) -> Schema:
        write: Callable[[], Schema] = self._random.choice(
            [
                self._record,
                self._record,
                self._record,
                self._list_of_records,
                self._classification,
                self._call_of_a_tool,
                self._with_definitions,
                self._tree,
                self._table,
                self._map,
                self._all_of_some,
            ]
        )
        return write()

    def _pick(self, names: list[str], count: int) -> list[str]:
        return self._random.sample(names, count)

    def _is_open(self) -> bool:
        return self._leaves_open and self._random.random() < 0.05

    def _text(self) -> Schema:
        kind = self._random.random()
        if kind < 0.2:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        if kind < 0.3:
            return {"type": "string", "format": self._random.choice(_FORMATS)}
        if self._is_open():
            return {"type": "string", "description": "In a few words."}
        schema: Schema = {"type": "string", "maxLength": self._random.choice([8, 16, 24, 32])}
        if self._random.random() < 0.5:
            schema["minLength"] = self._random.randint(1, 3)
        return schema

    def _number(self) -> Schema:
        low = self._random.choice([0, 1, -10, 1900])
        high = low + self._random.choice([1, 10, 99, 150])
        return self._random.choice(
            [
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
                {"type": "number", "minimum": low, "maximum": high}
                if self._is_open()
                else {"type": "integer", "minimum": high - 1, "maximum": high},
                {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 5},
                {"type": "integer"} if self._is_open() else {"type": "integer", "maximum": high},
            ]
        )

    def _fixed(self) -> Schema:
        words = self._pick(_WORDS, self._random.randint(2, 6))
        return self._random.choice(
            [
                {"enum": words},
                {"type": "string", "enum": words},
                {"enum": [*words[:2], self._random.randint(0, 99), None, True]},
                {"const": words[0]},
                {"type": "boolean"},
                {"type": ["boolean", "null"]},
                {"type": "null"},
            ]
        )

    def _list_of(self, items: Schema, max_items: int = 4) -> Schema:
        schema: Schema = {"type": "array", "items": items}
        if not self._is_open():
            schema["maxItems"] = self._random.randint(1, max_items)
        if self._random.random() < 0.6:
            schema["minItems"] = 1
        return schema

    def _leaf(self) -> Schema:
        return self._random.choice([self._text, self._number, self._fixed])()

    def _value(self, depth: int) -> Schema:
        kind = self._random.random()
        if depth and kind < 0.2:
            return self._object(depth - 1)
        if depth and kind < 0.35:
            return self._list_of(self._value(0))
        if kind < 0.45:
            return {"anyOf": [self._leaf(), {"type": "null"}]}
        return self._leaf()

    def _object(self, depth: int) -> Schema:
        properties: dict[str, Schema] = {}
        for name in self._pick(_TEXT_NAMES, self._random.randint(1, 2)):
            properties[name] = self._text()
        for name in self._pick(_NUMBER_NAMES, self._random.randint(0, 2)):
            properties[name] = self._number()
        for name in self._pick(_FLAG_NAMES, self._random.randint(0, 1)):
            properties[name] = {"type": "boolean"}
        for name in self._pick(_LIST_NAMES, self._random.randint(0, 1)):
            properties[name] = self._list_of(self._value(0))
        if depth:
            properties[self._random.choice(_THINGS)] = self._value(depth)
        names = list(properties)
        required = [name for name in names if self._random.random() < 0.8] or names[:1]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def _record(self) -> Schema:
        dialect = "https://json-schema.org/draft/2020-12/schema"
        schema = self._object(depth=self._random.randint(0, 3))
        if self._random.random() < 0.3:
            schema = {"$schema": dialect, "title": self._random.choice(_THINGS), **schema}
        return schema

    def _list_of_records(self) -> Schema:
        return self._list_of(self._object(depth=0), max_items=2)

    def _classification(self) -> Schema:
        labels = self._pick(_WORDS, self._random.randint(2, 8))
        return {
            "type": "object",
            "properties": {
                "label": {"enum": labels},
                "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
                "reason": self._text(),
            },
            "required": ["label", "confidence"],
            "additionalProperties": False,
        }

    def _call_of_a_tool(self) -> Schema:
        tools = self._pick(_THINGS, self._random.randint(2, 3))
        calls = [
            {
                "type": "object",
                "properties": {"tool": {"const": tool}, "arguments": self._object(depth=0)},
                "required": ["tool", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return {"anyOf": calls}

    def _with_definitions(self) -> Schema:
        first, second = self._pick(_THINGS, 2)
        return {
            "$defs": {first: self._object(depth=0), second: self._text()},
            "type": "object",
            "properties": {
                "main": {"$ref": f"#/$defs/{first}"},
                "name": {"$ref": f"#/$defs/{second}"},
                "more": self._list_of({"$ref": f"#/$defs/{second}"}),
            },
            "required": ["main", "name"],
            "additionalProperties": False,
        }

    def _tree(self) -> Schema:
        """Three levels; open ones have as many as the model likes."""
        definitions: dict[str, Schema] = {"leaf": self._node(None)}
        root = "leaf"
        if self._is_open():
            definitions["node"], root = self._node("node"), "node"
        else:
            for name in ("branch", "trunk"):
                definitions[name], root = self._node(root), name
        return {"$defs": definitions, "$ref": f"#/$defs/{root}"}

    def _node(self, child: str | None) -> Schema:
        properties: dict[str, Schema] = {"label": self._fixed()}
        if child is not None:
            children = {"type": "array", "items": {"$ref": f"#/$defs/{child}"}, "maxItems": 2}
            properties["children"] = children
        return {
            "type": "object",
            "properties": properties,
            "required": ["label"],
            "additionalProperties": False,
        }

    def _table(self) -> Schema:
        """Rows of different columns."""
        columns = [self._number(), self._fixed(), self._text()]
        row = {"type": "array", "prefixItems": columns, "items": False, "minItems": 3}
        return {
            "type": "object",
            "properties": {"unit": self._fixed(), "rows": self._list_of(row)},
            "required": ["rows"],
            "additionalProperties": False,
        }

    def _map(self) -> Schema:
        """Names that are not known before."""
        return {
            "type": "object",
            "patternProperties": {"^x-[a-z]{1,8}$": self._fixed()},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": self._random.randint(2, 4),
        }

    def _all_of_some(self) -> Schema:
        return {
            "allOf": [
                {
                    "type": "object",
                    "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 9999}},
                    "required": ["id"],
                    "maxProperties": 2,
                },
                {"properties": {"state": self._fixed()}, "required": ["state"]},
            ]
        }


def json_schemas(count: int = 200) -> list[Schema]:
    """Different schemas, of the seeds 0, 1, 2, ...; always the same."""
    schemas: dict[str, Schema] = {}
    seed = 0
    while len(schemas) < count:
        schema = _Author(seed).schema()
        schemas.setdefault(json.dumps(schema), schema)
        seed += 1
    return list(schemas.values())
