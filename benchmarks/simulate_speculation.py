"""What loading popular adapters ahead of requests gains and costs, without a device.

    python -m benchmarks.simulate_speculation [--duration 120] [--seeds 4]

Adapters of zipf popularity, of which a quarter change places every 20 s (`benchmarks.routing_trace`), and crowds of
long requests for the base model that come in waves and take the adapters' pages: `benchmarks.virtual_engine`, Llama-7B
on one H200, with and without speculation. Requests with an adapter count, of the second half of each trace.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.command_line import parser_of
from benchmarks.record import say
from benchmarks.routing_trace import RoutingTraceShape, draw_routing_trace
from benchmarks.simulate_policies import merged, quantile
from benchmarks.step_model import measured_model
from benchmarks.trace import TraceRequest
from benchmarks.virtual_engine import Arrival, EngineShape, Outcome, VirtualEngine
from services.engine.config import PolicyConfig

VOCAB_SIZE = 32000


@dataclass(frozen=True)
class Waves:
    """Every `seconds` come `num_requests` at once, for the base model, of so many tokens each."""

    seconds: float = 15.0
    num_requests: int = 40
    num_prompt: int = 512
    num_outputs: int = 256


@dataclass(frozen=True)
class Scene:
    """What is simulated."""

    trace: RoutingTraceShape
    waves: Waves | None
    engine: EngineShape
    load_seconds: float
    setting: str = "S1"
    """Whose steps these are (`benchmarks.step_model`): S2's where adapters are large."""


@dataclass(frozen=True)
class Seen:
    """What requests with an adapter saw, and what loads there were, in the whole run; times in seconds."""

    ttfts: tuple[float, ...]
    """In order."""
    num_waited: int
    """Requests whose adapter was not resident when they came."""
    num_loads: int
    num_preemptions: int
    speculative: Counter[str]

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            tuple(sorted(self.ttfts + other.ttfts)),
            self.num_waited + other.num_waited,
            self.num_loads + other.num_loads,
            self.num_preemptions + other.num_preemptions,
            self.speculative + other.speculative,
        )

    def __str__(self) -> str:
        mean, median, p90, p99 = (
            sum(self.ttfts) / len(self.ttfts),
            *(quantile(self.ttfts, share) for share in (0.5, 0.9, 0.99)),
        )
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.speculative.items()))
        return (
            f"{self.num_waited:5} of {len(self.ttfts)} wait for a load  TTFT mean {1e3 * mean:6.1f} p50 "
            f"{1e3 * median:5.1f} p90 {1e3 * p90:6.1f} p99 {1e3 * p99:6.1f} ms  {self.num_loads:5} loads  "
            f"{self.num_preemptions:3} preemptions  {outcomes}"
        )


def draw(scene: Scene, seed: int) -> list[Arrival]:
    """The arrivals of a scene."""
    fill = random.Random(f"{seed} tokens")

    def arrival(at: float, num_prompt: int, num_outputs: int, adapter: int | None) -> Arrival:
        prompt = tuple(fill.choices(range(VOCAB_SIZE), k=num_prompt))
        return Arrival(TraceRequest(at, prompt, num_outputs, adapter))

    asked = [
        arrival(one.arrival_seconds, one.num_prompt, one.num_outputs, one.adapter)
        for one in draw_routing_trace(scene.trace, seed)
    ]
    crowds: list[Arrival] = []
    if scene.waves is not None:
        at = scene.waves.seconds
        while at < asked[-1].request.arrival_seconds:
            crowds += [
                arrival(at, scene.waves.num_prompt, scene.waves.num_outputs, None)
                for _ in range(scene.waves.num_requests)
            ]
            at += scene.waves.seconds
    return merged(asked, crowds)


def serve(scene: Scene, half_life: float, arrivals: Sequence[Arrival]) -> Seen:
    """Takes `arrivals` through an engine; `half_life` 0 is without speculation."""
    shape = replace(scene.engine, popularity_half_life_seconds=half_life)
    model = replace(measured_model(scene.setting), load=scene.load_seconds, load_byte=0.0)
    engine = VirtualEngine(PolicyConfig(), shape, model)
    begin = arrivals[-1].request.arrival_seconds / 2
    return _seen(engine, [one for one in engine.serve(arrivals) if one.arrival.request.arrival_seconds >= begin])


def _seen(engine: VirtualEngine, outcomes: Sequence[Outcome]) -> Seen:
    outcomes = [one for one in outcomes if one.arrival.request.adapter is not None]
    return Seen(
        tuple(sorted(one.ttft for one in outcomes)),
        sum(one.waited_for_load for one in outcomes),
        engine.num_loads,
        engine.scheduler.num_preemptions,
        Counter(engine.scheduler.num_speculative_loads),
    )


def scenes(duration: float) -> dict[str, Scene]:
    """By what sets them apart: adapters' size, how long a load takes, whether KV competes for the pages."""
    trace = RoutingTraceShape(rate=15.0, duration_seconds=duration, num_adapters=300, shift_seconds=20.0)
    small, large = EngineShape(num_pages=3000), EngineShape(num_pages=6000, ranks=(64,))
    first = Scene(trace, Waves(), small, load_seconds=5.14e-3)
    return {
        "rank 8, 5 ms a load": first,
        "rank 8, 50 ms a load": replace(first, load_seconds=0.05),
        "rank 64, 67 ms a load": replace(first, engine=large, load_seconds=0.067, setting="S2"),
        "rank 8, 50 ms, prefix cache": replace(first, engine=replace(small, prefix_cache=True), load_seconds=0.05),
        "rank 8, 50 ms, no waves": replace(first, waves=None, engine=EngineShape(num_pages=1500), load_seconds=0.05),
        "rank 8, 5 ms, room for all": replace(first, engine=EngineShape()),
    }


def main() -> None:
    """Prints a line a scene and half-life; 0 is without speculation."""
    parser = parser_of(__doc__)
    parser.add_argument("--duration", type=float, default=120.0, help="seconds of each trace")
    parser.add_argument("--seeds", type=int, default=4, help="traces that are added up")
    options = parser.parse_args()
    for name, scene in scenes(options.duration).items():
        traces = [draw(scene, seed) for seed in range(1, options.seeds + 1)]
        for half_life in (0.0, 20.0, 60.0):
            first, *others = [serve(scene, half_life, trace) for trace in traces]
            say(f"{name:28} {half_life:3.0f} s  {sum(others, first)}")


if __name__ == "__main__":
    main()
