"""Few rows times a weight in Triton against the reference: on a GPU, or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mini_infer_kernels.reference.gemv import reference_gemv
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels.gemv import MAX_GEMV_ROWS, max_gemv_rows, triton_gemv  # noqa: E402

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""A rounding of a value of about 2, the size of these results."""
# Rows and columns: one of each, odd ones, a column behind a block, several blocks and a rest.
WEIGHT_SHAPES = [(2, 1), (6, 8), (34, 1000), (18, 1025), (16, 2056)]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def product_of(num_rows: int, weight_shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """x and a weight whose products have about the size of x."""
    x = normal(num_rows, weight_shape[1], dtype=dtype)
    return x, normal(*weight_shape, dtype=dtype, seed=1) / weight_shape[1] ** 0.5


def assert_matches(
    x: torch.Tensor, weight: torch.Tensor, *, pdl: bool = False, **options: Any
) -> torch.Tensor:
    """Calls both on equal inputs; the reference's residual is a copy."""
    residual = options.pop("residual", None)
    copy = None if residual is None else residual.clone()
    expected = reference_gemv(x, weight, residual=copy, **options)
    actual = triton_gemv(x, weight, residual=residual, pdl=pdl, **options)
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    return actual


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(*args, torch.nan, **kwargs)

    monkeypatch.setattr("mini_infer_kernels.gemv.torch.empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", WEIGHT_SHAPES, ids=str)
def test_product(weight_shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches(*product_of(1, weight_shape, dtype))


@pytest.mark.parametrize("num_rows", range(1, MAX_GEMV_ROWS + 1))
def test_each_number_of_rows(num_rows: int) -> None:
    x, weight = product_of(num_rows, (34, 1032), torch.bfloat16)
    norm_weight = normal(1032, dtype=torch.bfloat16, seed=2)
    options = {"norm_weight": norm_weight, "eps": EPS, "out_dtype": torch.float32}
    assert_matches(x, weight, **options)
    assert_matches(x, weight, **options, pdl=True)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norm(scale: float, gemma: bool) -> None:
    """Small rows show eps, which stands beside the mean square and not beside the sum."""
    x, weight = product_of(2, (10, 1100), torch.float32)
    norm_weight = normal(1100, dtype=torch.float32, seed=2)
    assert_matches(x * scale, weight, norm_weight=norm_weight, eps=EPS, gemma=gemma)


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("half", [1, 5, 16])
def test_gate(half: int, gate: str) -> None:
    x, weight = product_of(2, (2 * half, 72), torch.float32)
    bias = normal(2 * half, dtype=torch.float32, seed=2)
    norm_weight = normal(72, dtype=torch.float32, seed=3)
    assert_matches(4 * x, weight, bias=bias, norm_weight=norm_weight, eps=EPS, gate=gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "silu"])
def test_residual_is_overwritten_and_returned(gate: str | None, dtype: torch.dtype) -> None:
    x, weight = product_of(3, (22, 40), dtype)
    size = 22 if gate is None else 11
    wider = normal(3, size + 5, dtype=dtype, seed=2)
    behind = wider[:, size:].clone()
    residual = wider[:, :size]
    assert assert_matches(x, weight, residual=residual, gate=gate) is residual
    assert torch.equal(wider[:, size:], behind)


def test_sum_with_the_residual_is_rounded_once() -> None:
    """Rounded to float16 by itself, this product is 1, and its sum with the residual 1 again."""
    weight = torch.tensor([[1.0, 2**-11]], dtype=torch.float16, device=DEVICE)
    residual = torch.full((1, 1), 2**-12, dtype=torch.float16, device=DEVICE)
    triton_gemv(torch.ones_like(weight), weight, residual=residual)
    assert residual.item() == 1 + 2**-10


def test_rows_of_wider_tensors() -> None:
    """x, weight and norm may be parts of others; nothing outside of them is read."""
    wide_x = torch.full((2, 64), torch.nan, device=DEVICE)
    wide_weight = torch.full((14, 64), torch.nan, device=DEVICE)
    x, weight = wide_x[:, 3:44], wide_weight[2:12, 7:48]
    x.copy_(normal(2, 41, dtype=torch.float32))
    weight.copy_(normal(10, 41, dtype=torch.float32, seed=1))
    assert_matches(x, weight / 6)
    padded = torch.full((48,), torch.nan, device=DEVICE)
    padded[:41] = normal(41, dtype=torch.float32, seed=2)
    actual = assert_matches(x, weight, norm_weight=padded[:41], eps=EPS, gate="gelu")
    assert torch.isfinite(actual).all()


def test_no_rows() -> None:
    """A step whose prompts are not complete yet has no logits."""
    x, weight = product_of(0, (8, 64), torch.bfloat16)
    assert triton_gemv(x, weight, out_dtype=torch.float32).shape == (0, 8)
    assert triton_gemv(x, weight, gate="silu").shape == (0, 4)
    residual = torch.zeros(0, 8, dtype=torch.bfloat16, device=DEVICE)
    assert triton_gemv(x, weight, residual=residual) is residual


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_type_of_the_result(out_dtype: torch.dtype) -> None:
    x, weight = product_of(1, (8, 64), torch.bfloat16)
    assert assert_matches(x, weight, out_dtype=out_dtype).dtype is out_dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(MAX_GEMV_ROWS + 1, 8)}, "4 rows, got 5"),
        ({"x": torch.zeros(1, 16)}, r"weight must be \[N, 16\]"),
        ({"weight": torch.zeros(6, 8, dtype=torch.float16)}, "float32"),
        ({"weight": torch.zeros(8, 6).t()}, "contiguous"),
        ({"x": torch.zeros(1, 16)[:, ::2]}, "contiguous"),
        ({"gate": "relu"}, "gate must be"),
        ({"gate": "silu", "weight": torch.zeros(5, 8)}, "even"),
        ({"bias": torch.zeros(5)}, r"bias must be contiguous \[6\]"),
        ({"bias": torch.zeros(12)[::2]}, "bias must be contiguous"),
        ({"norm_weight": torch.zeros(6)}, r"norm_weight must be contiguous \[8\]"),
        ({"norm_weight": torch.zeros(8).half()}, "float32"),
        ({"residual": torch.zeros(1, 5)}, r"\[1, 6\]"),
        ({"residual": torch.zeros(1, 6), "gate": "silu"}, r"\[1, 3\]"),
        ({"residual": torch.zeros(1, 6), "out_dtype": torch.float32}, "out_dtype"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 8), "weight": torch.zeros(6, 8), **options}
    with pytest.raises(ValueError, match=message):
        triton_gemv(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("num_rows", [1, 4])
def test_layers_in_a_graph_with_dependent_launches(num_rows: int) -> None:
    """A chain of products, each of which reads what the one before it has just written."""
    hidden, intermediate, num_layers = 1024, 3072, 8
    dtype = torch.bfloat16
    gate_up = [
        normal(2 * intermediate, hidden, dtype=dtype, seed=i) / 32 for i in range(num_layers)
    ]
    down = [normal(hidden, intermediate, dtype=dtype, seed=100 + i) / 55 for i in range(num_layers)]
    norm_weight = normal(hidden, dtype=dtype, seed=99)
    inputs = normal(num_rows, hidden, dtype=dtype)

    def forward(stream: torch.Tensor, gemv: Any, **options: Any) -> torch.Tensor:
        for one, other in zip(gate_up, down, strict=True):
            inner = gemv(stream, one, norm_weight=norm_weight, eps=EPS, gate="silu", **options)
            gemv(inner, other, residual=stream, **options)
        return stream

    expected = forward(inputs.clone(), triton_gemv)
    reference = forward(inputs.clone(), reference_gemv)
    torch.testing.assert_close(expected, reference, rtol=0.05, atol=0.1)
    stream = inputs.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(stream, triton_gemv, pdl=True)
    for _ in range(20):
        stream.copy_(inputs)
        graph.replay()
        assert torch.equal(stream, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
def test_weight_of_more_than_2_to_the_31_elements() -> None:
    num_rows, num_columns = 2**19 + 8, 4096
    weight = torch.zeros(num_rows, num_columns, dtype=torch.bfloat16, device=DEVICE)
    weight[-3, 5] = 2.0
    x = torch.ones(1, num_columns, dtype=torch.bfloat16, device=DEVICE)
    result = triton_gemv(x, weight)
    assert result[0, -3] == 2.0
    assert result.sum() == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
@pytest.mark.parametrize(
    ("weight_shape", "gate"),
    [
        ((6144, 4096), None),
        ((28672, 4096), "silu"),
        ((4096, 14336), None),
        ((4096, 11008), None),
        ((1024, 3072), None),
        ((1024, 2048), None),
        ((6144, 1024), "silu"),
    ],
    ids=str,
)
def test_shapes_of_models(weight_shape: tuple[int, int], gate: str | None) -> None:
    norm_weight = normal(weight_shape[1], dtype=torch.bfloat16, seed=2)
    for num_rows in (1, max_gemv_rows(weight_shape[1])):
        x, weight = product_of(num_rows, weight_shape, torch.bfloat16)
        assert_matches(x, weight, norm_weight=norm_weight, eps=EPS, gate=gate, pdl=True)
