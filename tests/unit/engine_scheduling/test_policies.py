"""Each policy's decisions, by hand and, where it promises a bound, under random load."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.config import EngineSettings, PolicyConfig
from services.engine.core.launch import USAGE_EXIT_CODE
from services.engine.messages import Generate
from services.engine.scheduling.policies.clustering import AdapterClustering
from services.engine.scheduling.policies.combination import Combination, make_policy
from services.engine.scheduling.policies.early_abort import OVERLOAD, TOO_LATE, EarlyAbort
from services.engine.scheduling.policies.fair import ALONE_TOKENS, FairOrder
from services.engine.scheduling.policies.headroom import Headroom
from services.engine.scheduling.policies.policy import NO_LIMIT, Policy
from services.engine.scheduling.policies.priority import PriorityOrder
from services.engine.scheduling.sequence import Sequence, SequenceState
from tests.fakes.fake_model import adapter, generate
from tests.fakes.scheduler_harness import Harness


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Arrivals:
    """Makes sequences that a policy has been told of."""

    policy: Policy
    made: list[Sequence] = field(default_factory=list)

    def come(self, priority: int = 0, name: str | None = None, tenant: str = "") -> Sequence:
        number = len(self.made)
        request = msgspec.structs.replace(generate(number, [1, 2], 4, name), priority=priority, tenant=tenant)
        sequence = Sequence.of(request, number, 100, frozenset())
        self.policy.entered(sequence)
        self.made.append(sequence)
        return sequence

    def run(self, sequence: Sequence) -> None:
        again = sequence.has_run
        sequence.run(-1)
        self.policy.admitted(sequence, again)


def random_load(harness: Harness, seed: int, **changes: tuple[object, ...]) -> None:
    """Sixty requests with and without adapters, in a pool that makes some preempt others."""
    rng = random.Random(seed)
    names = [f"a{i}" for i in range(5)]
    harness.adapters(**{name: rng.randint(1, 4) for name in names})
    for i in range(60):
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, 16))]
        request: Generate = generate(i, prompt, rng.randint(1, 12), rng.choice([None, *names]), ignore_eos=True)
        changed = {name: rng.choice(values) for name, values in changes.items()}
        harness.add(msgspec.structs.replace(request, **changed))
        for _ in range(rng.randint(0, 2)):
            harness.step()
    harness.run(max_steps=6000)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 16), depth=st.sampled_from([1, 2]))
def test_without_differences_every_static_order_is_first_come_first_served(seed: int, depth: int) -> None:
    plans = []
    for policy in (None, Policy(), PriorityOrder(10), Combination(Policy(), Headroom(5, 0, FairOrder(lambda _: "")))):
        harness = Harness(num_pages=18, max_running=5, max_in_flight=depth, seed=seed, policy=policy)
        random_load(harness, seed)
        plans.append([[(c.sequence_id, c.start, len(c.token_ids)) for c in plan.chunks] for plan in harness.plans])
        harness.check_answers()
    assert plans[1:] == plans[:1] * 3


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 16), head_start=st.sampled_from([0, 1, 5, 1000]))
def test_priorities_survive_preemption_and_loads(seed: int, head_start: int) -> None:
    harness = Harness(num_pages=18, max_running=5, seed=seed, policy=PriorityOrder(head_start))
    random_load(harness, seed, priority=(-2, 0, 3))
    harness.check_answers()
    harness.check_empty()


@given(st.lists(st.integers(-10, 10), min_size=2, max_size=40), st.integers(0, 30))
def test_a_higher_priority_passes_no_more_than_its_head_start(priorities: list[int], head_start: int) -> None:
    arrivals = Arrivals(PriorityOrder(head_start))
    made = [arrivals.come(priority) for priority in priorities]
    assert len({sequence.turn for sequence in made}) == len(made)
    for later, one in enumerate(made):
        for earlier, other in enumerate(made[:later]):
            passes = one.turn < other.turn
            lead = head_start * (priorities[later] - priorities[earlier]) - (later - earlier)
            assert passes == (lead > 0 or (lead == 0 and priorities[later] > priorities[earlier]))


def test_an_urgent_request_is_next_and_the_least_urgent_is_preempted() -> None:
    harness = Harness(num_pages=8, max_running=2, policy=PriorityOrder(100))
    harness.add(generate(1, [1] * 4, 20, ignore_eos=True))
    harness.add(msgspec.structs.replace(generate(2, [2] * 8, 10, ignore_eos=True), priority=-1))
    harness.step()
    harness.add(generate(3, [3] * 4, 2, ignore_eos=True))
    harness.add(msgspec.structs.replace(generate(4, [4] * 4, 2, ignore_eos=True), priority=5))
    harness.run()
    assert harness.scheduler.num_preemptions == 1, "2, which has the least priority, when 1 grew"
    harness.check_answers()
    ends = list(harness.finishes)
    assert ends.index(4) < ends.index(3) < ends.index(2)


def test_early_abort_drops_who_is_too_late_and_the_oldest_of_too_many() -> None:
    clock = Clock()
    policy = EarlyAbort(10.0, clock, lambda sequence: sequence.request.tenant)
    arrivals = Arrivals(policy)
    waiting = [arrivals.come() for _ in range(8)]
    assert policy.drops(waiting, step_is_full=False) == [], "nothing is known yet"
    for _ in range(2):  # one admission a second
        clock.now += 1.0
        arrivals.run(waiting.pop(0))
        assert policy.drops(waiting, step_is_full=False) == []
    waiting += [arrivals.come() for _ in range(6)]
    dropped = policy.drops(waiting, step_is_full=False)
    assert [drop.sequence for drop in dropped] == waiting[:2], "twelve wait, ten can be served: the newest"
    assert {drop.reason for drop in dropped} == {OVERLOAD}
    assert [drop.retry_after_seconds for drop in dropped] == [pytest.approx(12.0)] * 2
    clock.now = 10.5
    late = policy.drops(waiting[2:4], step_is_full=False)
    assert [drop.reason for drop in late] == [TOO_LATE] * 2


def test_early_abort_spares_other_groups_and_those_that_ran() -> None:
    clock = Clock()
    policy = EarlyAbort(5.0, clock, lambda sequence: sequence.request.tenant)
    arrivals = Arrivals(policy)
    preempted, first = arrivals.come(), arrivals.come()
    policy.drops([preempted, first], step_is_full=False)
    clock.now = 1.0
    arrivals.run(preempted)
    quiet = arrivals.come(tenant="quiet")
    loud = [arrivals.come(tenant="loud") for _ in range(6)]
    dropped = policy.drops([preempted, quiet, *loud], step_is_full=False)
    assert [drop.sequence for drop in dropped] == loud[: len(dropped)]
    assert len(dropped) == 3
    clock.now = 100.0
    assert preempted not in [drop.sequence for drop in policy.drops([preempted, quiet, *loud], step_is_full=False)]


def test_a_dropped_request_fails_at_once_and_says_when_to_retry() -> None:
    clock = Clock()
    harness = Harness(max_running=1, policy=make_policy(PolicyConfig(latency_goal_seconds=3.0), 1, clock))
    for number in range(3):
        harness.add(generate(number, [1] * 4, 8, ignore_eos=True))
    for _ in range(5):
        harness.step()
        clock.now += 1.0
    assert set(harness.failures) == {1, 2}
    failure = harness.failures[1]
    assert failure.reason == "OVERLOADED"
    assert float(failure.metadata["retry_after_seconds"]) > 0
    assert harness.scheduler.num_dropped.total() == 2
    harness.run()
    harness.check_answers()
    harness.check_empty()


def test_clustering_holds_back_further_adapters_until_patience_ends() -> None:
    clock = Clock()
    policy = AdapterClustering(1, 2.0, clock)
    arrivals = Arrivals(policy)
    a, b, base, another_a = (arrivals.come(name=name) for name in ("a", "b", None, "a"))
    assert policy.may_run(b), "nothing runs yet"
    arrivals.run(a)
    assert [policy.may_run(s) for s in (b, base, another_a)] == [False, True, True]
    assert policy.num_passed_by == 1
    clock.now = 2.0
    assert policy.may_run(b)
    clock.now = 0.0
    policy.ended(a)
    assert policy.may_run(b)


def test_an_order_may_keep_sequences_from_running_too() -> None:
    class Closed(Policy):
        def may_run(self, sequence: Sequence) -> bool:
            return False

    closed, open_ = (Combination(order, AdapterClustering(2, 50.0, Clock())) for order in (Closed(), Policy()))
    assert not closed.may_run(Arrivals(closed).come())
    assert open_.may_run(Arrivals(open_).come())


def test_clustered_batches_have_few_adapters_and_nobody_starves() -> None:
    clock = Clock()
    harness = Harness(num_pages=64, max_running=6, turns_stay=False)
    harness.policy = Combination(Policy(), AdapterClustering(2, 50.0, clock))
    harness.__post_init__()
    names = [f"a{i}" for i in range(6)]
    harness.adapters(**dict.fromkeys(names, 2))
    for number in range(60):
        harness.add(generate(number, [3] * 4, 6, names[number % 6], ignore_eos=True))
    while harness.scheduler.num_open:
        harness.step()
        clock.now += 1.0
        running = {s.digest for s in harness.running()}
        assert len(running) <= 2 or clock.now > 50
    harness.check_answers()
    assert len(harness.plans) < 400


@dataclass
class Fair:
    """Fair order with headroom, told of everything; clients are tenants."""

    max_running: int
    headroom: int
    batch: int = 1
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self.order = FairOrder(lambda sequence: sequence.request.tenant)
        self.headroom_policy = Headroom(
            self.max_running, self.headroom, self.order, self.batch, prompt_tokens=self.prompt_tokens
        )
        self.policy = Combination(self.order, self.headroom_policy)
        self.arrivals = Arrivals(self.policy)

    def come(self, tenant: str, num_sequences: int = 1) -> list[Sequence]:
        return [self.arrivals.come(tenant=tenant) for _ in range(num_sequences)]

    def run(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            assert self.policy.may_run(sequence)
            self.arrivals.run(sequence)

    def end(self, sequence: Sequence) -> None:
        self.policy.ended(sequence)
        sequence.state = SequenceState.ENDED


def test_headroom_is_for_clients_that_get_little() -> None:
    fair = Fair(4, 1)
    loud = fair.come("loud", 4)
    fair.run(*loud[:3])
    (quiet,) = fair.come("quiet")
    assert not fair.policy.may_run(loud[3])
    assert fair.policy.may_run(quiet)
    fair.end(loud[0])
    assert fair.policy.may_run(loud[3])


def test_a_burst_of_a_client_that_got_little_may_take_the_last_places() -> None:
    fair = Fair(8, 3)
    loud, quiet = fair.come("loud", 3), fair.come("quiet", 6)
    fair.run(*loud[:2])
    for _ in range(50):
        fair.policy.drew(loud[0])
    fair.run(*quiet[:3])
    assert not fair.policy.may_run(loud[2]), "of those before the last places all are taken"
    fair.run(*quiet[3:])  # though they run more than anybody else


def test_before_the_headroom_places_are_filled_several_at_a_time() -> None:
    fair = Fair(8, 2, batch=3)
    loud = fair.come("loud", 9)
    fair.run(*loud[:6])
    for ended in loud[:2]:
        fair.end(ended)
        assert not fair.policy.may_run(loud[6])
        (quiet,) = fair.come("quiet")
        assert fair.policy.may_run(quiet), "who gets little waits for nobody"
        fair.end(quiet)
    fair.end(loud[2])
    fair.run(*loud[6:])
    assert not fair.policy.may_run(*fair.come("loud"))


def test_prompts_of_who_was_served_most_and_has_to_wait_join_steps_within_a_limit() -> None:
    fair = Fair(4, 1, prompt_tokens=5)
    limit = fair.policy.prompt_limit
    loud, (quiet,) = fair.come("loud", 6), fair.come("quiet")
    assert limit(loud[0], 100) == NO_LIMIT, "nobody had to wait yet"
    fair.run(*loud[:2], quiet)
    assert not fair.policy.may_run(loud[2])
    assert limit(loud[2], 0) == limit(loud[2], 3) == 5, "prompts have two tokens each"
    assert limit(loud[2], 4) == 0
    assert limit(fair.come("other")[0], 100) == NO_LIMIT
    fair.end(loud[0])
    fair.run(loud[2])
    assert limit(loud[2], 0) == 5, "the rest of its prompt, in the steps to come"
    assert limit(loud[2], 4) == 0
    preempted = loud[1]
    preempted.state = SequenceState.WAITING
    fair.policy.preempted(preempted)
    assert limit(preempted, 100) == 5, "it keeps its place before all others"
    for sequence in loud[3:]:
        fair.end(sequence)
    assert limit(loud[2], 100) == NO_LIMIT, "nothing of it waits"


def test_who_is_alone_fills_steps() -> None:
    fair = Fair(4, 1, prompt_tokens=5)
    loud = fair.come("loud", 6)
    fair.run(*loud[:3])
    assert not fair.policy.may_run(loud[3])
    assert fair.policy.prompt_limit(loud[3], 100) == NO_LIMIT
    fair.end(loud[0])
    fair.run(*fair.come("quiet"))
    assert fair.policy.prompt_limit(loud[3], 100) == 0
    for _ in range(ALONE_TOKENS):
        fair.policy.drew(loud[1])
    assert fair.policy.prompt_limit(loud[3], 100) == NO_LIMIT, "the other came long ago"


def test_a_limit_of_prompts_splits_what_a_flood_would_put_into_one_step() -> None:
    config = PolicyConfig(order="fair", fairness_headroom=0.25, fairness_prompt_tokens=8)
    harness = Harness(num_pages=200, max_running=8, max_step_tokens=64, policy=make_policy(config, 8), turns_stay=False)
    for number in range(40):
        request = generate(number, [1] * (30 if number % 7 == 3 else 4), 6, ignore_eos=True)
        harness.add(msgspec.structs.replace(request, tenant="loud"))
    for number in range(40, 52):
        harness.step()
        harness.add(msgspec.structs.replace(generate(number, [2] * 4, 2, ignore_eos=True), tenant="quiet"))
    harness.run()
    harness.check_answers()
    loud_tokens = []
    for plan in harness.plans[2:14]:
        prompts = [chunk for chunk in plan.chunks if chunk.start < len(harness.requests[chunk.sequence_id].prompt_ids)]
        loud_tokens.append(sum(len(chunk.token_ids) for chunk in prompts if chunk.sequence_id < 40))
    assert 0 < max(loud_tokens) <= 8, loud_tokens


@pytest.mark.parametrize("max_running", [1, 2, 3])
def test_of_few_places_one_is_left_whatever_share_is_kept(max_running: int) -> None:
    policy = make_policy(PolicyConfig(order="fair", fairness_headroom=0.8), max_running)
    harness = Harness(num_pages=64, max_running=max_running, policy=policy, turns_stay=False)
    for number in range(6):
        request = generate(number, [1] * 4, 3, ignore_eos=True)
        harness.add(msgspec.structs.replace(request, tenant="loud" if number % 3 else "quiet"))
    harness.run()
    harness.check_answers()


def test_headroom_gives_the_last_places_where_the_scheduler_would_wait_for_several() -> None:
    policy = make_policy(PolicyConfig(order="fair", fairness_headroom=0.25), 8, admission_batch=4)
    harness = Harness(max_running=8, admission_batch=4, policy=policy)
    for number in range(9):
        harness.add(msgspec.structs.replace(generate(number, [1], 9), tenant="loud"))
    harness.step()
    assert len(harness.running()) == 6
    harness.add(msgspec.structs.replace(generate(9, [1], 9), tenant="quiet"))
    harness.step()
    assert 9 in [sequence.request_id for sequence in harness.running()], "though fewer than four places are free"


@pytest.mark.parametrize("weights", ["gold", "gold=nan"])
def test_weights_that_make_no_sense_end_an_engine_before_its_core_starts(weights: str) -> None:
    options = ["--checkpoint", "nowhere", "--adapter-store", "", "--policy", "fair", "--fairness-weights", weights]
    command = [sys.executable, "-m", "services.engine", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == USAGE_EXIT_CODE
    # Not for the checkpoint, which is not there either.
    assert "the engine cannot start: fairness_weights " in ended.stdout + ended.stderr


def test_settings_become_policies() -> None:
    given_ = EngineSettings("", "", policy="fair", fairness_weights=("gold=2", "a=b=0.5"), max_adapters_a_batch=4)
    assert given_.policies.client_weights == {"gold": 2.0, "a=b": 0.5}
    assert isinstance(make_policy(given_.policies, 8), Combination)
    assert type(make_policy(PolicyConfig(), 8)) is Policy
    assert isinstance(make_policy(PolicyConfig(order="priority"), 8), PriorityOrder)
    assert adapter(None) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fairness_weights": ("gold",)}, "fairness_weights has 'gold'; each is client=number, as gold=2"),
        ({"fairness_weights": ("gold=1", "gold=2")}, "fairness_weights names 'gold' twice"),
        ({"fairness_weights": ("gold=x",)}, "fairness_weights has 'gold=x'; each is client=number, as gold=2"),
        ({"fairness_weights": ("gold=0",)}, "fairness_weights gives 'gold' 0.0; a weight is in 1e-06 to 1e+06"),
        ({"fairness_weights": ("gold=nan",)}, "fairness_weights gives 'gold' nan; a weight is in 1e-06 to 1e+06"),
        ({"output_price": float("inf")}, "output_price is inf; it must be a finite number"),
        ({"priority_head_start": -1}, "priority_head_start is -1; it must be at least 0"),
        ({"priority_head_start": 2**40}, "priority_head_start is 1099511627776; it must be below 1099511627776"),
        ({"input_price": 1e9}, "input_price is 1000000000.0; it must be below 1000000000.0"),
        ({"fairness_headroom": 1.0}, "fairness_headroom is 1.0; it must be below 1"),
        ({"fairness_headroom": float("nan")}, "fairness_headroom is nan; it must be a finite number"),
        ({"input_price": -1.0}, "input_price is -1.0; it must be at least 0"),
        ({"input_price": 0.0, "output_price": 0.0}, "input_price and output_price are 0.0 and 0.0; one of them"),
    ],
)
@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_settings_of_policies_that_make_no_sense_are_refused(policy: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        EngineSettings("", "", policy=policy, **changed)


def test_settings_of_another_policy_than_the_chosen_one_are_named() -> None:
    changed: dict[str, Any] = {"fairness_by": "adapter", "priority_head_start": 3}
    assert EngineSettings("", "", **changed).without_effect == ["priority_head_start", "fairness_by"]
    assert EngineSettings("", "", policy="fair", **changed).without_effect == ["priority_head_start"]
    assert EngineSettings("", "", policy="priority", **changed).without_effect == ["fairness_by"]
    assert EngineSettings("", "").without_effect == []
