"""Where a model folder keeps its chat templates.

Which file wins is what `transformers` decides (`PreTrainedTokenizerBase._from_pretrained`):
template files in the folder, all of them together, come before `chat_template` in
tokenizer_config.json. Folders of vision models may have neither but a chat_template.json, which
holds the template of their processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import has_entry, names_in, read_json_object, read_text

DEFAULT_NAME = "default"
TOOL_USE_NAME = "tool_use"

MAX_TEMPLATES = 256
MAX_TEMPLATE_BYTES = 2**20
"""Of each template; the longest that is known has 20 thousand."""

_MAIN_FILE = "chat_template.jinja"
_NAMED_FOLDER = "additional_chat_templates"
_CONFIG_FILES = ("tokenizer_config.json", "chat_template.json")


def read_chat_templates(folder: Path) -> dict[str, str]:
    """The sources of a model folder's chat templates by their names; empty where it has none.

    Raises:
        ModelFolderError: Where a file cannot be read or does not hold templates.
    """
    sources = _from_files(folder)
    for file in (folder / name for name in _CONFIG_FILES):
        if not sources and has_entry(file):
            sources = _from_config(file)
    if len(sources) > MAX_TEMPLATES:
        raise ModelFolderError(
            f"{folder} has {len(sources)} chat templates, expected at most {MAX_TEMPLATES}"
        )
    for name, source in sources.items():
        if len(source) > MAX_TEMPLATE_BYTES:
            raise ModelFolderError(
                f"{folder}: the chat template {name[:64]!r} has {len(source)} characters, expected "
                f"at most {MAX_TEMPLATE_BYTES}"
            )
    return sources


def _from_files(folder: Path) -> dict[str, str]:
    files = {}
    if has_entry(folder / _MAIN_FILE):
        files[DEFAULT_NAME] = folder / _MAIN_FILE
    if has_entry(folder / _NAMED_FOLDER):
        names = names_in(folder / _NAMED_FOLDER)
        named = [name for name in names if name.endswith(".jinja")][:MAX_TEMPLATES]
        files |= {name.removesuffix(".jinja"): folder / _NAMED_FOLDER / name for name in named}
    for name, file in files.items():
        _check_unicode(file, name)
    return {name: read_text(file, MAX_TEMPLATE_BYTES) for name, file in files.items()}


def _from_config(file: Path) -> dict[str, str]:
    value = read_json_object(file).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        _check_unicode(file, value)
        return {DEFAULT_NAME: value}
    named = {}
    for each in value if isinstance(value, list) else [value]:
        name, source = _named_template(each, file)
        named[name] = source
    return named


def _named_template(value: Any, file: Path) -> tuple[str, str]:
    if isinstance(value, Mapping):
        name, source = value.get("name"), value.get("template")
        if isinstance(name, str) and isinstance(source, str):
            _check_unicode(file, name + source)
            return name, source
    raise ModelFolderError(
        f"{file}: expected chat_template to be a text or a list of named templates "
        '({"name": ..., "template": ...})'
    )


def _check_unicode(file: Path, text: str) -> None:
    """Refuses halves of surrogate pairs: file names and JSON escapes can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelFolderError(
            f"{str(file)!a}: expected a chat template and its name to be Unicode text, got half of "
            "a surrogate pair"
        ) from None
