"""A tokenizer that dies, forgets, falls silent or says nonsense, in the middle of streams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from gateway.harness import (
    RunningGateway,
    StartGateway,
    deltas,
    expected_ids,
    failure,
    opened,
    scripted_engine_process,
    tokenizer_process,
)
from gateway.stand_ins import TOKENIZER_WELCOME, StandInEngine, StandInTokenizer
from mini_infer.channel import MAX_FRAME_BYTES
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason
from mini_infer.messages import (
    Abort,
    CancelJobs,
    CloseText,
    Decode,
    Encoded,
    EncodeText,
    FinishCode,
    HelloNeeded,
    HelloRefused,
    JobRefused,
    OpenText,
    Submit,
    TextDeltas,
    TextStep,
    UnknownStreams,
)
from mini_infer_gateway import peer_socket
from mini_infer_gateway.peers import TICK_S
from mini_infer_gateway.tokenizer_link import PATIENCE_S, PING, TOKENIZER_LEASE_S

LOST = ErrorReason.TOKENIZER_LOST


async def test_killed_tokenizer_loses_nothing(folder: Path, start_gateway: StartGateway) -> None:
    engine = scripted_engine_process(folder, "engine", step_ms=10)
    tokenizer = tokenizer_process(folder)
    engine.start()
    tokenizer.start()
    served = await start_gateway(engine.address, tokenizer.address)
    streams = [
        served.client.generate("Once", seed=seed, max_tokens=150, timeout=60) for seed in range(8)
    ]
    readings = [asyncio.create_task(stream.text()) for stream in streams]
    while not all(len(stream.token_ids) > 5 for stream in streams):
        await asyncio.sleep(0.01)
    tokenizer.kill()
    await asyncio.sleep(0.2)
    assert not any(reading.done() for reading in readings)
    tokenizer.start()
    texts = [await reading for reading in readings]
    for seed, (stream, text) in enumerate(zip(streams, texts, strict=True)):
        assert stream.token_ids == expected_ids(seed, 150)
        assert text == await served.client.detokenize(stream.token_ids)
    engine.kill()
    tokenizer.kill()


async def test_streams_are_reopened_behind_what_was_delivered(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    stream, reading, number = await opened(faked, engine, tokenizer, stop="never")
    await engine.step(number, 0, [10, 11, 12])
    assert await tokenizer.next(TextStep) == TextStep([number], [0], [3], [10, 11, 12], [False])
    await tokenizer.send(deltas(number, 3, 2, "ab"))
    while len(stream.token_ids) < 2:
        await asyncio.sleep(0.005)
    await tokenizer.send(HelloNeeded())
    reopened = await tokenizer.next(OpenText)
    assert (reopened.output_ids, reopened.stop) == ([10, 11], ["never"])
    assert await tokenizer.next(TextStep) == TextStep([number], [2], [1], [12], [False])
    await engine.step(number, 3, [13], FinishCode.LENGTH)
    assert await tokenizer.next(TextStep) == TextStep([number], [3], [1], [13], [True])
    await tokenizer.send(deltas(number, 3, 1, "c"))
    await tokenizer.send(deltas(number, 4, 1, "d"))
    assert await reading == "abcd"
    assert stream.token_ids == [10, 11, 12, 13]


async def test_end_that_waits_is_given_again(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    """Only the flush of the end is outstanding: a row without ids is sent again."""
    stream, reading, number = await opened(faked, engine, tokenizer)
    await engine.step(number, 0, [10])
    await tokenizer.next(TextStep)
    await engine.step(number, 1, [], FinishCode.ABORTED)
    await tokenizer.next(TextStep)
    await tokenizer.send(UnknownStreams([number]))
    assert (await tokenizer.next(OpenText)).output_ids == []
    assert await tokenizer.next(TextStep) == TextStep([number], [0], [1], [10], [True])
    await tokenizer.send(deltas(number, 1, 1, "a"))
    assert await reading == "a"
    assert stream.finish_reason == "aborted"


async def test_answers_before_the_welcome_are_dropped(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    _, reading, number = await opened(faked, engine, tokenizer)
    await engine.step(number, 0, [10], FinishCode.LENGTH)
    await tokenizer.next(TextStep)
    tokenizer.welcome = None
    num_hellos = tokenizer.num_hellos
    await tokenizer.send(HelloNeeded())
    await tokenizer.send(deltas(number, 1, 1, "stale"))
    while tokenizer.num_hellos == num_hellos:
        await asyncio.sleep(0.005)
    await tokenizer.send(TOKENIZER_WELCOME)
    await tokenizer.next(TextStep)
    await tokenizer.send(deltas(number, 1, 1, "fresh"))
    assert await reading == "fresh"
    assert faked.tokenizer_link.dropped["before_welcome"] == 1


async def test_jobs_are_given_again(faked: RunningGateway, tokenizer: StandInTokenizer) -> None:
    encoding = asyncio.create_task(faked.client.tokenize("hello"))
    first = await tokenizer.next(EncodeText)
    await tokenizer.send(HelloNeeded())
    again = await tokenizer.next(EncodeText)
    assert again == first
    await tokenizer.send(Encoded(again.job, [1, 2]))
    await tokenizer.send(Encoded(again.job, [3]))
    assert await encoding == [1, 2]


async def test_job_that_nobody_waits_for_is_cancelled(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    answered = asyncio.create_task(faked.client.tokenize("hello"))
    await tokenizer.send(Encoded((await tokenizer.next(EncodeText)).job, [1]))
    await answered
    with pytest.raises(RequestFailed):
        await faked.client.tokenize("hello", timeout=0.2)
    job = (await tokenizer.next(EncodeText)).job
    assert await tokenizer.next(CancelJobs) == CancelJobs([job])


async def test_connection_that_zeromq_gives_up_is_replaced(
    faked: RunningGateway, tokenizer: StandInTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some ticks: within one, a new socket would be replaced before it is connected, for ever.
    monkeypatch.setattr(peer_socket, "RECONNECT_AFTER_S", 5 * TICK_S)
    encoding = asyncio.create_task(faked.client.tokenize("hello"))
    await tokenizer.next(EncodeText)
    await tokenizer.send_frame(bytes(MAX_FRAME_BYTES + 1))
    await asyncio.sleep(0.5)
    faked.tokenizer_link.tick(asyncio.get_running_loop().time() + TOKENIZER_LEASE_S + 1)
    assert faked.tokenizer_link.welcome is None
    again = await asyncio.wait_for(tokenizer.next(EncodeText), 10)
    await tokenizer.send(Encoded(again.job, [1, 2]))
    assert await encoding == [1, 2]


async def test_refused_job_is_the_status(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    encoding = asyncio.create_task(faked.client.tokenize("hello"))
    job = (await tokenizer.next(EncodeText)).job
    await tokenizer.send(JobRefused(job, ErrorReason.CHAT_TEMPLATE_FAILED, "bad roles"))
    with pytest.raises(RequestFailed, match="bad roles") as caught:
        await encoding
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_prompt_without_tokens_is_refused(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    reading = asyncio.create_task(faked.client.generate("hello").text())
    await tokenizer.send(Encoded((await tokenizer.next(EncodeText)).job, []))
    await asyncio.wait([reading])
    assert failure(reading).violations[0].field == "text"


async def test_abort_while_the_prompt_is_encoded(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    stream = faked.client.generate("hello", request_id="early")
    reading = asyncio.create_task(stream.text())
    job = (await tokenizer.next(EncodeText)).job
    await faked.client.abort("early")
    await tokenizer.send(Encoded(job, [5]))
    submit = await engine.next(Submit)
    assert await engine.next(Abort) == Abort([submit.stream], answer=True)
    await engine.step(submit.stream, 0, [], FinishCode.ABORTED)
    await tokenizer.next(TextStep)
    await tokenizer.send(deltas(submit.stream, 0, 0, ""))
    assert await reading == ""
    assert stream.finish_reason == "aborted"
    assert stream.num_prompt_tokens == 1


async def test_tokenizer_that_stays_away_ends_jobs_and_streams(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    _, reading, _ = await opened(faked, engine, tokenizer)
    encoding = asyncio.create_task(faked.client.tokenize("hello"))
    await tokenizer.next(EncodeText)
    tokenizer.welcome = None
    link, now = faked.tokenizer_link, asyncio.get_running_loop().time()
    link.tick(now + TOKENIZER_LEASE_S + 1)
    assert link.welcome is None
    link.tick(now + PATIENCE_S - 1)
    assert not reading.done()
    link.tick(now + PATIENCE_S + 1)
    await asyncio.wait([reading, encoding])
    for task in (reading, encoding):
        assert failure(task).code is grpc.StatusCode.UNAVAILABLE
        assert failure(task).reason is LOST
        assert failure(task).retry_after_s is not None
    with pytest.raises(RequestFailed, match="ENGINE_STARTING"):
        await faked.client.generate([5]).text()


async def test_answer_to_the_ping_is_a_sign_of_life(
    faked: RunningGateway, tokenizer: StandInTokenizer
) -> None:
    ping = await tokenizer.next(Decode)
    assert ping == PING
    await tokenizer.send(JobRefused(PING.job, ErrorReason.INTERNAL_ERROR, ""))
    while faked.tokenizer_link._socket.heard_at < asyncio.get_running_loop().time() - 0.5:
        await asyncio.sleep(0.01)
    faked.tokenizer_link.tick(asyncio.get_running_loop().time() + TOKENIZER_LEASE_S - 1)
    assert faked.tokenizer_link.welcome is not None


@pytest.mark.parametrize(
    "change",
    [{"ids_released": [3]}, {"ids_consumed": [9]}, {"stop_indices": [1]}],
    ids=str,
)
async def test_row_that_cannot_be_ends_its_stream(
    faked: RunningGateway,
    engine: StandInEngine,
    tokenizer: StandInTokenizer,
    change: dict[str, list[int]],
) -> None:
    _, reading, number = await opened(faked, engine, tokenizer, stop="x")
    await engine.step(number, 0, [10, 11])
    await tokenizer.next(TextStep)
    await tokenizer.send(msgspec.structs.replace(deltas(number, 2, 1, "a"), **change))
    await asyncio.wait([reading])
    assert failure(reading).reason is LOST


async def test_deltas_whose_columns_disagree_are_asked_for_again(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    _, reading, number = await opened(faked, engine, tokenizer)
    await engine.step(number, 0, [10], FinishCode.LENGTH)
    await tokenizer.next(TextStep)
    await tokenizer.send(TextDeltas([number], [1], [1], [], [-1]))
    assert await tokenizer.next(TextStep) == TextStep([number], [0], [1], [10], [True])
    await tokenizer.send(deltas(number, 1, 1, "a"))
    assert await reading == "a"


async def test_unknown_streams_and_jobs_are_counted(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    await tokenizer.send(deltas(99, 1, 1, "a"))
    await tokenizer.send(UnknownStreams([98]))
    await tokenizer.send(Encoded(97, []))
    _, reading, number = await opened(faked, engine, tokenizer)
    await engine.step(number, 0, [10], FinishCode.LENGTH)
    await tokenizer.next(TextStep)
    await tokenizer.send(deltas(number, 1, 1, "a"))
    await reading
    assert faked.tokenizer_link.dropped["unknown_stream"] == 2
    assert faked.tokenizer_link.dropped["unknown_job"] == 1


async def test_cancel_closes_the_text(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    stream, reading, number = await opened(faked, engine, tokenizer)
    stream.cancel()
    assert await tokenizer.next(CloseText) == CloseText([number])
    await asyncio.wait([reading])


async def test_ids_of_one_turn_leave_as_one_message(
    faked: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer
) -> None:
    opens = [await opened(faked, engine, tokenizer) for _ in range(3)]
    link = faked.engine_link
    for _, _, number in opens:
        link._streams[number].extend([10], None)
        link._streams[number].extend([11], None)
    step = await tokenizer.next(TextStep)
    assert step.streams == [number for _, _, number in opens]
    assert step.counts == [2, 2, 2]
    for stream, reading, _ in opens:
        stream.cancel()
        await asyncio.wait([reading])


@pytest.mark.parametrize(
    "answer",
    [HelloRefused("no"), msgspec.structs.replace(TOKENIZER_WELCOME, protocol_version=99)],
    ids=["refused", "version"],
)
async def test_tokenizer_that_does_not_fit_is_not_used(
    folder: Path, engine: StandInEngine, start_gateway: StartGateway, answer: Any
) -> None:
    tokenizer = StandInTokenizer(f"ipc://{folder}/tokenizer", answer)
    served = await start_gateway(f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer", ready=False)
    while not (engine.num_hellos and tokenizer.num_hellos):
        await asyncio.sleep(0.01)
    with pytest.raises(RequestFailed, match="the tokenizer is not ready"):
        await served.client.generate([5]).text()
    await tokenizer.close()
