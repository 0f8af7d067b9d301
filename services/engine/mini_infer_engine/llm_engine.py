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
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from mini_infer.chats import ChatMessage, ChatOptions, read_chat
from mini_infer.config import EngineConfig
from mini_infer.errors import FieldViolation, InvalidRequestError
from mini_infer.hub import with_local_model
from mini_infer.resolved_sampling import MAX_SEED
from mini_infer.sampling_params import SamplingParams, within_vocabulary
from mini_infer.scheduling_params import scheduling_violations
from mini_infer_tokenizer.bad_words import bad_word_sequences
from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.detokenize import Detokenizer, TextStream
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar_checks import GrammarChecks

from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.generation import Generation, GenerationOutput
from mini_infer_engine.loader import Progress
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.pipeline import StepPipeline
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_updates import SequenceUpdate

_STALLED_WAIT_S = 1e-3
"""Between looks at sequences whose languages are being compiled, with nothing else to run."""


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
        self._grammar_checks = GrammarChecks(self.config.model_folder, num_processes=1)
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
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
        **options: Any,
    ) -> list[GenerationOutput]:
        """Continues prompts, all together.

        Args:
            prompts: Texts or lists of token ids.
            params: How to sample and when to stop: for all prompts, or one for each.
            add_special_tokens: Whether texts get the model's special tokens, such as BOS.
            priority: Scheduling class, lower ones run first: for all prompts, or one for each.
            cache_salt: Prefixes are shared only between prompts of the same salt.
            **options: Fields of `SamplingParams`, in place of `params`.

        Returns:
            An output per prompt and choice (`SamplingParams.n`), in their order.

        Raises:
            InvalidRequestError: Where parameters or a prompt are out of range.
            MiniInferError: CONTEXT_LENGTH_EXCEEDED or KV_EXHAUSTED where a prompt cannot fit,
                GRAMMAR_INVALID where a structured output's language cannot be used.
        """
        texts_or_ids = [prompts] if isinstance(prompts, str) else prompts
        encoded = [
            self._tokenizer.encode(each, add_special_tokens)
            if isinstance(each, str)
            else _checked_ids(each, index)
            for index, each in enumerate(texts_or_ids)
        ]
        return self._generate(
            encoded, _one_each(params, options, len(encoded)), priority, cache_salt
        )

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
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
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
            priority: As `generate`, one for each conversation.
            cache_salt: As `generate`.
            **options: Fields of `SamplingParams`, in place of `params`.

        Returns:
            An output per conversation and choice, in their order.

        Raises:
            ModelFolderError: Where the model's chat templates cannot be compiled.
            InvalidRequestError: Where a conversation or an option is of a wrong type.
            MiniInferError: CHAT_TEMPLATE_FAILED where the template fails, INVALID_FIELD where it
                does not take what it is given, or as `generate`.
        """
        chat_options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            template_kwargs=template_kwargs,
            chat_template=chat_template,
        )
        chats = [read_chat(each, chat_options) for each in _several(conversations)]
        _ = self._engine  # Says where it is closed what `generate` says.
        self._chat_templates.start()
        rendered = [self._chat_templates.render(each) for each in chats]
        encoded = [self._tokenizer.encode(each, False) for each in rendered]
        return self._generate(
            encoded, _one_each(params, options, len(encoded)), priority, cache_salt
        )

    def close(self) -> None:
        """Frees the model and its cache; the engine is not usable after. Once is enough."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
        self._free()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        self._chat_templates.close()
        self._grammar_checks.close()

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
        self,
        encoded: Sequence[list[int]],
        params: Sequence[SamplingParams],
        priority: int | Sequence[int],
        cache_salt: str,
    ) -> list[GenerationOutput]:
        is_list = isinstance(priority, Sequence) and not isinstance(priority, str)
        priorities: Any = priority if is_list else [priority] * len(encoded)
        if len(priorities) != len(encoded):
            raise ValueError(f"expected {len(encoded)} priorities, got {len(priorities)}")
        for each in priorities:
            if violations := scheduling_violations(each, cache_salt):
                raise InvalidRequestError(violations)
        groups = [
            self._begin(prompt_ids, params[index], index, priorities[index], cache_salt)
            for index, prompt_ids in enumerate(encoded)
        ]
        try:
            self._run(groups)
        except BaseException:
            # Ctrl-C can come at any instruction, so nothing of the queues is kept.
            self._loaded = self._engine.with_empty_queues()
            raise
        return [generation.output for group in groups for generation in group]

    def _run(self, groups: Sequence[Sequence[Generation]]) -> None:
        engine = self._engine
        scheduler = engine.scheduler
        pipeline = StepPipeline(scheduler, engine.runner, engine.served.fill_masks)
        running = {each.sequence.key: each for group in groups for each in group}
        unsent = deque([each.sequence for each in group] for group in groups)
        updates: Iterable[SequenceUpdate] = ()
        while running or not pipeline.is_idle:
            while unsent and scheduler.has_room(unsent[0]):
                scheduler.add(*unsent.popleft(), now=time.monotonic())
            step = pipeline.launch()
            self._receive(updates, running)  # while the device is at this step
            updates = pipeline.finish(step).updates
            if not pipeline.is_under_way:
                self._receive(updates, running)
                updates = ()
            if step.batch.is_empty:
                time.sleep(_STALLED_WAIT_S)

    def _receive(
        self, updates: Iterable[SequenceUpdate], running: dict[StreamKey, Generation]
    ) -> None:
        """Takes in what a step did; a stop string is seen here alone, and ends its sequence."""
        for update in updates:
            generation = running.get(update.key)
            if generation is None:  # its stop string was in the step before
                continue
            generation.receive(update)
            if generation.output.finish_reason:
                self._engine.scheduler.abort(update.key, time.monotonic())
                del running[update.key]

    def _begin(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        index: int,
        priority: int,
        cache_salt: str,
    ) -> list[Generation]:
        """The choices of a prompt."""
        served = self._engine.served
        self._check(prompt_ids, params, index)
        sampling = params.resolve(
            served.defaults,
            num_prompt_tokens=len(prompt_ids),
            max_model_len=served.max_model_len,
            seed=secrets.randbelow(MAX_SEED + 1),
            bad_words=within_vocabulary(
                bad_word_sequences(self._tokenizer, params.bad_words), served.config.vocab_size
            ),
        )
        if sampling.grammar is not None:
            self._grammar_checks.check(sampling.grammar)
        keys = [StreamKey(b"", self._next_stream + choice) for choice in range(params.n)]
        self._next_stream += params.n
        scope = ("", cache_salt)
        sequences = served.sequences(
            keys, prompt_ids, sampling, priority=priority, cache_scope=scope
        )
        return [
            Generation(
                sequence,
                self._open_text(params),
                params.stop_strings,
                GenerationOutput(
                    prompt_token_ids=prompt_ids,
                    choice_index=choice,
                    seed=sequence.sampling.seed,
                ),
            )
            for choice, sequence in enumerate(sequences)
        ]

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams, index: int) -> None:
        vocab_size = self._engine.served.config.vocab_size
        violations = params.violations(vocab_size)
        field = f"prompts[{index}]"
        if not prompt_ids:
            violations.append(FieldViolation(field, "expected at least one token, got none"))
        elif min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            expected = f"expected token ids from 0 to {vocab_size - 1}"
            violations.append(FieldViolation(field, expected))
        if violations:
            raise InvalidRequestError(violations)

    def _open_text(self, params: SamplingParams) -> TextStream:
        return self._detokenizer.open(
            stop=params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )


def _several(conversations: Any) -> Any:
    """A list of conversations, also where there is one."""
    is_one = not isinstance(conversations, Sequence)  # which `read_chat` refuses
    if is_one or (conversations and isinstance(conversations[0], Mapping)):
        return [conversations]
    return conversations


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
