"""What a request needs of the tokenizer before the engine can have it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from mini_infer.errors import (
    ErrorReason,
    FieldViolation,
    InvalidRequestError,
    MiniInferError,
)
from mini_infer.sampling_params import within_vocabulary
from mini_infer.structured_output import StructuredOutput

from mini_infer_gateway.request import GenerationRequest, TextPrompt, TokenPrompt
from mini_infer_gateway.tokenizer_link import TokenizerLink


@dataclass(frozen=True, slots=True)
class Encoding:
    """A request's texts in ids.

    Attributes:
        prompt_ids: The prompt, at least one id.
        bad_words: The lists of ids that stand for the bad words.
    """

    prompt_ids: list[int]
    bad_words: list[list[int]]


async def encode_request(
    request: GenerationRequest, tokenizer: TokenizerLink, vocab_size: int
) -> Encoding:
    """Has prompt and bad words encoded and the language of the output vetted, side by side.

    Args:
        request: What to encode.
        tokenizer: Where.
        vocab_size: Ids of the model; the tokenizer may know more.

    Raises:
        MiniInferError: The first refusal of any of them, or TOKENIZER_LOST.
        InvalidRequestError: Where the prompt is no text of the model's tokens.
    """
    jobs: list[Coroutine[Any, Any, Any]] = [
        _encode_prompt(request, tokenizer, vocab_size),
        _encode_bad_words(request, tokenizer, vocab_size),
    ]
    if request.params.structured_output is not None:
        jobs.append(_check_grammar(request.params.structured_output, tokenizer))
    prompt_ids, bad_words, *_ = await _all_of(jobs)
    return Encoding(prompt_ids, bad_words)


async def _all_of(jobs: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _encode_prompt(
    request: GenerationRequest, tokenizer: TokenizerLink, vocab_size: int
) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, TokenPrompt):
        return prompt.token_ids
    token_ids = await tokenizer.encode(prompt)
    if token_ids and max(token_ids) < vocab_size:
        return token_ids
    problem = "expected at least 1 token, got none"
    if token_ids:
        problem = (
            f"expected a text of tokens that the model knows (ids from 0 to {vocab_size - 1}), "
            f"got one of id {max(token_ids)}"
        )
    field = "text" if isinstance(prompt, TextPrompt) else "chat"
    raise InvalidRequestError([FieldViolation(field, problem)])


async def _check_grammar(structured: StructuredOutput, tokenizer: TokenizerLink) -> None:
    grammar = structured.as_grammar()
    try:
        await tokenizer.check_grammar(grammar)
    except MiniInferError as error:
        if error.reason is not ErrorReason.GRAMMAR_INVALID:
            raise
        field = f"structured_output.{grammar.kind.value}"
        violation = FieldViolation(field, error.message, error.reason)
        raise InvalidRequestError([violation]) from None


async def _encode_bad_words(
    request: GenerationRequest, tokenizer: TokenizerLink, vocab_size: int
) -> list[list[int]]:
    if not request.params.bad_words:
        return []
    sequences = await tokenizer.encode_words(list(request.params.bad_words))
    return within_vocabulary(sequences, vocab_size)
