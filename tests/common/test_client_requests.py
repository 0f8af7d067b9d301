"""What users give to the clients, and the messages that are made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from common.stand_in_service import Script
from mini_infer import RepetitionDetection
from mini_infer.chats import ChatOptions
from mini_infer.client_wire import (
    GenerateOptions,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from mini_infer.errors import InvalidRequestError
from mini_infer.v1 import generate_pb2 as pb2


def test_options_reach_their_fields() -> None:
    request = generate_request(
        [4, 5],
        {
            "model": "demo",
            "request_id": "r",
            "priority": -3,
            "cache_salt": "s",
            "add_special_tokens": False,
            "temperature": 0.5,
            "top_k": 0,
            "top_p": 0.25,
            "seed": 0,
            "n": 2,
            "max_tokens": 7,
            "min_tokens": 2,
            "stop": "end",
            "stop_token_ids": [9],
            "ignore_eos": True,
            "ids_only": True,
            "stream_interval": 3,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "min_p": 0.0,
            "typical_p": 0.5,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.0,
            "frequency_penalty": -0.5,
            "logit_bias": {9: -100, 0: 0.5},
            "allowed_token_ids": [0, 9],
            "bad_words": ["a", " b"],
            "repetition_detection": RepetitionDetection(max_period=8, num_repeats=3),
            "logprobs": 0,
            "prompt_logprobs": 5,
            "regex": "a*",
        },
    )
    assert request == pb2.GenerateRequest(
        token_ids=pb2.TokenIds(ids=[4, 5]),
        model="demo",
        request_id="r",
        priority=-3,
        cache_salt="s",
        add_special_tokens=False,
        sampling=pb2.SamplingOptions(
            temperature=0.5,
            top_k=0,
            top_p=0.25,
            seed=0,
            n=2,
            min_p=0.0,
            typical_p=0.5,
            repetition_penalty=1.5,
            presence_penalty=0.0,
            frequency_penalty=-0.5,
            logit_bias={9: -100, 0: 0.5},
            allowed_token_ids=[0, 9],
            bad_words=["a", " b"],
        ),
        stopping=pb2.StoppingOptions(
            max_tokens=7,
            min_tokens=2,
            stop=["end"],
            stop_token_ids=[9],
            ignore_eos=True,
            repetition_detection=pb2.RepetitionDetection(max_period=8, min_period=1, num_repeats=3),
        ),
        output=pb2.OutputOptions(
            ids_only=True,
            stream_interval=3,
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            logprobs=0,
            prompt_logprobs=5,
        ),
        structured_output=pb2.StructuredOutput(regex="a*"),
    )


def test_each_field_of_the_options_has_an_option() -> None:
    """What can be asked for can be asked for with a client, and nothing else."""
    names = {
        field.name
        for message in (
            pb2.SamplingOptions,
            pb2.StoppingOptions,
            pb2.OutputOptions,
            pb2.StructuredOutput,
        )
        for field in message.DESCRIPTOR.fields
    }
    of_the_request = {"model", "request_id", "priority", "cache_salt", "add_special_tokens"}
    assert set(GenerateOptions.__annotations__) - set(ChatOptions.__annotations__) == (
        names | of_the_request
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json_schema": '{"a":1}'}, pb2.StructuredOutput(json_schema='{"a":1}')),
        (
            {"json_schema": {"b": 1, "a": None}},
            pb2.StructuredOutput(json_schema='{"b": 1, "a": null}'),
        ),
        ({"json_schema": {}, "json_object": False}, pb2.StructuredOutput(json_schema="{}")),
        ({"json_object": True, "regex": None}, pb2.StructuredOutput(json_object=True)),
        ({"grammar": ""}, pb2.StructuredOutput(grammar="")),
        ({"choice": ("a", "b")}, pb2.StructuredOutput(choice=pb2.Choices(texts=["a", "b"]))),
        ({"choice": []}, pb2.StructuredOutput(choice=pb2.Choices())),
    ],
    ids=str,
)
def test_language_reaches_its_field(options: Any, expected: pb2.StructuredOutput) -> None:
    assert generate_request("hi", options).structured_output == expected


def test_no_language_is_absent() -> None:
    options: Any = {"json_object": False, "regex": None, "choice": None}
    assert not generate_request("hi", options).HasField("structured_output")


def test_repetition_detection_may_be_a_mapping() -> None:
    detection = {"max_period": 8, "num_repeats": 3}
    request = generate_request("hi", {"repetition_detection": detection})
    assert request.stopping.repetition_detection == pb2.RepetitionDetection(**detection)


def test_absent_options_stay_absent() -> None:
    request = generate_request("hi", {})
    assert not request.sampling.HasField("temperature")
    assert not request.stopping.HasField("max_tokens")
    assert not request.sampling.HasField("n")
    assert not any(map(request.HasField, ("request_id", "priority", "cache_salt")))


def test_stop_may_be_one_string_or_several() -> None:
    assert list(generate_request("hi", {"stop": ["a", "b"]}).stopping.stop) == ["a", "b"]


def test_chat_prompt() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    request = generate_request(chat, {"add_generation_prompt": False})
    assert [(each.role, each.content[0].text) for each in request.chat.messages] == [
        ("system", "s"),
        ("user", "u"),
    ]
    assert not request.chat.add_generation_prompt


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 1.0}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "ü"}}}
CHAT_OPTIONS: Any = {
    "add_generation_prompt": False,
    "continue_final_message": True,
    "tools": [TOOL],
    "documents": [{"text": "x"}],
    "template_kwargs": {"z": 2**60, "n": [1, 1.0]},
    "chat_template": "rag",
}
LONG_CHAT: Any = [
    {"role": "user", "content": "", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": "text"}}]},
    {"role": "tool", "content": "42", "tool_call_id": "1"},
]


def test_chat_options_reach_their_fields(client: Any, script: Script) -> None:
    client.tokenize(LONG_CHAT, **CHAT_OPTIONS)
    client.generate(LONG_CHAT, max_tokens=1, **CHAT_OPTIONS).text()
    tokenized, generated = script.asked
    assert tokenized.chat == generated.chat
    call = pb2.ToolCall(id="1", function_name="f", arguments_json='{"b": 1, "a": "ü"}')
    expected = pb2.Chat(
        messages=[
            pb2.ChatMessage(role="user", content=[pb2.ContentPart(text="")], name="Ann"),
            pb2.ChatMessage(role="assistant", tool_calls=[call], reasoning_content="Hm."),
            pb2.ChatMessage(
                role="assistant",
                tool_calls=[pb2.ToolCall(function_name="g", arguments_text="text")],
            ),
            pb2.ChatMessage(role="tool", content=[pb2.ContentPart(text="42")], tool_call_id="1"),
        ],
        add_generation_prompt=False,
        continue_final_message=True,
        tools_json=[json.dumps(TOOL)],
        documents_json=['{"text": "x"}'],
        chat_template="rag",
        template_kwargs_json='{"z": 1152921504606846976, "n": [1, 1.0]}',
    )
    assert generated.chat == expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": -1}, "sampling.seed"),
        ({"n": -1}, "sampling.n"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": b"\xff"}, "cache_salt"),
        ({"max_tokens": 10**11}, "stopping.max_tokens"),
        ({"max_tokens": "5"}, "stopping.max_tokens"),
        ({"stop": ["a", "\ud800"]}, "stopping.stop"),
        ({"stop_token_ids": [-1]}, "stopping.stop_token_ids"),
        ({"stream_interval": -1}, "output.stream_interval"),
        ({"model": "\ud800"}, "model"),
        ({"min_p": "much"}, "sampling.min_p"),
        ({"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        ({"logit_bias": {"fox": 1.0}}, "sampling.logit_bias"),
        ({"logit_bias": {5: None}}, "sampling.logit_bias"),
        ({"allowed_token_ids": [-1]}, "sampling.allowed_token_ids"),
        ({"bad_words": "fox"}, "sampling.bad_words"),
        ({"bad_words": [5]}, "sampling.bad_words"),
        ({"repetition_detection": 5}, "stopping.repetition_detection"),
        ({"repetition_detection": {"period": 5}}, "stopping.repetition_detection"),
        ({"repetition_detection": {"max_period": -1}}, "stopping.repetition_detection"),
        ({"logprobs": -1}, "output.logprobs"),
        ({"logprobs": "all"}, "output.logprobs"),
        ({"prompt_logprobs": 2**32}, "output.prompt_logprobs"),
        ({"json_schema": {"a": {1}}}, "structured_output.json_schema"),
        ({"json_schema": {"a": float("nan")}}, "structured_output.json_schema"),
        ({"json_schema": True}, "structured_output.json_schema"),
        ({"json_object": "yes"}, "structured_output.json_object"),
        ({"regex": 5}, "structured_output.regex"),
        ({"grammar": "\ud800"}, "structured_output.grammar"),
        ({"choice": "fox"}, "structured_output.choice.texts"),
        ({"choice": [5]}, "structured_output.choice.texts"),
        ({"regex": "a", "choice": ["a"]}, "structured_output"),
    ],
    ids=str,
)
def test_value_that_no_field_holds_is_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request("hi", options)
    assert [each.field for each in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("\ud800", "text"),
        ([4, -1], "token_ids.ids"),
        ([{"role": "user", "content": "\udfff"}], "chat.messages[0].content[0].text"),
        ([{"role": 7, "content": "a"}], "chat.messages[0].role"),
    ],
    ids=["text", "ids", "content", "role"],
)
def test_prompt_that_no_field_holds_is_named(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request(prompt, {"top_k": -1})
    assert [each.field for each in caught.value.violations] == ["sampling.top_k", field]
    with pytest.raises(InvalidRequestError) as caught:
        detokenize_request(prompt, None) if field == "token_ids.ids" else tokenize_request(
            prompt, None, {}
        )
    assert [each.field for each in caught.value.violations] == [field.removesuffix(".ids")]


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        generate_request("hi", {"max_token": 3})  # type: ignore[typeddict-unknown-key]
