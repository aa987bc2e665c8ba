"""How often a call of S3 is tried, by a clock that only the tries move."""

from __future__ import annotations

import botocore.exceptions
import pytest

from services.adapter_store.s3_retries import RetryPolicy

SILENT = botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3")
BROKEN = botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3")


class Call:
    """A call of S3 that takes `seconds` a try and fails `num_failures` times; the first `num_steps` get somewhere."""

    def __init__(self, error: Exception, seconds: float, num_failures: int = 1000, num_steps: int = 0) -> None:
        self._error, self._seconds = error, seconds
        self._num_failures, self._num_steps = num_failures, num_steps
        self.num_tries = 0
        self.retries: list[str] = []

    async def run(self, max_attempts: int, patience: float) -> int:
        policy = RetryPolicy(max_attempts, patience, self.retries.append, clock=self._now)
        return await policy.run(self._attempt, progress=lambda: min(self.num_tries, self._num_steps))

    def _now(self) -> float:
        return 100.0 + self.num_tries * self._seconds

    async def _attempt(self) -> int:
        self.num_tries += 1
        if self.num_tries <= self._num_failures:
            raise self._error
        return self.num_tries


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.adapter_store.s3_retries.pause_seconds", lambda cause, number: 0.0)


async def test_a_silent_s3_is_asked_again_until_patience_ends() -> None:
    """The store's patience is twice its longest silence."""
    call = Call(SILENT, seconds=1.0)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        await call.run(max_attempts=4, patience=2.0)
    assert (call.num_tries, call.retries) == (2, ["silent"])


async def test_none_begins_behind_a_try_that_used_up_the_patience() -> None:
    call = Call(SILENT, seconds=2.0)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        await call.run(max_attempts=4, patience=2.0)
    assert (call.num_tries, call.retries) == (1, [])


@pytest.mark.parametrize("error", [SILENT, BROKEN])
async def test_tries_have_an_end_however_short_they_are(error: Exception) -> None:
    call = Call(error, seconds=0.0)
    with pytest.raises(type(error)):
        await call.run(max_attempts=4, patience=2.0)
    assert call.num_tries == 4


async def test_progress_renews_the_patience() -> None:
    call = Call(BROKEN, seconds=1.5, num_steps=3)
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        await call.run(max_attempts=100, patience=2.0)
    assert (call.num_tries, call.retries) == (5, ["broken"] * 4), "three that got on, and two more within 2 s of them"


async def test_a_call_that_comes_through_in_time_is_answered() -> None:
    call = Call(SILENT, seconds=0.5, num_failures=3)
    assert await call.run(max_attempts=4, patience=2.0) == 4
    assert call.retries == ["silent"] * 3


@pytest.mark.parametrize(("error", "tries"), [(SILENT, 4), (ValueError("what no try mends"), 1)])
async def test_only_what_another_try_may_mend_is_tried_again(error: Exception, tries: int) -> None:
    call = Call(error, seconds=0.0)
    with pytest.raises(type(error)):
        await call.run(max_attempts=4, patience=2.0)
    assert call.num_tries == tries
