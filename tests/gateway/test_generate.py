"""Generate as a client sees it, with real engine and tokenizer processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway.harness import (
    RunningGateway,
    StartGateway,
    expected_ids,
    generate,
    scripted_engine_process,
)
from mini_infer.v1 import generate_pb2


async def test_stream_has_the_promised_shape(scripted: RunningGateway) -> None:
    messages, trailers = await generate(
        scripted,
        text="Once upon a time",
        request_id="story-1",
        sampling=generate_pb2.SamplingOptions(seed=7),
        stopping=generate_pb2.StoppingOptions(max_tokens=12),
    )
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert [message.WhichOneof("event") for message in messages[-2:]] == [
        "choice_finished",
        "finished",
    ]
    assert {message.WhichOneof("event") for message in messages[:-2]} == {"delta"}
    assert messages[0].request_id == "story-1"
    prompt_ids = await scripted.client.tokenize("Once upon a time")
    assert messages[0].num_prompt_tokens == len(prompt_ids)
    for message in messages[1:]:
        assert not message.HasField("request_id")
        assert not message.HasField("num_prompt_tokens")
    assert messages[-2].choice_finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert messages[-2].choice_finished.num_output_tokens == 12
    assert messages[-1].finished.seed == 7
    assert messages[-1].finished.usage.num_prompt_tokens == len(prompt_ids)
    assert messages[-1].finished.usage.num_output_tokens == 12
    assert set(trailers) >= {
        "mini-infer-queue-ms",
        "mini-infer-prefill-ms",
        "mini-infer-decode-ms",
        "mini-infer-cached-tokens",
        "mini-infer-preemptions",
    }
    assert trailers["mini-infer-steps"] == "12"


async def test_text_is_the_text_of_the_ids(scripted: RunningGateway) -> None:
    stream = scripted.client.generate("A fox", seed=11, max_tokens=64)
    text = await stream.text()
    assert stream.token_ids == expected_ids(11, 64)
    assert text == await scripted.client.detokenize(stream.token_ids)


async def test_ids_only_skips_the_tokenizer(scripted: RunningGateway) -> None:
    stream = scripted.client.generate([5, 6, 7], seed=3, max_tokens=20, ids_only=True)
    chunks = [chunk async for chunk in stream]
    assert stream.token_ids == expected_ids(3, 20)
    assert {chunk.text for chunk in chunks} == {""}


async def test_many_streams_do_not_mix(scripted: RunningGateway) -> None:
    async def one(seed: int) -> list[int]:
        stream = scripted.client.generate("Hello", seed=seed, max_tokens=24)
        await stream.text()
        return stream.token_ids

    outputs = await asyncio.gather(*(one(seed) for seed in range(32)))
    assert outputs == [expected_ids(seed, 24) for seed in range(32)]


async def test_seed_is_drawn_and_told(scripted: RunningGateway) -> None:
    streams = [scripted.client.generate("Hello", max_tokens=4) for _ in range(2)]
    for stream in streams:
        await stream.text()
        assert stream.seed is not None
        assert stream.token_ids == expected_ids(stream.seed, 4)
    assert streams[0].seed != streams[1].seed


async def test_max_tokens_defaults_to_what_the_context_holds(scripted: RunningGateway) -> None:
    info = await scripted.client.model_info()
    prompt = [5] * (info.max_context_tokens - 3)
    stream = scripted.client.generate(prompt)
    await stream.text()
    assert len(stream.token_ids) == 3
    assert stream.finish_reason == "length"


async def test_chat_is_rendered(scripted: RunningGateway) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    stream = scripted.client.generate(messages, max_tokens=1)
    await stream.text()
    assert stream.num_prompt_tokens == len(await scripted.client.tokenize(messages))


@pytest.fixture(scope="module")
def rows_of_three(shared_folder: Path) -> Iterator[str]:
    process = scripted_engine_process(shared_folder, "rows", step_ms=40, tokens_per_row=3)
    process.start()
    yield process.address
    process.kill()


async def test_rows_of_several_tokens_arrive_whole_as_they_are_made(
    rows_of_three: str, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    served = await start_gateway(rows_of_three, tokenizer_address)
    loop = asyncio.get_running_loop()
    stream = served.client.generate([5], seed=1, max_tokens=18, ids_only=True)
    times, sizes = [], []
    async for chunk in stream:
        times.append(loop.time())
        sizes.append(len(chunk.token_ids))
    assert stream.token_ids == expected_ids(1, 18)
    assert all(size % 3 == 0 for size in sizes)
    # A busy machine may merge steps, so only the whole is timed: six steps of 40 ms.
    assert times[-1] - times[0] > 0.15


async def test_stream_interval_holds_tokens_together(scripted: RunningGateway) -> None:
    stream = scripted.client.generate("Hello", seed=1, max_tokens=25, stream_interval=10)
    sizes = [len(chunk.token_ids) async for chunk in stream]
    assert sum(sizes) == 25
    assert all(size >= 10 for size in sizes[:-1])
    assert len(sizes) <= 3
