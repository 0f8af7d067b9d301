"""The process around the service: health, reflection, start, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import structlog
from gateway.harness import RunningGateway, StartGateway, begin, failure
from gateway.stand_ins import StandInEngine, StandInTokenizer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mini_infer import AsyncClient
from mini_infer.client import RequestFailed
from mini_infer.client_wire import request_failed
from mini_infer.config import GatewayConfig
from mini_infer.errors import ConfigError, ErrorReason
from mini_infer.messages import Abort, EngineBeat, FinishCode, HelloNeeded
from mini_infer_gateway.server import Gateway

READINESS = ["", "readiness", "mini_infer.v1.InferenceService"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(served: RunningGateway) -> dict[str, int]:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return {
            name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in [*READINESS, "liveness"]
        }


async def until(served: RunningGateway, status: int) -> None:
    while (await health(served))["readiness"] != status:
        await asyncio.sleep(0.01)
    assert await health(served) == {**dict.fromkeys(READINESS, status), "liveness": SERVING}


async def test_readiness_needs_both_peers(folder: Path, start_gateway: StartGateway) -> None:
    addresses = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
    served = await start_gateway(*addresses, ready=False)
    await until(served, NOT_SERVING)
    with pytest.raises(RequestFailed, match="ENGINE_STARTING"):
        await served.client.model_info()
    assert not (await served.client.server_info()).engines[0].ready
    engine = StandInEngine(addresses[0])
    while not engine.num_hellos:
        await asyncio.sleep(0.01)
    await until(served, NOT_SERVING)
    tokenizer = StandInTokenizer(addresses[1])
    await until(served, SERVING)
    tokenizer.welcome = None
    await tokenizer.send(HelloNeeded())
    await until(served, NOT_SERVING)
    await engine.close()
    await tokenizer.close()


async def test_reflection_lists_the_services(
    folder: Path, engine: StandInEngine, tokenizer: StandInTokenizer, start_gateway: StartGateway
) -> None:
    served = await start_gateway(f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer")
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        async for answer in call:
            names = {each.name for each in answer.list_services_response.service}
    assert names == {
        "mini_infer.v1.InferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_drain_finishes_what_runs_and_refuses_what_comes(
    served: RunningGateway, engine: StandInEngine
) -> None:
    stream, reading, number = await begin(served, engine)
    draining = asyncio.create_task(served.gateway.drain())
    await until(served, NOT_SERVING)
    with pytest.raises(RequestFailed) as caught:
        await served.client.generate([5]).text()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.reason is ErrorReason.DRAINING
    assert caught.value.retry_after_s is not None
    assert (await served.client.server_info()).draining
    await engine.step(number, 1, [6], FinishCode.LENGTH)
    await reading
    await draining
    assert stream.token_ids == [5, 6]


async def test_drain_ends_what_takes_longer_than_the_grace(
    folder: Path, engine: StandInEngine, tokenizer_address: str, start_gateway: StartGateway
) -> None:
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address, drain_grace_s=0.1)
    _, reading, number = await begin(served, engine)
    await served.gateway.drain()
    assert await engine.next(Abort) == Abort([number])
    await asyncio.wait([reading])
    assert failure(reading).code is grpc.StatusCode.UNAVAILABLE
    assert failure(reading).reason is ErrorReason.DRAINING


async def test_taken_port_is_a_config_error(folder: Path, start_gateway: StartGateway) -> None:
    addresses = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
    served = await start_gateway(*addresses, ready=False)
    port = int(served.address.rpartition(":")[2])
    config = GatewayConfig(
        port=port, engine_addresses=addresses[:1], tokenizer_addresses=addresses[1:]
    )
    second = Gateway(config)
    with pytest.raises(ConfigError, match="cannot listen on"):
        await second.start()
    await second.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_open_server_warns(folder: Path, start_gateway: StartGateway, host: str) -> None:
    addresses = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
    with structlog.testing.capture_logs() as logs:
        await start_gateway(*addresses, ready=False, host=host, insecure=True)
    warnings = [line["host"] for line in logs if line["log_level"] == "warning"]
    assert warnings == ([host] if host == "0.0.0.0" else [])


@pytest.mark.parametrize(
    ("method", "content"),
    [
        *((each, b"\x0a\x01\xff") for each in ("Generate", "Tokenize", "Abort")),  # Not UTF-8.
        *((each, b"\xff") for each in ("Generate", "Detokenize", "GetModelInfo", "GetServerInfo")),
    ],
)
async def test_bytes_that_are_no_request_are_an_invalid_argument(
    folder: Path, start_gateway: StartGateway, method: str, content: bytes
) -> None:
    addresses = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
    served = await start_gateway(*addresses, ready=False)
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.unary_unary(f"/mini_infer.v1.InferenceService/{method}")(content)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    failed = request_failed(caught.value)
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.reason is ErrorReason.INVALID_FIELD
    assert [each.field for each in failed.violations] == ["request"]


async def test_addresses_are_needed() -> None:
    with pytest.raises(ConfigError, match="address"):
        Gateway(GatewayConfig(port=0))


async def test_process_drains_on_sigterm_and_logs_one_line_a_request(
    folder: Path, engine_address: str, tokenizer_address: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "mini_infer_gateway", "--port", "0"),
        *("--engine-addresses", engine_address, "--tokenizer-addresses", tokenizer_address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().split()[-1]
    async with AsyncClient(address) as client:
        await client.wait_until_ready(20)
        await client.generate("a secret prompt", max_tokens=3, request_id="first").text()
        stream = client.generate("Once", max_tokens=200, request_id="second")
        reading = asyncio.create_task(stream.text())
        while not stream.token_ids:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        await reading
        assert len(stream.token_ids) == 200
    stdout, stderr = await process.communicate()
    assert process.returncode == 0
    assert stdout == b""
    lines = [json.loads(line) for line in stderr.splitlines()]
    finished = [line for line in lines if line["event"] == "request finished"]
    assert [line["request_id"] for line in finished] == ["first", "second"]
    for line in finished:
        assert (line["status"], line["reason"]) == ("OK", None)
        assert line["ttft_ms"] > 0
    assert [line["output_tokens"] for line in finished] == [3, 200]
    assert b"secret" not in stderr


async def test_bug_in_one_call_is_an_internal_error_of_that_call(
    served: RunningGateway, engine: StandInEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reading, number = await begin(served, engine)
    with monkeypatch.context() as patch:
        patch.setattr(served.gateway.peers, "route", None)
        with pytest.raises(RequestFailed) as caught:
            await served.client.generate([5]).text()
    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert caught.value.reason is ErrorReason.INTERNAL_ERROR
    await engine.step(number, 1, [6], FinishCode.LENGTH)
    await reading


async def test_bug_in_one_message_takes_no_other_with_it(
    served: RunningGateway, engine: StandInEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reading, number = await begin(served, engine)
    monkeypatch.setattr(served.engine_link, "_on_beat", None)
    await engine.send(EngineBeat(1, 0, 0.0, 0, 0, 0, 0))
    await engine.step(number, 1, [6], FinishCode.LENGTH)
    await reading
    assert served.engine_link.dropped["failed_message"] == 1


async def test_part_that_breaks_ends_the_process_with_its_error(
    served: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine_link, "tick", None)
    with pytest.raises(TypeError):
        await served.gateway.wait_until(asyncio.Event())
