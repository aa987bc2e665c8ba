"""Choosing an engine, as a table and as properties."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.config import RoutingName, RoutingPolicy
from services.gateway.engine_state import MAX_SENT, EngineLoad, EngineProfile, EngineState, StateUpdate
from services.gateway.router import Decision, Route, Router, Wish, can_take
from services.gateway.routing_rules import RULES, make_router

POLICY = RoutingPolicy(spill_share=0.25, spill_requests=4, loading_seconds=10.0, avoid_seconds=1.0, late_seconds=2.0)
ROUTER = make_router(POLICY)
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


def route(engines: list[EngineState], digest: str | None = "x", key: str = "r", router: Router = ROUTER) -> Route:
    found = router.route(engines, Wish("base", digest, key), (), NOW)
    assert found is not None
    return found


def chosen(engines: list[EngineState], digest: str | None = "x", key: str = "r", **more: object) -> tuple[str, str]:
    found = ROUTER.route(engines, Wish("base", digest, key), more.get("excluded", ()), NOW)  # type: ignore[arg-type]
    assert found is not None
    return found.engine.address, found.decision.value


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
    assert ROUTER.route(engines, Wish("base", "x", "r"), (), NOW) is None


def test_excluded_lives_are_not_chosen_but_the_next_life_is() -> None:
    state = engine("a")
    first_life = state.life
    assert ROUTER.route([state], Wish("base", None, "r"), {first_life}, NOW) is None
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
        route(engines, None, f"request-{number}").engine.started(None, NOW)
    assert [e.num_in_flight for e in engines] == [20, 20, 20, 20]


def test_a_burst_for_one_adapter_spills_and_stays_on_few_engines_while_they_have_room() -> None:
    engines = [engine(name) for name in "abcd"]
    decisions: Counter[Decision] = Counter()
    for _ in range(40):
        found = route(engines)
        found.engine.started("x", NOW)
        decisions[found.decision] += 1
    assert sum(e.num_in_flight > 0 for e in engines) == 3, "16 more than the emptiest before each spill"
    assert decisions == {Decision.COLD: 1, Decision.LOADING: 37, Decision.SPILL: 2}


def test_rare_adapters_spread_over_engines_and_each_stays_on_its_own() -> None:
    engines = [engine(name, max_running=256) for name in "abcd"]
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


def test_what_an_engine_says_is_loading_is_loading_for_every_gateway() -> None:
    first, second = engine("a"), engine("b")
    other = {"a": second, "b": first}[chosen([first, second])[0]]
    other.report(StateUpdate(EngineLoad(num_free_pages=100), loading=["x"]), NOW)
    assert chosen([first, second]) == (other.address, "loading")
    other.report(StateUpdate(EngineLoad(num_free_pages=100)), NOW)
    assert chosen([first, second])[1] == "cold", "its load failed, or was given up"
    other.report(StateUpdate(EngineLoad(num_free_pages=100), loading=["x"]), NOW)
    other.report(StateUpdate(EngineLoad(num_free_pages=100), loaded=["x"]), NOW)
    assert chosen([first, second]) == (other.address, "resident")


def test_an_engine_that_is_late_with_its_report_is_the_last_resort() -> None:
    late, other = engine("a", resident=("x",)), engine("b", running=60)
    late.heard_at = NOW - 2.5
    assert chosen([late, other]) == ("b", "cold")
    assert chosen([late]) == ("a", "resident")


def test_prompts_without_an_answer_press_an_engine_until_they_are_answered() -> None:
    busy, idle = engine("a", max_running=256), engine("b", max_running=256)
    prompts = [busy.asked(None, NOW, has_it_loaded=False) for _ in range(2)]
    assert chosen([busy, idle], None) == ("b", "base")
    assert busy.pressure > busy.fullness == idle.pressure == 0.0
    prompts += [busy.asked(None, NOW, has_it_loaded=False) for _ in range(2)]
    most = busy.pressure
    prompts += [busy.asked(None, NOW, has_it_loaded=False) for _ in range(40)]
    assert busy.pressure == most, "beyond a few they are a queue, and counted as one"
    for prompt in prompts:
        busy.prompts.answered(prompt, NOW)
    assert busy.pressure == 0.0


def test_a_popular_adapter_spreads_in_proportion_to_its_demand() -> None:
    """Demand that comes and stays: the engines that hold the adapter are as many as it takes."""
    holders = []
    for demand in (10, 60, 200, 400):
        engines = [engine(name) for name in "abcdefgh"]
        for _ in range(demand):
            state = route(engines).engine
            state.started("x", NOW)
            state.report(StateUpdate(state.load, loaded=["x"], loading=[]), NOW)
        holders.append(sum("x" in e.resident for e in engines))
        assert max(e.num_in_flight for e in engines) - min(e.num_in_flight for e in engines) <= 17
    assert holders[0] == 1
    assert holders == sorted(holders)
    assert holders[-1] == 8


def test_gateways_that_see_the_same_idle_engine_do_not_all_run_to_it() -> None:
    """Eight gateways, each with the same stale view of a fleet in which two engines have just come up."""
    gateways = [[engine(name, running=32 * (name not in "ab")) for name in "abcdefgh"] for _ in range(8)]
    sent: Counter[str] = Counter()
    for number in range(160):
        state = route(gateways[number % 8], f"digest-{number}", f"request-{number}").engine
        state.started(f"digest-{number}", NOW)
        sent[state.address] += 1
    assert set(sent) == {"a", "b"}
    assert 50 < sent["a"] < 110
    agreed = {route(engines, "new").engine.address for engines in ([engine(n) for n in "abcd"] for _ in range(8))}
    assert len(agreed) == 1, "and all bring a new adapter to the same one"


def test_other_rules_look_at_no_adapter() -> None:
    least_loaded, round_robin = (make_router(RoutingPolicy(rule)) for rule in ("least_loaded", "round_robin"))  # type: ignore[arg-type]
    engines = [engine("a", running=2, resident=("x",)), engine("b"), engine("c", running=1)]
    found = route(engines, router=least_loaded)
    assert (found.engine.address, found.decision) == ("b", Decision.SPILL)
    turns = [route(engines, router=round_robin) for _ in range(6)]
    assert Counter(turn.engine.address for turn in turns) == {"a": 2, "b": 2, "c": 2}
    assert {turn.decision for turn in turns if turn.engine.address == "a"} == {Decision.RESIDENT}


def test_every_rule_that_can_be_set_exists() -> None:
    assert set(RULES) == set(get_args(RoutingName))


def test_what_was_sent_and_never_came_is_forgotten_in_the_end() -> None:
    state = engine("a")
    for number in range(MAX_SENT + 10):
        state.started(f"digest-{number}", NOW)
    assert not state.is_loading("digest-0", NOW - 1)
    assert state.is_loading("digest-10", NOW - 1)


def clock_learns(state: EngineState, prompt_seconds: float, load_seconds: float) -> None:
    """`state` has seen a prompt computed, and an adapter loaded."""
    known = state.asked(None, NOW - 50, has_it_loaded=False)
    state.prompts.stepped(NOW - 50)
    state.prompts.answered(known, NOW - 50 + prompt_seconds)
    loaded = state.asked("other", NOW - 50, has_it_loaded=True)
    state.prompts.answered(loaded, NOW - 50 + load_seconds + prompt_seconds)


def computing(state: EngineState, since: float) -> EngineState:
    """`state`, where prompts take 36 ms and loads 12 ms, and one was begun `since` seconds ago."""
    clock_learns(state, 0.036, 0.012)
    state.asked(None, NOW - since - 0.001, has_it_loaded=False)
    state.prompts.stepped(NOW - since)
    return state


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        pytest.param(0.002, ("b", "spill"), id="just begun: a load is shorter"),
        pytest.param(0.030, ("a", "resident"), id="nearly done: it is waited for"),
    ],
)
def test_an_adapter_is_loaded_elsewhere_where_that_takes_less_than_the_prompt_ahead_of_it(
    since: float, expected: tuple[str, str]
) -> None:
    holder, free = computing(engine("a", resident=("x",)), since), engine("b")
    assert chosen([holder, free]) == ("a", "resident"), "how long a load takes there is not known yet"
    clock_learns(free, 0.036, 0.012)
    assert chosen([holder, free]) == expected
    busy = computing(engine("c"), 0.0)
    assert chosen([holder, busy]) == ("a", "resident"), "a prompt is computed there, too"
    queued = engine("d", waiting=1)
    clock_learns(queued, 0.036, 0.012)
    assert chosen([holder, queued]) == ("a", "resident"), "there is a queue"
    half_full = engine("e", running=32)
    clock_learns(half_full, 0.036, 0.012)
    holder.load = dataclasses.replace(holder.load, num_running=32)
    assert chosen([holder, half_full]) == ("a", "resident"), "it is not idle"


def test_a_load_that_takes_longer_than_the_prompt_is_not_begun_for_its_sake() -> None:
    holder, free = computing(engine("a", resident=("x",)), 0.0), engine("b")
    clock_learns(free, 0.036, 0.067)
    assert chosen([holder, free]) == ("a", "resident")


def test_another_holder_is_better_than_a_load_and_one_that_loads_it_is_waited_for() -> None:
    holder, free = computing(engine("a", resident=("x",)), 0.0), engine("b")
    clock_learns(free, 0.036, 0.012)
    assert chosen([holder, free, engine("c", running=3, resident=("x",))]) == ("c", "resident")
    loading = engine("d")
    clock_learns(loading, 0.036, 0.012)
    loading.started("x", NOW)
    loading.asked("x", NOW, has_it_loaded=True)
    assert chosen([loading, free]) == ("d", "loading"), "its request is computed with the one that has it loaded"


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
        for _ in range(draw(st.integers(0, 6))):
            state.asked(None, NOW - draw(st.floats(0, 0.1)), has_it_loaded=False)
        if draw(st.booleans()):
            clock_learns(state, draw(st.floats(0, 0.1)), draw(st.floats(0, 0.1)))
        state.heard_at = NOW - draw(st.floats(0, 2.5))
        state.loading = frozenset(draw(digests)) - state.resident
        if draw(st.integers(0, 4)) == 0:
            state.failed(NOW - draw(st.floats(0, 2)))
        if draw(st.integers(0, 4)) == 0:
            state.lost()
        states.append(state)
    return states


def test_while_the_store_is_away_an_adapter_stays_where_it_is() -> None:
    engines = [engine("a"), engine("b", running=64, waiting=9, resident=("x",)), engine("c", 64, 5, ("x",))]
    away = Wish("base", "x", "r", can_be_loaded=False)
    assert ROUTER.route(engines, away, (), NOW) == Route(engines[2], Decision.RESIDENT)
    assert ROUTER.route(engines, dataclasses.replace(away, can_be_loaded=True), (), NOW) == Route(
        engines[0], Decision.SPILL
    )
    nowhere = dataclasses.replace(away, digest="y")
    assert ROUTER.route(engines, nowhere, (), NOW) == Route(engines[0], Decision.COLD)


@given(fleets(), st.sampled_from(["x", "y", "w", None]), st.text(max_size=3), st.randoms())
def test_properties(fleet: list[EngineState], digest: str | None, key: str, random: object) -> None:
    wish = Wish("base", digest, key)
    excluded = {state.life for state in fleet[::3]}
    candidates = [e for e in fleet if can_take(e, "base") and e.life not in excluded]
    found = ROUTER.route(fleet, wish, excluded, NOW)
    assert (found is None) == (not candidates)
    if found is None:
        return
    assert found.engine in candidates
    shuffled = list(fleet)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert ROUTER.route(shuffled, wish, excluded, NOW) == found, "the order does not matter"
    fresh = [e for e in candidates if e.failed_at <= NOW - 1.0 and e.heard_at > NOW - 2.0] or candidates
    assert found.engine in fresh
    least = min(e.pressure for e in fresh)
    margin = max(0.25, 4 / found.engine.max_running)
    assert found.engine.pressure <= least + margin + 1e-9, "never on a clearly fuller one than there is"
    if digest is None:
        assert found.decision is Decision.BASE
        assert found.engine.pressure == least
    else:
        holds = {Decision.RESIDENT: digest in found.engine.resident}
        holds[Decision.LOADING] = found.engine.is_loading(digest, NOW - 10)
        assert holds.get(found.decision, True)
    others = [e for e in fleet if e is not found.engine and e not in candidates]
    assert ROUTER.route([found.engine, *others], wish, excluded, NOW).engine is found.engine  # type: ignore[union-attr]
