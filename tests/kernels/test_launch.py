"""Launches find the compiled form that fits: types, beginnings, rows and constants in any order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from elementwise_cases import DTYPES, assert_close, random
from triton_functions import prepare_triton

prepare_triton()

from mini_infer_kernels.activation import (  # noqa: E402
    triton_gelu_tanh_and_mul,
    triton_silu_and_mul,
)
from mini_infer_kernels.embedding import triton_embedding  # noqa: E402
from mini_infer_kernels.reference.activation import (  # noqa: E402
    reference_gelu_tanh_and_mul,
    reference_silu_and_mul,
)
from mini_infer_kernels.rmsnorm import triton_rmsnorm  # noqa: E402


@pytest.mark.parametrize("eps", [1, 1e-5])
def test_forms_are_not_mixed_up(eps: float) -> None:
    """Twice each: the second launch takes what the first one compiled, if it may."""
    combinations = list(product(DTYPES, (0, 1, 3), (1, 16, 5), (64, 100)))
    for dtype, offset, rows, columns in combinations + combinations[::-1]:
        x = random(rows * columns + offset, dtype=dtype)[offset:].view(rows, columns)
        weight = random(columns, dtype=dtype, seed=1)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        assert_close(triton_rmsnorm(x, weight, eps), exact * weight.double())


def test_constants_and_absent_arguments_are_told_apart() -> None:
    gate_up, weight = random(2, 32), random(8, 32)
    token_ids = torch.tensor([3, 0], device=weight.device)
    for _ in range(2):
        assert_close(triton_silu_and_mul(gate_up), reference_silu_and_mul(gate_up))
        assert_close(triton_gelu_tanh_and_mul(gate_up), reference_gelu_tanh_and_mul(gate_up))
        for scale in (None, 2, 2.0, 3.0):
            expected = weight[token_ids] * (scale or 1)
            assert torch.equal(triton_embedding(token_ids, weight, scale), expected)
