"""The operations that a model is made of, as one object, so that a set replaces another op by op.

A set and a device are separate choices: the references run on any torch device. Attention is not
among them: what it takes differs too much (`mini_infer_engine/layers/attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mini_infer_kernels.reference.activation import (
    reference_gelu_and_mul,
    reference_gelu_tanh_and_mul,
    reference_silu_and_mul,
)
from mini_infer_kernels.reference.embedding import reference_embedding
from mini_infer_kernels.reference.qk_norm_rope_store import reference_qk_norm_rope_store
from mini_infer_kernels.reference.rmsnorm import reference_gemma_rmsnorm, reference_rmsnorm


@dataclass(frozen=True, slots=True)
class GemvKernel:
    """Products of a few rows.

    Attributes:
        run: As `triton_gemv`.
        max_rows: Gives the rows up to which it is worth while, for a weight's number of columns.
    """

    run: Callable[..., torch.Tensor]
    max_rows: Callable[[int], int]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it should compute the product of [rows, columns] with a weight."""
        return len(x) <= self.max_rows(x.shape[1])


@dataclass(frozen=True, slots=True)
class KernelSet:
    """One implementation of each operation; the references' docstrings are the contracts.

    Attributes:
        rmsnorm: Llama's norm.
        gemma_rmsnorm: Gemma's.
        qk_norm_rope_store: Norms and turns the heads of new tokens, and fills the cache.
        silu_and_mul: The gate of SwiGLU.
        gelu_and_mul: The gate of GEGLU.
        gelu_tanh_and_mul: The gate of GEGLU by its approximation.
        embedding: Rows of a table.
        gemv: Products of few rows; None leaves them to torch.
    """

    rmsnorm: Callable[..., torch.Tensor]
    gemma_rmsnorm: Callable[..., torch.Tensor]
    qk_norm_rope_store: Callable[..., None]
    silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    gelu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    gelu_tanh_and_mul: Callable[[torch.Tensor], torch.Tensor]
    embedding: Callable[..., torch.Tensor]
    gemv: GemvKernel | None = None


REFERENCE = KernelSet(
    rmsnorm=reference_rmsnorm,
    gemma_rmsnorm=reference_gemma_rmsnorm,
    qk_norm_rope_store=reference_qk_norm_rope_store,
    silu_and_mul=reference_silu_and_mul,
    gelu_and_mul=reference_gelu_and_mul,
    gelu_tanh_and_mul=reference_gelu_tanh_and_mul,
    embedding=reference_embedding,
)


def triton_kernels() -> KernelSet:
    """The same operations in Triton, for CUDA devices.

    Raises:
        ImportError: If Triton is not installed.
    """
    from mini_infer_kernels.activation import (
        triton_gelu_and_mul,
        triton_gelu_tanh_and_mul,
        triton_silu_and_mul,
    )
    from mini_infer_kernels.embedding import triton_embedding
    from mini_infer_kernels.gemv import max_gemv_rows, triton_gemv
    from mini_infer_kernels.qk_norm_rope_store import triton_qk_norm_rope_store
    from mini_infer_kernels.rmsnorm import triton_gemma_rmsnorm, triton_rmsnorm

    return KernelSet(
        rmsnorm=triton_rmsnorm,
        gemma_rmsnorm=triton_gemma_rmsnorm,
        qk_norm_rope_store=triton_qk_norm_rope_store,
        silu_and_mul=triton_silu_and_mul,
        gelu_and_mul=triton_gelu_and_mul,
        gelu_tanh_and_mul=triton_gelu_tanh_and_mul,
        embedding=triton_embedding,
        # Kernels before and behind it need nothing of their own: it waits for their results.
        gemv=GemvKernel(partial(triton_gemv, pdl=True), max_gemv_rows),
    )
