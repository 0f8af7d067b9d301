"""Mutations of JSON files: of their structure, of their numbers and texts, and of their bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

VALUES: list[Any] = [
    *[None, True, False, 0, 1, -1, 3, 64, 255, 10**5, 0.5, -0.0, 1e308, -1e308],
    *[2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)],
    *["", "a", " ", "\0", "\ufffd", "▁", "<unk>", "##", "é", "x" * 10_000, "\u0130" * 50],
    *["(a+)+$", "(a|aa)*[bc]", "[", "(?<n>a\\g<n>?b)", "a{1,99999}", "", "\\p{L}*", "(?=a)*"],
    *[[], {}, [[]], [0], ["a"], {"Regex": "(a+)+$"}, {"String": ""}, {"Regex": ""}, {"a": 1}],
]
"""What a node may become."""


def mutate(content: bytes, generator: random.Random, more_values: Sequence[Any] = ()) -> bytes:
    """A damaged copy of a JSON file.

    Args:
        content: A valid file.
        generator: What is done depends on it alone.
        more_values: Beside `VALUES`, what nodes of this kind of file may become.
    """
    if generator.random() < 0.15:
        return _mutate_bytes(content, generator)
    root = json.loads(content)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        own = more_values if more_values and generator.random() < 0.3 else VALUES
        root = _mutate_node(root, generator, own)
    return json.dumps(root).encode()


def _mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    data = bytearray(content)
    begin = generator.randrange(len(data))
    end = min(len(data), begin + generator.choice((1, 1, 2, 10, 1000)))
    match generator.randrange(5):
        case 0:
            return bytes(data[:begin])
        case 1:
            del data[begin:end]
        case 2:
            data[begin:begin] = data[begin:end] * generator.choice((1, 2, 100))
        case 3:
            data[begin] ^= 1 << generator.randrange(8)
        case _:
            data[begin:end] = generator.randbytes(end - begin)
    return bytes(data)


def _mutate_node(root: Any, generator: random.Random, values: Sequence[Any]) -> Any:
    """Changes one node: each part of the file is as likely as the one with many nodes."""
    if not isinstance(root, dict | list) or not root:
        return copy.deepcopy(generator.choice(values))
    parent, key = root, _key_of(root, generator)
    while isinstance(parent[key], dict | list) and parent[key] and generator.random() < 0.95:
        parent = parent[key]
        key = _key_of(parent, generator)
    node = parent[key]
    match generator.randrange(10):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent[key:key] = [node] * generator.choice((1, 2, 100))
        case 2 | 3 if isinstance(node, int) and not isinstance(node, bool):
            parent[key] = node + generator.choice((-1, 1, 2**16, 2**31, 2**32))
        case 2 | 3 if isinstance(node, str):
            parent[key] = _mutate_text(node, generator)
        case 4 if generator.random() < 0.5:
            other = generator.choice(list(root.values() if isinstance(root, dict) else root))
            parent[key] = copy.deepcopy(other)
        case 5 if generator.random() < 0.5:
            parent[key] = generator.choice(([node], {"type": "Sequence", "x": [node]}, str(node)))
        case _:
            alike = [value for value in values if type(value) is type(node)]
            pool = alike if alike and generator.random() < 0.8 else values
            parent[key] = copy.deepcopy(generator.choice(pool))
    return root


def _key_of(parent: Any, generator: random.Random) -> Any:
    return generator.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))


def _mutate_text(text: str, generator: random.Random) -> str:
    begin = generator.randrange(len(text) + 1)
    inserted = generator.choice(("", "a", "\0", "é", "+", "*", "(", "\\", "▁" * 20, text[:50] * 3))
    return text[:begin] + inserted + text[begin + generator.randrange(3) :]
