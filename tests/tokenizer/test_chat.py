from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer_tokenizer.chat import MAX_RENDERED_CHARACTERS, ChatTemplate, load_chat_template
from tokenizers import Tokenizer

DEMO = bundled_model("demo")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MESSAGES = [
    {"role": "system", "content": "Be kind.  "},
    {"role": "user", "content": "  Wer ist <b>Füchsin</b> 狐 & 'co' \"?\"\n"},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": ""},
]

TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""",
    "brackets": """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}
{%- endfor %}""",
    "headers": """{% set ns = namespace(count=0) %}{{ bos_token }}
  {%- if tools is none %}no tools{% endif %}
  {%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
  {%- endfor %}{{ ns.count }}{{ strftime_now('%Y') }}
  {%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}""",
    "json": """{{ messages | tojson }}{{ messages | tojson(indent=2) }}
{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, separators=(',', ':')) }}""",
    "loops": """{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
  {{ message.content }}
{% endfor %}""",
}


def rendered_by_transformers(source: str, messages: Any, add_generation_prompt: bool) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        oracle = PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL)
        text: str = oracle.apply_chat_template(
            messages,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    return text


@pytest.mark.parametrize("add_generation_prompt", [True, False], ids=["prompt", "history"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    expected = rendered_by_transformers(TEMPLATES[name], MESSAGES, add_generation_prompt)
    assert template.render(MESSAGES, add_generation_prompt) == expected


def test_demo_template_as_transformers_does() -> None:
    template = load_chat_template(DEMO, SPECIAL)
    assert template is not None
    source = (DEMO / "chat_template.jinja").read_text()
    expected = rendered_by_transformers(source, MESSAGES, True)
    assert template.render(MESSAGES, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for _ in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{% for _ in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "it wrote more than"),
    ],
)
def test_failure_is_typed_and_in_the_templates_words(source: str, message: str) -> None:
    with pytest.raises(MiniInferError, match=message) as caught:
        ChatTemplate(source, SPECIAL).render(MESSAGES, add_generation_prompt=True)
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED


def test_longest_allowed_text_is_rendered() -> None:
    messages = [{"role": "user", "content": "x" * MAX_RENDERED_CHARACTERS}]
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert len(template.render(messages, False)) == MAX_RENDERED_CHARACTERS


class TestLoad:
    def test_file_comes_before_config(self, tmp_path: Path) -> None:
        self.configure(tmp_path, "from config")
        assert self.load(tmp_path) == "from config"
        (tmp_path / "chat_template.jinja").write_text("from file")
        assert self.load(tmp_path) == "from file"

    def test_default_of_named_templates(self, tmp_path: Path) -> None:
        names = ("tool_use", "default")
        self.configure(tmp_path, [{"name": each, "template": each} for each in names])
        assert self.load(tmp_path) == "default"

    @pytest.mark.parametrize("value", [None, [], [{"name": "tool_use", "template": "x"}]])
    def test_none(self, tmp_path: Path, value: object) -> None:
        assert load_chat_template(tmp_path, {}) is None
        self.configure(tmp_path, value)
        assert load_chat_template(tmp_path, {}) is None

    @pytest.mark.parametrize("value", ["{% if %}", 3, [3], [{"name": "default"}]])
    def test_damaged(self, tmp_path: Path, value: object) -> None:
        self.configure(tmp_path, value)
        with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
            load_chat_template(tmp_path, {})

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(ModelFolderError, match=r"chat_template\.jinja"):
            load_chat_template(tmp_path, {})

    @staticmethod
    def configure(folder: Path, value: object) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))

    @staticmethod
    def load(folder: Path) -> str:
        template = load_chat_template(folder, {})
        assert template is not None
        return template.render([], add_generation_prompt=False)
