"""Hostile templates end soon, with a typed error, and harm nobody; through the real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EncodeChat, WireChatMessage
from mini_infer_tokenizer.template_pool import TemplatePool
from tokenizer.chat_escapes import ESCAPES, SLOW

HONEST = "default"
MESSAGES = [WireChatMessage("user", "hi")]
LIMIT_S = 1.0


@pytest.fixture(scope="module")
def pool() -> Iterator[TemplatePool]:
    """Every template of the table, and an honest one."""
    pool = TemplatePool({**ESCAPES, HONEST: "{{ messages | tojson }}"}, {}, num_processes=2)
    pool.start()
    yield pool
    pool.close()


def render(pool: TemplatePool, name: str) -> str:
    return pool.render(EncodeChat(0, MESSAGES, True, chat_template=name))


def seconds_until_failure(pool: TemplatePool, name: str) -> float:
    begin = time.monotonic()
    with pytest.raises(MiniInferError) as caught:
        render(pool, name)
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED
    assert len(caught.value.message) < 1000
    return time.monotonic() - begin


def test_the_table_is_as_long_as_promised() -> None:
    assert len(set(ESCAPES.values())) == len(ESCAPES) >= 60
    assert ESCAPES.keys() >= SLOW


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in ESCAPES],
)
def test_ends_within_a_second(pool: TemplatePool, name: str) -> None:
    # A busy machine may stop everything for long: it gets a second and a third chance.
    assert any(seconds_until_failure(pool, name) < LIMIT_S for _ in range(3))
    assert render(pool, HONEST) == '[{"role": "user", "content": "hi"}]'
