"""The fake device that all of these tests rest on does see what goes wrong."""

from __future__ import annotations

import pytest

from services.engine.messages import SamplingParams
from services.engine.step import BASE_SLOT, SampleRequest, ScheduledChunk, StepPlan
from tests.fakes.fake_model import digest_of, layout_of
from tests.fakes.fake_runner import FakeRunner
from tests.fixtures.installing import install


def chunk(sequence_id: int, page: int, slot: int = BASE_SLOT) -> StepPlan:
    request = SampleRequest(SamplingParams(), [1], [], 0)
    return StepPlan((ScheduledChunk(sequence_id, [1], 0, [page], slot, request),))


def test_the_fake_device_sees_what_is_taken_in_flight() -> None:
    runner = FakeRunner(4, max_in_flight=2)
    device = runner.adapter_device
    install(device, 2, layout_of(digest_of("a"), 1, 8), [3], memoryview(b""))
    step = runner.submit(chunk(1, 0, 2))
    with pytest.raises(AssertionError, match="others have it"):
        runner.submit(chunk(2, 0))
    with pytest.raises(AssertionError, match="an adapter was given"):
        install(device, 1, layout_of(digest_of("b"), 1, 8), [0], memoryview(b""))
    with pytest.raises(AssertionError, match="uses slot 2"):
        device.remove(2)
    runner.collect(step)
    runner.collect(runner.submit(chunk(2, 0)))
    device.remove(2)
