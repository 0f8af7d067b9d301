"""Requests that the tests of validation build, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
from gateway.stand_ins import ENGINE_WELCOME
from mini_infer.errors import ErrorReason, InvalidRequestError
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer_gateway.validation import check_generate

MAX_PROMPT_BYTES = 1000
INVALID = ErrorReason.INVALID_FIELD
TOO_LARGE = ErrorReason.PROMPT_TOO_LARGE
HELLO = pb2.ContentPart(text="hello")


def violations_of(**fields: Any) -> list[tuple[str, ErrorReason]]:
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(pb2.GenerateRequest(**fields), ENGINE_WELCOME, MAX_PROMPT_BYTES)
    return [(each.field, each.reason) for each in caught.value.violations]


def chat(*messages: Any, **fields: Any) -> pb2.Chat:
    return pb2.Chat(messages=messages, **fields)


def message(role: str, *parts: Any) -> pb2.ChatMessage:
    return pb2.ChatMessage(role=role, content=parts)
