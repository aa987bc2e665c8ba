"""What the gateway knows of one engine, as plain values: what the engine reported and what was sent to it since.

Nothing here speaks to anyone; `EnginePool` keeps these states up to date and the router reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from services.gateway.prompt_clock import Prompt, PromptClock

PROMPT_PRESSURE = 0.05
"""What a request that has no first token yet adds to an engine's pressure, besides its place. On Llama-7B a prompt of
256 tokens delays the next one by 5 ms, a running sequence by 0.05 ms a step: at 256 places it counts as much as
thirteen of those."""

MOST_PROMPT_PRESSURE = 0.1625
"""More such requests add nothing: they are a queue, which is counted as one. Simulated near the knee, with 0.15 one p99
was above least-loaded's; with 0.2 adapters were loaded nearly twice as often."""

FREE_BELOW = 0.5
"""Fuller than that, an engine is busy with decodes, and nearly always with prompts of other gateways."""

MAX_SENT = 4096
"""Adapters that were asked for and never came are remembered up to this number."""


@dataclass(frozen=True)
class EngineProfile:
    """What does not change while an engine lives; a restarted engine has a new `engine_id`."""

    engine_id: str
    base_model: str
    max_running: int
    num_pages: int


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine said it is."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_evictable_pages: int = 0
    draining: bool = False


@dataclass(frozen=True)
class StateUpdate:
    """One message of an engine's state stream; the profile comes with the first one only, and with every resident
    adapter in `loaded`. Adapters are named by digest."""

    load: EngineLoad
    profile: EngineProfile | None = None
    loaded: Sequence[str] = ()
    evicted: Sequence[str] = ()
    loading: Collection[str] = ()
    """All that are being loaded, in every message."""


@dataclass(eq=False)
class EngineState:
    """One engine, by its address.

    Reports come at most ten times a second, so requests sent since the last one are counted here: otherwise every
    request of a burst would go to the engine that was emptiest at the last report.
    """

    address: str
    profile: EngineProfile | None = None
    """The last one known; stays when the engine is lost, so that its base model's name is still understood."""
    load: EngineLoad = EngineLoad()
    is_up: bool = False
    heard_at: float = float("-inf")
    """When it last reported, in seconds of the monotonic clock."""
    resident: set[str] = field(default_factory=set)
    """Digests of the adapters in its memory."""
    loading: frozenset[str] = frozenset()
    """Digests of the adapters that it said are being loaded."""
    num_in_flight: int = 0
    """This gateway's requests there."""
    prompts: PromptClock = field(default_factory=PromptClock)
    """Those of them that have had no message yet."""
    failed_at: float = float("-inf")
    """When it last refused a request because it could not work at all."""
    _num_lives: int = 0
    _num_in_flight_reported: int = 0
    _sent_at: dict[str, float] = field(default_factory=dict)

    def report(self, update: StateUpdate, now: float) -> None:
        """Takes in a message of the engine's state stream."""
        if update.profile is not None:
            self.profile = update.profile
            self._num_lives += 1
            self.failed_at = float("-inf")
            self._forget_adapters()
        self.resident.difference_update(update.evicted)
        self.resident.update(update.loaded)
        self.loading = frozenset(update.loading)
        for digest in (*update.evicted, *update.loaded):
            self._sent_at.pop(digest, None)
        self.load = update.load
        self._num_in_flight_reported = self.num_in_flight
        self.heard_at = now
        self.is_up = True

    def lost(self) -> None:
        """The engine is gone or silent: nothing it said is believed any more."""
        self.is_up = False
        self._forget_adapters()

    def _forget_adapters(self) -> None:
        self.resident.clear()
        self.loading = frozenset()
        self._sent_at.clear()

    def started(self, digest: str | None, now: float) -> bool:
        """A request was sent there, for the adapter of this digest or for the base model. Says whether it is, for all
        that is known, what has the adapter loaded."""
        self.num_in_flight += 1
        if digest is None or digest in self.resident:
            return False
        is_first = digest not in self.loading and self._sent_at.pop(digest, None) is None
        self._sent_at[digest] = now
        if len(self._sent_at) > MAX_SENT:
            del self._sent_at[next(iter(self._sent_at))]
        return is_first

    def asked(self, digest: str | None, now: float, has_it_loaded: bool) -> Prompt:
        """What `started`, which said `has_it_loaded`, waits for its first message; to be given to `prompts` when that
        has come, or will not."""
        waits_for_adapter = digest is not None and digest not in self.resident
        prompt = Prompt(now, waits_for_adapter, has_it_loaded)
        self.prompts.sent(prompt, is_quiet=self.num_in_flight - len(self.prompts) <= 1)
        return prompt

    def ended(self) -> None:
        """A request that was sent there is over."""
        self.num_in_flight -= 1

    def is_loading(self, digest: str, since: float) -> bool:
        """Whether this adapter is being loaded there, or a request for it was sent there after `since`; and it is not
        known resident."""
        if digest in self.resident:
            return False
        return digest in self.loading or self._sent_at.get(digest, float("-inf")) > since

    def failed(self, now: float) -> None:
        """It refused a request with a status that says that it cannot work."""
        self.failed_at = now

    @property
    def life(self) -> tuple[str, int]:
        """Tells this stretch of being up from the next: an engine that failed a request may be tried again after it
        was lost and is back."""
        return self.address, self._num_lives

    @property
    def max_running(self) -> int:
        """Most sequences that run at once there; at least 1."""
        return max(1, self.profile.max_running if self.profile is not None else 1)

    @property
    def is_free(self) -> bool:
        """Whether a prompt that comes is computed at once, as far as is known, and few decodes share its steps."""
        return not self.prompts and not self.load.num_waiting and self.fullness < FREE_BELOW

    @property
    def fullness(self) -> float:
        """How full it is: the fuller of its sequence slots and its pool, plus its queue, all as shares of what it
        can run at once. 0 is idle, 1 full, more means that a new request waits."""
        load = self.load
        reported = load.num_running + load.num_waiting
        since_report = self.num_in_flight - self._num_in_flight_reported
        num_requests = max(reported + since_report, self.num_in_flight, 0)
        num_running = min(load.num_running, num_requests)
        num_waiting = num_requests - num_running
        share_of_slots = num_running / self.max_running
        return max(share_of_slots, self._share_of_pages_in_use()) + num_waiting / self.max_running

    @property
    def pressure(self) -> float:
        """How long a first token will take there, in no unit: fullness, and what prompts that are being computed add.

        Of the latter only this gateway's are known, but those to the moment: a prompt takes less time than a report.
        """
        return self.fullness + min(PROMPT_PRESSURE * len(self.prompts), MOST_PROMPT_PRESSURE)

    def _share_of_pages_in_use(self) -> float:
        num_pages = self.profile.num_pages if self.profile is not None else 0
        if num_pages <= 0 or self.load.num_running == 0:
            return 0.0
        return max(0.0, 1.0 - (self.load.num_free_pages + self.load.num_evictable_pages) / num_pages)
