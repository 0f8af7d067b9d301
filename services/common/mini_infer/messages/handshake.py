"""How a gateway and its peers get to know each other, and stay in touch."""

from __future__ import annotations

from mini_infer.messages.base import Message
from mini_infer.resolved_sampling import GenerationDefaults

PROTOCOL_VERSION = 1

GATEWAY_BEAT_INTERVAL_S = 1.0
GATEWAY_LEASE_S = 3.0
ENGINE_BEAT_INTERVAL_S = 0.5
ENGINE_LEASE_S = 5.0
"""An engine is lost after max(this, 4 x its announced step) without a message."""


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
        tokenizer_hash: SHA-256 of the tokenizer's files.
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
