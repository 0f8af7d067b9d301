"""Gateways over real sockets, with real processes or stand-ins behind them."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import (
    RunningGateway,
    StartGateway,
    scripted_engine_process,
    talkative_model,
    tokenizer_process,
)
from gateway.stand_ins import StandInEngine, StandInTokenizer
from mini_infer import AsyncClient
from mini_infer.config import GatewayConfig
from mini_infer_gateway.server import Gateway

READY_TIMEOUT_S = 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder with a short path: socket paths hold 107 characters."""
    with tempfile.TemporaryDirectory(prefix="mi-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mi-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def tokenizer_address(shared_folder: Path) -> Iterator[str]:
    """A real tokenizer process."""
    process = tokenizer_process(shared_folder)
    process.start()
    yield process.address
    process.kill(signal.SIGTERM)


@pytest.fixture(scope="session")
def talkative_tokenizer() -> Iterator[str]:
    """A real tokenizer process whose chat templates write out what they are given."""
    with tempfile.TemporaryDirectory(prefix="mi-") as path:
        process = tokenizer_process(Path(path), talkative_model(Path(path)))
        process.start()
        yield process.address
        process.kill(signal.SIGTERM)


@pytest.fixture(scope="session")
def engine_address(shared_folder: Path) -> Iterator[str]:
    """A real engine process whose tokens are a formula, one a step of 2 ms."""
    process = scripted_engine_process(shared_folder, "engine", step_ms=2)
    process.start()
    yield process.address
    process.kill(signal.SIGTERM)


@pytest.fixture
async def start_gateway() -> AsyncIterator[StartGateway]:
    """Starts gateways in this process; stops them after the test."""
    running: list[RunningGateway] = []

    async def start(
        engine: str | tuple[str, ...], tokenizer: str, *, ready: bool = True, **settings: Any
    ) -> RunningGateway:
        engines = (engine,) if isinstance(engine, str) else engine
        config = GatewayConfig(
            port=0, engine_addresses=engines, tokenizer_addresses=(tokenizer,), **settings
        )
        gateway = Gateway(config)
        address = await gateway.start()
        running.append(RunningGateway(gateway, address, AsyncClient(address)))
        if ready:
            await running[-1].client.wait_until_ready(READY_TIMEOUT_S)
        return running[-1]

    yield start
    for each in running:
        await each.client.close()
        await each.gateway.stop()


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[StandInEngine]:
    """A stand-in engine at `ipc://<folder>/engine`."""
    stand_in = StandInEngine(f"ipc://{folder}/engine")
    yield stand_in
    await stand_in.close()


@pytest.fixture
async def tokenizer(folder: Path) -> AsyncIterator[StandInTokenizer]:
    """A stand-in tokenizer at `ipc://<folder>/tokenizer`."""
    stand_in = StandInTokenizer(f"ipc://{folder}/tokenizer")
    yield stand_in
    await stand_in.close()


@pytest.fixture
async def served(
    folder: Path, engine: StandInEngine, tokenizer_address: str, start_gateway: StartGateway
) -> RunningGateway:
    """A gateway with a stand-in engine and the real tokenizer process."""
    return await start_gateway(f"ipc://{folder}/engine", tokenizer_address)


@pytest.fixture
async def faked(
    folder: Path,
    engine: StandInEngine,
    tokenizer: StandInTokenizer,
    start_gateway: StartGateway,
) -> RunningGateway:
    """A gateway between two stand-ins."""
    return await start_gateway(f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer")


@pytest.fixture
async def scripted(
    engine_address: str, tokenizer_address: str, start_gateway: StartGateway
) -> RunningGateway:
    """A gateway with the scripted engine and the real tokenizer process."""
    return await start_gateway(engine_address, tokenizer_address)
