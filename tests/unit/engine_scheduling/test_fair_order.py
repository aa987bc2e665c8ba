"""Virtual token counters: the algorithm by hand, and the bound of arXiv 2401.00588 under random load."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Reason
from services.engine.messages import Generate
from services.engine.scheduling.policies import fair as fair_module
from services.engine.scheduling.policies.fair import FRONT, FairOrder
from services.engine.scheduling.policies.policy import QUEUE_SHARE
from services.engine.scheduling.sequence import Sequence
from tests.fakes.fake_model import generate
from tests.fakes.scheduler_harness import Harness


def tenant_of(sequence: Sequence) -> str:
    return sequence.request.tenant


def request_of(number: int, tenant: str, num_prompt: int, max_tokens: int, name: str | None = None) -> Generate:
    prompt = [1 + number % 90] * num_prompt
    return msgspec.structs.replace(generate(number, prompt, max_tokens, name, ignore_eos=True), tenant=tenant)


class Desk:
    """A fair order without a scheduler."""

    def __init__(self, **options: object) -> None:
        self.order = FairOrder(tenant_of, **options)  # type: ignore[arg-type]
        self.waiting: list[Sequence] = []
        self.num_made = 0

    def come(self, tenant: str, num_prompt: int = 10) -> Sequence:
        sequence = Sequence.of(request_of(self.num_made, tenant, num_prompt, 5), self.num_made, 100, frozenset())
        self.num_made += 1
        self.order.entered(sequence)
        self.waiting.append(sequence)
        return sequence

    def turns(self) -> list[Sequence]:
        for sequence, turn in self.order.reorder():
            sequence.turn = turn
        assert len({s.turn for s in self.waiting}) == len(self.waiting)
        return sorted(self.waiting, key=lambda s: s.turn)

    def makes_room(self, tenant: str) -> Sequence | None:
        return self.order.makes_room(Sequence.of(request_of(-1, tenant, 10, 5), -1, 100, frozenset()))

    def admit(self) -> Sequence:
        sequence = self.turns()[0]
        self.waiting.remove(sequence)
        sequence.run(-1)
        self.order.admitted(sequence, again=False)
        return sequence


def test_who_got_least_is_next_and_input_counts() -> None:
    desk = Desk()
    for tenant, num_prompt in (("a", 10), ("a", 10), ("a", 10), ("b", 25), ("b", 5)):
        desk.come(tenant, num_prompt)
    assert [(s.request.tenant, len(s.request.prompt_ids)) for s in desk.turns()] == [
        ("a", 10), ("b", 25), ("a", 10), ("a", 10), ("b", 5)
    ]  # fmt: skip
    running = desk.admit()
    assert desk.order.counter("a") == 10
    for _ in range(8):
        desk.order.drew(running)
    assert desk.order.counter("a") == 26
    assert [s.request.tenant for s in desk.turns()] == ["b", "b", "a", "a"] or desk.order.counter("b") == 0
    assert desk.turns()[0].request.tenant == "b"
    assert desk.order.service_spread == 26


def test_idling_earns_nothing() -> None:
    desk = Desk()
    for _ in range(4):
        desk.come("a", 10)
    for _ in range(3):
        desk.admit()
    desk.come("b")
    assert desk.order.counter("b") == desk.order.counter("a") == 30, "lifted to the lowest that waits"
    desk.admit()
    desk.admit()
    desk.come("c")
    assert desk.order.counter("c") == 40, "nobody waits: to that of the last that did"
    desk.admit()
    desk.come("a")
    assert desk.order.counter("a") == 50, "lifted to c, the last that waited"


def test_weights_prices_and_a_prefix_cache() -> None:
    desk = Desk(input_price=2.0, output_price=3.0, weights={"gold": 2.0})
    gold, plain = desk.come("gold", 10), desk.come("plain", 10)
    plain.num_computed = 4  # its first tokens' KV was found
    desk.admit()
    desk.admit()
    assert (desk.order.counter("gold"), desk.order.counter("plain")) == (10, 12)
    desk.order.drew(gold)
    assert desk.order.counter("gold") == 11.5


def test_half_of_the_front_is_for_clients_within_their_share() -> None:
    """Though many requests of one that may be kept from running would come before theirs."""
    desk = Desk()
    for _ in range(200):
        desk.come("loud", 10)
    for _ in range(20):
        desk.admit()
    for _ in range(FRONT):
        desk.come("quiet", 1000)
    front = [s.request.tenant for s in desk.turns()[:FRONT]]
    assert front == ["loud", "quiet"] + ["loud"] * (FRONT // 2 - 1) + ["quiet"] * (FRONT // 2 - 1)


def test_in_a_full_queue_who_has_most_in_it_makes_room() -> None:
    desk = Desk(weights={"gold": 3.0})
    loud = [desk.come("loud") for _ in range(4)]
    gold = [desk.come("gold") for _ in range(6)]
    assert desk.makes_room("quiet") is loud[3]
    assert desk.makes_room("loud") is None, "of nobody else there are more"
    assert desk.makes_room("gold") is loud[3]
    desk.admit()
    desk.admit()
    assert desk.makes_room("quiet") is loud[3], "three of weight 1 are more than five of weight 3"
    for sequence in loud[1:3]:
        desk.waiting.remove(sequence)
        desk.order.ended(sequence)
    assert desk.makes_room("quiet") is gold[5]
    assert Desk().makes_room("quiet") is None


def test_preempted_ones_pay_once_and_keep_their_place() -> None:
    desk = Desk()
    first = desk.come("a")
    second = desk.come("b")
    desk.admit()
    desk.admit()
    turns = first.turn, second.turn
    desk.order.preempted(first)
    desk.order.admitted(first, again=True)
    assert (first.turn, second.turn) == turns
    assert desk.order.counter("a") == 10
    assert first.turn < second.turn < desk.come("c").turn


def test_counters_of_idle_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_module, "MAX_IDLE_CLIENTS", 10)
    desk = Desk()
    for number in range(100):
        desk.come(f"tenant-{number}")
        desk.order.ended(desk.admit())
    assert len(desk.order._clients) <= 21
    desk.come("tenant-0")
    assert desk.order.counter("tenant-0") >= 100, "a client that was forgotten earned nothing by it"


def service_of(harness: Harness, admitted: set[int], service: Counter[str]) -> None:
    """Adds what tenants got since the last call, counted from outside the policy."""
    for sequence in harness.running():
        if sequence.request_id not in admitted:
            admitted.add(sequence.request_id)
            service[tenant_of(sequence)] += len(sequence.request.prompt_ids)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    num_pages=st.sampled_from([14, 24, 64]),
    depth=st.sampled_from([1, 2]),
    prompts=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    outputs=st.tuples(st.integers(1, 16), st.integers(1, 16)),
)
def test_the_papers_bound_for_backlogged_clients(
    seed: int, num_pages: int, depth: int, prompts: tuple[int, int], outputs: tuple[int, int]
) -> None:
    """Two tenants that both wait all the time: over any interval their service differs by 2 U at most.

    U = max(input_price * longest input, output_price * M), with M the most tokens of all that had been admitted and had
    not ended: in the paper, which does not preempt, that is what the memory holds.
    """
    harness = Harness(
        num_pages=num_pages, max_running=6, max_in_flight=depth, seed=seed, turns_stay=False,
        policy=FairOrder(tenant_of, 1.0, 2.0),
    )  # fmt: skip
    rng = random.Random(seed)
    lengths = {"f": (prompts[0], outputs[0]), "g": (prompts[1], outputs[1])}
    admitted: set[int] = set()
    service: Counter[str] = Counter(f=0, g=0)
    differences, largest, next_id = [0], 0, 0
    seen: Counter[int] = Counter()
    for _ in range(150):
        for tenant, (num_prompt, max_tokens) in lengths.items():
            while sum(s.request.tenant == tenant for s in harness.waiting()) < 8:
                next_id += 1
                own = rng.randint(1, num_prompt), rng.randint(1, max_tokens)
                harness.add(request_of(next_id, tenant, *own))
        ended_before = set(harness.finishes)
        harness.step()
        service_of(harness, admitted, service)
        for request_id, tokens in harness.tokens.items():
            service[harness.requests[request_id].tenant] += 2 * (len(tokens) - seen[request_id])
            seen[request_id] = len(tokens)
        for request_id in set(harness.finishes) - admitted:  # admitted and ended within one step
            admitted.add(request_id)
            service[harness.requests[request_id].tenant] += len(harness.requests[request_id].prompt_ids)
        # Also those that ended in this step: they were in it.
        open_ones = [harness.requests[i] for i in admitted - ended_before]
        largest = max(largest, sum(len(r.prompt_ids) + r.stop.max_tokens for r in open_ones))
        differences.append(service["f"] - service["g"])
    bound = 2 * max(1.0 * max(prompts), 2.0 * largest)
    assert max(differences) - min(differences) <= bound
    assert abs(differences[-1]) < sum(service.values()) / 4, "and in the long run they get about the same"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 16), depth=st.sampled_from([1, 2]))
def test_nobody_starves_beside_a_loud_tenant_with_adapters_and_preemption(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    harness = Harness(
        num_pages=20, max_running=5, max_in_flight=depth, seed=seed, turns_stay=False, policy=FairOrder(tenant_of)
    )
    names = [f"a{i}" for i in range(5)]
    harness.adapters(**dict.fromkeys(names, 2))
    for number in range(80):
        harness.add(request_of(number, "loud", rng.randint(1, 12), rng.randint(4, 12), rng.choice([None, *names])))
    for _ in range(10):
        harness.step()
    harness.add(request_of(1000, "quiet", 10, 4, "a0"))
    steps = 0
    while 1000 not in harness.tokens:
        number += 1
        harness.add(request_of(number, "loud", 4, 8, rng.choice([None, *names])))
        harness.step()
        steps += 1
        assert steps < 150
    harness.run()
    harness.check_answers()
    harness.check_empty()


def test_a_flood_fills_the_queue_for_nobody_but_itself() -> None:
    harness = Harness(num_pages=64, max_running=2, max_waiting=6, turns_stay=False, policy=FairOrder(tenant_of))
    for number in range(8):
        assert harness.add(request_of(number, "loud", 4, 12)) is None
        harness.step()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (2, 6)
    refused = harness.add(request_of(50, "loud", 4, 4))
    assert refused is not None
    assert refused.reason is Reason.QUEUE_FULL
    for number in range(100, 103):
        assert harness.add(request_of(number, "quiet", 4, 4)) is None
    refused = harness.add(request_of(103, "quiet", 4, 4))
    assert refused is not None, "it has as many as the other now"
    harness.run()
    assert sorted(harness.failures) == [5, 6, 7], "the last ones"
    assert {failure.reason for failure in harness.failures.values()} == {"QUEUE_FULL"}
    assert harness.scheduler.num_dropped == {QUEUE_SHARE: 3}
    assert sorted(harness.finishes) == [0, 1, 2, 3, 4, 100, 101, 102]
    harness.check_answers()
    harness.check_empty()
