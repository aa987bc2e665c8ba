"""What a core tells of requests that somebody sees in a trace."""

from __future__ import annotations

import time

import msgspec

from services.common.errors import Reason, SloraError
from services.engine.messages import (
    NOBODY,
    Generate,
    Origin,
)
from tests.fakes.core_world import World, both_depths
from tests.fakes.fake_model import generate


def traced(request: Generate, number: int) -> Generate:
    return msgspec.structs.replace(request, origin=Origin(f"r{number}", f"00-{number:032x}-{number:016x}-01"))


@both_depths
def test_who_is_traced_hears_when_it_ran_and_of_loads_begun_for_it(depth: int) -> None:
    world = World(depth)
    world.source.add("a")
    world.source.add("b", error=SloraError(Reason.ADAPTER_NOT_FOUND, "gone"))
    began = time.time()
    world.add(
        traced(generate(1, [5], 3, "a"), 1),
        traced(generate(2, [5], 3, "a"), 2),
        traced(generate(3, [5], 3, "b"), 3),
        generate(4, [5], 3, "a"),
    )
    world.run()
    admitted = dict(pair for report in world.reports for pair in report.admitted)
    assert admitted.keys() == {1, 2}
    loads = {load.parent.request_id: load for report in world.reports for load in report.traced_loads}
    assert loads.keys() == {"r1", "r3"}
    for request_id, load in loads.items():
        parts = [origin.traceparent.split("-") for origin in (load.parent, load.own)]
        assert parts[0][1] == parts[1][1]
        assert parts[0][2] != parts[1][2]
        # The store is told the load's own.
        assert load.own in world.source.origins
        assert load.own.request_id == request_id
        assert began - 1 <= load.began <= load.ended <= time.time() + 1
    assert (loads["r1"].reason, loads["r3"].reason) == ("", "ADAPTER_NOT_FOUND")
    assert loads["r1"].ended <= admitted[1] + 1
    world.core.close()


@both_depths
def test_who_is_not_traced_costs_no_report(depth: int) -> None:
    world = World(depth)
    world.source.add("a")
    world.add(generate(1, [5], 3, "a"))
    world.run()
    assert world.source.origins == [NOBODY]
    assert not any(report.admitted or report.traced_loads for report in world.reports)
    world.core.close()
