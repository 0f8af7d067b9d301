"""Moves of blocks, and a plain model of the two memories to compare with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from mini_infer_engine.batch import Ints, ScheduledBatch
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.sampling import Sampler
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING

NUM_BLOCKS = 12
NUM_HOST_BLOCKS = 9
VOCAB = 5

Columns = tuple[Ints, Ints, Ints, Ints]
"""`swap_outs`, `zero_blocks`, `swap_ins` and `block_copies` of a batch."""


def spec_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> KVCacheSpec:
    return KVCacheSpec(
        num_layers=3,
        num_kv_heads=2,
        head_dim=5,
        block_size=4,
        dtype=dtype,
        device=torch.device(device),
    )


def as_pairs(pairs: list[tuple[int, int]]) -> Ints:
    return np.array(pairs, np.int64).reshape(-1, 2)


@st.composite
def moves(draw: st.DrawFn) -> Columns:
    """Columns as scattered and as chained as they may be."""

    def pairs(sources: list[int], destinations: list[int]) -> list[tuple[int, int]]:
        taken = draw(st.lists(st.sampled_from(destinations), unique=True))
        return [(draw(st.sampled_from(sources)), each) for each in taken]

    device, host = list(range(NUM_BLOCKS)), list(range(NUM_HOST_BLOCKS))
    copied_to = draw(st.lists(st.sampled_from(device), unique=True, max_size=NUM_BLOCKS - 1))
    others = sorted(set(device) - set(copied_to))
    copies = [(draw(st.sampled_from(others)), each) for each in copied_to]
    cleared = draw(st.lists(st.sampled_from(device), unique=True))
    return (
        as_pairs(pairs(device, host)),
        np.array(cleared, np.int64),
        as_pairs(pairs(host, device)),
        as_pairs(copies),
    )


class Expected:
    """Device and host as lists of blocks."""

    def __init__(self, cache: KVCache) -> None:
        self.device = [cache.layers[:, block].clone() for block in range(NUM_BLOCKS)]
        self.host = [torch.zeros_like(self.device[0], device="cpu")] * NUM_HOST_BLOCKS

    def apply(self, batch: ScheduledBatch) -> None:
        for source, destination in batch.swap_outs.tolist():
            self.host[destination] = self.device[source].cpu()
        for block in batch.zero_blocks.tolist():
            self.device[block] = torch.zeros_like(self.device[block])
        for source, destination in batch.swap_ins.tolist():
            self.device[destination] = self.host[source].to(self.device[0].device)
        for source, destination in batch.block_copies.tolist():
            self.device[destination] = self.device[source]


class Memories:
    """A runner over a filled cache, beside what its two memories should hold."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.spec = spec_of(dtype, device)
        self.cache = KVCache(self.spec, NUM_BLOCKS)
        generator = torch.Generator().manual_seed(0)
        self.cache.layers.copy_(torch.randn(self.cache.layers.shape, generator=generator))
        self.host_cache = HostCache(self.spec, NUM_HOST_BLOCKS)
        self.forward = SeesTheCache()
        buffers = InputBuffers(
            block_size=self.spec.block_size, dtype=dtype, device=self.spec.device
        )
        sampler = Sampler(
            REFERENCE_SAMPLING,
            vocab_size=VOCAB,
            max_num_seqs=NUM_BLOCKS,
            max_model_len=NUM_BLOCKS,
            device=self.spec.device,
        )
        self.runner = ModelRunner(
            None, self.forward, self.cache, buffers, sampler, host_cache=self.host_cache
        )
        self.expected = Expected(self.cache)

    def run(self, batch: ScheduledBatch) -> None:
        """Runs a batch of several rows, whose model sees the whole cache."""
        self.runner.run(batch)
        self.expected.apply(batch)

    def check(self) -> None:
        """What the model saw, and what the host holds."""
        assert torch.equal(self.forward.seen, torch.stack(self.expected.device, dim=1))
        if self.spec.device.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(self.host_cache._blocks, torch.stack(self.expected.host))


class SeesTheCache:
    """In place of a model: keeps what the cache held when it was called."""

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        self.seen = inputs.cache.clone()
        return torch.zeros(len(inputs.token_ids), VOCAB, device=inputs.cache.device)


NOTHING: Columns = (as_pairs([]), np.array([], np.int64), as_pairs([]), as_pairs([]))


def with_moves(batch: ScheduledBatch, columns: Columns) -> ScheduledBatch:
    swap_outs, zero_blocks, swap_ins, block_copies = columns
    return replace(
        batch,
        swap_outs=swap_outs,
        zero_blocks=zero_blocks,
        swap_ins=swap_ins,
        block_copies=block_copies,
    )
