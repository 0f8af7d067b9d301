"""RMSNorm in Triton, alone and behind an addition, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, assert_close, nan_filled_memory, nans, random
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels import rmsnorm  # noqa: E402
from mini_infer_kernels.add_rmsnorm import (  # noqa: E402
    triton_add_rmsnorm,
    triton_gemma_add_rmsnorm,
)
from mini_infer_kernels.reference.add_rmsnorm import (  # noqa: E402
    reference_add_rmsnorm,
    reference_gemma_add_rmsnorm,
)
from mini_infer_kernels.reference.rmsnorm import reference_rmsnorm  # noqa: E402
from mini_infer_kernels.rmsnorm import triton_gemma_rmsnorm, triton_rmsnorm  # noqa: E402

Norm = Callable[..., torch.Tensor]

SHAPES = [(1, 1), (3, 7), (5, 256), (2, 3, 129), (20, 513), (4, 4096), (70,), (2, 16_385), (0, 8)]
NORMS = [triton_rmsnorm, triton_gemma_rmsnorm]
ADD_NORMS = [
    (triton_add_rmsnorm, reference_add_rmsnorm),
    (triton_gemma_add_rmsnorm, reference_gemma_add_rmsnorm),
]
EPS = 1e-5

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with nan_filled_memory():
        yield


@pytest.fixture(params=["few rows", "many rows"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for few rows and for many, whatever their number."""
    monkeypatch.setattr(rmsnorm, "_MANY_ROWS", 0 if request.param == "many rows" else 10**9)


def formula(norm: Norm, x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    x, factor = x.double(), weight.double() + (norm is triton_gemma_rmsnorm)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * factor


@dtypes
@norms
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_rows_and_sizes(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    got = norm(x, weight, EPS)
    assert got.dtype == dtype
    assert got.is_contiguous()
    if x.numel():
        assert_close(got, formula(norm, x, weight))
    assert got.shape == x.shape


@dtypes
@norms
@pytest.mark.usefixtures("launched")
def test_rows_of_a_wider_tensor_reach_only_the_given_place(norm: Norm, dtype: torch.dtype) -> None:
    wide = nans(9, 300, dtype=dtype)
    wide[:, 40:240] = random(9, 200, dtype=dtype)
    weights = nans(260, dtype=dtype)
    weights[:200] = random(200, dtype=dtype, seed=1)
    x, weight = wide[:, 40:240], weights[:200]
    around = nans(11, 200, dtype=dtype)
    got = norm(x, weight, EPS, out=around[1:10])
    assert got.data_ptr() == around[1:10].data_ptr()
    assert_close(around[1:10], formula(norm, x, weight))
    assert around[[0, 10]].isnan().all()


def test_heads_within_a_product() -> None:
    product = random(6, 10, 64)
    weight = random(64, seed=1)
    for heads in (product[:, 2:7], product.transpose(0, 1)):
        assert_close(triton_rmsnorm(heads, weight, EPS), formula(triton_rmsnorm, heads, weight))


@pytest.mark.usefixtures("launched")
def test_in_place() -> None:
    x, weight = random(5, 96), random(96, seed=1)
    expected = formula(triton_rmsnorm, x, weight)
    assert_close(triton_rmsnorm(x, weight, EPS, out=x), expected)
    assert_close(x, expected)


@norms
def test_squares_that_float16_does_not_hold(norm: Norm) -> None:
    x, weight = random(3, 640, dtype=torch.float16), random(640, dtype=torch.float16, seed=1)
    x = x.clamp(-2, 2) * 30_000
    assert_close(norm(x, weight, EPS), formula(norm, x, weight))


@norms
@pytest.mark.parametrize("factor", [1e-4, 0.0])
def test_rows_that_eps_decides(norm: Norm, factor: float) -> None:
    x, weight = random(4, 320) * factor, random(320, seed=1)
    x[3] = 0
    got = norm(x, weight, 1e-2)
    expected = formula(norm, x, weight, 1e-2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@dtypes
@norms
def test_weights_near_zero(norm: Norm, dtype: torch.dtype) -> None:
    """Gemma's 1 + weight is not rounded to the type before the product."""
    x, weight = random(4, 320, dtype=dtype), random(320, dtype=dtype, seed=1) * 1e-3
    exact = formula(norm, x, weight)
    got = norm(x, weight, EPS)
    assert_close(got, exact)
    if norm is triton_gemma_rmsnorm:
        once = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-6
        assert ((got.double() - exact).abs() <= once).all()


def test_llamas_form_rounds_before_the_weight() -> None:
    dtype = torch.float16
    x, weight = random(64, 128, dtype=dtype), random(128, dtype=dtype, seed=1)
    got, expected = triton_rmsnorm(x, weight, EPS), reference_rmsnorm(x, weight, EPS)
    # A norm within float32's error of a tie may round to the other side.
    assert (got != expected).float().mean() < 1e-3


@dtypes
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(("add_norm", "reference"), ADD_NORMS)
@pytest.mark.parametrize("shape", [(1, 5), (3, 128), (7, 1000), (0, 8)], ids=str)
def test_addition(
    add_norm: Norm, reference: Norm, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, columns = shape
    wide_x, wide_residual = (nans(rows + 2, columns + 24, dtype=dtype) for _ in range(2))
    inner = slice(1, rows + 1), slice(8, columns + 8)
    wide_x[inner] = random(*shape, dtype=dtype)
    wide_residual[inner] = random(*shape, dtype=dtype, seed=1)
    x, residual, weight = wide_x[inner], wide_residual[inner], random(columns, dtype=dtype, seed=2)
    expected_sum = residual.clone()
    expected = reference(x, expected_sum, weight, EPS)
    got = add_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected_sum)
    assert int((~wide_residual.isnan()).sum()) == rows * columns
    if rows:
        assert_close(got, expected.double())


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(("add_norm", "reference"), ADD_NORMS)
def test_the_sum_is_rounded_before_it_is_normed(add_norm: Norm, reference: Norm) -> None:
    x, residual = (random(64, 128, dtype=torch.float16, seed=seed) for seed in (0, 1))
    weight = random(128, dtype=torch.float16, seed=2)
    expected = reference(x, residual.clone(), weight, EPS)
    got = add_norm(x, residual, weight, EPS)
    # A norm within float32's error of a tie may round to the other side.
    assert (got != expected).float().mean() < 1e-2


def test_what_is_not_taken_is_said() -> None:
    x, weight = random(4, 32), random(32)
    for kernel in NORMS:
        with pytest.raises(ValueError, match="contiguous"):
            kernel(random(32, 4).t(), weight, EPS)
        with pytest.raises(ValueError, match=r"weight must be contiguous \[32\]"):
            kernel(x, random(31), EPS)
        with pytest.raises(ValueError, match="float32"):
            kernel(x, weight.half(), EPS)
        with pytest.raises(ValueError, match="out must be contiguous"):
            kernel(x, weight, EPS, out=random(4, 64)[:, :32])
        with pytest.raises(ValueError, match="65536"):
            kernel(random(1, 65_537), random(65_537), EPS)
    for add_norm, _ in ADD_NORMS:
        with pytest.raises(ValueError, match="residual"):
            add_norm(x, random(3, 32), weight, EPS)
        with pytest.raises(ValueError, match="residual"):
            add_norm(x, x.half(), weight, EPS)


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
@norms
@pytest.mark.parametrize("shape", [(1, 4096), (65_536, 1024), (5000, 4096), (600_000, 4096)])
def test_at_full_size(norm: Norm, shape: tuple[int, int]) -> None:
    """The last has more elements than 32 bits count."""
    x = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    weight = random(shape[1], dtype=torch.bfloat16)
    got = norm(x, weight, EPS)
    for rows in (slice(0, 500), slice(-500, None)):
        assert_close(got[rows], formula(norm, x[rows], weight))
    assert not got.isnan().any()
