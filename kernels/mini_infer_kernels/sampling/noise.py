"""The references' noise (`reference/philox.py`) in float32: exponential clocks of a race.

The greatest of log(probability) + Gumbel noise is the least of clock / probability, since the
noise is -log(clock): one logarithm a token is saved.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clocks_of_words(words: tl.tensor) -> tl.tensor:
    """-log(1 - u) of u = (word + 1/2) / 2**32, for uint32 words."""
    uniform = (words.to(tl.float32) + 0.5) * 2.0**-32
    complement = ((0xFFFFFFFF - words).to(tl.float32) + 0.5) * 2.0**-32
    # The clocks that win come of a small u, where 1 - u would lose its digits: six terms of the
    # series are exact to float32 there.
    series = 1 / 3 + uniform * (1 / 4 + uniform * (1 / 5 + uniform * (1 / 6)))
    series = uniform * (1 + uniform * (1 / 2 + uniform * series))
    return tl.where(uniform < 1 / 16, series, -tl.log(complement))


@triton.jit
def clocks_of_block(
    seed: tl.tensor, position: tl.tensor, first_id: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """[BLOCK] float32: the clocks of the tokens from `first_id` on, a multiple of 4."""
    groups = (first_id // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = tl.zeros_like(groups)
    w0, w1, w2, w3 = tl.philox(seed, groups, zeros + position.to(tl.uint32), zeros, zeros)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK // 4, 2, 2], in the words' order
    return clocks_of_words(tl.reshape(words, (BLOCK,)))


@triton.jit
def clocks_of_ids(seed: tl.tensor, position: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """The clocks of any tokens, a float32 each."""
    groups = (ids // 4).to(tl.uint32)
    zeros = tl.zeros_like(groups)
    w0, w1, w2, w3 = tl.philox(seed, groups, zeros + position.to(tl.uint32), zeros, zeros)
    which = ids % 4
    words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return clocks_of_words(words)


@triton.jit
def race_times(clocks: tl.tensor, scores: tl.tensor) -> tl.tensor:
    """Clock / 2**score, for scores of at most 0; below -115 no token wins, nor overflows."""
    return clocks * tl.exp2(tl.minimum(-scores, 115.0))
