"""Between gateway and engine: streams of token ids."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from mini_infer.errors import ErrorReason
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages.base import Message
from mini_infer.messages.handshake import (
    EngineWelcome,
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
)
from mini_infer.resolved_sampling import ResolvedSampling

NO_BUDGET = -1
"""`Submit.budget_ms` of a request without a deadline."""
NO_STOP_TOKEN = -1
"""`StepOutput.stop_token_ids` of a row that no stop id ended."""


class FinishCode(IntEnum):
    """How a row of a `StepOutput` ends its stream."""

    RUNNING = 0
    STOP_TOKEN = 1
    LENGTH = 2
    ABORTED = 3
    DEADLINE = 4
    REPETITION = 5
    GRAMMAR = 6
    """The output is complete in its language, and nothing could follow."""


# --- gateway -> engine --------------------------------------------------------------------------


class Submit(Message, frozen=True, tag=10):
    """A new stream.

    Attributes:
        stream: Its number.
        prompt_ids: The prompt, at least one id.
        output_ids: Output that exists already (the stream is resumed behind it); mostly empty.
        sampling: Everything about sampling and stopping.
        budget_ms: Milliseconds until the deadline, or `NO_BUDGET`.
        priority: Its class; lower ones run first.
        principal: Who asks; empty where clients are not told apart.
        cache_salt: With the principal: who may share cached prefixes with it.
        siblings: More streams that continue the same prompt, accepted or refused together with
            it; the seed of the first is `sampling.seed + 1`, and so on, modulo 2**64.
    """

    stream: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: ResolvedSampling
    budget_ms: int = NO_BUDGET
    priority: int = 0
    principal: str = ""
    cache_salt: str = ""
    siblings: list[int] = msgspec.field(default_factory=list)


class Abort(Message, frozen=True, tag=11):
    """End these streams at the next step boundary. Unknown ones are counted and dropped.

    Attributes:
        streams: Their numbers.
        answer: Whether the streams' last row (`FinishCode.ABORTED`) is still wanted.
    """

    streams: list[int]
    answer: bool = False


# --- engine -> gateway --------------------------------------------------------------------------


class Accepted(Message, frozen=True, tag=20):
    """The stream waits or runs; exactly one finish code or `Refused` will follow."""

    stream: int


class Refused(Message, frozen=True, tag=21):
    """The stream ends without (further) output: refused at admission, or failed by itself.

    Attributes:
        stream: Its number.
        reason: The cause.
        message: One sentence for a person.
        metadata: Machine-readable details.
        retry_after_s: Seconds after which trying again can help, or None for the usual ones.
    """

    stream: int
    reason: ErrorReason
    message: str
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    retry_after_s: float | None = None


class FinishAccounting(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a finished stream's time went.

    Attributes:
        queue_ms: From arrival to its first step.
        prefill_ms: From its first step to its first output token.
        decode_ms: From its first output token to its last.
        num_cached_tokens: Prompt tokens that were not computed.
        num_preemptions: Times it lost its blocks.
        num_steps: Steps of the engine loop between its first and its last, both included.
    """

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    num_cached_tokens: int
    num_preemptions: int
    num_steps: int


class StepOutput(Message, frozen=True, tag=22):
    """What a step, or several merged ones, made for one gateway. Columns, a row a stream.

    Attributes:
        epoch: Of the engine.
        seq: 0, 1, 2, ... per gateway since its Hello: shows gaps.
        step: Number of the (last) step.
        streams: The rows' streams, each at most once.
        starts: Output position of each row's first id.
        counts: Number of ids of each row; 0 where a row only finishes.
        token_ids: The rows' ids, one after the other.
        finish_codes: A `FinishCode` per row.
        stop_token_ids: The id that ended the row, or `NO_STOP_TOKEN`.
        finished: The accounting of each row whose finish code is not RUNNING, in row order.
        logprob_rows: Rows whose tokens have log-probabilities, ascending, and
        logprobs: those of each; of all of the row's ids.
    """

    epoch: int
    seq: int
    step: int
    streams: list[int]
    starts: list[int]
    counts: list[int]
    token_ids: list[int]
    finish_codes: list[int]
    stop_token_ids: list[int]
    finished: list[FinishAccounting]
    logprob_rows: list[int] = msgspec.field(default_factory=list)
    logprobs: list[LogprobColumns] = msgspec.field(default_factory=list)


class PromptLogprobs(Message, frozen=True, tag=24):
    """Log-probabilities of tokens of a stream's prompt, as they are computed.

    Those of a prompt come in order, all of them before the stream's first output.

    Attributes:
        epoch: Of the engine.
        stream: Whose prompt it is.
        start: Index of the first token in the prompt, at least 1.
        logprobs: Of that one and of those behind it.
    """

    epoch: int
    stream: int
    start: int
    logprobs: LogprobColumns


class EngineCounters(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the scheduler has decided since the engine's start.

    Attributes:
        num_prefill_tokens: Tokens computed of prompts, resumed outputs and recomputed ones, where
            a step computed more than one of a sequence.
        num_decode_tokens: Output tokens made.
        num_queried_tokens: Tokens of joining sequences that were looked up in the prefix cache.
        num_hit_tokens: Those among them that were there.
        num_recomputes: Preemptions whose tokens had to be computed again.
        num_swaps: Preemptions whose blocks went to the host's memory.
        num_swapped_out_blocks: Blocks copied to the host's memory.
        num_swapped_in_blocks: Blocks copied back.
        num_copied_blocks: Blocks copied on the device for a sequence that shares a prompt.
        num_evicted_blocks: Cached blocks that were given up for new tokens.
        num_expired_waiting: Sequences whose deadline passed before their first step.
        num_expired_running: Sequences whose deadline passed later.
        refusals: Requests refused at admission, by `ErrorReason`.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_recomputes: int = 0
    num_swaps: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    num_copied_blocks: int = 0
    num_evicted_blocks: int = 0
    num_expired_waiting: int = 0
    num_expired_running: int = 0
    refusals: dict[str, int] = {}


class EngineBeat(Message, frozen=True, tag=23):
    """The engine loop turns.

    Attributes:
        epoch: Of the engine.
        num_steps: Steps that ran the model, so far.
        expected_step_ms: How long the step that begins now is expected to take.
        num_running: Sequences that take part in steps.
        num_waiting: Sequences that wait, swapped ones among them.
        num_used_blocks: Blocks that sequences hold.
        num_preemptions: Preemptions so far.
        num_swapped: Sequences that wait with their blocks in the host's memory.
        num_cached_blocks: Blocks that no sequence holds and whose tokens can still be found.
        counters: What the scheduler has decided so far.
    """

    epoch: int
    num_steps: int
    expected_step_ms: float
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_preemptions: int
    num_swapped: int = 0
    num_cached_blocks: int = 0
    counters: EngineCounters = EngineCounters()


ToEngine = Hello | GatewayBeat | Submit | Abort
FromEngine = (
    EngineWelcome
    | HelloRefused
    | HelloNeeded
    | Accepted
    | Refused
    | StepOutput
    | EngineBeat
    | PromptLogprobs
)

to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
