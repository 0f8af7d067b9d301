"""Languages that ask for too much, or are none: of every kind, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mini_infer.structured_output import Grammar, GrammarKind

Json = Any


def _nested(depth: int, wrap: Callable[[Json], Json], innermost: Json) -> Json:
    for _ in range(depth):
        innermost = wrap(innermost)
    return innermost


def _nested_text(depth: int, before: str, innermost: str, behind: str) -> str:
    return before * depth + innermost + behind * depth


_DEEP_ARRAY = ('{"type":"array","items":', '{"type":"null"}', "}")
_DEEP_OBJECT = ('{"type":"object","properties":{"a":', "{}", "}}")

_REGEXES = {
    "counters in counters": "(a{1,1000}){1,1000}",
    "counters in counters in counters": "((a{1,100}){1,100}){1,100}",
    "four counters": "(((a{1,60}){1,60}){1,60}){1,60}",
    "a huge counter": "a{1000000}",
    "a counter beyond 32 bits": "a{4294967296}",
    "a counter beyond 64 bits": "a{99999999999999999999}",
    "a huge open counter": "(ab?){500000,}",
    "a counted class": r"\w{1,20000}",
    "a counted class of letters": r"\p{L}{5000}",
    "ambiguous repetitions": "(a|aa)*b",
    "repetitions in repetitions": "((a*)*)*b",
    "catastrophic for backtracking": "(a+)+(a+)+(a+)+$",
    "exponential for determinization": "(a|b)*a(a|b){20}c",
    "exponential with any character": ".*a.{30}b.{30}c",
    "ten times anything": "(.*){10}x",
    "anything, a thousand times": "(.*){1000}",
    "pairs of anything": "(.*.*)*" * 20,
    "nested pairs": "(x+x+)+y" * 30,
    "overlapping words": "|".join(f".*{chr(97 + n)}.*" for n in range(26)),
    "subsequences": ".*".join("abcdefghijklmnopqrstuvwxyz" * 4),
    "intersecting suffixes": "|".join(f"(.*x){{{n}}}.{{{n}}}" for n in range(1, 40)),
    "unicode classes": r"(\p{L}\p{N}\p{S}\p{P}\p{M})*" * 20,
    "negated unicode classes": r"[^\p{L}]{300}[^\p{N}]{300}",
    "case folding": "(?i)" + "\u017fKsk" * 2000,
    "a huge alternation": "|".join(f"word{n}" for n in range(20_000)),
    "a huge alternation of tails": "|".join(".*" + "ab" * (n % 50) for n in range(2_000)),
    "a huge class": "[" + "".join(map(chr, range(0x4E00, 0x9FFF, 2))) + "]{50}",
    "a long text": "a" * 200_000,
    "optional letters": "a?" * 5_000 + "a" * 5_000,
    "deep groups": _nested_text(10_000, "(", "a", ")"),
    "deep optional groups": _nested_text(2_000, "(a", "", ")?"),
    "deep repetitions": _nested_text(3_000, "(?:", "a", ")*"),
    "a look ahead": "(?=a)b",
    "a negative look ahead": "(?!a).*",
    "a look behind": "(?<=a)b",
    "a back reference": r"(a+)\1",
    "a word boundary": r"\bfoo\b",
    "an anchor inside": "a^b",
    "an open group": "(a",
    "an open class": "[a",
    "an open counter": "a{2",
    "a counter the wrong way round": "a{3,2}",
    "a repetition of nothing": "*a",
    "a dangling escape": "a\\",
    "an unknown escape": r"\y",
    "an unknown class": r"\p{Nonsense}",
    "no text at all": r"[^\s\S]",
    "only the empty text": "()",
    "half of a surrogate pair": r"\x{d800}",
    "a lone surrogate": "\ud800",
    "a NUL byte": "a\0b",
    "bytes that are no text": r"(?-u)\xff",
    "comments": "(?x) a # " + "b" * 100_000,
}

_SCHEMAS: dict[str, str | Json] = {
    "arrays 300 deep": _nested_text(300, *_DEEP_ARRAY),
    "arrays 3,000 deep": _nested_text(3_000, *_DEEP_ARRAY),
    "arrays 100 deep": _nested_text(100, *_DEEP_ARRAY),
    "objects 300 deep": _nested_text(300, *_DEEP_OBJECT),
    "objects 3,000 deep": _nested_text(3_000, *_DEEP_OBJECT),
    "brackets 100,000 deep": "[" * 100_000,
    "a megabyte of properties": {
        "type": "object",
        "properties": {f"property {n:032}": {"type": "string"} for n in range(14_000)},
    },
    "a megabyte of description": {"type": "string", "description": "x" * 2**20},
    "a thousand required properties": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string", "maxLength": n} for n in range(1_000)},
        "required": [f"p{n}" for n in range(1_000)],
    },
    "a thousand optional properties": {
        "type": "object",
        "properties": {f"p{n}": {"type": "integer"} for n in range(1_000)},
        "additionalProperties": False,
    },
    "a cycle of references": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "a reference to itself": {"$ref": "#"},
    "a list of itself": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "a tree": {"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}},
    "references that double": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{
                f"d{n}": {
                    "type": "array",
                    "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2,
                    "items": False,
                }
                for n in range(40)
            },
            "d40": {"type": "null"},
        },
    },
    "allOf that doubles": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)},
            "d30": {"type": "string", "minLength": 1},
        },
    },
    "anyOf that doubles": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{
                f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
                for n in range(30)
            },
            "d30": {"type": "string"},
        },
    },
    "a remote reference": {"$ref": "https://example.com/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to nothing": {"$ref": "#/$defs/nothing"},
    "an enum of 100,000": {"enum": [f"value {n}" for n in range(100_000)]},
    "an enum of 10,000 numbers": {"enum": list(range(10_000))},
    "an enum of nothing": {"enum": []},
    "a huge maxLength": {"type": "string", "maxLength": 10**9},
    "a huge minLength": {"type": "string", "minLength": 10**6},
    "a length beyond 64 bits": {"type": "string", "maxLength": 10**30},
    "a negative length": {"type": "string", "minLength": -1},
    "lengths that exclude each other": {"type": "string", "minLength": 5, "maxLength": 2},
    "huge minItems": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "huge maxItems": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    "counted arrays in counted arrays": _nested(
        12, lambda inner: {"type": "array", "items": inner, "minItems": 50, "maxItems": 100}, {}
    ),
    "long texts in long arrays": {
        "type": "array",
        "items": {"type": "string", "maxLength": 20_000},
        "maxItems": 20_000,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {f".*{chr(97 + n)}.*": {"type": "integer"} for n in range(26)},
    },
    "pattern properties of counters": {
        "type": "object",
        "patternProperties": {f"^(a{{1,{n}}}){{1,{n}}}$": {} for n in range(100, 140)},
    },
    "a pattern of counters": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "a pattern with a length": {"type": "string", "pattern": "^(.*a.{9}b)*$", "maxLength": 5_000},
    "patterns that must all hold": {
        "type": "string",
        "allOf": [{"pattern": f"{chr(97 + n)}"} for n in range(20)],
    },
    "all of many bounds": {"allOf": [{"type": "number", "minimum": n} for n in range(2_000)]},
    "any of many objects": {
        "anyOf": [
            {"type": "object", "properties": {"kind": {"const": n}, f"p{n}": {}}}
            for n in range(1_000)
        ]
    },
    "all of any of": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{n}{m}": {"const": m}}} for m in range(6)]}
            for n in range(12)
        ]
    },
    "one of what overlaps": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 1}]},
    "huge multiples": {"type": "integer", "multipleOf": 999_999_937, "minimum": 1},
    "tiny multiples": {"type": "number", "multipleOf": 1e-300},
    "multiples of nothing": {"type": "number", "multipleOf": 0},
    "huge bounds": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "narrow bounds": {"type": "number", "minimum": 0.1234567890123, "maximum": 0.1234567890124},
    "bounds that exclude each other": {"type": "integer", "minimum": 5, "maximum": 4},
    "many properties at least": {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "minProperties": 10**6,
    },
    "a keyword that is not supported": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "a format that is not supported": {"type": "string", "format": "iri-reference"},
    "an unknown type": {"type": "text"},
    "a type that is a number": {"type": 7},
    "properties that are a list": {"type": "object", "properties": ["a"]},
    "required that is a text": {"type": "object", "required": "a"},
    "no schema but a list": "[1, 2]",
    "no schema but a text": '"string"',
    "the schema of nothing": "false",
    "no JSON": "{type: object}",
    "JSON that is cut": '{"type": "obj',
    "NaN": '{"const": NaN}',
    "infinity": '{"maximum": 1e999}',
    "a key twice": '{"type": "string", "type": "integer", "type": "nonsense"}',
    "half of a surrogate pair": '{"const": "\\ud800"}',
    "a lone surrogate": '{"const": "\ud800"}',
    "a NUL in a key": {"type": "object", "properties": {"\0": {}}, "required": ["\0"]},
    "options of the library": {
        "type": "array",
        "x-guidance": {"whitespace_pattern": "[ ]{0,100000}", "lenient": True},
        "unknownKeyword": 1,
    },
}

_LARK = {
    "left recursion": 'start: start "a" | "a"',
    "right recursion": 'start: "a" start | "a"',
    "hidden left recursion": 'start: empty start "a" | "b"\nempty: "x"?',
    "a rule that is itself": "start: start",
    "two rules that are each other": "start: a\na: start",
    "an empty loop": 'start: ("a"?)*',
    "nested empty loops": 'start: (("a"*)*)*',
    "every ambiguity": 'start: start start | start start start | "a" |',
    "ambiguous sums": 'start: start "+" start | start "*" start | /[0-9]+/',
    "a huge repetition": 'start: "a"~1..1000000',
    "repetitions of repetitions": "start: a~1..900\na: b~1..900\nb: c~1..900\nc: /./",
    "a terminal of itself": 'start: A\nA: "a" A | "b"',
    "terminals that multiply": "start: A0\n"
    + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(40))
    + '\nA40: "a"',
    "rules that multiply": "start: a0\n"
    + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(40))
    + '\na40: "a"',
    "ten thousand rules": 'start: r0\nr10000: "a"\n'
    + "\n".join(f'r{n}: r{n + 1} | "x{n}"' for n in range(10_000)),
    "deep brackets": "start: " + _nested_text(20_000, "(", '"a"', ")"),
    "intersections": "start: A\nA: " + " & ".join(f"/.*{c}.*/" for c in "abcdefghijklmnop"),
    "negations": "start: A\nA: " + " & ".join(f"~/.*{c}.*/" for c in "abcdefghijklmnop"),
    "a bomb in a terminal": "start: /((a{1,100}){1,100}){1,100}/",
    "ignored anything": 'start: "a" "b"\n%ignore /.*/',
    "a schema inside": 'start: %json {"type":"array","items":{"$ref":"#"},"minItems":9}',
    "a huge schema inside": "start: %json " + json.dumps({"enum": list(range(20_000))}),
    "parameters that count": (
        'start: a::0\na::_: "a" a::incr([0:16]) %if lt([0:16], 60000) | "b" %if true'
    ),
    "no start": 'begin: "a"',
    "nothing": "\n",
    "no grammar": "hello, world",
    "JSON in its place": '{"grammars": [{"lark_grammar": "start: /a/"}]}',
    "an unknown rule": "start: nothing",
    "an unknown import": "%import common.NOTHING\nstart: NOTHING",
    "a file": '%import "/etc/passwd"\nstart: "a"',
    "a module": "%import ..secrets.rule\nstart: rule",
    "an ambiguous sum": "start: e\ne: e e | /[a-z ]/",
    "an ambiguous expression": 'start: e\ne: e "+" e | e "*" e | /[0-9]/ | "(" e ")"',
    "ambiguous repetitions": "start: a*\na: b*\nb: /[a-z]/*",
    "three and two": 'start: s\ns: s s s | s s | "a" | "b"',
    "a schema within": 'start: %json {"type": "array", "x-guidance": {"lenient": true}}',
    "a special token": 'start: <|endoftext|> "a"',
    "every token": "start: <[*]>*",
    "temperatures": "start: a\na[temperature=2.0]: /.*/",
    "bytes that are no text": '%llguidance {"allow_invalid_utf8": true}\nstart: /(?-u:\\xff)+/',
    "a rule twice": 'start: "a"\nstart: "b"',
    "an open text": 'start: "a',
    "many open brackets": "start: a" + "[a" * 60_000,
    "a NUL byte": 'start: "a\0b"',
    "a lone surrogate": 'start: "\ud800"',
}

_CHOICES = {
    "no JSON": "[",
    "a number": "[1]",
    "a text": '"abc"',
    "nothing": "[]",
    "long texts": json.dumps([str(n) * 60 for n in range(1_000)]),
    "one very long text": json.dumps(["ab" * 100_000]),
    "a lone surrogate": '["\ud800"]',
    "half of a surrogate pair": '["\\ud800"]',
}

HOSTILE_GRAMMARS = [
    *(
        (
            f"{kind.value}: {name}",
            Grammar(kind, source if isinstance(source, str) else json.dumps(source)),
        )
        for kind, sources in (
            (GrammarKind.REGEX, _REGEXES),
            (GrammarKind.JSON_SCHEMA, _SCHEMAS),
            (GrammarKind.GRAMMAR, _LARK),
            (GrammarKind.CHOICE, _CHOICES),
        )
        for name, source in sources.items()
    )
]
"""Each with its name."""
