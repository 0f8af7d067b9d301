"""Between gateway and tokenizer: encode and decode jobs, and ids into text."""

from __future__ import annotations

import msgspec

from mini_infer.errors import ErrorReason
from mini_infer.messages.base import Message
from mini_infer.messages.handshake import (
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
    TokenizerWelcome,
)
from mini_infer.structured_output import Grammar

# --- gateway -> tokenizer -----------------------------------------------------------------------


class WireToolCall(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A function that the assistant called.

    Attributes:
        name: Of the function.
        arguments: What it was called with: JSON of an object, or any text.
        arguments_are_json: Whether the chat template gets the object rather than the text.
        id: What the tool's answer refers to.
    """

    name: str
    arguments: str
    arguments_are_json: bool
    id: str | None = None


class WireChatMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One turn of a conversation; the chat template does not see what is None or empty.

    Attributes:
        role: Who speaks.
        content: What is said. An empty text is seen.
        name: Of the speaker or, with the role "tool", of the function.
        tool_calls: The functions that the assistant called.
        tool_call_id: The call that a tool's answer belongs to.
        reasoning_content: What the assistant thought before it spoke.
    """

    role: str
    content: str | None
    name: str | None = None
    tool_calls: list[WireToolCall] = msgspec.field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class EncodeText(Message, frozen=True, tag=30):
    """Text to ids. `job` is a number that the answer repeats."""

    job: int
    text: str
    add_special_tokens: bool


class EncodeChat(Message, frozen=True, tag=31):
    """A conversation to ids, through a chat template of the model folder.

    Attributes:
        job: A number that the answer repeats.
        messages: Oldest first.
        add_generation_prompt: The text ends with the opening of the assistant's turn.
        tools: JSON objects that describe functions; none where it is empty.
        documents: JSON objects that the answer may rest on; none where it is empty.
        template_kwargs: More variables for the template, as JSON of an object, or empty.
        chat_template: Name of the template, where the folder has several; empty leaves the
            choice to the tokenizer.
        continue_final_message: The text ends with the content of the last message.
    """

    job: int
    messages: list[WireChatMessage]
    add_generation_prompt: bool
    tools: list[str] = msgspec.field(default_factory=list)
    documents: list[str] = msgspec.field(default_factory=list)
    template_kwargs: str = ""
    chat_template: str = ""
    continue_final_message: bool = False


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
    output_ids: list[int] = msgspec.field(default_factory=list)
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


class EncodeWords(Message, frozen=True, tag=37):
    """Bad words to lists of ids, at least one for each word. `job` as above."""

    job: int
    words: list[str]


class CheckGrammar(Message, frozen=True, tag=38):
    """Whether a language can be used: it is compiled once, within limits. `job` as above."""

    job: int
    grammar: Grammar


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
    """A job that could not be done."""

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


class EncodedWords(Message, frozen=True, tag=45):
    """The lists of ids of an `EncodeWords`, none of them empty."""

    job: int
    sequences: list[list[int]]


class GrammarAccepted(Message, frozen=True, tag=46):
    """The language of a `CheckGrammar` can be used."""

    job: int


class UnknownStreams(Message, frozen=True, tag=44):
    """A `TextStep` named streams that are not open here, or left out ids of them.

    The answer to that step's other rows comes before it. The streams are closed now.
    """

    streams: list[int]


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
    | EncodeWords
    | CheckGrammar
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
    | EncodedWords
    | GrammarAccepted
)

to_tokenizer_decoder: msgspec.msgpack.Decoder[ToTokenizer] = msgspec.msgpack.Decoder(ToTokenizer)
from_tokenizer_decoder: msgspec.msgpack.Decoder[FromTokenizer] = msgspec.msgpack.Decoder(
    FromTokenizer
)
