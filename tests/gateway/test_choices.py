"""Calls with several choices: one stand-in engine, rows of the choices mixed as in a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway.harness import (
    RunningGateway,
    StartGateway,
    failure,
    generate,
    nobody_reads,
    until_idle,
)
from gateway.stand_ins import ACCOUNTING, Row, StandInEngine
from mini_infer.client import Usage
from mini_infer.errors import ErrorReason
from mini_infer.messages import Abort, FinishAccounting, FinishCode, HelloNeeded, Refused, Submit
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer_gateway.choices import call_accounting
from mini_infer_gateway.mailbox import Ending, EndReason

TEXTS = ("the fox ran to the river", "a bird", "moon and stars over the sea")


async def begin(
    served: RunningGateway, engine: StandInEngine, n: int = 3, **options: Any
) -> tuple[Any, asyncio.Task[str], list[int]]:
    """A request each of whose choices has its first token: stream, reading task, numbers."""
    stream = served.client.generate([5], n=n, **{"ids_only": True, **options})
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    numbers = [submit.stream, *submit.siblings]
    await engine.step_of_rows(*(Row(number, 0, [5]) for number in numbers))
    while not all(choice.token_ids for choice in stream.choices):
        await asyncio.sleep(0.005)
    return stream, reading, numbers


async def next_aborted(engine: StandInEngine, count: int) -> set[int]:
    """The streams of the next aborts that want no answer."""
    found = set()
    while len(found) < count:
        abort = await engine.next(Abort)
        assert not abort.answer
        found.update(abort.streams)
    return found


def interleaved(numbers: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[list[Row]]:
    """Steps that make one id of each output that has not ended, and end it with its last one."""
    return [
        [
            Row(
                number,
                position,
                [ids[position]],
                FinishCode.LENGTH if position == len(ids) - 1 else FinishCode.RUNNING,
            )
            for number, ids in zip(numbers, outputs, strict=True)
            if position < len(ids)
        ]
        for position in range(max(map(len, outputs)))
    ]


async def test_messages_of_the_choices(served: RunningGateway, engine: StandInEngine) -> None:
    outputs = [await served.client.tokenize(text, add_special_tokens=False) for text in TEXTS]
    calling = asyncio.create_task(
        generate(
            served,
            text="Once",
            request_id="mine",
            sampling=pb2.SamplingOptions(n=3, seed=2**64 - 2),
        )
    )
    submit = await engine.next(Submit)
    for rows in interleaved([submit.stream, *submit.siblings], outputs):
        await engine.step_of_rows(*rows)
        await asyncio.sleep(0.002)
    messages, _ = await calling
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert messages[0].request_id == "mine"
    assert messages[0].num_prompt_tokens == len(submit.prompt_ids)
    assert not any(message.HasField("request_id") for message in messages[1:])
    for index, (text, ids) in enumerate(zip(TEXTS, outputs, strict=True)):
        own = [message for message in messages[:-1] if message.choice_index == index]
        assert [message.WhichOneof("event") for message in own] == [
            *["delta"] * (len(own) - 1),
            "choice_finished",
        ]
        assert "".join(message.delta.text for message in own[:-1]) == text
        assert [each for message in own[:-1] for each in message.delta.token_ids] == ids
        assert own[-1].choice_finished.finish_reason == pb2.FINISH_REASON_LENGTH
        assert own[-1].choice_finished.num_output_tokens == len(ids)
    # No choice waited for another one to end.
    order = [message.choice_index for message in messages if message.HasField("delta")]
    assert order != sorted(order)
    assert messages[-1].finished == pb2.Finished(
        usage=pb2.Usage(
            num_prompt_tokens=len(submit.prompt_ids),
            num_output_tokens=sum(map(len, outputs)),
            num_cached_tokens=ACCOUNTING.num_cached_tokens,
        ),
        seed=2**64 - 2,
    )


async def test_each_choice_ends_by_itself(served: RunningGateway, engine: StandInEngine) -> None:
    fox = await served.client.tokenize(" the fox", add_special_tokens=False)
    bird = await served.client.tokenize(" a bird", add_special_tokens=False)
    stream = served.client.generate([5], n=3, stop="fox")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    first, second, third = submit.stream, *submit.siblings
    await engine.step_of_rows(
        Row(third, 0, bird, FinishCode.LENGTH),
        Row(first, 0, fox),
        Row(second, 0, [*bird, 2], FinishCode.STOP_TOKEN, stop_token_id=2),
    )
    assert await engine.next(Abort) == Abort([first], answer=True)
    await engine.step(first, len(fox), [], FinishCode.ABORTED)
    assert await reading == " the "
    ends = [(each.text, each.finish_reason, each.matched_stop) for each in stream.choices]
    assert ends == [
        (" the ", "stop", "fox"),
        (" a bird", "stop", 2),
        (" a bird", "length", None),
    ]
    assert stream.choices[1].token_ids == [*bird, 2]
    num_output_tokens = sum(len(choice.token_ids) for choice in stream.choices)
    assert stream.usage == Usage(1, num_output_tokens, ACCOUNTING.num_cached_tokens)
    await until_idle(served)


async def test_accounting_is_of_the_whole_call(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, numbers = await begin(served, engine)
    accountings = [
        FinishAccounting(1, 2, 30, 16, 1, 7),
        FinishAccounting(10, 20, 50, 32, 0, 5),
        FinishAccounting(11, 21, 40, 48, 2, 9),
    ]
    for index in (2, 0, 1):
        row = Row(numbers[index], 1, [6], FinishCode.LENGTH, accounting=accountings[index])
        await engine.step_of_rows(row)
    await reading
    assert stream.accounting == FinishAccounting(1, 2, 50, 16, 3, 9)
    assert stream.usage == Usage(1, 6, 16)


def test_accounting_that_is_not_whole_is_not_told() -> None:
    known = Ending(reason=EndReason.LENGTH, num_output_tokens=1, accounting=ACCOUNTING)
    unknown = Ending(reason=EndReason.STOP, num_output_tokens=1)
    assert call_accounting([known]) == ACCOUNTING
    assert call_accounting([known, unknown]) is None
    assert call_accounting([unknown]) is None


async def test_abort_ends_every_choice_that_runs(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, numbers = await begin(served, engine, request_id="mine", ids_only=False)
    await engine.step(numbers[1], 1, [6], FinishCode.LENGTH)
    while stream.choices[1].finish_reason is None:
        await asyncio.sleep(0.005)
    await served.client.abort("mine")
    for number in (numbers[0], numbers[2]):
        assert await engine.next(Abort) == Abort([number], answer=True)
        await engine.step(number, 1, [], FinishCode.ABORTED)
    await reading
    reasons = [choice.finish_reason for choice in stream.choices]
    assert reasons == ["aborted", "length", "aborted"]
    await until_idle(served)


async def test_refusal_of_one_choice_ends_the_call_behind_what_there_is(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, numbers = await begin(served, engine, ids_only=False, stream_interval=1)
    waiting = served.client.generate([5], n=2, stream_interval=100, ids_only=True)
    waiting_text = asyncio.create_task(waiting.text())
    submit = await engine.next(Submit)
    await engine.step_of_rows(Row(submit.stream, 0, [6, 7]), Row(submit.siblings[0], 0, [8]))
    await engine.send(Refused(submit.siblings[0], ErrorReason.NUMERICAL_ERROR, "not a number"))
    await asyncio.wait([waiting_text])
    assert failure(waiting_text).reason is ErrorReason.NUMERICAL_ERROR
    assert [choice.token_ids for choice in waiting.choices] == [[6, 7], [8]]
    assert await next_aborted(engine, 1) == {submit.stream}
    await engine.step_of_rows(*(Row(number, 1, [9], FinishCode.LENGTH) for number in numbers))
    await reading
    assert [choice.token_ids for choice in stream.choices] == [[5, 9]] * 3
    await until_idle(served)


async def test_choices_refused_one_by_one_end_with_the_first_error(
    served: RunningGateway, engine: StandInEngine
) -> None:
    reading = asyncio.create_task(served.client.generate([5], n=3).text())
    submit = await engine.next(Submit)
    for number in (submit.stream, *submit.siblings):
        await engine.send(Refused(number, ErrorReason.KV_EXHAUSTED, f"stream {number}"))
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.KV_EXHAUSTED
    assert failure(reading).message == f"stream {submit.stream}"
    await until_idle(served)


async def test_gap_in_one_choice_frees_the_others(
    served: RunningGateway, engine: StandInEngine
) -> None:
    _, reading, numbers = await begin(served, engine, ids_only=False)
    await engine.step(numbers[1], 3, [8])
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST
    assert await next_aborted(engine, 3) == set(numbers)
    await until_idle(served)


@pytest.mark.parametrize("cause", ["cancel", "deadline", "drain"])
async def test_every_choice_is_freed(
    folder: Path,
    engine: StandInEngine,
    tokenizer_address: str,
    start_gateway: StartGateway,
    cause: str,
) -> None:
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address, drain_grace_s=0.1)
    options: dict[str, Any] = {"timeout": 0.5} if cause == "deadline" else {}
    stream, reading, numbers = await begin(served, engine, ids_only=False, **options)
    if cause == "cancel":
        stream.cancel()
    elif cause == "drain":
        await served.gateway.drain()
    assert await next_aborted(engine, 3) == set(numbers)
    await asyncio.wait([reading])
    assert (
        failure(reading).code
        in {
            "cancel": {grpc.StatusCode.CANCELLED},
            "deadline": {grpc.StatusCode.DEADLINE_EXCEEDED},
            "drain": {grpc.StatusCode.UNAVAILABLE},
        }[cause]
    )
    await until_idle(served)


async def test_lost_engine_ends_the_call(served: RunningGateway, engine: StandInEngine) -> None:
    _, reading, _ = await begin(served, engine, ids_only=False)
    await engine.send(HelloNeeded())
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST
    await until_idle(served)


async def test_beats_name_every_choice(served: RunningGateway, engine: StandInEngine) -> None:
    _, reading, numbers = await begin(served, engine)
    await engine.step(numbers[0], 1, [6], FinishCode.LENGTH)
    while not engine.beats or set(engine.beats[-1]) != set(numbers[1:]):
        await asyncio.sleep(0.05)
    await engine.step_of_rows(*(Row(number, 1, [6], FinishCode.LENGTH) for number in numbers[1:]))
    await reading


async def test_text_so_far_of_each_choice_is_delivered_at_the_deadline(
    served: RunningGateway, engine: StandInEngine
) -> None:
    outputs = [await served.client.tokenize(text, add_special_tokens=False) for text in TEXTS]
    stream = served.client.generate([5], n=3, stream_interval=1000, stop="over the sea and far")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    numbers = [submit.stream, *submit.siblings]
    both = list(zip(numbers, outputs, strict=True))
    await engine.step_of_rows(*(Row(number, 0, ids[:2]) for number, ids in both))
    await engine.step_of_rows(
        *(Row(number, 2, ids[2:], FinishCode.DEADLINE) for number, ids in both)
    )
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.DEADLINE
    assert [choice.text for choice in stream.choices] == list(TEXTS)
    assert [choice.token_ids for choice in stream.choices] == outputs
    await until_idle(served)


@pytest.mark.parametrize(
    ("num_rows", "cause"),
    [
        pytest.param(2, "nothing was read", id="write stalls"),
        pytest.param(12, "tokens wait to be read", id="mailbox is full"),
    ],
)
async def test_choices_of_a_client_that_does_not_read_are_freed(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway, num_rows: int, cause: str
) -> None:
    call = nobody_reads(folder, tokenizer_address, start_gateway, num_choices=3)
    async with call as (served, engine, slow):
        submit = await engine.next(Submit)
        numbers = [submit.stream, *submit.siblings]
        row = 10_000  # Of one choice alone, so many rows would fit into the mailbox.
        for index in range(num_rows):
            await engine.step_of_rows(
                *(Row(number, index * row, [4000] * row) for number in numbers)
            )
        assert await next_aborted(engine, 3) == set(numbers)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in slow:
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert cause in (caught.value.details() or "")
        await until_idle(served)
