"""A gRPC server whose answers the test writes, and both clients with one face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from mini_infer import AsyncClient
from mini_infer.client import Chunk
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer.v1 import inference_service_pb2 as service_pb2
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceServicer

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
CHOICES = [
    pb2.GenerateResponse(
        seq=0,
        choice_index=1,
        delta=pb2.Delta(text="a ", token_ids=[1]),
        request_id="r1",
        num_prompt_tokens=3,
    ),
    pb2.GenerateResponse(seq=1, choice_index=0, delta=pb2.Delta(text="Once ", token_ids=[2, 3])),
    pb2.GenerateResponse(seq=2, choice_index=1, delta=pb2.Delta(text="fox", token_ids=[4])),
    pb2.GenerateResponse(
        seq=3,
        choice_index=1,
        choice_finished=pb2.ChoiceFinished(
            finish_reason=pb2.FINISH_REASON_STOP, stop_token_id=4, num_output_tokens=2
        ),
    ),
    pb2.GenerateResponse(seq=4, choice_index=0, delta=pb2.Delta(text="upon", token_ids=[5])),
    pb2.GenerateResponse(
        seq=5,
        choice_index=0,
        choice_finished=pb2.ChoiceFinished(
            finish_reason=pb2.FINISH_REASON_LENGTH, num_output_tokens=3
        ),
    ),
    pb2.GenerateResponse(
        seq=6,
        finished=pb2.Finished(
            usage=pb2.Usage(num_prompt_tokens=3, num_output_tokens=5, num_cached_tokens=2), seed=7
        ),
    ),
]
"""A stream of two choices."""


def _told(logprob: float, rank: int, **top: float) -> pb2.TokenLogprobs:
    likeliest = [
        pb2.TopLogprob(token_id=int(name[1:]), logprob=value) for name, value in top.items()
    ]
    return pb2.TokenLogprobs(logprob=logprob, rank=rank, top=likeliest)


LOGPROBS = [
    pb2.GenerateResponse(
        seq=0,
        prompt_logprobs=pb2.PromptLogprobs(start=1, tokens=[_told(-0.5, 1)]),
        request_id="r1",
        num_prompt_tokens=3,
    ),
    pb2.GenerateResponse(seq=1, choice_index=1, delta=pb2.Delta(text="a fox", token_ids=[6, 7])),
    pb2.GenerateResponse(
        seq=2, prompt_logprobs=pb2.PromptLogprobs(start=2, tokens=[_told(-3.0, 70)])
    ),
    pb2.GenerateResponse(
        seq=3,
        delta=pb2.Delta(
            text="Once ",
            token_ids=[1, 2],
            logprobs=[
                _told(-0.25, 1, _1=-0.25, _9=-1.5),
                _told(-4.0, 1200, _8=-0.125, _7=-2.0),
            ],
        ),
    ),
    pb2.GenerateResponse(
        seq=4,
        delta=pb2.Delta(text="upon", token_ids=[3], logprobs=[_told(float("-inf"), 4096, _3=0.0)]),
    ),
    pb2.GenerateResponse(
        seq=5,
        choice_finished=pb2.ChoiceFinished(
            finish_reason=pb2.FINISH_REASON_REPETITION, num_output_tokens=3
        ),
    ),
    pb2.GenerateResponse(
        seq=6,
        finished=pb2.Finished(usage=pb2.Usage(num_prompt_tokens=3, num_output_tokens=5), seed=7),
    ),
]
"""Log-probabilities of the prompt and of choice 0, in a stream of two choices."""
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
