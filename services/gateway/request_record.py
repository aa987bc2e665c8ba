"""What is noted of one request while it is served; it becomes metrics, one line of the log, and what its span says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from services.common.errors import Reason, SloraError
from services.common.tracing import NO_SPAN, SERVER_FAULTS, Span, Value
from services.gateway.metrics import UNRESOLVED, GatewayMetrics, ModelMetrics
from services.gateway.router import Decision

logger = logging.getLogger(__name__)

OK, CANCELLED = "ok", "cancelled"


class RequestRecord:
    """One request's times and counts. `finish` is called exactly once."""

    def __init__(
        self, metrics: GatewayMetrics, clock: Callable[[], float] = time.monotonic, span: Span = NO_SPAN
    ) -> None:
        """`span` ends with the request."""
        self._metrics = metrics
        self.span = span
        self._clock = clock
        self._model: ModelMetrics | None = None
        self._started_at = clock()
        self._first_at = 0.0
        self._last_at = 0.0
        self._num_tokens = 0
        self._num_prompt_tokens = 0
        self._num_attempts = 0
        self._engine = ""
        self._decision = ""
        self.request_id = ""
        self.tenant = ""
        self.resolved_model = ""
        self._digest: str | None = None
        metrics.in_flight.inc()

    def on_resolved(self, name: str, resolved_model: str, digest: str | None = None) -> None:
        """The request's model is known: `name` for metrics, `resolved_model` (with its version) for the log, and its
        adapter's digest."""
        self._digest = digest
        self._model = self._metrics.of_model(name)
        self.resolved_model = resolved_model

    def on_sent(self, engine: str, decision: Decision, previous: SloraError | None) -> None:
        """The request goes to `engine`; `previous` is why the one before could not answer."""
        self._num_attempts += 1
        self._engine, self._decision = engine, decision.value
        self._metrics.routed.labels(decision.value).inc()
        if previous is not None:
            self._metrics.retries.labels(previous.reason.name.lower()).inc()
            fields = {"request_id": self.request_id, "reason": previous.reason.name, "engine": engine}
            logger.warning("sent to another engine: %s", previous.message, extra=fields)

    def on_message(self, num_tokens: int) -> None:
        """A message of the stream came."""
        now = self._clock()
        model = self._model
        if model is not None:
            if not self._first_at:
                self._first_at = now
                self.span.event("first message")
                model.observe_first_token(now - self._started_at)
            elif num_tokens:
                model.observe_inter_token(now - self._last_at, num_tokens)
        self._last_at = now
        self._num_tokens += num_tokens

    def on_completion(self, num_prompt_tokens: int) -> None:
        """The stream's last message came."""
        self._num_prompt_tokens = num_prompt_tokens

    @property
    def has_begun(self) -> bool:
        """Whether a message of the stream came."""
        return bool(self._first_at)

    def num_tokens_used(self, prompt_estimate: int) -> int:
        """Tokens of prompt and completion so far; none before the first message. The engine tells the prompt's number
        at the end only: of a stream that ended before, it is `prompt_estimate`."""
        return (self._num_prompt_tokens or prompt_estimate) + self._num_tokens if self.has_begun else 0

    def finish(self, outcome: str) -> None:
        """The request is over: `ok`, `cancelled` or an error's reason in lower case."""
        self._metrics.in_flight.dec()
        label = UNRESOLVED if self._model is None else self._model.label
        self._metrics.requests.labels(label, outcome).inc()
        if self._model is not None:
            self._model.count_prompt_tokens(self._num_prompt_tokens)
            self._model.count_completion_tokens(self._num_tokens)
        if logger.isEnabledFor(logging.INFO):
            logger.info("request ended", extra=self._fields(outcome))
        if self.span.is_recording:
            self.span.set(self._attributes())
            if outcome != OK:
                reason = Reason.__members__.get(outcome.upper())
                self.span.fail(outcome, reason is not None and reason.status.name in SERVER_FAULTS)
        self.span.end()

    def _attributes(self) -> dict[str, Value]:
        attributes: dict[str, Value] = {} if self._digest is None else {"slora.adapter.digest": self._digest}
        return attributes | {
            "slora.request.id": self.request_id,
            "slora.tenant": self.tenant,
            "gen_ai.response.model": self.resolved_model,
            "gen_ai.usage.input_tokens": self._num_prompt_tokens,
            "gen_ai.usage.output_tokens": self._num_tokens,
            "slora.attempts": self._num_attempts,
            "slora.engine.address": self._engine,
            "slora.routing.decision": self._decision,
        }

    def _fields(self, outcome: str) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "tenant": self.tenant,
            "model": self.resolved_model,
            "outcome": outcome,
            "engine": self._engine,
            "decision": self._decision,
            "num_attempts": self._num_attempts,
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_completion_tokens": self._num_tokens,
            "first_token_seconds": round(self._first_at - self._started_at, 6) if self._first_at else None,
            "seconds": round(self._clock() - self._started_at, 6),
        }
