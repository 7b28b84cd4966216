"""Chats as the text that the model was trained on: the checkpoint's own chat template, in jinja2's sandbox.

A template is a program that came with a checkpoint. It runs sandboxed and sees plain data only. Needs `jinja2`, which
running an artifact otherwise does not.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
# Older versions have known ways out of the sandbox.
JINJA = (3, 1, 6)


class ChatTemplate:
    """The chat template of an artifact.

    Raises:
        InputError: the artifact has none, or one that is not a template.
        UnsupportedError: `jinja2` is not installed, or too old to be trusted with a template.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._source = _source(artifact)
        self._variables = _special_tokens(_config(artifact))
        self._template = compile_template(self._source, str(artifact.path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat.

        It spells its special tokens, so it is encoded without further ones: `encode(text, special=False)`.

        Args:
            messages: each with `role` and `content`, and whatever else the template reads.
            add_generation_prompt: end where the answer begins.
            tools: JSON schemas of functions that the model may call.
            variables: anything else that the template reads.

        Raises `InputError` with the template's own words when it refuses the messages.
        """
        import jinja2

        data = _plain({"messages": list(messages), "tools": tools, "documents": None, **variables})
        try:
            return self._template.render(**{**self._variables, **data, "add_generation_prompt": add_generation_prompt})
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refused the messages: {error.message or error}") from error
        except Exception as error:  # whatever the program that a template is runs into
            raise InputError(f"the chat template failed on the messages: {error}") from error


def render(artifact: Artifact, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a chat by the artifact's own template; see `ChatTemplate`."""
    return ChatTemplate(artifact).render(messages, **options)


def has_chat_template(artifact: Artifact) -> bool:
    return TEMPLATE in artifact.files or "chat_template" in _config(artifact)


def compile_template(source: str, where: str = "the chat template") -> Any:
    """`source` as a jinja2 template with what templates of checkpoints rely on. Sandboxed."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise UnsupportedError("chat templates need the package jinja2: pip install 'qcompiler[chat]'") from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < JINJA:
        raise UnsupportedError(
            f"jinja2 is {jinja2.__version__}, whose sandbox can be left by a template: pip install 'qcompiler[chat]'"
        )

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the model's own words for training; when a chat is rendered it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return str(caller())

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own takes any name, `__class__` among them."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **values).items():
            made[name] = value
        return made

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def plain_dict(*args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=refuse, strftime_now=_now, dict=plain_dict, namespace=namespace)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: the chat template cannot be read: {error.message} (line {error.lineno})") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _plain(value: Any) -> Any:
    """JSON types only: a template must not reach methods of the caller's objects."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise InputError(f"a chat holds texts, numbers, lists and objects; found {type(value).__name__}")


def _config(artifact: Artifact) -> dict[str, Any]:
    if CONFIG not in artifact.files:
        return {}
    path = artifact.file(CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _source(artifact: Artifact) -> str:
    if TEMPLATE in artifact.files:
        return artifact.file(TEMPLATE).read_text(encoding="utf-8")
    found = _config(artifact).get("chat_template")
    if isinstance(found, list):
        # Several by name, in the older form; `default` is the one for a plain chat.
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}.get("default")
    if not isinstance(found, str):
        raise InputError(
            f"{artifact.path} has no chat template ({TEMPLATE}, or chat_template in {CONFIG}): this model was not made "
            "for chats; give it text to continue"
        )
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the others, as text."""
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens
