"""What a program of Hopper's prefill attention has to do."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Work(NamedTuple):
    """One tile of queries. Its tiles of keys are counted from the diagonal down.

    Attributes:
        kv_head: The key head.
        query_start: First row of the sequence in query and out.
        num_tokens: New tokens of the sequence.
        first_token: The tile's first, of the new ones.
        first_position: Place of that token in the sequence.
        last_position: Place of the tile's last token.
        last_tile: Place of the tile of keys that holds it.
        full_start: Tiles before the first that all rows see whole.
        full_end: Tiles before the first, after those, that a window cuts.
        num_tiles: All of them; 0 for a program without work.
    """

    kv_head: gl.tensor
    query_start: gl.tensor
    num_tokens: gl.tensor
    first_token: gl.tensor
    first_position: gl.tensor
    last_position: gl.tensor
    last_tile: gl.tensor
    full_start: gl.tensor
    full_end: gl.tensor
    num_tiles: gl.tensor


@gluon.jit
def find_work(
    query_starts_ptr: gl.tensor,
    context_lens_ptr: gl.tensor,
    num_kv_heads: gl.tensor,
    num_seqs: gl.tensor,
    T: gl.constexpr,
) -> tuple[gl.tensor, Work]:
    """The sequence of this program, and its work."""
    kv_head = gl.program_id(0) % num_kv_heads
    seq = gl.program_id(0) // num_kv_heads % num_seqs
    # Tiles with the most keys start first: a late one would run alone.
    tile = (gl.num_programs(0) - 1 - gl.program_id(0)) // (num_kv_heads * num_seqs)
    first_token = tile * T.tokens
    query_start = gl.load(query_starts_ptr + seq)
    num_tokens = gl.load(query_starts_ptr + seq + 1) - query_start
    context_len = gl.load(context_lens_ptr + seq)
    first_position = context_len - num_tokens + first_token
    last_position = gl.minimum(first_position + T.tokens, context_len) - 1
    last_tile = last_position // T.keys
    full_start = last_tile + 1 - (first_position + 1) // T.keys
    full_end = last_tile + 1
    num_tiles = last_tile + 1
    if T.window is not None:
        full_end -= gl.cdiv(gl.maximum(last_position - T.window + 1, 0), T.keys)
        num_tiles -= gl.maximum(first_position - T.window + 1, 0) // T.keys
    num_tiles = gl.where((first_token < num_tokens) & (context_len > 0), num_tiles, 0)
    return seq, Work(
        kv_head,
        query_start,
        num_tokens,
        first_token,
        first_position,
        last_position,
        last_tile,
        full_start,
        full_end,
        num_tiles,
    )
