"""The ways in which a stream ends, and what engine and tokenizer are told then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from gateway.harness import RunningGateway, StartGateway, begin, failure, nobody_reads, until_idle
from gateway.stand_ins import ACCOUNTING, StandInEngine
from mini_infer import AsyncClient
from mini_infer.client import RequestFailed
from mini_infer.client_wire import request_failed
from mini_infer.errors import ErrorReason
from mini_infer.messages import Abort, FinishCode, HelloNeeded, Refused, Submit
from mini_infer.v1 import generate_pb2
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceStub
from mini_infer_gateway import stream as stream_module


@pytest.mark.parametrize("ids_only", [True, False], ids=["ids", "text"])
async def test_cancel_aborts_in_the_engine(
    served: RunningGateway, engine: StandInEngine, ids_only: bool
) -> None:
    stream, reading, number = await begin(served, engine, ids_only=ids_only)
    stream.cancel()
    assert await engine.next(Abort) == Abort([number], answer=False)
    await asyncio.wait([reading])
    await until_idle(served)


async def test_cancel_before_the_first_token(served: RunningGateway, engine: StandInEngine) -> None:
    stream = served.client.generate("Once")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    stream.cancel()
    assert await engine.next(Abort) == Abort([submit.stream])
    await asyncio.wait([reading])
    assert failure(reading).code is grpc.StatusCode.CANCELLED
    await until_idle(served)


async def test_death_of_the_client_aborts_in_the_engine(
    served: RunningGateway, engine: StandInEngine
) -> None:
    other = AsyncClient(served.address)
    reading = asyncio.create_task(other.generate([5]).text())
    submit = await engine.next(Submit)
    await other.close()
    assert await engine.next(Abort) == Abort([submit.stream])
    await asyncio.wait([reading])
    await until_idle(served)


async def test_deadline_aborts_in_the_engine(served: RunningGateway, engine: StandInEngine) -> None:
    _, reading, number = await begin(served, engine, timeout=0.3)
    assert await engine.next(Abort) == Abort([number])
    await asyncio.wait([reading])
    assert failure(reading).code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_idle(served)


@pytest.mark.parametrize("ids_only", [True, False], ids=["ids", "text"])
async def test_deadline_that_the_engine_sees_first(
    served: RunningGateway, engine: StandInEngine, ids_only: bool
) -> None:
    stream, reading, number = await begin(served, engine, ids_only=ids_only)
    await engine.step(number, 1, [6, 7], FinishCode.DEADLINE)
    await asyncio.wait([reading])
    assert failure(reading).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert failure(reading).reason is ErrorReason.DEADLINE
    assert stream.token_ids == [5, 6, 7]
    await until_idle(served)


async def test_text_that_is_held_back_is_delivered_at_the_deadline(
    served: RunningGateway, engine: StandInEngine
) -> None:
    """The text may yet become a stop string, and no message is due: both end with the row."""
    token_ids = await served.client.tokenize(" fox", add_special_tokens=False)
    stream = served.client.generate([5], stop=" fox and", stream_interval=100)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, token_ids)
    await engine.step(submit.stream, len(token_ids), [], FinishCode.DEADLINE)
    await asyncio.wait([reading])
    assert failure(reading).reason is ErrorReason.DEADLINE
    assert stream.choices[0].text == " fox"
    assert stream.token_ids == token_ids
    assert stream.finish_reason is None


@pytest.mark.parametrize("ids_only", [True, False], ids=["ids", "text"])
async def test_abort_ends_regularly(
    served: RunningGateway, engine: StandInEngine, ids_only: bool
) -> None:
    stream, reading, number = await begin(served, engine, request_id="a", ids_only=ids_only)
    await served.client.abort("a")
    assert await engine.next(Abort) == Abort([number], answer=True)
    await engine.step(number, 1, [], FinishCode.ABORTED)
    await reading
    assert stream.finish_reason == "aborted"
    assert stream.usage.num_output_tokens == 1
    assert stream.accounting is not None
    await until_idle(served)


async def test_end_of_sequence_is_told(served: RunningGateway, engine: StandInEngine) -> None:
    stream, reading, number = await begin(served, engine)
    await engine.step(number, 1, [7, 2], FinishCode.STOP_TOKEN, stop_token_id=2)
    await reading
    assert (stream.finish_reason, stream.matched_stop) == ("stop", 2)
    assert stream.token_ids == [5, 7, 2]


async def test_stop_string_aborts_in_the_engine_and_drops_what_follows(
    served: RunningGateway, engine: StandInEngine
) -> None:
    token_ids = await served.client.tokenize(" fox and moon", add_special_tokens=False)
    num_kept = len(await served.client.tokenize(" fox", add_special_tokens=False))
    stream = served.client.generate([5], stop="fox")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, token_ids)
    await engine.step(submit.stream, len(token_ids), [9])
    assert await engine.next(Abort) == Abort([submit.stream], answer=True)
    await engine.step(submit.stream, len(token_ids) + 1, [], FinishCode.ABORTED)
    assert await reading == " "
    assert (stream.finish_reason, stream.matched_stop) == ("stop", "fox")
    assert stream.accounting == ACCOUNTING
    assert stream.usage.num_output_tokens == len(stream.token_ids) == num_kept
    await until_idle(served)


@pytest.mark.parametrize("loss", ["silence", "engine"])
async def test_stop_string_ends_a_stream_without_the_engine_too(
    served: RunningGateway, engine: StandInEngine, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(stream_module, "ACCOUNTING_PATIENCE_S", 0.3 if loss == "silence" else 60)
    token_ids = await served.client.tokenize(" fox", add_special_tokens=False)
    stream = served.client.generate([5], stop="fox", stream_interval=100)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, token_ids)
    assert await engine.next(Abort) == Abort([submit.stream], answer=True)
    while not stream.token_ids:
        await asyncio.sleep(0.005)
    assert not reading.done()  # The output is not held back; only the end waits.
    if loss == "engine":
        await engine.send(HelloNeeded())
    else:
        assert await engine.next(Abort) == Abort([submit.stream])
    assert await reading == " "
    assert (stream.finish_reason, stream.matched_stop) == ("stop", "fox")
    assert stream.accounting is None
    await until_idle(served)


@pytest.mark.parametrize("ids_only", [True, False], ids=["ids", "text"])
@pytest.mark.parametrize(
    ("code", "reason"), [(FinishCode.REPETITION, "repetition"), (FinishCode.GRAMMAR, "stop")]
)
async def test_end_that_the_output_brings_about(
    served: RunningGateway, engine: StandInEngine, code: FinishCode, reason: str, ids_only: bool
) -> None:
    stream, reading, number = await begin(served, engine, ids_only=ids_only)
    await engine.step(number, 1, [6, 6], code)
    await reading
    assert (stream.finish_reason, stream.matched_stop) == (reason, None)
    assert stream.token_ids == [5, 6, 6]
    assert stream.usage.num_output_tokens == 3
    assert stream.accounting == ACCOUNTING
    await until_idle(served)


@pytest.mark.parametrize(
    "code",
    [FinishCode.LENGTH, FinishCode.DEADLINE, FinishCode.REPETITION, FinishCode.GRAMMAR],
)
async def test_stop_string_wins_over_an_end_at_the_same_token(
    served: RunningGateway, engine: StandInEngine, code: FinishCode
) -> None:
    token_ids = await served.client.tokenize(" fox", add_special_tokens=False)
    stream = served.client.generate([5], stop="fox")
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, token_ids, code)
    await reading
    assert (stream.finish_reason, stream.matched_stop) == ("stop", "fox")


async def test_refusal_of_the_engine_is_the_status(
    served: RunningGateway, engine: StandInEngine
) -> None:
    reading = asyncio.create_task(served.client.generate([5]).text())
    submit = await engine.next(Submit)
    await engine.send(Refused(submit.stream, ErrorReason.KV_EXHAUSTED, "too long", {"limit": "9"}))
    await asyncio.wait([reading])
    error = failure(reading)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (error.reason, error.message) == (ErrorReason.KV_EXHAUSTED, "too long")
    assert error.metadata == {"limit": "9"}
    assert error.retry_after_s is None


async def test_time_that_the_engine_tells_reaches_the_client(
    served: RunningGateway, engine: StandInEngine
) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        request = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[5]))
        call = InferenceServiceStub(channel).Generate(request, timeout=60)
        submit = await engine.next(Submit)
        reason = ErrorReason.DEADLINE_UNREACHABLE
        await engine.send(Refused(submit.stream, reason, "too late", retry_after_s=2.5))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "2500"
    error = request_failed(caught.value)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (error.reason, error.message) == (reason, "too late")
    assert error.retry_after_s == 2.5


async def test_queue_full_pushes_back(
    folder: Path, engine: StandInEngine, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    served = await start_gateway(
        f"ipc://{folder}/engine", tokenizer_address, max_concurrent_requests=1
    )
    first = asyncio.create_task(served.client.generate([5]).text())
    await engine.next(Submit)
    async with grpc.aio.insecure_channel(served.address) as channel:
        request = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[5]))
        call = InferenceServiceStub(channel).Generate(request)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    with pytest.raises(RequestFailed) as caught:
        await served.client.generate([5]).text()
    assert caught.value.reason is ErrorReason.QUEUE_FULL
    assert caught.value.retry_after_s == 1
    first.cancel()


@pytest.mark.parametrize(
    ("num_rows", "cause"),
    [
        pytest.param(3, "nothing was read", id="write stalls"),
        pytest.param(12, "tokens wait to be read", id="mailbox is full"),
    ],
)
async def test_a_client_that_does_not_read_is_ended_and_harms_nobody(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway, num_rows: int, cause: str
) -> None:
    call = nobody_reads(folder, tokenizer_address, start_gateway)
    async with call as (served, engine, slow):
        number = (await engine.next(Submit)).stream
        stream, reading, other = await begin(served, engine)
        row = 30_000
        for index in range(num_rows):
            await engine.step(number, index * row, [4000] * row)
            await engine.step(other, index + 1, [6])
            while len(stream.token_ids) < index + 2:
                await asyncio.sleep(0.005)
        assert await engine.next(Abort) == Abort([number])
        await engine.step(other, num_rows + 1, [7], FinishCode.LENGTH)
        await reading
        assert stream.token_ids == [5] + [6] * num_rows + [7]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in slow:
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert cause in (caught.value.details() or "")


async def test_real_engine_is_idle_again_after_cancels(scripted: RunningGateway) -> None:
    streams = [scripted.client.generate("Hello", seed=seed) for seed in range(16)]
    readings = [asyncio.create_task(stream.text()) for stream in streams]
    while not all(stream.token_ids for stream in streams):
        await asyncio.sleep(0.01)
    for stream in streams:
        stream.cancel()
    await asyncio.wait(readings)
    await until_idle(scripted)
    while True:
        info = (await scripted.client.server_info()).engines[0]
        if (info.num_running, info.num_waiting, info.num_used_blocks) == (0, 0, 0):
            break
        await asyncio.sleep(0.05)
