"""How rotations are made, tabled or computed; `tests/engine/test_architectures.py` has the rest."""

from __future__ import annotations

import math

import pytest
import torch
from mini_infer_engine.layers import rotary
from mini_infer_engine.layers.rotary import inverse_frequencies, make_rotary
from mini_infer_engine.rope_config import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeConfig,
    YarnRope,
)

CPU = torch.device("cpu")
PLAIN = RopeConfig(theta=100.0, rotary_dim=8)
ROPES: list[RopeConfig] = [
    PLAIN,
    RopeConfig(theta=100.0, rotary_dim=5, attention_factor=1.5),
    LinearRope(theta=100.0, rotary_dim=8, factor=3.0),
]


def turned(rope: RopeConfig, position: int, frequencies: list[float]) -> list[float]:
    return [rope.attention_factor * math.cos(position * each) for each in frequencies] * 2


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("max_table_bytes", [2**20, 0], ids=["tabled", "computed"])
def test_rotation_of_each_position(
    monkeypatch: pytest.MonkeyPatch, rope: RopeConfig, max_table_bytes: int
) -> None:
    monkeypatch.setattr(rotary, "MAX_TABLE_BYTES", max_table_bytes)
    made = make_rotary(rope, 50, torch.float32, CPU)
    positions = [0, 1, 49, 7]
    cos, sin = made.at(torch.tensor(positions), None)
    factor = getattr(rope, "factor", 1.0)
    frequencies = [
        rope.theta ** (-element / rope.rotary_dim) / factor
        for element in range(0, rope.rotary_dim, 2)
    ]
    expected = torch.tensor([turned(rope, position, frequencies) for position in positions])
    assert cos.shape == sin.shape == (4, 1, 2 * len(frequencies))
    assert torch.allclose(cos[:, 0], expected, atol=1e-6)
    first, second = sin[:, 0].chunk(2, -1)
    assert torch.equal(first, -second)
    assert torch.allclose(
        second**2 + cos[:, 0, : len(frequencies)] ** 2,
        rope.attention_factor**2 * torch.ones(()),
        atol=1e-5,
    )


def test_llama3_keeps_short_wavelengths_and_scales_long_ones() -> None:
    rope = Llama3Rope(
        theta=10_000.0,
        rotary_dim=32,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=64,
    )
    plain = inverse_frequencies(RopeConfig(theta=10_000.0, rotary_dim=32))
    ratios = (plain / inverse_frequencies(rope)).tolist()
    wavelengths = (2 * math.pi / plain).tolist()
    for ratio, wavelength in zip(ratios, wavelengths, strict=True):
        if wavelength < 64 / 4:
            assert ratio == pytest.approx(1)
        elif wavelength > 64:
            assert ratio == pytest.approx(8)
        else:
            assert 1 < ratio < 8
    assert ratios == sorted(ratios)


def test_yarn_goes_from_plain_to_interpolated() -> None:
    rope = YarnRope(
        theta=10_000.0,
        rotary_dim=64,
        factor=4.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        original_max_positions=2048,
    )
    plain = inverse_frequencies(RopeConfig(theta=10_000.0, rotary_dim=64))
    ratios = (plain / inverse_frequencies(rope)).tolist()
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(4)
    assert ratios == sorted(ratios)
    assert any(1.1 < ratio < 3.9 for ratio in ratios)


def test_dynamic_grows_behind_its_positions_only() -> None:
    rope = DynamicRope(theta=100.0, rotary_dim=8, factor=2.0, max_positions=16)
    plain = make_rotary(PLAIN, 64, torch.float32, CPU)
    within = make_rotary(rope, 16, torch.float32, CPU)
    beyond = make_rotary(rope, 64, torch.float32, CPU)
    positions = torch.tensor([3, 3, 15, 40])
    lengths = torch.tensor([4, 17, 16, 41])
    expected = plain.at(positions, None)[0]
    assert torch.equal(within.at(positions[:1], None)[0], expected[:1])
    got = beyond.at(positions, lengths)[0]
    assert torch.allclose(got[[0, 2]], expected[[0, 2]], atol=1e-6)
    assert not torch.allclose(got[1], expected[1], atol=1e-3)
    base = 100.0 * (2 * 41 / 16 - 1) ** (8 / 6)
    frequencies = [base ** (-element / 8) for element in (0, 2, 4, 6)]
    assert torch.allclose(got[3, 0], torch.tensor(turned(rope, 40, frequencies)), atol=1e-5)


def test_longrope_changes_its_factors_behind_its_positions() -> None:
    rope = LongRope(
        theta=100.0,
        rotary_dim=4,
        attention_factor=1.25,
        short_factors=(1.0, 2.0),
        long_factors=(4.0, 8.0),
        original_max_positions=16,
    )
    cos, _ = make_rotary(rope, 64, torch.float32, CPU).at(
        torch.tensor([5, 5]), torch.tensor([16, 17])
    )
    short = turned(rope, 5, [1.0, 0.1 / 2])
    long = turned(rope, 5, [1.0 / 4, 0.1 / 8])
    assert torch.allclose(cos[:, 0], torch.tensor([short, long]), atol=1e-6)
