from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from gateway.harness import StartGateway
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine
from mini_infer.client import RequestFailed
from mini_infer.config import bundled_model
from mini_infer.messages import FinishCode, Submit
from mini_infer_tokenizer.encode import TextTokenizer


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


@pytest.mark.parametrize("distance", [-1, 0, 4000])
async def test_only_what_the_model_does_not_know_is_refused(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway, distance: int
) -> None:
    """A model may know fewer ids than its tokenizer, or more."""
    prompt = "a fox and a lantern"
    largest = max(TextTokenizer(bundled_model("demo")).encode(prompt, True))
    welcome = msgspec.structs.replace(ENGINE_WELCOME, vocab_size=largest + 1 + distance)
    engine = StandInEngine(f"ipc://{folder}/engine", welcome)
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address)
    assert max(await served.client.tokenize(prompt)) == largest
    if distance < 0:
        chat = [{"role": "user", "content": prompt}]
        for given, field in ((prompt, "text"), (chat, "chat")):
            with pytest.raises(RequestFailed, match=f"{field}: expected a text of tokens that"):
                await served.client.generate(given).text()
    else:
        reading = asyncio.create_task(served.client.generate(prompt).text())
        submit = await engine.next(Submit)
        assert max(submit.prompt_ids) == largest
        await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
        await reading
    await engine.close()
