"""What it would take to have a page's content back, as measured lately; and whose page is worth the least."""

from __future__ import annotations

from services.engine.step import StepPlan

KEPT = 0.95
"""What of a measurement counts at the next one: the last twenty or so decide."""


class MeasuredPrice:
    """Seconds for one of something, over the last few times that several were had."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def note(self, amount: int, seconds: float) -> None:
        """`amount` took `seconds`."""
        self._amount = self._amount * KEPT + amount
        self._seconds = self._seconds * KEPT + seconds

    @property
    def seconds(self) -> float | None:
        """Of one; None before there was any."""
        return self._seconds / self._amount if self._amount and self._seconds else None


class ReloadCosts:
    """KV is computed again, an adapter is loaded again; both are counted in seconds a page.

    What was last used t seconds ago may be expected again in about as long. So a page saves its reload's time once in
    t, and of two pages that one goes for which cost / t is lower: what has been idle the longest, in units of its own
    reload. This is the profit of Scheuermann, Shim and Vingralek 1996 (WATCHMAN, VLDB), with the last use alone to tell
    how often something is used. Among pages of one kind it is least recently used first.
    """

    def __init__(self, tokens_per_page: int) -> None:
        self._tokens_per_page = tokens_per_page
        self._token = MeasuredPrice()
        self._adapter_page = MeasuredPrice()
        self._done_at = 0.0

    def step_done(self, plan: StepPlan, planned_at: float, now: float) -> None:
        """A step came back; it had the device since it was planned, or since the one before it came back.

        Steps with prompts in them tell what a token of KV costs; the price of one in a decode is another.
        """
        if plan.num_tokens > len(plan.chunks):
            self._token.note(plan.num_tokens, now - max(planned_at, self._done_at))
        self._done_at = now

    def loaded(self, num_pages: int, seconds: float) -> None:
        """An adapter of so many pages was loaded."""
        self._adapter_page.note(num_pages, seconds)

    @property
    def adapter_to_kv(self) -> float:
        """How many times a page of KV's cost a page of an adapter costs; 1 while that is not known."""
        token, adapter_page = self._token.seconds, self._adapter_page.seconds
        if token is None or adapter_page is None:
            return 1.0
        return adapter_page / (token * self._tokens_per_page)

    def kv_goes_first(self, kv_idle_seconds: float, adapter_idle_seconds: float) -> bool:
        """Whether a page of KV is worth less than one of an adapter, idle for so long."""
        return adapter_idle_seconds <= kv_idle_seconds * self.adapter_to_kv
