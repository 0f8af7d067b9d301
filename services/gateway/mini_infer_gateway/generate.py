"""The Generate call, from the client's message to the last response."""

from __future__ import annotations

import asyncio
import secrets

import grpc
from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError, MiniInferError
from mini_infer.v1.generate_pb2 import GenerateRequest, GenerateResponse

from mini_infer_gateway.admission import Admission
from mini_infer_gateway.mailbox import Ending, Mailbox
from mini_infer_gateway.peers import Peers
from mini_infer_gateway.request import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from mini_infer_gateway.request_log import RequestLine
from mini_infer_gateway.stream import Stream, TextOptions
from mini_infer_gateway.validation import check_generate
from mini_infer_gateway.wire import ResponseWriter, accounting_metadata

Context = grpc.aio.ServicerContext[GenerateRequest, GenerateResponse]

SEED_BITS = 64


class GenerateCall:
    """Serves Generate calls; holds what they share."""

    def __init__(
        self,
        peers: Peers,
        admission: Admission,
        *,
        max_prompt_bytes: int,
        write_stall_s: float,
    ) -> None:
        """Takes its collaborators.

        Args:
            peers: Engines and tokenizers.
            admission: The door.
            max_prompt_bytes: Of text prompts.
            write_stall_s: How long one write may wait for the client.
        """
        self._peers = peers
        self._admission = admission
        self._max_prompt_bytes = max_prompt_bytes
        self._write_stall_s = write_stall_s

    async def run(self, message: GenerateRequest, context: Context, line: RequestLine) -> None:
        """Serves one call.

        The stream is freed in `finally`, at once and whatever happens: cancellation and deadline
        arrive as exceptions of several kinds.

        Args:
            message: What the client sent.
            context: Of the call.
            line: Takes what the log tells of the request.

        Raises:
            MiniInferError: What the client gets as a status.
        """
        self._admission.require_open()
        model = self._peers.model().engine
        request = check_generate(message, model, self._max_prompt_bytes)
        line.request_id = request.request_id
        with self._admission.admit(request.request_id) as active:
            prompt_ids = await self._encode(request.prompt, model.vocab_size)
            line.num_prompt_tokens = len(prompt_ids)
            stream = self._make_stream(request, prompt_ids, context.time_remaining())
            try:
                stream.open()
                active.attach(stream)
                await self._deliver(request, stream, context, line)
            finally:
                line.num_output_tokens = stream.num_released
                stream.close()

    async def _encode(
        self, prompt: TextPrompt | ChatPrompt | TokenPrompt, vocab_size: int
    ) -> list[int]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        token_ids = await self._peers.tokenizer().encode(prompt)
        if token_ids and max(token_ids) < vocab_size:
            return token_ids
        problem = "expected at least 1 token, got none"
        if token_ids:
            problem = (
                f"expected a text of tokens that the model knows (ids from 0 to {vocab_size - 1}), "
                f"got one of id {max(token_ids)}"
            )
        field = "text" if isinstance(prompt, TextPrompt) else "chat"
        raise InvalidRequestError([FieldViolation(field, problem)])

    def _make_stream(
        self, request: GenerationRequest, prompt_ids: list[int], time_remaining_s: float | None
    ) -> Stream:
        engine = self._peers.route(request)
        model = self._peers.model().engine
        params = request.params
        sampling = params.resolve(
            model.defaults,
            num_prompt_tokens=len(prompt_ids),
            max_model_len=model.max_model_len,
            seed=secrets.randbits(SEED_BITS),
        )
        text_options = None
        if params.stop or not request.ids_only:
            text_options = TextOptions(
                stop=params.stop_strings,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=sampling.min_tokens,
                ids_only=request.ids_only,
            )
        deadline = None
        if time_remaining_s is not None:
            deadline = asyncio.get_running_loop().time() + time_remaining_s
        return Stream(
            number=self._peers.next_stream_number(),
            prompt_ids=prompt_ids,
            sampling=sampling,
            deadline=deadline,
            text_options=text_options,
            mailbox=Mailbox(request.stream_interval),
            engine=engine,
            text=self._peers.tokenizer(),
        )

    async def _deliver(
        self, request: GenerationRequest, stream: Stream, context: Context, line: RequestLine
    ) -> None:
        """Writes what the mailbox gives, until the end of the stream.

        Headers leave when there is something to write: a call without headers can be retried. And
        not with the first message: grpc.aio could not end the call if that were never read.
        """
        writer = ResponseWriter(request.request_id, len(stream.prompt_ids), stream.sampling.seed)
        parcel = await stream.mailbox.take()
        if isinstance(parcel.end, MiniInferError):
            raise parcel.end
        await context.send_initial_metadata(())
        while True:
            if parcel.token_ids:
                await self._write(context, writer.delta(parcel.text, parcel.token_ids))
                line.first_token_sent()
            if isinstance(parcel.end, MiniInferError):
                raise parcel.end
            if parcel.end is not None:
                await self._finish(parcel.end, writer, context)
                return
            parcel = await stream.mailbox.take()

    async def _finish(self, ending: Ending, writer: ResponseWriter, context: Context) -> None:
        await self._write(context, writer.choice_finished(ending))
        if ending.accounting is not None:
            context.set_trailing_metadata(accounting_metadata(ending.accounting))
        await self._write(context, writer.finished(ending))

    async def _write(self, context: Context, response: GenerateResponse) -> None:
        """Writes one message.

        Raises:
            MiniInferError: SLOW_CONSUMER where the client does not read it in time.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls are served by tasks")
        stall = _Stall(task)
        timer = asyncio.get_running_loop().call_later(self._write_stall_s, stall.strike)
        try:
            await context.write(response)
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
