"""A checked request, as the gateway works with it: no protobuf from here on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from mini_infer.messages import EncodeChat, EncodeText
from mini_infer.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt that the tokenizer encodes.

    Attributes:
        text: The prompt.
        add_special_tokens: Whether the model's special tokens are added.
    """

    text: str
    add_special_tokens: bool

    def as_job(self, job: int) -> EncodeText:
        """The job that encodes it."""
        return EncodeText(job, self.text, self.add_special_tokens)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that the tokenizer renders and encodes."""

    chat: EncodeChat

    def as_job(self, job: int) -> EncodeChat:
        """The job that encodes it."""
        return msgspec.structs.replace(self.chat, job=job)

    def texts(self) -> Iterator[str]:
        """Every text that the client sent."""
        for message in self.chat.messages:
            yield message.role
            for text in (
                message.content,
                message.name,
                message.tool_call_id,
                message.reasoning_content,
            ):
                yield text or ""
            for call in message.tool_calls:
                yield from (call.name, call.arguments, call.id or "")
        yield from self.chat.tools
        yield from self.chat.documents
        yield from (self.chat.template_kwargs, self.chat.chat_template)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is encoded already."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One Generate call.

    Attributes:
        request_id: The client's, or one that the gateway made.
        prompt: What to continue.
        params: Sampling and stopping.
        ids_only: Deliver no text.
        stream_interval: Tokens per message at least, except at the end.
    """

    request_id: str
    prompt: TextPrompt | ChatPrompt | TokenPrompt
    params: SamplingParams
    ids_only: bool
    stream_interval: int
