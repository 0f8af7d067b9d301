"""The names that users rely on; taking one away breaks their programs."""

from __future__ import annotations

import inspect
from dataclasses import fields

import mini_infer
import pytest
from mini_infer.config import EngineConfig

EXPORTED = [
    "AsyncClient",
    "Client",
    "ConfigError",
    "EngineConfig",
    "GenerationOutput",
    "InvalidRequestError",
    "LLMEngine",
    "MiniInferError",
    "RepetitionDetection",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]


def test_exported_names() -> None:
    assert mini_infer.__all__ == EXPORTED


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(mini_infer, name) is not None


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMEngin'"):
        _ = mini_infer.LLMEngin


def test_the_original_engine_config_is_understood() -> None:
    config = EngineConfig(model="/models/llama", max_num_seqs=64, block_size=16)
    assert (config.model, config.max_num_seqs, config.block_size) == ("/models/llama", 64, 16)


def test_configs_take_keywords_and_never_change() -> None:
    with pytest.raises(TypeError):
        EngineConfig("/models/llama")  # type: ignore[misc]
    config = EngineConfig()
    with pytest.raises(AttributeError):
        config.block_size = 32  # type: ignore[misc]


def test_the_original_generate_call_is_understood() -> None:
    parameters = inspect.signature(mini_infer.LLMEngine.generate).parameters
    assert list(parameters)[:2] == ["self", "prompts"]
    output = {each.name for each in fields(mini_infer.GenerationOutput)}
    assert {"text", "token_ids", "finish_reason"} <= output


def test_generate_gives_texts() -> None:
    engine = mini_infer.LLMEngine(EngineConfig(max_num_seqs=4, kv_cache_tokens=4096, device="cpu"))
    outputs = engine.generate(["Once upon a time", "There was"], max_tokens=3)
    assert [len(each.token_ids) <= 3 for each in outputs] == [True, True]
    assert all(isinstance(each.text, str) for each in outputs)
