"""What the engine checks of a request itself, whoever sent it."""

from __future__ import annotations

from typing import Any

import pytest
from engine.sampling_columns import resolved
from mini_infer.config import EngineConfig
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.resolved_sampling import RepetitionLimit
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.served_model import ServedModel, read_served_model

KEY = StreamKey(b"", 0)


@pytest.fixture(scope="module")
def served() -> ServedModel:
    config = EngineConfig()
    return read_served_model(config, read_model_config(config.model_folder), "float32")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": -3.0},
        {"seed": -1},
        {"max_tokens": 0},
        {"min_tokens": 101},
        {"stop_token_ids": [4096]},
        {"bias_ids": [4096], "bias_values": [1.0]},
        {"bias_ids": [1], "bias_values": [101.0]},
        {"bias_ids": [1], "bias_values": [1.0, 2.0]},
        {"bias_ids": [1, 2], "bias_values": [1.0]},
        {"bias_ids": [1, 1], "bias_values": [1.0, 2.0]},
        {"allowed_token_ids": [-1]},
        {"bad_words": [[]]},
        {"bad_words": [[4096]]},
        {"bad_words": [[1]] * 1000},
        {"num_logprobs": 21},
        {"num_prompt_logprobs": 21},
        {"repetition": RepetitionLimit(0, 4, 2)},
        {"repetition": RepetitionLimit(1, 10**9, 2)},
    ],
)
def test_what_is_out_of_range_is_refused(served: ServedModel, options: dict[str, Any]) -> None:
    with pytest.raises(MiniInferError) as refused:
        served.sequences([KEY], [1], resolved(**options))
    assert refused.value.reason is ErrorReason.INVALID_FIELD


def test_what_is_in_range_is_taken(served: ServedModel) -> None:
    sampling = resolved(
        bias_ids=[1, 2],
        bias_values=[-100.0, 100.0],
        bad_words=[[1, 2], [3]],
        repetition=RepetitionLimit(1, 1024, 2),
        num_logprobs=20,
    )
    (sequence,) = served.sequences([KEY], [1], sampling)
    assert sequence.sampling == sampling
