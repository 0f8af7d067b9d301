"""Continuous batching, preemption, cancellation and restarts as clients of `serve` see them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from e2e.conftest import Server, serving
from mini_infer import AsyncClient, EngineConfig, LLMEngine
from mini_infer.client import AsyncGenerationStream, RequestFailed

LENGTHS = [8 * (index + 1) for index in range(16)]
PROMPTS = [f"Once upon a time{' there was a' * (index % 4)}" for index in range(16)]


async def settled(client: AsyncClient, done: Callable[[object], bool]) -> object:
    """The engine's state as soon as it is as asked; beats bring it twice a second."""
    end = time.monotonic() + 20
    while True:
        (engine,) = (await client.server_info()).engines
        if done(engine):
            return engine
        assert time.monotonic() < end, engine
        await asyncio.sleep(0.1)


def idle(engine: object) -> bool:
    return engine.num_running == engine.num_waiting == engine.num_used_blocks == 0  # type: ignore[attr-defined]


async def num_steps(client: AsyncClient) -> int:
    """Steps so far, of an engine at rest whose last beat is younger than its last step."""
    await settled(client, idle)
    await asyncio.sleep(1.2)
    engine = await settled(client, idle)
    return engine.num_steps  # type: ignore[attr-defined, no-any-return]


async def greedy(client: AsyncClient, prompt: str, num_tokens: int) -> str:
    stream = client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return await stream.text()


async def first_chunk(stream: AsyncGenerationStream) -> None:
    async for _ in stream:
        return


def run(address: str, check: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncClient(address) as client:
            await check(client)

    asyncio.run(main())


def test_sixteen_requests_take_hardly_more_steps_than_the_longest(server: str) -> None:
    async def check(client: AsyncClient) -> None:
        before = await num_steps(client)
        await asyncio.gather(
            *(greedy(client, prompt, n) for prompt, n in zip(PROMPTS, LENGTHS, strict=True))
        )
        assert await num_steps(client) - before <= 1.2 * max(LENGTHS)

    run(server, check)


def test_a_late_request_gets_its_first_token_before_a_long_one_ends(server: str) -> None:
    async def check(client: AsyncClient) -> None:
        long = client.generate("Once upon a time", max_tokens=1000, temperature=0, ignore_eos=True)
        await first_chunk(long)
        assert await greedy(client, "The fox", 8)
        assert long.finish_reason is None
        long.cancel()
        await settled(client, idle)

    run(server, check)


def test_cancelled_and_abandoned_streams_free_their_blocks(server: str) -> None:
    async def check(client: AsyncClient) -> None:
        streams = [
            client.generate(prompt, max_tokens=3000, temperature=1.0, ignore_eos=True)
            for prompt in PROMPTS
        ]
        for stream in streams:
            await first_chunk(stream)
        engine = await settled(client, lambda each: each.num_running == len(streams))
        assert engine.num_used_blocks >= len(streams)  # type: ignore[attr-defined]
        for stream in streams[::2]:
            stream.cancel()
        await settled(client, lambda each: each.num_running == len(streams) // 2)
        await client.abort(streams[1].request_id)
        await streams[1].text()
        assert streams[1].finish_reason == "aborted"
        for stream in streams[3::2]:
            stream.cancel()
        await settled(client, idle)

    run(server, check)


def test_blocks_for_four_sequences_serve_sixteen_with_the_same_text(tmp_path: Path) -> None:
    num_tokens = 64
    with LLMEngine(EngineConfig(kv_cache_tokens=8192)) as engine:
        outputs = engine.generate(PROMPTS, max_tokens=num_tokens, temperature=0, ignore_eos=True)
    longest = max(len(output.prompt_token_ids) for output in outputs) + num_tokens
    num_blocks = 4 * -(-longest // 16)

    async def check(client: AsyncClient) -> None:
        texts = await asyncio.gather(*(greedy(client, prompt, num_tokens) for prompt in PROMPTS))
        assert list(texts) == [output.text for output in outputs]
        engine = await settled(client, idle)
        assert engine.num_blocks == num_blocks  # type: ignore[attr-defined]
        assert engine.num_preemptions > 0  # type: ignore[attr-defined]

    with serving(tmp_path / "stderr", f"--kv-cache-tokens={num_blocks * 16}") as server:
        run(server.address, check)


def child_of(server: Server, command: str) -> psutil.Process:
    (child,) = (each for each in server.process.children() if command in each.cmdline())
    return child


async def greedy_once_it_serves(client: AsyncClient) -> str:
    for _ in range(200):
        try:
            return await greedy(client, "Once upon a time", 20)
        except RequestFailed as error:
            if error.code.name != "UNAVAILABLE":
                raise
            await asyncio.sleep(0.2)
    raise TimeoutError("it does not serve again")


@pytest.mark.parametrize("command", ["engine", "tokenizer", "gateway"])
def test_a_killed_process_is_restarted_and_serves_again(tmp_path: Path, command: str) -> None:
    async def check(client: AsyncClient) -> None:
        expected = await greedy(client, "Once upon a time", 20)
        victim = child_of(server, command)
        stream = client.generate("Once upon", max_tokens=1000, temperature=0, ignore_eos=True)
        await first_chunk(stream)
        victim.kill()
        if command == "tokenizer":  # the stream goes on as if nothing had been
            await stream.text()
            assert len(stream.token_ids) == 1000
        else:
            with pytest.raises(RequestFailed) as failed:
                await stream.text()
            assert failed.value.code.name == "UNAVAILABLE"
        assert await greedy_once_it_serves(client) == expected
        assert child_of(server, command).pid != victim.pid

    with serving(tmp_path / "stderr") as server:
        run(server.address, check)


def broken_folders(tmp_path: Path) -> dict[str, str]:
    """Model folders that cannot be served, and a word of the sentence that says so."""
    demo = EngineConfig().model_folder
    names = ["pickled", "truncated", "remote-code", "architecture"]
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        folder.mkdir()
        for file in demo.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    (folders["pickled"] / "model.safetensors").rename(folders["pickled"] / "pytorch_model.bin")
    os.truncate(folders["truncated"] / "model.safetensors", 100_000)
    for name, old, new in [
        ("remote-code", '"architectures"', '"auto_map": {"AutoModel": "x.Y"}, "architectures"'),
        ("architecture", "LlamaForCausalLM", "MambaForCausalLM"),
    ]:
        config = folders[name] / "config.json"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    words = ["safetensors", "model.safetensors", "auto_map", "MambaForCausalLM"]
    found = {str(folders[name]): word for name, word in zip(names, words, strict=True)}
    return {**found, str(tmp_path / "missing"): "does not exist"}


def test_model_folders_that_cannot_be_served_are_one_sentence(tmp_path: Path) -> None:
    for folder, word in broken_folders(tmp_path).items():
        command = [sys.executable, "-m", "mini_infer.cli.main", "serve", "--port=0"]
        done = subprocess.run(
            [*command, "--model", folder], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_lets_running_streams_finish(tmp_path: Path) -> None:
    async def check(client: AsyncClient) -> None:
        streams = [
            client.generate(prompt, max_tokens=200, temperature=0, ignore_eos=True)
            for prompt in PROMPTS
        ]
        for stream in streams:
            await first_chunk(stream)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(stream.text() for stream in streams))
        assert {len(stream.token_ids) for stream in streams} == {200}

    with serving(tmp_path / "stderr") as server:
        run(server.address, check)
