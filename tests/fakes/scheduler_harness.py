"""A scheduler with its memory, a fake device and a scripted loader, stepped by hand and checked after every step.

With `max_in_flight` 2 a step is planned and submitted while the one before it is in flight, as the core does it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState, Residency
from services.engine.config import SchedulerConfig
from services.engine.memory.page_allocator import PageAllocator, PageOwner
from services.engine.messages import Generate, Prefetch, RequestFailed, TokenEvent
from services.engine.scheduling import admission as admission_module
from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.scheduler import Scheduler
from services.engine.scheduling.sequence import Sequence, SequenceState
from services.engine.step import SampledToken, StepPlan
from tests.fakes.fake_device import SubmittedStep
from tests.fakes.fake_model import EOS, adapter, digest_of, expected_output, generate
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.page_oracle import PageOracle
from tests.fakes.scripted_loader import ScriptedLoader


@dataclass
class Harness:
    """Everything but threads and processes."""

    num_pages: int = 16
    tokens_per_page: int = 4
    max_running: int = 8
    max_step_tokens: int = 16
    max_model_len: int = 64
    max_waiting: int = 1000
    max_adapters: int = 8
    admission_batch: int = 1
    prefix_cache: bool = False
    across_tenants: bool = False
    half_life: float = 0.0
    max_in_flight: int = 1
    seed: int = 0
    check: bool = True
    policy: Policy | None = None
    # Whether turns stay while sequences wait; else who passed whom cannot be told after a step.
    turns_stay: bool = True
    now: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, TokenEvent] = field(default_factory=dict)
    failures: dict[int, RequestFailed] = field(default_factory=dict)
    prefetched: dict[int, float] = field(default_factory=dict)
    found: dict[int, int] = field(default_factory=dict)
    evicted: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    requests: dict[int, Generate] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    plans: list[StepPlan] = field(default_factory=list)
    in_flight: list[tuple[StepPlan, SubmittedStep]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.runner = FakeRunner(
            self.num_pages,
            self.tokens_per_page,
            self.max_model_len,
            max_step_tokens=self.max_step_tokens,
            max_in_flight=self.max_in_flight,
        )
        self.device = self.runner.adapter_device
        self.loader = ScriptedLoader(self.device, self.runner.pool_config.page_elems, self.rng)
        self.allocator = PageAllocator(self.num_pages)
        self.residency = Residency(self.allocator, self.device, self.loader, self.max_adapters, self.clock)
        config = SchedulerConfig(
            self.max_running,
            self.max_step_tokens,
            self.max_model_len,
            self.max_waiting,
            self.tokens_per_page,
            frozenset({EOS}),
            self.admission_batch,
            self.prefix_cache,
            self.across_tenants,
            self.half_life,
        )
        self.scheduler = Scheduler(config, self.allocator, self.residency, self.policy, self.clock)
        self.dropped: list[Sequence] = []  # by the last plan, behind those that it let run
        self.scheduler._drop = self._drop_and_note  # type: ignore[method-assign]
        self.oracle = PageOracle(self.tokens_per_page, self.across_tenants)

    def _drop_and_note(self, step_is_full: bool) -> None:
        before = self.waiting()
        Scheduler._drop(self.scheduler, step_is_full)
        left = set(self.waiting())
        self.dropped = [sequence for sequence in before if sequence not in left]

    def clock(self) -> float:
        """Time goes on with whoever asks; what is idle longer, and what computing takes, is the test's seed's."""
        self.now += self.rng.random()
        return self.now

    def adapters(self, **sizes: int) -> None:
        """Names adapters and the pages they take."""
        self.loader.sizes |= {digest_of(name): size for name, size in sizes.items()}

    def add(self, request: Generate) -> SloraError | None:
        """Adds a request; why it was refused, if it was."""
        try:
            self.scheduler.add(request)
        except SloraError as error:
            return error
        self.requests[request.request_id] = request
        return None

    def prefetch(self, request_id: int, name: str) -> None:
        wanted = adapter(name)
        assert wanted is not None
        self.scheduler.prefetch(Prefetch(request_id, wanted))

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.aborted.add(request_id)

    def plan(self) -> StepPlan | None:
        if not self.check:
            return self.scheduler.plan()
        held = {s.request_id: len(s.block_table) for s in self.running()}
        resident = {s.digest for s in self.waiting() if s.digest and self.residency.is_resident(s.digest)}
        loading = set(self.residency.loading())
        plan = self.scheduler.plan()
        self.check_nobody_waits_behind_speculation()
        if self.turns_stay:
            self.check_order(held)
        self.oracle.check_begun(s for s in self.running() if s.request_id not in held)
        self.check_nobody_was_robbed(held, resident, loading)
        self.check_whole()
        return plan

    def submit(self) -> StepPlan | None:
        """Plans a step and lets it fly."""
        plan = self.plan()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.runner.submit(plan)))
        return plan

    def collect(self) -> None:
        """Takes in the oldest step in flight."""
        plan, submitted = self.in_flight.pop(0)
        self.commit(plan, self.runner.collect(submitted))

    def abandon(self, newest: bool = False) -> None:
        """A step in flight comes to nothing."""
        plan, submitted = self.in_flight.pop(-1 if newest else 0)
        self.runner.drop(submitted)
        self.oracle.failed(plan)
        self.scheduler.abandon(plan, SloraError(Reason.INTERNAL, "the step failed"))
        self.hear()

    def commit(self, plan: StepPlan, tokens: list[SampledToken]) -> None:
        if self.check:
            self.oracle.carried_out(plan, self.scheduler._sequences)
        for event in self.scheduler.commit(plan, tokens):
            assert event.request_id not in self.finishes
            self.tokens.setdefault(event.request_id, []).append(event.token_id)
            if event.finish is not None:
                self.finishes[event.request_id] = event

    def step(self, advance: bool = True) -> bool:
        """A step as the core makes it; False if nothing was submitted and nothing came back."""
        if advance:
            self.loader.advance()
        plan = None if self.scheduler.wants_settled else self.submit()
        collects = bool(self.in_flight) and (plan is None or len(self.in_flight) >= self.max_in_flight)
        if collects:
            self.collect()
        self.hear()
        gets_on = plan is not None or collects
        if self.check:
            self.check_whole()
            stuck = not gets_on and self.scheduler.num_open and not self.residency.num_in_flight
            assert not stuck or self.loader.num_busy or self.prefetches_only(), "nothing runs and nothing will come"
        return gets_on

    def hear(self) -> None:
        news = self.scheduler.take_news()
        self.failures |= {failure.request_id: failure for failure in news.failures}
        self.prefetched |= dict(news.prefetched)
        self.found |= dict(news.found)
        self.evicted += news.evicted
        unused = self.scheduler._speculation.unused
        assert unused <= {digest for digest, _ in self.residency.idle()}, "nobody uses what nobody asked for"
        self.loaded += [loaded.adapter.digest for loaded in news.loaded]

    def run(self, max_steps: int = 20000) -> None:
        """Until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.num_open and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {[s.request_id for s in self.waiting()]} wait")

    def until(self, name: str, state: AdapterState) -> None:
        """Steps until the adapter `name` is in `state`."""
        for _ in range(100):
            if self.residency.state(digest_of(name)) is state:
                return
            self.step()
        raise AssertionError(f"{name} is {self.residency.state(digest_of(name))}, not {state}")

    def settle(self) -> None:
        """Lets loads that nobody waits for come to their end."""
        for _ in range(100):
            if not self.loader.num_busy:
                return
            self.step()
        raise AssertionError("loads do not end")

    def waiting(self) -> list[Sequence]:
        return self.scheduler._queue.window(1 << 30)

    def running(self) -> list[Sequence]:
        return list(self.scheduler._running)

    def ids_running(self) -> list[int]:
        return [s.request_id for s in self.running()]

    def prefetches_only(self) -> bool:
        return not self.scheduler.num_running and not self.scheduler.num_waiting

    def check_order(self, held: dict[int, int]) -> None:
        """Nobody who lacks pages was passed: those behind a sequence run only if it waits for bytes.

        Beyond the look-ahead, those without their adapter are not looked at.
        """
        started = [s for s in self.running() if s.request_id not in held]
        queue = sorted([*started, *self.dropped, *self.waiting()], key=lambda s: s.turn)
        for position, sequence in enumerate(queue):
            if sequence in started or sequence in self.dropped:
                continue
            if position >= admission_module.LOOK_AHEAD and sequence not in self.scheduler._queue._ready:
                continue
            if self.scheduler.kv.awaits(sequence):
                continue
            state = AdapterState.RESIDENT if sequence.digest is None else self.residency.state(sequence.digest)
            if state in (AdapterState.RESIDENT, AdapterState.SIZED, AdapterState.LEAVING):
                passed = [s.turn for s in started if s.turn > sequence.turn]
                assert not passed, f"{sequence.request_id} ({state}) was passed by turns {passed}"

    def check_nobody_was_robbed(self, held: dict[int, int], resident: set[str], loading: set[str]) -> None:
        """An adapter that a waiting sequence needs is evicted only for one that arrived before it."""
        gained = [s.turn for s in self.running() if len(s.block_table) > held.get(s.request_id, 0)]
        for digest in set(self.residency.loading()) - loading:
            earliest = self.scheduler._queue.earliest_user(digest)
            gained += [] if earliest is None else [earliest]
        for sequence in self.waiting():
            if sequence.digest in resident and not self.residency.is_resident(sequence.digest):
                assert min(gained, default=sequence.turn) < sequence.turn, f"{sequence.request_id} was robbed"

    def check_nobody_waits_behind_speculation(self) -> None:
        """What is loaded for nobody is the only load, unless it was given up just now; and nobody lacks its pages."""
        digest = self.scheduler._speculation.under_way
        if digest is not None and self.residency.state(digest) is not AdapterState.LEAVING:
            assert list(self.residency.under_way()) == [digest]
            assert self.scheduler._queue.num_unready == 0
            assert not self.scheduler._prefetches

    def check_speculation(self) -> None:
        """Every load that was begun for nobody came to one end, or has not yet."""
        speculation = self.scheduler._speculation
        counts = dict(self.scheduler.num_speculative_loads)
        open_ones = len(speculation.unused) + (speculation.under_way is not None)
        assert counts.pop("begun", 0) == sum(counts.values()) + open_ones

    def check_whole(self) -> None:
        self.scheduler.check_integrity()
        self.check_speculation()
        self.check_flight()
        for sequence in self.running():
            assert sequence.state is SequenceState.RUNNING
            assert len(sequence.block_table) * self.tokens_per_page >= sequence.num_computed
            if sequence.digest is not None:
                assert self.device.installed[sequence.adapter_slot][0] == sequence.digest
        for sequence in self.waiting():
            assert sequence.state is SequenceState.WAITING
            assert not sequence.block_table
        ready = [s for s in self.waiting() if s.digest is None or self.residency.is_resident(s.digest)]
        assert self.scheduler._queue._ready == ready

    def check_flight(self) -> None:
        """What a step in flight names is as it was: nothing was freed, and what it writes to nobody else has."""
        holders: dict[int, set[int]] = defaultdict(set)
        for sequence in self.running():
            for page in sequence.block_table:
                holders[page].add(sequence.request_id)
        for _, step in self.in_flight:
            for chunk in step.chunks:
                for place, page in enumerate(chunk.block_table):
                    assert self.allocator.owner(page) is PageOwner.KV, f"page {page} was freed in flight"
                    written = (place + 1) * self.tokens_per_page > chunk.start
                    assert not written or holders[page] <= {chunk.sequence_id}, f"page {page} was given on"
                digest = self.device.digest_at(chunk.adapter_slot)
                request = self.requests[chunk.sequence_id].adapter
                assert digest == (request and request.digest), "the slot's adapter was changed in flight"
                assert digest is None or digest not in dict(self.residency.idle()), "the adapter is not kept"

    def check_answers(self) -> None:
        """Every request that was neither refused nor aborted gave exactly the tokens it must give."""
        for request_id, request in self.requests.items():
            got = self.tokens.get(request_id, [])
            wanted = expected_output(request, self.max_model_len)
            if request_id in self.aborted or request_id in self.failures:
                assert got == wanted[: len(got)]
            else:
                assert got == wanted, request_id
                assert request_id in self.finishes

    def check_empty(self) -> None:
        """After everything has ended only idle adapters hold pages; without them every page is free."""
        self.settle()
        assert self.allocator.num_kv == self.scheduler.kv.num_idle
        self.scheduler._cache.evict(self.num_pages)
        assert self.allocator.num_kv == 0
        for digest in [digest for digest, _ in self.residency.idle()]:
            self.residency.evict(digest)
        assert self.allocator.num_free == self.num_pages
        assert self.residency.num_free_slots == self.max_adapters
        assert not self.device.installed
        self.scheduler.check_integrity()


def chunks(harness: Harness) -> list[tuple[int, int]]:
    """The last step as (request, tokens)."""
    return [(chunk.sequence_id, len(chunk.token_ids)) for chunk in harness.plans[-1].chunks]


def long(request_id: int, prompt_len: int, max_tokens: int, name: str | None = None) -> Generate:
    """A request that ends with its last token and not before."""
    return generate(request_id, [1 + request_id % 90] * prompt_len, max_tokens, name, ignore_eos=True)


def instant(harness: Harness) -> Harness:
    """Its loads take no time but the steps that they need, and one that is cancelled is."""
    harness.loader.max_ticks = 0
    harness.loader.too_late_rate = 0.0
    return harness
