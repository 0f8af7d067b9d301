"""Rotary embeddings in config.json, in the two ways of writing them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from config_files import ABSENT, read_changed
from mini_infer.errors import ModelFolderError
from mini_infer_engine.rope_config import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeConfig,
    YarnRope,
)

PHI_3: dict[str, object] = {"architectures": ["Phi3ForCausalLM"]}
GEMMA_3: dict[str, object] = {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "rope_theta": ABSENT,
}
LONG: dict[str, object] = {"short_factor": [1.0] * 4, "long_factor": [2, 3, 4, 5.5]}
places = pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])


def read_rope(folder: Path, **changes: object) -> RopeConfig:
    (rope,) = read_changed(folder, **changes).ropes
    return rope


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 5000}, 5000.0),
        ({"rope_theta": ABSENT}, 10000.0),
        ({"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 7.5}}, 7.5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_scaling": {"type": "default"}}, 10000.0),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": None}, 10000.0),
    ],
)
def test_theta_stands_in_either_place(
    tmp_path: Path, changes: dict[str, object], theta: float
) -> None:
    assert read_rope(tmp_path, **changes) == RopeConfig(theta=theta, rotary_dim=8)


@places
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaled_kinds(tmp_path: Path, place: str, key: str) -> None:
    def read(**rope: object) -> RopeConfig:
        return read_rope(tmp_path, **{place: {key: rope.pop("kind"), **rope}})

    assert read(kind="linear", factor=4) == LinearRope(theta=1e4, rotary_dim=8, factor=4.0)
    dynamic = DynamicRope(theta=1e4, rotary_dim=8, factor=2.0, max_positions=128)
    assert read(kind="dynamic", factor=2.0) == dynamic
    llama3 = Llama3Rope(
        theta=5e5,
        rotary_dim=8,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=32,
    )
    given = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}
    assert read(kind="llama3", factor=8, rope_theta=5e5, **given) == llama3
    yarn = read(kind="yarn", factor=4.0, original_max_position_embeddings=32)
    assert yarn == YarnRope(
        theta=1e4,
        rotary_dim=8,
        attention_factor=0.1 * math.log(4) + 1,
        factor=4.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        original_max_positions=32,
    )


@pytest.mark.parametrize(
    ("given", "attention_factor"),
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_temperature_of_yarn(
    tmp_path: Path, given: dict[str, object], attention_factor: float
) -> None:
    rope = read_rope(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0, **given})
    assert rope.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_of_phi_3(tmp_path: Path, kind: str) -> None:
    config = read_changed(
        tmp_path,
        **PHI_3,
        rope_scaling={"type": kind, **LONG},
        original_max_position_embeddings=64,
    )
    assert config.ropes == (
        LongRope(
            theta=1e4,
            rotary_dim=8,
            attention_factor=math.sqrt(1 + math.log(2) / math.log(64)),
            short_factors=(1.0,) * 4,
            long_factors=(2.0, 3.0, 4.0, 5.5),
            original_max_positions=64,
        ),
    )
    assert config.turning_point == 64


def test_part_of_a_head_turns_in_phi_3_alone(tmp_path: Path) -> None:
    assert read_rope(tmp_path, **PHI_3, partial_rotary_factor=0.75).rotary_dim == 6
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert read_rope(tmp_path, **PHI_3, rope_parameters=rope).rotary_dim == 4
    with pytest.raises(ModelFolderError, match="json: partial_rotary_factor must be 1 or absent"):
        read_changed(tmp_path, partial_rotary_factor=0.5)
    with pytest.raises(ModelFolderError, match=r"rope_parameters\.partial_rotary_factor must be"):
        read_changed(tmp_path, rope_parameters=rope)


def test_gemma_3_turns_sliding_layers_otherwise(tmp_path: Path) -> None:
    local = RopeConfig(theta=10_000.0, rotary_dim=8)
    default = read_changed(tmp_path, **GEMMA_3)
    assert default.layer_ropes == (*[local] * 5, RopeConfig(theta=1e6, rotary_dim=8))
    older = read_changed(
        tmp_path,
        **{**GEMMA_3, "rope_theta": 2e6},
        rope_local_base_freq=500,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    newer = read_changed(
        tmp_path,
        **GEMMA_3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500},
        },
    )
    assert older == newer
    assert older.layer_ropes[0] == RopeConfig(theta=500.0, rotary_dim=8)
    assert older.layer_ropes[5] == LinearRope(theta=2e6, rotary_dim=8, factor=8.0)


def test_the_original_context_of_gemma_3_stands_in_its_object_alone(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
    for given, expected in (({}, 128), ({"original_max_position_embeddings": 32}, 32)):
        config = read_changed(
            tmp_path,
            **GEMMA_3,
            rope_parameters={"full_attention": yarn | given},
            original_max_position_embeddings=64,
        )
        assert isinstance(rope := config.layer_ropes[5], YarnRope)
        assert rope.original_max_positions == expected


@pytest.mark.parametrize(
    ("rope", "max_context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "dynamic", "factor": 1e6}, 2**24),
    ],
)
def test_scaling_can_reach_further(
    tmp_path: Path, rope: dict[str, object], max_context: int
) -> None:
    assert read_changed(tmp_path, rope_scaling=rope).max_context == max_context


@places
@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"type": "magic", "factor": 2.0}, "type"),
        ({"rope_type": "longrope", **LONG}, "rope_type"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"factor": 8.0}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "dynamic", "factor": "2"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings",
        ),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta"),
    ],
)
def test_bad_value_is_refused_by_name(
    tmp_path: Path, place: str, rope: dict[str, object], key: str
) -> None:
    with pytest.raises(ModelFolderError, match=rf"{place}\.{key} must be"):
        read_changed(tmp_path, **{place: rope})


@pytest.mark.parametrize(
    "factors", [[1.0] * 3, [1.0] * 5, 1.0, None, [1.0, 1.0, 1.0, 0], [1.0, 1.0, 1.0, "1"]]
)
@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
def test_bad_factors_of_longrope_are_refused(tmp_path: Path, key: str, factors: object) -> None:
    rope = {"type": "longrope", **LONG, key: factors}
    with pytest.raises(ModelFolderError, match=rf"rope_scaling\.{key} must be a list"):
        read_changed(tmp_path, **PHI_3, rope_scaling=rope)
