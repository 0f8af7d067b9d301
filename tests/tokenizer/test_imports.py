"""What importing the tokenizer loads, and what it must not; each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CORE = [
    "encode",
    "chat",
    "pieces",
    "stop_strings",
    "detokenize",
    "text_session",
    "grammar",
    "grammar_checks",
    "bad_words",
]


def loaded_with(module: str) -> set[str]:
    program = f"import sys, mini_infer_tokenizer.{module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["server", "__main__"])
def test_the_process_loads_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "grpc"} & loaded_with(module)


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_sockets(module: str) -> None:
    assert not {"torch", "transformers", "zmq", "structlog"} & loaded_with(module)
