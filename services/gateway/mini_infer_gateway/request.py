"""A checked request, as the gateway works with it: no protobuf from here on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from mini_infer.messages import NO_BUDGET, EncodeChat, EncodeText
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer.sampling_params import SamplingParams

ANONYMOUS = ""
"""The principal of every request: clients are not told apart."""

TIMEOUT_ROUNDING = 0.01
"""By how much of itself a timeout is rounded up at most, on its way from client to server."""


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
class TextOptions:
    """How ids become text. `ids_only` asks for stop strings without text."""

    stop: tuple[str, ...]
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    min_tokens: int
    ids_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One Generate call.

    Attributes:
        request_id: The client's, or one that the gateway made.
        prompt: What to continue.
        params: Sampling and stopping.
        ids_only: Deliver no text.
        stream_interval: Tokens per message at least, except at the end of a choice.
        priority: Its scheduling class; lower ones run first.
        cache_salt: Only requests with the same one share cached prefixes with it.
    """

    request_id: str
    prompt: TextPrompt | ChatPrompt | TokenPrompt
    params: SamplingParams
    ids_only: bool
    stream_interval: int
    priority: int
    cache_salt: str

    def text_options(self, min_tokens: int) -> TextOptions | None:
        """How its ids become text; None where they need not.

        Args:
            min_tokens: Stop strings count only behind so many tokens.
        """
        params = self.params
        if self.ids_only and not params.stop:
            return None
        return TextOptions(
            stop=params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=min_tokens,
            ids_only=self.ids_only,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRequest:
    """What the choices of a call share from the encoding of its prompt on.

    Attributes:
        prompt_ids: The prompt.
        sampling: Sampling and stopping of choice 0; `of_choice` gives those of the others.
        num_choices: At least 1.
        text_options: How the ids become text; None where they need not.
        stream_interval: Tokens per message at least, except at the end of a choice.
        priority: Its scheduling class; lower ones run first.
        cache_salt: Only requests with the same one share cached prefixes with it.
        deadline: On the loop's clock, in seconds; None where there is none.
    """

    prompt_ids: list[int]
    sampling: ResolvedSampling
    num_choices: int
    text_options: TextOptions | None
    stream_interval: int
    priority: int
    cache_salt: str
    deadline: float | None

    def budget_ms(self) -> int:
        """Milliseconds until the deadline, at least 0, or `NO_BUDGET`."""
        if self.deadline is None:
            return NO_BUDGET
        return max(0, math.floor((self.deadline - asyncio.get_running_loop().time()) * 1000))
