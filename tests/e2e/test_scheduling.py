"""Scheduling as clients of `serve` see it: shared prefixes, choices, classes, deadlines."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from e2e.conftest import Server
from mini_infer import AsyncClient, Client, EngineConfig, LLMEngine
from mini_infer.client import RequestFailed
from mini_infer.errors import ErrorReason

SYSTEM = "Once upon a time there was a fox who lived in a big forest. " * 6


def cached_tokens(client: Client, prompt: str, **options: object) -> int:
    stream = client.generate(prompt, max_tokens=4, temperature=0.0, **options)
    stream.text()
    assert stream.usage is not None
    assert stream.accounting is not None
    assert stream.accounting.num_cached_tokens == stream.usage.num_cached_tokens
    return stream.usage.num_cached_tokens


def test_usage_tells_what_was_cached_and_salts_keep_apart(server: str) -> None:
    with Client(server) as client:
        salt = f"salt-{time.monotonic_ns()}"
        first = cached_tokens(client, SYSTEM + "One day", cache_salt=salt)
        second = cached_tokens(client, SYSTEM + "The next day", cache_salt=salt)
        other = cached_tokens(client, SYSTEM + "The next day", cache_salt=salt + "x")
        num_tokens = len(client.tokenize(SYSTEM))
    assert (first, other) == (0, 0)
    assert num_tokens - 17 <= second <= num_tokens + 1
    assert second % 16 == 0


def test_choices_are_the_requests_of_their_seeds(server: str) -> None:
    options = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    with Client(server) as client:
        stream = client.generate("Once upon a time", n=4, seed=11, **options)
        list(stream)
        alone = []
        for seed in range(11, 15):
            single = client.generate("Once upon a time", seed=seed, **options)
            alone.append((single.text(), single.token_ids))
        assert [(choice.text, choice.token_ids) for choice in stream.choices] == alone
        assert stream.usage is not None
        assert stream.usage.num_output_tokens == 4 * 24
    with LLMEngine(EngineConfig(max_num_seqs=4, kv_cache_tokens=2048)) as engine:
        outputs = engine.generate("Once upon a time", n=4, seed=11, **options)
    assert [output.choice_index for output in outputs] == [0, 1, 2, 3]
    assert [output.text for output in outputs] == [text for text, _ in alone]


def test_an_unreachable_deadline_is_refused_at_once_and_says_when(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server) as client:
            # A queue that takes seconds.
            busy = [
                client.generate(SYSTEM, max_tokens=150, ignore_eos=True, cache_salt=f"{index}")
                for index in range(200)
            ]
            tasks = [asyncio.create_task(stream.text()) for stream in busy]
            await asyncio.sleep(3.0)
            late = client.generate(SYSTEM, max_tokens=150, timeout=0.5, priority=1)
            with pytest.raises(RequestFailed) as failed:
                await late.text()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failed.value.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            pytest.skip("this machine is too slow to refuse anything within half a second")
        assert failed.value.reason is ErrorReason.DEADLINE_UNREACHABLE
        assert failed.value.retry_after_s is not None
        assert failed.value.retry_after_s > 0.5

    asyncio.run(main())


@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_request_that_runs_into_its_deadline_keeps_what_it_has(
    server: str, num_choices: int
) -> None:
    with Client(server) as client:
        before = client.server_info().engines[0].num_expired_running
        # So long an interval that nothing would have been sent before the end.
        stream = client.generate(
            "Once upon a time",
            n=num_choices,
            ignore_eos=True,
            stream_interval=1024,
            timeout=1.5,
        )
        with pytest.raises(RequestFailed) as failed:
            list(stream)
        assert failed.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failed.value.reason is ErrorReason.DEADLINE
        assert "deadline" in failed.value.message
        assert all(len(choice.token_ids) > 10 for choice in stream.choices)
        assert all(choice.text for choice in stream.choices)
        for _ in range(50):
            after = client.server_info().engines[0].num_expired_running
            if after == before + num_choices:
                break
            time.sleep(0.1)
        assert after == before + num_choices
