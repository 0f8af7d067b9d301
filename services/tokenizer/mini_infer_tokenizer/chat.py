"""Conversations to prompt text, by the chat template of the model folder.

Templates are programs that came with the model, so they run in Jinja's immutable sandbox, with
the names that Hugging Face's templates expect. A request never brings a template of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.model_folder import read_json_object, read_text

MAX_RENDERED_CHARACTERS = 8 * 2**20
"""Twice the largest prompt that a gateway takes; only a runaway template writes more."""


class ChatTemplate:
    """A model's chat template; safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles the template.

        Args:
            source: Jinja source.
            special_tokens: Variables such as "bos_token" that every rendering sees.

        Raises:
            jinja2.TemplateError: Where the source is not a template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source, globals=dict(special_tokens))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        Args:
            messages: Turns with "role" and "content".
            add_generation_prompt: End with the words that begin the assistant's answer.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED with the template's own words.
        """
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts = []
        num_characters = 0
        try:
            for part in self._template.generate(variables):
                num_characters += len(part)
                if num_characters > MAX_RENDERED_CHARACTERS:
                    raise _failed(f"it wrote more than {MAX_RENDERED_CHARACTERS} characters")
                parts.append(part)
        except MiniInferError:
            raise
        except Exception as error:  # A template can fail in any way that a program can.
            raise _failed(str(error) or type(error).__name__) from error
        return "".join(parts)


def load_chat_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template of a model folder, or None where it has none.

    chat_template.jinja comes first, then `chat_template` in tokenizer_config.json: a string, or
    a list of named templates of which "default" is taken.

    Raises:
        ModelFolderError: Where the template cannot be read or compiled.
    """
    name = "chat_template.jinja"
    if (folder / name).exists():
        source: str | None = read_text(folder / name)
    else:
        name = "tokenizer_config.json"
        source = _configured_source(folder / name)
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelFolderError(f"{folder / name}: chat template: {error}") from error


def _configured_source(file: Path) -> str | None:
    if not file.exists():
        return None
    value = read_json_object(file).get("chat_template")
    if value is None or isinstance(value, str):
        return value
    try:
        return {each["name"]: str(each["template"]) for each in value}.get("default")
    except (TypeError, KeyError) as error:
        raise ModelFolderError(
            f"{file}: expected chat_template to be a text or a list of named templates"
        ) from error


def _failed(message: str) -> MiniInferError:
    return MiniInferError(ErrorReason.CHAT_TEMPLATE_FAILED, f"chat template: {message}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
