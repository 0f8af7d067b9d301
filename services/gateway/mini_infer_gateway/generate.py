"""The Generate call, from the client's message to the last response."""

from __future__ import annotations

import asyncio
import secrets

from mini_infer.errors import MiniInferError
from mini_infer.v1.generate_pb2 import GenerateRequest

from mini_infer_gateway.admission import Admission
from mini_infer_gateway.choices import Choices, call_accounting
from mini_infer_gateway.client_stream import ClientStream, Context
from mini_infer_gateway.encoding import Encoding, encode_request
from mini_infer_gateway.mailbox import Ending, Parcel
from mini_infer_gateway.peers import Peers
from mini_infer_gateway.request import TIMEOUT_ROUNDING, EncodedRequest, GenerationRequest
from mini_infer_gateway.request_log import RequestLine
from mini_infer_gateway.response_writer import ResponseWriter, accounting_metadata
from mini_infer_gateway.validation import check_generate

SEED_BITS = 64
LAST_WORDS_S = 0.05
"""Before the deadline, for what the engine has to say at the end."""


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

        Its streams are freed in `finally`, at once and whatever happens: cancellation and deadline
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
            encoding = await encode_request(request, self._peers.tokenizer(), model.vocab_size)
            line.num_prompt_tokens = len(encoding.prompt_ids)
            choices = self._make_choices(request, encoding, context.time_remaining())
            try:
                choices.open()
                active.attach(choices)
                await self._deliver(request.request_id, choices, context, line)
            finally:
                line.num_output_tokens = choices.num_released
                choices.close()

    def _make_choices(
        self, request: GenerationRequest, encoding: Encoding, time_remaining_s: float | None
    ) -> Choices:
        engine = self._peers.route(request)
        model = self._peers.model().engine
        sampling = request.params.resolve(
            model.defaults,
            num_prompt_tokens=len(encoding.prompt_ids),
            max_model_len=model.max_model_len,
            seed=secrets.randbits(SEED_BITS),
            bad_words=encoding.bad_words,
        )
        deadline = None
        if time_remaining_s is not None:
            deadline = asyncio.get_running_loop().time() + _time_to_generate_s(time_remaining_s)
        encoded = EncodedRequest(
            prompt_ids=encoding.prompt_ids,
            sampling=sampling,
            num_choices=request.params.n,
            text_options=request.text_options(sampling.min_tokens),
            stream_interval=request.stream_interval,
            priority=request.priority,
            cache_salt=request.cache_salt,
            deadline=deadline,
        )
        return Choices(
            encoded,
            engine=engine,
            text=self._peers.tokenizer(),
            next_number=self._peers.next_stream_number,
        )

    async def _deliver(
        self, request_id: str, choices: Choices, context: Context, line: RequestLine
    ) -> None:
        """Writes what the mailbox gives, until every choice has ended or one has failed.

        An error comes behind what all choices have released.
        """
        request = choices.request
        client = ClientStream(context, self._write_stall_s)
        writer = ResponseWriter(request_id, len(request.prompt_ids), request.sampling.seed)
        endings: dict[int, Ending] = {}
        while len(endings) < request.num_choices:
            parcel = await choices.mailbox.take()
            if isinstance(parcel.end, MiniInferError):
                choices.close()
                for each in (parcel, *choices.mailbox.take_rest()):
                    await _write_parcel(each, writer, client, line)
                raise parcel.end
            await _write_parcel(parcel, writer, client, line)
            if parcel.end is not None:
                endings[parcel.choice_index] = parcel.end
        in_order = [ending for _, ending in sorted(endings.items())]
        accounting = call_accounting(in_order)
        if accounting is not None:
            context.set_trailing_metadata(accounting_metadata(accounting))
        await client.write(writer.finished(in_order))


def _time_to_generate_s(time_remaining_s: float) -> float:
    """How long the engine may work on a call, so that its end still reaches the client.

    Clients hang up at their own deadline, and the server's is later: a timeout is rounded up on
    its way, by 1 % at most (gRPC over HTTP/2, TimeoutValue has few digits). Beside that, a step of
    the engine, the last text and the status have to get through.
    """
    margin_s = min(LAST_WORDS_S, time_remaining_s / 10)
    return time_remaining_s * (1 - TIMEOUT_ROUNDING) - margin_s


async def _write_parcel(
    parcel: Parcel, writer: ResponseWriter, client: ClientStream, line: RequestLine
) -> None:
    index = parcel.choice_index
    if parcel.prompt is not None:
        await client.write(writer.prompt_logprobs(parcel.prompt))
    if parcel.token_ids:
        delta = writer.delta(index, parcel.text, parcel.token_ids, parcel.logprobs)
        await client.write(delta)
        line.first_token_sent()
    if isinstance(parcel.end, Ending):
        await client.write(writer.choice_finished(index, parcel.end))
