"""The Triton kernels as functions for any program with torch and a GPU.

    from mini_infer.kernels import triton_rmsnorm
    y = triton_rmsnorm(x, weight, eps=1e-5)

They take and return torch tensors on a GPU (or, with TRITON_INTERPRET=1 in the environment, on the
CPU, slowly). This module loads torch and Triton when a kernel is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_infer_kernels.activation import (
        triton_gelu_and_mul,
        triton_gelu_tanh_and_mul,
        triton_silu_and_mul,
    )
    from mini_infer_kernels.add_rmsnorm import triton_add_rmsnorm, triton_gemma_add_rmsnorm
    from mini_infer_kernels.decode_attention import triton_decode_attention
    from mini_infer_kernels.decode_plan import DecodePlan
    from mini_infer_kernels.embedding import triton_embedding
    from mini_infer_kernels.gemv import triton_gemv
    from mini_infer_kernels.prefill_attention import triton_prefill_attention
    from mini_infer_kernels.qk_norm_rope_store import triton_qk_norm_rope_store
    from mini_infer_kernels.rmsnorm import triton_gemma_rmsnorm, triton_rmsnorm
    from mini_infer_kernels.rope import triton_rope
    from mini_infer_kernels.store_kv import triton_store_kv

__all__ = [
    "DecodePlan",
    "triton_add_rmsnorm",
    "triton_decode_attention",
    "triton_embedding",
    "triton_gelu_and_mul",
    "triton_gelu_tanh_and_mul",
    "triton_gemma_add_rmsnorm",
    "triton_gemma_rmsnorm",
    "triton_gemv",
    "triton_prefill_attention",
    "triton_qk_norm_rope_store",
    "triton_rmsnorm",
    "triton_rope",
    "triton_silu_and_mul",
    "triton_store_kv",
]

_MODULES = {
    "DecodePlan": "decode_plan",
    "triton_add_rmsnorm": "add_rmsnorm",
    "triton_decode_attention": "decode_attention",
    "triton_embedding": "embedding",
    "triton_gelu_and_mul": "activation",
    "triton_gelu_tanh_and_mul": "activation",
    "triton_gemma_add_rmsnorm": "add_rmsnorm",
    "triton_gemma_rmsnorm": "rmsnorm",
    "triton_gemv": "gemv",
    "triton_prefill_attention": "prefill_attention",
    "triton_qk_norm_rope_store": "qk_norm_rope_store",
    "triton_rmsnorm": "rmsnorm",
    "triton_rope": "rope",
    "triton_silu_and_mul": "activation",
    "triton_store_kv": "store_kv",
}
"""Where in `mini_infer_kernels` each name is."""


def __getattr__(name: str) -> Any:
    """Imports a kernel when it is first named.

    Raises:
        AttributeError: There is no such kernel.
        ImportError: torch or Triton is not installed.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"mini_infer_kernels.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "triton"):
            raise
        raise ImportError(
            f"{name} needs {error.name}, which is not installed: "
            "run pip install 'mini-infer[engine,triton]'"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value
