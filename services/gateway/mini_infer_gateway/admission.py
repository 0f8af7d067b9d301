"""Who may come in: the door of the gateway, and the list of who is inside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_gateway.choices import Choices


class ActiveRequest:
    """A Generate call between admission and its end. Remembers an order that comes early."""

    def __init__(self) -> None:
        """Begins without choices: the prompt is not encoded yet."""
        self._choices: Choices | None = None
        self._order: Callable[[Choices], None] | None = None

    def attach(self, choices: Choices) -> None:
        """Tells which streams run the request."""
        self._choices = choices
        if self._order is not None:
            self._order(choices)

    def abort(self) -> None:
        """Ends the request as soon as it can be ended."""
        self._give(Choices.abort)

    def fail(self, error: MiniInferError) -> None:
        """Ends the request with an error as soon as it can be ended."""
        self._give(lambda choices: choices.fail(error))

    def _give(self, order: Callable[[Choices], None]) -> None:
        self._order = order
        if self._choices is not None:
            order(self._choices)


class Admission:
    """The running requests by id, their bound, and whether the door is still open."""

    def __init__(self, max_requests: int) -> None:
        """Opens the door.

        Args:
            max_requests: Requests inside at a time.
        """
        self._max_requests = max_requests
        self._active: dict[str, ActiveRequest] = {}
        self._is_draining = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_active(self) -> int:
        """Requests inside."""
        return len(self._active)

    @property
    def is_draining(self) -> bool:
        """Whether the door is shut."""
        return self._is_draining

    def require_open(self) -> None:
        """Checks that new requests are taken.

        Raises:
            MiniInferError: DRAINING.
        """
        if self._is_draining:
            raise _draining()

    @contextmanager
    def admit(self, request_id: str) -> Iterator[ActiveRequest]:
        """Keeps a request on the list while the block runs.

        Raises:
            MiniInferError: DUPLICATE_REQUEST_ID or QUEUE_FULL.
        """
        if request_id in self._active:
            raise MiniInferError(
                ErrorReason.DUPLICATE_REQUEST_ID,
                f"a request with id {request_id} is running: choose another id",
                {"request_id": request_id},
            )
        if len(self._active) >= self._max_requests:
            raise MiniInferError(
                ErrorReason.QUEUE_FULL,
                f"{self._max_requests} requests are running: try again later",
                {"limit": str(self._max_requests)},
            )
        request = self._active[request_id] = ActiveRequest()
        self._is_empty.clear()
        try:
            yield request
        finally:
            del self._active[request_id]
            if not self._active:
                self._is_empty.set()

    def abort(self, request_id: str) -> None:
        """Ends a running request.

        Raises:
            MiniInferError: REQUEST_NOT_FOUND.
        """
        request = self._active.get(request_id)
        if request is None:
            raise MiniInferError(
                ErrorReason.REQUEST_NOT_FOUND,
                f"no request with id {request_id} is running",
                {"request_id": request_id},
            )
        request.abort()

    def shut(self) -> None:
        """Takes no more requests."""
        self._is_draining = True

    async def drain(self, grace_s: float) -> None:
        """Waits until the last request has left; those that take longer are ended.

        Args:
            grace_s: How long they may take.
        """
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_empty.wait(), grace_s)
        for request in list(self._active.values()):
            request.fail(_draining())


def _draining() -> MiniInferError:
    return MiniInferError(
        ErrorReason.DRAINING, "the server is shutting down: send the request to another one"
    )
