"""Both clients against a gRPC server whose answers the test writes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from mini_infer import AsyncClient, Client, MiniInferError
from mini_infer.client import Chunk, RequestFailed, Usage
from mini_infer.client_wire import (
    channel_options,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from mini_infer.errors import ErrorReason, InvalidRequestError
from mini_infer.messages import FinishAccounting
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2 as service_pb2
from mini_infer.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

STORY = [
    pb2.GenerateResponse(
        seq=0,
        delta=pb2.Delta(text="Once ", token_ids=[1, 2]),
        request_id="r1",
        num_prompt_tokens=3,
    ),
    pb2.GenerateResponse(seq=1, delta=pb2.Delta(text="upon", token_ids=[3])),
    pb2.GenerateResponse(
        seq=2,
        choice_finished=pb2.ChoiceFinished(
            finish_reason=pb2.FINISH_REASON_STOP, stop_string=" a", num_output_tokens=3
        ),
    ),
    pb2.GenerateResponse(
        seq=3,
        finished=pb2.Finished(
            usage=pb2.Usage(num_prompt_tokens=3, num_output_tokens=3), seed=2**64 - 1
        ),
    ),
]
TRAILERS = (
    ("mini-infer-queue-ms", "1.5"),
    ("mini-infer-prefill-ms", "2.5"),
    ("mini-infer-decode-ms", "3.5"),
    ("mini-infer-cached-tokens", "4"),
    ("mini-infer-preemptions", "5"),
    ("mini-infer-steps", "6"),
)


@dataclass
class Script(InferenceServiceServicer):
    """What the server answers, and what it was asked."""

    responses: list[pb2.GenerateResponse] = field(default_factory=lambda: list(STORY))
    trailers: tuple[tuple[str, str | bytes], ...] = TRAILERS
    failure: tuple[grpc.StatusCode, str] | None = None
    hold: bool = False
    asked: list[Any] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: Any, context: Any) -> Iterator[pb2.GenerateResponse]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        yield from self.responses
        if self.hold:
            self.cancelled.wait()

    def Tokenize(self, request: Any, context: Any) -> service_pb2.TokenizeResponse:
        self._note(request, context)
        return service_pb2.TokenizeResponse(token_ids=[1, 2])

    def Detokenize(self, request: Any, context: Any) -> service_pb2.DetokenizeResponse:
        self._note(request, context)
        return service_pb2.DetokenizeResponse(text="hi")

    def GetModelInfo(self, request: Any, context: Any) -> service_pb2.GetModelInfoResponse:
        self._note(request, context)
        return service_pb2.GetModelInfoResponse(model="demo")

    def GetServerInfo(self, request: Any, context: Any) -> service_pb2.GetServerInfoResponse:
        self._note(request, context)
        return service_pb2.GetServerInfoResponse(version="9")

    def Abort(self, request: Any, context: Any) -> service_pb2.AbortResponse:
        self._note(request, context)
        return service_pb2.AbortResponse()

    def _note(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        context.set_trailing_metadata(self.trailers)
        if self.failure is not None:
            context.abort(*self.failure)


class Blocking:
    """`AsyncClient` driven like `Client`, so that a test can be written once for both."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._do(self._make(address))

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._client.close())
        self._loop.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            async def run() -> Any:
                result = method(*args, **kwargs)
                return await result if asyncio.iscoroutine(result) else result

            result = self._do(run())
            return BlockingStream(self, result) if name == "generate" else result

        return call

    def _do(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    @staticmethod
    async def _make(address: str) -> AsyncClient:
        return AsyncClient(address)


class BlockingStream:
    def __init__(self, client: Blocking, stream: Any) -> None:
        self._client = client
        self._stream = stream

    def __iter__(self) -> Iterator[Chunk]:
        chunks = self._stream.__aiter__()
        while True:
            try:
                yield self._client._do(chunks.__anext__())
            except StopAsyncIteration:
                return

    def text(self) -> str:
        text: str = self._client._do(self._stream.text())
        return text

    def __enter__(self) -> BlockingStream:
        self._client._do(self._stream.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._client._do(self._stream.__aexit__(None, None, None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def health() -> HealthServicer:
    return HealthServicer()


@pytest.fixture
def address(script: Script, health: HealthServicer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_InferenceServiceServicer_to_server(script, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    with request.param(address) as made:
        yield made


def test_stream_gives_chunks_and_then_the_end(client: Any) -> None:
    stream = client.generate("A fox")
    assert stream.request_id is None
    assert list(stream) == [Chunk("Once ", [1, 2]), Chunk("upon", [3])]
    assert stream.request_id == "r1"
    assert stream.num_prompt_tokens == 3
    assert stream.token_ids == [1, 2, 3]
    assert (stream.finish_reason, stream.matched_stop) == ("stop", " a")
    assert stream.usage == Usage(3, 3)
    assert stream.seed == 2**64 - 1
    assert stream.accounting == FinishAccounting(1.5, 2.5, 3.5, 4, 5, 6)


def test_text_reads_the_rest(client: Any) -> None:
    stream = client.generate("A fox")
    assert next(iter(stream)).text == "Once "
    assert stream.text() == "Once upon"
    assert stream.finish_reason == "stop"


def test_server_without_accounting(client: Any, script: Script) -> None:
    script.trailers = ()
    stream = client.generate("A fox")
    stream.text()
    assert stream.accounting is None


def test_leaving_a_stream_cancels_it(client: Any, script: Script) -> None:
    script.hold = True
    with client.generate("A fox") as stream:
        assert next(iter(stream)).text == "Once "
    assert script.cancelled.wait(10)


def test_cancelled_stream_fails(client: Any, script: Script) -> None:
    script.hold = True
    stream = client.generate("A fox")
    assert next(iter(stream)).text == "Once "
    stream.cancel()
    with pytest.raises(RequestFailed) as caught:
        stream.text()
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_timeout_becomes_deadline(client: Any, script: Script) -> None:
    script.hold = True
    with pytest.raises(RequestFailed) as caught:
        client.generate("A fox", timeout=0.2).text()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.reason is ErrorReason.DEADLINE


def test_unary_calls(client: Any, script: Script) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert client.tokenize("hi") == [1, 2]
    assert client.tokenize(chat, add_generation_prompt=False) == [1, 2]
    assert client.detokenize([1, 2], skip_special_tokens=False) == "hi"
    assert client.model_info().model == "demo"
    assert client.server_info().version == "9"
    client.abort("r1")
    assert script.asked[:3] == [
        service_pb2.TokenizeRequest(text="hi"),
        service_pb2.TokenizeRequest(
            chat=pb2.Chat(
                messages=[pb2.ChatMessage(role="user", content=[pb2.ContentPart(text="hi")])],
                add_generation_prompt=False,
            )
        ),
        service_pb2.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=False),
    ]
    assert script.asked[-1] == service_pb2.AbortRequest(request_id="r1")


def test_error_details_are_read(client: Any, script: Script) -> None:
    status = status_pb2.Status(code=3, message="bad")
    for detail in (
        error_details_pb2.ErrorInfo(reason="INVALID_FIELD", metadata={"limit": "3"}),
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field="text", description="empty", reason="INVALID_FIELD"
                )
            ]
        ),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        error_details_pb2.DebugInfo(detail="not read"),
    ):
        packed = PackedAny()
        packed.Pack(detail)
        status.details.append(packed)
    script.trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    script.failure = (grpc.StatusCode.INVALID_ARGUMENT, "bad")
    for call in (lambda: client.generate("").text(), lambda: client.tokenize("")):
        with pytest.raises(MiniInferError) as caught:
            call()
        error = caught.value
        assert isinstance(error, RequestFailed)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.reason is ErrorReason.INVALID_FIELD
        assert error.message == "bad"
        assert error.metadata == {"limit": "3"}
        assert [(each.field, each.description) for each in error.violations] == [("text", "empty")]
        assert error.retry_after_s == 1.5
        assert str(error) == "INVALID_ARGUMENT (INVALID_FIELD): bad"


@pytest.mark.parametrize(
    "details",
    [None, status_pb2.Status(code=5, message="other")],
    ids=["none", "contradicting"],
)
def test_error_without_usable_details(
    client: Any, script: Script, details: status_pb2.Status | None
) -> None:
    script.trailers = (("grpc-status-details-bin", details.SerializeToString()),) if details else ()
    script.failure = (grpc.StatusCode.INTERNAL, "oh")
    with pytest.raises(RequestFailed) as caught:
        client.model_info()
    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert (caught.value.reason, caught.value.message) == (ErrorReason.UNKNOWN, "oh")
    assert caught.value.retry_after_s is None


def test_reason_of_a_newer_server(client: Any, script: Script) -> None:
    packed = PackedAny()
    packed.Pack(error_details_pb2.ErrorInfo(reason="NOT_INVENTED_YET"))
    status = status_pb2.Status(code=13, message="oh", details=[packed])
    script.trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    script.failure = (grpc.StatusCode.INTERNAL, "oh")
    with pytest.raises(RequestFailed) as caught:
        client.abort("x")
    assert caught.value.reason is ErrorReason.UNKNOWN


def test_wait_until_ready(client: Any, health: HealthServicer) -> None:
    health.set("readiness", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(RequestFailed) as caught:
        client.wait_until_ready(0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    timer = threading.Timer(0.1, health.set, ["readiness", health_pb2.HealthCheckResponse.SERVING])
    timer.start()
    client.wait_until_ready(20)
    timer.join()


def test_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RequestFailed) as caught:
        client.generate("x").text()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_options_reach_their_fields() -> None:
    request = generate_request(
        [4, 5],
        {
            "model": "demo",
            "request_id": "r",
            "add_special_tokens": False,
            "temperature": 0.5,
            "top_k": 0,
            "top_p": 0.25,
            "seed": 0,
            "max_tokens": 7,
            "min_tokens": 2,
            "stop": "end",
            "stop_token_ids": [9],
            "ignore_eos": True,
            "ids_only": True,
            "stream_interval": 3,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        },
    )
    assert request == pb2.GenerateRequest(
        token_ids=pb2.TokenIds(ids=[4, 5]),
        model="demo",
        request_id="r",
        add_special_tokens=False,
        sampling=pb2.SamplingOptions(temperature=0.5, top_k=0, top_p=0.25, seed=0),
        stopping=pb2.StoppingOptions(
            max_tokens=7, min_tokens=2, stop=["end"], stop_token_ids=[9], ignore_eos=True
        ),
        output=pb2.OutputOptions(
            ids_only=True,
            stream_interval=3,
            skip_special_tokens=False,
            include_stop_str_in_output=True,
        ),
    )


def test_absent_options_stay_absent() -> None:
    request = generate_request("hi", {})
    assert not request.sampling.HasField("temperature")
    assert not request.stopping.HasField("max_tokens")
    assert not request.HasField("request_id")


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
        ({"max_tokens": 10**11}, "stopping.max_tokens"),
        ({"max_tokens": "5"}, "stopping.max_tokens"),
        ({"stop": ["a", "\ud800"]}, "stopping.stop"),
        ({"stop_token_ids": [-1]}, "stopping.stop_token_ids"),
        ({"stream_interval": -1}, "output.stream_interval"),
        ({"model": "\ud800"}, "model"),
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


def test_proxy_of_the_environment_is_not_asked_for_this_machine(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(address) as client:
        assert client.tokenize("hi", timeout=10) == [1, 2]


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_proxies_are_for_other_machines(address: str, is_loopback: bool) -> None:
    assert (("grpc.enable_http_proxy", 0) in channel_options(address)) is is_loopback


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        generate_request("hi", {"max_token": 3})  # type: ignore[typeddict-unknown-key]
