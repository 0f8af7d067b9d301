"""Writes the keys and values of new tokens into their slots of the paged cache.

`cache[slot_mapping[i]] = key_value[i]`, where slot s is token s % block_size of block
s // block_size. key_value: [T, 2 * num_kv_heads, head_dim]; cache:
[num_blocks, block_size, 2 * num_kv_heads, head_dim]; slot_mapping: [T].

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

# Elements of a program, 16 bytes of bfloat16 a thread and load: the best for the gated activations,
# which move memory in the same way (`activation.py`). Not varied for this kernel.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _store_kv_kernel(
    key_value_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    token_stride: tl.tensor,
    SLOT_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    num_blocks: tl.constexpr = (SLOT_SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    token = (program // num_blocks).to(tl.int64)
    places = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    inside = (places < SLOT_SIZE) & (slot >= 0)
    stored = tl.load(key_value_ptr + token * token_stride + places, mask=inside)
    tl.store(cache_ptr + slot * SLOT_SIZE + places, stored, mask=inside)


_launch = Launcher(_store_kv_kernel)


def triton_store_kv(
    key_value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Copies row i of keys and values into slot `slot_mapping[i]`.

    Args:
        key_value: [num_tokens, 2 * num_kv_heads, head_dim] on a GPU, the heads of the keys first,
            of the cache's type. A token's heads are adjacent; tokens may be apart.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], contiguous, written in place.
        slot_mapping: [num_tokens] int64, contiguous, no slot twice; -1 for a row that is not
            stored.

    Raises:
        ValueError: A layout that is not taken.
    """
    num_tokens, num_heads, head_dim = key_value.shape
    if key_value.stride(1) != head_dim or key_value.stride(2) != 1:
        raise ValueError("a token's heads in key_value must be adjacent: call contiguous() first")
    check_cache(cache, num_heads, head_dim, key_value.dtype)
    check_slots(slot_mapping, num_tokens)
    if num_tokens == 0:
        return
    slot_size = num_heads * head_dim
    block = min(_BLOCK, 1 << (slot_size - 1).bit_length())
    _launch(
        num_tokens * -(-slot_size // block),
        (key_value, cache, slot_mapping),
        (),
        (key_value.stride(0), slot_size, block),
        _NUM_WARPS,
    )


def check_cache(cache: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError where slots of the cache do not hold such heads one behind the other.

    Args:
        cache: As for `triton_store_kv`.
        num_heads: Heads of keys and of values together.
        head_dim: Elements of a head.
        dtype: Of what will be stored.
    """
    if cache.shape[2:] != (num_heads, head_dim) or cache.dtype is not dtype:
        raise ValueError(f"cache must be [blocks, block_size, {num_heads}, {head_dim}] of {dtype}")
    if not cache.is_contiguous():
        raise ValueError("cache must be contiguous: pass the cache of one layer")


def check_slots(slot_mapping: torch.Tensor, num_tokens: int) -> None:
    """Raises ValueError where a kernel would read slots of other tokens, or behind the last one.

    Args:
        slot_mapping: As for `triton_store_kv`.
        num_tokens: Slots that it must have.
    """
    if slot_mapping.shape != (num_tokens,) or not slot_mapping.is_contiguous():
        raise ValueError(
            f"slot_mapping must be contiguous [{num_tokens}], got {list(slot_mapping.shape)} with "
            f"strides {slot_mapping.stride()}"
        )
