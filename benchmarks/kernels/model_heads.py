"""The heads of the models whose shapes the benchmarks take, and the blocks of their caches."""

from __future__ import annotations

from dataclasses import dataclass

from harness import SHAPES

BLOCK_SIZE = 16
"""Tokens of a block."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model's attention.

    Attributes:
        query: How many have queries.
        kv: How many have keys, and how many values.
        dim: Elements of each.
    """

    query: int
    kv: int
    dim: int

    @classmethod
    def of(cls, shape: str) -> Heads:
        """Those of one of `SHAPES`."""
        config = SHAPES[shape]
        query = config["num_attention_heads"]
        dim = config.get("head_dim", config["hidden_size"] // query)
        return cls(query, config["num_key_value_heads"], dim)

    @property
    def total(self) -> int:
        """Heads of queries, keys and values together."""
        return self.query + 2 * self.kv
