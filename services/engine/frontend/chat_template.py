"""A checkpoint's chat template: a conversation as one text, exactly as transformers writes it, without transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import Reason, SloraError
from services.engine.frontend.request import CHAT_MESSAGES, Chat

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"

_MISSING = "this checkpoint has no chat template; send the prompt as text or token ids"


class GenerationBlocks(Extension):
    """`{% generation %}` marks, for training, what the assistant said; here it only shows its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        """The block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Writes conversations out. What a template may do is bounded by Jinja's sandbox: it reads its arguments."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are handed to the template by their names, such as `bos_token`.

        Raises jinja2.TemplateError if `source` is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, chat: Chat) -> str:
        """The conversation as text. Raises CHAT_INVALID, with the template's own words, if it refuses it."""
        messages = [
            {"role": m.role, "content": m.content} | ({} if m.name is None else {"name": m.name}) for m in chat.messages
        ]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=chat.add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # whatever the template's expressions raise
            message = f"the checkpoint's chat template refuses these messages: {error}"
            raise SloraError(Reason.CHAT_INVALID, message, field=CHAT_MESSAGES) from None


class NoTemplate:
    """Stands where a checkpoint has no template that can be used, and says so."""

    def __init__(self, why: str = _MISSING) -> None:
        self._why = why

    def render(self, chat: Chat) -> str:
        """Raises CHAT_TEMPLATE_MISSING."""
        raise SloraError(Reason.CHAT_TEMPLATE_MISSING, self._why, field=CHAT_MESSAGES)


def load_chat_template(
    checkpoint: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | NoTemplate:
    """The template in chat_template.jinja, else in tokenizer_config.json (`config`).

    One that cannot be read stops only those who ask for it: texts and token ids are served without.
    """
    try:
        source = _find_source(checkpoint, config)
        return NoTemplate() if source is None else ChatTemplate(source, special_tokens)
    except (jinja2.TemplateError, TypeError, OSError, UnicodeDecodeError) as error:
        why = f"this checkpoint's chat template cannot be read: {error}"
        logger.warning("%s", why, extra={"checkpoint": str(checkpoint)})
        return NoTemplate(why)


def _find_source(checkpoint: Path, config: Mapping[str, Any]) -> str | None:
    file = checkpoint / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name, in old files
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if found is None or isinstance(found, str):
        return found
    raise TypeError(f"it is a {type(found).__name__}, not a text")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
