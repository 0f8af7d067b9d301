"""A sampler made of torch's sort, as the mark that `benchmarks/sampling.py` compares with."""

from __future__ import annotations

import torch
from mini_infer_kernels.sampling_kernels import DrawControls


class SortSampler:
    """Dense penalties, a full sort, top-k, min-p, top-p by cumulative sums, softmax, multinomial.

    Its parameters are tensors on the device too, so a CUDA graph can hold it.
    """

    def __init__(self, controls: DrawControls, counts: torch.Tensor, amounts: torch.Tensor) -> None:
        """Keeps the rows' parameters.

        Args:
            controls: Of R rows, none greedy.
            counts: [R, vocab_size] int32, twice the outputs, plus 1 if in the prompt.
            amounts: [3, R] float32, repetition, presence and frequency penalties.
        """
        self._temperatures = controls.temperatures[:, None]
        vocab_size = counts.shape[1]
        self._top_ks = torch.where(controls.top_ks == 0, vocab_size, controls.top_ks)[:, None]
        self._top_ps = controls.top_ps[:, None]
        self._min_ps = controls.min_ps[:, None]
        self._is_seen = counts > 0
        self._num_outputs = counts // 2
        self._repetition, self._presence, self._frequency = amounts[:, :, None]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """[R] int64, drawn with torch's generator."""
        penalised = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = torch.where(self._is_seen, penalised, logits)
        logits = logits - self._frequency * self._num_outputs
        logits = logits - self._presence * (self._num_outputs > 0)
        ordered, ids = (logits / self._temperatures).sort(dim=-1, descending=True)
        ranks = torch.arange(ordered.shape[-1], device=ordered.device)
        ordered = ordered.masked_fill(ranks >= self._top_ks, -torch.inf)
        probabilities = ordered.softmax(-1)
        dropped = probabilities < self._min_ps * probabilities[:, :1]
        before = probabilities.cumsum(-1) - probabilities
        dropped |= before >= self._top_ps
        probabilities = probabilities.masked_fill(dropped, 0.0)
        return ids.gather(-1, torch.multinomial(probabilities, 1)).squeeze(-1)
