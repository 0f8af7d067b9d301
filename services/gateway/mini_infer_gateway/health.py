"""grpc.health.v1: says whether the process lives, and whether it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio  # type: ignore[attr-defined]

LIVENESS = "liveness"
READINESS_NAMES = ("", "readiness", "mini_infer.v1.InferenceService")
"""Names that serve only while requests can be served. Kubernetes asks for "readiness"."""


class Health:
    """Keeps the health service's answers true."""

    def __init__(self, is_ready: Callable[[], bool], readiness_changed: asyncio.Event) -> None:
        """Takes what decides.

        Args:
            is_ready: Whether requests can be served now.
            readiness_changed: Set when `is_ready` may tell something new.
        """
        self.servicer = aio.HealthServicer()
        self._is_ready = is_ready
        self._readiness_changed = readiness_changed

    async def publish(self) -> None:
        """Brings the answers up to date."""
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self._is_ready()
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in READINESS_NAMES:
            await self.servicer.set(name, status)

    async def run(self) -> None:
        """Publishes at each change until cancelled."""
        while True:
            self._readiness_changed.clear()
            await self.publish()
            await self._readiness_changed.wait()
