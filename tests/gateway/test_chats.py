"""Chats over gRPC: what each field of a conversation does to the prompt, and what bombs do not.

The gateway and the tokenizer process are real; the model folder has templates that write out what
they are given.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from gateway.harness import BOMBS, RunningGateway, StartGateway
from google.protobuf.struct_pb2 import Struct
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2 as service_pb2

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def served(
    engine_address: str, talkative_tokenizer: str, start_gateway: StartGateway
) -> RunningGateway:
    return await start_gateway(engine_address, talkative_tokenizer)


async def text_of(served: RunningGateway, messages: Any, **options: Any) -> str:
    """The text that a chat becomes."""
    ids = await served.client.tokenize(messages, **options)
    return await served.client.detokenize(ids, skip_special_tokens=False)


async def text_of_chat(served: RunningGateway, chat: pb2.Chat) -> str:
    """As `text_of`, for what the Python client would not write."""
    request = service_pb2.TokenizeRequest(chat=chat)
    answer = await served.client._stub.Tokenize(request)
    return await served.client.detokenize(answer.token_ids, skip_special_tokens=False)


async def seen(served: RunningGateway, *messages: Any, **options: Any) -> Any:
    """What the template saw."""
    options.setdefault("chat_template", "default")
    return json.loads(await text_of(served, messages or [USER], **options))


async def test_a_plain_chat(served: RunningGateway) -> None:
    assert await seen(served) == {
        "messages": [USER],
        "tools": None,
        "documents": None,
        "opened": True,
        "mood": "none",
    }
    assert (await seen(served, add_generation_prompt=False))["opened"] is False


async def test_messages_of_a_chat_with_tools(served: RunningGateway) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 1.0}}},
        {"type": "function", "function": {"name": "g", "arguments": "text"}},
    ]
    messages = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "tool_calls": calls, "reasoning_content": "Hm."},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "1"},
    ]
    expected = [messages[0], {"thinking": "Hm.", **messages[1]}, messages[2]]
    text = json.dumps((await seen(served, *messages))["messages"])
    assert text == json.dumps(expected)


async def test_tools_and_documents_keep_their_order_and_numbers(served: RunningGateway) -> None:
    values = [{"z": 1, "a": 1.0, "é": [2**60, None]}, {}]
    told = await seen(served, tools=values, documents=values[::-1])
    assert json.dumps(told["tools"]) == json.dumps(values)
    assert json.dumps(told["documents"]) == json.dumps(values[::-1])


async def test_tools_choose_their_template(served: RunningGateway) -> None:
    assert await text_of(served, [USER], tools=[{"a": 1}]) == 'TOOLS [{"a": 1}]'


async def test_tools_as_structs_are_in_alphabetical_order_with_integers(
    served: RunningGateway,
) -> None:
    tool = Struct()
    tool.update({"z": 3, "b": {"y": 0.5, "x": -(2**53)}, "a": [None, True, "ü", {}]})
    chat = pb2.Chat(messages=[pb2.ChatMessage(role="user", content=[pb2.ContentPart(text="")])])
    chat.tools.append(tool)
    assert await text_of_chat(served, chat) == (
        'TOOLS [{"a": [null, true, "ü", {}], "b": {"x": -9007199254740992, "y": 0.5}, "z": 3}]'
    )


async def test_a_template_by_name(served: RunningGateway) -> None:
    assert await text_of(served, [USER], chat_template="plain") == "[Hi]"
    with pytest.raises(RequestFailed, match=r"default, .*plain") as caught:
        await text_of(served, [USER], chat_template="other")
    assert caught.value.reason is ErrorReason.INVALID_FIELD


async def test_a_continued_message(served: RunningGateway) -> None:
    messages = [USER, {"role": "assistant", "content": "Once "}]
    text = await text_of(served, messages, chat_template="plain", continue_final_message=True)
    assert text == "[Hi][Once "


@pytest.mark.parametrize("value", ["glad", 7, 0.5, 1.0, 2**60, True, {"z": 1, "a": [{}]}])
async def test_template_kwargs(served: RunningGateway, value: Any) -> None:
    told = (await seen(served, template_kwargs={"mood": value}))["mood"]
    assert json.dumps(told) == json.dumps(value)


async def test_template_kwargs_that_are_not_used_are_refused(served: RunningGateway) -> None:
    for name in ("messages", "bos_token", "other"):
        with pytest.raises(RequestFailed, match=name) as caught:
            await seen(served, template_kwargs={name: 1})
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.reason is ErrorReason.INVALID_FIELD


async def test_generate_takes_the_same_chats(served: RunningGateway) -> None:
    options: Any = {"tools": [{"a": 1}], "template_kwargs": {"mood": "glad"}}
    options |= {"chat_template": "default"}
    stream = served.client.generate([USER], max_tokens=1, **options)
    await stream.text()
    assert stream.num_prompt_tokens == len(await served.client.tokenize([USER], **options))


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_an_invalid_argument_and_a_stream_goes_on(
    served: RunningGateway, name: str
) -> None:
    stream = served.client.generate("Once", max_tokens=100, seed=1)
    chunks = aiter(stream)
    await anext(chunks)
    bombs = [served.client.tokenize([USER], chat_template=name) for _ in range(2)]
    bombs.append(served.client.generate([USER], chat_template=name).text())  # type: ignore[arg-type]
    failures = asyncio.gather(*bombs, return_exceptions=True)
    assert await served.client.tokenize("Hi", timeout=5)
    async for _ in chunks:
        pass
    assert len(stream.token_ids) == 100
    for failure in await failures:
        assert isinstance(failure, RequestFailed)
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason is ErrorReason.CHAT_TEMPLATE_FAILED
    assert (await seen(served))["messages"] == [USER]
