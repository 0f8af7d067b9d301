"""The client of a server for ordinary code; `async_client.py` holds the one for asyncio.

from mini_infer import Client

with Client("127.0.0.1:50051") as client:
    for chunk in client.generate("Once upon a time", max_tokens=50):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mini_infer.async_client import AsyncClient, AsyncGenerationStream
from mini_infer.chats import ChatMessage, ChatOptions
from mini_infer.client_wire import (
    DEFAULT_ADDRESS,
    READINESS,
    READINESS_POLL_S,
    GenerateOptions,
    Prompt,
    RequestFailed,
    channel_options,
    detokenize_request,
    generate_request,
    not_ready_in_time,
    request_failed,
    tokenize_request,
)
from mini_infer.generation_progress import Choice, Chunk, GenerationProgress, Usage
from mini_infer.v1 import generate_pb2
from mini_infer.v1 import inference_service_pb2 as pb2
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "Choice",
    "Chunk",
    "Client",
    "GenerationStream",
    "RequestFailed",
    "Usage",
]


class GenerationStream(GenerationProgress):
    """The output of one request, as it is made: iterate over its chunks.

    Leaving it as a context manager cancels what has not ended.
    """

    def __init__(self, call: Any, request: generate_pb2.GenerateRequest) -> None:
        """Takes a call that has begun, and what it asked for."""
        super().__init__(request)
        self._call = call

    def __iter__(self) -> Iterator[Chunk]:
        """Gives the chunks that have not been read, those of all choices mixed.

        Raises:
            RequestFailed: Where the request fails or is cancelled.
        """
        try:
            for response in self._call:
                chunk = self._read(response)
                if chunk is not None:
                    yield chunk
            self._read_trailers(self._call.trailing_metadata())
        except grpc.RpcError as error:
            raise request_failed(error) from None

    def text(self) -> str:
        """Reads to the end, and gives all text of choice 0 from the beginning.

        Raises:
            RequestFailed: Where the request fails or is cancelled.
        """
        for _ in self:
            pass
        return self.choices[0].text

    def cancel(self) -> None:
        """Ends the request; nothing happens where it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """Gives the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancels what has not ended."""
        self.cancel()


class Client:
    """Talks to a server over one connection; safe to use from several threads."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Connects in the background, without TLS.

        Args:
            address: Host and port.
        """
        self._channel = grpc.insecure_channel(address, channel_options(address))
        self._stub = InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Continues a prompt.

        Args:
            prompt: Text, token ids, or a conversation (`mini_infer.chats.ChatMessage`).
            timeout: Seconds until the request is given up, also by the server.
            options: See `GenerateOptions`.

        Returns:
            The stream; errors of the server are raised when it is read.
        """
        request = generate_request(prompt, options)
        call = self._stub.Generate(request, timeout=timeout)
        return GenerationStream(call, request)

    def tokenize(
        self,
        source: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
        **chat_options: Unpack[ChatOptions],
    ) -> list[int]:
        """The token ids of a text or a conversation.

        Raises:
            RequestFailed: As the server says.
        """
        request = tokenize_request(source, add_special_tokens, chat_options)
        return list(self._call(self._stub.Tokenize, request, timeout).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids.

        Raises:
            RequestFailed: As the server says.
        """
        request = detokenize_request(token_ids, skip_special_tokens)
        response: pb2.DetokenizeResponse = self._call(self._stub.Detokenize, request, timeout)
        return response.text

    def model_info(self, *, timeout: float | None = None) -> pb2.GetModelInfoResponse:
        """The model that is served.

        Raises:
            RequestFailed: As the server says; UNAVAILABLE while it starts.
        """
        response: pb2.GetModelInfoResponse = self._call(
            self._stub.GetModelInfo, pb2.GetModelInfoRequest(), timeout
        )
        return response

    def server_info(self, *, timeout: float | None = None) -> pb2.GetServerInfoResponse:
        """The state of the server.

        Raises:
            RequestFailed: Where it cannot be reached.
        """
        response: pb2.GetServerInfoResponse = self._call(
            self._stub.GetServerInfo, pb2.GetServerInfoRequest(), timeout
        )
        return response

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running request, of this client or another.

        Raises:
            RequestFailed: NOT_FOUND where no such request is running.
        """
        self._call(self._stub.Abort, pb2.AbortRequest(request_id=request_id), timeout)

    def wait_until_ready(self, timeout: float) -> None:
        """Returns as soon as the server serves requests.

        Args:
            timeout: Seconds.

        Raises:
            RequestFailed: DEADLINE_EXCEEDED where it does not in time.
        """
        deadline = time.monotonic() + timeout
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                answer = self._health.Check(READINESS, timeout=remaining, wait_for_ready=True)
            except grpc.RpcError:
                answer = health_pb2.HealthCheckResponse()
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(READINESS_POLL_S)
        raise not_ready_in_time(timeout)

    def close(self) -> None:
        """Disconnects; running requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Gives the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnects."""
        self.close()

    @staticmethod
    def _call(method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise request_failed(error) from None
