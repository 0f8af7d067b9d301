"""Everything the processes say to each other, as msgspec structs: one tagged union a direction.

Frames are msgpack arrays (`array_like`), so fields are known by their place: new ones are
appended with defaults, none is ever reordered or reused (`tests/common/test_messages.py` decodes
a corpus of recorded frames). A step's output is columns, never an object per token.

A *stream* is one choice of one request: an unsigned 32-bit number that its gateway draws and that
is unique per gateway. An *output position* is the index of a token after the prompt, counted
from 0, resubmitted output included. Deadlines cross as remaining milliseconds.
"""

from __future__ import annotations

from mini_infer.messages.base import (
    Message,
    encode,
)
from mini_infer.messages.engine import (
    NO_BUDGET,
    NO_STOP_TOKEN,
    Abort,
    Accepted,
    EngineBeat,
    EngineCounters,
    FinishAccounting,
    FinishCode,
    FromEngine,
    Refused,
    StepOutput,
    Submit,
    ToEngine,
    from_engine_decoder,
    to_engine_decoder,
)
from mini_infer.messages.handshake import (
    ENGINE_BEAT_INTERVAL_S,
    ENGINE_LEASE_S,
    GATEWAY_BEAT_INTERVAL_S,
    GATEWAY_LEASE_S,
    PROTOCOL_VERSION,
    EngineWelcome,
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
    TokenizerWelcome,
)
from mini_infer.messages.tokenizer import (
    CancelJobs,
    CloseText,
    Decode,
    Decoded,
    EncodeChat,
    Encoded,
    EncodeText,
    FromTokenizer,
    JobRefused,
    OpenText,
    TextDeltas,
    TextStep,
    ToTokenizer,
    UnknownStreams,
    WireChatMessage,
    WireToolCall,
    from_tokenizer_decoder,
    to_tokenizer_decoder,
)

__all__ = [
    "ENGINE_BEAT_INTERVAL_S",
    "ENGINE_LEASE_S",
    "GATEWAY_BEAT_INTERVAL_S",
    "GATEWAY_LEASE_S",
    "NO_BUDGET",
    "NO_STOP_TOKEN",
    "PROTOCOL_VERSION",
    "Abort",
    "Accepted",
    "CancelJobs",
    "CloseText",
    "Decode",
    "Decoded",
    "EncodeChat",
    "EncodeText",
    "Encoded",
    "EngineBeat",
    "EngineCounters",
    "EngineWelcome",
    "FinishAccounting",
    "FinishCode",
    "FromEngine",
    "FromTokenizer",
    "GatewayBeat",
    "Hello",
    "HelloNeeded",
    "HelloRefused",
    "JobRefused",
    "Message",
    "OpenText",
    "Refused",
    "StepOutput",
    "Submit",
    "TextDeltas",
    "TextStep",
    "ToEngine",
    "ToTokenizer",
    "TokenizerWelcome",
    "UnknownStreams",
    "WireChatMessage",
    "WireToolCall",
    "encode",
    "from_engine_decoder",
    "from_tokenizer_decoder",
    "to_engine_decoder",
    "to_tokenizer_decoder",
]
