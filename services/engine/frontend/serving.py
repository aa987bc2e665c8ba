"""The frontend itself: starts requests in the core, hands its tokens to their streams, and answers for its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

from services.common.errors import Reason, SloraError
from services.common.request_id import current_request_id
from services.common.tracing import NO_TRACING, Tracing, current_span, traceparent_of
from services.engine.frontend.core_client import CoreClient, CoreListener
from services.engine.frontend.engine_state import EngineProfile, EngineState
from services.engine.frontend.generation import Generation
from services.engine.frontend.metrics import EngineMetrics
from services.engine.frontend.request import Chat, GenerationRequest, ModelLimits, core_request
from services.engine.frontend.request_trace import RequestTrace, record_load
from services.engine.frontend.tokenizer import TextTokenizer
from services.engine.frontend.vllm_metrics import AdapterPresence
from services.engine.messages import Abort, Adapter, CoreReady, Origin, Prefetch, RequestFailed, StepReport

logger = logging.getLogger(__name__)


class Frontend(CoreListener):
    """All requests of one engine, on one event loop."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        metrics: EngineMetrics,
        base_model: str,
        next_engine_id: Callable[[], str],
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`next_engine_id` is called for each core: an engine whose memory was lost is a new one."""
        self.state = EngineState()
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._base_model = base_model
        self._next_engine_id = next_engine_id
        self._tracing = tracing
        self._core: CoreClient | None = None
        self._limits = ModelLimits(0, 0)
        self._core_ids = itertools.count(1)
        self._generations: dict[int, Generation] = {}
        self._prefetches: dict[int, asyncio.Future[float]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.drained = asyncio.Event()
        """Set for ever when the engine has drained, or was cut short in that."""
        metrics.watch_core(
            lambda: self.state.core_load, lambda: len(self.state.resident), lambda: self._core is not None
        )

    # Requests ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """Starts a generation; leaving the context ends it: what the core still holds for it is freed at once.

        Raises SloraError: the request does not fit the model, or no core is ready for it.
        """
        started_at = time.monotonic()
        generation, outcome = None, "cancelled"
        try:
            generation = await self._start(request, started_at)
            yield generation
            outcome = generation.completion.finish_reason.value if generation.completion else "abandoned"
        except SloraError as error:
            outcome = error.reason.name
            raise
        except Exception:
            outcome = Reason.INTERNAL.name
            raise
        finally:
            if generation is None:
                self.refused(request.request_id, request.adapter, outcome)
            else:
                # A gateway cancels its call when it has read the last message, which may be heard before that one's
                # writing is over.
                finished = generation.completion if outcome == "cancelled" else None
                self._end(generation, finished.finish_reason.value if finished else outcome)

    async def _start(self, request: GenerationRequest, started_at: float) -> Generation:
        self._check_open()
        span = current_span()
        trace = RequestTrace(span, request) if span.is_recording else None
        prompt_ids = await self._prompt_ids(request.prompt)
        core = self._check_open()  # a long prompt's tokenizing may outlive the core
        core_id = next(self._core_ids)
        message = core_request(request, core_id, prompt_ids, self._limits, traceparent_of(span))
        core.check_room()
        detokenizer = self._tokenizer.detokenizer()
        label = self._metrics.label(request.adapter)
        generation = Generation(request, core_id, len(prompt_ids), detokenizer, started_at, label, trace)
        self._generations[core_id] = generation
        self._idle.clear()
        core.send(message)
        if trace is not None:
            trace.sent()
        return generation

    async def _prompt_ids(self, prompt: str | Chat | Sequence[int]) -> Sequence[int]:
        if isinstance(prompt, Chat):
            return await self._tokenizer.encode_chat_async(prompt, self._limits)
        return await self._tokenizer.encode_async(prompt, self._limits) if isinstance(prompt, str) else prompt

    def _end(self, generation: Generation, outcome: str) -> None:
        del self._generations[generation.core_id]
        self._check_idle()
        if generation.completion is None:
            self._abort(generation.core_id)
        request, seconds = generation.request, time.monotonic() - generation.started_at
        if generation.trace is not None:
            last_token_ago = time.monotonic() - generation.last_token_at
            num_tokens = generation.num_completion_tokens
            generation.trace.end(outcome, generation.num_prompt_tokens, num_tokens, last_token_ago)
        self._metrics.request_ended(generation.adapter_label, outcome, generation.num_prompt_tokens, seconds)
        logger.info(
            "request ended",
            extra={
                "request_id": request.request_id,
                "adapter_id": request.adapter.adapter_id if request.adapter else "",
                "outcome": outcome,
                "num_prompt_tokens": generation.num_prompt_tokens,
                "num_cached_tokens": generation.num_cached_tokens,
                "num_completion_tokens": generation.num_completion_tokens,
                "seconds": round(seconds, 6),
            },
        )

    def refused(self, request_id: str, adapter: Adapter | None, outcome: str) -> None:
        """Notes a request that ended before the core heard of it; `outcome` names the reason."""
        self._metrics.request_refused(self._metrics.label(adapter), outcome)
        adapter_id = adapter.adapter_id if adapter else ""
        extra = {"request_id": request_id, "adapter_id": adapter_id, "outcome": outcome}
        logger.info("request refused", extra=extra)

    async def prefetch(self, adapter: Adapter) -> float:
        """Returns when `adapter` is resident: how many seconds its load took, 0 if it was resident already."""
        core = self._check_open()
        core.check_room()
        core_id = next(self._core_ids)
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._prefetches[core_id] = answer
        self._idle.clear()
        core.send(Prefetch(core_id, adapter, Origin(current_request_id(), traceparent_of(current_span()))))
        try:
            return await answer
        finally:
            del self._prefetches[core_id]
            self._check_idle()
            if answer.cancelled():
                self._abort(core_id)

    @property
    def limits(self) -> ModelLimits:
        """The model's limits. Raises, saying why, while no core is ready."""
        self._check_open()
        return self._limits

    def adapter_presence(self) -> AdapterPresence:
        """Adapters in the pool, and those that requests without a token yet wait for. Safe on any thread."""
        resident = self.state.resident.copy()
        waiting = (g.request.adapter for g in tuple(self._generations.values()) if not g.last_token_at)
        awaited = {adapter.digest: adapter for adapter in waiting if adapter and adapter.digest not in resident}
        return AdapterPresence(tuple(resident.values()), tuple(awaited.values()))

    def token_text(self, token_id: int) -> str:
        """The token's own text; empty if it is part of a character."""
        return self._tokenizer.token_text(token_id)

    def _check_open(self) -> CoreClient:
        if self.state.draining:
            raise SloraError(Reason.DRAINING, "the engine is shutting down and takes no new requests; try another")
        self.state.check_available()
        assert self._core is not None
        return self._core

    def _abort(self, core_id: int) -> None:
        if self._core is not None:
            self._core.send(Abort(core_id))

    def _check_idle(self) -> None:
        if not self._generations and not self._prefetches:
            self._idle.set()

    # The core ---------------------------------------------------------------------------------------------------------

    def core_ready(self, core: CoreClient, ready: CoreReady) -> None:
        """Takes requests from now on."""
        self._core = core
        self._limits = ModelLimits(ready.vocab_size, ready.max_model_len)
        self.state.start(
            EngineProfile(
                self._next_engine_id(), self._base_model, ready.max_model_len, ready.max_running, ready.num_pages
            )
        )

    def core_report(self, report: StepReport) -> None:
        """Hands a step's tokens and failures to their requests, and its changes to the watchers."""
        try:
            for core_id, num_tokens in report.found:
                generation = self._generations.get(core_id)
                if generation is not None:
                    generation.num_cached_tokens = num_tokens
            if report.admitted or report.traced_loads:
                self._trace(report)
            if report.tokens:
                self._hand_out(report)
            for failure in report.failures:
                self._fail(failure)
            for core_id, seconds in report.prefetched:
                prefetch = self._prefetches.get(core_id)
                if prefetch is not None and not prefetch.done():
                    prefetch.set_result(seconds)
            for event in report.loaded:
                self._metrics.adapter_loaded(event)
            self.state.update(report)
        except Exception:
            # What the frontend knows of the core may be wrong now, and must not be served: start afresh.
            logger.exception("a report of the core could not be handled")
            if self._core is not None:
                self._core.disconnect()

    def _hand_out(self, report: StepReport) -> None:
        now = time.monotonic()
        generations = self._generations
        intervals: dict[tuple[str, float], int] = {}
        firsts: list[str] = []
        for event in report.tokens:
            generation = generations.get(event.request_id)
            if generation is None or generation.is_over:
                continue  # ended here while the core's step was under way
            previous = generation.last_token_at
            if previous:
                key = (generation.adapter_label, previous)
                intervals[key] = intervals.get(key, 0) + 1
            else:
                firsts.append(self._first_token(generation, now))
            generation.last_token_at = now
            if generation.receive(event):
                self._abort(event.request_id)
        self._metrics.tokens_came(intervals, firsts, now)

    def _first_token(self, generation: Generation, now: float) -> str:
        label = generation.adapter_label = self._metrics.claim_label(generation.request.adapter)
        self._metrics.time_to_first_token.observe(label, now - generation.started_at)
        if generation.trace is not None:
            generation.trace.first_token()
        return label

    def _trace(self, report: StepReport) -> None:
        """Ahead of the report's tokens: who has one is taken to wait for nothing."""
        traced = [(g.request.adapter, g.trace) for g in self._generations.values() if g.trace and not g.last_token_at]
        for load in report.traced_loads:
            waiting = [trace for adapter, trace in traced if adapter and adapter.digest == load.adapter.digest]
            record_load(self._tracing, load, waiting)
        for core_id, at in report.admitted:
            generation = self._generations.get(core_id)
            if generation is not None and generation.trace is not None:
                generation.trace.admitted(at)

    def _fail(self, failure: RequestFailed) -> None:
        reason = Reason.__members__.get(failure.reason, Reason.INTERNAL)
        error = SloraError(reason, failure.message, **failure.metadata)
        generation = self._generations.get(failure.request_id)
        if generation is not None:
            generation.fail(error)
        prefetch = self._prefetches.get(failure.request_id)
        if prefetch is not None and not prefetch.done():
            prefetch.set_exception(error)

    def core_lost(self, reason: str, expected: bool) -> None:
        """Ends every open request and watch at once."""
        if self._core is None:
            return  # it never was ready: nobody waits for it
        self._core = None
        if not expected:
            self._metrics.core_deaths.inc()
            logger.error("the core is gone", extra={"reason": reason, "num_requests": len(self._generations)})
        error = SloraError(
            Reason.ENGINE_CORE_DEAD, "the engine's core process died and is being started again; send the request again"
        )
        self._end_all(error)
        self.state.end(error)

    def _end_all(self, error: SloraError, even_if_complete: bool = False) -> None:
        for generation in self._generations.values():
            generation.fail(error, even_if_complete)
        for prefetch in self._prefetches.values():
            if not prefetch.done():
                prefetch.set_exception(error)

    # The end ----------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuses new requests and waits for the open ones; those still open when this is cancelled are cut."""
        self.state.drain()
        error = SloraError(Reason.DRAINING, "the engine shut down before this ended; try another")
        try:
            await self._idle.wait()
        finally:
            self._end_all(error, even_if_complete=True)
            self.state.end(error)
            self.drained.set()
