"""The cosines and sines that turn queries and keys, for each kind of rotary embedding."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from mini_infer_engine.rope_config import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeConfig,
    YarnRope,
)

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of a batch, each [T, 1, width], in the model's data type; the halves of a row are
equal but for the sign of the sine (minus in the first), so that a turn is
`x * cos + swap_halves(x) * sin`. The width is the number of elements of a head that turn."""

MAX_TABLE_BYTES = 2**28
"""A larger table is not kept; each step computes its rows."""
_TABLED_AT_ONCE = 4096
"""Positions."""


class Rotary(Protocol):
    """Gives the rotation of a batch's tokens."""

    def at(self, positions: torch.Tensor, rotation_lens: torch.Tensor | None) -> Rotation:
        """Computes or looks up.

        Args:
            positions: [T] int64.
            rotation_lens: [T] int64, the length of text that each token is turned for; None
                where no rotary embedding of the model depends on it.
        """
        ...


def make_rotary(
    rope: RopeConfig, num_positions: int, dtype: torch.dtype, device: torch.device
) -> Rotary:
    """Chooses how to make rotations.

    Args:
        rope: The rotary embedding.
        num_positions: Positions that may come.
        dtype: The model's.
        device: The model's.
    """
    if isinstance(rope, LongRope):
        return LengthRotary(rope, dtype, device)
    if isinstance(rope, DynamicRope) and num_positions > rope.max_positions:
        return LengthRotary(rope, dtype, device)
    frequencies = inverse_frequencies(rope).to(device)
    width = 2 * len(frequencies)
    if num_positions * 2 * width * dtype.itemsize > MAX_TABLE_BYTES:
        return ComputedRotary(rope, frequencies, dtype)
    return TabledRotary(rope, frequencies, num_positions, dtype)


class TabledRotary:
    """Looks rotations up by position."""

    def __init__(
        self, rope: RopeConfig, frequencies: torch.Tensor, num_positions: int, dtype: torch.dtype
    ) -> None:
        """Computes the table piece by piece: what is made on the way is several times larger."""
        shape = (num_positions, 2, 1, 2 * len(frequencies))  # one lookup for both
        self._table = torch.empty(shape, dtype=dtype, device=frequencies.device)
        for start in range(0, num_positions, _TABLED_AT_ONCE):
            piece = self._table[start : start + _TABLED_AT_ONCE]
            positions = torch.arange(start, start + len(piece), device=frequencies.device)
            turns = _turns(positions, frequencies, rope.attention_factor)
            piece[:, 0, 0], piece[:, 1, 0] = turns

    def at(self, positions: torch.Tensor, rotation_lens: torch.Tensor | None) -> Rotation:
        """As `Rotary.at`."""
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin


class ComputedRotary:
    """Computes rotations from positions: for contexts whose table would be too large."""

    def __init__(self, rope: RopeConfig, frequencies: torch.Tensor, dtype: torch.dtype) -> None:
        """Takes the frequencies."""
        self._rope = rope
        self._frequencies = frequencies
        self._dtype = dtype

    def at(self, positions: torch.Tensor, rotation_lens: torch.Tensor | None) -> Rotation:
        """As `Rotary.at`."""
        cos, sin = _turns(positions, self._frequencies, self._rope.attention_factor)
        return cos.to(self._dtype).unsqueeze(1), sin.to(self._dtype).unsqueeze(1)


class LengthRotary:
    """Computes rotations whose frequencies depend on the length of the text."""

    def __init__(
        self, rope: DynamicRope | LongRope, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes what the frequencies are made of."""
        self._rope = rope
        self._dtype = dtype
        self._exponents = _exponents(rope.rotary_dim).to(device)
        if isinstance(rope, LongRope):
            factors = torch.tensor((rope.short_factors, rope.long_factors), device=device)
            self._long_and_short = 1.0 / (factors * rope.theta**self._exponents)

    def at(self, positions: torch.Tensor, rotation_lens: torch.Tensor | None) -> Rotation:
        """As `Rotary.at`."""
        assert rotation_lens is not None
        frequencies = self._frequencies(rotation_lens)
        cos, sin = _turns(positions, frequencies, self._rope.attention_factor)
        return cos.to(self._dtype).unsqueeze(1), sin.to(self._dtype).unsqueeze(1)

    def _frequencies(self, rotation_lens: torch.Tensor) -> torch.Tensor:
        """[T, width / 2] float32."""
        rope = self._rope
        if isinstance(rope, LongRope):
            is_long = rotation_lens > rope.original_max_positions
            return self._long_and_short.index_select(0, is_long.long())
        stretch = rope.factor * rotation_lens.clamp(min=rope.max_positions) / rope.max_positions
        power = rope.rotary_dim / (rope.rotary_dim - 2)
        bases = rope.theta * (stretch - (rope.factor - 1)) ** power
        return 1.0 / bases[:, None] ** self._exponents


def depends_on_length(rope: RopeConfig) -> bool:
    """Whether a token's rotation depends on more than its position."""
    return isinstance(rope, DynamicRope | LongRope)


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians per position of each pair of elements, for the kinds without a length.

    Args:
        rope: Any kind but `LongRope`; of a `DynamicRope` those up to its `max_positions`.

    Returns:
        [ceil(rotary_dim / 2)] float32, on the CPU.
    """
    plain = 1.0 / rope.theta ** _exponents(rope.rotary_dim)
    match rope:
        case LinearRope():
            return plain / rope.factor
        case Llama3Rope():
            return _llama3_frequencies(rope, plain)
        case YarnRope():
            return _yarn_frequencies(rope)
        case _:
            return plain


def _exponents(rotary_dim: int) -> torch.Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim


def _llama3_frequencies(rope: Llama3Rope, plain: torch.Tensor) -> torch.Tensor:
    wavelengths = 2 * math.pi / plain
    # How many wavelengths fit into the original context decides: few are scaled, many are kept,
    # and in between the two are blended.
    kept = rope.original_max_positions / wavelengths - rope.low_freq_factor
    kept = (kept / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn_frequencies(rope: YarnRope) -> torch.Tensor:
    powers = rope.theta ** _exponents(rope.rotary_dim)
    low, high = _yarn_dimension(rope, rope.beta_fast), _yarn_dimension(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp is a step, and not a division by zero
    dimensions = torch.arange(len(powers), dtype=torch.float32)
    interpolated = ((dimensions - low) / (high - low)).clamp(0, 1)
    return interpolated / (rope.factor * powers) + (1 - interpolated) / powers


def _yarn_dimension(rope: YarnRope, num_rotations: float) -> float:
    """The dimension that turns so many times within the original context."""
    positions = rope.original_max_positions / (num_rotations * 2 * math.pi)
    return rope.rotary_dim * math.log(positions) / (2 * math.log(rope.theta))


def _turns(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> Rotation:
    """Cos and sin, [T, width] float32.

    Args:
        positions: [T].
        frequencies: [width / 2] for all of them, or [T, width / 2].
        factor: Of both.
    """
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
