"""Triton's prefill attention against float64: on a GPU, or small in Triton's interpreter.

On a Hopper GPU, 16-bit cases run through its own kernel, unless their blocks have no power of two
of slots.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from mini_infer_kernels.reference.paged_attention import reference_prefill_attention
from paged_caches import PagedCache
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels import prefill_attention  # noqa: E402
from mini_infer_kernels.hopper_prefill.launch import runs_on_hopper  # noqa: E402
from mini_infer_kernels.prefill_attention import triton_prefill_attention  # noqa: E402

ON_CPU = DEVICE.type == "cpu"
HUGE = 1e30
"""What stands in slots that must not count."""

needs_gpu = pytest.mark.skipif(ON_CPU, reason="no CUDA device")


@dataclass
class Case:
    """Sequences as (new tokens, tokens in the cache), and a model's shape."""

    sequences: list[tuple[int, int]]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.head_dim**-0.5

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads}x{self.head_dim}"
        limits = f"window {self.window}, cap {self.softcap}"
        return f"{self.sequences}, {heads}, blocks of {self.block_size}, {limits}"


@dataclass
class Inputs:
    """Tensors of a case, float64 on the CPU; all slots that do not count are HUGE."""

    query: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor


def draw(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(len(str(case)))
    slots = (case.block_size, 2 * case.num_kv_heads, case.head_dim)
    garbage = HUGE if dtype is not torch.float16 else 6e4
    contexts = [context for _, context in case.sequences]
    paged = PagedCache.draw(contexts, slots, garbage, generator, torch.float64)
    num_tokens = sum(new for new, _ in case.sequences)
    query = torch.randn(
        num_tokens, case.num_q_heads, case.head_dim, generator=generator, dtype=torch.float64
    )
    return Inputs(
        query.to(dtype).double(),
        paged.cache.to(dtype).double(),
        paged.block_tables,
        paged.table_rows,
    )


def attend(case: Case, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's output, in float64 on the CPU, NaN where nothing was written.

    The query is part of a wider product and the output of a wider buffer, and the rows of others
    stand before and behind those of the case.
    """
    num_tokens, num_heads, head_dim = inputs.query.shape
    owned = slice(2, 2 + num_tokens), slice(1, 1 + num_heads)
    wide = torch.full((num_tokens + 3, num_heads + 2, head_dim), float("nan"))
    wide = wide.to(DEVICE, dtype)
    out = wide.clone()
    wide[owned] = inputs.query.to(DEVICE, dtype)
    lengths = torch.tensor([new for new, _ in case.sequences])
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int() + 2
    written = triton_prefill_attention(
        wide[:, owned[1]],
        inputs.cache.to(DEVICE, dtype),
        inputs.block_tables.to(DEVICE),
        inputs.table_rows.to(DEVICE),
        starts.to(DEVICE),
        torch.tensor([context for _, context in case.sequences], device=DEVICE).int(),
        int(lengths.max()),
        case.scale,
        case.window,
        case.softcap,
        out[:, owned[1]],
    )
    assert written.data_ptr() == out[:, owned[1]].data_ptr()
    result = out[owned].double().cpu()
    out[owned] = float("nan")
    assert out.isnan().all()
    return result


def expected(case: Case, inputs: Inputs) -> torch.Tensor:
    """The reference in float64, where sequences without a context are NaN."""
    present = [place for place, (new, context) in enumerate(case.sequences) if new and context]
    owners = torch.repeat_interleave(torch.tensor([new for new, _ in case.sequences]))
    is_present = torch.isin(owners, torch.tensor(present))
    output = torch.full_like(inputs.query, float("nan"))
    output[is_present] = reference_prefill_attention(
        inputs.query[is_present],
        inputs.cache,
        inputs.block_tables[inputs.table_rows[present].long()].long(),
        [case.sequences[place][0] for place in present],
        [case.sequences[place][1] for place in present],
        case.scale,
        case.window,
        case.softcap,
    )
    return output


def assert_attends(case: Case, dtype: torch.dtype) -> None:
    inputs = draw(case, dtype)
    actual, exact = attend(case, inputs, dtype), expected(case, inputs)
    assert torch.equal(actual.isnan(), exact.isnan())
    error = (actual - exact).nan_to_num()
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert error.norm() <= tolerance * exact.nan_to_num().norm()
    assert error.abs().max() <= 8 * tolerance


SMALL = [
    Case([(5, 5)]),
    Case([(1, 1), (3, 40), (0, 17), (33, 70), (20, 20)]),
    Case([(40, 90)], num_q_heads=3, num_kv_heads=3, block_size=5),
    Case([(30, 75)], num_q_heads=7, num_kv_heads=1, head_dim=80, block_size=32),
    Case([(20, 30)], num_q_heads=8, num_kv_heads=1, head_dim=8),
    Case([(9, 60), (50, 50)], window=7),
    Case([(70, 150)], num_q_heads=2, window=64, block_size=5),
    Case([(35, 60)], softcap=2.0, head_dim=96),
    Case([(20, 45), (2, 50)], softcap=3.0, window=33),
    Case([(4, 0), (6, 20), (0, 0)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_cases(case: Case, dtype: torch.dtype) -> None:
    assert_attends(case, dtype)


LARGE = [
    Case([(513, 513), (1, 700), (128, 1000), (0, 5), (77, 77)], 32, 8, 128),
    Case([(300, 300), (65, 800)], 8, 8, 128),
    Case([(300, 300), (65, 800)], 16, 8, 128, window=100),
    Case([(129, 1300)], 28, 4, 128, softcap=20.0),
    Case([(129, 1300)], 8, 1, 128, window=257, softcap=5.0, block_size=32),
    Case([(129, 1300)], 40, 1, 128),
    Case([(200, 900), (31, 31)], 8, 2, 64),
    Case([(200, 900), (31, 31)], 8, 2, 64, block_size=8, window=1),
    Case([(200, 900), (31, 31)], 8, 2, 80, window=300),
    Case([(200, 900), (31, 31)], 12, 4, 96, block_size=256),
    Case([(200, 900), (31, 31)], 8, 4, 256),
    Case([(200, 900), (31, 31)], 8, 4, 256, softcap=50.0, window=128),
    Case([(200, 900), (31, 31)], 8, 2, 128, block_size=5),
    Case([(2, 0), (400, 2000)], 8, 2, 128, window=512),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_cases(case: Case, dtype: torch.dtype) -> None:
    assert_attends(case, dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_cases_without_the_kernel_for_hopper(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_attention, "_is_hopper", lambda device: False)
    assert_attends(case, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not prefill_attention._is_hopper(DEVICE), reason="no Hopper GPU")
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_hopper_runs_its_own_kernel(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(prefill_attention, "_launch")
    assert_attends(Case([(70, 300)], 8, 2, 128, block_size), torch.bfloat16)


@pytest.mark.gpu
@needs_gpu
def test_float32_on_the_gpu() -> None:
    for case in SMALL:
        assert_attends(case, torch.float32)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_reads_lengths_and_tables_anew() -> None:
    case = Case([(40, 600), (24, 100)], 8, 2, 128)
    inputs = draw(case, torch.bfloat16)
    query, cache = (x.to(DEVICE, torch.bfloat16) for x in (inputs.query, inputs.cache))
    tables, rows = inputs.block_tables.to(DEVICE), inputs.table_rows.to(DEVICE)
    starts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(query, float("nan"))

    def call() -> None:
        triton_prefill_attention(
            query, cache, tables, rows, starts, lengths, 64, case.scale, out=out
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    starts.copy_(torch.tensor([0, 40, 64]))
    lengths.copy_(torch.tensor([600, 100]))
    graph.replay()
    exact = expected(case, inputs)
    assert (out.double().cpu() - exact).norm() <= 6e-3 * exact.norm()


@pytest.mark.parametrize(
    ("dtype", "num_q_heads", "cache_shape", "taken"),
    [
        (torch.bfloat16, 32, (3, 16, 16, 128), True),
        (torch.float16, 7, (3, 8, 2, 80), True),
        (torch.float32, 32, (3, 16, 16, 128), False),
        (torch.bfloat16, 32, (3, 16, 16, 100), False),
        (torch.bfloat16, 32, (3, 16, 16, 512), False),
        (torch.bfloat16, 32, (3, 24, 16, 128), False),
        (torch.bfloat16, 32, (3, 4, 16, 128), False),
        (torch.bfloat16, 129, (3, 16, 2, 128), False),
    ],
)
def test_what_the_kernel_for_hopper_takes(
    dtype: torch.dtype, num_q_heads: int, cache_shape: tuple[int, int, int, int], taken: bool
) -> None:
    query = torch.zeros(2, num_q_heads, cache_shape[3], dtype=dtype)
    cache = torch.zeros(cache_shape, dtype=dtype)
    assert runs_on_hopper(query, cache) == taken
    if taken:
        # Blocks that do not follow each other are no table of slots for the copy engine.
        assert not runs_on_hopper(query, torch.cat([cache, cache], 1)[:, : cache_shape[1]])
        shifted = torch.zeros(cache.numel() + 1, dtype=dtype)[1:].view(cache_shape)
        assert not runs_on_hopper(query, shifted)


def test_nothing_to_do() -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    out = triton_prefill_attention(
        torch.zeros(0, 4, 64, device=DEVICE),
        torch.zeros(2, 16, 4, 64, device=DEVICE),
        torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        empty,
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        empty,
        0,
        1.0,
    )
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("query", "cache", "message"),
    [
        (torch.zeros(3, 4, 64), torch.zeros(2, 16, 4, 64).half(), "of one type"),
        (torch.zeros(3, 4, 64), torch.zeros(2, 16, 4, 32), "num_kv_heads divides 4"),
        (torch.zeros(3, 4, 64), torch.zeros(2, 16, 6, 64), "num_kv_heads divides 4"),
        (torch.zeros(3, 64, 4).transpose(1, 2), torch.zeros(2, 16, 4, 64), "side by side"),
        (torch.zeros(3, 4, 64), torch.zeros(2, 4, 16, 64).transpose(1, 2), "side by side"),
    ],
)
def test_refusals(query: torch.Tensor, cache: torch.Tensor, message: str) -> None:
    ints = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        triton_prefill_attention(query, cache, ints[None], ints[:1], ints, ints[:1], 3, 1.0)


def test_heads_and_numbers_of_sequences_that_are_refused() -> None:
    ints = torch.zeros(3, dtype=torch.int32)
    query, cache = torch.zeros(3, 4, 64), torch.zeros(2, 16, 4, 64)
    for rows, starts, lengths in ((1, 3, 2), (2, 2, 2), (2, 3, 1)):
        with pytest.raises(ValueError, match="as many table_rows and one more query_starts"):
            triton_prefill_attention(
                query, cache, ints[None], ints[:rows], ints[:starts], ints[:lengths], 3, 1.0
            )
    query, cache = torch.zeros(3, 4, 512), torch.zeros(2, 16, 4, 512)
    with pytest.raises(ValueError, match="head_dim 512 at 32 bits: at most 256"):
        triton_prefill_attention(query, cache, ints[None], ints[:2], ints, ints[:2], 3, 1.0)


def test_an_output_of_another_shape_is_refused() -> None:
    ints = torch.zeros(2, dtype=torch.int32)
    query, cache = torch.zeros(3, 4, 64), torch.zeros(2, 16, 4, 64)
    with pytest.raises(ValueError, match="expected out of shape"):
        triton_prefill_attention(
            query, cache, ints[None], ints[:1], ints, ints[:1], 3, 1.0, out=torch.zeros(3, 4, 32)
        )


def test_another_release_of_triton_does_without_the_kernel_for_hopper() -> None:
    """In a process of its own, where the release is another and what is experimental is gone."""
    script = """
import sys, triton
triton.__version__ = "3.7.1"
sys.modules["triton.experimental"] = None
from mini_infer_kernels import prefill_attention
assert callable(prefill_attention.triton_prefill_attention)
assert not any(name.startswith("mini_infer_kernels.hopper") for name in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
