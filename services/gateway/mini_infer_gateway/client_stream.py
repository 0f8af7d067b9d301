"""The way back to the client of one streaming call."""

from __future__ import annotations

import asyncio

import grpc
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.v1.generate_pb2 import GenerateRequest, GenerateResponse

Context = grpc.aio.ServicerContext[GenerateRequest, GenerateResponse]


class ClientStream:
    """Writes the messages of a call, one at a time, and gives up on a client that does not read.

    Headers leave when there is something to write: a call without headers can be retried. And not
    with the first message: grpc.aio could not end the call if that were never read.
    """

    def __init__(self, context: Context, write_stall_s: float) -> None:
        """Takes a call to which nothing was written.

        Args:
            context: Of the call.
            write_stall_s: How long one write may wait for the client.
        """
        self._context = context
        self._write_stall_s = write_stall_s
        self._has_headers = False

    async def write(self, response: GenerateResponse) -> None:
        """Writes one message.

        Raises:
            MiniInferError: SLOW_CONSUMER where the client does not read it in time.
        """
        if not self._has_headers:
            self._has_headers = True
            await self._context.send_initial_metadata(())
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls are served by tasks")
        stall = _Stall(task)
        timer = asyncio.get_running_loop().call_later(self._write_stall_s, stall.strike)
        try:
            await self._context.write(response)
        except asyncio.CancelledError:
            if not stall.has_struck:
                raise
            raise MiniInferError(
                ErrorReason.SLOW_CONSUMER,
                f"nothing was read for {self._write_stall_s:g} s: read the stream as it is made",
            ) from None
        finally:
            timer.cancel()


class _Stall:
    """Interrupts a task's write, and knows that it did.

    A timer of the loop, because a timeout context (or `asyncio.wait_for`) for every message costs
    as much as the message.
    """

    __slots__ = ("_task", "has_struck")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.has_struck = False

    def strike(self) -> None:
        self.has_struck = True
        self._task.cancel()
