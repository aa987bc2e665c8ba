"""One generation's stream: tokens come in from the core at its pace and go out at the reader's."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.common.errors import SloraError
from services.engine.frontend.detokenizer import Detokenizer
from services.engine.frontend.request import GenerationRequest
from services.engine.frontend.request_trace import RequestTrace
from services.engine.frontend.stop_strings import StopStringScanner
from services.engine.messages import TokenEvent

MAX_MERGED_TOKENS = 2048
"""Tokens in one message at most: with 20 log-probabilities each they stay far below the size a message may have."""


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a generation."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    # Of the prompt's, those whose KV was in the prefix cache.
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one message adds: `text` is the text that the tokens of `events` complete."""

    text: str
    events: Sequence[TokenEvent]
    # With the last tokens.
    completion: Completion | None


class Generation:
    """A running request. The frontend calls `receive` and `fail`; its one reader awaits `next`, or is told by `listen`
    when there is something for `take`.

    A slow reader's tokens gather here, merged into its next message; they are never more than the request's own.
    """

    def __init__(
        self,
        request: GenerationRequest,
        core_id: int,
        num_prompt_tokens: int,
        detokenizer: Detokenizer,
        started_at: float,
        adapter_label: str,
        trace: RequestTrace | None = None,
    ) -> None:
        self.trace = trace
        self.request = request
        self.core_id = core_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0
        self.started_at = started_at
        self.last_token_at = 0.0
        self.adapter_label = adapter_label
        self.completion: Completion | None = None
        self._push_token = detokenizer.push
        self._flush_tokens = detokenizer.flush
        self._scanner = StopStringScanner(request.stop_strings) if request.stop_strings else None
        self._events: list[TokenEvent] = []
        self._texts: list[str] = []
        self._error: SloraError | None = None
        self._tell: Callable[[], None] = _nobody_listens

    @property
    def is_over(self) -> bool:
        """Nothing more is wanted from the core: all tokens are here, or the stream has failed."""
        return self.completion is not None or self._error is not None

    def receive(self, event: TokenEvent) -> bool:
        """Takes the next token of a generation that goes on.

        True if a stop string ended it: then the core, which knows none, has to be told.
        """
        self.num_completion_tokens += 1
        # A stop token is returned as an id only.
        text = "" if event.stop_token_id is not None else self._push_token(event.token_id)
        if event.finish is not None:
            text += self._flush_tokens()
        if self._scanner is not None:
            text = self._scan(self._scanner, text, event.finish is not None)
        if event.finish is not None and self.completion is None:
            self._complete(FinishReason(event.finish), stop_token_id=event.stop_token_id)
        self._events.append(event)
        self._texts.append(text)
        self._tell()
        return event.finish is None and self.completion is not None

    def _scan(self, scanner: StopStringScanner, text: str, is_last: bool) -> str:
        text = scanner.push(text, may_stop=self.num_completion_tokens > self.request.min_tokens)
        if scanner.found is not None:
            self._complete(FinishReason.STOP, stop_string=scanner.found)
        elif is_last:
            text += scanner.flush()
        return text

    def _complete(self, reason: FinishReason, stop_string: str | None = None, stop_token_id: int | None = None) -> None:
        self.completion = Completion(
            reason,
            self.num_prompt_tokens,
            self.num_completion_tokens,
            stop_string,
            stop_token_id,
            self.num_cached_tokens,
        )

    def fail(self, error: SloraError, even_if_complete: bool = False) -> None:
        """Ends the stream with `error`. One whose tokens are all here is left to its reader, unless told otherwise."""
        if self._error is not None or (self.completion is not None and not even_if_complete):
            return
        self._error = error
        self._tell()

    def listen(self, tell: Callable[[], None]) -> None:
        """From now on `tell` is called for each token that comes, and when the stream fails; at once for what came."""
        self._tell = tell
        if self._events or self._error is not None:
            tell()

    async def next(self) -> Delta:
        """As `take`, but waits for at least one token."""
        while (delta := self.take()) is None:
            something = asyncio.Event()
            self.listen(something.set)
            await something.wait()
        return delta

    def take(self) -> Delta | None:
        """All that came since the last call, None if nothing did; raises the error that ended the stream.

        The delta with `completion` is the last one. A very large one comes in parts.
        """
        if self._error is not None:
            raise self._error
        if not self._events:
            return None
        events, texts = self._events, self._texts
        self._events, self._texts = events[MAX_MERGED_TOKENS:], texts[MAX_MERGED_TOKENS:]
        if self._events:
            return Delta("".join(texts[:MAX_MERGED_TOKENS]), events[:MAX_MERGED_TOKENS], None)
        return Delta("".join(texts), events, self.completion)


def _nobody_listens() -> None:
    pass
