"""Embedding: row `token_ids[i]` of the weight, perhaps times a scale.

token_ids: [T]; weight: [vocab_size, hidden_size]; the result: [T, hidden_size].

Source: the scale is that of Vaswani et al., "Attention Is All You Need", 2017, section 3.4, as
Gemma has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

# Elements of a program, 16 bytes of bfloat16 a thread: the best for the gated activations, which
# move memory in the same way (`activation.py`). Not varied for this kernel.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _embedding_kernel(
    token_ids_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    num_blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    token = (program // num_blocks).to(tl.int64)
    columns = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    token_id = tl.load(token_ids_ptr + token).to(tl.int64)
    row = tl.load(weight_ptr + token_id * COLUMNS + columns, mask=inside)
    if scale is not None:
        rounded = tl.cast(scale, row.dtype).to(tl.float32)
        row = (row.to(tl.float32) * rounded).to(row.dtype)
    tl.store(out_ptr + token * COLUMNS + columns, row, mask=inside)


_launch = Launcher(_embedding_kernel)


def triton_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Gathers rows of the weight.

    Args:
        token_ids: [T] int32 or int64, contiguous, on a GPU; each a row of the weight.
        weight: [vocab_size, hidden_size], contiguous, of any float type.
        scale: Factor of the rows, rounded to the weight's type, or None.

    Returns:
        [T, hidden_size], contiguous, of the weight's type.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    if not token_ids.is_contiguous() or not weight.is_contiguous():
        raise ValueError("token_ids and weight must be contiguous: call contiguous() first")
    (num_tokens,) = token_ids.shape
    hidden_size = weight.shape[1]
    out = weight.new_empty((num_tokens, hidden_size))
    if num_tokens == 0:
        return out
    block = min(_BLOCK, 1 << (hidden_size - 1).bit_length())
    _launch(
        num_tokens * -(-hidden_size // block),
        (token_ids, weight, out),
        (),
        (scale if scale is None else float(scale), hidden_size, block),
        _NUM_WARPS,
    )
    return out
