"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from mini_infer.cli.main import main

if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is imported, which `transformers` does early, whether kernels are
    # compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

RunMain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[RunMain]:
    """Runs `mini-infer` with some arguments in this process; gives exit code, stdout, stderr."""

    def run_main(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        code = exit_info.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    yield run_main
    structlog.reset_defaults()  # a command sets up the logs of its process
