"""What stands between the qkv product and attention: norm, turn, store; of the other references.

Source: Qwen Team, "Qwen3 Technical Report", 2025, for the norm of queries and keys; the others
as in `rmsnorm.py`, `rope.py` and `store_kv.py`.
"""

from __future__ import annotations

import torch

from mini_infer_kernels.reference.rmsnorm import reference_gemma_rmsnorm, reference_rmsnorm
from mini_infer_kernels.reference.rope import reference_rope
from mini_infer_kernels.reference.store_kv import reference_store_kv


def reference_qk_norm_rope_store(
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
        heads: [num_tokens, num_q_heads + 2 * num_kv_heads, head_dim], any float type: queries,
            keys, values. What stands at the keys and values afterwards means nothing.
        cos: [num_tokens, 1, width] cosines of the tokens' angles, as for `reference_rope`. Where
            width is less than head_dim, the elements behind it do not turn.
        sin: Sines likewise.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim] of heads' type.
        slot_mapping: [num_tokens] int64, no slot twice; -1 for a row that is not stored.
        q_weight: [head_dim] of heads' type: weights of the queries' norm, or None for no norm.
        k_weight: Those of the keys.
        eps: Added to the mean square.
        gemma: The norm is of Gemma's form, otherwise of Llama's.
    """
    num_kv_heads = cache.shape[2] // 2
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, _ = heads.split_with_sizes((num_q_heads, num_kv_heads, num_kv_heads), 1)
    norm = reference_gemma_rmsnorm if gemma else reference_rmsnorm
    for part, weight in ((query, q_weight), (key, k_weight)):
        if weight is not None:
            part.copy_(norm(part, weight, eps))
    reference_rope(heads[:, : num_q_heads + num_kv_heads, : cos.shape[-1]], cos, sin)
    stored = slot_mapping >= 0
    reference_store_kv(heads[stored, num_q_heads:], cache, slot_mapping[stored])
