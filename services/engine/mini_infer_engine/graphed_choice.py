"""How ids are chosen from logits on a GPU: a CUDA graph for each of `row_sizes`.

The logits stand at one place (`GraphedForward.logits`), and so do the parameters of the rows: one
copy brings them. What comes back goes to memory of the host that the device writes by itself.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy as np
import torch
from mini_infer_kernels.sampling_kernels import DrawControls, SamplingKernels
from numpy.typing import NDArray

from mini_infer_engine.batch import FillMasks, RowStatus, SamplingColumns, TokenMasks
from mini_infer_engine.cuda_graphs import GraphsBySize
from mini_infer_engine.graph_sizes import row_sizes, size_for
from mini_infer_engine.token_choice import ChosenIds, LaunchedIds, mask_indices

_BITS_PER_WORD = 32
_NUM_UNDER_WAY = 2
"""Steps that are launched and not finished: memory of the host is written for each of them."""


class GraphedChoice:
    """Owns the rows' parameters on the device, and the graphs."""

    def __init__(
        self, kernels: SamplingKernels, logits: torch.Tensor, results: torch.Tensor
    ) -> None:
        """Allocates the parameters; every choice runs operation by operation until `capture`.

        Args:
            kernels: The operations, capturable ones.
            logits: [max_num_seqs, vocab_size] float32, where those of every step stand.
            results: [2, max_num_seqs] int32, where ids and statuses of every step go.
        """
        max_num_seqs, vocab_size = logits.shape
        self._kernels = kernels
        self._logits = logits
        self._sizes = row_sizes(max_num_seqs)
        self._controls = ControlBuffers(max_num_seqs, vocab_size, logits.device)
        self._results = results
        self._on_host = deque(_HostResults(max_num_seqs) for _ in range(_NUM_UNDER_WAY))
        self._likeliest = GraphsBySize()
        self._draws = GraphsBySize()

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every size."""
        for size in self._sizes:
            self._run_likeliest(size)
            self._run_draw(size)
        self._likeliest.capture(self._sizes, self._run_likeliest)
        self._draws.capture(self._sizes, self._run_draw)

    def release(self) -> None:
        """Forgets the graphs."""
        self._likeliest.release()
        self._draws.release()

    def likeliest(self, logits: torch.Tensor) -> LaunchedIds:
        """As `TokenChoice.likeliest`."""
        size = self._place(logits)
        if not self._likeliest.replay(size):
            self._run_likeliest(size)
        return self._tell_host(len(logits))

    def draw(
        self, logits: torch.Tensor, columns: SamplingColumns, fill_masks: FillMasks
    ) -> LaunchedIds:
        """As `TokenChoice.draw`."""
        self._controls.fill(columns)
        if len(columns.masked):
            self._controls.fill_masks(fill_masks())
        size = self._place(logits)
        if not self._draws.replay(size):
            self._run_draw(size)
        return self._tell_host(len(logits))

    def _place(self, logits: torch.Tensor) -> int:
        """Makes logits stand where the graphs read them; gives the size that holds them."""
        num_rows = len(logits)
        if logits.data_ptr() != self._logits.data_ptr():
            self._logits[:num_rows].copy_(logits)
        size = size_for(num_rows, self._sizes)
        assert size is not None, f"{num_rows} rows: {self._sizes[-1]} at most"
        return size

    def _tell_host(self, num_rows: int) -> LaunchedIds:
        self._on_host.rotate()
        return self._on_host[0].copy(self._results, num_rows)

    def _run_likeliest(self, size: int) -> None:
        best, ids = self._logits[:size].max(-1)  # NaN is above all
        statuses = torch.where(best == -torch.inf, RowStatus.NOTHING_ALLOWED, RowStatus.NON_FINITE)
        statuses.masked_fill_(best.isfinite(), RowStatus.OK)
        self._tell(ids, statuses, size)

    def _run_draw(self, size: int) -> None:
        ids, statuses = self._kernels.choose_tokens(self._logits[:size], self._controls.first(size))
        self._tell(ids, statuses, size)

    def _tell(self, ids: torch.Tensor, statuses: torch.Tensor, size: int) -> None:
        self._results[0, :size].copy_(ids)
        self._results[1, :size].copy_(statuses)


class _HostResults:
    """Memory of the host for the results of a step."""

    def __init__(self, max_num_seqs: int) -> None:
        self._values = torch.zeros(2, max_num_seqs, dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, results: torch.Tensor, num_rows: int) -> LaunchedIds:
        """Queues the copy."""
        self._values.copy_(results, non_blocking=True)
        self._copied.record()
        return partial(self._wait, num_rows)

    def _wait(self, num_rows: int) -> ChosenIds:
        self._copied.synchronize()
        ids, statuses = self._values.numpy()[:, :num_rows]
        return ChosenIds(ids.astype(np.int64), statuses.copy())


class ControlBuffers:
    """The parameters of a step's rows on the device, always at the same place."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        """Allocates them.

        Args:
            max_num_seqs: Rows at most.
            vocab_size: Of the model.
            device: Of the logits.
        """
        self._floats = _Columns(4, max_num_seqs, torch.float32, device)
        self._ints = _Columns(2, max_num_seqs, torch.int32, device)
        self._longs = _Columns(2, max_num_seqs, torch.int64, device)
        self._floats.on_device[1] = 1.0  # what no step has written yet is read as well
        self._floats.on_device[3] = 1.0
        self._ints.on_device[1] = -1
        words = -(-vocab_size // _BITS_PER_WORD)
        self._masks = torch.zeros(max_num_seqs, words, dtype=torch.int32, device=device)
        # One is enough, where columns need two: no step is launched ahead of masked rows.
        self._host_masks = torch.zeros(max_num_seqs, words, dtype=torch.int32, pin_memory=True)

    def fill(self, columns: SamplingColumns) -> None:
        """Queues the copy of everything but the masks."""
        self._floats.fill(columns.temperatures, columns.top_ps, columns.min_ps, columns.typical_ps)
        self._ints.fill(columns.top_ks, mask_indices(columns))
        self._longs.fill(columns.seeds.view(np.int64), columns.positions)

    def fill_masks(self, masks: TokenMasks) -> None:
        """Queues the copy of the masks."""
        self._host_masks.numpy()[: len(masks)] = masks
        self._masks[: len(masks)].copy_(self._host_masks[: len(masks)], non_blocking=True)

    def first(self, size: int) -> DrawControls:
        """Those of the first rows, as the kernels take them."""
        temperatures, top_ps, min_ps, typical_ps = self._floats.on_device[:, :size]
        top_ks, mask_rows = self._ints.on_device[:, :size]
        seeds, positions = self._longs.on_device[:, :size]
        return DrawControls(
            temperatures=temperatures,
            top_ks=top_ks,
            top_ps=top_ps,
            min_ps=min_ps,
            typical_ps=typical_ps,
            seeds=seeds,
            positions=positions,
            mask_indices=mask_rows,
            masks=self._masks,
        )


class _Columns:
    """Columns of one type, which take one copy together."""

    def __init__(
        self, num_columns: int, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.on_device = torch.zeros(num_columns, num_rows, dtype=dtype, device=device)
        self._on_host = deque(
            torch.zeros(num_columns, num_rows, dtype=dtype, pin_memory=True)
            for _ in range(_NUM_UNDER_WAY)
        )

    def fill(self, *columns: NDArray[np.generic]) -> None:
        self._on_host.rotate()
        source = self._on_host[0]
        values = source.numpy()
        for row, column in enumerate(columns):
            values[row, : len(column)] = column
        self.on_device.copy_(source, non_blocking=True)
