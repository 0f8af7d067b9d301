"""A stand-in server with clients of it, a stand-in Hub, and look-ups of Hub ids.

`huggingface_hub` reads the environment once, when it is imported: so every look-up has a process,
with the variables that people set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from common.stand_in_hub import WAIT_S, Outcome, Resolve, StandInHub
from common.stand_in_service import Blocking, Script
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from mini_infer import Client
from mini_infer.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server

RESOLVE = """
import json, sys
from mini_infer.errors import ConfigError
from mini_infer.hub import resolve_model

model, revision, weights = json.loads(sys.argv[1])
progress = []
try:
    folder = resolve_model(
        model, revision, weights=weights, on_progress=lambda *each: progress.append(each)
    )
    print(json.dumps({"folder": str(folder), "progress": progress}))
except ConfigError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub().serve() as hub:
        yield hub


@pytest.fixture
def environment(hub: StandInHub, tmp_path: Path) -> dict[str, str]:
    """Of processes that know the stand-in alone."""
    of_the_hub = ("HF_", "HUGGING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_the_hub)}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def resolve(environment: dict[str, str], tmp_path: Path) -> Resolve:
    def run(
        model: str = "org/name", revision: str = "", *, weights: bool = True, **extra: str
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", RESOLVE, json.dumps([model, revision, weights])],
            env={**environment, **extra},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        progress = [tuple(each) for each in result.get("progress", [])]
        folder = Path(result["folder"]) if "folder" in result else None
        return Outcome(folder, result.get("error", ""), progress, done.stderr)

    return run


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def health() -> HealthServicer:
    return HealthServicer()


@pytest.fixture
def address(script: Script, health: HealthServicer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_InferenceServiceServicer_to_server(script, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    with request.param(address) as made:
        yield made
