"""The core without its process: takes messages in, makes steps, says what happened. One thread, no clock, no socket.

With a runner that may have two steps in flight, the next step is planned and submitted before the one that the device
computes is waited for: the device finds its work ready, and planning, commit and reports cost it no time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from services.common.errors import Reason, SloraError
from services.engine.adapters.device import AdapterDevice, AdapterSlots
from services.engine.adapters.loader import AdapterLoader
from services.engine.adapters.residency import Residency
from services.engine.adapters.source import AdapterSource
from services.engine.config import EngineSettings, PoolConfig, SchedulerConfig
from services.engine.core.followers import Followers
from services.engine.core.parallel_loader import ClosingLoader, ParallelLoader, ParallelSlots
from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError
from services.engine.messages import (
    Abort,
    CoreLoad,
    CoreReady,
    Generate,
    Request,
    RequestFailed,
    StepReport,
    TokenEvent,
)
from services.engine.scheduling.policies.combination import make_policy
from services.engine.scheduling.scheduler import Scheduler
from services.engine.scheduling.steps_in_flight import MAX_IN_FLIGHT
from services.engine.step import RunnerLost, SampledToken, StepPlan

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps that may fail one after the other. A request that trips a fault fails alone with its step; a device that is
broken fails all of them. One that was in flight when another failed is not counted: it may have failed of the same."""


class CoreFault(RuntimeError):  # noqa: N818 - a state of the core, not an error for a caller
    """The core cannot trust its state, or cannot get on: its process has to end."""


HandleT = TypeVar("HandleT")


class Runner(Protocol[HandleT]):
    """What carries steps out; `services.engine.execution.model_runner.ModelRunner`."""

    @property
    def pool_config(self) -> PoolConfig:
        """The pool's shape."""

    @property
    def adapter_device(self) -> AdapterDevice:
        """Where adapters are installed."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted and not collected: 1, or 2 to plan one while the device computes another."""

    def submit(self, plan: StepPlan) -> HandleT:
        """Begins a step, or computes it; what names it in `collect`.

        With `max_in_flight` 2 the step before it may not be collected yet, and chunks may have PENDING_TOKEN. If this
        raises, nothing of the step will touch the pool any more, and earlier steps are as they were.
        """

    def collect(self, handle: HandleT) -> list[SampledToken]:
        """Waits for a step; a token for each chunk with a `sample`, in the plan's order.

        It is called once for each handle, in the order of `submit`.
        If this raises, the step is over all the same: the device touches nothing that it named. Both may raise
        RunnerLost: the core has to end.
        """


@dataclass(slots=True)
class _SubmittedStep:
    plan: StepPlan
    handle: Any
    # Another failed while it was in flight, and was counted.
    excused: bool = False


class EngineCore:
    """`handle` messages, then `step`, for ever; `needs_event` says when there is nothing to do but wait."""

    def __init__(
        self,
        settings: EngineSettings,
        runner: Runner[Any],
        source: AdapterSource,
        wake: Callable[[], None],
        followers: Followers | None = None,
    ) -> None:
        """`wake` is called, on another thread, when a load has news: `step` again.

        `followers`: the other processes, where several share the model; `runner` has to be theirs too.
        """
        if not 1 <= runner.max_in_flight <= MAX_IN_FLIGHT:
            raise ValueError(f"a runner has 1 to {MAX_IN_FLIGHT} steps in flight, not {runner.max_in_flight}")
        pool = runner.pool_config
        if (most := pool.num_pages * pool.tokens_per_page) < runner.max_model_len:
            logger.warning(
                "the pool has room for sequences of %d tokens, though the model takes %d: longer ones are refused",
                most, runner.max_model_len,
            )  # fmt: skip
        self._runner = runner
        self._allocator = PageAllocator(pool.num_pages)
        slots: AdapterSlots = runner.adapter_device
        self._loader: ClosingLoader = AdapterLoader(
            source, runner.adapter_device, pool.page_elems, settings.load_timeout_seconds, wake
        )
        if followers is not None:
            slots = everywhere = ParallelSlots(slots, followers)
            self._loader = ParallelLoader(self._loader, everywhere, followers)
            followers.on_outcome(wake)
        self._residency = Residency(self._allocator, slots, self._loader, settings.max_adapters)
        config = SchedulerConfig(
            max_running=settings.max_running,
            max_step_tokens=settings.max_step_tokens,
            max_model_len=runner.max_model_len,
            max_waiting=settings.max_waiting,
            tokens_per_page=pool.tokens_per_page,
            eos_token_ids=runner.eos_token_ids,
            admission_batch=settings.admission_batch,
            prefix_cache=settings.prefix_cache,
            prefix_cache_across_tenants=settings.prefix_cache_across_tenants,
            popularity_half_life_seconds=settings.popularity_half_life_seconds,
        )
        self._policy = make_policy(settings.policies, settings.num_places, admission_batch=config.admission_batch)
        self._scheduler = Scheduler(config, self._allocator, self._residency, self._policy)
        self._max_running = config.max_running
        self._submitted: deque[_SubmittedStep] = deque()
        self._refused: list[RequestFailed] = []
        self._num_steps = 0
        self._num_failed_in_a_row = 0
        self._step_seconds = 0.0
        self._reported = CoreLoad()
        self._reported_loading: tuple[str, ...] = ()
        self.needs_event = True

    def ready(self) -> CoreReady:
        """What the frontend has to know."""
        runner = self._runner
        return CoreReady(runner.pool_config.num_pages, runner.max_model_len, self._max_running, runner.vocab_size)

    def handle(self, message: Request) -> None:
        """Takes a message in; `step` after that."""
        self.needs_event = False
        try:
            if isinstance(message, Generate):
                self._check_vocabulary(message)
                self._scheduler.add(message)
            elif isinstance(message, Abort):
                self._scheduler.abort(message.request_id)
            else:
                self._scheduler.prefetch(message)
        except SloraError as error:
            self._refused.append(RequestFailed(message.request_id, error.reason.name, error.message, error.metadata))

    def step(self) -> StepReport | None:
        """Submits a step, if anything can run, and takes in the oldest, once no more may be in flight or none is added.

        What happened; None if that is nothing yet. Raises CoreFault or PageIntegrityError: the core is not to be used
        any more.
        """
        began = time.perf_counter()
        num_steps = self._num_steps
        submitted = not self._scheduler.wants_settled and self._submit_next()
        full = len(self._submitted) >= self._runner.max_in_flight
        tokens = self._collect() if self._submitted and (full or not submitted) else []
        settled = self._num_steps > num_steps
        if submitted or settled:
            self._step_seconds += time.perf_counter() - began
        news = self._scheduler.take_news()
        failures, self._refused = [*self._refused, *news.failures], []
        # News may have made room: only a round without any means that something has to come from outside.
        self.needs_event = not (submitted or settled or news)
        if self.needs_event:
            self._check_rest()
        load = self._load()
        # An abort frees pages without any news: those who watch the load have to hear of that too.
        loading = tuple(self._residency.under_way())
        is_as_before = loading == self._reported_loading
        if not (settled or news or failures) and load == self._reported and is_as_before:
            return None
        self._reported, self._reported_loading = load, loading
        told = None if is_as_before else loading
        return StepReport(
            load,
            tokens,
            failures,
            loaded=news.loaded,
            evicted=news.evicted,
            loading=told,
            prefetched=news.prefetched,
            found=news.found,
            admitted=news.admitted,
            traced_loads=news.traced_loads,
        )

    def close(self) -> bool:
        """Drops everything, waits for what is in flight, ends the loader's threads; whether every page came back."""
        self._scheduler.close()
        while self._submitted:
            self._collect()
        self._loader.close()
        self._scheduler.close()
        num_free, num_pages = self._allocator.num_free, self._allocator.num_pages
        if num_free != num_pages:
            logger.error("only %d of %d pages came back", num_free, num_pages)
            return False
        self._scheduler.check_integrity()
        logger.info("every page is back: %d of %d", num_free, num_pages)
        return True

    def _submit_next(self) -> bool:
        """Plans a step and submits it; whether one is in flight now that was not."""
        plan = self._scheduler.plan()
        if plan is None:
            return False
        try:
            handle = self._runner.submit(plan)
        except Exception as error:
            self._fail(_SubmittedStep(plan, None), error)
            return False
        self._submitted.append(_SubmittedStep(plan, handle))
        return True

    def _collect(self) -> list[TokenEvent]:
        """Waits for the oldest step and takes it in."""
        step = self._submitted.popleft()
        try:
            tokens = self._scheduler.commit(step.plan, self._runner.collect(step.handle))
        except PageIntegrityError:
            raise
        except Exception as error:
            self._fail(step, error)
            return []
        self._num_steps += 1
        self._num_failed_in_a_row = 0
        return tokens

    def _fail(self, step: _SubmittedStep, error: Exception) -> None:
        """A step could not be submitted or computed: its sequences fail, and no other."""
        if isinstance(error, RunnerLost):
            raise CoreFault(str(error)) from error
        self._num_steps += 1
        extra = {"request_ids": self._scheduler.request_ids(step.plan)}
        logger.error("a step of %d sequences failed", len(step.plan.chunks), exc_info=error, extra=extra)
        if not step.excused:
            self._num_failed_in_a_row += 1
            for other in self._submitted:
                other.excused = True
        if self._num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise CoreFault(f"{MAX_FAILED_STEPS} steps failed in a row, the last with {error!r}") from error
        failure = SloraError(Reason.INTERNAL, f"computing a step failed: {type(error).__name__}")
        self._scheduler.abandon(step.plan, failure)
        self._scheduler.check_integrity()

    def _check_vocabulary(self, request: Generate) -> None:
        """One bad id would fail the whole step that it is in."""
        ids = request.prompt_ids
        if ids and not (min(ids) >= 0 and max(ids) < self._runner.vocab_size):
            raise SloraError(
                Reason.TOKEN_OUT_OF_VOCABULARY,
                f"token ids {min(ids)} to {max(ids)} are not all in [0, {self._runner.vocab_size})",
                field="prompt",
                vocab_size=self._runner.vocab_size,
            )

    def _check_rest(self) -> None:
        """Nothing runs: a good moment to see that all pages are where they belong, and that something will come."""
        if self._scheduler.num_open and not self._residency.num_in_flight:
            raise CoreFault(f"{self._scheduler.num_open} requests wait for something that will never come")
        if not self._scheduler.num_open:
            self._scheduler.check_integrity()

    def _load(self) -> CoreLoad:
        scheduler, allocator = self._scheduler, self._allocator
        return CoreLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=allocator.num_free,
            num_kv_pages=allocator.num_kv,
            num_adapter_pages=allocator.num_adapter,
            num_evictable_pages=self._residency.num_idle_pages + scheduler.kv.num_idle,
            num_cached_pages=scheduler.kv.num_idle,
            num_preemptions_total=scheduler.num_preemptions,
            num_steps_total=self._num_steps,
            num_adapter_hits_total=scheduler.num_adapter_hits,
            num_adapter_misses_total=scheduler.num_adapter_misses,
            num_adapter_load_failures_total=scheduler.num_load_failures,
            step_seconds_total=self._step_seconds,
            num_admitted_total=scheduler.num_admitted,
            num_dropped_total=dict(scheduler.num_dropped),
            num_passed_by_total=self._policy.num_passed_by,
            service_spread=self._policy.service_spread,
            num_prefix_queried_tokens_total=scheduler.kv.num_queried_tokens,
            num_prefix_found_tokens_total=scheduler.kv.num_found_tokens,
            num_speculative_loads_total=dict(scheduler.num_speculative_loads),
        )
