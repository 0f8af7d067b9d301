"""The gateway process: its parts put together, its start, and its end without losing anybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable

import grpc
import structlog
import uvloop
import zmq
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, enable_server_reflection
from mini_infer.config import GatewayConfig
from mini_infer.errors import ConfigError, MiniInferError
from mini_infer.messages import from_engine_decoder, from_tokenizer_decoder
from mini_infer.v1 import inference_service_pb2

from mini_infer_gateway.admission import Admission
from mini_infer_gateway.engine_link import EngineLink
from mini_infer_gateway.health import Health
from mini_infer_gateway.peer_socket import PeerSocket
from mini_infer_gateway.peers import Peers
from mini_infer_gateway.service import InferenceService
from mini_infer_gateway.tokenizer_link import TokenizerLink

_log = structlog.get_logger()

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
MAX_METADATA_BYTES = 16 * 2**10
MIN_CLIENT_PING_INTERVAL_MS = 30_000
MAX_CONNECTION_IDLE_MS = 600_000
STOP_GRACE_S = 1.0
"""How long the last statuses may take to reach their clients."""


class Gateway:
    """One gateway. `start`, then `drain`, then `stop`, all on one loop."""

    def __init__(self, config: GatewayConfig) -> None:
        """Puts the parts together; must be called on the loop that runs them.

        Raises:
            ConfigError: Where a setting cannot be used.
        """
        if not config.engine_addresses or not config.tokenizer_addresses:
            raise ConfigError("a gateway needs the address of an engine and of a tokenizer")
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._readiness_changed = asyncio.Event()
        self.admission = Admission(config.max_concurrent_requests)
        self.peers = self._make_peers(f"gateway-{os.getpid()}-{secrets.token_hex(8)}")
        self._health = Health(self._is_ready, self._readiness_changed)
        self._server = grpc.aio.server(options=_server_options(config))

    async def start(self) -> str:
        """Listens, and begins to look for engine and tokenizer.

        Returns:
            Host and port.

        Raises:
            ConfigError: Where the port cannot be bound.
        """
        service = InferenceService(self._config, self.peers, self.admission)
        self._server.add_generic_rpc_handlers((service.handlers(),))
        add_HealthServicer_to_server(self._health.servicer, self._server)
        services = [
            *inference_service_pb2.DESCRIPTOR.services_by_name.values(),
            *health_pb2.DESCRIPTOR.services_by_name.values(),
        ]
        enable_server_reflection(
            [*(each.full_name for each in services), SERVICE_NAME], self._server
        )
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {host}:{self._config.port}: choose another --port"
            ) from error
        self._tasks = [
            asyncio.create_task(self.peers.run(), name="peers"),
            asyncio.create_task(self._health.run(), name="health"),
        ]
        await self._health.publish()
        await self._server.start()
        if self._config.insecure and self._config.host not in LOOPBACK_HOSTS:
            _log.warning("every machine that reaches the port may use this server", host=host)
        return f"{host}:{port}"

    async def wait_until(self, told_to_stop: asyncio.Event) -> None:
        """Waits for the event; a part that breaks before it ends the process with its error."""
        stop = asyncio.create_task(told_to_stop.wait())
        await asyncio.wait([stop, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in self._tasks:
            if task.done():
                task.result()

    async def drain(self) -> None:
        """Takes no more calls and waits for the running ones, as long as the settings allow."""
        self.admission.shut()
        self._readiness_changed.set()
        await self.admission.drain(self._config.drain_grace_s)

    async def stop(self) -> None:
        """Ends every call and closes every socket."""
        await self._server.stop(STOP_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.peers.close()
        self._context.term()

    def _is_ready(self) -> bool:
        if self.admission.is_draining:
            return False
        with contextlib.suppress(MiniInferError):
            self.peers.model()
            return True
        return False

    def _make_peers(self, gateway_id: str) -> Peers:
        changed = self._readiness_changed
        engine_links = [
            EngineLink(PeerSocket(self._context, address, gateway_id, from_engine_decoder), changed)
            for address in self._config.engine_addresses
        ]
        tokenizer_links = [
            TokenizerLink(
                PeerSocket(self._context, address, gateway_id, from_tokenizer_decoder), changed
            )
            for address in self._config.tokenizer_addresses
        ]
        return Peers(engine_links, tokenizer_links)


async def serve(config: GatewayConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, and then until the running calls have ended.

    Args:
        config: The settings.
        on_ready: Called with "host:port" as soon as the port is open, before the engine is ready.

    Raises:
        ConfigError: Where the process cannot start with these settings.
    """
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    gateway = Gateway(config)
    try:
        address = await gateway.start()
        _log.info("listening", address=address)
        if on_ready is not None:
            on_ready(address)
        await gateway.wait_until(told_to_stop)
        _log.info("draining", active_requests=gateway.admission.num_active)
        await gateway.drain()
    finally:
        await gateway.stop()


def run(config: GatewayConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Runs a gateway process; returns when it has drained.

    Args:
        config: The settings.
        on_ready: Called with "host:port" as soon as the port is open, before the engine is ready.

    Raises:
        ConfigError: Where the process cannot start with these settings.
    """
    uvloop.run(serve(config, on_ready))


def _server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_INTERVAL_MS),
        ("grpc.max_connection_idle_ms", MAX_CONNECTION_IDLE_MS),
        # A second server on the same port is a mistake, not a second worker.
        ("grpc.so_reuseport", 0),
    ]
