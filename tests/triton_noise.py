"""The noise of given words, by Triton; import it after `triton_functions.prepare_triton`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mini_infer_kernels.sampling.noise import clocks_of_words


def noise_of_words(words: torch.Tensor) -> torch.Tensor:
    """[N] float32 of [N] int64, N up to 64."""
    noise = torch.empty(len(words), device=words.device)
    _noise_kernel[(1,)](words, noise, len(words), BLOCK=64)
    return noise


@triton.jit
def _noise_kernel(words_ptr, noise_ptr, num_words, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + places, mask=places < num_words, other=0).to(tl.uint32)
    tl.store(noise_ptr + places, -tl.log(clocks_of_words(words)), mask=places < num_words)
