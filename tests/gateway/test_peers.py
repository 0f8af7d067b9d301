from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from gateway.harness import StartGateway
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine
from mini_infer.client import RequestFailed
from mini_infer.messages import FinishCode, Submit


async def test_requests_go_to_the_engine_with_the_fewest_streams(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    welcomes = [
        ENGINE_WELCOME,
        msgspec.structs.replace(ENGINE_WELCOME, engine_id="second"),
        msgspec.structs.replace(ENGINE_WELCOME, engine_id="other model", fingerprint="0"),
    ]
    addresses = tuple(f"ipc://{folder}/engine{index}" for index in range(3))
    engines = [
        StandInEngine(address, welcome)
        for address, welcome in zip(addresses, welcomes, strict=True)
    ]
    served = await start_gateway(addresses, tokenizer_address)
    while not all(link.welcome for link in served.gateway.peers.engine_links):
        await asyncio.sleep(0.01)
    readings = [asyncio.create_task(served.client.generate([5]).text()) for _ in range(4)]
    running = [(engine, (await engine.next(Submit)).stream) for engine in engines[:2] * 2]
    for engine, number in running:
        await engine.step(number, 0, [5], FinishCode.LENGTH)
    await asyncio.gather(*readings)
    assert len({number for _, number in running}) == 4
    assert not engines[2].received
    info = await served.client.server_info()
    assert [each.engine_id for each in info.engines] == ["stand-in", "second", "other model"]
    for engine in engines:
        await engine.close()


@pytest.mark.parametrize("vocab_size", [4095, 4097])
async def test_engine_takes_every_id_of_the_tokenizer(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway, vocab_size: int
) -> None:
    """It may take more: vocabularies are padded."""
    welcome = msgspec.structs.replace(ENGINE_WELCOME, vocab_size=vocab_size)
    engine = StandInEngine(f"ipc://{folder}/engine", welcome)
    is_large_enough = vocab_size >= 4096
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address, ready=is_large_enough)
    links = [*served.gateway.peers.engine_links, *served.gateway.peers.tokenizer_links]
    while not all(link.welcome for link in links):
        await asyncio.sleep(0.01)
    if is_large_enough:
        assert await served.client.tokenize("a fox")
    else:
        with pytest.raises(RequestFailed, match="takes 4095 token ids and its tokenizer makes 40"):
            await served.client.tokenize("a fox")
    await engine.close()
