"""What each supported request field does, told to a stand-in engine and the real tokenizer."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import RunningGateway, StartGateway, exercises, submitted
from gateway.stand_ins import StandInEngine
from google.protobuf.struct_pb2 import Struct
from mini_infer.client import RequestFailed
from mini_infer.messages import Abort, FinishCode, Submit
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2 as service_pb2
from mini_infer_gateway.supported_fields import SUPPORTED_FIELDS


def test_each_supported_field_is_exercised() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    notes = re.findall(r"^@exercises\(([^)]*)\)", "".join(map(Path.read_text, files)), re.MULTILINE)
    assert {name for note in notes for name in re.findall(r'"(.+?)"', note)} == SUPPORTED_FIELDS


async def answered(
    served: RunningGateway, engine: StandInEngine, output: str, **options: Any
) -> Any:
    """The stream of a request whose output is the ids of a text, one a step; read to its end."""
    token_ids = await served.client.tokenize(output, add_special_tokens=False)
    stream = served.client.generate("x", **options)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    for position, token_id in enumerate(token_ids):
        is_last = position == len(token_ids) - 1
        finish = FinishCode.LENGTH if is_last else FinishCode.RUNNING
        await engine.step(submit.stream, position, [token_id], finish)
    await reading
    return stream


@exercises("GenerateRequest.text", "GenerateRequest.add_special_tokens")
@exercises("TokenizeRequest.text", "TokenizeRequest.add_special_tokens")
async def test_text_prompt(served: RunningGateway, engine: StandInEngine) -> None:
    plain = await served.client.tokenize("Once", add_special_tokens=False)
    special = await served.client.tokenize("Once")
    assert special != plain
    assert special[-len(plain) :] == plain
    assert (await submitted(served, engine, "Once")).prompt_ids == special
    submit = await submitted(served, engine, "Once", add_special_tokens=False)
    assert submit.prompt_ids == plain


@exercises("GenerateRequest.token_ids", "TokenIds.ids")
async def test_token_prompt(served: RunningGateway, engine: StandInEngine) -> None:
    submit = await submitted(served, engine, [9, 8, 7])
    assert submit.prompt_ids == [9, 8, 7]
    assert submit.output_ids == []


@exercises("GenerateRequest.chat", "TokenizeRequest.chat", "Chat.messages")
@exercises("ChatMessage.role", "ChatMessage.content", "ContentPart.text")
@exercises("Chat.add_generation_prompt")
async def test_chat_prompt(served: RunningGateway, engine: StandInEngine) -> None:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompts = [said("user", "Hi"), said("assistant", "Hi"), said("user", "Ho")]
    encoded = [await served.client.tokenize(prompt) for prompt in prompts]
    assert len({tuple(ids) for ids in encoded}) == 3
    assert (await submitted(served, engine, prompts[0])).prompt_ids == encoded[0]

    without = await served.client.tokenize(prompts[0], add_generation_prompt=False)
    assert encoded[0][: len(without)] == without != encoded[0]
    submit = await submitted(served, engine, prompts[0], add_generation_prompt=False)
    assert submit.prompt_ids == without


@exercises("Chat.tools", "Chat.tools_json", "Chat.documents_json", "Chat.template_kwargs")
@exercises("Chat.template_kwargs_json")
@exercises("Chat.chat_template", "Chat.continue_final_message")
@exercises("ChatMessage.name", "ChatMessage.tool_call_id", "ChatMessage.reasoning_content")
@exercises("ChatMessage.tool_calls", "ToolCall.id", "ToolCall.function_name")
@exercises("ToolCall.arguments_json", "ToolCall.arguments_text")
async def test_chat_fields_reach_the_template(
    folder: Path, engine: StandInEngine, talkative_tokenizer: str, start_gateway: StartGateway
) -> None:
    """Field by field; `test_chats.py` says what becomes of the whole."""
    served = await start_gateway(f"ipc://{folder}/engine", talkative_tokenizer)
    said = pb2.ChatMessage(role="user", content=[pb2.ContentPart(text="Hi")])

    async def prompt_of(chat: pb2.Chat, *messages: pb2.ChatMessage) -> str:
        chat.messages.extend(messages or [said])
        tokenized = await served.client._stub.Tokenize(service_pb2.TokenizeRequest(chat=chat))
        return await served.client.detokenize(tokenized.token_ids, skip_special_tokens=False)

    tool = Struct()
    tool.update({"size": 3})
    kwargs = Struct()
    kwargs.update({"mood": "glad"})
    assert await prompt_of(pb2.Chat(tools=[tool])) == 'TOOLS [{"size": 3}]'
    assert await prompt_of(pb2.Chat(tools_json=['{"b":1,"a":2}'])) == 'TOOLS [{"b": 1, "a": 2}]'
    assert '[{"text": "x"}]' in await prompt_of(pb2.Chat(documents_json=['{"text":"x"}']))
    assert '"mood": "glad"' in await prompt_of(pb2.Chat(template_kwargs=kwargs))
    as_json = pb2.Chat(template_kwargs_json='{"mood": {"b": 1.0, "a": 1}}')
    assert '"mood": {"b": 1.0, "a": 1}' in await prompt_of(as_json)
    assert await prompt_of(pb2.Chat(chat_template="plain")) == "[Hi]"
    plain = pb2.Chat(chat_template="plain", continue_final_message=True)
    assert await prompt_of(plain) == "[Hi"
    submit = await submitted(served, engine, [{"role": "user", "content": "Hi"}], tools=[{"a": 1}])
    prompt = await served.client.detokenize(submit.prompt_ids, skip_special_tokens=False)
    assert prompt == 'TOOLS [{"a": 1}]'

    calls = [
        pb2.ToolCall(id="1", function_name="f", arguments_json='{"a":1}'),
        pb2.ToolCall(function_name="g", arguments_text="{}"),
        pb2.ToolCall(function_name="h"),
    ]
    message = pb2.ChatMessage(
        role="assistant", name="Ann", tool_calls=calls, tool_call_id="2", reasoning_content="Hm."
    )
    (seen,) = json.loads(await prompt_of(pb2.Chat(), message))["messages"]
    assert (seen["name"], seen["tool_call_id"], seen["reasoning_content"]) == ("Ann", "2", "Hm.")
    assert "content" not in seen
    assert [call.get("id") for call in seen["tool_calls"]] == ["1", None, None]
    assert [call["function"] for call in seen["tool_calls"]] == [
        {"name": "f", "arguments": {"a": 1}},
        {"name": "g", "arguments": "{}"},
        {"name": "h", "arguments": {}},
    ]


@exercises("GenerateRequest.model")
async def test_model(served: RunningGateway, engine: StandInEngine) -> None:
    await submitted(served, engine, [5], model="demo")
    await submitted(served, engine, [5], model="")
    with pytest.raises(RequestFailed, match="MODEL_NOT_FOUND"):
        await served.client.generate([5], model="other").text()


@exercises("GenerateRequest.request_id", "AbortRequest.request_id")
async def test_request_id_is_unique_while_running_and_can_be_aborted(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream = served.client.generate([5], request_id="mine")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    with pytest.raises(RequestFailed, match="DUPLICATE_REQUEST_ID"):
        await served.client.generate([5], request_id="mine").text()
    await served.client.abort("mine")
    assert await engine.next(Abort) == Abort([submit.stream], answer=True)
    await engine.step(submit.stream, 0, [5], FinishCode.ABORTED)
    await reading
    assert stream.request_id == "mine"
    assert stream.finish_reason == "aborted"
    with pytest.raises(RequestFailed, match="REQUEST_NOT_FOUND"):
        await served.client.abort("mine")
    await submitted(served, engine, [5], request_id="mine")


@exercises("SamplingOptions.seed", "SamplingOptions.n")
@exercises("GenerateRequest.priority", "GenerateRequest.cache_salt")
async def test_scheduling_reaches_the_engine_once_for_all_choices(
    served: RunningGateway, engine: StandInEngine
) -> None:
    plain = await submitted(served, engine, [5])
    assert (plain.priority, plain.principal, plain.cache_salt, plain.siblings) == (0, "", "", [])
    options = {"priority": -7, "cache_salt": "é", "n": 3, "seed": 2**64 - 1}
    reading = asyncio.create_task(served.client.generate("Once", **options).text())
    submit = await engine.next(Submit)
    assert submit.prompt_ids == await served.client.tokenize("Once")
    assert (submit.priority, submit.principal, submit.cache_salt) == (-7, "", "é")
    assert submit.sampling.seed == 2**64 - 1
    assert len({submit.stream, *submit.siblings}) == 3
    for number in (submit.stream, *submit.siblings):
        await engine.step(number, 0, [5], FinishCode.LENGTH)
    await reading
    assert not [each for each in engine.received if isinstance(each, Submit)]


@exercises("StoppingOptions.stop", "OutputOptions.include_stop_str_in_output")
async def test_stop_string_ends_the_output(served: RunningGateway, engine: StandInEngine) -> None:
    output = "the fox and the river and the moon"
    stream = await answered(served, engine, output, stop=["river", "moon"])
    assert stream.choices[0].text == "the fox and the "
    assert (stream.finish_reason, stream.matched_stop) == ("stop", "river")
    assert stream.usage.num_output_tokens == len(stream.token_ids)
    stream = await answered(served, engine, output, stop="river", include_stop_str_in_output=True)
    assert stream.choices[0].text == "the fox and the river"


async def test_stop_string_counts_after_min_tokens_only(
    served: RunningGateway, engine: StandInEngine
) -> None:
    output = "the fox and the fox and the end"
    num_tokens = len(await served.client.tokenize(output, add_special_tokens=False))
    stream = await answered(
        served, engine, output, stop="fox", min_tokens=num_tokens - 4, max_tokens=num_tokens
    )
    assert stream.choices[0].text == "the fox and the "


@exercises("GenerateRequest.output", "OutputOptions.ids_only")
async def test_ids_only(served: RunningGateway, engine: StandInEngine) -> None:
    stream = await answered(served, engine, "the fox", ids_only=True)
    assert stream.choices[0].text == ""
    assert stream.token_ids == await served.client.tokenize("the fox", add_special_tokens=False)
    stream = await answered(served, engine, "the fox ran far", ids_only=True, stop=" ran")
    assert stream.choices[0].text == ""
    assert stream.matched_stop == " ran"


@exercises("OutputOptions.stream_interval")
async def test_stream_interval(served: RunningGateway, engine: StandInEngine) -> None:
    stream = served.client.generate([5], stream_interval=3, ids_only=True)
    sizes = []

    async def read() -> None:
        async for chunk in stream:
            sizes.append(len(chunk.token_ids))

    reading = asyncio.create_task(read())
    submit = await engine.next(Submit)
    for position in range(7):
        finish = FinishCode.LENGTH if position == 6 else FinishCode.RUNNING
        await engine.step(submit.stream, position, [5], finish)
        await asyncio.sleep(0.01)
    await reading
    assert sum(sizes) == 7
    assert min(sizes[:-1]) >= 3


@exercises("OutputOptions.skip_special_tokens")
@exercises("DetokenizeRequest.token_ids", "DetokenizeRequest.skip_special_tokens")
async def test_special_tokens(served: RunningGateway, engine: StandInEngine) -> None:
    special = (await served.client.tokenize("x"))[0]
    assert await served.client.detokenize([special]) == ""
    written = await served.client.detokenize([special], skip_special_tokens=False)
    assert written

    async def text_of(**options: Any) -> str:
        stream = served.client.generate([5], **options)
        reading = asyncio.create_task(stream.text())
        submit = await engine.next(Submit)
        await engine.step(submit.stream, 0, [special], FinishCode.LENGTH)
        return await reading

    assert await text_of() == ""
    assert await text_of(skip_special_tokens=False) == written


async def test_deadline_becomes_the_budget(served: RunningGateway, engine: StandInEngine) -> None:
    assert (await submitted(served, engine, [5])).budget_ms == -1
    budget_ms = (await submitted(served, engine, [5], timeout=60)).budget_ms
    # gRPC rounds a timeout up by as much as a hundredth of it.
    assert 30_000 < budget_ms < 61_000


async def test_model_info(
    folder: Path, engine: StandInEngine, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address)
    info = await served.client.model_info()
    assert (info.model, info.vocab_size, info.max_context_tokens) == ("demo", 4096, 128)
    assert list(info.eos_token_ids) == [2]
    assert info.has_chat_template
    assert info.default_sampling.temperature == pytest.approx(0.7)
    assert info.default_sampling.HasField("top_k")
    assert info.default_sampling.min_p == pytest.approx(0.05)
    assert info.default_sampling.typical_p == pytest.approx(0.9)
    assert info.default_sampling.repetition_penalty == pytest.approx(1.25)
