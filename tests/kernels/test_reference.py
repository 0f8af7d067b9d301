"""The plain-torch references against formulas written out in float64, one element at a time."""

from __future__ import annotations

import math

import pytest
import torch
from mini_infer_kernels.reference.activation import reference_silu_and_mul
from mini_infer_kernels.reference.paged_attention import (
    reference_decode_attention,
    reference_prefill_attention,
)
from mini_infer_kernels.reference.rmsnorm import reference_rmsnorm
from mini_infer_kernels.reference.rope import reference_rope, rope_table
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
    assert_close(got, x.double() / (mean + 1e-5).sqrt() * weight.double())
    assert got.dtype == dtype


@dtypes
def test_rope_turns_each_pair_by_its_angle(dtype: torch.dtype) -> None:
    head_dim, theta = 10, 500.0
    positions = [0, 1, 63]
    cos, sin = rope_table(head_dim, 64, theta, torch.device("cpu"))
    heads = torch.randn(3, 3, head_dim).to(dtype)
    x, others = heads.clone()[:, :2], heads[:, 2:].clone()
    rows = torch.tensor(positions)
    got = heads[:, :2]
    reference_rope(got, cos[rows, None].to(dtype), sin[rows, None].to(dtype))
    assert torch.equal(heads[:, 2:], others)
    expected = torch.empty(3, 2, head_dim, dtype=torch.float64)
    half = head_dim // 2
    for token, position in enumerate(positions):
        for pair in range(half):
            angle = position * theta ** (-2 * pair / head_dim)
            a, b = x[token, :, pair].double(), x[token, :, pair + half].double()
            expected[token, :, pair] = a * math.cos(angle) - b * math.sin(angle)
            expected[token, :, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    assert_close(got, expected)
    assert torch.equal(got[0], x[0])


@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 14).to(dtype)
    gate, up = gate_up[:, :7].double(), gate_up[:, 7:].double()
    assert_close(reference_silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)


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
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, in float64."""
    length, num_q_heads, _ = query.shape
    group = num_q_heads // keys.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for token in range(length):
        seen = len(keys) - length + token + 1
        for head in range(num_q_heads):
            scores = keys[:seen, head // group].double() @ query[token, head].double() * scale
            out[token, head] = scores.softmax(0) @ values[:seen, head // group].double()
    return out


heads = pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 16), (3, 1, 5)], ids=str
)


@dtypes
@heads
def test_decode_attention(
    dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    contexts = [1, 4, 5, 19]
    cache, tables, dense_keys, dense_values = paged(contexts, num_kv_heads, head_dim, dtype)
    query = torch.randn(len(contexts), num_q_heads, head_dim).to(dtype)
    slots = torch.arange(tables.shape[1] * BLOCK_SIZE)
    mask = torch.where(slots < torch.tensor(contexts)[:, None], 0.0, -torch.inf).to(dtype)
    got = reference_decode_attention(query, cache, tables, mask[:, None, None], 0.3)
    for row in range(len(contexts)):
        expected = dense_attention(query[row : row + 1], dense_keys[row], dense_values[row], 0.3)
        assert_close(got[row : row + 1], expected)


@dtypes
@heads
def test_prefill_attention(
    dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    lengths, contexts = [1, 5, 3, 8], [1, 5, 17, 9]
    cache, tables, dense_keys, dense_values = paged(contexts, num_kv_heads, head_dim, dtype)
    query = torch.randn(sum(lengths), num_q_heads, head_dim).to(dtype)
    got = reference_prefill_attention(query, cache, tables, lengths, contexts, 0.3)
    for row, (rows, part) in enumerate(zip(query.split(lengths), got.split(lengths), strict=True)):
        assert_close(part, dense_attention(rows, dense_keys[row], dense_values[row], 0.3))
