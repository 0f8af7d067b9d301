"""What sampling is made of, as one object, so that Triton's functions replace the references.

`choose_tokens` comes last: what a request asks of `add_to_logits` and `apply_penalties` has
changed the logits before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mini_infer_kernels.draw_controls import NON_FINITE, NOTHING_ALLOWED, OK, DrawControls
from mini_infer_kernels.reference.penalties import (
    reference_add_to_logits,
    reference_apply_penalties,
    reference_count_tokens,
    reference_reset_counts,
)
from mini_infer_kernels.reference.sampling import reference_choose_tokens
from mini_infer_kernels.reference.token_logprobs import reference_token_logprobs
from mini_infer_kernels.token_counts import TokenCounts

__all__ = [
    "NON_FINITE",
    "NOTHING_ALLOWED",
    "OK",
    "REFERENCE_SAMPLING",
    "DrawControls",
    "SamplingKernels",
    "TokenCounts",
    "triton_sampling",
]


@dataclass(frozen=True, slots=True)
class SamplingKernels:
    """One implementation of each function; the references' docstrings are the contracts."""

    add_to_logits: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    reset_counts: Callable[[TokenCounts, torch.Tensor], None]
    count_tokens: Callable[[TokenCounts, torch.Tensor, torch.Tensor, torch.Tensor], None]
    apply_penalties: Callable[
        [torch.Tensor, TokenCounts, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
    ]
    choose_tokens: Callable[[torch.Tensor, DrawControls], tuple[torch.Tensor, torch.Tensor]]
    token_logprobs: Callable[
        [torch.Tensor, torch.Tensor, int],
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ]


REFERENCE_SAMPLING = SamplingKernels(
    add_to_logits=reference_add_to_logits,
    reset_counts=reference_reset_counts,
    count_tokens=reference_count_tokens,
    apply_penalties=reference_apply_penalties,
    choose_tokens=reference_choose_tokens,
    token_logprobs=reference_token_logprobs,
)


def triton_sampling() -> SamplingKernels:
    """The same functions in Triton, for CUDA devices.

    Raises:
        ImportError: If Triton is not installed.
    """
    from mini_infer_kernels.sampling.choose import triton_choose_tokens
    from mini_infer_kernels.sampling.logprobs import triton_token_logprobs
    from mini_infer_kernels.sampling.penalties import (
        triton_add_to_logits,
        triton_apply_penalties,
        triton_count_tokens,
        triton_reset_counts,
    )

    return SamplingKernels(
        add_to_logits=triton_add_to_logits,
        reset_counts=triton_reset_counts,
        count_tokens=triton_count_tokens,
        apply_penalties=triton_apply_penalties,
        choose_tokens=triton_choose_tokens,
        token_logprobs=triton_token_logprobs,
    )
