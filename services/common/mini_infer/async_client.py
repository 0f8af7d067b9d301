"""The client of a server for asyncio code: `Client` with `await`.

async with AsyncClient("127.0.0.1:50051") as client:
    async for chunk in client.generate("Once upon a time", max_tokens=50):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mini_infer.chats import ChatMessage, ChatOptions
from mini_infer.client_wire import (
    DEFAULT_ADDRESS,
    READINESS,
    READINESS_POLL_S,
    GenerateOptions,
    Prompt,
    cancelled,
    channel_options,
    detokenize_request,
    generate_request,
    not_ready_in_time,
    request_failed,
    tokenize_request,
)
from mini_infer.generation_progress import Chunk, GenerationProgress
from mini_infer.v1 import generate_pb2
from mini_infer.v1 import inference_service_pb2 as pb2
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncGenerationStream(GenerationProgress):
    """The output of one request, as it is made: iterate over its chunks with `async for`.

    Leaving it as an async context manager cancels what has not ended.
    """

    def __init__(self, call: Any, request: generate_pb2.GenerateRequest) -> None:
        """Takes a call that has begun, and what it asked for."""
        super().__init__(request)
        self._call = call
        self._is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Gives the chunks that have not been read, those of all choices mixed.

        Raises:
            RequestFailed: Where the request fails or is cancelled.
        """
        try:
            async for response in self._call:
                chunk = self._read(response)
                if chunk is not None:
                    yield chunk
            self._read_trailers(await self._call.trailing_metadata())
        except grpc.RpcError as error:
            raise request_failed(error) from None
        except asyncio.CancelledError:
            # grpc.aio raises it for `cancel` as well as for the cancellation of this task.
            if not self._is_cancelled:
                raise
            raise cancelled() from None

    async def text(self) -> str:
        """Reads to the end, and gives all text of choice 0 from the beginning.

        Raises:
            RequestFailed: Where the request fails or is cancelled.
        """
        async for _ in self:
            pass
        return self.choices[0].text

    def cancel(self) -> None:
        """Ends the request; nothing happens where it has ended."""
        self._is_cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """Gives the stream."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancels what has not ended."""
        self.cancel()


class AsyncClient:
    """Talks to a server over one connection, on the loop it was made on.

    Each method does what the method of `Client` with that name does.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Connects in the background, without TLS.

        Args:
            address: Host and port.
        """
        self._channel = grpc.aio.insecure_channel(address, channel_options(address))
        self._stub = InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Continues a prompt."""
        request = generate_request(prompt, options)
        return AsyncGenerationStream(self._stub.Generate(request, timeout=timeout), request)

    async def tokenize(
        self,
        source: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
        **chat_options: Unpack[ChatOptions],
    ) -> list[int]:
        """The token ids of a text or a conversation."""
        request = tokenize_request(source, add_special_tokens, chat_options)
        return list((await _answer(self._stub.Tokenize(request, timeout=timeout))).token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = detokenize_request(token_ids, skip_special_tokens)
        response: pb2.DetokenizeResponse = await _answer(
            self._stub.Detokenize(request, timeout=timeout)
        )
        return response.text

    async def model_info(self, *, timeout: float | None = None) -> pb2.GetModelInfoResponse:
        """The model that is served."""
        request = pb2.GetModelInfoRequest()
        response: pb2.GetModelInfoResponse = await _answer(
            self._stub.GetModelInfo(request, timeout=timeout)
        )
        return response

    async def server_info(self, *, timeout: float | None = None) -> pb2.GetServerInfoResponse:
        """The state of the server."""
        request = pb2.GetServerInfoRequest()
        response: pb2.GetServerInfoResponse = await _answer(
            self._stub.GetServerInfo(request, timeout=timeout)
        )
        return response

    async def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running request, of this client or another."""
        await _answer(self._stub.Abort(pb2.AbortRequest(request_id=request_id), timeout=timeout))

    async def wait_until_ready(self, timeout: float) -> None:
        """Returns as soon as the server serves requests."""
        deadline = time.monotonic() + timeout
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                answer = await self._health.Check(READINESS, timeout=remaining, wait_for_ready=True)
            except grpc.RpcError:
                answer = health_pb2.HealthCheckResponse()
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(READINESS_POLL_S)
        raise not_ready_in_time(timeout)

    async def close(self) -> None:
        """Disconnects; running requests are cancelled."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        """Gives the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnects."""
        await self.close()


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.RpcError as error:
        raise request_failed(error) from None
