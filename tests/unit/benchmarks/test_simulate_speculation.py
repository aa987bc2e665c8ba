"""Speculation in virtual time, on short traces: fewer wait for loads, and where nothing is evicted nothing changes."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.simulate_speculation import Scene, Seen, Waves, draw, scenes, serve

SCENES = scenes(20.0)


def pair(scene: Scene, num_pages: int, seed: int = 7) -> tuple[Seen, Seen]:
    """Without and with it."""
    trace = replace(scene.trace, num_adapters=60, shift_seconds=8.0)
    scene = replace(
        scene, trace=trace, waves=Waves(5.0, 40, num_outputs=128), engine=replace(scene.engine, num_pages=num_pages)
    )
    arrivals = draw(scene, seed)
    return serve(scene, 0.0, arrivals), serve(scene, 60.0, arrivals)


def test_fewer_requests_wait_for_a_load_and_more_is_loaded() -> None:
    without, speculating = pair(SCENES["rank 8, 5 ms a load"], num_pages=2200)
    assert len(without.ttfts) == len(speculating.ttfts)
    assert float("inf") not in speculating.ttfts, "all were served"
    assert speculating.num_waited < without.num_waited
    assert speculating.speculative["used"] > 0
    assert speculating.num_loads > without.num_loads
    assert not without.speculative


def test_where_all_adapters_have_room_nothing_changes() -> None:
    without, speculating = pair(SCENES["rank 8, 5 ms, room for all"], num_pages=14000)
    assert speculating == without


def test_results_add_up() -> None:
    one, _ = pair(SCENES["rank 8, 5 ms, room for all"], num_pages=14000)
    both = one + one
    assert (len(both.ttfts), both.num_loads) == (2 * len(one.ttfts), 2 * one.num_loads)
    assert list(both.ttfts) == sorted(both.ttfts)
    assert "loads" in str(both)
