"""Choosing an engine, as a table and as properties."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.config import RoutingPolicy
from services.gateway.engine_state import EngineLoad, EngineProfile, EngineState, StateUpdate
from services.gateway.router import Decision, Wish, can_take, choose_engine

POLICY = RoutingPolicy(spill_share=0.25, spill_requests=4, loading_seconds=10.0, avoid_seconds=1.0)
NOW = 100.0


def engine(
    address: str,
    running: int = 0,
    waiting: int = 0,
    resident: tuple[str, ...] = (),
    *,
    draining: bool = False,
    base_model: str = "base",
    max_running: int = 64,
    free_pages: int = 100,
) -> EngineState:
    state = EngineState(address)
    profile = EngineProfile(f"id-{address}", base_model, max_running, num_pages=100)
    load = EngineLoad(running, waiting, num_free_pages=free_pages, draining=draining)
    state.report(StateUpdate(load, profile, loaded=resident), NOW - 0.1)
    return state


def chosen(engines: list[EngineState], digest: str | None = "x", key: str = "r", **more: object) -> tuple[str, str]:
    route = choose_engine(engines, Wish("base", digest, key), more.get("excluded", ()), NOW, POLICY)  # type: ignore[arg-type]
    assert route is not None
    return route.engine.address, route.decision.value


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        pytest.param([engine("a"), engine("b", resident=("x",))], ("b", "resident"), id="where it is resident"),
        pytest.param(
            [engine("a"), engine("b", running=15, resident=("x",))], ("b", "resident"), id="though a little fuller"
        ),
        pytest.param(
            [engine("a"), engine("b", running=17, resident=("x",))], ("a", "spill"), id="but not if clearly fuller"
        ),
        pytest.param(
            [engine("a"), engine("b", running=64, waiting=9, resident=("x",)), engine("c", running=9, resident=("x",))],
            ("c", "resident"),
            id="the emptier of two holders",
        ),
        pytest.param(
            [engine("a", running=60), engine("b", running=64, waiting=6, resident=("x",))],
            ("b", "resident"),
            id="all are full: the holder",
        ),
        pytest.param(
            [engine("a", max_running=8), engine("b", running=4, max_running=8, resident=("x",))],
            ("b", "resident"),
            id="small engines: the margin is at least 4 requests",
        ),
        pytest.param(
            [engine("a"), engine("b", running=1, free_pages=5, resident=("x",))],
            ("a", "spill"),
            id="a full pool is full, however few run",
        ),
        pytest.param(
            [engine("a", running=3), engine("b", resident=("x",), draining=True)],
            ("a", "cold"),
            id="not where draining",
        ),
        pytest.param(
            [engine("a", running=3), engine("b", resident=("x",), base_model="other")],
            ("a", "cold"),
            id="not another base model",
        ),
        pytest.param([engine("a", running=60), engine("b", running=2)], ("b", "cold"), id="cold: not on a full one"),
    ],
)
def test_choice(engines: list[EngineState], expected: tuple[str, str]) -> None:
    assert chosen(engines) == expected
    assert chosen(engines[::-1]) == expected


def test_nowhere_to_go() -> None:
    down = engine("a")
    down.lost()
    engines = [down, engine("b", draining=True), engine("c", base_model="other"), EngineState("never heard of")]
    assert choose_engine(engines, Wish("base", "x", "r"), (), NOW, POLICY) is None


def test_excluded_lives_are_not_chosen_but_the_next_life_is() -> None:
    state = engine("a")
    first_life = state.life
    assert choose_engine([state], Wish("base", None, "r"), {first_life}, NOW, POLICY) is None
    state.lost()
    state.report(StateUpdate(EngineLoad(), EngineProfile("id-2", "base", 64, 100)), NOW)
    assert chosen([state], None, excluded={first_life}) == ("a", "base")


def test_where_it_was_sent_a_moment_ago_it_is_loading() -> None:
    first, second = engine("a"), engine("b")
    other = {"a": second, "b": first}[chosen([first, second])[0]]
    other.started("x", NOW - 1)
    assert chosen([first, second]) == (other.address, "loading")
    other.started("x", NOW - 11)
    assert chosen([first, second])[1] == "cold", "that was long ago"


def test_an_evicted_adapter_is_neither_resident_nor_loading() -> None:
    state = engine("a", resident=("x",))
    state.started("x", NOW)
    state.report(StateUpdate(EngineLoad(), evicted=["x"]), NOW)
    assert chosen([state]) == ("a", "cold")


def test_an_engine_that_just_failed_is_the_last_resort() -> None:
    failed, other = engine("a", resident=("x",)), engine("b", running=30)
    failed.failed(NOW - 0.5)
    assert chosen([failed, other])[0] == "b"
    assert chosen([failed])[0] == "a"
    failed.failed(NOW - 1.5)
    assert chosen([failed, other])[0] == "a"


def test_a_burst_between_two_reports_is_spread() -> None:
    engines = [engine(name, max_running=8) for name in "abcd"]
    for number in range(80):
        route = choose_engine(engines, Wish("base", None, f"request-{number}"), (), NOW, POLICY)
        assert route is not None
        route.engine.started(None, NOW)
    assert [e.num_in_flight for e in engines] == [20, 20, 20, 20]


def test_a_burst_for_one_adapter_spills_and_stays_on_few_engines_while_they_have_room() -> None:
    engines = [engine(name) for name in "abcd"]
    decisions: Counter[Decision] = Counter()
    for _ in range(40):
        route = choose_engine(engines, Wish("base", "x", "r"), (), NOW, POLICY)
        assert route is not None
        route.engine.started("x", NOW)
        decisions[route.decision] += 1
    assert sum(e.num_in_flight > 0 for e in engines) == 3, "16 more than the emptiest before each spill"
    assert decisions == {Decision.COLD: 1, Decision.LOADING: 37, Decision.SPILL: 2}


def test_rare_adapters_spread_over_engines_and_each_stays_on_its_own() -> None:
    engines = [engine(name) for name in "abcd"]
    places = {f"digest-{i}": chosen(engines, f"digest-{i}")[0] for i in range(400)}
    assert all(70 < count < 130 for count in Counter(places.values()).values())
    for number, state in enumerate(engines):
        state.load = dataclasses.replace(state.load, num_running=number)  # small differences do not matter
    assert {digest: chosen(engines, digest)[0] for digest in places} == places
    without = [e for e in engines if e.address != "b"]
    moved = {digest for digest, place in places.items() if chosen(without, digest)[0] != place}
    assert moved == {digest for digest, place in places.items() if place == "b"}


def test_fullness_counts_what_was_sent_since_the_last_report_once() -> None:
    state = engine("a", max_running=10)
    for _ in range(5):
        state.started(None, NOW)
    assert state.fullness == pytest.approx(0.5)
    state.report(StateUpdate(EngineLoad(num_running=5, num_free_pages=90)), NOW)
    assert state.fullness == pytest.approx(0.5)
    state.ended()
    assert state.fullness == pytest.approx(0.4)
    state.report(StateUpdate(EngineLoad(num_running=0, num_free_pages=90)), NOW)  # sent before those four arrived
    assert state.fullness == pytest.approx(0.4)


def test_fullness_counts_other_gateways_requests() -> None:
    state = engine("a", running=6, waiting=2, max_running=10)
    assert state.fullness == pytest.approx(0.8)
    state.started(None, NOW)
    assert state.fullness == pytest.approx(0.9)


@st.composite
def fleets(draw: st.DrawFn) -> list[EngineState]:
    digests = st.lists(st.sampled_from("xyz"), unique=True).map(tuple)
    states = []
    for address in draw(st.lists(st.sampled_from("abcdefgh"), unique=True)):
        state = engine(
            address,
            draw(st.integers(0, 70)),
            draw(st.integers(0, 70)),
            draw(digests),
            draining=draw(st.booleans()),
            base_model=draw(st.sampled_from(["base", "base", "other"])),
            max_running=draw(st.sampled_from([1, 8, 64])),
            free_pages=draw(st.integers(0, 100)),
        )
        for digest in draw(digests):
            state.started(digest, NOW - draw(st.floats(0, 20)))
        if draw(st.integers(0, 4)) == 0:
            state.failed(NOW - draw(st.floats(0, 2)))
        if draw(st.integers(0, 4)) == 0:
            state.lost()
        states.append(state)
    return states


@given(fleets(), st.sampled_from(["x", "y", "w", None]), st.text(max_size=3), st.randoms())
def test_properties(fleet: list[EngineState], digest: str | None, key: str, random: object) -> None:
    wish = Wish("base", digest, key)
    excluded = {state.life for state in fleet[::3]}
    candidates = [e for e in fleet if can_take(e, "base") and e.life not in excluded]
    route = choose_engine(fleet, wish, excluded, NOW, POLICY)
    assert (route is None) == (not candidates)
    if route is None:
        return
    assert route.engine in candidates
    shuffled = list(fleet)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_engine(shuffled, wish, excluded, NOW, POLICY) == route, "the order does not matter"
    fresh = [e for e in candidates if e.failed_at <= NOW - 1.0] or candidates
    assert route.engine in fresh
    least = min(e.fullness for e in fresh)
    margin = max(0.25, 4 / route.engine.max_running)
    assert route.engine.fullness <= least + margin + 1e-9, "never on a clearly fuller one than there is"
    if digest is None:
        assert route.decision is Decision.BASE
        assert route.engine.fullness == least
    else:
        holds = {Decision.RESIDENT: digest in route.engine.resident}
        holds[Decision.LOADING] = route.engine.is_loading(digest, NOW - 10)
        assert holds.get(route.decision, True)
    others = [e for e in fleet if e is not route.engine and e not in candidates]
    assert choose_engine([route.engine, *others], wish, excluded, NOW, POLICY).engine is route.engine  # type: ignore[union-attr]
