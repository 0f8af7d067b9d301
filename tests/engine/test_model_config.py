import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini_infer.config import bundled_model
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import MAX_JSON_BYTES
from mini_infer_engine.model_config import (
    MAX_PARAMETERS,
    ModelConfig,
    model_fingerprint,
    read_generation_defaults,
    read_model_config,
)
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ABSENT = object()


def write_config(folder: Path, **changes: object) -> Path:
    values = {key: value for key, value in {**BASE, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read_changed(folder: Path, **changes: object) -> ModelConfig:
    return read_model_config(write_config(folder, **changes))


def write_generation_config(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_reads_every_value(tmp_path: Path) -> None:
    assert read_changed(tmp_path, attention_bias=True, mlp_bias=True) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        checkpoint_dtype="bfloat16",
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_bundled_models_are_readable() -> None:
    for name in ("demo", "demo-draft"):
        config = read_model_config(bundled_model(name))
        assert config.max_position_embeddings >= 4096
        assert config.eos_token_ids
        assert 0 < config.num_parameters < 8_000_000


@pytest.mark.parametrize("absent", [ABSENT, None], ids=["absent", "null"])
def test_absent_keys_take_the_defaults_of_transformers(tmp_path: Path, absent: object) -> None:
    from transformers import LlamaConfig

    optional = [
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "torch_dtype",
    ]
    config = read_changed(tmp_path, **dict.fromkeys(optional, absent))

    reference = LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert reference.rope_parameters is not None
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == reference.head_dim
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.checkpoint_dtype == "float32"
    assert config.bos_token_id is None
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 5000}, 5000.0),
        ({"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 7.5}}, 7.5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_scaling": {"type": "default"}}, 10000.0),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": None}, 10000.0),
    ],
)
def test_rope_theta_stands_in_either_place(
    tmp_path: Path, changes: dict[str, object], theta: float
) -> None:
    assert read_changed(tmp_path, **changes).rope_theta == theta


def test_newer_dtype_key_wins(tmp_path: Path) -> None:
    config = read_changed(tmp_path, dtype="float16", torch_dtype="float32")
    assert config.checkpoint_dtype == "float16"


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    read_changed(tmp_path, pretraining_tp=1, use_cache=True, something=[float("inf")])


NOT_INTEGERS = ["8", 8.0, True, [8], {"a": 8}, -1, 0, 10**30, float("nan"), float("inf")]
NOT_FLAGS = ["true", 1, 0, []]
NOT_NUMBERS = ["1", True, -1.0, [1], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
            for value in NOT_INTEGERS
        ),
        *(
            (key, value)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
            for value in (ABSENT, None)
        ),
        *((key, value) for key in ("rms_norm_eps", "rope_theta") for value in NOT_NUMBERS),
        *(
            (key, value)
            for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")
            for value in NOT_FLAGS
        ),
        ("rms_norm_eps", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("num_attention_heads", ABSENT),
        ("head_dim", 7),
        ("architectures", ABSENT),
        ("architectures", []),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", ["LlamaForCausalLM", "GPT2LMHeadModel"]),
        ("architectures", [["LlamaForCausalLM"]]),
        ("hidden_act", "gelu"),
        ("hidden_act", 3),
        ("auto_map", {"AutoModel": "modeling.Model"}),
        ("auto_map", "modeling.Model"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("torch_dtype", "float64"),
        ("torch_dtype", 16),
        ("dtype", "auto"),
        ("eos_token_id", 64),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", True),
        ("eos_token_id", [2, 64]),
        ("eos_token_id", [[2]]),
        ("bos_token_id", 64),
        ("bos_token_id", [1]),
        ("rope_scaling", "linear"),
        ("rope_parameters", [10000.0]),
    ],
)
def test_bad_value_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelFolderError) as caught:
        read_changed(tmp_path, **{key: value})
    assert f"config.json: {key} must be" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"type": "linear", "factor": 2.0}, "type"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"factor": 8.0}, "factor"),
        ({"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}, "full_attention"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta"),
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_refused(
    tmp_path: Path, place: str, rope: dict[str, object], key: str
) -> None:
    with pytest.raises(ModelFolderError, match=rf"{place}\.{key} must be"):
        read_changed(tmp_path, **{place: rope})


def test_architectures_error_lists_the_supported(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"\['LlamaForCausalLM'\], got \['Mamba"):
        read_changed(tmp_path, architectures=["MambaForCausalLM"])


def test_head_dim_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="head_dim must be given"):
        read_changed(tmp_path, head_dim=None, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(ModelFolderError, match=r"head_dim must be even .* \(it is 1\)"):
        read_changed(tmp_path, head_dim=None, num_attention_heads=32)


def test_sizes_that_are_huge_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"at most {MAX_PARAMETERS}"):
        read_changed(tmp_path, vocab_size=2**24, hidden_size=2**17, head_dim=8)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, ABSENT, (2,)),
        ([2, 3, 2], ABSENT, (2, 3)),
        (2, None, (2,)),
        (2, 5, (5,)),
        (2, [5, 6], (5, 6)),
        (None, 7, (7,)),
        (2, [], ()),
        (None, None, ()),
    ],
)
def test_end_ids_of_generation_config_win(
    tmp_path: Path, in_config: object, in_generation: object, expected: tuple[int, ...]
) -> None:
    if in_generation is not ABSENT:
        write_generation_config(tmp_path, eos_token_id=in_generation)
    assert read_changed(tmp_path, eos_token_id=in_config).eos_token_ids == expected


def test_bad_end_id_names_its_file(tmp_path: Path) -> None:
    write_generation_config(tmp_path, eos_token_id=64)
    with pytest.raises(ModelFolderError, match=r"generation_config\.json: eos_token_id must be"):
        read_changed(tmp_path)


def test_fingerprint_follows_config_shapes_and_names(tmp_path: Path) -> None:
    import numpy as np

    write_config(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32)}, weights)
    first = model_fingerprint(tmp_path)
    assert len(bytes.fromhex(first)) == 32
    assert model_fingerprint(tmp_path) == first

    save_file({"a": np.zeros((3, 2), np.float32)}, weights)
    reshaped = model_fingerprint(tmp_path)
    write_config(tmp_path, rope_theta=5000.0)
    rebased = model_fingerprint(tmp_path)
    assert len({first, reshaped, rebased}) == 3

    weights.unlink()
    with pytest.raises(ModelFolderError, match="has no weights"):
        model_fingerprint(tmp_path)


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        tie_word_embeddings=True,
        eos_token_id=[4, 5],
        dtype="float16",
    ).save_pretrained(tmp_path)
    defaults = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=9)  # type: ignore[no-untyped-call]
    defaults.save_pretrained(tmp_path)

    config = read_model_config(tmp_path)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (6, 3, 16)
    assert config.rope_theta == 12345.0
    assert config.tie_word_embeddings
    assert config.checkpoint_dtype == "float16"
    assert config.eos_token_ids == (9,)
    assert read_generation_defaults(tmp_path).temperature == 0.5


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"folder .* does not exist"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"config\.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(ModelFolderError, match="expected at most"):
        read_model_config(tmp_path)
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelFolderError, match=r"generation_config\.json must hold"):
        read_model_config(tmp_path)
    with pytest.raises(ModelFolderError, match=r"generation_config\.json must hold"):
        read_generation_defaults(tmp_path)


def test_refuses_rope_scaling_that_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"rope_parameters\.rope_type"):
        read_model_config(tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=0, max_value=256)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LlamaForCausalLM", "silu", "float32", "default", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "factor"]), inner, max_size=3
        )
    ),
    max_leaves=4,
)
keys = st.sampled_from(
    [
        *BASE,
        *("rope_scaling", "rope_parameters", "dtype", "attention_bias", "mlp_bias", "auto_map"),
        *("quantization_config", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens"),
    ]
)


def read_or_refuse(folder: Path) -> None:
    """Whatever the files hold: a checked config, or the typed error."""
    try:
        config = read_model_config(folder)
        defaults = read_generation_defaults(folder)
    except ModelFolderError:
        return
    assert config.num_q_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert 0 < config.num_parameters <= MAX_PARAMETERS
    assert 1 <= config.rope_theta < float("inf")
    assert all(0 <= each < config.vocab_size for each in config.eos_token_ids)
    assert 0 <= defaults.temperature <= 100
    assert 0 < defaults.top_p <= 1


same_folder = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@same_folder
@given(changes=st.dictionaries(keys, json_values, max_size=3))
def test_any_value_is_read_or_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write_config(tmp_path, **changes)
    write_generation_config(tmp_path, **changes)
    read_or_refuse(tmp_path)


@same_folder
@given(
    position=st.integers(min_value=0, max_value=10_000),
    length=st.integers(min_value=0, max_value=16),
    patch=st.binary(max_size=8),
)
def test_any_bytes_are_read_or_refused(
    tmp_path: Path, position: int, length: int, patch: bytes
) -> None:
    content = json.dumps(BASE).encode()
    position %= len(content)
    mutated = content[:position] + patch + content[position + length :]
    (tmp_path / "config.json").write_bytes(mutated)
    read_or_refuse(tmp_path)
