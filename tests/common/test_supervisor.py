"""The supervisor with real child processes, in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import structlog
from mini_infer import supervisor
from mini_infer.supervisor import ChildProcess, ChildRefused

WAIT_S = 20.0

SUPERVISOR = """
import asyncio, json, sys
from mini_infer.errors import ConfigError
from mini_infer.supervisor import ChildProcess, ChildRefused, Supervisor

async def announce():
    if sys.argv[2] == "never":
        await asyncio.Event().wait()
    print("ready", flush=True)

children = [
    ChildProcess(name, [sys.executable, "-c", code, name, log], grace_s)
    for name, code, grace_s, log in json.loads(sys.argv[1])
]
try:
    asyncio.run(Supervisor(children).run(announce))
except ChildRefused as error:
    sys.exit(f"refused: {error}")
except ConfigError as error:
    sys.exit(f"given up: {error}")
"""

PREAMBLE = """
import os, signal, sys, time
name, log = sys.argv[1:]
def note(event):
    with open(log, "a") as file:
        file.write(f"{event} {name} {os.getpid()} {time.monotonic()}\\n")
"""
WELL_BEHAVED = f"""{PREAMBLE}
def stop(*_):
    time.sleep(0.2)
    note("stop")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("start")
while True:
    signal.pause()
"""
STUBBORN = f"""{PREAMBLE}
signal.signal(signal.SIGTERM, lambda *_: note("deaf"))
note("start")
while True:
    signal.pause()
"""
FAILING = f"""{PREAMBLE}
note("start")
sys.exit(1)
"""
REFUSING = f"""{PREAMBLE}
note("start")
sys.exit(2)
"""
REFUSING_LATER = f"""{PREAMBLE}
note("start")
sys.exit(1 if open(log).read().count("start") == 1 else 2)
"""


class Run:
    """A supervisor process and the events that its children wrote down."""

    def __init__(
        self, log: Path, children: list[tuple[str, str, float]], ready: str = "at once"
    ) -> None:
        self._log = log
        log.touch()
        plan = json.dumps([(*child, str(log)) for child in children])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, plan, ready],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def events(self, kind: str) -> list[tuple[str, int, float]]:
        """Name, process id and time of each event of a kind."""
        rows = [line.split() for line in self._log.read_text().splitlines()]
        return [(name, int(pid), float(at)) for event, name, pid, at in rows if event == kind]

    def wait_for(self, kind: str, count: int) -> list[tuple[str, int, float]]:
        wait_until(lambda: len(self.events(kind)) >= count)
        return self.events(kind)

    def end(self) -> int:
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        self.process.kill()
        for _, pid, _ in self.events("start"):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()  # ends when no child holds the pipes any more


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a supervisor of children, given as name, code and grace in seconds."""
    runs: list[Run] = []

    def start_run(*children: tuple[str, str, float], ready: str = "at once") -> Run:
        runs.append(Run(tmp_path / "events", list(children), ready))
        return runs[-1]

    yield start_run
    for run in runs:
        run.close()


def test_a_killed_child_is_started_again_and_the_others_stay(start: Callable[..., Run]) -> None:
    run = start(("a", WELL_BEHAVED, 5.0), ("b", WELL_BEHAVED, 5.0))
    pids = {name: pid for name, pid, _ in run.wait_for("start", 2)}
    os.kill(pids["a"], signal.SIGKILL)
    *_, (name, pid, _) = run.wait_for("start", 3)
    assert name == "a"
    assert pid != pids["a"]
    assert psutil.pid_exists(pids["b"])
    assert len(run.events("start")) == 3


def test_a_child_that_keeps_failing_is_started_less_and_less_often(
    start: Callable[..., Run],
) -> None:
    run = start(("a", FAILING, 5.0))
    times = [at for _, _, at in run.wait_for("start", 4)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] >= supervisor.MIN_BACK_OFF_S
    assert gaps[1] >= 2 * supervisor.MIN_BACK_OFF_S
    assert gaps[2] >= 4 * supervisor.MIN_BACK_OFF_S


async def test_a_child_that_ran_well_is_started_again_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "MIN_BACK_OFF_S", 0.01)
    monkeypatch.setattr(supervisor, "HEALTHY_S", 0.0)
    child = ChildProcess("a", ["true"], 1.0)
    with structlog.testing.capture_logs() as logged:
        have_served = asyncio.Event()
        have_served.set()
        keeper = asyncio.create_task(child.keep_running(have_served))
        while len(logged) < 4:
            await asyncio.sleep(0.01)
        keeper.cancel()
        await child.stop()
    assert {each["restart_in_s"] for each in logged} == {0.01}


def test_children_stop_one_after_the_other_last_started_first(
    start: Callable[..., Run],
) -> None:
    run = start(("a", WELL_BEHAVED, 5.0), ("b", WELL_BEHAVED, 5.0), ("c", WELL_BEHAVED, 5.0))
    run.wait_for("start", 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    stops = run.events("stop")
    assert [name for name, _, _ in stops] == ["c", "b", "a"]
    # Each takes 0.2 s to stop, and none was told before the one before it had ended.
    times = [at for _, _, at in stops]
    assert times[1] - times[0] >= 0.2
    assert times[2] - times[1] >= 0.2


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_as_well(
    start: Callable[..., Run], signal_number: signal.Signals
) -> None:
    run = start(("a", WELL_BEHAVED, 5.0))
    run.wait_for("start", 1)
    run.process.send_signal(signal_number)
    assert run.end() == 0
    assert len(run.events("stop")) == 1


def test_a_child_that_does_not_stop_is_killed_after_its_grace(start: Callable[..., Run]) -> None:
    run = start(("a", STUBBORN, 0.5))
    ((_, pid, _),) = run.wait_for("start", 1)
    run.process.send_signal(signal.SIGTERM)
    told_at = time.monotonic()
    assert run.end() == 0
    assert time.monotonic() - told_at >= 0.5
    assert len(run.events("deaf")) == 1
    assert not psutil.pid_exists(pid)


def test_a_second_signal_kills_at_once(start: Callable[..., Run]) -> None:
    run = start(("a", STUBBORN, 600.0), ("b", STUBBORN, 600.0))
    run.wait_for("start", 2)
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("deaf", 1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert not any(psutil.pid_exists(pid) for _, pid, _ in run.events("start"))


def test_a_child_that_refuses_its_settings_ends_all(start: Callable[..., Run]) -> None:
    run = start(("a", WELL_BEHAVED, 5.0), ("b", REFUSING, 5.0))
    assert run.end() == 1
    assert run.process.stderr is not None
    assert "refused: b" in run.process.stderr.read()
    assert not any(psutil.pid_exists(pid) for _, pid, _ in run.events("start"))


def test_a_refusal_at_a_later_start_is_an_end_like_any_other(start: Callable[..., Run]) -> None:
    run = start(("a", REFUSING_LATER, 5.0))
    run.wait_for("start", 3)
    assert run.process.poll() is None


def test_a_child_that_never_gets_ready_is_given_up(start: Callable[..., Run]) -> None:
    run = start(("a", WELL_BEHAVED, 5.0), ("b", FAILING, 5.0), ready="never")
    assert run.end() == 1
    _, err = run.process.communicate()
    assert "given up: the b ended 3 times before it was ready, at last with exit code 1: " in err
    assert [name for name, _, _ in run.events("start")].count("b") == 3
    assert len(run.events("stop")) == 1


async def test_refusing_is_told_by_its_exit_code() -> None:
    child = ChildProcess("a", [sys.executable, "-c", "raise SystemExit(2)"], 1.0)
    with pytest.raises(ChildRefused, match="a"):
        await child.keep_running(asyncio.Event())


async def test_a_child_that_never_started_is_stopped_without_fuss() -> None:
    child = ChildProcess("a", ["true"], 1.0)
    child.kill()
    await child.stop()


def test_children_are_out_of_reach_of_the_terminals_ctrl_c(start: Callable[..., Run]) -> None:
    run = start(("a", WELL_BEHAVED, 5.0))
    ((_, pid, _),) = run.wait_for("start", 1)
    assert os.getsid(pid) != os.getsid(run.process.pid)


def test_what_children_print_is_no_output_of_the_supervisor(start: Callable[..., Run]) -> None:
    run = start(("a", "print('from a child', flush=True); import time; time.sleep(60)", 5.0))
    assert run.process.stdout is not None
    assert run.process.stderr is not None
    assert "from a child" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGTERM)
    run.end()
    assert run.process.stdout.read() == "ready\n"


FOLLOWER = """
import os, signal, subprocess, sys, time
from mini_infer.supervisor import end_with_parent
if len(sys.argv) > 1:
    end_with_parent(int(sys.argv[1]), signal.SIGKILL)
    print(os.getpid(), flush=True)
    time.sleep(600)
else:
    subprocess.run([sys.executable, __file__, str(os.getpid())])
"""


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "follower.py"
    script.write_text(FOLLOWER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(WAIT_S)


def test_a_process_whose_parent_has_ended_already_ends_at_once() -> None:
    with pytest.raises(SystemExit, match="has ended"):
        supervisor.end_with_parent(2**22 + 1, signal.SIGCONT)
