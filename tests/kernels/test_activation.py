"""Gated activations in Triton against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, assert_close, nan_filled_memory, nans, random
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels.activation import (  # noqa: E402
    triton_gelu_and_mul,
    triton_gelu_tanh_and_mul,
    triton_silu_and_mul,
)

Function = Callable[[torch.Tensor], torch.Tensor]


def tanh_form(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


ACTIVATIONS = [
    (triton_silu_and_mul, lambda x: x / (1 + (-x).exp())),
    (triton_gelu_and_mul, lambda x: x / 2 * (1 + (x / math.sqrt(2)).erf())),
    (triton_gelu_tanh_and_mul, tanh_form),
]

# Triton's interpreter computes with NumPy, which warns where a GPU would go on with infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
activations = pytest.mark.parametrize(
    ("activation", "formula"), ACTIVATIONS, ids=lambda each: each.__name__
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with nan_filled_memory():
        yield


@dtypes
@activations
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 129), (5, 1024), (2, 2050), (0, 4)])
def test_all_sizes(
    activation: Function, formula: Function, rows: int, columns: int, dtype: torch.dtype
) -> None:
    wide = nans(rows, 2 * columns + 24, dtype=dtype)
    gate_up = wide[:, 8 : 2 * columns + 8]
    gate_up.copy_(3 * random(rows, 2 * columns, dtype=dtype))
    got = activation(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    assert got.dtype == dtype
    assert got.shape == gate.shape
    if rows:
        assert_close(got, formula(gate) * up)


@activations
def test_far_gates_are_shut_or_open(activation: Function, formula: Function) -> None:
    gates = torch.tensor([-3e38, -1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], device=DEVICE)
    gate_up = torch.cat((gates, torch.full_like(gates, 2.0)))[None]
    expected = torch.tensor([[0.0, 0, 0, 0, 0, 60, 200, 2e4]], device=DEVICE)
    torch.testing.assert_close(activation(gate_up), expected, rtol=1e-6, atol=1e-10)


def test_what_is_not_taken_is_said() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        triton_silu_and_mul(random(8, 3).t())
    with pytest.raises(ValueError, match="two halves"):
        triton_silu_and_mul(random(3, 7))


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
@activations
@pytest.mark.parametrize("rows", [1, 64, 90_000])
def test_at_full_size(activation: Function, formula: Function, rows: int) -> None:
    """The last has more elements than 32 bits count."""
    gate_up = torch.randn(rows, 2 * 14_336, dtype=torch.bfloat16, device=DEVICE)
    got = activation(gate_up)
    gate, up = gate_up[-100:].double().chunk(2, -1)
    assert_close(got[-100:], formula(gate) * up)
    assert not got.isnan().any()
