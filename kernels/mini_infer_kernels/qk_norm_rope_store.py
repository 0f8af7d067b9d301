"""What stands between the qkv product and attention, in one launch.

heads: [T, Hq + 2 * Hkv, D], the heads of queries, keys and values. Query and key heads are normed
(`rmsnorm.py`, where the model has such weights) and turned (`rope.py`); queries stay where they
are, keys and values go to their slots of the cache (`store_kv.py`). Each element is read once and
written once.

Source: Qwen Team, "Qwen3 Technical Report", 2025, for the norm of queries and keys; the others
as in the files named.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher
from mini_infer_kernels.rmsnorm import check_weight, times_weight
from mini_infer_kernels.rope import check_turns, load_turn, turn
from mini_infer_kernels.store_kv import check_cache, check_slots

_NUM_WARPS = 4
"""As for the turns alone (`rope.py`); not varied for this kernel."""
_FEW_TOKENS = 128


@triton.jit
def _load(heads: tl.tensor, places: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """[heads, places] float32 of pointers to heads; 0 where not inside."""
    loaded = tl.load(heads[:, None] + places[None, :], mask=inside[None, :], other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def _normed(
    heads: tl.tensor,
    inverse: tl.tensor,
    is_query: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    GEMMA: tl.constexpr,
) -> tl.tensor:
    """Heads [heads, places] times the inverse of each one's root mean square and its weights."""
    q_weight = tl.load(q_weight_ptr + places, mask=inside, other=0.0)
    k_weight = tl.load(k_weight_ptr + places, mask=inside, other=0.0)
    weight = tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])
    return times_weight(heads, inverse[:, None], weight, GEMMA)


@triton.jit
def _store(
    queries: tl.tensor,
    is_query: tl.tensor,
    in_slot: tl.tensor,
    is_stored: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    heads: tl.tensor,
) -> None:
    """Stores [heads, places] behind pointers to queries, to heads in the slot, or nowhere."""
    rounded = heads.to(queries.dtype.element_ty)
    mask = is_query[:, None] & inside[None, :]
    tl.store(queries[:, None] + places[None, :], rounded, mask=mask)
    mask = is_stored[:, None] & inside[None, :]
    tl.store(in_slot[:, None] + places[None, :], rounded, mask=mask)


@triton.jit
def _qk_norm_rope_store_kernel(
    heads_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    eps: tl.tensor,
    token_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    GEMMA: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    num_groups: tl.constexpr = (NUM_Q + 2 * NUM_KV + HEADS - 1) // HEADS
    token = (tl.program_id(0) // num_groups).to(tl.int64)
    head = tl.program_id(0) % num_groups * HEADS + tl.arange(0, HEADS)
    # The last group's surplus heads read the last head again, and are stored nowhere.
    real = tl.minimum(head, NUM_Q + 2 * NUM_KV - 1)
    source = heads_ptr + token * token_stride + real * HEAD_DIM
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    target = cache_ptr + slot * (2 * NUM_KV * HEAD_DIM) + (head - NUM_Q) * HEAD_DIM
    is_query, is_value = head < NUM_Q, (head >= NUM_Q + NUM_KV)[:, None]
    is_stored = (head >= NUM_Q) & (head == real) & (slot >= 0)

    # A head in two halves that turn and a rest that does not, often empty.
    low, high = tl.arange(0, BLOCK), HALF + tl.arange(0, BLOCK)
    last = 2 * HALF + tl.arange(0, REST_BLOCK)
    in_half, in_rest = low < HALF, last < HEAD_DIM
    x, y = _load(source, low, in_half), _load(source, high, in_half)
    z = _load(source, last, in_rest)
    cos, sin = load_turn(cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, HALF, BLOCK)
    a, b, c = x, y, z
    if q_weight_ptr is not None:
        squares = tl.sum(x * x + y * y, axis=1) + tl.sum(z * z, axis=1)
        inverse = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)
        a = _normed(x, inverse, is_query, q_weight_ptr, k_weight_ptr, low, in_half, GEMMA)
        b = _normed(y, inverse, is_query, q_weight_ptr, k_weight_ptr, high, in_half, GEMMA)
        c = _normed(z, inverse, is_query, q_weight_ptr, k_weight_ptr, last, in_rest, GEMMA)
    a, b = turn(a, b, cos, sin)
    x, y, z = tl.where(is_value, x, a), tl.where(is_value, y, b), tl.where(is_value, z, c)
    _store(source, is_query, target, is_stored, low, in_half, x)
    _store(source, is_query, target, is_stored, high, in_half, y)
    _store(source, is_query, target, is_stored, last, in_rest, z)


_launch = Launcher(_qk_norm_rope_store_kernel)


def _heads_per_program(num_tokens: int, is_normed: bool) -> int:
    """Heads of one token that a program takes.

    Measured on an H200 (1 to 8192 tokens, 16 + 8 + 8 normed heads and 32 + 8 + 8 plain ones of 128
    bfloat16, cold L2): 4 are up to 17 % faster than 16 up to 64 tokens, and slower from 512 on,
    where 32 normed ones are 4 to 14 % faster than 16, and plain ones 8 % slower at 512.
    """
    if num_tokens <= _FEW_TOKENS:
        return 4
    return 32 if is_normed else 16


def triton_qk_norm_rope_store(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
) -> None:
    """Norms and turns queries in place; norms and turns keys into the cache; stores values there.

    Args:
        heads: [num_tokens, num_q_heads + 2 * num_kv_heads, head_dim] on a GPU, float32, float16
            or bfloat16: queries, keys, values. A token's heads are adjacent; tokens may be apart.
            What stands at the keys and values afterwards means nothing.
        cos: [num_tokens, 1, width] cosines of the tokens' angles, as for `triton_rope`. Where
            width is less than head_dim, the elements behind it do not turn.
        sin: Sines likewise.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], contiguous, of heads' type.
        slot_mapping: [num_tokens] int64, contiguous, no slot twice; -1 for a row that is not
            stored.
        q_weight: [head_dim], contiguous, of heads' type: weights of the queries' norm. None
            where queries and keys are not normed.
        k_weight: Those of the keys; given if and only if q_weight is.
        eps: Added to the mean square.
        gemma: The norm is of Gemma's form, otherwise of Llama's.

    Raises:
        ValueError: A layout or combination that is not taken.
    """
    num_tokens, num_heads, head_dim = heads.shape
    num_cached, width = cache.shape[2], cos.shape[2]
    if heads.stride(1) != head_dim or heads.stride(2) != 1:
        raise ValueError("a token's heads must be adjacent: call heads.contiguous() first")
    if (q_weight is None) is not (k_weight is None):
        raise ValueError("pass q_weight and k_weight, or neither")
    if q_weight is not None and k_weight is not None:
        check_weight(q_weight, head_dim, heads.dtype)
        check_weight(k_weight, head_dim, heads.dtype)
    if not num_cached < num_heads or width > head_dim:
        raise ValueError(f"{num_heads} heads of {head_dim}: more are cached, or wider ones turn")
    check_turns(cos, sin, num_tokens, width)
    check_cache(cache, num_cached, head_dim, heads.dtype)
    check_slots(slot_mapping, num_tokens)
    if num_tokens == 0:
        return
    half, rest = width // 2, head_dim - width
    group = _heads_per_program(num_tokens, q_weight is not None)
    blocks = 1 << (half - 1).bit_length(), 1 << max(rest - 1, 0).bit_length()
    sizes = num_heads - num_cached, num_cached // 2, head_dim, half
    _launch(
        num_tokens * -(-num_heads // group),
        (heads, cos, sin, cache, slot_mapping, q_weight, k_weight),
        (),
        (float(eps), heads.stride(0), cos.stride(0), sin.stride(0), *sizes, gemma, group, *blocks),
        _NUM_WARPS,
    )
