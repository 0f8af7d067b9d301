"""Rings of tiles in shared memory, which the copy engine fills from the blocks of the cache."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mini_infer_kernels.hopper_prefill.work import Work

LEAST_BLOCK = 8
"""Rows after which the layout of a tile repeats: a block can be copied into a part of it."""


class Ring(NamedTuple):
    """Tiles of keys, or of values, on their way from the loading warp to both halves.

    Tile i is in stage i % stages.

    Attributes:
        tiles: [stages, keys, columns] in shared memory.
        full: A barrier for each stage, passed when its tile has come.
        empty: A barrier for each stage, passed when both halves are done with its tile.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def make_ring(slots: tma.tensor_descriptor, T: gl.constexpr) -> Ring:
    """An empty one for rows of `slots`."""
    STAGES: gl.constexpr = T.num_stages
    tiles = gl.allocate_shared_memory(slots.dtype, [STAGES, T.keys, T.columns], slots.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return Ring(tiles, full, empty)


@gluon.jit
def await_tile(ring: Ring, i: gl.tensor, T: gl.constexpr) -> gl.shared_memory_descriptor:
    """[keys, columns]: tile i, once it has come."""
    stage = i % T.num_stages
    mbarrier.wait(ring.full.index(stage), i // T.num_stages & 1)
    return ring.tiles.index(stage)


@gluon.jit
def release_tile(ring: Ring, i: gl.tensor, T: gl.constexpr) -> None:
    """One half is done with tile i."""
    mbarrier.arrive(ring.empty.index(i % T.num_stages))


@gluon.jit
def load_all(
    keys: Ring,
    values: Ring,
    slots: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    num_kv_heads: gl.tensor,
    work: Work,
    T: gl.constexpr,
) -> None:
    """Loads all tiles, each as soon as its stage is empty: what the loading warp does."""
    key_column = work.kv_head * T.head_dim
    value_column = key_column + num_kv_heads * T.head_dim
    for i in range(work.num_tiles):
        _load_tile(keys, i, slots, key_column, table_ptr, work, T)
        _load_tile(values, i, slots, value_column, table_ptr, work, T)


@gluon.jit
def _load_tile(
    ring: Ring,
    i: gl.tensor,
    slots: tma.tensor_descriptor,
    column: gl.tensor,
    table_ptr: gl.tensor,
    work: Work,
    T: gl.constexpr,
) -> None:
    PART: gl.constexpr = slots.block_type.shape[0]  # slots of a block that a tile can hold
    NUM_PARTS: gl.constexpr = T.keys // PART
    stage = i % T.num_stages
    tile = ring.tiles.index(stage)
    full = ring.full.index(stage)
    mbarrier.wait(ring.empty.index(stage), (i // T.num_stages & 1) ^ 1)
    mbarrier.expect(full, T.keys * T.columns * 2)
    for part in gl.static_range(NUM_PARTS):
        position = (work.last_tile - i) * T.keys + part * PART
        # There may be no blocks behind the last token: the mask hides what comes instead.
        position = gl.minimum(position, work.last_position // PART * PART)
        block = gl.load(table_ptr + position // T.block_size)
        slot = block * T.block_size + position % T.block_size
        place = tile.slice(part * PART, PART)
        tma.async_copy_global_to_shared(slots, [slot, column], full, place)
