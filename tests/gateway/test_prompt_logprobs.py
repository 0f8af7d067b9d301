"""Log-probabilities of prompts on their way to the client: before its output, whole, in order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gateway.harness import (
    RunningGateway,
    StartGateway,
    encoded_request,
    failure,
    generate,
    thoughts,
    until_idle,
)
from gateway.stand_ins import ENGINE_WELCOME, Row, StandInEngine
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import Abort, FinishCode, Submit
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer_gateway.choices import Choices, max_pending_tokens
from mini_infer_gateway.mailbox import MAX_PENDING_TOKENS

NUM_TOP = 2
PROMPT = list(range(100, 120))


async def asked_prompt(
    served: RunningGateway, engine: StandInEngine, **options: Any
) -> tuple[Any, asyncio.Task[str], Submit]:
    """A request for the log-probabilities of `PROMPT`."""
    options = {"prompt_logprobs": NUM_TOP, "ids_only": True, **options}
    stream = served.client.generate(PROMPT, **options)
    reading = asyncio.create_task(stream.text())
    return stream, reading, await engine.next(Submit)


def of_prompt(start: int, stop: int) -> LogprobColumns:
    return thoughts(start, PROMPT[start:stop], NUM_TOP)


async def test_those_of_the_prompt_come_before_the_first_delta(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    """Of choice 0; in events of at most 512 tokens, the first of which begins the stream."""
    welcome = msgspec.structs.replace(ENGINE_WELCOME, max_model_len=4096)
    engine = StandInEngine(f"ipc://{folder}/engine", welcome)
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address)
    prompt = list(range(1, 1301))
    calling = asyncio.create_task(
        generate(
            served,
            token_ids=pb2.TokenIds(ids=prompt),
            request_id="mine",
            sampling=pb2.SamplingOptions(n=2),
            output=pb2.OutputOptions(ids_only=True, prompt_logprobs=NUM_TOP),
        )
    )
    submit = await engine.next(Submit)
    await engine.tell_prompt(submit.stream, 1, thoughts(1, prompt[1:1200], NUM_TOP))
    await engine.tell_prompt(submit.stream, 1200, thoughts(1200, prompt[1200:], NUM_TOP))
    await engine.step_of_rows(
        Row(submit.siblings[0], 0, [8], FinishCode.LENGTH),
        Row(submit.stream, 0, [9], FinishCode.LENGTH),
    )
    messages, _ = await calling
    await engine.close()
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert (messages[0].request_id, messages[0].num_prompt_tokens) == ("mine", len(prompt))
    of_choice_0 = [message for message in messages[:-1] if message.choice_index == 0]
    *told, delta, _ = of_choice_0
    assert delta.WhichOneof("event") == "delta"
    sizes = [len(message.prompt_logprobs.tokens) for message in told]
    assert sizes == [512, 512, 175, 100]
    assert [message.prompt_logprobs.start for message in told] == [1, 513, 1025, 1200]
    expected = thoughts(1, prompt[1:], NUM_TOP).tokens()
    tokens = [token for message in told for token in message.prompt_logprobs.tokens]
    assert [(each.logprob, each.rank) for each in tokens] == [
        (each.logprob, each.rank) for each in expected
    ]
    assert [[(top.token_id, top.logprob) for top in each.top] for each in tokens] == [
        [tuple(top) for top in each.top] for each in expected
    ]


async def test_those_of_the_prompt_are_delivered_as_they_come(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine, stream_interval=100)
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 4))
    while len(stream.prompt_logprobs) < 3:
        await asyncio.sleep(0.005)
    assert stream.request_id is not None
    await engine.tell_prompt(submit.stream, 4, of_prompt(4, 20))
    await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
    await reading
    assert stream.prompt_logprobs == of_prompt(1, 20).tokens()


async def test_prompt_of_one_token_has_none(served: RunningGateway, engine: StandInEngine) -> None:
    stream = served.client.generate([5], prompt_logprobs=NUM_TOP, ids_only=True)
    reading = asyncio.create_task(stream.text())
    await engine.step((await engine.next(Submit)).stream, 0, [6], FinishCode.LENGTH)
    await reading
    assert (stream.prompt_logprobs, stream.token_ids) == ([], [6])


async def test_repeated_ones_of_the_prompt_are_cut(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine)
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 10))
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 6))
    await engine.tell_prompt(submit.stream, 4, of_prompt(4, 20))
    await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
    await reading
    assert stream.prompt_logprobs == of_prompt(1, 20).tokens()
    assert served.engine_link.dropped["repeated_logprobs"] == 2


@pytest.mark.parametrize(
    ("start", "logprobs"),
    [
        pytest.param(2, of_prompt(2, 20), id="gap"),
        pytest.param(0, of_prompt(0, 20), id="first token"),
        pytest.param(-1, of_prompt(1, 20), id="negative"),
        pytest.param(1, thoughts(1, [7] * 20, NUM_TOP), id="beyond the prompt"),
        pytest.param(1, thoughts(1, PROMPT[1:], NUM_TOP + 1), id="another number"),
        pytest.param(1, LogprobColumns(NUM_TOP, b"1234", b"", b"", b""), id="inconsistent"),
    ],
)
async def test_stream_whose_prompt_is_told_wrongly_is_lost(
    served: RunningGateway, engine: StandInEngine, start: int, logprobs: LogprobColumns
) -> None:
    _, reading, submit = await asked_prompt(served, engine)
    await engine.tell_prompt(submit.stream, start, logprobs)
    assert await engine.next(Abort) == Abort([submit.stream])
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST
    assert served.engine_link.dropped["lost_logprobs"] == 1
    await until_idle(served)


async def test_output_before_the_last_of_the_prompt_loses_the_stream(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine)
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 19))
    await engine.step(submit.stream, 0, [5])
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST
    assert stream.prompt_logprobs == of_prompt(1, 19).tokens()
    assert stream.token_ids == []


async def test_stream_may_end_before_the_last_of_the_prompt(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine, request_id="mine")
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 4))
    await served.client.abort("mine")
    await engine.step(submit.stream, 0, [], FinishCode.ABORTED)
    await reading
    assert stream.finish_reason == "aborted"
    assert stream.prompt_logprobs == of_prompt(1, 4).tokens()


async def test_prompts_of_unknown_streams_and_old_epochs_are_counted(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine)
    await engine.tell_prompt(777, 1, of_prompt(1, 20))
    await engine.tell_prompt(submit.stream, 5, of_prompt(5, 20), epoch=0)
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 20))
    await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
    await reading
    assert stream.prompt_logprobs == of_prompt(1, 20).tokens()
    assert served.engine_link.dropped["unknown_stream"] == 1
    assert served.engine_link.dropped["old_epoch"] == 1


async def test_other_choices_are_told_nothing_of_the_prompt(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, submit = await asked_prompt(served, engine, n=2)
    await engine.tell_prompt(submit.siblings[0], 1, of_prompt(1, 20))
    await engine.tell_prompt(submit.stream, 1, of_prompt(1, 20))
    ends = [Row(each, 0, [5], FinishCode.LENGTH) for each in (submit.stream, *submit.siblings)]
    await engine.step_of_rows(*ends)
    await reading
    assert stream.prompt_logprobs == of_prompt(1, 20).tokens()


def test_whole_prompt_may_wait_for_the_client() -> None:
    """And as much output as ever behind it, but no more."""
    prompt_ids = [5] * (2 * MAX_PENDING_TOKENS)
    sampling = ResolvedSampling(0.0, 0, 1.0, 0, 64, num_prompt_logprobs=0)
    request = encoded_request(prompt_ids=prompt_ids, sampling=sampling)
    nobody: Any = None  # What waits is put in by hand.
    mailbox = Choices(request, engine=nobody, text=nobody, next_number=lambda: 1).mailbox
    mailbox.put_prompt(0, 1, thoughts(1, prompt_ids[1:], 0))
    mailbox.put(0, "", [5] * (MAX_PENDING_TOKENS + 1))
    with pytest.raises(MiniInferError) as caught:
        mailbox.put(0, "", [5])
    assert caught.value.reason is ErrorReason.SLOW_CONSUMER
    assert max_pending_tokens(encoded_request(prompt_ids=prompt_ids)) == MAX_PENDING_TOKENS
