from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from gateway.harness import RunningGateway
from gateway.request_samples import (
    HELLO,
    INVALID,
    MAX_PROMPT_BYTES,
    TOO_LARGE,
    chat,
    message,
    violations_of,
)
from gateway.stand_ins import ENGINE_WELCOME
from google.protobuf.descriptor import Descriptor
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason, InvalidRequestError, MiniInferError
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2
from mini_infer_gateway.supported_fields import SUPPORTED_FIELDS, UNSUPPORTED_FIELDS
from mini_infer_gateway.validation import (
    check_abort,
    check_detokenize,
    check_generate,
    check_tokenize,
)

NOT_SUPPORTED = ErrorReason.FIELD_NOT_SUPPORTED
MODALITY = ErrorReason.UNSUPPORTED_MODALITY
SAMPLING = pb2.SamplingOptions
STOPPING = pb2.StoppingOptions
OUTPUT = pb2.OutputOptions


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, ("prompt", INVALID), id="no prompt"),
        pytest.param({"text": ""}, ("text", INVALID), id="empty text"),
        pytest.param({"text": "é" * 501}, ("text", TOO_LARGE), id="large text"),
        pytest.param({"token_ids": pb2.TokenIds()}, ("token_ids.ids", INVALID), id="empty ids"),
        pytest.param(
            {"token_ids": pb2.TokenIds(ids=[1, 4096])},
            ("token_ids.ids[1]", INVALID),
            id="id beyond the vocabulary",
        ),
        pytest.param({"request_id": ""}, ("request_id", INVALID), id="empty request id"),
        pytest.param({"request_id": "a b"}, ("request_id", INVALID), id="space in request id"),
        pytest.param({"request_id": "x" * 129}, ("request_id", INVALID), id="long request id"),
        pytest.param({"request_id": "x\n"}, ("request_id", INVALID), id="newline in request id"),
        pytest.param(
            {"sampling": SAMPLING(temperature=-0.1)},
            ("sampling.temperature", INVALID),
            id="temperature below 0",
        ),
        pytest.param(
            {"sampling": SAMPLING(temperature=float("nan"))},
            ("sampling.temperature", INVALID),
            id="temperature NaN",
        ),
        pytest.param({"sampling": SAMPLING(top_p=0)}, ("sampling.top_p", INVALID), id="top_p 0"),
        pytest.param(
            {"sampling": SAMPLING(top_p=1.01)}, ("sampling.top_p", INVALID), id="top_p above 1"
        ),
        pytest.param(
            {"sampling": SAMPLING(top_k=2**31)}, ("sampling.top_k", INVALID), id="top_k too large"
        ),
        pytest.param(
            {"stopping": STOPPING(max_tokens=0)},
            ("stopping.max_tokens", INVALID),
            id="max_tokens 0",
        ),
        pytest.param(
            {"stopping": STOPPING(max_tokens=2, min_tokens=3)},
            ("stopping.min_tokens", INVALID),
            id="min_tokens above max_tokens",
        ),
        pytest.param(
            {"stopping": STOPPING(stop=["x"] * 17)}, ("stopping.stop", INVALID), id="17 stops"
        ),
        pytest.param(
            {"stopping": STOPPING(stop=["x", ""])}, ("stopping.stop[1]", INVALID), id="empty stop"
        ),
        pytest.param(
            {"stopping": STOPPING(stop_token_ids=[4096])},
            ("stopping.stop_token_ids[0]", INVALID),
            id="stop id beyond the vocabulary",
        ),
        pytest.param(
            {"output": OUTPUT(stream_interval=0)},
            ("output.stream_interval", INVALID),
            id="interval 0",
        ),
        pytest.param(
            {"output": OUTPUT(stream_interval=1025)},
            ("output.stream_interval", INVALID),
            id="interval too large",
        ),
        pytest.param({"adapter": "x"}, ("adapter", NOT_SUPPORTED), id="adapter"),
        pytest.param({"priority": -101}, ("priority", INVALID), id="priority below -100"),
        pytest.param({"priority": 101}, ("priority", INVALID), id="priority above 100"),
        pytest.param({"cache_salt": ""}, ("cache_salt", INVALID), id="empty salt"),
        pytest.param({"cache_salt": "é" * 64 + "x"}, ("cache_salt", INVALID), id="long salt"),
        pytest.param({"sampling": SAMPLING(n=0)}, ("sampling.n", INVALID), id="no choice"),
        pytest.param({"sampling": SAMPLING(n=17)}, ("sampling.n", INVALID), id="17 choices"),
        pytest.param(
            {"chat": chat(message("user", HELLO, pb2.ContentPart(image_url="x")))},
            ("chat.messages[0].content[1].image_url", MODALITY),
            id="image",
        ),
        pytest.param(
            {"chat": chat(message("user", pb2.ContentPart(audio_url="")))},
            ("chat.messages[0].content[0].audio_url", MODALITY),
            id="audio",
        ),
    ],
)
def test_bad_field_is_named(fields: dict[str, Any], expected: tuple[str, ErrorReason]) -> None:
    prompt = {} if fields.keys() & {"text", "token_ids", "chat"} or not fields else {"text": "x"}
    assert violations_of(**prompt, **fields) == [expected]


def test_unsupported_fields_each_have_a_case() -> None:
    """The cases above refuse every field of the table, which a prefix of the ids names."""
    cases = test_bad_field_is_named.pytestmark[0].args[1]
    refused = {
        path
        for case in cases
        for path, reason in [case.values[1]]
        if reason in {NOT_SUPPORTED, MODALITY}
    }
    assert {path.rpartition(".")[2] for path in refused} == {
        name.rpartition(".")[2] for name in UNSUPPORTED_FIELDS
    }


def test_all_violations_come_at_once() -> None:
    found = violations_of(
        text="",
        adapter="x",
        priority=1000,
        cache_salt="",
        request_id="?",
        sampling=SAMPLING(temperature=-1, top_p=2, n=0),
        stopping=STOPPING(max_tokens=0, stop=[""]),
        output=OUTPUT(stream_interval=0),
    )
    assert {field for field, _ in found} == {
        "text",
        "adapter",
        "priority",
        "cache_salt",
        "request_id",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.n",
        "stopping.max_tokens",
        "stopping.stop[0]",
        "output.stream_interval",
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, "", 1)),
        ({"priority": -100, "cache_salt": "x", "sampling": SAMPLING(n=1)}, (-100, "x", 1)),
        (
            {"priority": 100, "cache_salt": "é" * 64, "sampling": SAMPLING(n=16)},
            (100, "é" * 64, 16),
        ),
    ],
    ids=["absent", "least", "greatest"],
)
def test_bounds_are_allowed(given: dict[str, Any], expected: tuple[int, str, int]) -> None:
    request = check_generate(pb2.GenerateRequest(text="x", **given), ENGINE_WELCOME, 1)
    assert (request.priority, request.cache_salt, request.params.n) == expected


def test_many_bad_ids_are_told_in_few_violations() -> None:
    assert len(violations_of(token_ids=pb2.TokenIds(ids=[5000] * 100))) == 8


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stopping": STOPPING(stop=["x"] * 17)}, "stopping.stop"),
        ({"stopping": STOPPING(stop_token_ids=[1] * 65)}, "stopping.stop_token_ids"),
    ],
    ids=["stop strings", "stop ids"],
)
def test_long_lists_are_refused_alone(fields: dict[str, Any], path: str) -> None:
    """Whatever else is wrong: nothing of the request is read."""
    assert violations_of(**fields, request_id="?") == [(path, INVALID)]


def test_more_ids_than_the_context_are_not_read() -> None:
    ids = pb2.TokenIds(ids=[5000] * ENGINE_WELCOME.max_model_len)
    with pytest.raises(MiniInferError) as caught:
        check_generate(pb2.GenerateRequest(token_ids=ids), ENGINE_WELCOME, MAX_PROMPT_BYTES)
    assert caught.value.reason is ErrorReason.CONTEXT_LENGTH_EXCEEDED
    assert caught.value.metadata["limit"] == "128"


def test_unknown_model_is_not_found() -> None:
    with pytest.raises(MiniInferError) as caught:
        check_generate(pb2.GenerateRequest(text="x", model="gpt"), ENGINE_WELCOME, 10)
    assert caught.value.reason is ErrorReason.MODEL_NOT_FOUND


def test_tokenize_is_checked() -> None:
    request = inference_service_pb2.TokenizeRequest
    for bad, field in [
        (request(), "input"),
        (request(text="xxx"), "text"),
        (request(chat=chat()), "chat.messages"),
        (request(chat=chat(message("u", HELLO))), "chat"),
        (request(chat=chat(message("u", pb2.ContentPart(text="")), tools_json=["x"])), "chat.tool"),
        (request(chat=chat(*[message("u")] * 4097)), "chat.messages"),
    ]:
        with pytest.raises(InvalidRequestError) as caught:
            check_tokenize(bad, 2)
        assert caught.value.violations[0].field.startswith(field)
    check_tokenize(request(text=""), 2)


def test_detokenize_and_abort_are_checked() -> None:
    request = inference_service_pb2.DetokenizeRequest
    for bad in [4096], [0] * (2**20 + 1):
        with pytest.raises(InvalidRequestError):
            check_detokenize(request(token_ids=bad), ENGINE_WELCOME)
    with pytest.raises(InvalidRequestError):
        check_abort(inference_service_pb2.AbortRequest())


def _fields(descriptor: Descriptor, seen: set[str]) -> Iterator[str]:
    """Each field below a message, message types that are refused as a whole left out."""
    if descriptor.name in seen:
        return
    seen.add(descriptor.name)
    for field in descriptor.fields:
        name, kind = f"{descriptor.name}.{field.name}", field.message_type
        yield name
        is_value = kind and (kind.file.package == "google.protobuf" or kind.GetOptions().map_entry)
        if kind and not is_value and name not in UNSUPPORTED_FIELDS:
            yield from _fields(kind, seen)


def test_each_request_field_is_supported_or_refused() -> None:
    service = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    seen: set[str] = set()
    walked = [name for method in service.methods for name in _fields(method.input_type, seen)]
    assert not SUPPORTED_FIELDS & UNSUPPORTED_FIELDS.keys()
    assert set(walked) == SUPPORTED_FIELDS | UNSUPPORTED_FIELDS.keys()


@pytest.mark.parametrize(
    ("prompt", "options", "code", "reason"),
    [
        pytest.param("", {}, "INVALID_ARGUMENT", "INVALID_FIELD", id="empty prompt"),
        pytest.param([], {}, "INVALID_ARGUMENT", "INVALID_FIELD", id="empty ids"),
        pytest.param([4096], {}, "INVALID_ARGUMENT", "INVALID_FIELD", id="id beyond vocabulary"),
        pytest.param(
            [5] * 5000, {}, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", id="long prompt"
        ),
        pytest.param(
            "a " * 9000, {}, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", id="long text"
        ),
        pytest.param(
            "a", {"max_tokens": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", id="max_tokens 0"
        ),
        pytest.param(
            "a",
            {"max_tokens": 4096},
            "INVALID_ARGUMENT",
            "CONTEXT_LENGTH_EXCEEDED",
            id="max_tokens beyond the context",
        ),
        pytest.param("a", {"model": "gpt"}, "NOT_FOUND", "MODEL_NOT_FOUND", id="unknown model"),
        pytest.param(
            "a" * 5_000_000, {}, "INVALID_ARGUMENT", "PROMPT_TOO_LARGE", id="prompt of 5 MB"
        ),
        pytest.param(
            "a" * 17_000_000, {}, "RESOURCE_EXHAUSTED", "UNKNOWN", id="message above gRPC's limit"
        ),
    ],
)
async def test_bad_request_has_its_status_and_harms_nobody(
    scripted: RunningGateway, prompt: Any, options: dict[str, Any], code: str, reason: str
) -> None:
    with pytest.raises(RequestFailed) as caught:
        await scripted.client.generate(prompt, **options).text()
    assert caught.value.code is grpc.StatusCode[code]
    assert caught.value.reason is ErrorReason[reason]
    stream = scripted.client.generate("a", max_tokens=2)
    await stream.text()
    assert len(stream.token_ids) == 2
