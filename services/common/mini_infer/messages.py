"""Everything the processes say to each other, as msgspec structs: one tagged union a direction.

Frames are msgpack arrays (`array_like`), so fields are known by their place: new ones are
appended with defaults, none is ever reordered or reused (`tests/common/test_messages.py` decodes
a corpus of recorded frames). A step's output is columns, never an object per token.

A *stream* is one choice of one request: an unsigned 32-bit number that its gateway draws and that
is unique per gateway. An *output position* is the index of a token after the prompt, counted
from 0, resubmitted output included. Deadlines cross as remaining milliseconds.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from mini_infer.errors import ErrorReason
from mini_infer.sampling_params import GenerationDefaults, ResolvedSampling

PROTOCOL_VERSION = 1

GATEWAY_BEAT_INTERVAL_S = 1.0
GATEWAY_LEASE_S = 3.0
ENGINE_BEAT_INTERVAL_S = 0.5
ENGINE_LEASE_S = 5.0
"""An engine is lost after max(this, 4 x its announced step) without a message."""

NO_BUDGET = -1
"""`Submit.budget_ms` of a request without a deadline."""
NO_STOP_TOKEN = -1
"""`StepOutput.stop_token_ids` of a row that no stop id ended."""


class Message(
    msgspec.Struct, frozen=True, array_like=True, gc=False, kw_only=False, tag_field="type"
):
    """Base of every message between processes."""


class FinishCode(IntEnum):
    """How a row of a `StepOutput` ends its stream."""

    RUNNING = 0
    STOP_TOKEN = 1
    LENGTH = 2
    ABORTED = 3
    DEADLINE = 4


# --- both ways, first ---------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=1):
    """A gateway introduces itself; the peer answers with its welcome or `HelloRefused`.

    Attributes:
        protocol_version: Must equal the peer's.
        gateway_id: Name and incarnation of the gateway, equal to its ZeroMQ identity.
    """

    protocol_version: int
    gateway_id: str


class HelloRefused(Message, frozen=True, tag=2):
    """The peer does not talk to this gateway; the message says why."""

    message: str


class HelloNeeded(Message, frozen=True, tag=3):
    """The peer does not know this gateway (it restarted, or the lease ran out): say Hello."""


class EngineWelcome(Message, frozen=True, tag=4):
    """What an engine serves.

    Attributes:
        protocol_version: Must equal the gateway's.
        engine_id: Name of the engine.
        epoch: Changes at each start; messages of another epoch are dropped.
        model: Name that clients may give.
        architecture: As in config.json.
        dtype: Of the weights as they run, such as "float32".
        fingerprint: Hash over config.json and the weight files' headers.
        tokenizer_hash: SHA-256 of tokenizer.json.
        vocab_size: Number of token ids that the engine accepts.
        max_model_len: Tokens of prompt and output together.
        eos_token_ids: Ids that end an output.
        defaults: What absent sampling fields mean.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens in a block.
    """

    protocol_version: int
    engine_id: str
    epoch: int
    model: str
    architecture: str
    dtype: str
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    defaults: GenerationDefaults
    num_blocks: int
    block_size: int


class TokenizerWelcome(Message, frozen=True, tag=5):
    """What a tokenizer process serves; `tokenizer_hash` must equal the engine's."""

    protocol_version: int
    tokenizer_id: str
    tokenizer_hash: str
    vocab_size: int
    has_chat_template: bool


class GatewayBeat(Message, frozen=True, tag=6):
    """The gateway lives, every second, to both peers.

    Attributes:
        live_streams: All streams that the gateway holds open at the peer. What the peer holds
            beside them is freed (the reconciling sweep); messages of one gateway arrive in
            order, so a stream submitted before the beat is in it unless it has ended.
    """

    live_streams: list[int]


# --- gateway -> engine --------------------------------------------------------------------------


class Submit(Message, frozen=True, tag=10):
    """A new stream.

    Attributes:
        stream: Its number.
        prompt_ids: The prompt, at least one id.
        output_ids: Output that exists already (the stream is resumed behind it); mostly empty.
        sampling: Everything about sampling and stopping.
        budget_ms: Milliseconds until the deadline, or `NO_BUDGET`.
    """

    stream: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: ResolvedSampling
    budget_ms: int = NO_BUDGET


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
    """The stream ends without (further) output: refused at admission, or failed by itself."""

    stream: int
    reason: ErrorReason
    message: str
    metadata: dict[str, str] = {}


class FinishAccounting(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a finished stream's time went.

    Attributes:
        queue_ms: From arrival to its first step.
        prefill_ms: From its first step to its first output token.
        decode_ms: From its first output token to its last.
        num_cached_tokens: Prompt tokens that were not computed.
        num_preemptions: Times it lost its blocks and was computed again.
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


class EngineBeat(Message, frozen=True, tag=23):
    """The engine loop turns.

    Attributes:
        epoch: Of the engine.
        num_steps: Steps that ran the model, so far.
        expected_step_ms: How long the step that begins now is expected to take.
        num_running: Sequences that take part in steps.
        num_waiting: Sequences in the waiting queue.
        num_used_blocks: Blocks that hold tokens.
        num_preemptions: Preemptions so far.
    """

    epoch: int
    num_steps: int
    expected_step_ms: float
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_preemptions: int


# --- gateway -> tokenizer -----------------------------------------------------------------------


class WireChatMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One turn of a conversation."""

    role: str
    content: str


class EncodeText(Message, frozen=True, tag=30):
    """Text to ids. `job` is a number that the answer repeats."""

    job: int
    text: str
    add_special_tokens: bool


class EncodeChat(Message, frozen=True, tag=31):
    """A conversation to ids, through the model folder's chat template."""

    job: int
    messages: list[WireChatMessage]
    add_generation_prompt: bool


class Decode(Message, frozen=True, tag=32):
    """All of some ids to text, at once."""

    job: int
    token_ids: list[int]
    skip_special_tokens: bool


class OpenText(Message, frozen=True, tag=33):
    """Incremental detokenization of a stream begins.

    Attributes:
        stream: Its number, the same as at the engine.
        stop: Strings that end it.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep a matched stop string.
        min_tokens: Stop strings count only when at least so many ids are read.
        output_ids: Ids before the first `TextStep`, whose text was delivered already.
        ids_only: No text is wanted, only stop strings.
    """

    stream: int
    stop: list[str]
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    min_tokens: int = 0
    output_ids: list[int] = []
    ids_only: bool = False


class TextStep(Message, frozen=True, tag=34):
    """Ids of one step, in columns.

    Attributes:
        streams: The rows' streams, each at most once.
        starts: Output position of each row's first id.
        counts: Number of ids of each row.
        token_ids: The rows' ids, one after the other.
        last: Whether a row is its stream's last: held text is flushed and the stream closed.
    """

    streams: list[int]
    starts: list[int]
    counts: list[int]
    token_ids: list[int]
    last: list[bool]


class CloseText(Message, frozen=True, tag=35):
    """The streams' text is not wanted any more."""

    streams: list[int]


class CancelJobs(Message, frozen=True, tag=36):
    """The answers to these jobs are not wanted any more; a job that runs may run to its end."""

    jobs: list[int]


# --- tokenizer -> gateway -----------------------------------------------------------------------


class Encoded(Message, frozen=True, tag=40):
    """The ids of an `EncodeText` or `EncodeChat`."""

    job: int
    token_ids: list[int]


class Decoded(Message, frozen=True, tag=41):
    """The text of a `Decode`."""

    job: int
    text: str


class JobRefused(Message, frozen=True, tag=42):
    """An encode or decode job that could not be done."""

    job: int
    reason: ErrorReason
    message: str


class TextDeltas(Message, frozen=True, tag=43):
    """The text of a `TextStep`, in columns; a row for every row whose stream is open, in order.

    Text is released a whole token at a time: `texts[i]` is the text of just the next
    `ids_released[i]` ids behind those released before. Ids whose text is not ready (an incomplete
    character, a stop string that may be completing) are held back until a later row.

    Attributes:
        streams: The rows' streams.
        ids_consumed: Output position behind the last id that was read.
        ids_released: Number of ids whose text is in this row.
        texts: That text; cut where a stop string begins (or ends, if it is to be included).
        stop_indices: Index of the stop string that ended the stream at the last id released,
            or -1. Ids behind that one are dropped, and the stream is closed.
    """

    streams: list[int]
    ids_consumed: list[int]
    ids_released: list[int]
    texts: list[str]
    stop_indices: list[int]


class UnknownStreams(Message, frozen=True, tag=44):
    """A `TextStep` named streams that are not open here, or left out ids of them.

    The answer to that step's other rows comes before it. The streams are closed now.
    """

    streams: list[int]


ToEngine = Hello | GatewayBeat | Submit | Abort
FromEngine = (
    EngineWelcome | HelloRefused | HelloNeeded | Accepted | Refused | StepOutput | EngineBeat
)
ToTokenizer = (
    Hello
    | GatewayBeat
    | EncodeText
    | EncodeChat
    | Decode
    | OpenText
    | TextStep
    | CloseText
    | CancelJobs
)
FromTokenizer = (
    TokenizerWelcome
    | HelloRefused
    | HelloNeeded
    | Encoded
    | Decoded
    | JobRefused
    | TextDeltas
    | UnknownStreams
)

_encoder = msgspec.msgpack.Encoder()

to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
to_tokenizer_decoder: msgspec.msgpack.Decoder[ToTokenizer] = msgspec.msgpack.Decoder(ToTokenizer)
from_tokenizer_decoder: msgspec.msgpack.Decoder[FromTokenizer] = msgspec.msgpack.Decoder(
    FromTokenizer
)


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)
