"""The operations that a model is made of, as one object, so that a set replaces another op by op.

A set and a device are separate choices: the references run on any torch device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mini_infer_kernels.reference.activation import (
    reference_gelu_and_mul,
    reference_gelu_tanh_and_mul,
    reference_silu_and_mul,
)
from mini_infer_kernels.reference.paged_attention import (
    reference_decode_attention,
    reference_prefill_attention,
)
from mini_infer_kernels.reference.rmsnorm import reference_gemma_rmsnorm, reference_rmsnorm
from mini_infer_kernels.reference.rope import reference_rope
from mini_infer_kernels.reference.store_kv import reference_store_kv


@dataclass(frozen=True, slots=True)
class KernelSet:
    """One implementation of each operation; the references' docstrings are the contracts."""

    rmsnorm: Callable[..., torch.Tensor]
    gemma_rmsnorm: Callable[..., torch.Tensor]
    rope: Callable[..., None]
    silu_and_mul: Callable[..., torch.Tensor]
    gelu_and_mul: Callable[..., torch.Tensor]
    gelu_tanh_and_mul: Callable[..., torch.Tensor]
    store_kv: Callable[..., None]
    decode_attention: Callable[..., torch.Tensor]
    prefill_attention: Callable[..., torch.Tensor]


REFERENCE = KernelSet(
    rmsnorm=reference_rmsnorm,
    gemma_rmsnorm=reference_gemma_rmsnorm,
    rope=reference_rope,
    silu_and_mul=reference_silu_and_mul,
    gelu_and_mul=reference_gelu_and_mul,
    gelu_tanh_and_mul=reference_gelu_tanh_and_mul,
    store_kv=reference_store_kv,
    decode_attention=reference_decode_attention,
    prefill_attention=reference_prefill_attention,
)
