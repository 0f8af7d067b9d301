"""Both clients against a gRPC server whose answers the test writes."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from common.stand_in_service import CHOICES, LOGPROBS, Script
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from mini_infer import Client, MiniInferError
from mini_infer.client import Chunk, RequestFailed, Usage
from mini_infer.client_wire import channel_options
from mini_infer.errors import ErrorReason
from mini_infer.logprobs import TokenLogprobs, TopLogprob
from mini_infer.messages import FinishAccounting
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2 as service_pb2


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


def test_chunks_say_which_choice_goes_on(client: Any, script: Script) -> None:
    script.responses = list(CHOICES)
    stream = client.generate("A fox", n=2)
    assert [choice.text for choice in stream.choices] == ["", ""]
    assert list(stream) == [
        Chunk("a ", [1], 1),
        Chunk("Once ", [2, 3], 0),
        Chunk("fox", [4], 1),
        Chunk("upon", [5], 0),
    ]
    assert script.asked[0].sampling.n == 2


def test_each_choice_has_its_own_output_and_end(client: Any, script: Script) -> None:
    script.responses = list(CHOICES)
    stream = client.generate("A fox", n=2)
    assert stream.text() == "Once upon"
    told = [
        (each.text, each.token_ids, each.finish_reason, each.matched_stop)
        for each in stream.choices
    ]
    assert told == [("Once upon", [2, 3, 5], "length", None), ("a fox", [1, 4], "stop", 4)]
    assert (stream.token_ids, stream.finish_reason) == ([2, 3, 5], "length")
    assert stream.matched_stop is None
    assert stream.usage == Usage(3, 5, num_cached_tokens=2)
    assert stream.seed == 7


def test_log_probabilities_come_with_their_tokens(client: Any, script: Script) -> None:
    script.responses = list(LOGPROBS)
    stream = client.generate("A fox", n=2, logprobs=2, prompt_logprobs=0)
    told = [
        TokenLogprobs(-0.25, 1, [TopLogprob(1, -0.25), TopLogprob(9, -1.5)]),
        TokenLogprobs(-4.0, 1200, [TopLogprob(8, -0.125), TopLogprob(7, -2.0)]),
        TokenLogprobs(float("-inf"), 4096, [TopLogprob(3, 0.0)]),
    ]
    assert list(stream) == [
        Chunk("a fox", [6, 7], 1),
        Chunk("Once ", [1, 2], 0, told[:2]),
        Chunk("upon", [3], 0, told[2:]),
    ]
    assert [choice.logprobs for choice in stream.choices] == [told, []]
    assert stream.prompt_logprobs == [TokenLogprobs(-0.5, 1, []), TokenLogprobs(-3.0, 70, [])]
    assert (stream.request_id, stream.num_prompt_tokens) == ("r1", 3)
    assert stream.finish_reason == "repetition"


def test_choices_keep_what_came_before_an_error(client: Any, script: Script) -> None:
    script.responses = CHOICES[:4]
    script.hold = True
    stream = client.generate("A fox", n=3, timeout=0.5)
    with pytest.raises(RequestFailed):
        stream.text()
    told = [(each.text, each.finish_reason) for each in stream.choices]
    assert told == [("Once ", None), ("a fox", "stop"), ("", None)]


@pytest.mark.parametrize("n", [0, 2**32 - 1])
def test_number_of_choices_that_no_server_takes(client: Any, script: Script, n: int) -> None:
    script.failure = (grpc.StatusCode.INVALID_ARGUMENT, "bad")
    with pytest.raises(RequestFailed):
        client.generate("A fox", n=n).text()
    assert script.asked[0].sampling.n == n


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
