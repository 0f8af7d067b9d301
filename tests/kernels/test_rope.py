"""The rotary embedding in Triton against the formula in float64, and the store of keys and values.

The store stands here since it is tested on the same tensors: heads of a wider product.
"""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, assert_close, nans, random, turns
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels import rope  # noqa: E402
from mini_infer_kernels.reference.rope import reference_rope  # noqa: E402
from mini_infer_kernels.reference.store_kv import reference_store_kv  # noqa: E402
from mini_infer_kernels.rope import triton_rope  # noqa: E402
from mini_infer_kernels.store_kv import triton_store_kv  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["few tokens", "many tokens"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tiles of the kernel, whatever the number of tokens."""
    monkeypatch.setattr(rope, "_FEW_TOKENS", 0 if request.param == "many tokens" else 10**9)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    (first, second), cos, sin = x.double().chunk(2, -1), cos.double(), sin.double()
    cos, sin = cos[..., :half], sin[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dtypes
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(
    ("heads", "head_dim", "width"),
    [(1, 2, 2), (3, 10, 6), (5, 128, 128), (17, 80, 80), (40, 64, 16), (2, 256, 256), (9, 96, 72)],
)
def test_turns_the_given_elements_and_no_other(
    dtype: torch.dtype, heads: int, head_dim: int, width: int
) -> None:
    product = random(5, heads + 3, head_dim, dtype=dtype)
    product[:, heads:] = torch.nan
    product[:, :, width:] = torch.nan
    cos, sin = turns(5, width, dtype)
    x = product[:, :heads, :width]
    expected = turned(x, cos, sin)
    triton_rope(x, cos, sin)
    assert_close(x, expected)
    assert int((~product.isnan()).sum()) == 5 * heads * width


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_less_than_the_reference(dtype: torch.dtype) -> None:
    x = random(4, 6, 32, dtype=dtype)
    cos, sin = turns(4, 32, dtype)
    exact, theirs = turned(x, cos, sin), x.clone()
    reference_rope(theirs, cos, sin)
    triton_rope(x, cos, sin)
    ours, others = (x.double() - exact).norm(), (theirs.double() - exact).norm()
    assert ours < others


def test_heads_in_any_order_of_strides() -> None:
    x = random(6, 4, 16).transpose(0, 1)
    cos, sin = turns(4, 16, torch.float32)
    expected = turned(x, cos, sin)
    triton_rope(x, cos, sin)
    assert_close(x, expected)


def test_heads_that_32_bits_do_not_reach() -> None:
    """Of gigabytes that are never touched, but for the heads."""
    width, head_stride = 16, 2**30
    memory = torch.empty(2 * head_stride + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((2, 3, width), (width, head_stride, 1))
    x.copy_(random(2, 3, width, dtype=torch.float16))
    cos, sin = turns(2, width, torch.float16)
    expected = turned(x, cos, sin)
    triton_rope(x, cos, sin)
    assert_close(x, expected)


def test_no_tokens() -> None:
    triton_rope(random(0, 4, 16), *turns(0, 16, torch.float32))


def test_what_is_not_taken_is_said() -> None:
    cos, sin = turns(3, 8, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        triton_rope(random(3, 8, 4).transpose(1, 2), cos, sin)
    with pytest.raises(ValueError, match="must be"):
        triton_rope(random(3, 4, 16), cos, sin)
    with pytest.raises(ValueError, match="must be"):
        triton_rope(random(2, 4, 8), cos, sin)
    with pytest.raises(ValueError, match="pairs"):
        triton_rope(random(3, 4, 7), cos[..., :7], sin[..., :7])


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
@pytest.mark.parametrize("num_tokens", [64, 65_536, 500_000])
def test_at_full_size(num_tokens: int) -> None:
    """The last has more elements than 32 bits count."""
    x = torch.randn(num_tokens, 48, 128, dtype=torch.bfloat16, device=DEVICE)
    cos, sin = turns(num_tokens, 128, torch.bfloat16)
    before = x[-40:].clone()
    triton_rope(x[:, :40], cos, sin)
    assert_close(x[-40:, :40], turned(before[:, :40], cos[-40:], sin[-40:]))
    assert torch.equal(x[-40:, 40:], before[:, 40:])


@dtypes
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 8), (4, 80), (16, 128), (6, 200)])
def test_stores_each_row_in_its_slot_and_nothing_elsewhere(
    dtype: torch.dtype, heads: int, head_dim: int
) -> None:
    product = nans(7, heads + 3, head_dim, dtype=dtype)
    product[:, 3:] = random(7, heads, head_dim, dtype=dtype)
    cache, expected = (nans(5, 3, heads, head_dim, dtype=dtype) for _ in range(2))
    slots = torch.tensor([14, -1, 0, 7, -1, 3, 8], device=DEVICE)
    triton_store_kv(product[:, 3:], cache, slots)
    stored = slots >= 0
    reference_store_kv(product[stored, 3:], expected, slots[stored])
    assert torch.equal(cache.nan_to_num(9e3), expected.nan_to_num(9e3))


def test_stores_refuse_other_layouts() -> None:
    cache, slots = random(2, 4, 6, 8), torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="adjacent"):
        triton_store_kv(random(6, 3, 8).transpose(0, 1), cache, slots)
    with pytest.raises(ValueError, match="cache must be"):
        triton_store_kv(random(3, 4, 8), cache, slots)
    with pytest.raises(ValueError, match="cache must be"):
        triton_store_kv(random(3, 6, 8).half(), cache, slots)
    with pytest.raises(ValueError, match="one layer"):
        triton_store_kv(random(3, 6, 8), random(2, 3, 4, 6, 8)[:, 1], slots)
    for others in (slots[:2], torch.arange(6, device=DEVICE)[::2]):
        with pytest.raises(ValueError, match=r"slot_mapping must be contiguous \[3\]"):
            triton_store_kv(random(3, 6, 8), cache, others)
