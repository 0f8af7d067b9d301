"""The plain-torch references against formulas written out in float64, one element at a time."""

from __future__ import annotations

import math

import pytest
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

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BLOCK_SIZE = 4

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative error of the whole tensor; NaN never passes."""
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCES[actual.dtype]


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 256), (2, 3, 129)], ids=str)
def test_rmsnorm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    mean = x.double().square().sum(-1, keepdim=True) / shape[-1]
    got = reference_rmsnorm(x, weight, 1e-5)
    normed = x.double() / (mean + 1e-5).sqrt()
    assert_close(got, normed * weight.double())
    assert got.dtype == dtype
    gemma = reference_gemma_rmsnorm(x, weight, 1e-5)
    assert_close(gemma, normed * (1 + weight.double()))
    assert gemma.dtype == dtype


def test_gemma_rmsnorm_rounds_once() -> None:
    x, weight = torch.randn(64, 32).bfloat16(), (torch.randn(32) / 8).bfloat16()
    exact = reference_gemma_rmsnorm(x.float(), weight.float(), 1e-5)
    assert torch.equal(reference_gemma_rmsnorm(x, weight, 1e-5), exact.bfloat16())


@dtypes
@pytest.mark.parametrize("width", [10, 6])
def test_rope_turns_each_pair_by_its_angle(dtype: torch.dtype, width: int) -> None:
    angles = torch.rand(3, width // 2, dtype=torch.float64) * 7
    angles[0] = 0
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    heads = torch.randn(3, 3, 10).to(dtype)
    before = heads.clone()
    turning = heads[:, :2, :width]
    reference_rope(
        turning, torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    )
    x, (first, second) = before.double(), before[:, :2, :width].double().chunk(2, -1)
    x[:, :2, :width] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    assert_close(turning, x[:, :2, :width])
    assert torch.equal(heads[:, 2:], before[:, 2:])
    assert torch.equal(heads[:, :2, width:], before[:, :2, width:])
    assert torch.equal(heads[0], before[0])


@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 14).to(dtype)
    gate, up = gate_up[:, :7].double(), gate_up[:, 7:].double()
    assert_close(reference_silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)


@dtypes
def test_gelu_and_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 14).to(dtype)
    gate, up = gate_up[:, :7].double(), gate_up[:, 7:].double()
    normal = (1 + torch.erf(gate / math.sqrt(2))) / 2
    assert_close(reference_gelu_and_mul(gate_up), gate * normal * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    assert_close(reference_gelu_tanh_and_mul(gate_up), gate * (1 + inner.tanh()) / 2 * up)


def test_store_kv_writes_its_slots_and_no_others() -> None:
    cache = torch.full((6, BLOCK_SIZE, 4, 3), torch.nan)
    new = torch.randn(3, 4, 3)
    slots = [21, 0, 7]
    reference_store_kv(new, cache, torch.tensor(slots))
    flat = cache.view(-1, 4, 3)
    assert torch.equal(flat[slots], new)
    assert flat.isfinite().all(-1).all(-1).sum() == len(slots)


def paged(
    contexts: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Sequences of random keys and values in shuffled blocks; slots behind them hold 1e4."""
    most = max(-(-context // BLOCK_SIZE) for context in contexts)
    order = torch.randperm(len(contexts) * most + 3)
    cache = torch.full((len(order), BLOCK_SIZE, 2 * num_kv_heads, head_dim), 1e4).to(dtype)
    tables = torch.zeros(len(contexts), most, dtype=torch.int64)
    dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for row, context in enumerate(contexts):
        used = -(-context // BLOCK_SIZE)
        tables[row, :used] = order[row * most : row * most + used]
        for half, sequences in zip(cache.split(num_kv_heads, 2), dense, strict=True):
            sequences.append(torch.randn(context, num_kv_heads, head_dim).to(dtype))
            for token in range(context):
                block = tables[row, token // BLOCK_SIZE]
                half[block, token % BLOCK_SIZE] = sequences[-1][token]
    return cache, tables, *dense


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, scaled by 0.3, in float64."""
    length, num_q_heads, _ = query.shape
    group = num_q_heads // keys.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for token in range(length):
        end = len(keys) - length + token + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        for head in range(num_q_heads):
            scores = keys[seen, head // group].double() @ query[token, head].double() * 0.3
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[token, head] = scores.softmax(0) @ values[seen, head // group].double()
    return out


heads = pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 16), (3, 1, 5)], ids=str
)
kinds = pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (1, None), (3, None), (None, 0.5), (5, 2.0)], ids=str
)


@dtypes
@heads
@kinds
def test_decode_attention(
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    contexts = [1, 4, 5, 19]
    cache, tables, dense_keys, dense_values = paged(contexts, num_kv_heads, head_dim, dtype)
    query = torch.randn(len(contexts), num_q_heads, head_dim).to(dtype)
    slots, ends = torch.arange(tables.shape[1] * BLOCK_SIZE), torch.tensor(contexts)[:, None]
    seen = (slots < ends) & (slots >= ends - (window or 99))
    mask = torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None, None]
    got = reference_decode_attention(query, cache, tables, mask, 0.3, softcap=softcap)
    for row in range(len(contexts)):
        dense = dense_keys[row], dense_values[row]
        expected = dense_attention(query[row : row + 1], *dense, window, softcap)
        assert_close(got[row : row + 1], expected)


@dtypes
@heads
@kinds
def test_prefill_attention(
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    lengths, contexts = [1, 5, 3, 8], [1, 5, 17, 9]
    cache, tables, dense_keys, dense_values = paged(contexts, num_kv_heads, head_dim, dtype)
    query = torch.randn(sum(lengths), num_q_heads, head_dim).to(dtype)
    got = reference_prefill_attention(
        query, cache, tables, lengths, contexts, 0.3, window=window, softcap=softcap
    )
    for row, (rows, part) in enumerate(zip(query.split(lengths), got.split(lengths), strict=True)):
        dense = dense_keys[row], dense_values[row]
        assert_close(part, dense_attention(rows, *dense, window, softcap))
