"""Peers of the gateway that do what a test tells them: for faults that no real process makes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio
from mini_infer.channel import bind_router
from mini_infer.config import bundled_model
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import (
    NO_STOP_TOKEN,
    PROTOCOL_VERSION,
    EngineWelcome,
    FinishAccounting,
    FinishCode,
    GatewayBeat,
    Hello,
    Message,
    PromptLogprobs,
    StepOutput,
    TokenizerWelcome,
    encode,
    to_engine_decoder,
    to_tokenizer_decoder,
)
from mini_infer.model_folder import tokenizer_hash
from mini_infer.resolved_sampling import GenerationDefaults

DEMO_HASH = tokenizer_hash(bundled_model("demo"))
ACCOUNTING = FinishAccounting(1.5, 2.5, 3.5, 4, 5, 6)
ENGINE_WELCOME = EngineWelcome(
    protocol_version=PROTOCOL_VERSION,
    engine_id="stand-in",
    epoch=1,
    model="demo",
    architecture="LlamaForCausalLM",
    dtype="float32",
    fingerprint="f" * 64,
    tokenizer_hash=DEMO_HASH,
    vocab_size=4096,
    max_model_len=128,
    eos_token_ids=[2],
    defaults=GenerationDefaults(0.7, 0, 0.95, None, 0.05, 0.9, 1.25),
    num_blocks=64,
    block_size=16,
)
TOKENIZER_WELCOME = TokenizerWelcome(PROTOCOL_VERSION, "stand-in", DEMO_HASH, 4096, True)

_M = TypeVar("_M", bound=Message)
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Row:
    """A stream's part of a step."""

    stream: int
    start: int
    token_ids: Sequence[int]
    finish: FinishCode = FinishCode.RUNNING
    stop_token_id: int = NO_STOP_TOKEN
    accounting: FinishAccounting = ACCOUNTING
    logprobs: LogprobColumns | None = None


class StandIn(Generic[_Any]):
    """A ROUTER that answers Hello and keeps every other message for the test.

    Attributes:
        welcome: The answer to a Hello; None leaves it unanswered.
        received: What came and was not taken by `next` yet, beats excluded.
        beats: The live streams of each beat.
    """

    def __init__(self, address: str, welcome: Any, decoder: msgspec.msgpack.Decoder[_Any]) -> None:
        self.welcome = welcome
        self.received: list[Any] = []
        self.beats: list[list[int]] = []
        self.num_hellos = 0
        self._decoder = decoder
        self._context = zmq.asyncio.Context()
        self._socket: Any = bind_router(self._context, address)
        self._gateway = b""
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._receive())

    async def send(self, message: Message) -> None:
        await self.send_frame(encode(message))

    async def send_frame(self, frame: bytes) -> None:
        await self._socket.send_multipart([self._gateway, frame])

    async def next(self, kind: type[_M]) -> _M:
        """The first message of a kind that was not taken yet."""
        while True:
            for index, message in enumerate(self.received):
                if isinstance(message, kind):
                    del self.received[index]
                    return message
            self._came.clear()
            await self._came.wait()

    async def _receive(self) -> None:
        while True:
            self._gateway, frame = await self._socket.recv_multipart()
            message = self._decoder.decode(frame)
            if isinstance(message, Hello):
                self.num_hellos += 1
                await self.on_hello()
            elif isinstance(message, GatewayBeat):
                self.beats.append(message.live_streams)
            else:
                self.received.append(message)
            self._came.set()

    async def on_hello(self) -> None:
        if self.welcome is not None:
            await self.send(self.welcome)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)


class StandInEngine(StandIn[Any]):
    """An engine whose steps the test writes."""

    def __init__(self, address: str, welcome: EngineWelcome | None = ENGINE_WELCOME) -> None:
        super().__init__(address, welcome, to_engine_decoder)
        self.seq = 0

    async def on_hello(self) -> None:
        self.seq = 0
        await super().on_hello()

    async def step(
        self,
        stream: int,
        start: int,
        token_ids: Sequence[int],
        finish: FinishCode = FinishCode.RUNNING,
        *,
        stop_token_id: int = NO_STOP_TOKEN,
        logprobs: LogprobColumns | None = None,
        epoch: int = 1,
        seq: int | None = None,
    ) -> None:
        """Sends a step with one row."""
        row = Row(stream, start, token_ids, finish, stop_token_id, logprobs=logprobs)
        await self.step_of_rows(row, epoch=epoch, seq=seq)

    async def step_of_rows(self, *rows: Row, epoch: int = 1, seq: int | None = None) -> None:
        """Sends a step."""
        told = {index: row.logprobs for index, row in enumerate(rows) if row.logprobs}
        await self.send(
            StepOutput(
                epoch=epoch,
                seq=self.seq if seq is None else seq,
                step=self.seq,
                streams=[row.stream for row in rows],
                starts=[row.start for row in rows],
                counts=[len(row.token_ids) for row in rows],
                token_ids=[token_id for row in rows for token_id in row.token_ids],
                finish_codes=[row.finish for row in rows],
                stop_token_ids=[row.stop_token_id for row in rows],
                finished=[row.accounting for row in rows if row.finish],
                logprob_rows=list(told),
                logprobs=list(told.values()),
            )
        )
        if seq is None:
            self.seq += 1

    async def tell_prompt(
        self, stream: int, start: int, logprobs: LogprobColumns, epoch: int = 1
    ) -> None:
        """Sends log-probabilities of a stream's prompt."""
        await self.send(PromptLogprobs(epoch, stream, start, logprobs))


class StandInTokenizer(StandIn[Any]):
    """A tokenizer that only says Hello, unless the test answers for it."""

    def __init__(self, address: str, welcome: TokenizerWelcome | None = TOKENIZER_WELCOME) -> None:
        super().__init__(address, welcome, to_tokenizer_decoder)
