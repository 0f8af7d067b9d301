"""Writes what users of the clients give into messages of the API, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from mini_infer.chats import ChatMessage, ChatOptions, read_chat
from mini_infer.errors import FieldViolation, InvalidRequestError
from mini_infer.messages import WireChatMessage
from mini_infer.structured_output import StructuredOutput
from mini_infer.v1 import generate_pb2


class RequestWriter:
    """Writes values into messages, and remembers those that their fields cannot hold."""

    def __init__(self) -> None:
        """Has written nothing yet."""
        self._violations: list[FieldViolation] = []

    def write(self, message: Message, path: str, fields: Mapping[str, Any]) -> None:
        """Sets fields of a message at a path; None leaves a field absent."""
        for name, value in fields.items():
            try:
                if isinstance(value, str) and _is_repeated(message, name):
                    # Protobuf would take a text for a list of its characters.
                    raise TypeError("a text in place of a list")
                message.MergeFrom(type(message)(**{name: value}))
            except (TypeError, ValueError) as error:
                expected = f"expected what the field can hold, got another value: {error}"
                self._violations.append(FieldViolation(path + name, expected))

    def write_structured_output(
        self, request: generate_pb2.GenerateRequest, languages: Mapping[str, Any]
    ) -> None:
        """Writes the language of the output.

        Args:
            request: Gets it.
            languages: By the name of its field; None, and False for `json_object`, is no language.
        """
        given = {name: each for name, each in languages.items() if each is not None}
        if given.get("json_object") is False:
            del given["json_object"]
        if not given:
            return
        path, structured = "structured_output", request.structured_output
        if len(given) > 1:
            expected = f"expected one language, got {', '.join(sorted(given))}"
            self._violations.append(FieldViolation(path, expected))
        elif "choice" in given:
            structured.choice.SetInParent()
            self.write(structured.choice, f"{path}.choice.", {"texts": given["choice"]})
        else:
            if isinstance(given.get("json_schema"), Mapping):
                given["json_schema"] = self._as_json(f"{path}.json_schema", given["json_schema"])
            self.write(structured, f"{path}.", given)

    def _as_json(self, path: str, schema: Mapping[str, Any]) -> str | None:
        try:
            return StructuredOutput(json_schema=schema).as_grammar().source
        except (TypeError, ValueError, RecursionError) as error:
            self._violations.append(FieldViolation(path, f"expected JSON: {error}"))
            return None

    def write_chat(
        self, chat: generate_pb2.Chat, messages: Sequence[ChatMessage], options: ChatOptions
    ) -> None:
        """Writes a conversation."""
        chat.SetInParent()
        try:
            read = read_chat(messages, options)
        except InvalidRequestError as error:
            self._violations += error.violations
            return
        for index, message in enumerate(read.messages):
            self._write_message(f"chat.messages[{index}].", chat.messages.add(), message)
        fields = {
            name: options.get(name)
            for name in ("add_generation_prompt", "continue_final_message", "chat_template")
        }
        fields |= {
            "tools_json": read.tools,
            "documents_json": read.documents,
            "template_kwargs_json": read.template_kwargs or None,
        }
        self.write(chat, "chat.", fields)

    def _write_message(
        self, path: str, written: generate_pb2.ChatMessage, message: WireChatMessage
    ) -> None:
        fields = {
            "role": message.role,
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content,
        }
        self.write(written, path, fields)
        if message.content is not None:
            self.write(written.content.add(), f"{path}content[0].", {"text": message.content})
        for index, call in enumerate(message.tool_calls):
            arguments = "arguments_json" if call.arguments_are_json else "arguments_text"
            fields = {"id": call.id, "function_name": call.name, arguments: call.arguments}
            self.write(written.tool_calls.add(), f"{path}tool_calls[{index}].", fields)

    def raise_violations(self) -> None:
        """Raises `InvalidRequestError` where a value could not be written."""
        if self._violations:
            raise InvalidRequestError(self._violations)


def _is_repeated(message: Message, name: str) -> bool:
    return message.DESCRIPTOR.fields_by_name[name].is_repeated
