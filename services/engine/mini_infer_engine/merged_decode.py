"""Several decoding steps of a lone greedy row as one: each token goes straight into the next.

Between two steps of a small model, scheduling, inputs and the way of a token to its reader take a
third as long as the model. Here the model runs for several tokens without coming back, in one
recording (see `captured_decode.py`), as far as the row's last block has room. Tokens behind the
row's end are computed in vain; the scheduler drops them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from mini_infer_engine.batch import RowStatus, ScheduledBatch, StepTokens
from mini_infer_engine.captured_decode import decode_batch, record
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import Forward

MERGED_ROUNDS = 4
"""Tokens of a lone greedy row in a step of a small model: they come within a few milliseconds."""


class MergedDecode:
    """A recording of several rounds of one row."""

    def __init__(
        self, forward: Forward, cache: KVCache, buffers: InputBuffers, num_rounds: int
    ) -> None:
        """Records the rounds on block 0, which nobody uses yet; it is left cleared.

        Args:
            forward: The model.
            cache: Its cache.
            buffers: Makes the inputs.
            num_rounds: Tokens that a step makes, at most the size of a block.
        """
        self._buffers = buffers
        self._num_rounds = num_rounds
        inputs = buffers.build_window(decode_batch(1), cache, num_rounds)
        assert inputs is not None

        def rounds(
            token_ids: torch.Tensor, positions: torch.Tensor, window: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            chosen, greatest = [], []
            for later in range(num_rounds - 1, -1, -1):
                attention = replace(inputs.attention, positions=positions, slot_mapping=positions)
                visible = window[:, :, :-later] if later else window
                logits = forward(ModelInputs(token_ids, visible, attention, None))
                best, token_ids = logits.max(-1)  # NaN is greater than all
                positions = positions + 1
                chosen.append(token_ids)
                greatest.append(best)
            return torch.cat(chosen), torch.cat(greatest)

        tensors = (inputs.token_ids, inputs.attention.positions, inputs.cache)
        self._recording = record(rounds, tensors)
        cache.fill([0], 0.0)

    def run(self, batch: ScheduledBatch, cache: KVCache) -> StepTokens | None:
        """Makes the tokens of a batch that is one greedy row with room, else gives None.

        Args:
            batch: Not empty.
            cache: Holds its blocks, which must be neighbours.
        """
        sampling = batch.sampling
        if len(sampling.rows) != 1 or not sampling.is_plain:
            return None
        inputs = self._buffers.build_window(batch, cache, self._num_rounds)
        if inputs is None:
            return None
        ids, greatest = self._recording(inputs.token_ids, inputs.attention.positions, inputs.cache)
        is_finite = all(map(math.isfinite, greatest.tolist()))
        status = RowStatus.OK if is_finite else RowStatus.NON_FINITE
        return StepTokens(ids.numpy()[None], np.array([status], np.int32))
