"""The fused step between the qkv product and attention against its reference in float32."""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, assert_close, nans, random, turns
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels import qk_norm_rope_store  # noqa: E402
from mini_infer_kernels.qk_norm_rope_store import triton_qk_norm_rope_store  # noqa: E402
from mini_infer_kernels.reference.qk_norm_rope_store import (  # noqa: E402
    reference_qk_norm_rope_store,
)

EPS = 1e-6
SLOTS = [7, -1, 0, 14, -1, 4]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["few tokens", "many tokens"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tiles of the kernel, whatever the number of tokens."""
    bound = 0 if request.param == "many tokens" else 10**9
    monkeypatch.setattr(qk_norm_rope_store, "_FEW_TOKENS", bound)


def product(
    q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, num_tokens: int = len(SLOTS)
) -> torch.Tensor:
    """Heads of tokens that lie apart, with NaN between them."""
    size = (q_heads + 2 * kv_heads) * head_dim
    wide = nans(num_tokens, size + 16, dtype=dtype)
    wide[:, :size] = random(num_tokens, size, dtype=dtype)
    return wide[:, :size].unflatten(1, (-1, head_dim))


@dtypes
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("form", ["plain", "llama", "gemma"])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "width"),
    [
        (4, 2, 32, 32),
        (1, 1, 8, 2),
        (7, 1, 80, 80),
        (40, 8, 64, 24),
        (3, 3, 96, 72),
        (2, 1, 256, 64),
    ],
)
def test_all_shapes(
    dtype: torch.dtype, form: str, q_heads: int, kv_heads: int, head_dim: int, width: int
) -> None:
    heads = product(q_heads, kv_heads, head_dim, dtype)
    cache = nans(5, 3, 2 * kv_heads, head_dim, dtype=dtype)
    cos, sin = turns(len(SLOTS), width, dtype)
    slots = torch.tensor(SLOTS, device=DEVICE)
    weights = tuple(random(head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    given = (None, None) if form == "plain" else weights
    exact, exact_cache = heads.float(), cache.float()
    gemma = form == "gemma"
    reference_qk_norm_rope_store(
        exact, cos.float(), sin.float(), exact_cache, slots,
        *(each if each is None else each.float() for each in given), EPS, gemma,
    )  # fmt: skip
    triton_qk_norm_rope_store(heads, cos, sin, cache, slots, *given, eps=EPS, gemma=gemma)
    assert_close(heads[:, :q_heads], exact[:, :q_heads])
    assert torch.equal(cache.isnan(), exact_cache.isnan())
    keys, values = cache.nan_to_num(0).chunk(2, 2)
    exact_keys, exact_values = exact_cache.nan_to_num(0).chunk(2, 2)
    assert_close(keys, exact_keys)
    assert torch.equal(values.float(), exact_values)


def test_values_pass_whatever_they_are() -> None:
    """Bit by bit, also those that a norm or a float16 would not hold."""
    heads = product(2, 2, 16, torch.float16)
    heads[:, 4] = 65_504
    heads[:, 5] = 0
    cache = nans(5, 3, 4, 16, dtype=torch.float16)
    weight = random(16, dtype=torch.float16)
    cos, sin = turns(len(SLOTS), 16, torch.float16)
    slots = torch.arange(len(SLOTS), device=DEVICE)
    triton_qk_norm_rope_store(heads, cos, sin, cache, slots, weight, weight, EPS)
    stored = cache.flatten(0, 1)[: len(SLOTS)]
    assert (stored[:, 2] == 65_504).all()
    assert (stored[:, 3] == 0).all()


def test_no_tokens() -> None:
    cache = random(1, 2, 2, 8)
    before = cache.clone()
    slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    triton_qk_norm_rope_store(random(0, 4, 8), *turns(0, 8, torch.float32), cache, slots)
    assert torch.equal(cache, before)


def test_what_is_not_taken_is_said() -> None:
    heads, cache, slots = random(3, 8, 16), random(2, 4, 4, 16), torch.arange(3, device=DEVICE)
    cos, sin = turns(3, 16, torch.float32)
    weight = random(16)
    with pytest.raises(ValueError, match="or neither"):
        triton_qk_norm_rope_store(heads, cos, sin, cache, slots, q_weight=weight)
    for weights in ((weight, random(8)), (weight.half(), weight)):
        with pytest.raises(ValueError, match=r"weight must be contiguous \[16\]"):
            triton_qk_norm_rope_store(heads, cos, sin, cache, slots, *weights)
    with pytest.raises(ValueError, match=r"slot_mapping must be contiguous \[3\]"):
        triton_qk_norm_rope_store(heads, cos, sin, cache, slots[:2])
    with pytest.raises(ValueError, match="adjacent"):
        triton_qk_norm_rope_store(heads.transpose(0, 1), cos, sin, cache, slots)
    with pytest.raises(ValueError, match="cos and sin"):
        triton_qk_norm_rope_store(heads[:2], cos, sin, cache, slots)
    with pytest.raises(ValueError, match="wider"):
        triton_qk_norm_rope_store(heads, *turns(3, 32, torch.float32), cache, slots)
    with pytest.raises(ValueError, match="more are cached"):
        triton_qk_norm_rope_store(heads[:, :4].contiguous(), cos, sin, cache, slots)
    with pytest.raises(ValueError, match="one layer"):
        triton_qk_norm_rope_store(heads, cos, sin, random(2, 3, 4, 4, 16)[:, 1], slots)


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 64, 3000])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(16, 8), (32, 8), (32, 32)])
def test_in_a_cache_that_32_bits_do_not_count(num_tokens: int, q_heads: int, kv_heads: int) -> None:
    dtype = torch.bfloat16
    heads = product(q_heads, kv_heads, 128, dtype, num_tokens)
    num_blocks = 2**31 // (16 * 2 * kv_heads * 128) + 300
    cache = torch.empty(num_blocks, 16, 2 * kv_heads, 128, dtype=dtype, device=DEVICE)
    cos, sin = turns(num_tokens, 128, dtype)
    last = 16 * num_blocks - 1
    slots = last - torch.randperm(4096, device=DEVICE)[:num_tokens]
    weights = [random(128, dtype=dtype, seed=seed) for seed in (1, 2)]
    exact = heads.float()
    small = torch.empty(256, 16, 2 * kv_heads, 128, device=DEVICE)
    reference_qk_norm_rope_store(
        exact, cos.float(), sin.float(), small, last - slots, *(w.float() for w in weights), EPS
    )
    triton_qk_norm_rope_store(heads, cos, sin, cache, slots, *weights, EPS)
    assert_close(heads[:, :q_heads], exact[:, :q_heads])
    assert_close(cache.flatten(0, 1)[slots], small.flatten(0, 1)[last - slots])
