"""Chat templates: the text that transformers makes of them, in a sandbox."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact, open_artifact
from qcompiler.runtime.chat import ChatTemplate, has_chat_template, render
from tests.artifacts import REFERENCE, scratch, write_manifest

CHATML = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
BRACKETS = """{{ bos_token }}{% set ns = namespace(system='') %}
{% if messages[0]['role'] == 'system' %}
{% set ns.system = messages[0]['content'] %}{% set messages = messages[1:] %}
{% endif %}
{% if tools %}[TOOLS]{{ tools | tojson(indent=2) }}[/TOOLS]{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {{ ns.system }}{{ message['content'] }} [/INST]
{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}
{% endfor %}
{{ strftime_now('%Y') }} {{ {'é': '<'} | tojson }} {{ dict(a=1).a }}
"""
CHATS = [
    [{"role": "user", "content": "What is a café? <b>&</b>"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " Hi! "},
        {"role": "user", "content": "And?\n"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def artifact_with(template: str | None, config: dict | None = None) -> Artifact:
    folder = scratch()
    (folder / "model.onnx").write_bytes(b"")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    own = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(own | (config or {})))
    return open_artifact(write_manifest(folder, {}))


@pytest.mark.parametrize("template", [CHATML, BRACKETS])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"tools": TOOLS}])
def test_a_chat_is_the_text_that_transformers_makes(template: str, chat: list, options: dict) -> None:
    expected = AutoTokenizer.from_pretrained(REFERENCE).apply_chat_template(
        chat, chat_template=template, tokenize=False, **{"add_generation_prompt": True, **options}
    )
    assert render(artifact_with(template), chat, **options) == expected


def test_a_template_in_the_configuration() -> None:
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}
    assert render(artifact_with(None, config), CHATS[0]) == "<s>" + CHATS[0][0]["content"]
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ extra }}"}]
    assert render(artifact_with(None, {"chat_template": several}), CHATS[0], extra=5) == "yes 5"


def test_no_template_or_a_broken_one() -> None:
    artifact = artifact_with(None)
    assert not has_chat_template(artifact) and has_chat_template(artifact_with("x"))
    with pytest.raises(InputError, match="has no chat template"):
        ChatTemplate(artifact)
    with pytest.raises(InputError, match="cannot be read.*line 2"):
        ChatTemplate(artifact_with("a\n{% if %}"))


def test_a_refusal_is_in_the_templates_own_words() -> None:
    with pytest.raises(InputError, match="refused the messages: unknown role robot"):
        render(artifact_with(CHATML), [{"role": "robot", "content": ""}])
    with pytest.raises(InputError, match="chat template"):
        render(artifact_with("{{ messages[0].content + 1 }}"), CHATS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    try:
        text = render(artifact_with(template), CHATS[0])
    except InputError:
        return
    assert text == ""  # an attribute that the sandbox hides is undefined


def test_templates_see_plain_data_only() -> None:
    with pytest.raises(InputError, match="found PosixPath"):
        render(artifact_with("{{ messages }}"), [{"role": "user", "content": Path("/tmp")}])


def test_without_jinja2_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'qcompiler\[chat\]'"):
        ChatTemplate(artifact_with("x"))


def test_an_old_jinja2_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2

    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(UnsupportedError, match="jinja2 is 3.1.5"):
        ChatTemplate(artifact_with("x"))
