"""How ids are chosen from logits and come to the host: step by step, on any device.

`graphed_choice.py` does it with CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from mini_infer_kernels.sampling_kernels import DrawControls, SamplingKernels
from numpy.typing import NDArray

from mini_infer_engine.batch import FillMasks, Floats, Ints, RowStatus, SamplingColumns


class ChosenIds(NamedTuple):
    """What was chosen for R rows.

    Attributes:
        token_ids: [R].
        statuses: [R] a `RowStatus` each; the ids of a row that is not OK mean nothing.
    """

    token_ids: Ints
    statuses: NDArray[np.int32]


LaunchedIds = Callable[[], ChosenIds]
"""A choice that was launched: waits for the device and gives the ids; to be called once."""


class TokenChoice(Protocol):
    """Chooses a token a row, when everything that changes logits has been applied."""

    def likeliest(self, logits: torch.Tensor) -> LaunchedIds:
        """The likeliest token of each row.

        Args:
            logits: [R, vocab_size] float32.
        """
        ...

    def draw(
        self, logits: torch.Tensor, columns: SamplingColumns, fill_masks: FillMasks
    ) -> LaunchedIds:
        """A token of each row as its parameters have it.

        Args:
            logits: [R, vocab_size] float32.
            columns: How, for the R rows.
            fill_masks: Gives the masks of the masked rows; called while the device may still be
                computing the logits.
        """
        ...


class EagerChoice:
    """Launches operation by operation, and copies what a step needs in tensors of its own."""

    def __init__(self, kernels: SamplingKernels, device: torch.device) -> None:
        """Takes the operations and where logits lie."""
        self._kernels = kernels
        self._device = device

    def likeliest(self, logits: torch.Tensor) -> LaunchedIds:
        """As `TokenChoice.likeliest`."""
        if not logits.is_cuda:  # numpy searches several times as fast
            scores = logits.numpy()
            ids = scores.argmax(-1)
            return partial(_judged, ids, scores[np.arange(len(ids)), ids])
        best, chosen = logits.max(-1)
        return lambda: _judged(chosen.numpy(force=True), best.numpy(force=True))

    def draw(
        self, logits: torch.Tensor, columns: SamplingColumns, fill_masks: FillMasks
    ) -> LaunchedIds:
        """As `TokenChoice.draw`."""
        token_ids, statuses = self._kernels.choose_tokens(
            logits, self.controls(columns, fill_masks)
        )
        return lambda: ChosenIds(token_ids.numpy(force=True), statuses.numpy(force=True))

    def controls(self, columns: SamplingColumns, fill_masks: FillMasks) -> DrawControls:
        """The rows' parameters as the kernels take them."""
        temperatures, top_ps, min_ps, typical_ps = self._tensors(
            columns.temperatures, columns.top_ps, columns.min_ps, columns.typical_ps
        )
        top_ks, mask_rows = self._tensors(columns.top_ks.astype(np.int32), mask_indices(columns))
        seeds, positions = self._tensors(columns.seeds.view(np.int64), columns.positions)
        # Last, since the device may compute the logits until then.
        masks = fill_masks() if len(columns.masked) else np.empty((0, 0), np.int32)
        return DrawControls(
            temperatures=temperatures,
            top_ks=top_ks,
            top_ps=top_ps,
            min_ps=min_ps,
            typical_ps=typical_ps,
            seeds=seeds,
            positions=positions,
            mask_indices=mask_rows,
            masks=self._tensor(masks),
        )

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _tensors(self, *columns: NDArray[np.generic]) -> tuple[torch.Tensor, ...]:
        """Columns of one length and type, which take one copy together."""
        return self._tensor(np.stack(columns)).unbind()


def _judged(ids: Ints, greatest: Floats) -> ChosenIds:
    """Ids of the greatest logits, NaN being above all."""
    statuses = np.where(np.isfinite(greatest), RowStatus.OK, RowStatus.NON_FINITE)
    statuses[greatest == -np.inf] = RowStatus.NOTHING_ALLOWED
    return ChosenIds(ids, statuses.astype(np.int32))


def mask_indices(columns: SamplingColumns) -> NDArray[np.int32]:
    """[R] which of the step's masks each row has, -1 for none."""
    indices = np.full(len(columns.rows), -1, np.int32)
    indices[columns.masked] = np.arange(len(columns.masked))
    return indices
