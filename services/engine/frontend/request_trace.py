"""What traces show of generations and loads: spans made of the frontend's times and of those that the core reports.

The core knows nothing of OpenTelemetry. It gives a load's id away to the store before anybody here has heard of it; the
span is made with that id when the load is over.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from services.common.tracing import TRACEPARENT, Kind, Span, Tracing, Value, traceparent_of
from services.engine.frontend.request import GenerationRequest
from services.engine.messages import TracedLoad


class RequestTrace:
    """The phases of one generation, under the span of its call. Times are seconds since the epoch."""

    def __init__(self, span: Span, request: GenerationRequest) -> None:
        self._span = span
        self._request = request
        self._began = time.time()
        self._sent_at = 0.0
        self._admitted_at: list[float] = []
        self._first_token_at = 0.0
        self._loads: list[TracedLoad] = []

    @property
    def traceparent(self) -> str:
        """The call's span."""
        return traceparent_of(self._span)

    def sent(self) -> None:
        """The prompt has been tokenized, and the core told."""
        self._sent_at = time.time()

    def admitted(self, at: float) -> None:
        """It runs; for the second time or more after a preemption."""
        self._admitted_at.append(at)

    def waited_for(self, load: TracedLoad) -> None:
        """A load of its adapter ended before it ran."""
        self._loads.append(load)

    def first_token(self) -> None:
        """Its first token came."""
        self._first_token_at = time.time()

    def end(self, outcome: str, num_prompt_tokens: int, num_completion_tokens: int, last_token_ago: float) -> None:
        """It is over: its phases become spans. `last_token_ago` are the seconds since its last token came."""
        now = time.time()
        admitted_at = self._admitted_at[0] if self._admitted_at else 0.0
        decoded_at = now - last_token_ago if self._first_token_at else 0.0
        self._phase("tokenize", self._began, self._sent_at)
        if self._sent_at:
            self._queue(admitted_at or self._first_token_at or now)
        if admitted_at:
            self._phase("prefill", admitted_at, self._first_token_at or now)
        if self._first_token_at:
            self._decode(decoded_at)
        adapter = self._request.adapter
        attributes: dict[str, Value] = {
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_completion_tokens,
            "gen_ai.response.finish_reasons": [outcome],
        }
        if adapter is not None:
            attributes |= {"slora.adapter.id": adapter.adapter_id, "slora.adapter.digest": adapter.digest}
        self._span.set(attributes)

    def _phase(self, name: str, began: float, ended: float) -> None:
        self._span.child(name, began=began).end(ended or time.time())

    def _queue(self, ended: float) -> None:
        span = self._span.child("queue", began=self._sent_at, links=[load.own.traceparent for load in self._loads])
        for load in self._loads:
            span.event("adapter load failed" if load.reason else "adapter resident", load.ended)
        span.end(ended)

    def _decode(self, ended: float) -> None:
        span = self._span.child("decode", began=self._first_token_at)
        for again in self._admitted_at[1:]:
            span.event("runs again after a preemption", again)
        span.end(max(ended, self._first_token_at))


def record_load(tracing: Tracing, load: TracedLoad, waiting: Collection[RequestTrace]) -> None:
    """Makes the span of a load that is over: under the request that it was begun for, linked with the others that wait
    for it, as they are with it."""
    parent = load.parent.traceparent
    span = tracing.start(
        "load adapter",
        Kind.INTERNAL,
        ((TRACEPARENT, parent),),
        began=load.began,
        links=[trace.traceparent for trace in waiting if trace.traceparent != parent],
        span_id=load.own.traceparent.split("-")[2],
    )
    span.set(
        {
            "slora.request.id": load.parent.request_id,
            "slora.adapter.id": load.adapter.adapter_id,
            "slora.adapter.digest": load.adapter.digest,
            "slora.adapter.packed_bytes": load.packed_bytes,
            "slora.load.path": "lent" if load.lent else "streamed",
        }
    )
    if load.reason:
        span.fail(load.reason)
    span.end(load.ended)
    for trace in waiting:
        trace.waited_for(load)
