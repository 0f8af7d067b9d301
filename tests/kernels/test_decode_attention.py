"""Decode attention against float64: on a GPU, or small in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from mini_infer_kernels.reference.paged_attention import reference_decode_attention
from mini_infer_kernels.reference.paged_decode import reference_paged_decode
from paged_caches import PagedCache
from triton_functions import DEVICE, prepare_triton

prepare_triton()

import mini_infer_kernels.decode_plan as decode_plan  # noqa: E402
from mini_infer_kernels.decode_attention import triton_decode_attention  # noqa: E402
from mini_infer_kernels.decode_plan import TILE, DecodePlan  # noqa: E402

ON_CPU = DEVICE.type == "cpu"
LOW = torch.float16 if ON_CPU else torch.bfloat16
HUGE = 60000.0
"""Finite in float16, and ruinous wherever it takes part."""

needs_gpu = pytest.mark.skipif(ON_CPU, reason="no CUDA device")


@dataclass(frozen=True)
class Layer:
    """What a layer's attention looks like."""

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None

    def plan(self, max_batch: int) -> DecodePlan:
        heads = (self.num_q_heads, self.num_kv_heads, self.head_dim)
        return DecodePlan(max_batch, *heads, DEVICE, windows=[None, self.window])


@dataclass
class Step:
    """The inputs of a decode step; `garbage` stands in every slot that belongs to no token."""

    layer: Layer
    query: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor
    context_lens: torch.Tensor

    @classmethod
    def make(cls, layer: Layer, lengths: Sequence[int], seed: int = 0, scale: float = 1.0) -> Step:
        generator = torch.Generator().manual_seed(seed)
        slots = (layer.block_size, 2 * layer.num_kv_heads, layer.head_dim)
        paged = PagedCache.draw(lengths, slots, HUGE / scale, generator)
        # The query is part of wider rows.
        width = layer.num_q_heads + 2 * layer.num_kv_heads
        heads = torch.randn(len(lengths), width, layer.head_dim, generator=generator) * scale
        heads = heads.to(DEVICE, layer.dtype)
        return cls(
            layer,
            heads[:, : layer.num_q_heads],
            (paged.cache * scale).to(DEVICE, layer.dtype),
            paged.block_tables.to(DEVICE),
            paged.table_rows.to(DEVICE),
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        )

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.cache, self.block_tables, self.table_rows, self.context_lens

    def run(self, plan: DecodePlan, pdl: bool = False) -> torch.Tensor:
        """The kernel's output, in a tensor that was poisoned before."""
        plan.update(self.context_lens)
        out = torch.full(self.query.shape, torch.nan, dtype=self.layer.dtype, device=DEVICE)
        scale = self.layer.head_dim**-0.5
        window, softcap = self.layer.window, self.layer.softcap
        triton_decode_attention(*self.inputs, plan, scale, window, softcap, out, pdl)
        return out

    def exact(self) -> torch.Tensor:
        query, cache, *rest = self.inputs
        return reference_paged_decode(
            query.double(),
            cache.double(),
            *rest,
            self.layer.head_dim**-0.5,
            self.layer.window,
            self.layer.softcap,
        )

    def assert_right(self, plan: DecodePlan, float32_tolerance: float = 2e-6) -> None:
        """Every sequence is right, nothing is written for padding rows, all counts are reset."""
        out = self.run(plan)
        is_padding = self.context_lens == 0
        assert out[is_padding].isnan().all()
        got, expected = out[~is_padding].double(), self.exact()[~is_padding]
        tolerance = float32_tolerance if self.layer.dtype is torch.float32 else 8e-3
        errors = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert (errors < tolerance).all(), errors
        assert not plan.arrivals.any()


def assert_right(layer: Layer, lengths: Sequence[int]) -> None:
    Step.make(layer, lengths).assert_right(layer.plan(len(lengths)))


def use_programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """So many programs in all, however many the device holds."""
    monkeypatch.setattr(decode_plan, "_resident_programs", lambda device: count)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 1000])
def test_one_sequence(length: int) -> None:
    assert_right(Layer(), [length])


@pytest.mark.parametrize("num_programs", [1, 2, 3, 6, 14])
def test_mixed_lengths_over_any_number_of_programs(
    monkeypatch: pytest.MonkeyPatch, num_programs: int
) -> None:
    """One program has several sequences, several have one, and some have nothing to do."""
    use_programs(monkeypatch, num_programs)
    assert_right(Layer(), [0, 1, 300, 0, 0, 64, 65, 17, 0, 128, 3, 0])


def test_padding_rows_alone() -> None:
    assert_right(Layer(), [0, 0, 0])


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 20])
def test_group_sizes(group: int) -> None:
    assert_right(Layer(num_q_heads=2 * group), [90, 5])


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    assert_right(Layer(head_dim=head_dim), [150, 64])


@pytest.mark.parametrize("block_size", [1, 5, 16, 32, 256])
def test_block_sizes(block_size: int) -> None:
    assert_right(Layer(block_size=block_size), [99, 64, 1])


@pytest.mark.parametrize("window", [1, 16, 50, 64, 100, 1000])
def test_windows(window: int) -> None:
    assert_right(Layer(window=window), [1, 50, 101, 300])


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float) -> None:
    layer = Layer(softcap=softcap)
    Step.make(layer, [70, 200], scale=4.0).assert_right(layer.plan(2))


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, LOW])
def test_low_precision(dtype: torch.dtype, head_dim: int) -> None:
    assert_right(Layer(num_q_heads=8, head_dim=head_dim, dtype=dtype), [200, 1, 64])


def test_scores_far_from_zero() -> None:
    """Weights of nearly 0 and 1: sums of exponentials that are not taken relatively overflow.

    Scores of some hundreds are rounded at 3e-5, and so are the weights.
    """
    layer = Layer()
    Step.make(layer, [300, 65], scale=8.0).assert_right(layer.plan(2), float32_tolerance=3e-5)


def test_a_plan_serves_one_step_after_another() -> None:
    layer = Layer()
    plan = layer.plan(4)
    for seed, lengths in enumerate([[300, 2, 0, 70], [1, 1], [0, 500, 64, 9], [300, 2, 0, 70]]):
        Step.make(layer, lengths, seed).assert_right(plan)


def test_a_plan_serves_layers_with_and_without_a_window() -> None:
    local, full = Layer(window=40), Layer()
    plan = local.plan(2)
    for layer in (local, full, local):
        Step.make(layer, [200, 30]).assert_right(plan)


def test_a_layer_of_a_larger_cache() -> None:
    step = Step.make(Layer(), [77, 30])
    layers = torch.full((3, *step.cache.shape), HUGE, device=DEVICE)
    layers[1] = step.cache
    replace(step, cache=layers[1]).assert_right(step.layer.plan(2))


def test_dependent_launch_changes_nothing() -> None:
    step = Step.make(Layer(), [200, 30])
    plan = step.layer.plan(2)
    assert torch.equal(step.run(plan, pdl=True), step.run(plan))


def test_programs_share_the_tiles_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    use_programs(monkeypatch, 10)
    plan = Layer(num_kv_heads=1, num_q_heads=1).plan(6)
    lengths = [1, 40 * TILE, 0, TILE + 1, 2 * TILE]
    plan.update(torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    schedule = plan.schedule(None).tolist()
    share, first_seqs, tile_starts = schedule[0], schedule[1:11], schedule[11:17]
    assert tile_starts == [0, 1, 41, 41, 43, 45]
    assert share == 5
    assert first_seqs == [0, 1, 1, 1, 1, 1, 1, 1, 1, 4]


def test_inputs_that_do_not_fit_are_refused() -> None:
    step = Step.make(Layer(), [5, 6])
    plan = step.layer.plan(2)
    plan.update(step.context_lens)

    def refuses(message: str, window: int | None = None, **changes: torch.Tensor) -> None:
        changed = replace(step, **changes)
        with pytest.raises(ValueError, match=message):
            triton_decode_attention(*changed.inputs, plan, 1.0, window)

    refuses("plan of 4 and 2 heads", query=step.query[:, :2])
    refuses(r"call plan\.update", query=step.query[:1])
    refuses("one of each", table_rows=step.table_rows[:1])
    refuses("one of each", context_lens=step.context_lens[:1])
    refuses("must be equal", cache=step.cache.half())
    refuses("rows of query", query=step.query.transpose(0, 1).contiguous().transpose(0, 1))
    refuses("cache and out must be contiguous", cache=step.cache[:, ::2])
    refuses("window 7: the plan was made for", window=7)
    wide = Step.make(Layer(head_dim=512), [5, 6])
    with pytest.raises(ValueError, match="head_dim 512 at 32 bits: at most 256"):
        wide.run(wide.layer.plan(2))
    with pytest.raises(ValueError, match="made for 1 to 2"):
        plan.update(torch.ones(3, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        DecodePlan(1, 3, 2, 64, DEVICE)
    with pytest.raises(ValueError, match="hold a token"):
        DecodePlan(1, 2, 2, 64, DEVICE, windows=[0])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_references_agree(softcap: float | None) -> None:
    layer = Layer(window=40, softcap=softcap)
    lengths = [33, 64, 1]
    step = Step.make(layer, lengths)
    tables = step.block_tables[step.table_rows.long()].long()
    tables = torch.where(tables < len(step.cache), tables, 0)[:, :4]
    positions = torch.arange(tables.shape[1] * layer.block_size, device=DEVICE)
    ends = step.context_lens[:, None]
    hidden = (positions >= ends) | (positions < ends - 40)
    mask = torch.zeros(hidden.shape, dtype=torch.float64, device=DEVICE)
    mask = mask.masked_fill(hidden, -torch.inf)[:, None, None]
    query, cache = step.query.double(), step.cache.double()
    expected = reference_decode_attention(query, cache, tables, mask, 64**-0.5, softcap)
    torch.testing.assert_close(step.exact(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_of_short_contexts_serves_long_ones(pdl: bool) -> None:
    layer = Layer(num_q_heads=32, num_kv_heads=8, head_dim=128, dtype=LOW)
    plan = layer.plan(4)
    step = Step.make(layer, [32768, 500, 2000, 70])
    longest = step.context_lens.clone()
    step.context_lens.fill_(1)
    step.run(plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(step.context_lens)
        out = triton_decode_attention(*step.inputs, plan, layer.head_dim**-0.5, pdl=pdl)
    for lengths in (longest, torch.ones_like(longest), longest - 37):
        step.context_lens.copy_(lengths)
        graph.replay()
        expected = step.exact()
        assert (out.double() - expected).norm() < 8e-3 * expected.norm()
    assert not plan.arrivals.any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(32, 8), (32, 32), (14, 2), (64, 1)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_large_batches(num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Repeated, since programs meet in another order each time."""
    layer = Layer(num_q_heads, num_kv_heads, head_dim, dtype=LOW)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 900, (64,), generator=generator).tolist()
    step = Step.make(layer, [*lengths, 9000])
    plan = layer.plan(65)
    step.assert_right(plan)
    first = step.run(plan)
    for _ in range(20):
        assert torch.equal(step.run(plan).nan_to_num(), first.nan_to_num())


@pytest.mark.gpu
@needs_gpu
def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    layer = Layer(num_q_heads=8, num_kv_heads=8, head_dim=128, dtype=LOW)
    step = Step.make(layer, [300, 40])
    far = torch.empty(70000, *step.cache.shape[1:], dtype=LOW, device=DEVICE)
    far[-len(step.cache) :] = step.cache
    expected = step.exact()
    offset = len(far) - len(step.cache)
    tables = torch.where(step.block_tables < len(step.cache), step.block_tables + offset, 0)
    moved = replace(step, cache=far, block_tables=tables.int())
    got = moved.run(layer.plan(2)).double()
    assert (got - expected).norm() < 8e-3 * expected.norm()
