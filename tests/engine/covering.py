"""Covering arrays: few rows in which each pair of choices occurs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set
from collections.abc import Sequence as Seq
from functools import partial
from itertools import combinations

Choice = tuple[str, str]
"""Of a parameter, and the name of one of its values."""


def all_pairs(parameters: Mapping[str, Seq[str]]) -> set[frozenset[Choice]]:
    """Each pair of choices of two different parameters."""
    choices = [(name, value) for name, values in parameters.items() for value in values]
    return {frozenset(pair) for pair in combinations(choices, 2) if pair[0][0] != pair[1][0]}


def pairs_of(row: Mapping[str, str]) -> set[frozenset[Choice]]:
    """The pairs of choices that a row has."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def covering_array(
    parameters: Mapping[str, Seq[str]], generator: random.Random
) -> list[dict[str, str]]:
    """Rows with a value for each parameter, so that each pair occurs in one of them.

    Each row starts with a pair that is missing, and takes for one parameter after the other the
    value that adds the most missing pairs: greedy, so not the fewest rows, but about as many.
    """
    missing = all_pairs(parameters)
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        others = [name for name in parameters if name not in row]
        generator.shuffle(others)
        for name in others:
            row[name] = max(
                generator.sample(parameters[name], len(parameters[name])),
                key=partial(_num_added, missing, row, name),
            )
        missing -= pairs_of(row)
        rows.append(row)
    return rows


def _num_added(
    missing: Set[frozenset[Choice]], row: Mapping[str, str], name: str, value: str
) -> int:
    """The missing pairs that a value of a parameter makes with a row's choices."""
    return sum(frozenset([(name, value), each]) in missing for each in row.items())
