"""The processes that run templates: their limits, their deaths, and what is left of them."""

from __future__ import annotations

import gc
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import msgspec
import psutil
import pytest
from jinja2.defaults import DEFAULT_FILTERS
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EncodeChat, WireChatMessage
from mini_infer_tokenizer import child_process
from mini_infer_tokenizer.template_pool import TEMPLATE_LIMITS, TemplatePool
from mini_infer_tokenizer.template_rendering import TemplateSet

SOURCES = {
    "default": "{{ messages[0].content }}",
    "endless": "{% for _ in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "greedy": "{{ 'a' * 10 ** 10 }}",
    "slow": "{% for _ in range(3000) %}{% set x = range(99)|sum %}{% endfor %}hi",
}


def children() -> list[psutil.Process]:
    """The template processes of this process."""
    found = []
    for process in psutil.Process().children():
        try:
            if any("template_child" in each for each in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def num_zombies() -> int:
    return sum(each.status() == psutil.STATUS_ZOMBIE for each in psutil.Process().children())


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def chat(text: str = "hi", template: str = "") -> EncodeChat:
    return EncodeChat(0, [WireChatMessage("user", text)], True, chat_template=template)


def failure(pool: TemplatePool, template: str) -> str:
    with pytest.raises(MiniInferError) as caught:
        pool.render(chat(template=template))
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED
    return caught.value.message


@pytest.fixture
def pool() -> Iterator[TemplatePool]:
    assert children() == []
    pool = TemplatePool(SOURCES, {}, num_processes=2)
    yield pool
    pool.close()
    assert children() == []


def test_processes_start_when_they_are_needed(pool: TemplatePool) -> None:
    assert pool.render(chat("Hello")) == "Hello"
    assert len(children()) == 1
    pool.start()
    assert len(children()) == 2


def test_one_process_serves_one_chat_after_the_other(pool: TemplatePool) -> None:
    pool.start()
    before = {each.pid for each in children()}
    assert [pool.render(chat(f"{n}")) for n in range(50)] == [f"{n}" for n in range(50)]
    assert {each.pid for each in children()} == before


def test_honest_work_goes_on_beside_and_after_bombs(pool: TemplatePool) -> None:
    pool.start()
    with ThreadPoolExecutor(4) as threads:
        bombs = [threads.submit(failure, pool, name) for name in ["endless", "greedy"] * 2]
        honest = [threads.submit(pool.render, chat(f"{n}")) for n in range(100)]
        assert [each.result() for each in honest] == [f"{n}" for n in range(100)]
        messages = [each.result() for each in bombs]
    assert all("time" in each for each in messages[::2])
    assert all("memory" in each for each in messages[1::2])
    assert len(children()) == 2


def test_a_bomb_does_not_delay_whoever_gets_the_other_process(pool: TemplatePool) -> None:
    pool.start()
    ended = threading.Event()

    def bomb() -> None:
        failure(pool, "endless")
        ended.set()

    with ThreadPoolExecutor(1) as threads:
        bombing = threads.submit(bomb)
        assert pool.render(chat("first")) == "first"
        assert not ended.is_set()
        bombing.result()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_idle_is_replaced(
    pool: TemplatePool, signal_number: signal.Signals
) -> None:
    pool.start()
    for process in children():
        process.send_signal(signal_number)
    assert eventually(lambda: num_zombies() == 2)
    assert [pool.render(chat(f"{n}")) for n in range(3)] == ["0", "1", "2"]
    assert num_zombies() == 0


@pytest.mark.parametrize("num_kills", [1, 2, 3])
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_chat_survives_that_its_process_is_killed_twice(
    num_kills: int, signal_number: signal.Signals
) -> None:
    limits = msgspec.structs.replace(TEMPLATE_LIMITS, job_cpu_s=20, job_s=20)
    pool = TemplatePool({"default": SOURCES["slow"] * 30}, {}, 1, limits)
    pool.start()
    killed = set(children())
    (first,) = killed
    begins_at = first.cpu_times().user

    def kill() -> None:
        assert eventually(lambda: first.cpu_times().user > begins_at + 0.05)
        first.send_signal(signal_number)
        for _ in range(num_kills - 1):
            assert eventually(lambda: any(map(has_no_rights, set(children()) - killed)))
            (process,) = set(children()) - killed
            process.send_signal(signal_number)
            killed.add(process)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill)
        if num_kills <= 2:
            assert pool.render(chat()) == "hi" * 30
        else:
            with pytest.raises(MiniInferError, match=f"exit status -{signal_number}") as caught:
                pool.render(chat())
            assert caught.value.reason is ErrorReason.INTERNAL_ERROR
        killing.result()
    pool.close()


def has_no_rights(process: psutil.Process) -> bool:
    """Whether it is about to compile, or beyond."""
    try:
        return process.rlimit(resource.RLIMIT_NOFILE) == (3, 3)
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_crashes_is_the_templates_fault() -> None:
    limits = msgspec.structs.replace(TEMPLATE_LIMITS, job_cpu_s=20, job_s=20)
    pool = TemplatePool(SOURCES, {}, 1, limits)
    pool.start()
    (process,) = children()
    begins_at = process.cpu_times().user
    with ThreadPoolExecutor(1) as threads:
        rendering = threads.submit(failure, pool, "endless")
        assert eventually(lambda: process.cpu_times().user > begins_at + 0.05)
        process.send_signal(signal.SIGSEGV)
        assert f"broke (exit status -{signal.SIGSEGV})" in rendering.result()
    pool.close()


def test_words_that_are_no_unicode_cost_no_process() -> None:
    pool = TemplatePool({"default": "{{ raise_exception('odd \\ud800') }}"}, {}, 1)
    pool.start()
    before = children()
    assert failure(pool, "default") == "chat template: odd ?"
    assert children() == before
    pool.close()


def test_a_process_that_is_stopped_is_given_up(pool: TemplatePool) -> None:
    pool.render(chat())
    (stopped,) = children()
    stopped.suspend()
    # Longer than what the socket takes, so that sending waits as well.
    with pytest.raises(MiniInferError, match="time"):
        pool.render(chat("x" * 2**22))
    assert not stopped.is_running()
    assert pool.render(chat()) == "hi"


def test_what_a_process_may_not(pool: TemplatePool) -> None:
    pool.start()
    for process in children():
        variables = {"PYTHONPATH", "TOKENIZERS_PARALLELISM", "TZ", "LC_CTYPE"}
        assert process.environ().keys() <= variables
        assert process.cwd() == "/"
        assert process.num_fds() == 3
        limits = {
            resource.RLIMIT_NOFILE: 3,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
        }
        # Only the processes that have compiled have given up their rights.
        if process.rlimit(resource.RLIMIT_NOFILE) == (3, 3):
            for limit, value in limits.items():
                assert process.rlimit(limit) == (value, value)
            soft, hard = process.rlimit(resource.RLIMIT_AS)
            growth = hard - process.memory_info().vms
            assert soft == hard
            assert growth <= TEMPLATE_LIMITS.memory_bytes < growth + 64 * 2**20
            break
    else:
        pytest.fail("no process has given up its rights")


def test_the_time_is_that_of_the_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-14")
    zone = timezone(timedelta(hours=14))
    before = datetime.now(zone)
    pool = TemplatePool({"default": "{{ strftime_now('%d %H') }}"}, {}, num_processes=1)
    text = pool.render(chat())
    pool.close()
    assert text in {each.strftime("%d %H") for each in (before, datetime.now(zone))}


def test_every_filter_works_without_files() -> None:
    """Python and Jinja load parts of themselves late, when the process may open none any more."""
    values = ("'a <b>é</b> http://x.y'", "[3, 1, 2]", "{'a': 1}", "2.5", "messages")
    sources = {
        f"{name} of {value}": f"{{{{ {value} | {name} }}}}"
        for name in DEFAULT_FILTERS.keys() - {"random"}
        for value in values
    }

    def outcome(renderer: TemplateSet | TemplatePool, name: str) -> str:
        try:
            text = renderer.render(chat(template=name))
        except MiniInferError as error:
            text = error.message
        return re.sub(r"0x\w+", "", text)

    pool = TemplatePool(sources, {}, num_processes=1)
    here = TemplateSet(sources, {})
    there = {name: outcome(pool, name) for name in sources}
    pool.close()
    assert there == {name: outcome(here, name) for name in sources}


def test_nothing_is_left_behind(pool: TemplatePool) -> None:
    gc.collect()
    this_process = psutil.Process()
    before = this_process.num_fds()
    for _ in range(3):
        other = TemplatePool(SOURCES, {}, num_processes=2)
        other.start()
        failure(other, "greedy")
        other.close()
        other.close()
        with pytest.raises(RuntimeError, match="closed"):
            other.render(chat())
    assert children() == []
    assert num_zombies() == 0
    assert this_process.num_fds() == before


def test_a_pool_that_nobody_closed_takes_its_processes_along() -> None:
    forgotten = TemplatePool(SOURCES, {}, num_processes=2)
    forgotten.start()
    assert len(children()) == 2
    del forgotten
    gc.collect()
    assert children() == []


def test_processes_end_with_the_one_that_started_them() -> None:
    program = (
        "from mini_infer_tokenizer.template_pool import TemplatePool\n"
        "import sys, time\n"
        "pool = TemplatePool({'default': 'x'}, {}, 2)\n"
        "pool.start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        orphans = psutil.Process(parent.pid).children()
        assert len(orphans) == 2
        parent.kill()
    assert eventually(lambda: not any(each.is_running() for each in orphans))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "no template"),
        ("{% generation %}", "no template"),
        ("{{ '(' * 3 }", "no template"),
        ("{% for x in y %}{% if x %}" * 5_000, "no template|cannot be compiled"),
        ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", "no template|cannot be compiled"),
        ("{{ " + "-" * 100_000 + "1 }}", "no template|cannot be compiled"),
        ("{{ x" + "[0]" * 20_000 + " }}", "no template|cannot be compiled"),
        ("{% if a %}{{ b }}{% endif %}" * 60_000, "cannot be compiled: it did not|memory"),
    ],
    ids=["syntax", "open block", "open bracket", "blocks", "brackets", "signs", "items", "long"],
)
def test_what_does_not_compile_is_refused_in_time(source: str, message: str) -> None:
    limits = msgspec.structs.replace(TEMPLATE_LIMITS, start_cpu_s=0.5)
    pool = TemplatePool({"odd": source}, {}, 1, limits)
    begin = time.monotonic()
    with pytest.raises(MiniInferError, match=message) as caught:
        pool.start()
    assert time.monotonic() - begin < 15
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED
    pool.close()


def test_a_machine_without_room_for_a_process_is_an_internal_error(
    pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MiniInferError) as caught:
        pool.render(chat())
    assert caught.value.reason is ErrorReason.INTERNAL_ERROR
    monkeypatch.undo()
    assert pool.render(chat()) == "hi"


def test_a_text_that_is_no_unicode_is_an_invalid_field(pool: TemplatePool) -> None:
    with pytest.raises(MiniInferError) as caught:
        pool.render(chat("\ud800"))
    assert caught.value.reason is ErrorReason.INVALID_FIELD
    assert children() == []


def test_an_answer_that_is_none_ends_its_process(
    pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a template had broken out: it may write to the socket whatever it likes."""
    pool.start()
    monkeypatch.setattr(child_process, "MAX_ANSWER_BYTES", 3)
    assert "broke" in failure(pool, "default")
    monkeypatch.undo()
    assert pool.render(chat()) == "hi"
