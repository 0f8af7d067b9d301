"""The link to one engine: handshake, lease, and the way of ids from its steps into streams.

An engine is *ready* from its welcome until it is lost: when its lease runs out (no message for
`max(ENGINE_LEASE_S, 4 x the announced step)`) or when it says that it does not know this gateway
(it restarted, or this gateway's own lease ran out). Its streams then end with ENGINE_LOST, all in
`_lose_stream`: the one place where they could be submitted to another engine instead.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

import structlog
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import NO_LOGPROBS, LogprobColumns
from mini_infer.messages import (
    ENGINE_LEASE_S,
    GATEWAY_BEAT_INTERVAL_S,
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    EngineBeat,
    EngineWelcome,
    FinishCode,
    FromEngine,
    GatewayBeat,
    HelloNeeded,
    HelloRefused,
    PromptLogprobs,
    Refused,
    StepOutput,
    Submit,
)

from mini_infer_gateway.peer_socket import PeerSocket
from mini_infer_gateway.request import ANONYMOUS
from mini_infer_gateway.stream import EngineFinish, Stream

_log = structlog.get_logger()

LEASE_STEPS = 4
"""An engine may be silent for so many of its announced steps."""
_FINISH_CODES = frozenset(FinishCode)


class EngineLink:
    """One engine as the gateway sees it. Owns which streams run there.

    Attributes:
        welcome: What the engine serves; None while it is not ready.
        beat: The last sign of its load, of this epoch.
        readiness_changed: Set at each change of `welcome`; whoever waits for it clears it.
    """

    def __init__(self, socket: PeerSocket[FromEngine], readiness_changed: asyncio.Event) -> None:
        """Takes a socket that is not started.

        Args:
            socket: To the engine.
            readiness_changed: Set when the engine becomes ready or is lost.
        """
        self.welcome: EngineWelcome | None = None
        self.beat: EngineBeat | None = None
        self.readiness_changed = readiness_changed
        self._socket = socket
        self._streams: dict[int, Stream] = {}
        self._next_seq = 0
        self._beat_at = 0.0

    def start(self) -> None:
        """Begins to receive on the running loop."""
        self._socket.start(self._receive)

    def close(self) -> None:
        """Disconnects."""
        self._socket.close()

    @property
    def num_streams(self) -> int:
        """Streams that run at the engine."""
        return len(self._streams)

    @property
    def dropped(self) -> Counter[str]:
        """What the engine sent and was not used, by cause."""
        return self._socket.dropped

    def submit(self, streams: Sequence[Stream]) -> None:
        """Gives all choices of a request, none of which has output yet, to the engine.

        Args:
            streams: By choice index; at least one.

        Raises:
            MiniInferError: ENGINE_LOST where the engine is away.
        """
        first, *siblings = streams
        request = first.request
        submit = Submit(
            stream=first.number,
            prompt_ids=request.prompt_ids,
            output_ids=[],
            sampling=request.sampling,
            budget_ms=request.budget_ms(),
            priority=request.priority,
            principal=ANONYMOUS,
            cache_salt=request.cache_salt,
            siblings=[each.number for each in siblings],
        )
        if self.welcome is None or not self._socket.send(submit):
            raise _engine_lost("the engine is not connected")
        self._streams.update((each.number, each) for each in streams)

    def abort(self, stream: Stream) -> None:
        """Asks the engine to end the stream and to say so."""
        if stream.number in self._streams:
            self._socket.send(Abort([stream.number], answer=True))

    def forget(self, stream: Stream) -> None:
        """Frees what the engine holds of the stream.

        An abort that the pipe does not take is made good by the next beat, which does not name
        the stream any more.
        """
        if self._streams.pop(stream.number, None) is not None and self.welcome is not None:
            self._socket.send(Abort([stream.number]))

    def tick(self, now: float) -> None:
        """Says Hello or gives the beat when it is time, and watches over the lease.

        Args:
            now: The loop's time, in seconds.
        """
        self._socket.receive_waiting()
        if self.welcome is None:
            if now - self._socket.hello_at > GATEWAY_BEAT_INTERVAL_S:
                self._socket.say_hello()
        elif now - self._socket.heard_at > self._lease():
            self._lose(f"no sign of life for {now - self._socket.heard_at:.1f} s")
        elif now - self._beat_at >= GATEWAY_BEAT_INTERVAL_S:
            self._beat_at = now
            self._socket.send(GatewayBeat(list(self._streams)))

    def _lease(self) -> float:
        step_s = self.beat.expected_step_ms / 1000 if self.beat else 0.0
        return max(ENGINE_LEASE_S, LEASE_STEPS * step_s)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case EngineWelcome():
                self._on_welcome(message)
            case HelloRefused(cause):
                self._socket.complain(cause)
            case HelloNeeded() if self.welcome is not None:
                self._lose("it does not know this gateway")
            case _ if self.welcome is None:
                # Of an epoch, or of an acquaintance, that is over.
                self.dropped["before_welcome"] += 1
            case StepOutput():
                self._on_step(message)
            case PromptLogprobs():
                self._on_prompt_logprobs(message)
            case EngineBeat():
                self._on_beat(message)
            case Refused(number, reason, text, metadata, retry_after_s):
                self._on_refused(number, MiniInferError(reason, text, metadata, retry_after_s))
            case Accepted() | HelloNeeded():
                pass

    def _on_welcome(self, welcome: EngineWelcome) -> None:
        if welcome.protocol_version != PROTOCOL_VERSION:
            self._socket.complain(
                f"it speaks protocol version {welcome.protocol_version}, this gateway speaks "
                f"{PROTOCOL_VERSION}: run the same version of both"
            )
            return
        if self.welcome is not None and self.welcome.epoch != welcome.epoch:
            self._lose("it restarted")
        self.welcome = welcome
        self.beat = None
        self._next_seq = 0
        self.readiness_changed.set()
        _log.info("engine connected", engine=welcome.engine_id, epoch=welcome.epoch)

    def _on_beat(self, beat: EngineBeat) -> None:
        if self._is_current(beat.epoch):
            self.beat = beat

    def _on_refused(self, number: int, error: MiniInferError) -> None:
        stream = self._streams.pop(number, None)
        if stream is None:
            self.dropped["unknown_stream"] += 1
        else:
            stream.fail(error)

    def _on_step(self, step: StepOutput) -> None:
        if not self._is_current(step.epoch):
            return
        if step.seq < self._next_seq:
            self.dropped["repeated_step"] += 1
            return
        is_consistent = _is_consistent(step)
        if step.seq > self._next_seq or not is_consistent:
            # Any stream may have had its last row in what is missing.
            self.dropped["lost_step"] += 1
            self._lose_streams("a step's output was lost")
        self._next_seq = step.seq + 1
        if is_consistent:
            self._deliver_rows(step)

    def _deliver_rows(self, step: StepOutput) -> None:
        accounting = iter(step.finished)
        logprobs = dict(zip(step.logprob_rows, step.logprobs, strict=True))
        end = 0
        for row, (number, start, count, code, stop_token_id) in enumerate(
            zip(
                step.streams,
                step.starts,
                step.counts,
                step.finish_codes,
                step.stop_token_ids,
                strict=True,
            )
        ):
            begin, end = end, end + count
            finish = None
            if code != FinishCode.RUNNING:
                finish = EngineFinish(FinishCode(code), stop_token_id, next(accounting))
            stream = self._streams.get(number)
            if stream is None:
                self.dropped["unknown_stream"] += 1
            else:
                token_ids = step.token_ids[begin:end]
                self._deliver(stream, start, token_ids, finish, logprobs.get(row))

    def _deliver(
        self,
        stream: Stream,
        start: int,
        token_ids: list[int],
        finish: EngineFinish | None,
        logprobs: LogprobColumns | None,
    ) -> None:
        """Passes one row on, less what the stream has already."""
        num_known = len(stream.output_ids)
        if start > num_known:
            self.dropped["lost_tokens"] += 1
            self._lose_stream(stream, f"output tokens {num_known} to {start - 1} were lost")
            return
        if token_ids and _lacks_logprobs(stream, logprobs):
            self.dropped["lost_logprobs"] += 1
            self._lose_stream(stream, "log-probabilities were lost")
            return
        if start < num_known:
            self.dropped["repeated_tokens"] += 1
            if logprobs is not None:
                logprobs = logprobs.part(num_known - start, len(token_ids))
            token_ids = token_ids[num_known - start :]
        if finish is not None:
            del self._streams[stream.number]
        stream.extend(token_ids, finish, logprobs)

    def _on_prompt_logprobs(self, message: PromptLogprobs) -> None:
        """Passes log-probabilities of a prompt on, less what the stream has already."""
        if not self._is_current(message.epoch):
            return
        stream, logprobs = self._streams.get(message.stream), message.logprobs
        if stream is None:
            self.dropped["unknown_stream"] += 1
            return
        num_missing = stream.num_missing_prompt_logprobs
        num_known = len(stream.request.prompt_ids) - num_missing - message.start
        if not (
            logprobs.is_consistent
            and logprobs.num_top == stream.request.sampling.num_prompt_logprobs
            and 1 <= message.start
            and 0 <= num_known
            and logprobs.num_tokens - num_known <= num_missing
        ):
            self.dropped["lost_logprobs"] += 1
            self._lose_stream(stream, "log-probabilities of the prompt were lost")
            return
        if num_known > 0:
            self.dropped["repeated_logprobs"] += 1
            logprobs = logprobs.part(num_known, logprobs.num_tokens)
        stream.extend_prompt(logprobs)

    def _is_current(self, epoch: int) -> bool:
        if self.welcome is not None and self.welcome.epoch == epoch:
            return True
        self.dropped["old_epoch"] += 1
        return False

    def _lose(self, cause: str) -> None:
        """Ends the acquaintance with the engine and begins the next one."""
        _log.warning("engine lost", address=self._socket.address, cause=cause)
        self.welcome = None
        self.readiness_changed.set()
        self._lose_streams(f"the engine was lost: {cause}")
        self._socket.say_hello()

    def _lose_streams(self, cause: str) -> None:
        for stream in list(self._streams.values()):
            self._lose_stream(stream, cause)

    def _lose_stream(self, stream: Stream, cause: str) -> None:
        stream.fail(_engine_lost(cause))


def _engine_lost(cause: str) -> MiniInferError:
    return MiniInferError(ErrorReason.ENGINE_LOST, f"{cause}; send the request again")


def _lacks_logprobs(stream: Stream, logprobs: LogprobColumns | None) -> bool:
    """Whether output comes without, or before, log-probabilities that were asked for."""
    num_top = NO_LOGPROBS if logprobs is None else logprobs.num_top
    return num_top != stream.request.sampling.num_logprobs or stream.num_missing_prompt_logprobs > 0


def _is_consistent(step: StepOutput) -> bool:
    """Whether the columns agree with each other."""
    columns: Iterable[list[int]] = (
        step.starts,
        step.counts,
        step.finish_codes,
        step.stop_token_ids,
    )
    num_finished = len(step.finish_codes) - step.finish_codes.count(FinishCode.RUNNING)
    return (
        all(len(column) == len(step.streams) for column in columns)
        and min(step.counts, default=0) >= 0
        and sum(step.counts) == len(step.token_ids)
        and _FINISH_CODES.issuperset(step.finish_codes)
        and len(step.finished) == num_finished
        and _has_consistent_logprobs(step)
    )


def _has_consistent_logprobs(step: StepOutput) -> bool:
    """Whether the log-probabilities are those of rows, of all ids of each."""
    rows, all_rows = step.logprob_rows, range(len(step.streams))
    return (
        len(rows) == len(step.logprobs)
        and rows == sorted(set(rows))
        and all(
            row in all_rows and each.is_consistent and each.num_tokens == step.counts[row]
            for row, each in zip(rows, step.logprobs, strict=True)
        )
    )
