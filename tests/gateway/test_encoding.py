"""Prompt, bad words and language of a request, which the tokenizer is asked about at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from gateway.harness import RunningGateway, failure, until_idle
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine, StandInTokenizer
from mini_infer.errors import ErrorReason
from mini_infer.messages import (
    CancelJobs,
    CheckGrammar,
    Encoded,
    EncodedWords,
    EncodeText,
    EncodeWords,
    FinishCode,
    GrammarAccepted,
    HelloNeeded,
    JobRefused,
    Submit,
)
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_gateway.tokenizer_link import PATIENCE_S, TOKENIZER_LEASE_S

BUSY: Any = {"bad_words": ["fox", "moon"], "regex": "a*", "ids_only": True}


async def jobs_of(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> tuple[asyncio.Task[str], EncodeText, EncodeWords, CheckGrammar]:
    """A request that has something of each kind to ask: its reading task and its jobs."""
    reading = asyncio.create_task(faked.client.generate("hello", **BUSY).text())
    text, words = await tokenizer.next(EncodeText), await tokenizer.next(EncodeWords)
    return reading, text, words, await tokenizer.next(CheckGrammar)


async def finish(engine: StandInEngine, reading: asyncio.Task[str]) -> Submit:
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
    await reading
    return submit


async def test_jobs_are_asked_side_by_side_and_answered_in_any_order(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    reading, text, words, check = await jobs_of(faked, tokenizer)
    assert (text.text, words.words) == ("hello", ["fox", "moon"])
    assert check.grammar == Grammar(GrammarKind.REGEX, "a*")
    await tokenizer.send(GrammarAccepted(check.job))
    await tokenizer.send(EncodedWords(words.job, [[7], [8, 9], [10]]))
    await tokenizer.send(Encoded(text.job, [1, 2]))
    submit = await finish(engine, reading)
    assert submit.prompt_ids == [1, 2]
    assert submit.sampling.bad_words == [[7], [8, 9], [10]]
    assert submit.sampling.grammar == check.grammar


async def test_only_what_is_there_is_asked(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    reading = asyncio.create_task(faked.client.generate([5], ids_only=True).text())
    submit = await finish(engine, reading)
    assert (submit.sampling.bad_words, submit.sampling.grammar) == ([], None)
    kinds = {type(each) for each in tokenizer.received}
    assert not kinds & {EncodeText, EncodeWords, CheckGrammar}


async def test_words_that_the_model_cannot_write_are_left_out(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    """The tokenizer may have tokens that the model never learned."""
    reading = asyncio.create_task(faked.client.generate([5], bad_words=["x"], ids_only=True).text())
    job = (await tokenizer.next(EncodeWords)).job
    last = ENGINE_WELCOME.vocab_size - 1
    await tokenizer.send(EncodedWords(job, [[1, last], [1, last + 1], [last + 1]]))
    assert (await finish(engine, reading)).sampling.bad_words == [[1, last]]


@pytest.mark.parametrize("refused", ["text", "words", "grammar"])
async def test_first_refusal_ends_the_call_and_cancels_the_other_jobs(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer, refused: str
) -> None:
    reading, text, words, check = await jobs_of(faked, tokenizer)
    jobs = {"text": text.job, "words": words.job, "grammar": check.job}
    job = jobs.pop(refused)
    await tokenizer.send(JobRefused(job, ErrorReason.GRAMMAR_INVALID, f"bad {refused}"))
    await asyncio.wait([reading])
    error = failure(reading)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason is ErrorReason.GRAMMAR_INVALID
    assert error.message.endswith(f"bad {refused}")
    cancelled = {number for _ in jobs for number in (await tokenizer.next(CancelJobs)).jobs}
    assert cancelled == set(jobs.values())
    await until_idle(faked)
    assert not [each for each in engine.received if isinstance(each, Submit)]


async def test_cancelled_call_cancels_its_jobs(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    stream = faked.client.generate("hello", **BUSY)
    reading = asyncio.create_task(stream.text())
    jobs = {(await tokenizer.next(kind)).job for kind in (EncodeText, EncodeWords, CheckGrammar)}
    stream.cancel()
    cancelled = {number for _ in jobs for number in (await tokenizer.next(CancelJobs)).jobs}
    assert cancelled == jobs
    await asyncio.wait([reading])
    await until_idle(faked)


async def test_jobs_are_given_again_to_a_tokenizer_that_forgot_them(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    reading, *jobs = await jobs_of(faked, tokenizer)
    await tokenizer.send(HelloNeeded())
    text, words = await tokenizer.next(EncodeText), await tokenizer.next(EncodeWords)
    assert [text, words, await tokenizer.next(CheckGrammar)] == jobs
    await tokenizer.send(Encoded(text.job, [1]))
    await tokenizer.send(EncodedWords(words.job, [[7]]))
    await tokenizer.send(GrammarAccepted(jobs[-1].job))
    assert (await finish(engine, reading)).sampling.bad_words == [[7]]


async def test_tokenizer_that_is_lost_while_it_vets_ends_the_call(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    reading = asyncio.create_task(faked.client.generate([5], json_object=True).text())
    await tokenizer.next(CheckGrammar)
    tokenizer.welcome = None
    link, now = faked.tokenizer_link, asyncio.get_running_loop().time()
    link.tick(now + TOKENIZER_LEASE_S + 1)
    link.tick(now + PATIENCE_S + 1)
    await asyncio.wait([reading])
    assert failure(reading).code is grpc.StatusCode.UNAVAILABLE
    assert failure(reading).reason is ErrorReason.TOKENIZER_LOST
    await until_idle(faked)


async def test_answer_of_another_kind_is_an_error_of_the_server(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    reading = asyncio.create_task(faked.client.generate([5], regex="a").text())
    await tokenizer.send(Encoded((await tokenizer.next(CheckGrammar)).job, [1]))
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.INTERNAL_ERROR


async def test_language_is_vetted_before_the_engine_sees_it(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    def generate() -> asyncio.Task[str]:
        return asyncio.create_task(faked.client.generate([5], ids_only=True, regex="a").text())

    reading = generate()
    check = await tokenizer.next(CheckGrammar)
    assert check.grammar == Grammar(GrammarKind.REGEX, "a")
    await tokenizer.send(JobRefused(check.job, ErrorReason.GRAMMAR_INVALID, "no"))
    await asyncio.wait([reading])
    (violation,) = failure(reading).violations
    assert violation.field == "structured_output.regex"
    assert violation.reason is ErrorReason.GRAMMAR_INVALID
    assert violation.description == "no"
    reading = generate()
    await tokenizer.send(GrammarAccepted((await tokenizer.next(CheckGrammar)).job))
    assert (await finish(engine, reading)).sampling.grammar == check.grammar
