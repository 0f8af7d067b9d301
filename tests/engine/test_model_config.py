import json
from pathlib import Path

import pytest
from config_files import (
    ABSENT,
    BASE,
    read_changed,
    write_config,
    write_generation_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini_infer.config import bundled_model
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import MAX_JSON_BYTES
from mini_infer_engine.generation_config import read_generation_defaults
from mini_infer_engine.model_config import (
    MAX_PARAMETERS,
    SUPPORTED_ARCHITECTURES,
    ModelConfig,
    model_fingerprint,
    read_model_config,
)
from mini_infer_engine.rope_config import RopeConfig
from safetensors.numpy import save_file


def test_reads_every_value(tmp_path: Path) -> None:
    assert read_changed(tmp_path, attention_bias=True, mlp_bias=True) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        activation="silu",
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        layer_windows=(None, None),
        layer_ropes=(RopeConfig(theta=10000.0, rotary_dim=8),) * 2,
        attention_scale=8**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        checkpoint_dtype="bfloat16",
        eos_token_ids=(2,),
    )


def test_bundled_models_are_readable() -> None:
    for name in ("demo", "demo-draft"):
        config = read_model_config(bundled_model(name))
        assert config.max_position_embeddings >= 4096
        assert config.eos_token_ids
        assert 0 < config.num_parameters < 8_000_000


def test_newer_dtype_key_wins(tmp_path: Path) -> None:
    config = read_changed(tmp_path, dtype="float16", torch_dtype="float32")
    assert config.checkpoint_dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"torch_dtype": "torch.float16"}, "checkpoint_dtype", "float16"),
        ({"hidden_act": "swish"}, "activation", "silu"),
        ({"hidden_act": "gelu_new"}, "activation", "gelu_pytorch_tanh"),
    ],
)
def test_other_names_of_the_same(
    tmp_path: Path, changes: dict[str, object], field: str, expected: str
) -> None:
    assert getattr(read_changed(tmp_path, **changes), field) == expected


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    read_changed(tmp_path, pretraining_tp=1, use_cache=True, something=[float("inf")])


PUBLISHED_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
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
        ("max_position_embeddings", 1),  # no room for a prompt and a token
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
        ("hidden_act", "relu"),
        ("hidden_act", 3),
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
        ("rope_scaling", "linear"),
        ("rope_parameters", [10000.0]),
    ],
)
def test_bad_value_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelFolderError) as caught:
        read_changed(tmp_path, **{key: value})
    assert f"config.json: {key} must be" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_architectures_error_lists_the_supported(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError) as caught:
        read_changed(tmp_path, architectures=["MambaForCausalLM"])
    assert all(name in str(caught.value) for name in SUPPORTED_ARCHITECTURES)
    assert "got ['Mamba" in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "auto_map", "is_read"),
    [
        ("Phi3ForCausalLM", PUBLISHED_CODE, True),
        ("Phi3ForCausalLM", {**PUBLISHED_CODE, "AutoTokenizer": "someone/gpt-4o"}, True),
        ("Phi3ForCausalLM", {**PUBLISHED_CODE, "AutoModel": "modeling_phi3.Other"}, False),
        ("Phi3ForCausalLM", {"AutoModelForCausalLM": ["modeling_phi3.Phi3ForCausalLM"]}, False),
        ("Phi3ForCausalLM", "modeling_phi3.Phi3ForCausalLM", False),
        ("LlamaForCausalLM", PUBLISHED_CODE, False),
        ("LlamaForCausalLM", {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}, False),
        ("Phi3ForCausalLM", {"AutoConfig": "microsoft/Phi--configuration_phi3.Phi3Config"}, True),
        ("Phi3ForCausalLM", {"AutoConfig": "someone/Phi--configuration_phi3.Other"}, False),
        ("LlamaForCausalLM", {}, True),
        ("LlamaForCausalLM", {"AutoTokenizer": ["tokenization.Own", None]}, True),
    ],
)
def test_code_in_the_folder_is_never_run(
    tmp_path: Path, architecture: str, auto_map: object, is_read: bool
) -> None:
    (tmp_path / "modeling_phi3.py").write_text("raise SystemExit('ran')")
    (tmp_path / "configuration_phi3.py").write_text("raise SystemExit('ran')")
    changes = {"architectures": [architecture], "auto_map": auto_map}
    if is_read:
        read_changed(tmp_path, **changes)
        return
    with pytest.raises(ModelFolderError, match=r"config\.json: auto_map must be absent"):
        read_changed(tmp_path, **changes)


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
    assert config.ropes == (RopeConfig(theta=12345.0, rotary_dim=16),)
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


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=0, max_value=256)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["silu", "gelu", "float32", "default", "linear", "yarn", "sliding_attention"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "factor", "full_attention"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=4,
)
keys = st.sampled_from(
    [
        *BASE,
        *("rope_scaling", "rope_parameters", "dtype", "attention_bias", "mlp_bias", "layer_types"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
        *("partial_rotary_factor", "rope_local_base_freq", "hidden_activation"),
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
    assert all(1 < rope.theta < float("inf") for rope in config.ropes)
    assert all(1 <= rope.rotary_dim <= config.head_dim for rope in config.ropes)
    assert all(window is None or window >= 1 for window in config.windows)
    assert 0 < config.attention_scale < float("inf")
    assert all(0 <= each < config.vocab_size for each in config.eos_token_ids)
    assert 0 <= defaults.temperature <= 100
    assert 0 < defaults.top_p <= 1


same_folder = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@same_folder
@given(
    architecture=st.sampled_from(SUPPORTED_ARCHITECTURES),
    changes=st.dictionaries(keys, json_values, max_size=3),
)
def test_any_value_is_read_or_refused(
    tmp_path: Path, architecture: str, changes: dict[str, object]
) -> None:
    write_config(tmp_path, **{"architectures": [architecture], **changes})
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
