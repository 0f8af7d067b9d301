"""What the gateway makes of an engine that fails, repeats itself, or leaves something out."""

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
    begin,
    failure,
    scripted_engine_process,
    thoughts,
)
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine, StandInTokenizer
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import (
    ENGINE_LEASE_S,
    Abort,
    EngineBeat,
    EngineCounters,
    FinishCode,
    HelloNeeded,
    HelloRefused,
    Refused,
    StepOutput,
    Submit,
)

BEAT = EngineBeat(
    epoch=1,
    num_steps=9,
    expected_step_ms=1.0,
    num_running=2,
    num_waiting=3,
    num_used_blocks=4,
    num_preemptions=5,
)


async def assert_lost(reading: asyncio.Task[Any]) -> None:
    await asyncio.wait([reading])
    error = failure(reading)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.reason is ErrorReason.ENGINE_LOST
    assert error.retry_after_s is not None


async def finish(engine: StandInEngine, number: int, start: int, seq: int | None = None) -> None:
    await engine.step(number, start, [9], FinishCode.LENGTH, seq=seq)


async def test_repeated_tokens_are_dropped(served: RunningGateway, engine: StandInEngine) -> None:
    stream, reading, number = await begin(served, engine)
    await engine.step(number, 0, [5, 6, 7])
    await engine.step(number, 1, [6, 7])
    await finish(engine, number, 3)
    await reading
    assert stream.token_ids == [5, 6, 7, 9]
    assert served.engine_link.dropped["repeated_tokens"] == 2


async def test_repeated_step_is_dropped(served: RunningGateway, engine: StandInEngine) -> None:
    stream, reading, number = await begin(served, engine)
    await engine.step(number, 1, [6], seq=0)
    await finish(engine, number, 1)
    await reading
    assert stream.token_ids == [5, 9]
    assert served.engine_link.dropped["repeated_step"] == 1


async def test_gap_in_a_stream_ends_that_stream(
    served: RunningGateway, engine: StandInEngine
) -> None:
    _, broken, number = await begin(served, engine)
    whole, reading, other = await begin(served, engine)
    await engine.step(number, 3, [8])
    await assert_lost(broken)
    assert await engine.next(Abort) == Abort([number])
    await finish(engine, other, 1)
    await reading
    assert whole.token_ids == [5, 9]
    assert served.engine_link.dropped["lost_tokens"] == 1


async def test_lost_step_ends_all_streams(served: RunningGateway, engine: StandInEngine) -> None:
    """The step that is missing may have been any stream's last."""
    readings = [(await begin(served, engine))[1] for _ in range(3)]
    engine.seq += 1
    await engine.step(12345, 0, [8])
    for reading in readings:
        await assert_lost(reading)
    assert served.engine_link.dropped["lost_step"] == 1
    stream, reading, number = await begin(served, engine)
    await finish(engine, number, 1)
    await reading
    assert stream.finish_reason == "length"


async def test_old_epoch_is_dropped(served: RunningGateway, engine: StandInEngine) -> None:
    stream, reading, number = await begin(served, engine)
    await engine.step(number, 1, [666], epoch=0, seq=engine.seq)
    await engine.send(msgspec.structs.replace(BEAT, epoch=0))
    await finish(engine, number, 1)
    await reading
    assert stream.token_ids == [5, 9]
    assert served.engine_link.dropped["old_epoch"] == 2


async def test_unknown_streams_are_counted(served: RunningGateway, engine: StandInEngine) -> None:
    await engine.step(777, 0, [8], FinishCode.LENGTH)
    await engine.send(Refused(778, ErrorReason.KV_EXHAUSTED, ""))
    _, reading, number = await begin(served, engine)
    await finish(engine, number, 1)
    await reading
    assert served.engine_link.dropped["unknown_stream"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [2]},
        {"counts": [-1]},
        {"starts": []},
        {"finish_codes": [99]},
        {"finish_codes": [int(FinishCode.LENGTH)]},
        {"stop_token_ids": [1, 2]},
        {"logprob_rows": [0]},
        {"logprobs": [thoughts(1, [8], 2)]},
        {"logprob_rows": [1], "logprobs": [thoughts(1, [8], 2)]},
        {"logprob_rows": [-1], "logprobs": [thoughts(1, [8], 2)]},
        {"logprob_rows": [0, 0], "logprobs": [thoughts(1, [8], 2)] * 2},
        {"logprob_rows": [0], "logprobs": [thoughts(1, [8, 9], 2)]},
        {"logprob_rows": [0], "logprobs": [LogprobColumns(2, b"1234", b"1234", b"", b"")]},
        {"logprob_rows": [0], "logprobs": [LogprobColumns(-1, b"1234", b"1234", b"", b"")]},
    ],
    ids=str,
)
async def test_columns_that_disagree_are_a_lost_step(
    served: RunningGateway, engine: StandInEngine, change: dict[str, list[Any]]
) -> None:
    _, reading, number = await begin(served, engine)
    step = StepOutput(1, engine.seq, 1, [number], [1], [1], [8], [0], [-1], [])
    await engine.send(msgspec.structs.replace(step, **change))
    await assert_lost(reading)
    assert served.engine_link.dropped["lost_step"] == 1


async def test_garbage_is_counted(served: RunningGateway, engine: StandInEngine) -> None:
    for frame in (b"", b"garbage", b"\x92\x16\x01", b"\xdd\xff\xff\xff\xff"):
        await engine.send_frame(frame)
    stream, reading, number = await begin(served, engine)
    await finish(engine, number, 1)
    await reading
    assert stream.finish_reason == "length"
    assert served.engine_link.dropped["undecodable_frame"] == 4


async def test_silence_past_the_lease_loses_the_engine(
    served: RunningGateway, engine: StandInEngine
) -> None:
    _, reading, _ = await begin(served, engine)
    loop = asyncio.get_running_loop()
    served.engine_link.tick(loop.time() + ENGINE_LEASE_S - 1)
    assert not reading.done()
    engine.welcome = None
    served.engine_link.tick(loop.time() + ENGINE_LEASE_S + 1)
    await assert_lost(reading)
    with pytest.raises(RequestFailed) as caught:
        await served.client.generate([5]).text()
    assert caught.value.reason is ErrorReason.ENGINE_STARTING
    assert caught.value.retry_after_s is not None


async def test_announced_step_extends_the_lease(
    served: RunningGateway, engine: StandInEngine
) -> None:
    await engine.send(msgspec.structs.replace(BEAT, expected_step_ms=10_000))
    _, reading, number = await begin(served, engine)
    served.engine_link.tick(asyncio.get_running_loop().time() + 35)
    await finish(engine, number, 1)
    await reading


async def test_engine_that_forgot_the_gateway_gets_a_hello(
    served: RunningGateway, engine: StandInEngine
) -> None:
    _, reading, _ = await begin(served, engine)
    await engine.send(HelloNeeded())
    await assert_lost(reading)
    await served.client.wait_until_ready(10)
    assert engine.num_hellos == 2


async def test_restarted_engine_is_used_with_its_new_epoch(
    folder: Path, served: RunningGateway, engine: StandInEngine
) -> None:
    _, reading, _ = await begin(served, engine)
    await engine.close()
    again = StandInEngine(
        f"ipc://{folder}/engine", msgspec.structs.replace(ENGINE_WELCOME, epoch=2)
    )
    while not again.beats:
        await asyncio.sleep(0.01)
    await again.send(HelloNeeded())
    await assert_lost(reading)
    await served.client.wait_until_ready(10)
    stream = served.client.generate([5], ids_only=True)
    reading = asyncio.create_task(stream.text())
    submit = await again.next(Submit)
    await again.step(submit.stream, 0, [5], epoch=1, seq=0)
    await again.step(submit.stream, 0, [6], FinishCode.LENGTH, epoch=2)
    await reading
    assert stream.token_ids == [6]
    await again.close()


async def test_killed_engine_is_lost_and_found_again(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    process = scripted_engine_process(folder, "engine", step_ms=20)
    process.start()
    served = await start_gateway(process.address, tokenizer_address)
    stream = served.client.generate("Hello", max_tokens=2000)
    reading = asyncio.create_task(stream.text())
    while not stream.token_ids:
        await asyncio.sleep(0.01)
    process.kill()
    process.start()
    await assert_lost(reading)
    await served.client.wait_until_ready(30)
    stream = served.client.generate("Hello", max_tokens=3)
    await stream.text()
    assert len(stream.token_ids) == 3
    process.kill()


async def test_beats_name_the_live_streams(served: RunningGateway, engine: StandInEngine) -> None:
    _, reading, number = await begin(served, engine)
    num_beats = len(engine.beats)
    while len(engine.beats) == num_beats:
        await asyncio.sleep(0.05)
    assert engine.beats[-1] == [number]
    await finish(engine, number, 1)
    await reading


async def test_server_info_tells_the_load(served: RunningGateway, engine: StandInEngine) -> None:
    counters = EngineCounters(*range(11, 23), refusals={"KV_EXHAUSTED": 23})
    beat = msgspec.structs.replace(BEAT, num_swapped=6, num_cached_blocks=7, counters=counters)
    await engine.send(beat)
    _, reading, number = await begin(served, engine)
    info = await served.client.server_info()
    assert info.num_active_requests == 1
    assert not info.draining
    (state,) = info.engines
    assert (state.engine_id, state.ready, state.epoch) == ("stand-in", True, 1)
    assert (state.num_steps, state.num_running, state.num_waiting) == (9, 2, 3)
    assert (state.num_blocks, state.num_used_blocks, state.num_preemptions) == (64, 4, 5)
    assert (state.num_swapped, state.num_cached_blocks, state.num_free_blocks) == (6, 7, 53)
    assert (state.num_prefill_tokens, state.num_decode_tokens) == (11, 12)
    assert (state.num_queried_tokens, state.num_hit_tokens) == (13, 14)
    assert (state.num_recomputes, state.num_swaps) == (15, 16)
    assert (state.num_swapped_out_blocks, state.num_swapped_in_blocks) == (17, 18)
    assert (state.num_copied_blocks, state.num_evicted_blocks) == (19, 20)
    assert (state.num_expired_waiting, state.num_expired_running) == (21, 22)
    assert dict(state.refusals) == {"KV_EXHAUSTED": 23}
    await finish(engine, number, 1)
    await reading


@pytest.mark.parametrize(
    "answer",
    [
        HelloRefused("no"),
        msgspec.structs.replace(ENGINE_WELCOME, protocol_version=99),
        msgspec.structs.replace(ENGINE_WELCOME, tokenizer_hash="other"),
    ],
    ids=["refused", "version", "tokenizer"],
)
async def test_engine_that_does_not_fit_is_not_used(
    folder: Path, tokenizer: StandInTokenizer, start_gateway: StartGateway, answer: Any
) -> None:
    engine = StandInEngine(f"ipc://{folder}/engine", answer)
    served = await start_gateway(f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer", ready=False)
    while not (engine.num_hellos and tokenizer.num_hellos):
        await asyncio.sleep(0.01)
    with pytest.raises(RequestFailed, match="ENGINE_STARTING"):
        await served.client.generate([5]).text()
    with pytest.raises(RequestFailed, match="DEADLINE_EXCEEDED"):
        await served.client.wait_until_ready(0.2)
    await engine.close()
