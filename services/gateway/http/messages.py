"""The messages of a chat request: texts; what else a message may hold is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from services.gateway.http.errors import ApiError, invalid
from services.gateway.http.requests import Chat, ChatMessage

PART_SEPARATOR = "\n"
"""Between the text parts of one message; chat templates take one text. vLLM joins them so."""

_NOT_SERVED = ("tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations")


class ContentPart(Struct):
    """A part of a message's content; only those of type `text` are served."""

    type: str
    text: str | None = None


class MessageBody(Struct, forbid_unknown_fields=True):
    """A message as it is sent; an assistant's message may be sent back as it came."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None
    annotations: Any = None


def to_chat(messages: Sequence[MessageBody], add_generation_prompt: bool | None) -> Chat:
    """The conversation. Raises `ApiError`."""
    if not messages:
        raise invalid("messages", "messages is empty; give at least one message")
    said = tuple(_to_message(message, number) for number, message in enumerate(messages))
    return Chat(said, True if add_generation_prompt is None else add_generation_prompt)


def _to_message(message: MessageBody, number: int) -> ChatMessage:
    for field in _NOT_SERVED:
        if getattr(message, field):
            raise _unsupported(f"messages[{number}].{field} is not served; leave it out")
    if message.content is None:
        raise invalid("messages", f"messages[{number}].content is required", "missing_required_parameter")
    if isinstance(message.content, str):
        return ChatMessage(message.role, message.content, message.name)
    for place, part in enumerate(message.content):
        if part.type != "text":
            where = f"messages[{number}].content[{place}]"
            raise _unsupported(f"{where} is of type {part.type[:40]!r}; only text is served")
        if part.text is None:
            raise invalid("messages", f"messages[{number}].content[{place}].text is required")
    texts = (part.text or "" for part in message.content)
    return ChatMessage(message.role, PART_SEPARATOR.join(texts), message.name)


def _unsupported(message: str) -> ApiError:
    return invalid("messages", message, "unsupported_value")
