"""What the tests of elementwise kernels share: types, poisoned memory, comparison, turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton_functions import DEVICE

ON_CPU = DEVICE.type == "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative errors of a whole tensor: a rounding or two."""
DTYPES = [each for each in TOLERANCES if not (ON_CPU and each is torch.bfloat16)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the device, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def nans(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Tensors that are allocated without values hold NaN, so that none is left unwritten unseen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert random(2).new_empty((3,)).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative error of the whole tensor against float64; NaN never passes."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCES[actual.dtype], float(error)


def turns(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as the engine has them, rows of one table, so that they are apart."""
    angles = torch.rand(num_tokens, width // 2, generator=torch.Generator().manual_seed(1)) * 7
    table = torch.empty(num_tokens, 2, 1, width)
    table[:, 0, 0] = torch.cat((angles.cos(), angles.cos()), -1)
    table[:, 1, 0] = torch.cat((-angles.sin(), angles.sin()), -1)
    cos, sin = table.to(dtype).to(DEVICE).unbind(1)
    return cos, sin
