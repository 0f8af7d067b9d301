"""The engine in the caller's process: the service's parts without its sockets.

from mini_infer import EngineConfig, LLMEngine

with LLMEngine(EngineConfig(max_num_seqs=64, block_size=16)) as engine:
for output in engine.generate(["Once upon a time", "The fox"], max_tokens=100):
print(output.text)
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from mini_infer.chats import ChatMessage, ChatOptions, read_chat
from mini_infer.config import EngineConfig
from mini_infer.errors import (
    FieldViolation,
    InvalidRequestError,
    MiniInferError,
)
from mini_infer.hub import with_local_model
from mini_infer.messages import FinishCode
from mini_infer.sampling_params import MAX_SEED, SamplingParams
from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.detokenize import NO_STOP, Detokenizer, TextStream
from mini_infer_tokenizer.encode import TextTokenizer

from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.loader import Progress
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.scheduler import SequenceUpdate
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.sequence import StreamKey

FinishReason = Literal["stop", "length", "error"]
_FINISH_REASONS: Mapping[FinishCode, FinishReason] = {
    FinishCode.STOP_TOKEN: "stop",
    FinishCode.LENGTH: "length",
}


@dataclass(slots=True, kw_only=True)
class GenerationOutput:
    """What became of one prompt.

    Attributes:
        prompt_token_ids: The encoded prompt.
        token_ids: The output's ids, an end-of-sequence id included.
        text: Their text, cut at a stop string.
        finish_reason: "stop" (end of sequence, stop id or stop string), "length" or "error".
        stop_string: The stop string that ended it, if one did.
        stop_token_id: The id that ended it, if one did.
        seed: What the random numbers were keyed with.
        error: Why this prompt alone failed; the text so far is kept.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    seed: int = 0
    error: MiniInferError | None = None


@dataclass(slots=True)
class _Generation:
    """A prompt under way: its sequence in the scheduler, its text, and what came so far."""

    sequence: EngineSequence
    text: TextStream
    stop: Sequence[str]
    output: GenerationOutput
    pending_ids: deque[int] = field(default_factory=deque)

    def receive(self, update: SequenceUpdate) -> None:
        """Takes in what a step did; `output.finish_reason` is set at the end."""
        output = self.output
        self.pending_ids.extend(update.token_ids)
        last = update.finish_code is not FinishCode.RUNNING or update.error is not None
        delta = self.text.read(update.token_ids, last)
        output.text += delta.text
        output.token_ids += [self.pending_ids.popleft() for _ in range(delta.num_ids)]
        if delta.stop_index != NO_STOP:
            output.stop_string = self.stop[delta.stop_index]
            output.finish_reason = "stop"
        elif update.error:
            output.error = update.error
            output.finish_reason = "error"
        elif last:
            output.finish_reason = _FINISH_REASONS[update.finish_code]
            if update.finish_code is FinishCode.STOP_TOKEN:
                output.stop_token_id = update.stop_token_id


class LLMEngine:
    """Generates text in this process, many prompts at a time. One thread at a time."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        on_progress: Progress | None = None,
        on_download: Progress | None = None,
    ) -> None:
        """Loads the model.

        Args:
            config: What to build; None is the demo model with all defaults.
            on_progress: Called with bytes loaded and bytes in all.
            on_download: Called likewise, while the weights of a Hub id are downloaded.

        Raises:
            ConfigError: Where model folder or device cannot do what was asked.
        """
        self.config = with_local_model(config or EngineConfig(), on_download, read_model_config)
        self._tokenizer = TextTokenizer(self.config.model_folder)
        self._detokenizer = Detokenizer(self._tokenizer)
        self._chat_templates = ChatTemplates(
            self.config.model_folder, self._tokenizer.special_tokens
        )
        self._loaded: Engine | None = build_engine(
            self.config, on_progress, merge_decode_steps=True
        )
        # Recorded steps are never forgotten by torch, and refer to the weights.
        self._free = weakref.finalize(self, self._loaded.model.free)
        self._next_stream = 0

    @property
    def _engine(self) -> Engine:
        if self._loaded is None:
            raise RuntimeError("this LLMEngine is closed: make a new one")
        return self._loaded

    @property
    def num_steps(self) -> int:
        """Steps that ran the model, so far."""
        return self._engine.scheduler.num_steps

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> list[GenerationOutput]:
        """Continues prompts, all together.

        Args:
            prompts: Texts or lists of token ids.
            params: How to sample and when to stop: for all prompts, or one for each.
            add_special_tokens: Whether texts get the model's special tokens, such as BOS.
            **options: Fields of `SamplingParams`, in place of `params`.

        Returns:
            An output per prompt, in their order.

        Raises:
            InvalidRequestError: Where parameters or a prompt are out of range.
            MiniInferError: CONTEXT_LENGTH_EXCEEDED or KV_EXHAUSTED where a prompt cannot fit.
        """
        texts_or_ids = [prompts] if isinstance(prompts, str) else prompts
        encoded = [
            self._tokenizer.encode(each, add_special_tokens)
            if isinstance(each, str)
            else _checked_ids(each, index)
            for index, each in enumerate(texts_or_ids)
        ]
        return self._generate(encoded, _one_each(params, options, len(encoded)))

    def chat(
        self,
        conversations: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> list[GenerationOutput]:
        """Answers conversations, all together; docs/chat.md tells how they become prompts.

        Args:
            conversations: One list of messages with "role" and "content", or several such lists.
            params: How to sample and when to stop: for all, or one for each conversation.
            add_generation_prompt: Whether a prompt ends with the opening of the answer; None
                means it does, unless the final message is continued.
            continue_final_message: Whether a prompt ends with the content of its last message.
            tools: JSON schemas of functions that the model may call.
            documents: What the answers may rest on, such as {"title": ..., "text": ...}.
            template_kwargs: More variables for the template, such as {"enable_thinking": False}.
            chat_template: Name of the template, where the model has several.
            **options: Fields of `SamplingParams`, in place of `params`.

        Returns:
            An output per conversation, in their order.

        Raises:
            ModelFolderError: Where the model's chat templates cannot be compiled.
            InvalidRequestError: Where a conversation or an option is of a wrong type.
            MiniInferError: CHAT_TEMPLATE_FAILED where the template fails, INVALID_FIELD where it
                does not take what it is given, or as `generate`.
        """
        several: Any = conversations
        is_one = not isinstance(several, Sequence)  # which `read_chat` refuses
        if is_one or (several and isinstance(several[0], Mapping)):
            several = [conversations]
        chat_options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            template_kwargs=template_kwargs,
            chat_template=chat_template,
        )
        chats = [read_chat(each, chat_options) for each in several]
        _ = self._engine  # Says where it is closed what `generate` says.
        self._chat_templates.start()
        rendered = [self._chat_templates.render(each) for each in chats]
        encoded = [self._tokenizer.encode(each, False) for each in rendered]
        return self._generate(encoded, _one_each(params, options, len(encoded)))

    def close(self) -> None:
        """Frees the model and its cache; the engine is not usable after. Once is enough."""
        self._loaded = None
        self._free()
        self._chat_templates.close()

    def __enter__(self) -> LLMEngine:
        """The engine itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the engine."""
        self.close()

    def _generate(
        self, encoded: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[GenerationOutput]:
        generations = [
            self._begin(prompt_ids, params[index], index)
            for index, prompt_ids in enumerate(encoded)
        ]
        try:
            self._run(generations)
        except BaseException:
            # Ctrl-C can come at any instruction, so nothing of the queues is kept.
            self._loaded = self._engine.with_empty_queues()
            raise
        return [generation.output for generation in generations]

    def _run(self, generations: Sequence[_Generation]) -> None:
        scheduler, runner = self._engine.scheduler, self._engine.runner
        running = {generation.sequence.key: generation for generation in generations}
        unsent = deque(generations)
        while running:
            while unsent and scheduler.num_waiting < self.config.max_queued_requests:
                scheduler.add(unsent.popleft().sequence)
            batch = scheduler.schedule(time.monotonic())
            tokens = runner.run(batch)
            for update in scheduler.finish_step(batch, tokens, time.monotonic()):
                generation = running[update.key]
                generation.receive(update)
                if generation.output.finish_reason:
                    scheduler.abort(update.key)  # a stop string is seen here alone
                    del running[update.key]

    def _begin(self, prompt_ids: list[int], params: SamplingParams, index: int) -> _Generation:
        served = self._engine.served
        vocab_size = served.config.vocab_size
        violations = params.violations(vocab_size)
        field = f"prompts[{index}]"
        if not prompt_ids:
            violations.append(FieldViolation(field, "expected at least one token, got none"))
        elif min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            expected = f"expected token ids from 0 to {vocab_size - 1}"
            violations.append(FieldViolation(field, expected))
        if violations:
            raise InvalidRequestError(violations)
        sampling = params.resolve(
            served.defaults,
            num_prompt_tokens=len(prompt_ids),
            max_model_len=served.max_model_len,
            seed=secrets.randbelow(MAX_SEED + 1),
        )
        self._next_stream += 1
        return _Generation(
            served.sequence(StreamKey(b"", self._next_stream), prompt_ids, sampling),
            self._detokenizer.open(
                stop=params.stop_strings,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            ),
            params.stop_strings,
            GenerationOutput(prompt_token_ids=prompt_ids, seed=sampling.seed),
        )


def _checked_ids(prompt: Any, index: int) -> list[int]:
    if isinstance(prompt, Sequence) and all(isinstance(each, int) for each in prompt):
        return list(prompt)
    expected = f"expected a text or a list of token ids, got {prompt!r:.80}"
    raise InvalidRequestError([FieldViolation(f"prompts[{index}]", expected)])


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None,
    options: Mapping[str, Any],
    num_prompts: int,
) -> Sequence[SamplingParams]:
    if params is not None and options:
        raise TypeError("give either params or its fields as keywords, not both")
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams(**options)] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"expected params for {num_prompts} prompts, got {len(params)}")
    return params
