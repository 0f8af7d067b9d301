"""Chat templates as programs: compiled, chosen by name, and run in Jinja's immutable sandbox.

Only a child process (`template_child.py`) does this with the templates of a model folder. What a
template sees, and what it writes, is what `transformers` gives it and takes from it in
`apply_chat_template`: the same variables, filters and whitespace rules.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import TrackingCodeGenerator
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, modifies_known_mutable
from jinja2.utils import Namespace
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EncodeChat, WireChatMessage

from mini_infer_tokenizer.template_sources import DEFAULT_NAME, TOOL_USE_NAME

MAX_RENDERED_CHARACTERS = 8 * 2**20
"""Twice the largest prompt that a gateway takes; only a runaway template writes more."""
MAX_ERROR_CHARACTERS = 500

_CHAT_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_STANDARD_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


class TemplateSet:
    """The chat templates of a model; renders one conversation at a time."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compiles the templates.

        Args:
            sources: Jinja sources by name.
            special_tokens: Variables such as "bos_token" that every rendering sees.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED with the name of what is no template.
        """
        self._special_tokens = dict(special_tokens)
        given = _CHAT_VARIABLES | _STANDARD_TOKENS | special_tokens.keys()
        environment = _Environment()
        self._templates = {
            name: _compile(environment, name, source, given) for name, source in sources.items()
        }

    def render(self, chat: EncodeChat) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        Raises:
            MiniInferError: INVALID_FIELD for what the chosen template does not take,
                CHAT_TEMPLATE_FAILED with the template's own words.
            MemoryError: Where this process may not take as much as the template needs.
        """
        if not chat.messages:
            raise _invalid("expected a chat of at least 1 message, got none")
        chosen = self._choose(chat)
        messages = [_seen_message(each) for each in chat.messages]
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": [_parsed("tools", each) for each in chat.tools] or None,
            "documents": [_parsed("documents", each) for each in chat.documents] or None,
            "add_generation_prompt": chat.add_generation_prompt,
            **_checked_kwargs(chat, chosen.taken),
        }
        if chat.continue_final_message:
            return _written_up_to_the_last_content(chosen.template, messages, variables)
        return _written(chosen.template, variables)

    def _choose(self, chat: EncodeChat) -> _Compiled:
        """The template that is asked for; else the one for tools, if any, or the default."""
        for_tools = chat.tools and TOOL_USE_NAME in self._templates
        name = chat.chat_template or (TOOL_USE_NAME if for_tools else DEFAULT_NAME)
        if name in self._templates:
            return self._templates[name]
        known = ", ".join(sorted(self._templates))
        if chat.chat_template:
            raise _invalid(f"expected chat_template to be one of {known}, got {name!r:.80}")
        raise _invalid(f"the model has no default chat template: set chat_template to {known}")


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A template, and the names that it reads and that only a request could set."""

    template: jinja2.Template
    taken: frozenset[str]


class _Environment(ImmutableSandboxedEnvironment):
    """What templates run in."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
        )
        self.code_generator_class = _UnfoldedCode
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _TemplateNamespace

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Ends what reaches for Python's internals, which Jinja lets pass as nothing."""
        if not modifies_known_mutable(obj, attribute):
            kind = type(obj).__name__
            raise SecurityError(f"access to attribute {attribute!r:.80} of {kind!r} is unsafe")
        return super().unsafe_undefined(obj, attribute)

    def undeclared_names(self, source: str) -> set[str]:
        """The names that a template reads without having set them."""
        finder = _NameFinder(self)
        finder.optimizer = None
        finder.visit(self.parse(source))
        return finder.undeclared_identifiers - self.globals.keys()


class _UnfoldedCode(CodeGenerator):
    """Computes no constants: what a template computes, it computes when it is rendered.

    Else `{{ 'a' * 10 ** 10 }}` would keep the server from starting, instead of ending the
    requests that come across it.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _NameFinder(_UnfoldedCode, TrackingCodeGenerator):
    """Writes no code, only notes the names that it would read."""


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what the model wrote, for training: here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _DictMaker:
    """`dict(...)` of templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace(...)` of templates; a name with an underscore could only mean mischief."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        for name in dict(*given, **kwargs):
            _refuse_private(name)
        Namespace.__init__(self, *given, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r:.80}")


def _compile(environment: _Environment, name: str, source: str, given: Set[str]) -> _Compiled:
    try:
        taken = environment.undeclared_names(source) - given
        return _Compiled(environment.from_string(source), frozenset(taken))
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        words = f"{error.message} (line {error.lineno})"[:MAX_ERROR_CHARACTERS]
    except Exception as error:  # Python's own compiler has its say as well.
        words = _words_of(error)
    raise _failed(f"{name!r:.80} is no template: {words}")


def _checked_kwargs(chat: EncodeChat, taken: frozenset[str]) -> dict[str, Any]:
    """Refuses what would have no effect, and what would replace what is given."""
    kwargs = _parsed("template_kwargs", chat.template_kwargs) if chat.template_kwargs else {}
    for name in kwargs:
        if name not in taken:
            known = ", ".join(sorted(taken)) or "none at all"
            raise _invalid(
                f"expected template_kwargs that the chat template uses ({known}), got {name!r:.80}"
            )
    return kwargs


def _seen_message(message: WireChatMessage) -> dict[str, Any]:
    """A message as templates know it; what it does not have has no key."""
    seen: dict[str, Any] = {
        "role": message.role,
        "content": message.content,
        "name": message.name,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _parsed("arguments", call.arguments)
                    if call.arguments_are_json
                    else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
        or None,
        "tool_call_id": message.tool_call_id,
    }
    for call in seen["tool_calls"] or ():
        if call["id"] is None:
            del call["id"]
    seen = {name: value for name, value in seen.items() if value is not None}
    if message.reasoning_content is not None:
        # Templates read it by either name.
        thought = message.reasoning_content
        seen = {"thinking": thought, **seen, "reasoning_content": thought}
    return seen


def _parsed(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _invalid(f"expected {field} of JSON objects, got another text: {error}") from None
    except RecursionError:
        raise _invalid(f"expected {field} of objects and lists less deep in each other") from None
    except UnicodeEncodeError:
        message = f"expected {field} of Unicode text, got half of a surrogate pair"
        raise _invalid(message) from None
    except ValueError:
        digits = f"{sys.int_info.default_max_str_digits} digits"
        message = f"expected {field} of finite numbers and integers of at most {digits}"
        raise _invalid(message) from None
    if not isinstance(value, dict):
        raise _invalid(f"expected {field} of JSON objects, got {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    """Reads a number; JSON has no infinity, whatever Python writes."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _written_up_to_the_last_content(
    template: jinja2.Template, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    """Marks the end of the last message's content, and cuts the text there.

    Templates often trim what they write: where the mark's trailing space is lost, space before
    the mark would be lost as well.
    """
    content = messages[-1].get("content")
    if content is None:
        raise _invalid("expected a last message with content to continue, got none")
    mark = secrets.token_hex(16).upper()
    messages[-1]["content"] = f"{content}{mark} "
    text = _written(template, variables)
    end = text.rfind(mark)
    if end < 0 or content.strip() not in text:
        raise _failed("it does not write the last message as it is, so it cannot be continued")
    is_trimmed = not text.startswith(" ", end + len(mark))
    text = text[:end].replace(f"{mark} ", "").replace(mark, "")
    return text.rstrip() if is_trimmed else text


def _written(template: jinja2.Template, variables: dict[str, Any]) -> str:
    try:
        return "".join(_bounded(template.generate(variables)))
    except (MiniInferError, MemoryError):
        raise
    except Exception as error:  # A template can fail in any way that a program can.
        raise _failed(_words_of(error)) from None


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    num_characters = 0
    for part in parts:
        num_characters += len(part)
        if num_characters > MAX_RENDERED_CHARACTERS:
            raise _failed(f"it wrote more than {MAX_RENDERED_CHARACTERS} characters")
        yield part


def _words_of(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_ERROR_CHARACTERS]


def _failed(message: str) -> MiniInferError:
    return MiniInferError(ErrorReason.CHAT_TEMPLATE_FAILED, f"chat template: {message}")


def _invalid(message: str) -> MiniInferError:
    return MiniInferError(ErrorReason.INVALID_FIELD, message)


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
