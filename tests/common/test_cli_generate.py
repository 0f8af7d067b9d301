"""`mini-infer generate` with a server whose answers the test writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from common.stand_in_service import CHOICES, Script

RunMain = Callable[..., tuple[int, str, str]]


def test_one_completion_is_printed_alone(run: RunMain, address: str, script: Script) -> None:
    code, out, err = run("generate", f"--address={address}", "Once")
    assert (code, out, err) == (0, "Once upon\n", "")
    (request,) = [each for each in script.asked if hasattr(each, "sampling")]
    assert not any(map(request.HasField, ("priority", "cache_salt")))
    assert not request.sampling.HasField("n")


def test_completions_are_printed_one_after_another(
    run: RunMain, address: str, script: Script
) -> None:
    script.responses = list(CHOICES)
    code, out, err = run("generate", f"--address={address}", "--n=2", "--stats", "Once")
    assert (code, out) == (0, "[0]\nOnce upon\n[1]\na fox\n")
    assert "5 tokens in 4 messages" in err


@pytest.mark.parametrize("priority", [-5, 0])
def test_scheduling_options_reach_the_server(
    run: RunMain, address: str, script: Script, priority: int
) -> None:
    code, _, _ = run(
        "generate", f"--address={address}", f"--priority={priority}", "--cache-salt=s", "Once"
    )
    assert code == 0
    (request,) = [each for each in script.asked if hasattr(each, "sampling")]
    assert request.HasField("priority")
    assert (request.priority, request.cache_salt) == (priority, "s")
