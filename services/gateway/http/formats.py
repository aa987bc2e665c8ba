"""How choices look in the two APIs, whole and in the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from services.gateway.http.chunks import Chunk, PositionLogprobs, TokenLogprob

Json = dict[str, Any]


class Format(Protocol):
    """One request's answer in one of the APIs; may keep what it needs from one chunk of a choice to the next."""

    id_prefix: str
    whole_object: str
    event_object: str

    def whole(self, index: int, choice: Chunk) -> Json:
        """A whole choice."""
        ...

    def events(self, index: int, chunk: Chunk, is_first: bool) -> list[Json]:
        """The choice's part of the events that `chunk` becomes; none if there is nothing to show yet."""
        ...


class CompletionFormat:
    """`/v1/completions`."""

    id_prefix = "cmpl-"
    whole_object = event_object = "text_completion"

    def __init__(self, with_logprobs: bool, with_token_ids: bool) -> None:
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, choice: Chunk) -> Json:
        """A whole choice."""
        shown: Json = {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(index, choice.logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        return shown | ({"token_ids": choice.token_ids} if self._with_token_ids else {})

    def events(self, index: int, chunk: Chunk, is_first: bool) -> list[Json]:
        """As a whole choice; the reason comes with the last text."""
        is_shown = chunk.text or chunk.finish_reason or self._with_logprobs or self._with_token_ids
        return [self.whole(index, chunk)] if is_shown else []

    def _logprobs(self, index: int, positions: Sequence[PositionLogprobs]) -> Json:
        offsets, offset = [], self._offsets.get(index, 0)
        for position in positions:
            offsets.append(offset)
            offset += len(position.chosen.token) if position.chosen.has_text else 0
        self._offsets[index] = offset
        return {
            "tokens": [position.chosen.token for position in positions],
            "token_logprobs": [position.chosen.logprob for position in positions],
            "top_logprobs": [_by_token(position) for position in positions],
            "text_offset": offsets,
        }


class ChatFormat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"

    def __init__(self, with_logprobs: bool, with_token_ids: bool) -> None:
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids

    def whole(self, index: int, choice: Chunk) -> Json:
        """A whole choice."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        shown: Json = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }
        return shown | ({"token_ids": choice.token_ids} if self._with_token_ids else {})

    def events(self, index: int, chunk: Chunk, is_first: bool) -> list[Json]:
        """The role, then text, then the reason in an event of its own."""
        events = [self._event(index, {"role": "assistant", "content": "", "refusal": None})] if is_first else []
        if chunk.text or (chunk.token_ids and (self._with_logprobs or self._with_token_ids)):
            event = self._event(index, {"content": chunk.text}) | {"logprobs": self._logprobs(chunk)}
            events.append(event | ({"token_ids": chunk.token_ids} if self._with_token_ids else {}))
        if chunk.finish_reason:
            events.append(self._event(index, {}) | {"finish_reason": chunk.finish_reason})
        return events

    def _event(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, chunk: Chunk) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            _token(position.chosen) | {"top_logprobs": [_token(top) for top in position.top]}
            for position in chunk.logprobs
        ]
        return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.utf8}


def _by_token(position: PositionLogprobs) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two with the same text the likelier."""
    by_token: dict[str, float] = {}
    for token in (*position.top, position.chosen):
        by_token.setdefault(token.token, token.logprob)
    return by_token
