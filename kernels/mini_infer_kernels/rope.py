"""Rotary position embedding, in place: each pair of a head's elements turns by its token's angle.

x: [T, num_heads, width]; cos, sin: [T, 1, width]. Element i of the first half and its partner in
the second half: `(a, b) -> (a cos - b sin, b cos + a sin)`. Both halves of a head are turned by
one program, which reads the cosines and sines once for its heads.

Source: Su et al., "RoFormer", 2021, with the halves laid out as Hugging Face checkpoints have them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

# Measured on an H200 (1 to 65,536 tokens, 24, 40 and 64 heads of 128 bfloat16, cold L2): 1 or 2
# warps are 15 % slower at few tokens and as fast at many; 64 heads, or several tokens a program, 1
# to 5 % slower; cache hints change nothing.
_NUM_WARPS = 4
_FEW_TOKENS = 128
"""Up to here 8 heads a program are up to 5 % faster, beyond it 16 are up to 3 %."""


@triton.jit
def load_turn(
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, HALF: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines of the pairs of a token's rows, [BLOCK] float32 each.

    The halves of a row hold the same angles; the sines of the second half are not negated.
    """
    pairs = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + pairs, mask=pairs < HALF, other=0.0)
    sin = tl.load(sin_ptr + HALF + pairs, mask=pairs < HALF, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def turn(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Turns pairs: [heads, pairs] float32 each by [pairs]."""
    cos, sin = cos[None, :], sin[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    num_groups: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    token = (program // num_groups).to(tl.int64)
    # 64 bits: heads may be further apart than tokens.
    heads = (program % num_groups * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    inside = (heads < NUM_HEADS)[:, None] & (pairs < HALF)[None, :]
    cos, sin = load_turn(cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, HALF, BLOCK)
    places = x_ptr + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    first = tl.load(places, mask=inside).to(tl.float32)
    second = tl.load(places + HALF, mask=inside).to(tl.float32)
    first, second = turn(first, second, cos, sin)
    tl.store(places, first.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(places + HALF, second.to(x_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_rope_kernel)


def triton_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turns every head of every token, in place.

    Args:
        x: [num_tokens, num_heads, width] on a GPU, float32, float16 or bfloat16; perhaps some
            heads of a wider tensor, or the first elements of wider heads. Elements are adjacent.
        cos: [num_tokens, 1, width] cosines of the tokens' angles; the halves equal. Rows may be
            apart.
        sin: Sines likewise, but for their sign: minus in the first half.

    Raises:
        ValueError: A layout that is not taken.
    """
    num_tokens, num_heads, width = x.shape
    if x.stride(2) != 1:
        raise ValueError("the elements of a head of x must be adjacent: call x.contiguous() first")
    check_turns(cos, sin, num_tokens, width)
    if num_tokens == 0:
        return
    half = width // 2
    group = 8 if num_tokens <= _FEW_TOKENS else 16
    strides = x.stride(0), x.stride(1), cos.stride(0), sin.stride(0)
    _launch(
        num_tokens * -(-num_heads // group),
        (x, cos, sin),
        (),
        (*strides, num_heads, half, group, 1 << (half - 1).bit_length()),
        _NUM_WARPS,
    )


def check_turns(cos: torch.Tensor, sin: torch.Tensor, num_tokens: int, width: int) -> None:
    """Raises ValueError where cos and sin are not rows of that many tokens and elements.

    Args:
        cos: As for `triton_rope`.
        sin: As for `triton_rope`.
        num_tokens: Rows that they must have.
        width: Elements that turn, even.
    """
    shape = (num_tokens, 1, width)
    if cos.shape != shape or sin.shape != shape or cos.stride(2) != 1 or sin.stride(2) != 1:
        raise ValueError(f"cos and sin must be {shape}, the elements of a row adjacent")
    if width % 2:
        raise ValueError(f"width {width} is odd, but elements turn in pairs: pass an even width")
