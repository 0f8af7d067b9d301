"""Log-probabilities on their way to the client: always those of the tokens that they come with."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway.harness import (
    RunningGateway,
    deltas,
    encoded_request,
    failure,
    opened,
    thoughts,
    until_idle,
)
from gateway.stand_ins import Row, StandInEngine, StandInTokenizer
from hypothesis import given
from hypothesis import strategies as st
from mini_infer.client import Chunk
from mini_infer.errors import ErrorReason
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import Abort, FinishCode, Submit
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_gateway.mailbox import Ending, Mailbox, Parcel
from mini_infer_gateway.request import TextOptions
from mini_infer_gateway.stream import EngineFinish, Stream

NUM_TOP = 2
PROMPT = list(range(100, 120))
SAMPLING = ResolvedSampling(0.0, 0, 1.0, 0, 64, num_logprobs=NUM_TOP)


def row(number: int, start: int, ids: list[int], **fields: Any) -> Row:
    """A row with the log-probabilities that its tokens have at their positions."""
    return Row(number, start, ids, logprobs=thoughts(start, ids, NUM_TOP), **fields)


class Peer:
    """Engine and tokenizer of streams; both answer when the test says so."""

    def open(self, stream: Stream, options: TextOptions) -> None: ...

    def feed(self, stream: Stream, start: int) -> None: ...

    def abort(self, stream: Stream) -> None: ...

    def forget(self, stream: Stream) -> None: ...


async def released(
    rows: list[int], releases: list[int], min_tokens: int, stops: bool
) -> tuple[list[int], list[Parcel]]:
    """The ids of a stream, and its parcels.

    Rows of so many ids come in, so many ids are released where they are there, and a client takes
    whatever it gets; at the end all is released, or a stop string cuts what is left.
    """
    mailbox, peer = Mailbox(min_tokens=min_tokens), Peer()
    stream = Stream(
        number=1,
        choice_index=0,
        request=encoded_request(sampling=SAMPLING),
        mailbox=mailbox,
        engine=peer,
        text=peer,
    )
    parcels: list[Parcel] = []

    async def client() -> None:
        while not (parcels and parcels[-1].end):
            parcels.append(await mailbox.take())

    task = asyncio.create_task(client())
    for index, count in enumerate(rows):
        start = len(stream.output_ids)
        ids = [7 * position % 50 for position in range(start, start + count)]
        stream.extend(ids, None, thoughts(start, ids, NUM_TOP) if ids else None)
        wanted = releases[index] if index < len(releases) else 0
        num_ready = min(wanted, len(stream.output_ids) - stream.num_released)
        stream.release(num_ready, "x" * num_ready, -1)
        if wanted % 2:
            await asyncio.sleep(0)
    num_left = len(stream.output_ids) - stream.num_released
    if stops and num_left:
        stream.release(1, "x", 0)
    finish = EngineFinish(FinishCode.LENGTH, -1, None)  # type: ignore[arg-type]
    stream.extend([], finish)
    if not (stops and num_left):
        stream.release(num_left, "x" * num_left, -1)
    await task
    return stream.output_ids[: stream.num_released], parcels


@given(
    rows=st.lists(st.integers(0, 5), max_size=20),
    releases=st.lists(st.integers(0, 6), max_size=20),
    min_tokens=st.integers(1, 6),
    stops=st.booleans(),
)
def test_ids_text_and_log_probabilities_stay_together(
    rows: list[int], releases: list[int], min_tokens: int, stops: bool
) -> None:
    ids, parcels = asyncio.run(released(rows, releases, min_tokens, stops))
    assert [each for parcel in parcels for each in parcel.token_ids] == ids
    position = 0
    for parcel in parcels:
        own = parcel.token_ids
        assert parcel.text == "x" * len(own)
        assert parcel.logprobs == (thoughts(position, own, NUM_TOP) if own else None)
        position += len(own)
    assert isinstance(parcels[-1].end, Ending)


@pytest.mark.parametrize("options", [{}, {"stream_interval": 4}, {"ids_only": True}], ids=str)
async def test_each_chunk_has_those_of_its_tokens(
    served: RunningGateway, engine: StandInEngine, options: dict[str, Any]
) -> None:
    text = "the fox ran to the river and né 🙂 slept"
    ids = await served.client.tokenize(text, add_special_tokens=False)
    stream = served.client.generate([5], logprobs=NUM_TOP, **options)
    chunks: list[Chunk] = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)

    reading = asyncio.create_task(read())
    number = (await engine.next(Submit)).stream
    for position in range(0, len(ids), 3):
        await engine.step_of_rows(row(number, position, ids[position : position + 3]))
        await asyncio.sleep(0.002)
    await engine.step(number, len(ids), [], FinishCode.LENGTH)
    await reading
    assert len(chunks) > 1
    position = 0
    for chunk in chunks:
        expected = thoughts(position, chunk.token_ids, NUM_TOP)
        assert chunk.logprobs == expected.tokens()
        position += len(chunk.token_ids)
    assert stream.token_ids == ids
    assert stream.choices[0].text == ("" if options.get("ids_only") else text)


async def test_stop_string_cuts_them_with_the_ids(
    served: RunningGateway, engine: StandInEngine
) -> None:
    ids = await served.client.tokenize(" fox and moon", add_special_tokens=False)
    stream = served.client.generate([5], stop="fox", logprobs=NUM_TOP)
    reading = asyncio.create_task(stream.text())
    number = (await engine.next(Submit)).stream
    await engine.step_of_rows(row(number, 0, ids, finish=FinishCode.LENGTH))
    assert await reading == " "
    assert stream.matched_stop == "fox"
    assert 0 < len(stream.token_ids) < len(ids)
    assert stream.choices[0].logprobs == thoughts(0, stream.token_ids, NUM_TOP).tokens()


async def test_rows_that_repeat_ids_are_cut(served: RunningGateway, engine: StandInEngine) -> None:
    stream = served.client.generate([5], ids_only=True, logprobs=NUM_TOP)
    reading = asyncio.create_task(stream.text())
    number = (await engine.next(Submit)).stream
    await engine.step_of_rows(row(number, 0, [10, 11]))
    await engine.step_of_rows(row(number, 0, [10]))
    await engine.step_of_rows(row(number, 1, [11, 12, 13], finish=FinishCode.LENGTH))
    await reading
    assert stream.token_ids == [10, 11, 12, 13]
    assert stream.choices[0].logprobs == thoughts(0, [10, 11, 12, 13], NUM_TOP).tokens()
    assert served.engine_link.dropped["repeated_tokens"] == 2


async def test_each_choice_has_its_own(served: RunningGateway, engine: StandInEngine) -> None:
    """In a step with rows of a request that wants none."""
    other = served.client.generate([5], ids_only=True)
    reading_other = asyncio.create_task(other.text())
    plain = (await engine.next(Submit)).stream
    stream = served.client.generate([5], n=3, ids_only=True, logprobs=NUM_TOP)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    numbers = [submit.stream, *submit.siblings]
    outputs = [[10 * choice + position for position in range(4 + choice)] for choice in range(3)]
    for position in range(6):
        rows = [
            row(number, position, [ids[position]])
            for number, ids in zip(numbers, outputs, strict=True)
            if position < len(ids)
        ]
        await engine.step_of_rows(Row(plain, position, [9]), *reversed(rows))
    ends = [
        Row(number, len(ids), [], FinishCode.LENGTH)
        for number, ids in zip(numbers, outputs, strict=True)
    ]
    await engine.step_of_rows(*ends, Row(plain, 6, [], FinishCode.LENGTH))
    await asyncio.gather(reading, reading_other)
    for choice, ids in zip(stream.choices, outputs, strict=True):
        assert choice.token_ids == ids
        assert choice.logprobs == thoughts(0, ids, NUM_TOP).tokens()
    assert other.choices[0].logprobs == []


@pytest.mark.parametrize(
    "logprobs",
    [None, thoughts(0, [10], NUM_TOP - 1), thoughts(0, [10], NUM_TOP + 1)],
    ids=["none", "too few", "too many"],
)
async def test_stream_whose_log_probabilities_are_missing_is_lost(
    served: RunningGateway, engine: StandInEngine, logprobs: LogprobColumns | None
) -> None:
    reading = asyncio.create_task(served.client.generate([5], logprobs=NUM_TOP).text())
    number = (await engine.next(Submit)).stream
    await engine.step(number, 0, [10], logprobs=logprobs)
    assert await engine.next(Abort) == Abort([number])
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST
    assert served.engine_link.dropped["lost_logprobs"] == 1
    await until_idle(served)


async def test_stream_that_gets_some_unasked_is_lost(
    served: RunningGateway, engine: StandInEngine
) -> None:
    reading = asyncio.create_task(served.client.generate([5]).text())
    number = (await engine.next(Submit)).stream
    await engine.step_of_rows(row(number, 0, [10]))
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.ENGINE_LOST


async def test_those_of_ids_that_wait_for_the_tokenizer_wait_with_them(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    stream, reading, number = await opened(faked, engine, tokenizer, logprobs=NUM_TOP)
    await engine.step_of_rows(row(number, 0, [10, 11]))
    await engine.step_of_rows(row(number, 2, [12], finish=FinishCode.LENGTH))
    await tokenizer.send(deltas(number, 2, 0, ""))
    await tokenizer.send(deltas(number, 2, 1, "a"))
    while len(stream.token_ids) < 1:
        await asyncio.sleep(0.005)
    assert stream.choices[0].logprobs == thoughts(0, [10], NUM_TOP).tokens()
    await tokenizer.send(deltas(number, 3, 2, "bc"))
    assert await reading == "abc"
    assert stream.choices[0].logprobs == thoughts(0, [10, 11, 12], NUM_TOP).tokens()
