"""Chooses the next token of each row in Triton, without a sort (contract: `reference/sampling.py`).

Three launches, the same whatever the rows ask for, so a CUDA graph can hold them: `scan.py` reads
all logits once, `select.py` ends most rows, `whole_row.py` the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from mini_infer_kernels.draw_controls import DrawControls
from mini_infer_kernels.sampling.scan import scan_kernel
from mini_infer_kernels.sampling.select import select_kernel
from mini_infer_kernels.sampling.whole_row import whole_row_kernel

_CHUNK = 2048
_TILE = 64
_SCAN_WARPS = 4
_BLOCK = 1024
"""Candidates looked at together."""
_GATHER_BLOCK = 2048
"""Logits looked at together for candidates."""
_WARPS = 8
_CAPACITY = 8192
"""Candidates a row at most."""
_ROW_BLOCK = 4096
_ROW_WARPS = 32
_MAX_MAXIMA = 3072
"""For top-p or typical-p alone, candidates are at most what reaches this many tiles' maxima."""


def triton_choose_tokens(
    logits: torch.Tensor, controls: DrawControls
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_choose_tokens`; float32 inside.

    Args:
        logits: [R, vocab_size] float32; the elements of a row stand side by side.
        controls: How, for the R rows; every tensor contiguous.

    Returns:
        ids: [R] int64.
        status: [R] int32.
    """
    ids, status, _ = choose_and_count(logits, controls)
    return ids, status


def choose_and_count(
    logits: torch.Tensor, controls: DrawControls
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `triton_choose_tokens`, and tells how large the sets were.

    Returns:
        ids: [R] int64.
        status: [R] int32.
        num_kept: [R] int32, the tokens that a row drew from; 0 where nothing restricted them.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    ids = logits.new_empty(num_rows, dtype=torch.int64)
    status = logits.new_empty(num_rows, dtype=torch.int32)
    num_kept = logits.new_empty(num_rows, dtype=torch.int32)
    if num_rows == 0:
        return ids, status, num_kept
    row_arguments = _row_arguments(logits, controls)
    scan = _scan(logits, row_arguments, num_chunks)
    pending = logits.new_empty(num_rows, dtype=torch.int32)
    select_kernel[(num_rows,)](
        *row_arguments,
        scan.tile_maxima,
        scan.chunk_maxima,
        scan.chunk_masses,
        scan.chunk_moments,
        scan.chunk_times,
        scan.chunk_ids,
        num_chunks,
        torch.empty_like(scan.tile_maxima, dtype=torch.int32),
        logits.new_empty(num_rows, _CAPACITY),
        logits.new_empty(num_rows, _CAPACITY, dtype=torch.int32),
        ids,
        status,
        num_kept,
        pending,
        CHUNK=_CHUNK,
        TILE=_TILE,
        CHUNKS=triton.next_power_of_2(num_chunks),
        CAPACITY=_CAPACITY,
        MAX_MAXIMA=_MAX_MAXIMA,
        BLOCK=_BLOCK,
        GATHER_BLOCK=_GATHER_BLOCK,
        num_warps=_WARPS,
    )
    whole_row_kernel[(num_rows,)](
        *row_arguments,
        scan.chunk_maxima,
        num_chunks,
        ids,
        num_kept,
        pending,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BLOCK=_ROW_BLOCK,
        num_warps=_ROW_WARPS,
    )
    return ids, status, num_kept


@dataclass(frozen=True, slots=True)
class _Scan:
    """What `scan_kernel` writes; some of it only where a row needs it.

    Attributes:
        tile_maxima: [R, tiles] float32.
        chunk_maxima: [R, chunks] float32.
        chunk_masses: [R, chunks] float32.
        chunk_moments: [R, chunks] float32.
        chunk_times: [R, chunks] float32, when the winner of each chunk finishes.
        chunk_ids: [R, chunks] int32, the winners.
    """

    tile_maxima: torch.Tensor
    chunk_maxima: torch.Tensor
    chunk_masses: torch.Tensor
    chunk_moments: torch.Tensor
    chunk_times: torch.Tensor
    chunk_ids: torch.Tensor


def _scan(logits: torch.Tensor, row_arguments: tuple[object, ...], num_chunks: int) -> _Scan:
    num_rows = len(logits)
    shape = (num_rows, num_chunks)
    scan = _Scan(
        tile_maxima=logits.new_empty(num_rows, num_chunks * (_CHUNK // _TILE)),
        chunk_maxima=logits.new_empty(shape),
        chunk_masses=logits.new_empty(shape),
        chunk_moments=logits.new_empty(shape),
        chunk_times=logits.new_empty(shape),
        chunk_ids=logits.new_empty(shape, dtype=torch.int32),
    )
    scan_kernel[(num_chunks, num_rows)](
        *row_arguments,
        scan.tile_maxima,
        scan.chunk_maxima,
        scan.chunk_masses,
        scan.chunk_moments,
        scan.chunk_times,
        scan.chunk_ids,
        CHUNK=_CHUNK,
        TILE=_TILE,
        num_warps=_SCAN_WARPS,
    )
    return scan


def _row_arguments(logits: torch.Tensor, controls: DrawControls) -> tuple[object, ...]:
    """The first arguments of every kernel: the rows' logits and parameters."""
    return (
        logits,
        logits.stride(0),
        logits.shape[1],
        controls.temperatures,
        controls.top_ks,
        controls.top_ps,
        controls.min_ps,
        controls.typical_ps,
        controls.seeds,
        controls.positions,
        controls.mask_indices,
        controls.masks,
        controls.masks.shape[1],
    )
